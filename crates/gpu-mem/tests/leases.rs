//! One memory serves NICs and GPUs: leases of efa-core are copied, and this crate's memory is leased and registered.

mod common;

use std::sync::Arc;

use common::{device, on_device, pattern, read};
use efa_core::{DeviceMemory as _, DeviceRef, Interface, LeaseMut};
use gpu_mem::{Error, NicAccess, NicMemory, Span};

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
fn what_a_network_writes_is_copied_to_a_device_without_a_reference_to_it() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let bytes = pattern(100_000, 1);
    let mut lease = LeaseMut::zeroed(bytes.len()).unwrap();
    lease.bytes_mut().copy_from_slice(&bytes);
    let locked = Arc::new(device.lock_target(lease.expose()).unwrap());
    assert_eq!(locked.target().len(), bytes.len());
    let there = on_device(&stream, &[7; 50_000]);
    let spans = [Span { from: 1000, to: 0, len: 20_000 }, Span { from: 90_000, to: 40_000, len: 10_000 }];
    let (held, there) = locked.upload(&stream, there, &spans).unwrap().wait().unwrap();
    drop(held);
    let (there, found) = read(&stream, Arc::new(there));
    assert!(found[..20_000] == bytes[1000..21_000] && found[40_000..] == bytes[90_000..]);
    assert!(found[20_000..40_000].iter().all(|byte| *byte == 7));
    for outside in [Span { from: 99_999, to: 0, len: 2 }, Span { from: 0, to: 49_999, len: 2 }] {
        let failed = locked.upload(&stream, Arc::clone(&there), &[spans[0], outside]).unwrap_err();
        assert!(matches!(failed.error, Error::Range { .. }) && failed.returned.is_some(), "{}", failed.error);
    }

    // Its pages are registered once at a time, and it comes back whole.
    let target = locked.target().clone();
    let refused = device.lock_target(target).unwrap_err();
    assert!(refused.returned.is_some());
    drop(refused);
    let target = Arc::try_unwrap(locked).unwrap().unlock().unwrap();
    let target = device.lock_target(target).unwrap().unlock().unwrap();
    assert!(target.reclaim().unwrap().bytes() == bytes);
    let nothing = device.lock_target(LeaseMut::zeroed(0).unwrap().expose()).unwrap();
    assert!(nothing.unlock().unwrap().is_empty());
}

#[test]
fn a_target_that_is_dropped_is_let_go_of() {
    let Some(device) = device() else { return };
    let target = LeaseMut::zeroed(100_000).unwrap().expose();
    drop(device.lock_target(target.clone()).unwrap());
    device.reclaim();
    // Nobody else has it, and its pages can be registered again.
    let target = target.reclaim().unwrap().expose();
    device.lock_target(target).unwrap().unlock().unwrap();
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
