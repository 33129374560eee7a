//! A published system as a model: weights gathered in full, then written, in a pipeline of stages.
//!
//! Another team has described how it moves Kimi-K2 from 256 trainers to 128 receivers in 1.3 s, and has published where a rank's time
//! goes. Running its stages on our description of a cluster says how far that description can be believed, and what it leaves out;
//! `docs/published-pipeline.md` compares the two. It must never be fitted to the published times: a number here follows from the
//! [`Cluster`], is stated by them, or is said to be assumed.
//!
//! Trainers form mesh groups, one after another with a barrier in between. Within a group each mesh gathers its tensors round by
//! round: every rank copies its shards to its GPU, all ranks gather, each then fuses and quantises the parameter that it has to send,
//! submits a WRITE to each receiver, and may forget it when all are complete. A rank holds so many tasks at a time and no more. Its GPU
//! does one thing at a time besides copying; its thread submits one WRITE at a time.
//!
//! A gather takes as long as its slowest link: each rank gets the shards of its counterparts on other hosts over its NICs, and the
//! rest over NVLink from its neighbour; both at once. Besides, each collective has a launch and a latency per step between hosts.
//! WRITEs and gathers share NICs in the [`Network`](crate::Network). A GPU's NICs are taken as one, as fast as all: what is striped
//! evenly over them fills them evenly.
//!
//! How near it comes: copies, submissions and the all-gather are within a fifth of the published trace, kernels take a ninth to a
//! third, and the whole takes three quarters, because here all ranks are alike and nobody waits for a slow one.

mod clock;
mod config;
mod error;
mod mesh;
mod published;
mod run;

use serde::Serialize;

pub use config::{Mesh, MeshGroup, PipelineConfig, Round, Task};
pub use error::PipelineError;
use run::Run;

/// What came out. All of it is simulated; times are seconds of virtual time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PipelineReport {
    /// From the start of all ranks until the last WRITE is complete and the last barrier passed.
    pub seconds: f64,
    /// In the order of [`PipelineReport::STAGES`]. Their exposed times add up to `seconds`.
    pub stages: Vec<PipelineStage>,
    /// From host memory to GPUs, all ranks together, in bytes.
    pub copied_bytes: u64,
    /// What ranks received in gathers, all together, in bytes.
    pub gathered_bytes: u64,
    /// Payload of all WRITEs, in bytes.
    pub written_bytes: u64,
    /// WRITEs of all ranks.
    pub writes: u64,
}

/// How long a stage took: the mean of all trainers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PipelineStage {
    /// Which; see [`PipelineReport::STAGES`].
    pub name: &'static str,
    /// While no stage named before it was under way on the same rank.
    pub exposed_seconds: f64,
    /// Whatever else was under way.
    pub busy_seconds: f64,
}

impl PipelineReport {
    /// The stages, by the names of the published trace. Where several are under way at once, time counts as exposed for the first of
    /// this list. "waiting for ranks" is waiting for other members to begin a gather, for a barrier, and for the end.
    pub const STAGES: [&'static str; 7] = [
        "full_tensor all-gather",
        "quantise",
        "fuse",
        "H2D memcpy",
        "RDMA submit",
        "exposed transfer",
        "waiting for ranks",
    ];
}

/// Runs the pipeline. The same configuration gives the same report, everywhere.
///
/// # Errors
/// When the configuration cannot be; the message names what is wrong.
pub fn simulate_pipeline(config: &PipelineConfig) -> Result<PipelineReport, PipelineError> {
    Run::new(config)?.finish()
}
