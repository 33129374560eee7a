//! What a device uses is let go of when it is done with it, and not before: whatever panics, fails or takes long.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use common::{Pages, device, pages};
use cudarc::driver::sys;
use gpu_mem::{Cuda, Error, HostMemory, HostMemoryMut, inject};

const NOT_READY: i32 = sys::CUresult::CUDA_ERROR_NOT_READY as i32;

/// A user's value whose drop panics.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("a user's drop");
    }
}

#[test]
fn a_panic_in_a_parked_drop_frees_nothing_that_is_in_use() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    inject::fail("cuEventQuery", 0, NOT_READY);
    drop(stream.hold(Bomb).unwrap());
    assert_eq!(inject::clear(), 0, "it is parked");
    let used = Arc::new(());
    let hold = || drop(stream.hold(Arc::clone(&used)));
    assert!(catch_unwind(AssertUnwindSafe(hold)).is_err(), "the panic is the caller's to see");
    assert_eq!(Arc::strong_count(&used), 2, "what is in use is kept");
    stream.synchronize().unwrap();
    assert_eq!(Arc::strong_count(&used), 1, "and let go of when it is done");
}

#[test]
fn a_failure_waits_for_what_was_posted_but_not_for_ever() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let target = Arc::new(device.alloc(64).unwrap());
    inject::fail("cuEventCreate", 0, sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY as i32);
    // Longer than anybody asks: pauses become a millisecond.
    (0..5000).for_each(|_| inject::fail("cuStreamQuery", 0, NOT_READY));
    let failed = stream.fill(Arc::clone(&target), 9).unwrap_err();
    assert!(inject::clear() > 0);
    assert!(failed.returned.is_none() && !failed.error.is_device_lost(), "{failed}");
    assert_eq!(Arc::strong_count(&target), 2, "the stream has it");
    stream.synchronize().unwrap();
    assert_eq!(Arc::strong_count(&target), 1, "until it is idle");
}

#[test]
fn waits_end_at_their_deadline() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let pending = stream.fill(device.alloc(64).unwrap(), 9).unwrap();
    for call in ["cuEventQuery", "cuStreamQuery"] {
        inject::fail(call, 0, NOT_READY);
    }
    let pending = pending.wait_until(Instant::now()).unwrap().unwrap_err();
    assert!(!stream.synchronize_until(Instant::now()).unwrap());
    assert_eq!(inject::clear(), 0);
    let soon = Instant::now() + Duration::from_secs(60);
    assert!(stream.synchronize_until(soon).unwrap());
    assert!(pending.event().wait_until(soon).unwrap());
    assert_eq!(pending.wait_until(soon).unwrap().unwrap().len(), 64);
}

/// Host memory that tells which thread drops it.
struct Told(Pages, Sender<ThreadId>);

// SAFETY: the pages' own bytes.
unsafe impl HostMemory for Told {
    fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }
}

// SAFETY: as above.
unsafe impl HostMemoryMut for Told {
    fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.bytes_mut()
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        self.1.send(std::thread::current().id()).unwrap();
    }
}

#[test]
fn who_drops_memory_does_not_free_it() {
    let Some(device) = device() else { return };
    let (sender, dropped_by) = channel();
    drop(device.register_host(Told(pages(&[1; 100]), sender)).unwrap());
    device.reclaim();
    assert_ne!(dropped_by.try_recv().unwrap(), std::thread::current().id());
}

/// Host memory that is let go of only when nothing is injected any more.
struct Slow(Pages);

// SAFETY: the pages' own bytes.
unsafe impl HostMemory for Slow {
    fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }
}

// SAFETY: as above.
unsafe impl HostMemoryMut for Slow {
    fn bytes_mut(&mut self) -> &mut [u8] {
        while inject::left() > 0 {
            std::thread::yield_now();
        }
        self.0.bytes_mut()
    }
}

#[test]
fn what_was_dropped_is_freed_before_memory_is_said_to_be_short() {
    let Some(_) = device() else { return };
    // Of this test alone.
    let device = Cuda::open().unwrap().device(0).unwrap();
    let out_of_memory = sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY as i32;
    let host = device.register_host(Slow(pages(&[1; 100]))).unwrap();
    inject::fail("cuMemAlloc_v2", 0, out_of_memory);
    drop(host);
    assert!(device.alloc(10).is_ok(), "it was tried again");
    assert_eq!(inject::left(), 0);
    device.reclaim();
    inject::fail("cuMemAlloc_v2", 0, out_of_memory);
    assert!(matches!(device.alloc(10), Err(Error::OutOfMemory { .. })), "there was nothing to take back");
}
