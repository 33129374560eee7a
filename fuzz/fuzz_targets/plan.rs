//! Bytes as a manifest, a plan, or a part of one.

#![no_main]

#[allow(dead_code)] // a part of it is enough here
#[path = "../../crates/xfer-plan/tests/hostile/mod.rs"]
mod hostile;
#[allow(dead_code)] // a part of it is enough here
#[path = "../../crates/xfer-plan/tests/scenario/mod.rs"]
mod scenario;

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

fuzz_target!(|bytes: &[u8]| hostile::plan(bytes));

// Half of the time what libFuzzer does, half of the time another number in the place of one.
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let (choice, place) = (seed as usize % (2 * hostile::NUMBERS.len()), seed as usize >> 8);
    let (Some(&number), 1..) = (hostile::NUMBERS.get(choice), size) else {
        return fuzzer_mutate(data, size, max_size);
    };
    let mut mutated = hostile::with_number(&data[..size], place % size, number);
    mutated.truncate(max_size);
    data[..mutated.len()].copy_from_slice(&mutated);
    mutated.len()
});
