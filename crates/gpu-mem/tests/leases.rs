//! One memory serves NICs and GPUs: leases of efa-core are copied, and this crate's memory is leased and registered.

mod common;

use std::sync::Arc;

use common::{device, on_device, pattern, read};
use efa_core::{DeviceMemory as _, DeviceRef, Interface, LeaseMut};
use gpu_mem::{NicAccess, NicMemory, Span};

#[test]
fn leases_are_copied_to_a_device_and_back() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let bytes = pattern(100_000, 1);
    // Page-locked by CUDA; registered with it later; and neither.
    let locked = LeaseMut::new(device.pinned(100_000).unwrap());
    for mut lease in [locked, LeaseMut::zeroed(100_000).unwrap()] {
        assert!(lease.bytes().iter().all(|byte| *byte == 0));
        lease.bytes_mut().copy_from_slice(&bytes);
        let frozen = lease.freeze();
        let slice = frozen.slice(1000..51_000).unwrap();
        let target = on_device(&stream, &[0; 50_000]);
        let (slice, target) =
            stream.copy_to_device(slice, target, &[Span::first(50_000)]).unwrap().wait().unwrap();
        drop(slice);
        let lease = frozen.thaw().unwrap();
        let there = Span { from: 0, to: 50_000, len: 50_000 };
        let (_, lease) = stream.copy_to_host(target, lease, &[there]).unwrap().wait().unwrap();
        assert!(lease.bytes()[..50_000] == bytes[..50_000] && lease.bytes()[50_000..] == bytes[1000..51_000]);
    }
    let mut lease = LeaseMut::zeroed(100_000).unwrap();
    lease.bytes_mut().copy_from_slice(&bytes);
    let registered = device.register_host(lease).unwrap();
    let target = device.alloc(100_000).unwrap();
    let copied = stream.copy_to_device(registered, target, &[Span::first(100_000)]).unwrap();
    let (registered, target) = copied.wait().unwrap();
    assert!(read(&stream, target).1 == registered.unregister().unwrap().bytes());
}

#[test]
fn exported_memory_tells_a_rail_what_it_is() {
    let Some(device) = device() else { return };
    let buffer = Arc::new(device.alloc(1 << 20).unwrap());
    let memory = NicMemory::export(Arc::clone(&buffer), 4096, 8192).unwrap();
    assert_eq!(memory.interface(), Interface::Cuda { device: 0 });
    assert_eq!(efa_core::DeviceMemory::address(&memory) as u64, buffer.address() + 4096);
    assert_eq!(memory.dma_buf().is_some(), matches!(memory.access(), NicAccess::DmaBuf(_)));
    let memory = DeviceRef::new(memory);
    let slice = memory.slice(100, 8092).unwrap();
    assert!(memory.slice(100, 8093).is_err());
    drop(memory);
    assert_eq!(Arc::strong_count(&buffer), 2, "a slice keeps the buffer");
    drop(slice);
    assert_eq!(Arc::strong_count(&buffer), 1);
}
