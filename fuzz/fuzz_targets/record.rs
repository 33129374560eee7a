//! Bytes as the record of the last commit, and as what etcd, or somebody in its place, answers.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    rendezvous::fuzzing::record(bytes);
    rendezvous::fuzzing::etcd_answer(bytes);
});
