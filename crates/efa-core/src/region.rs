//! Registrations: what the NIC may touch, and what peers may reach.
//!
//! A registration keeps its memory alive, and outlives every operation of ours that names it. Closing one hides its
//! memory from peers; whether the memory can be handed back at once depends on who enforces that, see [`Closed`].

use std::ffi::c_void;
use std::fmt;

use libfabric_sys as sys;
use serde::{Deserialize, Serialize};

use crate::device::{DeviceRef, Interface};
use crate::error::{CallError, Errno, RangeError, RegionError};
use crate::memory::{Lease, MemoryRef, Target};
use crate::object::Object;
use crate::rail::{Live, Rail};
use crate::table::{Key, Table};

/// How many registrations one rail can have. A transfer needs a few; a NIC has room for some hundred thousand.
pub const REGIONS_MAX: usize = 65_536;

/// A random key of 8 bytes is free at the first try; a key of one byte may need several.
const KEY_TRIES_MAX: u32 = 16;

/// Names a registration of one rail. The id of a closed region is never given to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionId(pub(crate) Key);

impl fmt::Display for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "region {}.{}", self.0.index, self.0.generation)
    }
}

/// What a peer must know to reach a region. It comes from the peer that owns the region: believe nothing but its form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RemoteRegion {
    /// The address of the first byte: 0 where the provider counts from the start of the region.
    pub base: u64,
    /// The key.
    pub key: u64,
    /// The length in bytes.
    pub len: u64,
}

impl RemoteRegion {
    /// The span of `len_bytes` from `offset_bytes` on.
    ///
    /// # Errors
    ///
    /// [`RangeError`] when it does not lie inside, or its end has no address.
    pub fn at(&self, offset_bytes: u64, len_bytes: u64) -> Result<RemoteSpan, RangeError> {
        let inside = offset_bytes.checked_add(len_bytes).filter(|end| *end <= self.len);
        match inside.and_then(|end| self.base.checked_add(end)) {
            // The start is at most the end, which has an address.
            Some(_) => Ok(RemoteSpan { address: self.base + offset_bytes, key: self.key, len: len_bytes }),
            None => Err(RangeError { offset: offset_bytes, len: len_bytes, available: self.len }),
        }
    }
}

/// A range of a remote region, checked against the region's length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RemoteSpan {
    pub(crate) address: u64,
    pub(crate) key: u64,
    pub(crate) len: u64,
}

impl RemoteSpan {
    /// The length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// What has become of the memory of a closed region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    /// Nothing can touch it any more; the rail has let go of it.
    Released,
    /// Peers can start no new access. The provider moves bytes in software (or may fall back to it), and an access that
    /// it had admitted before may still be under way, so the rail holds the memory until it closes.
    HeldUntilRailCloses,
}

/// What a registration keeps alive.
pub(crate) enum Keep {
    Memory(#[expect(dead_code, reason = "held to keep the memory alive")] MemoryRef),
    Target(#[expect(dead_code, reason = "held to keep the memory alive, and from being reclaimed")] Target),
    Lease(#[expect(dead_code, reason = "held to keep the memory alive, and from being thawed")] Lease),
    Device(#[expect(dead_code, reason = "held to keep the memory alive")] DeviceRef),
    /// As `Device`, and no peer can reach it.
    LocalDevice(#[expect(dead_code, reason = "held to keep the memory alive")] DeviceRef),
}

/// A range to register.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) base: *mut u8,
    pub(crate) len: usize,
    pub(crate) interface: Interface,
    pub(crate) dma_buf: Option<sys::fi_mr_dmabuf>,
}

impl Place {
    fn host(base: *mut u8, len: usize) -> Self {
        Self { base, len, interface: Interface::Host, dma_buf: None }
    }
}

pub(crate) struct Registration {
    /// `None` where the provider asks for no registration of local buffers.
    mr: Option<Object<sys::fid_mr>>,
    keep: Keep,
    desc: *mut c_void,
    base: usize,
    len: usize,
    pub(crate) in_flight: u32,
}

// SAFETY: the descriptor is a value that is handed back to the provider, never followed; the rest is `Send` itself.
unsafe impl Send for Registration {}

impl Registration {
    /// Whether these bytes lie inside. Addresses decide: the registration keeps its own range mapped, so a lease at
    /// such an address is a piece of the same memory.
    pub(crate) fn covers(&self, address: usize, len: usize) -> bool {
        match (address.checked_sub(self.base), address.checked_add(len)) {
            (Some(_), Some(end)) => end - self.base <= self.len,
            _ => false,
        }
    }

    /// What to post local buffers with.
    pub(crate) fn desc(&self) -> *mut c_void {
        self.desc
    }

    #[cfg(test)]
    pub(crate) fn object(&self) -> Option<&Object<sys::fid_mr>> {
        self.mr.as_ref()
    }

    /// Closes the provider's side. On failure it is still open.
    fn close(&mut self) -> Result<(), Errno> {
        match self.mr.take().map(Object::close) {
            None | Some(Ok(())) => Ok(()),
            Some(Err((mr, errno))) => {
                self.mr = Some(mr);
                Err(errno)
            }
        }
    }

    /// Closes, then lets go of the memory; or leaks both.
    fn discard(mut self) {
        if let Err(errno) = self.close() {
            tracing::error!(bytes = self.len, %errno, "fi_close(mr) failed; its memory is leaked");
            // The NIC may still have the range mapped: leaking is safe, freeing is not.
            std::mem::forget(self);
        }
    }
}

/// All registrations of a rail, and the memory of closed ones that cannot be let go of yet.
pub(crate) struct Regions {
    pub(crate) table: Table<Registration>,
    held: Vec<Keep>,
}

impl Regions {
    pub(crate) fn new() -> Self {
        Self { table: Table::new(REGIONS_MAX), held: Vec::new() }
    }
}

impl Drop for Regions {
    /// Runs after the endpoint has closed, so nothing moves bytes any more.
    fn drop(&mut self) {
        self.table.drain().for_each(Registration::discard);
    }
}

impl Rail {
    /// Makes a memory usable for buffers of our own: the source of writes and sends, the destination of reads and
    /// receives. Gives peers no access.
    ///
    /// # Errors
    ///
    /// [`RegionError::Full`] beyond [`REGIONS_MAX`]; [`RegionError::Call`] when the provider refuses, most often for a
    /// limit on locked memory.
    pub fn register(&mut self, memory: &MemoryRef) -> Result<RegionId, RegionError> {
        let access = sys::FI_WRITE | sys::FI_READ | sys::FI_SEND | sys::FI_RECV;
        let (base, len) = (memory.base().as_ptr(), memory.len());
        let keep = Keep::Memory(memory.clone());
        let live = &mut *self.live;
        if !live.info.facts().needs_local_registration || len == 0 {
            let registration = Registration {
                mr: None,
                keep,
                desc: std::ptr::null_mut(),
                base: base.addr(),
                len,
                in_flight: 0,
            };
            return live.keep_region(registration);
        }
        let place = Place::host(base, len);
        let mr = live.open_region(&place, access)?;
        live.adopt_region(mr, keep, &place).map(|(id, _)| id)
    }

    /// Lets peers write to a target (and read it), until the region is closed.
    ///
    /// # Errors
    ///
    /// As [`Rail::register`]; also [`RegionError::Empty`] for a target without bytes.
    pub fn expose(&mut self, target: &Target) -> Result<(RegionId, RemoteRegion), RegionError> {
        let access = sys::FI_REMOTE_WRITE | sys::FI_REMOTE_READ;
        let (base, len) = (target.base().as_ptr(), target.len());
        self.live.open_remote(Keep::Target(target.clone()), &Place::host(base, len), access)
    }

    /// Lets peers read frozen bytes, until the region is closed.
    ///
    /// # Errors
    ///
    /// As [`Rail::expose`].
    pub fn share(&mut self, lease: &Lease) -> Result<(RegionId, RemoteRegion), RegionError> {
        let (base, len) = (lease.base().as_ptr(), lease.len());
        self.live.open_remote(Keep::Lease(lease.clone()), &Place::host(base, len), sys::FI_REMOTE_READ)
    }

    /// Closes a region: our operations can no longer name it, and peers can start no new access.
    ///
    /// # Errors
    ///
    /// [`RegionError::Busy`] while operations of ours that name it are in flight; [`RegionError::Call`] when the
    /// provider refuses. The region is still open then.
    pub fn close_region(&mut self, region: RegionId) -> Result<Closed, RegionError> {
        let live = &mut *self.live;
        let unknown = || RegionError::Unknown { on: live.name.clone(), region };
        let registration = live.regions.table.get_mut(region.0).ok_or_else(unknown)?;
        if registration.in_flight > 0 {
            let in_flight = registration.in_flight;
            return Err(RegionError::Busy { on: live.name.clone(), region, in_flight });
        }
        if let Err(errno) = registration.close() {
            return Err(CallError { call: "fi_close(mr)", on: live.name.clone(), errno }.into());
        }
        let registration = live.regions.table.remove(region.0).ok_or_else(unknown)?;
        let remote = !matches!(registration.keep, Keep::Memory(_) | Keep::LocalDevice(_));
        if remote && !live.nic_enforces_access {
            live.regions.held.push(registration.keep);
            return Ok(Closed::HeldUntilRailCloses);
        }
        Ok(Closed::Released)
    }
}

impl Live {
    pub(crate) fn open_remote(
        &mut self,
        keep: Keep,
        place: &Place,
        access: u64,
    ) -> Result<(RegionId, RemoteRegion), RegionError> {
        if place.len == 0 {
            return Err(RegionError::Empty { on: self.name.clone() });
        }
        let mr = self.open_region(place, access)?;
        self.adopt_remote(mr, keep, place)
    }

    pub(crate) fn adopt_remote(
        &mut self,
        mr: Object<sys::fid_mr>,
        keep: Keep,
        place: &Place,
    ) -> Result<(RegionId, RemoteRegion), RegionError> {
        let (id, key) = self.adopt_region(mr, keep, place)?;
        let base = if self.info.facts().uses_virtual_addresses { place.base.addr() as u64 } else { 0 };
        Ok((id, RemoteRegion { base, key, len: place.len as u64 }))
    }

    /// Registers a range, under an unguessable key where the key is ours to choose.
    pub(crate) fn open_region(
        &mut self,
        place: &Place,
        access: u64,
    ) -> Result<Object<sys::fid_mr>, RegionError> {
        if self.regions.table.is_full() {
            return Err(RegionError::Full { on: self.name.clone(), max: REGIONS_MAX });
        }
        let facts = self.info.facts();
        let iov = sys::iovec { iov_base: place.base.cast(), iov_len: place.len };
        let (what, flags) = match &place.dma_buf {
            Some(dma_buf) => (sys::fi_mr_what { dmabuf: std::ptr::from_ref(dma_buf) }, sys::FI_MR_DMABUF),
            None => (sys::fi_mr_what { mr_iov: &raw const iov }, 0),
        };
        let (iface, device) = match place.interface {
            Interface::Host => (sys::FI_HMEM_SYSTEM, sys::fi_mr_device { reserved: 0 }),
            Interface::Cuda { device } => (sys::FI_HMEM_CUDA, sys::fi_mr_device { cuda: device }),
        };
        let mut attr = sys::fi_mr_attr {
            what,
            iov_count: 1,
            access,
            offset: 0,
            requested_key: 0,
            context: std::ptr::null_mut(),
            auth_key_size: 0,
            auth_key: std::ptr::null_mut(),
            iface,
            device,
            hmem_data: std::ptr::null_mut(),
            page_size: 0,
            base_mr: std::ptr::null(),
            sub_mr_cnt: 0,
        };
        let tries = if facts.chooses_keys { 1 } else { KEY_TRIES_MAX };
        for _ in 0..tries {
            if !facts.chooses_keys {
                attr.requested_key = random_key(facts.key_bytes)
                    .map_err(|source| RegionError::Random { on: self.name.clone(), source })?;
            }
            let opened = Object::open(&self.library, "fi_mr_regattr", &self.name, |mr| {
                // SAFETY: the domain is open. The range is mapped, and the registration keeps it so until the region is
                // closed; the attributes are of the newest size, so no version reads beyond them, and a dma-buf is
                // named only to a version that knows the flag.
                unsafe { sys::fi_mr_regattr(self.domain.as_ptr(), &raw const attr, flags, mr) }
            });
            match opened {
                Err(error) if error.errno.code == sys::FI_ENOKEY && !facts.chooses_keys => {}
                other => return other.map_err(RegionError::from),
            }
        }
        Err(RegionError::NoKey { on: self.name.clone(), tries, key_bytes: facts.key_bytes })
    }

    fn adopt_region(
        &mut self,
        mr: Object<sys::fid_mr>,
        keep: Keep,
        place: &Place,
    ) -> Result<(RegionId, u64), RegionError> {
        // SAFETY: the registration is open.
        let key = unsafe { sys::fi_mr_key(mr.as_ptr()) };
        // SAFETY: as above.
        let desc = unsafe { sys::fi_mr_desc(mr.as_ptr()) };
        let (base, len) = (place.base.addr(), place.len);
        let registration = Registration { mr: Some(mr), keep, desc, base, len, in_flight: 0 };
        if key == sys::FI_KEY_NOTAVAIL {
            registration.discard();
            return Err(RegionError::RawKey { on: self.name.clone() });
        }
        self.keep_region(registration).map(|id| (id, key))
    }

    fn keep_region(&mut self, registration: Registration) -> Result<RegionId, RegionError> {
        match self.regions.table.insert(registration) {
            Ok(key) => Ok(RegionId(key)),
            Err(registration) => {
                registration.discard();
                Err(RegionError::Full { on: self.name.clone(), max: REGIONS_MAX })
            }
        }
    }
}

/// A key of as many random bytes as the provider takes. It is what keeps a stranger out of the memory.
fn random_key(key_bytes: usize) -> Result<u64, getrandom::Error> {
    let random = getrandom::u64()?;
    let bits = 8 * key_bytes.clamp(1, 8);
    let key = random >> (64 - bits);
    // All ones means "no key" to libfabric.
    Ok(if key == sys::FI_KEY_NOTAVAIL { key >> 1 } else { key })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_stay_inside_their_region() {
        let region = RemoteRegion { base: 0x1000, key: 7, len: 100 };
        assert_eq!(region.at(0, 100), Ok(RemoteSpan { address: 0x1000, key: 7, len: 100 }));
        assert_eq!(region.at(100, 0), Ok(RemoteSpan { address: 0x1064, key: 7, len: 0 }));
        for (offset, len) in [(0, 101), (100, 1), (101, 0), (u64::MAX, 1), (1, u64::MAX)] {
            assert_eq!(region.at(offset, len), Err(RangeError { offset, len, available: 100 }));
        }
        let absurd = RemoteRegion { base: u64::MAX - 10, key: 7, len: 100 };
        assert!(absurd.at(0, 10).is_ok());
        assert!(absurd.at(0, 11).is_err(), "the end has no address");
    }

    #[test]
    fn a_registration_covers_its_bytes_and_no_other() {
        let keep = Keep::Memory(crate::LeaseMut::zeroed(0).unwrap().memory().clone());
        let desc = std::ptr::null_mut();
        let registration = Registration { mr: None, keep, desc, base: 1000, len: 100, in_flight: 0 };
        for (address, len) in [(1000, 100), (1000, 1), (1099, 1), (1050, 50), (1100, 0)] {
            assert!(registration.covers(address, len), "{address} {len}");
        }
        for (address, len) in
            [(999, 1), (999, 102), (1000, 101), (1099, 2), (1100, 1), (0, 1), (1050, usize::MAX)]
        {
            assert!(!registration.covers(address, len), "{address} {len}");
        }
    }

    #[test]
    fn keys_fit_and_differ() {
        for key_bytes in 1..=8_usize {
            let keys: Vec<u64> = (0..64).map(|_| random_key(key_bytes).unwrap()).collect();
            assert!(keys.iter().all(|key| u128::from(*key) < 1_u128 << (8 * key_bytes)));
            assert!(
                keys.windows(2).any(|pair| pair[0] != pair[1]),
                "64 equal random keys of {key_bytes} bytes"
            );
        }
    }
}
