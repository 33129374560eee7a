//! What the `weightsync` command is made of, as a library so that tests and benchmarks reach it: the checkpoint that
//! trainers start from, the layout that receivers hold, a stand-in for training, and the reference that both are
//! compared with.

#![forbid(unsafe_code)]

pub mod checkpoint;
mod counter;
pub mod reference;
pub mod runs;
pub mod synthetic;
pub mod tensor_parallel;
pub mod training;
