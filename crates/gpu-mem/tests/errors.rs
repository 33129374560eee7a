//! Every failure is told by name, ends nothing but the call, and gives back what was handed in.

mod common;

use common::{device, on_device, pages, pattern, pinned, read};
use cudarc::driver::sys;
use gpu_mem::{Cuda, Device, DeviceMemory, Error, NicAccess, NicMemory, Span, inject};

/// A device of this test alone: what is injected into it is not remembered elsewhere.
fn own_device() -> Option<Device> {
    device().map(|_| Cuda::open().unwrap().device(0).unwrap())
}

#[test]
fn out_of_memory_is_told_and_the_next_allocation_works() {
    let Some(device) = own_device() else { return };
    let total = device.memory().unwrap().total;
    for bytes in [total + (1 << 30), 1 << 50, u64::MAX] {
        let error = device.alloc(bytes).unwrap_err();
        assert!(matches!(error, Error::OutOfMemory { .. }) || bytes == u64::MAX, "{error}");
        assert!(!error.is_device_lost(), "{error}");
    }
    let text = device.alloc(1 << 50).unwrap_err().to_string();
    assert!(text.contains("1125899906842624 bytes") && text.contains("free"), "{text}");
    let stream = device.stream().unwrap();
    let bytes = pattern(1000, 1);
    assert_eq!(read(&stream, on_device(&stream, &bytes)).1, bytes);
}

#[test]
fn out_of_memory_in_the_middle_frees_what_was_made_before() {
    let Some(device) = own_device() else { return };
    if !device.has_vmm().unwrap() {
        println!("skipped: the device does not map memory separately");
        return;
    }
    let out_of_memory = sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY as i32;
    for call in ["cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess"] {
        inject::fail(call, usize::from(call == "cuMemCreate" || call == "cuMemMap") * 2, out_of_memory);
        let error = device.alloc_vmm(8 << 20, 1).unwrap_err();
        assert!(
            error.to_string().contains("OUT_OF_MEMORY") || matches!(error, Error::OutOfMemory { .. }),
            "{error}"
        );
        assert_eq!(inject::clear(), 0, "{call} was called");
        // Would fail if chunks were still mapped where the driver reserves again, or the device were taken for lost.
        drop(device.alloc_vmm(8 << 20, 1).unwrap());
        // Else the next round would have memory to take back, and try again.
        device.reclaim();
    }
}

#[test]
fn a_copy_that_is_refused_half_way_gives_both_buffers_back() {
    let Some(device) = own_device() else { return };
    let stream = device.stream().unwrap();
    let (host, target) = (pinned(&device, &[7; 64]), on_device(&stream, &[0; 64]));
    let spans = [0, 16, 32].map(|at| Span { from: at, to: at, len: 16 });
    inject::fail("cuMemcpyHtoDAsync_v2", 2, sys::CUresult::CUDA_ERROR_INVALID_VALUE as i32);
    let failed = stream.copy_to_device(host, target, &spans).unwrap_err();
    assert!(failed.to_string().contains("cuMemcpyHtoDAsync_v2 failed on GPU 0"), "{failed}");
    let (host, target) = failed.returned.unwrap();
    assert_eq!(read(&stream, target).1, [[7; 32], [0; 32]].concat(), "what was posted before has been done");
    drop(host);

    let target = on_device(&stream, &[0; 64]);
    inject::fail("cuEventCreate", 0, sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY as i32);
    let failed = stream.fill(target, 9).unwrap_err();
    assert_eq!(inject::clear(), 0);
    assert_eq!(read(&stream, failed.returned.unwrap()).1, [9; 64], "it was waited for");
}

#[test]
fn a_gpu_that_is_lost_is_told_at_every_later_call_and_ends_no_process() {
    let Some(device) = own_device() else { return };
    let stream = device.stream().unwrap();
    let registered = device.register_host(pages(&pattern(10_000, 1))).unwrap();
    let [target, other] = [0, 0].map(|byte| on_device(&stream, &[byte; 64]));
    let pending = stream.copy_to_device(pinned(&device, &[1; 64]), target, &[Span::first(64)]).unwrap();
    // Off the bus: it answers everything with the same error.
    inject::fail("cuEventSynchronize", 0, sys::CUresult::CUDA_ERROR_UNKNOWN as i32);
    inject::fail("cuMemGetInfo_v2", 0, sys::CUresult::CUDA_ERROR_UNKNOWN as i32);
    let failed = pending.wait().unwrap_err();
    assert!(failed.error.is_device_lost() && failed.returned.is_none(), "{failed}");
    let text = failed.to_string();
    assert!(
        text.contains("GPU 0") && text.contains("cuEventSynchronize") && text.contains("restart"),
        "{text}"
    );

    // Nothing is called any more, and the first cause is told.
    let later = [
        device.alloc(1).map(drop),
        device.pinned(1).map(drop),
        device.stream().map(drop),
        stream.record().map(drop),
        device.synchronize(),
        device.memory().map(drop),
    ];
    for error in later {
        assert_eq!(error.unwrap_err().to_string(), text);
    }
    // What was not even posted is nobody's but the caller's.
    let failed = stream.copy_to_device(vec![7; 64], other, &[Span::first(64)]).unwrap_err();
    assert_eq!(failed.returned.unwrap().0, [7; 64]);
    let failed = registered.unregister().unwrap_err();
    assert!(failed.error.is_device_lost() && failed.returned.is_none(), "its pages may still be in use");
    drop((stream, device));

    let device = Cuda::open().unwrap().device(0).unwrap();
    let stream = device.stream().unwrap();
    assert_eq!(
        read(&stream, on_device(&stream, &[3; 10])).1,
        [3; 10],
        "what was injected harmed nobody else"
    );
}

#[test]
fn an_unknown_error_of_a_gpu_that_goes_on_is_no_loss() {
    let Some(device) = own_device() else { return };
    inject::fail("cuMemAlloc_v2", 0, sys::CUresult::CUDA_ERROR_UNKNOWN as i32);
    let error = device.alloc(10).unwrap_err();
    assert!(matches!(error, Error::Call(_)) && error.to_string().contains("kernel's log"), "{error}");
    assert!(device.alloc(10).is_ok());

    inject::fail("cuMemAlloc_v2", 0, sys::CUresult::CUDA_ERROR_ECC_UNCORRECTABLE as i32);
    assert!(device.alloc(10).unwrap_err().is_device_lost());
    assert!(device.alloc(10).unwrap_err().is_device_lost(), "it stays lost");
}

#[test]
fn host_memory_is_registered_once_at_a_time() {
    let Some(device) = own_device() else { return };
    inject::fail("cuMemHostRegister_v2", 0, sys::CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED as i32);
    let failed = device.register_host(vec![5; 100]).unwrap_err();
    assert!(failed.to_string().contains("register a range once"), "{failed}");
    assert_eq!(failed.returned.unwrap(), [5; 100]);
}

#[test]
fn what_cannot_be_freed_now_is_freed_later() {
    let Some(device) = own_device() else { return };
    let refused = sys::CUresult::CUDA_ERROR_INVALID_VALUE as i32;
    for call in
        ["cuMemFree_v2", "cuMemFreeHost", "cuMemHostUnregister", "cuEventDestroy_v2", "cuStreamDestroy_v2"]
    {
        inject::fail(call, 0, refused);
        let buffer = device.alloc(10).unwrap();
        let address = buffer.address();
        drop((buffer, device.pinned(10).unwrap(), device.stream().unwrap(), device.event().unwrap()));
        let host = device.register_host(pages(&[1; 10])).unwrap();
        drop(host);
        device.reclaim();
        device.reclaim();
        assert_eq!(inject::clear(), 0, "{call} was called");
        assert!(device.segments(&[(address, 10)]).is_err(), "{call}: it is free");
    }
    // Refused half-way: nothing is unmapped twice.
    if device.has_vmm().unwrap() {
        let buffer = device.alloc_vmm(8 << 20, 1).unwrap();
        let address = buffer.address();
        inject::fail("cuMemUnmap", 2, refused);
        inject::fail("cuMemAddressFree", 0, refused);
        drop(buffer);
        (0..3).for_each(|_| device.reclaim());
        assert_eq!(inject::clear(), 0);
        assert!(device.segments(&[(address, 10)]).is_err(), "nothing is mapped there");
    }
    let stream = device.stream().unwrap();
    assert_eq!(read(&stream, on_device(&stream, &[3; 10])).1, [3; 10]);
}

#[test]
fn a_log_that_nvrtc_does_not_give_is_empty() {
    let Some(device) = own_device() else { return };
    for (call, uncalled) in [("nvrtcGetProgramLogSize", 1), ("nvrtcGetProgramLog", 0)] {
        inject::fail("nvrtcCompileProgram", 0, 6);
        inject::fail(call, 0, 1);
        if uncalled == 1 {
            inject::fail("nvrtcGetProgramLog", 0, 1);
        }
        match device.compile("bad.cu", &format!("no source // {call}"), &[]) {
            Err(Error::Compile { log, .. }) => assert_eq!(log, ""),
            Err(error @ Error::NoNvrtc { .. }) => {
                println!("skipped: {error}");
                inject::clear();
                return;
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(inject::clear(), uncalled, "{call}");
    }
}

#[test]
fn copies_of_other_code_are_synchronised_whatever_way_a_nic_is_told() {
    let Some(device) = own_device() else { return };
    // No dma-buf.
    inject::fail("cuDeviceGetAttribute", 0, sys::CUresult::CUDA_ERROR_NOT_SUPPORTED as i32);
    inject::fail("cuPointerSetAttribute", 0, sys::CUresult::CUDA_ERROR_NOT_SUPPORTED as i32);
    let exported = NicMemory::export(device.alloc(4096).unwrap(), 0, 4096).unwrap();
    assert!(matches!(exported.access(), NicAccess::Address(_)));
    assert_eq!(inject::clear(), 0, "both were asked");
}
