//! Memory that the rail cannot touch itself is registered, written and written from. A memory file stands in for a GPU's
//! memory here: it has a descriptor and addresses, and libfabric's `tcp` copies it like host memory.

mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use common::{Pair, pattern};
use efa_core::{
    Completion, DeviceMemory, DeviceRef, DmaBufRange, Held, Interface, RailConfig, RegionError, RejectReason,
    Rejected, Write,
};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

const LEN: usize = 300_000;

/// A mapped memory file, of which the memory is all but the first `offset` bytes.
struct File {
    fd: OwnedFd,
    base: NonNull<u8>,
    offset: usize,
    interface: Interface,
    has_dma_buf: bool,
}

// SAFETY: an address of this process; nothing is tied to a thread.
unsafe impl Send for File {}
// SAFETY: the methods read constants.
unsafe impl Sync for File {}

impl File {
    fn new(offset: usize, interface: Interface, has_dma_buf: bool) -> Self {
        let fd = memfd_create("gpu", MemfdFlags::CLOEXEC).unwrap();
        let all = LEN + offset;
        ftruncate(&fd, all as u64).unwrap();
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            mmap(std::ptr::null_mut(), all, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &fd, 0)
        };
        Self { fd, base: NonNull::new(base.unwrap().cast()).unwrap(), offset, interface, has_dma_buf }
    }

    /// A second way to the bytes, as a device has one.
    fn peek(&self) -> OwnedFd {
        self.fd.try_clone().unwrap()
    }
}

// SAFETY: mapped until the drop, by nobody else.
unsafe impl DeviceMemory for File {
    fn interface(&self) -> Interface {
        self.interface
    }

    fn address(&self) -> usize {
        self.base.as_ptr().addr() + self.offset
    }

    fn len(&self) -> usize {
        LEN
    }

    fn dma_buf(&self) -> Option<DmaBufRange<'_>> {
        self.has_dma_buf.then(|| DmaBufRange { fd: self.fd.as_fd(), offset: self.offset as u64 })
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; rails that used it have closed.
        unsafe { munmap(self.base.as_ptr().cast(), LEN + self.offset) }.unwrap();
    }
}

fn read(fd: &OwnedFd, offset: usize) -> Vec<u8> {
    let mut bytes = vec![0; LEN];
    let mut done = 0;
    while done < LEN {
        done += rustix::io::pread(fd, &mut bytes[done..], (offset + done) as u64).unwrap();
    }
    bytes
}

#[test]
fn writes_go_from_device_memory_to_device_memory() {
    let Some(info) = common::tcp() else { return };
    for (offset, has_dma_buf) in [(0, false), (4096, true), (100, true)] {
        let pair = &mut Pair::open(&info, &RailConfig::for_info(&info));
        let (source, target) = (
            File::new(offset, Interface::Host, has_dma_buf),
            File::new(offset, Interface::Host, has_dma_buf),
        );
        let (from, to) = (source.peek(), target.peek());
        let bytes = pattern(7, LEN);
        rustix::io::pwrite(&from, &bytes, offset as u64).unwrap();

        let (source, target) = (DeviceRef::new(source), DeviceRef::new(target));
        let region = pair.sender.register_device(&source).unwrap();
        let (_, remote) = pair.receiver.expose_device(&target).unwrap();
        assert_eq!(remote.len, LEN as u64);
        let mut write = Some(Write {
            from: source.slice(1000, 200_000).unwrap(),
            region,
            to: pair.to,
            remote: remote.at(50_000, 200_000).unwrap(),
            immediate: Some(5),
            delivery_complete: true,
            token: 9,
        });
        common::until("the post", || match pair.sender.write(write.take()?) {
            Ok(_) => Some(()),
            Err(Rejected { reason: RejectReason::Again, op }) => {
                write = Some(op);
                pair.poll_into(&mut Vec::new(), &mut Vec::new());
                None
            }
            Err(rejected) => panic!("{rejected}"),
        });
        let (ours, _) = pair.collect(1, 1);
        let [Completion::Op { token: 9, result: Ok(_), lease: Held::Device(slice), .. }] = &ours[..] else {
            panic!("{ours:?}")
        };
        assert_eq!(slice.len(), 200_000);
        let mut expected = vec![0; LEN];
        expected[50_000..250_000].copy_from_slice(&bytes[1000..201_000]);
        assert!(read(&to, offset) == expected, "offset {offset}, dma-buf {has_dma_buf}");
    }
}

#[test]
fn a_rail_for_host_memory_refuses_a_gpus() {
    let Some(info) = common::tcp() else { return };
    let pair = &mut Pair::open(&info, &RailConfig::for_info(&info));
    assert!(!info.facts().reaches_device_memory, "it was not asked for");
    let memory = DeviceRef::new(File::new(0, Interface::Cuda { device: 0 }, true));
    for refused in
        [pair.receiver.expose_device(&memory).map(|_| ()), pair.sender.register_device(&memory).map(|_| ())]
    {
        let error = refused.unwrap_err();
        assert!(matches!(error, RegionError::NoDeviceMemory { .. }), "{error}");
        assert!(error.to_string().contains("Hints::device_memory"), "{error}");
    }
}

#[test]
fn slices_lie_inside_and_keep_the_memory() {
    let memory = DeviceRef::new(File::new(0, Interface::Host, false));
    for (offset, len) in [(0, LEN + 1), (LEN, 1), (LEN + 1, 0), (usize::MAX, 2)] {
        assert!(memory.slice(offset, len).is_err(), "{offset} {len}");
    }
    let slice = memory.slice(LEN, 0).unwrap();
    drop(memory);
    assert!(slice.is_empty() && slice.memory().len() == LEN);
}
