//! A cluster in virtual time: what it is made of, how its transfers share it, and how a whole job runs on it.
//!
//! The README says what is modelled and what is not. Nothing here reads a clock, does I/O, starts a thread or draws a random
//! number that does not follow from a given seed: the same calls give the same answers, everywhere.

#![forbid(unsafe_code)]

// The README's example is compiled and run as a doctest.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod cluster;
mod job;
mod network;
mod pipeline;
mod queue;
mod random;
mod time;

pub use cluster::{
    Cluster, ClusterError, Control, Gpu, GpuId, Host, Nic, NicId, NoSuchPreset, Preset, Racks, Semantics,
};
pub use job::{
    Bin, Fault, JobConfig, JobError, JobReport, NicUse, NoSuchSabotage, Progress, PushTimes, RankTimes,
    Sabotage, Slow, Stage, StageTime, Trace, Trial, TrialEnd, simulate,
};
pub use network::{Done, Link, Network, NetworkError, Outcome, TransferId, Way};
pub use pipeline::{
    Mesh, MeshGroup, PipelineConfig, PipelineError, PipelineReport, PipelineStage, Round, Task,
    simulate_pipeline,
};
pub use queue::{EventId, EventQueue};
pub use time::Time;
