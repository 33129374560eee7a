//! Text as a model's `config.json`, and as a job description.

#![no_main]

#[allow(dead_code)] // a part of it is enough here
#[path = "../../crates/xfer-plan/tests/hostile/mod.rs"]
mod hostile;
#[allow(dead_code)] // a part of it is enough here
#[path = "../../crates/xfer-plan/tests/scenario/mod.rs"]
mod scenario;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hostile::model_spec(bytes));
