//! A program without CUDA starts, is told why it has none, and goes on.

use gpu_mem::{Cuda, Error};

#[test]
fn without_a_driver_there_is_an_error_that_says_what_to_do() {
    match Cuda::open() {
        Err(error @ Error::NoDriver { .. }) => {
            let text = error.to_string();
            assert!(text.contains("libcuda.so.1") && text.contains("install"), "{text}");
            assert_eq!(Cuda::open().unwrap_err(), error, "asking again is no crash and no other answer");
        }
        Err(other) => assert!(!other.to_string().is_empty()),
        Ok(cuda) => {
            let count = cuda.device_count().unwrap();
            assert_eq!(cuda.device(count).unwrap_err(), Error::NoDevice { index: count, count });
            assert!(cuda.device(u32::MAX).is_err());
        }
    }
}

#[test]
fn without_nvrtc_there_is_an_error_that_says_what_to_do() {
    match gpu_mem::nvrtc_version() {
        Ok(version) => assert!(version.major >= 11, "{version}"),
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains("libnvrtc.so.12") && text.contains("NVRTC_SO"), "{text}");
        }
    }
}
