//! Memory that a NIC may touch, and the three ways to hold a piece of it.
//!
//! A piece of memory is held in exactly one way at a time:
//!
//! | handle | how many | this process may | the network may |
//! |---|---|---|---|
//! | [`LeaseMut`] | one | read and write | read and write, while it is in flight (it is then owned by the rail) |
//! | [`Lease`] | many | read | read |
//! | [`Target`] | many | copy bytes out and send them, no references | write at any time, once it is exposed |
//!
//! Changing from one way to another costs no allocation. This module must never form a reference to bytes that the
//! network may be writing, and never lets go of memory that any handle still names.

use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::error::{MemoryError, RangeError};

/// Memory that can be leased and registered.
///
/// # Safety
///
/// `base()..base() + len()` is valid for reads and writes, at most `isize::MAX` long, never moves and stays mapped until
/// the value is dropped; both methods always answer the same; and nobody forms references to these bytes except through the leases that
/// [`LeaseMut::new`] gives out.
pub unsafe trait Memory: Send + Sync + 'static {
    /// The address of the first byte; dangling where `len()` is 0.
    fn base(&self) -> NonNull<u8>;

    /// The number of bytes.
    fn len(&self) -> usize;

    /// Whether there is no byte.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether other processes may map these bytes. Nobody can take a mapping from them again, so a [`Target`] on such
    /// memory is never reclaimed.
    fn is_shared(&self) -> bool {
        false
    }
}

/// Keeps a [`Memory`] alive. Gives no access to its bytes.
#[derive(Clone)]
pub struct MemoryRef(Arc<dyn Memory>);

impl MemoryRef {
    /// The address of the first byte.
    pub fn base_address(&self) -> usize {
        self.0.base().as_ptr().addr()
    }

    /// The number of bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether both keep the same memory.
    pub fn ptr_eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.0.base()
    }
}

impl fmt::Debug for MemoryRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryRef({:#x}, {} bytes)", self.base_address(), self.len())
    }
}

/// A range of one memory. All handles on a piece are of the same kind, so a count of one means the only handle.
struct Piece {
    memory: MemoryRef,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a piece is an address and a length; the memory behind it is `Send + Sync` by its trait. The handles decide
// who may touch the bytes, and each argues for itself.
unsafe impl Send for Piece {}
// SAFETY: as above; `&Piece` reaches nothing but the address and the length.
unsafe impl Sync for Piece {}

/// The only handle on a piece of memory: this process may read and write it, or hand it to a rail.
///
/// It cannot be cloned:
/// ```compile_fail,E0277
/// fn twice<T: Clone>() {}
/// twice::<efa_core::LeaseMut>();
/// ```
/// and it is gone once it is frozen, exposed or posted:
/// ```compile_fail,E0382
/// let mut lease = efa_core::LeaseMut::zeroed(8).unwrap();
/// let frozen = lease.freeze();
/// lease.bytes_mut()[0] = 1;
/// ```
pub struct LeaseMut {
    piece: Arc<Piece>,
}

impl LeaseMut {
    /// Takes over a memory and leases all of it.
    pub fn new(memory: impl Memory) -> Self {
        let memory = MemoryRef(Arc::new(memory));
        let (base, len) = (memory.base(), memory.len());
        Self { piece: Arc::new(Piece { memory, base, len }) }
    }

    /// Leases `len_bytes` fresh zero bytes: page-aligned, and committed only when they are touched. Zero is allowed.
    ///
    /// # Errors
    ///
    /// [`MemoryError`] when the system has no room for so many.
    pub fn zeroed(len_bytes: usize) -> Result<Self, MemoryError> {
        Ok(Self::new(Mapping::anonymous(len_bytes)?))
    }

    /// As [`Self::zeroed`], with every page present: whatever touches it first is not the slower for it.
    ///
    /// # Errors
    ///
    /// [`MemoryError`] when there is no memory for so many, rather than an end by the kernel's hand later.
    pub fn committed(len_bytes: usize) -> Result<Self, MemoryError> {
        if available_bytes().is_some_and(|available| len_bytes as u64 > available) {
            return Err(MemoryError { bytes: len_bytes, source: rustix::io::Errno::NOMEM.into() });
        }
        let mut lease = Self::zeroed(len_bytes)?;
        lease.bytes_mut().chunks_mut(PAGE_BYTES_MIN).for_each(|page| page[0] = 0);
        Ok(lease)
    }

    /// The number of bytes.
    pub fn len(&self) -> usize {
        self.piece.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The memory that this is a piece of.
    pub fn memory(&self) -> &MemoryRef {
        &self.piece.memory
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the piece keeps the memory mapped. This is its only handle, so nothing writes while it is borrowed:
        // a rail that could let the network write owns the lease by value.
        unsafe { std::slice::from_raw_parts(self.piece.base.as_ptr(), self.piece.len) }
    }

    /// The bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the piece keeps the memory mapped. This is its only handle, it is borrowed uniquely, and no
        // operation is in flight on it, because posting takes the lease by value.
        unsafe { std::slice::from_raw_parts_mut(self.piece.base.as_ptr(), self.piece.len) }
    }

    /// Splits off the first `len_bytes` and keeps the rest; `None`, and nothing changes, when there are fewer.
    pub fn split_to(&mut self, len_bytes: usize) -> Option<Self> {
        let rest = self.piece.len.checked_sub(len_bytes)?;
        let front = Piece { memory: self.piece.memory.clone(), base: self.piece.base, len: len_bytes };
        // SAFETY: `len_bytes` is at most the length of the piece, which lies inside one mapping.
        let base = unsafe { self.piece.base.add(len_bytes) };
        self.piece = Arc::new(Piece { memory: self.piece.memory.clone(), base, len: rest });
        Some(Self { piece: Arc::new(front) })
    }

    /// Gives up writing in exchange for cheap clones.
    pub fn freeze(self) -> Lease {
        Lease { base: self.piece.base, len: self.piece.len, piece: self.piece }
    }

    /// Gives up references in exchange for a range that the network may write at any time.
    pub fn expose(self) -> Target {
        Target { base: self.piece.base, len: self.piece.len, piece: self.piece }
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.piece.base
    }
}

impl fmt::Debug for LeaseMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LeaseMut({:p}, {} bytes)", self.piece.base, self.piece.len)
    }
}

/// One of many handles on a frozen piece, or on a slice of it: everybody may read, nobody may write.
#[derive(Clone)]
pub struct Lease {
    piece: Arc<Piece>,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: an address, a length and a `Send + Sync` owner. The bytes are only read, by whoever holds a handle.
unsafe impl Send for Lease {}
// SAFETY: `&Lease` only reads, and while a handle exists nobody writes.
unsafe impl Sync for Lease {}

impl Lease {
    /// The number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The memory that this is a piece of.
    pub fn memory(&self) -> &MemoryRef {
        &self.piece.memory
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the piece keeps the memory mapped, the range lies inside it, and nothing writes to a frozen piece:
        // the writable lease was consumed by `freeze`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }

    /// A handle on a part; `None` when the range does not lie inside.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        let len = range.end.checked_sub(range.start)?;
        if range.end > self.len {
            return None;
        }
        // SAFETY: the range lies inside this handle's, which lies inside one mapping.
        let base = unsafe { self.base.add(range.start) };
        Some(Self { piece: Arc::clone(&self.piece), base, len })
    }

    /// Gives back the lease that was frozen, whole, when this is the last handle on any part of it.
    ///
    /// # Errors
    ///
    /// The handle itself, when there are others.
    pub fn thaw(mut self) -> Result<LeaseMut, Self> {
        match Arc::get_mut(&mut self.piece) {
            Some(_) => Ok(LeaseMut { piece: self.piece }),
            None => Err(self),
        }
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lease({:p}, {} bytes)", self.base, self.len)
    }
}

/// One of many handles on a piece that the network may write at any time, or on a slice of it.
///
/// No reference to its bytes is ever formed: [`Target::read`] copies, and a copy taken while the network writes may
/// hold a mix of old and new bytes. So does what a rail sends from it. Whether a range is complete is told by the protocol, never
/// by its bytes.
///
/// ```compile_fail,E0599
/// let target = efa_core::LeaseMut::zeroed(8).unwrap().expose();
/// target.bytes();
/// ```
#[derive(Clone)]
pub struct Target {
    piece: Arc<Piece>,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: an address, a length and a `Send + Sync` owner. The bytes are reached through the address alone, by a NIC or by a
// copy that forms no references.
unsafe impl Send for Target {}
// SAFETY: as above; `&Target` reaches nothing but the address and the length.
unsafe impl Sync for Target {}

impl Target {
    /// The number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The memory that this is a piece of.
    pub fn memory(&self) -> &MemoryRef {
        &self.piece.memory
    }

    /// The address of the first byte. It stays valid while any handle lives; who reads or writes through it must
    /// reckon with the network doing so at the same time.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// A handle on a part; `None` when the range does not lie inside.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        let len = range.end.checked_sub(range.start)?;
        if range.end > self.len {
            return None;
        }
        // SAFETY: the range lies inside this handle's, which lies inside one mapping.
        let base = unsafe { self.base.add(range.start) };
        Some(Self { piece: Arc::clone(&self.piece), base, len })
    }

    /// Copies bytes from `offset` on out into `into`.
    ///
    /// # Errors
    ///
    /// [`RangeError`] when the range does not lie inside.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), RangeError> {
        let outside =
            RangeError { offset: offset as u64, len: into.len() as u64, available: self.len() as u64 };
        if offset.checked_add(into.len()).is_none_or(|end| end > self.len()) {
            return Err(outside);
        }
        // SAFETY: the offset lies inside the piece, which lies inside one mapping.
        let from = unsafe { self.base.add(offset) };
        // SAFETY: the piece keeps the source mapped and the range was checked; `into` is borrowed uniquely and, being
        // a reference, cannot overlap a target. The network may write the source meanwhile: nothing is concluded from
        // the values, so a torn copy is the worst outcome, as documented.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies all of it to another target as long. Nothing may write to either meanwhile that the copy is to be whole with.
    ///
    /// # Errors
    ///
    /// [`RangeError`] when the other is not as long.
    pub fn copy_to(&self, other: &Target) -> Result<(), RangeError> {
        let len = self.len();
        if len != other.len() {
            return Err(RangeError { offset: 0, len: len as u64, available: other.len() as u64 });
        }
        // SAFETY: each piece keeps its mapping, and both have `len` bytes. No reference to the bytes of a target exists, and
        // `copy` allows both to be the same. The network may write meanwhile: as for `read`, nothing is concluded from values.
        unsafe { std::ptr::copy(self.base.as_ptr(), other.base.as_ptr(), len) };
        Ok(())
    }

    /// Gives back the lease that was exposed, whole, when this is the last handle on any part of it: no region exposes it any
    /// more, and no clone is left.
    ///
    /// # Errors
    ///
    /// The handle itself, when there are others, or when other processes may have mapped the memory.
    pub fn reclaim(mut self) -> Result<LeaseMut, Self> {
        match Arc::get_mut(&mut self.piece) {
            Some(piece) if !piece.memory.0.is_shared() => Ok(LeaseMut { piece: self.piece }),
            _ => Err(self),
        }
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Target({:p}, {} bytes)", self.base, self.len)
    }
}

/// An anonymous mapping: zero pages, committed when touched.
struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

/// Below this size huge pages cannot help.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// No system has smaller pages.
const PAGE_BYTES_MIN: usize = 4096;

/// Memory that can still be had: on this host as the kernel estimates it, or in this container if that is less.
pub fn available_bytes() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let host = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)?;
    let cgroup = |name: &str| {
        std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?.trim().parse::<u64>().ok()
    };
    let container =
        cgroup("memory.max").zip(cgroup("memory.current")).map(|(max, used)| max.saturating_sub(used));
    Some(container.map_or(host, |container| container.min(host)))
}

impl Mapping {
    fn anonymous(len: usize) -> Result<Self, MemoryError> {
        use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
        if len == 0 {
            return Ok(Self { base: NonNull::dangling(), len });
        }
        let failed = |errno: rustix::io::Errno| MemoryError { bytes: len, source: errno.into() };
        // SAFETY: a new private mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        };
        let base = base.map_err(failed)?;
        if len >= HUGE_PAGE_BYTES {
            // Fewer page faults on first touch and fewer entries in the NIC's translation table. Only advice: a kernel
            // without huge pages refuses it, and nothing is lost.
            // SAFETY: the range is the mapping made above, and this advice changes no contents.
            let _ = unsafe { madvise(base, len, Advice::LinuxHugepage) };
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| failed(rustix::io::Errno::NOMEM))?;
        Ok(Self { base, len })
    }
}

// SAFETY: an address and a length; the mapping belongs to the process, not to a thread.
unsafe impl Send for Mapping {}
// SAFETY: `&Mapping` gives the address and the length, both constant.
unsafe impl Sync for Mapping {}

// SAFETY: the mapping is readable and writable, stays where it is until `drop`, and only `LeaseMut::zeroed` makes one,
// which hands it to its lease and to nobody else.
unsafe impl Memory for Mapping {
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.len == 0 {
            return;
        }
        // SAFETY: made by `anonymous`, and the last handle is gone, so neither this process nor a rail uses it.
        if let Err(errno) = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) } {
            tracing::error!(bytes = self.len, %errno, "a mapping could not be given back and is leaked");
        }
    }
}

#[cfg(test)]
mod tests;
