//! Memory that the rail cannot touch itself is registered, written and written from. A memory file stands in for a GPU's
//! memory here: it has a descriptor and addresses, and libfabric's `tcp` copies it like host memory.

mod common;

use std::os::fd::OwnedFd;

use common::{Pair, pattern};
use efa_core::{
    Completion, DeviceRef, Held, Interface, MemoryFile, RailConfig, RegionError, RejectReason, Rejected,
    Write,
};

const LEN: usize = 300_000;

fn read(fd: &OwnedFd, offset: usize) -> Vec<u8> {
    let mut bytes = vec![0; LEN];
    let mut done = 0;
    while done < LEN {
        done += rustix::io::pread(fd, &mut bytes[done..], (offset + done) as u64).unwrap();
    }
    bytes
}

fn file(offset: usize, interface: Interface, has_dma_buf: bool) -> MemoryFile {
    MemoryFile::new(offset, LEN, interface, has_dma_buf).unwrap()
}

#[test]
fn writes_go_from_device_memory_to_device_memory() {
    let Some(info) = common::tcp() else { return };
    for (offset, has_dma_buf) in [(0, false), (4096, true), (100, true)] {
        let pair = &mut Pair::open(&info, &RailConfig::for_info(&info));
        let (source, target) =
            (file(offset, Interface::Host, has_dma_buf), file(offset, Interface::Host, has_dma_buf));
        let (from, to) = (source.peek().unwrap(), target.peek().unwrap());
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
    let memory = DeviceRef::new(file(0, Interface::Cuda { device: 0 }, true));
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
    let memory = DeviceRef::new(file(0, Interface::Host, false));
    for (offset, len) in [(0, LEN + 1), (LEN, 1), (LEN + 1, 0), (usize::MAX, 2)] {
        assert!(memory.slice(offset, len).is_err(), "{offset} {len}");
    }
    let slice = memory.slice(LEN, 0).unwrap();
    drop(memory);
    assert!(slice.is_empty() && slice.memory().len() == LEN);
}
