//! A whole job in virtual time: trainers and receivers join, agree on a plan, and push.
//!
//! The planner, the controller, the members' halves of the protocol, the runner and the engine are those of real jobs. What is
//! simulated is what is around them: memory, threads, rails and connections, on a [`Network`](crate::Network) with faults.

mod bundle;
mod bytes;
mod config;
mod error;
mod faults;
mod log;
mod measuring;
mod memory;
mod protocol;
mod rail;
mod rank;
mod report;
mod sabotage;
mod tally;
mod times;
mod trial;
mod wire;
mod world;

use xfer_plan::{Op, Transform};

pub use config::{JobConfig, Slow};
pub use error::JobError;
pub use faults::Fault;
pub use log::Trace;
pub use report::{Bin, JobReport, NicUse, PushTimes, RankTimes, Stage, StageTime};
pub use sabotage::{NoSuchSabotage, Sabotage};
pub use trial::{Trial, TrialEnd};

use crate::time::Time;
use world::{Extras, World};

/// How far a simulation is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// In virtual time.
    pub at: Time,
    /// Events so far.
    pub events: u64,
    /// Bytes that have been delivered, over all versions.
    pub delivered_bytes: u64,
    /// Bytes that will be; 0 until there is a plan.
    pub total_bytes: u64,
}

/// Runs a job to its end. `progress` is called every now and then.
///
/// # Errors
///
/// A job that [`JobConfig::check`] refuses; one that does not commit all its versions; one that does not end within its budget
/// of events.
pub fn simulate(config: &JobConfig, progress: &mut dyn FnMut(&Progress)) -> Result<JobReport, JobError> {
    let mut world = World::new(config, Extras::default())?;
    world.run(progress)?;
    world.report_job()
}

/// What a kernel that fills a slot moves in its GPU's memory, in bytes: a gather reads and writes; a cast too; to quantise it reads
/// twice, for the magnitudes and for the values.
fn kernel_bytes(op: &Op) -> u64 {
    let bytes = op.bytes();
    let read = op.transform.read_bytes(bytes);
    match op.transform {
        Transform::Quantize { .. } => 2 * read + bytes,
        Transform::Copy | Transform::Cast { .. } | Transform::Scales { .. } => read + bytes,
    }
}
