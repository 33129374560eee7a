//! Bytes as frames from the controller to a member.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    rendezvous::fuzzing::to_member(bytes);
});
