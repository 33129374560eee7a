//! What the tests of a GPU share: the devices, or the reason why there are none; bytes; and children.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::process::Command;
use std::sync::Arc;

use gpu_mem::{
    Cuda, Device, DeviceBuffer, DeviceMemory, HostMemory, HostMemoryMut, PinnedBuffer, Span, Stream,
};

/// The first `count` devices; none, and it is said why, where there are fewer. Where hardware was asked for
/// (`WEIGHTSYNC_HW=1`), having no device at all is a failure.
pub(crate) fn devices<const COUNT: usize>() -> Option<[Device; COUNT]> {
    let found = Cuda::open().and_then(|cuda| cuda.devices());
    let devices = match found {
        Ok(devices) if !devices.is_empty() => devices,
        other => {
            let why = other.err().map_or("the driver shows none".to_owned(), |error| error.to_string());
            let asked = std::env::var_os("WEIGHTSYNC_HW").is_some_and(|value| value == "1");
            assert!(!asked, "WEIGHTSYNC_HW=1 asks for a GPU: {why}");
            println!("skipped: no CUDA device");
            return None;
        }
    };
    let found = devices.len();
    let chosen = devices.into_iter().take(COUNT).collect::<Vec<_>>().try_into().ok();
    if chosen.is_none() {
        println!("skipped: needs {COUNT} CUDA devices and there are {found}");
    }
    chosen
}

pub(crate) fn device() -> Option<Device> {
    devices::<1>().map(|[device]| device)
}

/// Bytes that differ from their neighbours and from those of another seed.
pub(crate) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|index| (index.wrapping_mul(31) >> 3) as u8 ^ (index as u8) ^ seed).collect()
}

/// Host memory that shares no page with any other, so that registering it meets no other registration.
#[derive(Debug)]
pub(crate) struct Pages {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

pub(crate) fn pages(bytes: &[u8]) -> Pages {
    const PAGE: usize = 65_536;
    let len = bytes.len();
    let mut memory = vec![0; len.next_multiple_of(PAGE) + PAGE];
    let start = memory.as_ptr().addr().wrapping_neg() % PAGE;
    memory[start..start + len].copy_from_slice(bytes);
    Pages { memory, start, len }
}

// SAFETY: a part of a vector that nobody changes the length of.
unsafe impl HostMemory for Pages {
    fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

// SAFETY: as above; the vector is its own.
unsafe impl HostMemoryMut for Pages {
    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// Page-locked memory with these bytes.
pub(crate) fn pinned(device: &Device, bytes: &[u8]) -> PinnedBuffer {
    let mut buffer = device.pinned(bytes.len()).unwrap();
    buffer.bytes_mut().copy_from_slice(bytes);
    buffer
}

/// Device memory with these bytes.
pub(crate) fn on_device(stream: &Stream, bytes: &[u8]) -> DeviceBuffer {
    let buffer = stream.device().alloc(bytes.len() as u64).unwrap();
    write(stream, buffer, bytes)
}

/// Writes bytes to the start of device memory, which comes back.
pub(crate) fn write<D: DeviceMemory>(stream: &Stream, to: D, bytes: &[u8]) -> D {
    let from = pinned(stream.device(), bytes);
    let copied = stream.copy_to_device(from, to, &[Span::first(bytes.len() as u64)]);
    copied.unwrap().wait().unwrap().1
}

/// All bytes of device memory, which comes back.
pub(crate) fn read<D: DeviceMemory>(stream: &Stream, from: D) -> (D, Vec<u8>) {
    let to = stream.device().pinned(usize::try_from(from.len()).unwrap()).unwrap();
    let all = Span::first(from.len());
    let copied = stream.copy_to_host(from, to, &[all]).unwrap();
    let (from, to) = copied.wait().unwrap();
    (from, to.bytes().to_vec())
}

/// As [`read`], of memory that others share.
pub(crate) fn read_shared<D: DeviceMemory + Sync>(stream: &Stream, from: &Arc<D>) -> Vec<u8> {
    read(stream, Arc::clone(from)).1
}

/// This test binary again, to run one of its tests alone.
pub(crate) fn child(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]);
    command
}

/// Runs a child to its end, which must be good.
pub(crate) fn succeed(command: &mut Command) {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "the child failed: {}\n{text}\n{errors}", output.status);
    assert!(text.contains("1 passed"), "the child ran nothing:\n{text}");
}
