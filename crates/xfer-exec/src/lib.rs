//! Executes one rank's part of a plan.
//!
//! The [`engine`] is a state machine without I/O, clock or randomness: it decides what is gathered, posted, retried and
//! given up. Around it, behind features, stand what carries its decisions out: [`rail::Rail`] and its siblings
//! `ofi` (libfabric) and `local` (shared memory of the same host), and the `driver`, a thread that owns the rails of
//! one rank. A simulator uses the engine with no feature at all.
//!
//! It must never report a push as done before every WRITE has been delivered, nor as failed while a NIC may still read
//! a buffer.

#![deny(unsafe_code)]

#[cfg(feature = "driver")]
pub mod driver;
pub mod engine;
#[cfg(feature = "local")]
pub mod local;
#[cfg(feature = "ofi")]
pub mod ofi;
pub mod program;
pub mod rail;

pub use engine::{Action, Delivered, Engine, EngineConfig, Event, Failure, Post, RailLimits, Source};
pub use program::{Program, ProgramError, WriteId};
pub use rail::{Done, Rail, RailError, RailIndex, RailWrite, Rows};
