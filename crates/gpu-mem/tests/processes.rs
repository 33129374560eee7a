//! Memory is shared between processes, by handles and by descriptors; what a peer claims is checked.

mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;
use std::sync::Arc;

use common::{child, device, devices, on_device, pattern, read, succeed, write};
use gpu_mem::{Cuda, Error, IpcHandle, SharedChunk};

const LEN: usize = 4 << 20;

/// Where a child finds what it is to open.
const HANDLE: &str = "GPU_MEM_TEST_HANDLE";
/// Where a child finds the number of the GPU that it is to work on.
const ON: &str = "GPU_MEM_TEST_ON";
/// Where a child finds what it is to expect of it.
const EXPECT: &str = "GPU_MEM_TEST_EXPECT";

fn hex(handle: &IpcHandle) -> String {
    postcard::to_allocvec(handle).unwrap().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> IpcHandle {
    let bytes: Vec<u8> =
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect();
    postcard::from_bytes(&bytes).unwrap()
}

/// A handle as a liar would send it: with another offset and length.
fn forged(handle: &IpcHandle, offset: u64, len: u64) -> IpcHandle {
    type Parts = ([[u8; 32]; 2], [u8; 16], u64, u64);
    let (bytes, uuid, _, _): Parts = postcard::from_bytes(&postcard::to_allocvec(handle).unwrap()).unwrap();
    postcard::from_bytes(&postcard::to_allocvec(&(bytes, uuid, offset, len)).unwrap()).unwrap()
}

/// The child's half of the tests below; without a parent it does nothing.
#[test]
fn child_opens_a_handle() {
    let Ok(handle) = std::env::var(HANDLE) else { return };
    let handle = unhex(&handle);
    let on = std::env::var(ON).unwrap().parse().unwrap();
    let device = Cuda::open().unwrap().device(on).unwrap();
    let stream = device.stream().unwrap();
    match std::env::var(EXPECT).unwrap().as_str() {
        "bytes" => {
            let memory = device.open_ipc(&handle).unwrap();
            let (memory, bytes) = read(&stream, memory);
            assert!(bytes == pattern(LEN, 1));
            write(&stream, memory, &pattern(LEN, 2));
            // Opened once more after it was closed.
            assert!(read(&stream, device.open_ipc(&handle).unwrap()).1 == pattern(LEN, 2));
        }
        "refusal" => {
            let error = device.open_ipc(&handle).unwrap_err();
            assert!(matches!(error, Error::BadHandle { .. }), "{error}");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_child_reads_and_writes_memory_by_its_handle() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let buffer = Arc::new(on_device(&stream, &pattern(LEN, 1)));
    let handle = buffer.ipc_handle().unwrap();
    assert_eq!((handle.len(), handle.uuid()), (LEN as u64, device.uuid()));
    let give = |handle: &IpcHandle, on: &str, expect: &str| {
        succeed(child("child_opens_a_handle").env(HANDLE, hex(handle)).env(ON, on).env(EXPECT, expect));
    };
    give(&handle, "0", "bytes");
    for (offset, len) in [(0, 1 << 40), (1 << 40, 1), (u64::MAX, u64::MAX), (0, 0)] {
        give(&forged(&handle, offset, len), "0", "refusal");
    }
    let (buffer, bytes) = read(&stream, buffer);
    assert!(bytes == pattern(LEN, 2), "what the child wrote is here");
    if let Some([_, second]) = devices::<2>()
        && second.can_access(&device).unwrap()
    {
        let buffer = write(&stream, buffer, &pattern(LEN, 1));
        give(&handle, "1", "bytes");
        assert!(read(&stream, buffer).1 == pattern(LEN, 2), "what the child wrote from another GPU is here");
    }
}

#[test]
fn a_handle_of_this_process_or_of_nothing_is_an_error() {
    let Some(device) = device() else { return };
    let buffer = Arc::new(device.alloc(LEN as u64).unwrap());
    let handle = buffer.ipc_handle().unwrap();
    let error = device.open_ipc(&handle).unwrap_err();
    assert!(matches!(error, Error::Call(_)), "{error}");
    assert!(matches!(Arc::new(device.alloc(0).unwrap()).ipc_handle(), Err(Error::BadHandle { .. })));
    assert_eq!(Arc::strong_count(&buffer), 2, "it is kept for whoever opens it");
    // SAFETY: nobody opens it.
    let error = unsafe { device.ipc_handle(buffer.address(), LEN as u64 * 2) }.unwrap_err();
    assert!(matches!(error, Error::Range { .. }), "{error}");
    assert!(device.alloc(1).is_ok(), "the device goes on");
}

/// The child's half of the test below: the descriptor is its standard input.
#[test]
fn child_opens_a_descriptor() {
    let Ok(on) = std::env::var(ON) else { return };
    if std::env::var(EXPECT).as_deref() != Ok("descriptor") {
        return;
    }
    let device = Cuda::open().unwrap().device(on.parse().unwrap()).unwrap();
    let stream = device.stream().unwrap();
    let input: OwnedFd = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let shared = |len| vec![SharedChunk { fd: input.try_clone().unwrap(), len }];
    let memory = device.import_vmm(shared(LEN as u64)).unwrap();
    let (memory, bytes) = read(&stream, memory);
    assert!(bytes == pattern(LEN, 3));
    write(&stream, memory, &pattern(LEN, 4));
    // A peer that says more than its descriptor stands for, or nonsense.
    let too_long = device.import_vmm(shared(LEN as u64 * 2)).unwrap_err();
    assert!(!too_long.is_device_lost(), "{too_long}");
    for len in [0, 1, u64::MAX] {
        assert!(matches!(device.import_vmm(shared(len)), Err(Error::BadHandle { .. })));
    }
    assert!(read(&stream, device.import_vmm(shared(LEN as u64)).unwrap()).1 == pattern(LEN, 4));
}

#[test]
fn a_child_reads_and_writes_memory_by_its_descriptor() {
    let Some(device) = device() else { return };
    if !device.has_vmm().unwrap() {
        println!("skipped: the device does not map memory separately");
        return;
    }
    let stream = device.stream().unwrap();
    let second = devices::<2>().filter(|[first, second]| second.can_access(first).unwrap());
    for on in ["0", "1"].into_iter().take(if second.is_some() { 2 } else { 1 }) {
        let buffer = write(&stream, device.alloc_vmm(LEN as u64, LEN as u64).unwrap(), &pattern(LEN, 3));
        let chunk = buffer.export().unwrap().remove(0);
        let keep = SharedChunk { fd: chunk.fd.try_clone().unwrap(), len: chunk.len };
        // The descriptor keeps the memory: its maker may go.
        drop(buffer);
        let mut child = child("child_opens_a_descriptor");
        succeed(child.env(ON, on).env(EXPECT, "descriptor").stdin(Stdio::from(chunk.fd)));
        let memory = device.import_vmm(vec![keep]).unwrap();
        assert!(read(&stream, memory).1 == pattern(LEN, 4), "what the child wrote is here");
    }
}

#[test]
fn many_chunks_are_shared_in_order() {
    let Some(device) = device() else { return };
    if !device.has_vmm().unwrap() {
        println!("skipped: the device does not map memory separately");
        return;
    }
    let stream = device.stream().unwrap();
    let bytes = pattern(6 << 20, 5);
    let buffer = write(&stream, device.alloc_vmm(bytes.len() as u64, 1).unwrap(), &bytes);
    let shared = buffer.export().unwrap();
    assert_eq!(shared.len(), buffer.chunks().count());
    let opened = device.import_vmm(shared).unwrap();
    let (opened, seen) = read(&stream, opened);
    assert!(seen.starts_with(&bytes));
    let written = vec![6; seen.len()];
    write(&stream, opened, &written);
    assert!(read(&stream, buffer).1 == written[..bytes.len()], "both are the same memory");

    let no_memory = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    let error = device.import_vmm(vec![SharedChunk { fd: no_memory, len: 2 << 20 }]).unwrap_err();
    assert!(!error.is_device_lost(), "{error}");
}

#[test]
fn renewed_memory_is_out_of_reach_for_whoever_had_it() {
    let Some(device) = device() else { return };
    if !device.has_vmm().unwrap() {
        println!("skipped: the device does not map memory separately");
        return;
    }
    let stream = device.stream().unwrap();
    let mut buffer = write(&stream, device.alloc_vmm(LEN as u64, 1).unwrap(), &pattern(LEN, 1));
    let chunks: Vec<_> = buffer.chunks().collect();
    let before = device.import_vmm(buffer.export().unwrap()).unwrap();
    buffer.renew().unwrap();
    assert_eq!(buffer.chunks().collect::<Vec<_>>(), chunks, "the addresses stay");
    let buffer = write(&stream, buffer, &pattern(LEN, 2));
    let before = write(&stream, before, &pattern(LEN, 3));
    let after = device.import_vmm(buffer.export().unwrap()).unwrap();
    assert!(read(&stream, buffer).1 == pattern(LEN, 2));
    assert!(read(&stream, after).1 == pattern(LEN, 2), "who opens it now has the new memory");
    assert!(read(&stream, before).1 == pattern(LEN, 3), "who opened it before keeps the old");
}
