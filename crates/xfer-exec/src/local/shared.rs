//! Memory of one host shared by file descriptor: made and sealed by its owner, attached by senders.

use std::ffi::c_void;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use efa_core::{LeaseMut, Memory, MemoryRef, Target, available_bytes};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use super::{LocalError, call};

/// A mapping of a whole file, readable and writable, shared.
struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is not tied to a thread; it is unmapped once, by its owner's drop.
unsafe impl Send for Mapping {}
// SAFETY: `&Mapping` gives out an address and a length only.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of `file`, and makes their pages present: the first push is as fast as the next.
    fn new(file: BorrowedFd<'_>, len: usize) -> Result<Self, LocalError> {
        if len == 0 {
            return Ok(Self { base: NonNull::dangling(), len });
        }
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::POPULATE);
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing; it stays until `drop`.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, file, 0) };
        let base = base.map_err(call("mmap"))?.cast::<u8>();
        NonNull::new(base)
            .map(|base| Self { base, len })
            .ok_or(LocalError::Call { call: "mmap", source: rustix::io::Errno::NOMEM })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: `new` made exactly this mapping, and nobody holds its address any more: leases and `Attached`
            // own the mapping that they point into.
            let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast::<c_void>(), self.len) };
            if let Err(error) = unmapped {
                tracing::error!(%error, "munmap of shared memory");
            }
        }
    }
}

// SAFETY: the file is sealed against shrinking, so `base..base + len` stays valid until `drop` unmaps it, and never
// moves. Whoever has the file may write through it, so the only handle that ever leaves this module is a `Target`, which
// forms no references, and which `is_shared` keeps from becoming anything else.
unsafe impl Memory for Mapping {
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.len
    }

    fn is_shared(&self) -> bool {
        true
    }
}

/// The file behind an arena; a sender that has it can map the arena.
#[derive(Debug, Clone)]
pub struct SharedFile {
    file: Arc<OwnedFd>,
    /// Where this process has it mapped.
    memory: MemoryRef,
}

/// A fresh, sealed file of `bytes` zero bytes, all of them backed by memory.
fn sealed(bytes: u64) -> Result<OwnedFd, LocalError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("weightsync", flags).map_err(call("memfd_create"))?;
    let no_room = |source| LocalError::NoRoom { bytes, source };
    // The kernel would take pages until it kills somebody.
    if available_bytes().is_some_and(|available| bytes > available) {
        return Err(no_room(rustix::io::Errno::NOMEM));
    }
    rustix::fs::ftruncate(&file, bytes).map_err(no_room)?;
    if bytes > 0 {
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes).map_err(no_room)?;
    }
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals).map_err(call("fcntl(F_ADD_SEALS)"))?;
    Ok(file)
}

impl SharedFile {
    /// `bytes` zero bytes, all of them backed by memory, and the file to share them by. They are a target from the
    /// start: whoever gets the file may write them.
    ///
    /// # Errors
    ///
    /// [`LocalError::NoRoom`] when there is no memory for them, rather than a SIGBUS later.
    pub fn create(bytes: u64) -> Result<(Target, Self), LocalError> {
        let file = sealed(bytes)?;
        let too_long = |_| LocalError::NoRoom { bytes, source: rustix::io::Errno::NOMEM };
        let len = usize::try_from(bytes).map_err(too_long)?;
        let mapping = Mapping::new(file.as_fd(), len)?;
        let target = LeaseMut::new(mapping).expose();
        let memory = target.memory().clone();
        Ok((target, Self { file: Arc::new(file), memory }))
    }

    /// Puts fresh zero bytes and a fresh file where `target` is. Whoever has attached the file of before, and perhaps still
    /// writes to it, reaches nothing of `target` any more. Regions that expose `target` have to be closed before: a NIC
    /// would go on writing to the bytes of before.
    ///
    /// # Errors
    ///
    /// [`LocalError::NoRoom`] as [`SharedFile::create`], with nothing changed; both files are there for a moment. Where the
    /// mapping fails, `target` may have no memory behind it any more: do not read it, and end.
    pub fn renew(&mut self, target: &Target) -> Result<(), LocalError> {
        let len = target.len();
        if !target.memory().ptr_eq(&self.memory) || len != self.memory.len() {
            return Err(LocalError::NotItsArena);
        }
        let file = sealed(self.bytes())?;
        if len > 0 {
            let (protection, flags) =
                (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::POPULATE | MapFlags::FIXED);
            let base = target.as_ptr().cast::<c_void>();
            // SAFETY: `self.memory` is the `Mapping` of `create`, and `target` is all of it: the new mapping takes the place of
            // exactly that one, which `target` keeps from being unmapped meanwhile. Nobody has references to its bytes, and a
            // copy that runs sees bytes of before or zeros.
            unsafe { rustix::mm::mmap(base, len, protection, flags, &file, 0) }.map_err(call("mmap"))?;
        }
        self.file = Arc::new(file);
        Ok(())
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.memory.len() as u64
    }
}

impl AsFd for SharedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Another process's arena, mapped here to be written to.
pub struct Attached(Mapping);

impl Attached {
    /// Maps `file`, which the peer says is its region `region` of `expected` bytes.
    pub fn new(file: &OwnedFd, region: u32, expected: u64) -> Result<Self, LocalError> {
        let seals = rustix::fs::fcntl_get_seals(file).map_err(call("fcntl(F_GET_SEALS)"))?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::SEAL) {
            return Err(LocalError::NotSealed);
        }
        let found = rustix::fs::fstat(file).map_err(call("fstat"))?.st_size;
        let found = u64::try_from(found).unwrap_or(0);
        match usize::try_from(expected) {
            Ok(len) if found == expected => Ok(Self(Mapping::new(file.as_fd(), len)?)),
            _ => Err(LocalError::Length { region, expected, found }),
        }
    }

    /// Where so many bytes from `offset` on are; `None` if they are not all in it.
    fn place(&self, offset: u64, len: usize) -> Option<*mut u8> {
        let offset = usize::try_from(offset).ok()?;
        let end = offset.checked_add(len)?;
        // SAFETY: `offset <= len`, so the result is within the mapping (or one past its end, for no bytes).
        (end <= self.0.len).then(|| unsafe { self.0.base.as_ptr().add(offset) })
    }

    /// Copies `from` to `offset`. `None`, and nothing copied, if it does not fit.
    pub fn copy_in(&mut self, offset: u64, from: &[u8]) -> Option<()> {
        let to = self.place(offset, from.len())?;
        // SAFETY: `from` is borrowed from this process's own memory and cannot overlap another process's arena as
        // mapped here; `offset + from.len()` is within the mapping, which `self` keeps, and whose file is sealed
        // against shrinking. The owner forms no references to these bytes while they are exposed.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
        Some(())
    }

    /// As [`Attached::copy_in`], of memory that others may write meanwhile: then the copy is a mix.
    pub fn copy_from(&mut self, offset: u64, from: &Target) -> Option<()> {
        let to = self.place(offset, from.len())?;
        // SAFETY: `from` keeps its mapping and has `len` bytes there; `to` has as many within this mapping, which `self` keeps, and
        // whose file is sealed against shrinking. Nobody forms references to either, and `copy` allows both to be the same, as
        // they are if a peer passes off a file of this process as its own. Nothing is concluded from the values.
        unsafe { std::ptr::copy(from.as_ptr().cast_const(), to, from.len()) };
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_sender_copies_the_owner_reads() {
        let (target, file) = SharedFile::create(10_000).unwrap();
        let mut attached = Attached::new(&file.file, 0, 10_000).unwrap();
        attached.copy_in(9_990, &[7; 10]).unwrap();
        assert_eq!(attached.copy_in(9_991, &[8; 10]), None);
        assert_eq!(attached.copy_in(u64::MAX, &[8; 10]), None);
        let mut read = [0; 11];
        target.read(9_989, &mut read).unwrap();
        assert_eq!(read, [0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7]);
    }

    #[test]
    fn what_others_wrote_is_passed_on() {
        let [(first, file), (second, other)] = [64, 32].map(|bytes| SharedFile::create(bytes).unwrap());
        Attached::new(&file.file, 0, 64).unwrap().copy_in(10, &[5; 20]).unwrap();
        let mut next = Attached::new(&other.file, 0, 32).unwrap();
        next.copy_from(2, &first.slice(8..32).unwrap()).unwrap();
        assert_eq!(next.copy_from(9, &first.slice(8..32).unwrap()), None);
        let mut read = [0; 24];
        second.read(2, &mut read).unwrap();
        assert_eq!(read, [[0; 2].as_slice(), &[5; 20], &[0; 2]].concat()[..]);
        // A file that is this process's own.
        Attached::new(&file.file, 0, 64).unwrap().copy_from(0, &first.slice(10..30).unwrap()).unwrap();
    }

    #[test]
    fn after_a_renewal_nobody_of_before_reaches_the_bytes() {
        let (target, mut file) = SharedFile::create(10_000).unwrap();
        let mut before = Attached::new(&file.file, 0, 10_000).unwrap();
        before.copy_in(0, &[7; 100]).unwrap();
        let address = target.as_ptr();
        file.renew(&target).unwrap();
        before.copy_in(50, &[8; 100]).unwrap();
        let mut after = Attached::new(&file.file, 0, 10_000).unwrap();
        after.copy_in(149, &[9]).unwrap();
        let mut read = [1; 150];
        target.read(0, &mut read).unwrap();
        assert_eq!((target.as_ptr(), &read[..149], read[149]), (address, &[0; 149][..], 9));
        // Only what this module made.
        let (other, _) = SharedFile::create(10_000).unwrap();
        assert!(matches!(file.renew(&other), Err(LocalError::NotItsArena)));
        let private = LeaseMut::zeroed(10_000).unwrap().expose();
        assert!(matches!(file.renew(&private), Err(LocalError::NotItsArena)));
    }

    #[test]
    fn what_was_shared_is_never_a_lease_again() {
        let (target, file) = SharedFile::create(64).unwrap();
        drop(file);
        assert!(target.reclaim().is_err());
    }

    #[test]
    fn an_empty_arena_works() {
        let (_target, file) = SharedFile::create(0).unwrap();
        assert_eq!(Attached::new(&file.file, 0, 0).unwrap().copy_in(0, &[]), Some(()));
    }

    #[test]
    fn a_file_of_another_length_is_refused() {
        let (_target, file) = SharedFile::create(4096).unwrap();
        let error = Attached::new(&file.file, 3, 8192).err().unwrap();
        assert!(matches!(error, LocalError::Length { region: 3, expected: 8192, found: 4096 }), "{error}");
    }

    #[test]
    fn a_file_that_could_shrink_is_refused() {
        let file = rustix::fs::memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&file, 4096).unwrap();
        assert!(matches!(Attached::new(&file, 0, 4096), Err(LocalError::NotSealed)));
    }

    #[test]
    fn the_owner_cannot_shrink_it_either() {
        let (_target, file) = SharedFile::create(4096).unwrap();
        assert!(rustix::fs::ftruncate(&file, 0).is_err());
    }

    #[test]
    fn more_than_there_is_is_an_error() {
        assert!(matches!(SharedFile::create(1 << 60), Err(LocalError::NoRoom { .. })));
    }
}
