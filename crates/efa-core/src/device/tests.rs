//! How device memory is told to the provider, and what follows when it refuses. A file stands in for the dma-buf.

use std::cell::RefCell;
use std::ffi::c_int;
use std::fs::File;
use std::os::fd::AsFd;

use super::*;
use crate::{Hints, LeaseMut, Library, RailConfig};

/// Host memory that claims to stand behind a descriptor.
struct Fake {
    memory: LeaseMut,
    fd: Option<File>,
    offset: u64,
}

// SAFETY: a lease is mapped until it is dropped, and the test uses none of its bytes.
unsafe impl DeviceMemory for Fake {
    fn interface(&self) -> Interface {
        Interface::Host
    }

    fn address(&self) -> usize {
        self.memory.bytes().as_ptr().addr()
    }

    fn len(&self) -> usize {
        self.memory.len()
    }

    fn dma_buf(&self) -> Option<DmaBufRange<'_>> {
        let fd = self.fd.as_ref()?;
        Some(DmaBufRange { fd: fd.as_fd(), offset: self.offset })
    }
}

fn fake(fd: bool, offset: u64) -> DeviceRef {
    let fd = fd.then(|| File::open("/dev/null").unwrap());
    DeviceRef::new(Fake { memory: LeaseMut::zeroed(8192).unwrap(), fd, offset })
}

const NEW: sys::Version = sys::Version::BOUND;
const OLD: sys::Version = sys::Version { major: 1, minor: 19 };

#[test]
fn a_dma_buf_is_told_so_that_base_and_offset_meet_at_the_address() {
    for offset in [0, 1, 4096] {
        let memory = fake(true, offset);
        let place = memory.dma_buf_place(NEW, true).ok().unwrap();
        let range = place.dma_buf.unwrap();
        assert_eq!(range.base_addr.addr() + range.offset as usize, memory.0.address());
        assert_eq!((place.base.addr(), place.len, range.len), (memory.0.address(), 8192, 8192));
        assert_eq!(range.fd, memory.0.dma_buf().unwrap().fd.as_raw_fd());
    }
}

#[test]
fn every_reason_for_no_dma_buf_is_told() {
    let why = |memory: &DeviceRef, version, virtual_addresses| {
        memory.dma_buf_place(version, virtual_addresses).err().unwrap()
    };
    assert!(why(&fake(false, 0), NEW, true).contains("none"));
    let old = why(&fake(true, 0), OLD, true);
    assert!(old.contains("1.19") && old.contains("1.20"), "{old}");
    assert!(why(&fake(true, 0), NEW, false).contains("start of a region"));
    assert!(why(&fake(true, u64::MAX), NEW, true).contains("before all addresses"));
}

type RegAttr =
    unsafe extern "C" fn(*mut sys::fid, *const sys::fi_mr_attr, u64, *mut *mut sys::fid_mr) -> c_int;

thread_local! {
    static PROVIDERS_OWN: RefCell<Option<RegAttr>> = const { RefCell::new(None) };
    static FLAGS: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

unsafe extern "C" fn refuses_dma_bufs(
    domain: *mut sys::fid,
    attr: *const sys::fi_mr_attr,
    flags: u64,
    mr: *mut *mut sys::fid_mr,
) -> c_int {
    FLAGS.with_borrow_mut(|all| all.push(flags));
    let own = PROVIDERS_OWN.with_borrow(|own| *own);
    match own {
        // SAFETY: the rail's own arguments, passed on.
        Some(own) if flags == 0 => unsafe { own(domain, attr, flags, mr) },
        _ => -sys::FI_EINVAL,
    }
}

#[test]
fn a_refused_dma_buf_is_registered_by_its_address() {
    let Ok(library) = Library::open() else { return println!("skipped: no libfabric") };
    let hints = Hints { provider: library.tcp_provider(), ..Hints::default() };
    let Ok(mut infos) = library.infos(&hints) else { return println!("skipped: no tcp") };
    let info = infos.swap_remove(0);
    let mut rail = Rail::open(&info, &RailConfig::for_info(&info)).unwrap();
    let memory = fake(true, 100);
    let place = || memory.dma_buf_place(NEW, true);
    let access = sys::FI_REMOTE_WRITE;

    if info.library().version() >= DMA_BUF_VERSION {
        // The provider itself takes the flag and the structure.
        let by_dma_buf = rail.live.open_at(&memory, place(), Keep::Device(memory.clone()), access).unwrap();
        assert_eq!(by_dma_buf.1.len, 8192);
    }
    let domain = rail.live.domain.as_ptr();
    // SAFETY: the domain is open.
    let provided = unsafe { (*domain).mr };
    // SAFETY: a table of plain pointers, as long in 1.17 as in 2.1.
    let mut table = Box::new(unsafe { provided.read() });
    PROVIDERS_OWN.with_borrow_mut(|own| *own = table.regattr);
    table.regattr = Some(refuses_dma_bufs);
    // SAFETY: as above; the changed copy is leaked, and nothing else runs on this rail.
    unsafe { (*domain).mr = Box::leak(table) };
    let (region, remote) = rail.live.open_at(&memory, place(), Keep::Device(memory.clone()), access).unwrap();
    assert_eq!(FLAGS.take(), [sys::FI_MR_DMABUF, 0]);
    assert_eq!(remote.len, 8192);
    rail.close_region(region).unwrap();
}
