//! Any thread may use any device, and none finds another device current than it had.

mod common;

use std::time::Duration;

use common::{device, devices, on_device, pattern, read};
use cudarc::driver::sys;
use gpu_mem::{Cuda, Device};

/// The context that is current on this thread.
fn current() -> usize {
    let mut context = std::ptr::null_mut();
    // SAFETY: the driver has started, and writes one handle.
    let answer = unsafe { sys::cuCtxGetCurrent(&raw mut context) };
    assert_eq!(answer as u32, 0);
    context.addr()
}

fn round_trip(device: &Device, seed: u8) {
    let stream = device.stream().unwrap();
    let bytes = pattern(100_000, seed);
    assert!(read(&stream, on_device(&stream, &bytes)).1 == bytes);
}

#[test]
fn fresh_threads_use_a_device_that_another_opened() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let bytes = pattern(1000, 1);
    let buffer = on_device(&stream, &bytes);
    std::thread::scope(|scope| {
        for seed in 0..8 {
            let device = &device;
            scope.spawn(move || {
                assert_eq!(current(), 0, "no context of its own");
                round_trip(device, seed);
                assert_eq!(current(), 0, "and none afterwards");
            });
        }
        // Read and freed by another thread than the one that allocated it.
        scope.spawn(|| assert_eq!(read(&stream, buffer).1, bytes));
    });
}

#[test]
fn the_context_of_the_caller_is_put_back() {
    let Some([first, second]) = devices::<2>() else { return };
    let mut context = std::ptr::null_mut();
    // SAFETY: device 1 exists; the context is released below.
    let retained = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, 1) };
    assert_eq!(retained as u32, 0);
    // SAFETY: the context was retained above.
    let set = unsafe { sys::cuCtxSetCurrent(context) };
    assert_eq!(set as u32, 0);
    let before = current();
    round_trip(&first, 1);
    assert_eq!(current(), before);
    round_trip(&second, 2);
    assert_eq!(current(), before);
    // SAFETY: none is current then, and the context is released once.
    let unset = unsafe { sys::cuCtxSetCurrent(std::ptr::null_mut()) };
    assert_eq!(unset as u32, 0);
    // SAFETY: retained above.
    let released = unsafe { sys::cuDevicePrimaryCtxRelease_v2(1) };
    assert_eq!(released as u32, 0);
}

#[test]
fn streams_wait_for_events_and_events_note_times() {
    let Some(device) = device() else { return };
    let (first, second) = (device.stream().unwrap(), device.stream().unwrap());
    let (mut start, mut end) = (device.timing_event().unwrap(), device.timing_event().unwrap());
    assert!(device.event().unwrap().is_reached().unwrap(), "an event that was never recorded is reached");
    start.record(&first).unwrap();
    let filled = first.fill(device.alloc(64 << 20).unwrap(), 1).unwrap();
    end.record(&first).unwrap();
    second.wait_for(&end).unwrap();
    second.synchronize().unwrap();
    assert!(end.is_reached().unwrap() && filled.is_done().unwrap() && first.is_idle().unwrap());
    let took = end.since(&start).unwrap();
    assert!(took > Duration::ZERO && took < Duration::from_secs(60), "{took:?}");
    assert!(device.event().unwrap().since(&start).is_err(), "it notes no time");
    device.synchronize().unwrap();
}

#[test]
fn a_device_is_the_same_however_often_it_is_opened() {
    let Some(device) = device() else { return };
    let cuda = Cuda::open().unwrap();
    let again = cuda.device(0).unwrap();
    assert!(again.same_as(&device) && again.uuid() == device.uuid() && device.uuid() != [0; 16]);
    assert_eq!(again.pci_address(), device.pci_address());
    assert_eq!(device.pci_address().len(), "0000:53:00.0".len(), "{}", device.pci_address());
    assert!(device.capability().unwrap() >= (5, 0) && device.multiprocessors().unwrap() > 0);
    let memory = device.memory().unwrap();
    assert!(memory.free <= memory.total && memory.total > 1 << 30, "{memory:?}");
    // What one has opened works when the other is gone.
    let stream = again.stream().unwrap();
    drop((device, again));
    round_trip(stream.device(), 3);
}
