//! A framework's capture of a CUDA graph is not disturbed by what this crate does on other threads, or on the same.

mod common;

use common::{device, on_device, read};
use cudarc::driver::sys;

#[test]
fn a_capture_goes_on_beside_allocations_and_copies() {
    let Some(device) = device() else { return };
    let captured = device.stream().unwrap();
    let handle: sys::CUstream = captured.as_raw().cast();
    // The strictest, and what frameworks use.
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    // SAFETY: the stream lives to the end of the test; it belongs to a primary context that is current nowhere else.
    let begun = unsafe { sys::cuStreamBeginCapture_v2(handle, mode) };
    assert_eq!(begun as u32, 0);
    let work = || {
        let stream = device.stream().unwrap();
        assert_eq!(read(&stream, on_device(&stream, &[3; 100])).1, [3; 100]);
        device.reclaim();
    };
    work();
    std::thread::scope(|scope| scope.spawn(work).join().unwrap());
    let mut graph = std::ptr::null_mut();
    // SAFETY: begun above; the driver writes one handle.
    let ended = unsafe { sys::cuStreamEndCapture(handle, &raw mut graph) };
    assert_eq!(ended as u32, 0, "the capture is whole");
    // SAFETY: the graph is this test's own.
    let destroyed = unsafe { sys::cuGraphDestroy(graph) };
    assert_eq!(destroyed as u32, 0);
}
