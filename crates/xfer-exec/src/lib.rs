#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

#[cfg(feature = "driver")]
pub mod arrivals;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "driver")]
pub mod driver;
pub mod engine;
#[cfg(feature = "local")]
pub mod local;
#[cfg(feature = "driver")]
pub mod null;
#[cfg(feature = "ofi")]
pub mod ofi;
pub mod program;
#[cfg(feature = "driver")]
mod quant;
pub mod rail;
pub mod runner;

pub use engine::{Action, Attempt, Delivered, Engine, EngineConfig, Event, Failure, Post, RailUse, Source};
pub use program::{Program, ProgramError, RankLimits, WriteId};
#[cfg(feature = "driver")]
pub use quant::{QuantError, Quantization};
pub use rail::{Armed, Done, Rail, RailError, RailIndex, RailLimits, RailWrite, Rows};
pub use runner::{Memory, Runner, Turn};
