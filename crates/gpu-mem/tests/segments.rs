//! Foreign memory is found by its segments, told to a NIC segment by segment, and missed when it is gone.

mod common;

use std::os::fd::AsRawFd;
use std::sync::Arc;

use common::{device, devices, on_device, pattern, pinned, read, read_shared};
use cudarc::driver::sys;
use gpu_mem::{
    Cached, DeviceMemory, Error, Found, NicAccess, NicMemory, Observer, RegistrationCache, Span, inject,
};

const MIB: u64 = 1 << 20;

#[test]
fn tensors_of_one_allocation_share_one_segment() {
    let Some(device) = device() else { return };
    let buffer = device.alloc(8 * MIB).unwrap();
    let tensors: Vec<(u64, u64)> = (0..100)
        .map(|index| (buffer.address() + index * 1000, 900))
        .chain([(buffer.address(), 8 * MIB)])
        .collect();
    let segments = device.segments(&tensors).unwrap();
    let segment = segments.iter().next().unwrap();
    assert_eq!((segments.len(), segment.range.clone()), (1, buffer.address()..buffer.address() + 8 * MIB));
    assert!(segment.identity.is_some() && !segment.is_mapped, "{segment:?}");
    let pieces = segments.locate(tensors[3].0, tensors[3].1).unwrap();
    assert_eq!((pieces.len(), pieces[0].offset, pieces[0].len), (1, 3000, 900));
    device.check_segment(segment).unwrap();
}

#[test]
fn mapped_memory_has_a_segment_for_each_chunk() {
    let Some(device) = device() else { return };
    if !device.has_vmm().unwrap() {
        println!("skipped: the device does not map memory separately");
        return;
    }
    let buffer = device.alloc_vmm(8 * MIB, 1).unwrap();
    let chunks: Vec<_> = buffer.chunks().collect();
    let segments = device.segments(&[(buffer.address(), buffer.len())]).unwrap();
    println!("mapped segments: {segments:?}");
    assert_eq!(segments.iter().map(|segment| segment.range.clone()).collect::<Vec<_>>(), chunks);
    assert!(segments.iter().all(|segment| segment.is_mapped));
    let across = segments.locate(chunks[0].end - 10, 30).unwrap();
    assert_eq!(across.iter().map(|piece| piece.len).collect::<Vec<_>>(), [10, 20]);
}

#[test]
fn memory_that_was_freed_or_replaced_is_missed() {
    let Some(device) = device() else { return };
    let buffer = device.alloc(4 * MIB).unwrap();
    // SAFETY: the test looks at the segments only, and uses no byte.
    let foreign = unsafe { device.adopt(vec![(buffer.address(), 1000)], "a tensor") }.unwrap();
    foreign.check().unwrap();
    drop(buffer);
    device.reclaim();
    let error = foreign.check().unwrap_err();
    assert!(matches!(error, Error::Freed { .. }), "{error}");
    // The address may well be given out again; the allocation is another one.
    let _other = device.alloc(4 * MIB).unwrap();
    assert!(matches!(foreign.check(), Err(Error::Freed { .. })));
    assert_eq!(*foreign.owner(), "a tensor");
}

#[test]
fn foreign_memory_is_copied_and_its_owner_kept() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let bytes = pattern(2000, 8);
    let owner = Arc::new(on_device(&stream, &bytes));
    // SAFETY: the owner is the buffer itself, and nobody else uses it.
    let foreign = unsafe { device.adopt(vec![(owner.address() + 100, 500)], Arc::clone(&owner)) }.unwrap();
    let foreign = Arc::new(foreign);
    assert!(foreign.range(1).is_none() && foreign.segment(1).is_none());
    let range = foreign.range(0).unwrap();
    // A NIC is told of whole segments.
    let exported = NicMemory::export(foreign.segment(0).unwrap(), 0, 2000).unwrap();
    assert_eq!((exported.address(), exported.len()), (owner.address(), 2000));
    drop((exported, foreign));
    let copied = stream.copy_to_host(range, device.pinned(500).unwrap(), &[Span::first(500)]).unwrap();
    let (range, host) = copied.wait().unwrap();
    assert_eq!((host.bytes(), Arc::strong_count(&owner)), (&bytes[100..600], 2));
    drop(range);
    assert_eq!((Arc::strong_count(&owner), read_shared(&stream, &owner)), (1, bytes));
}

#[test]
fn what_is_no_memory_of_the_device_is_refused_by_name() {
    let Some(device) = device() else { return };
    let locked = pinned(&device, &[1; 4096]);
    let plain = vec![1_u8; 4096];
    let address = |bytes: &[u8]| bytes.as_ptr().addr() as u64;
    let cases = [
        (address(locked.bytes()), "host memory"),
        (address(&plain), "CUDA"),
        (0, "CUDA"),
        (u64::MAX - 4096, "CUDA"),
    ];
    for (address, why) in cases {
        let error = device.segments(&[(address, 100)]).unwrap_err();
        assert!(matches!(error, Error::Pointer { .. }) && error.to_string().contains(why), "{error}");
    }
    // SAFETY: refused, so nothing is used.
    let failed = unsafe { device.adopt(vec![(address(&plain), 1)], plain) }.unwrap_err();
    assert_eq!(failed.returned.unwrap().len(), 4096);

    let managed = Managed::new();
    let error = device.segments(&[(managed.0, 100)]).unwrap_err();
    assert!(error.to_string().contains("managed memory"), "{error}");
}

#[test]
fn memory_of_another_gpu_is_refused_by_name() {
    let Some([first, second]) = devices::<2>() else { return };
    let there = second.alloc(MIB).unwrap();
    let error = first.segments(&[(there.address(), 100)]).unwrap_err();
    assert!(error.to_string().contains("memory of GPU 1"), "{error}");
    assert_eq!(second.segments(&[(there.address(), 100)]).unwrap().len(), 1);
}

/// A little managed memory, made behind this crate's back.
struct Managed(u64);

impl Managed {
    fn new() -> Self {
        let mut context = std::ptr::null_mut();
        // SAFETY: device 0 exists; the context is released by the drop.
        let retained = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, 0) };
        // SAFETY: retained above.
        let set = unsafe { sys::cuCtxSetCurrent(context) };
        let mut address = 0;
        let global = sys::CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL as u32;
        // SAFETY: a context is current; the drop frees what is allocated.
        let allocated = unsafe { sys::cuMemAllocManaged(&raw mut address, 4096, global) };
        assert_eq!([retained as u32, set as u32, allocated as u32], [0; 3]);
        Self(address)
    }
}

impl Drop for Managed {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`.
        let freed = unsafe { sys::cuMemFree_v2(self.0) };
        // SAFETY: none is current then.
        let unset = unsafe { sys::cuCtxSetCurrent(std::ptr::null_mut()) };
        // SAFETY: retained by `new`.
        let released = unsafe { sys::cuDevicePrimaryCtxRelease_v2(0) };
        assert_eq!([freed as u32, unset as u32, released as u32], [0; 3]);
    }
}

#[test]
fn a_nic_is_told_of_memory_by_dma_buf_or_by_address_and_why() {
    let Some(device) = device() else { return };
    let buffer = Arc::new(device.alloc(4 * MIB).unwrap());
    let exported = NicMemory::export(Arc::clone(&buffer), 100, MIB).unwrap();
    assert_eq!((exported.address(), exported.len()), (buffer.address() + 100, MIB));
    match exported.access() {
        NicAccess::DmaBuf(dma_buf) => {
            assert!(dma_buf.fd().as_raw_fd() > 2 && dma_buf.offset() == 100, "{dma_buf:?}");
        }
        NicAccess::Address(reason) => {
            assert!(!device.has_dma_buf().unwrap(), "the device says that it exports: {reason}");
        }
    }
    for (offset, len) in [(0, 4 * MIB + 1), (4 * MIB, 1), (0, 0), (u64::MAX, 1)] {
        assert!(matches!(NicMemory::export(Arc::clone(&buffer), offset, len), Err(Error::Range { .. })));
    }
    if device.has_dma_buf().unwrap() {
        inject::fail("cuMemGetHandleForAddressRange", 0, sys::CUresult::CUDA_ERROR_NOT_SUPPORTED as i32);
        let exported = NicMemory::export(Arc::clone(&buffer), 0, MIB).unwrap();
        let NicAccess::Address(reason) = exported.access() else { panic!("{exported:?}") };
        assert!(reason.to_string().contains("cuMemGetHandleForAddressRange"), "{reason}");
    }
}

#[test]
fn mapped_memory_is_told_chunk_by_chunk() {
    let Some(device) = device() else { return };
    if !device.has_vmm().unwrap() {
        println!("skipped: the device does not map memory separately");
        return;
    }
    let buffer = Arc::new(device.alloc_vmm(6 * MIB, 1).unwrap());
    for chunk in buffer.chunks() {
        let offset = chunk.start - buffer.address();
        let exported = NicMemory::export(Arc::clone(&buffer), offset, chunk.end - chunk.start).unwrap();
        match exported.access() {
            NicAccess::DmaBuf(dma_buf) => assert_eq!(dma_buf.offset(), 0),
            NicAccess::Address(reason) => println!("no dma-buf of mapped memory: {reason}"),
        }
    }
}

#[test]
fn registrations_follow_allocations_and_not_addresses() {
    let Some(device) = device() else { return };
    let mut cache = RegistrationCache::<u64>::default();
    let mut addresses = Vec::new();
    for round in 0..4 {
        let buffer = device.alloc(4 * MIB).unwrap();
        addresses.push(buffer.address());
        let segments = device.segments(&[(buffer.address() + 5, 10)]).unwrap();
        let segment = segments.iter().next().unwrap();
        for _ in 0..2 {
            let Ok(Found { registration, stale }) = cache.find(segment, |_| Ok::<_, ()>(round)) else {
                panic!()
            };
            assert_eq!(registration, Cached::Kept(&round), "the memory of round {round} has its own");
            assert!(stale.iter().all(|old| *old < round));
        }
    }
    println!("addresses given out: {addresses:x?}");
}

#[test]
fn writes_of_nics_are_flushed_or_the_platform_says_why_not() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    for observer in [Observer::Owner, Observer::AllDevices] {
        match device.flush_rdma_writes(observer) {
            Ok(flushed) => println!("{observer:?}: {flushed:?}"),
            Err(error) => {
                println!("{observer:?}: {error}");
                assert!(!error.is_device_lost(), "{error}");
            }
        }
    }
    assert_eq!(read(&stream, on_device(&stream, &[1; 9])).1, [1; 9]);
}
