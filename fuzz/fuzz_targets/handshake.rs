//! Bytes as what a stranger says to the controller, and as what somebody in its place says to a member.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    assert!(!rendezvous::fuzzing::handshake(bytes), "somebody without the secret is believed");
});
