//! Bytes as how a rank says that its memory is reached.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    weightsync::fuzzing::endpoint(bytes);
});
