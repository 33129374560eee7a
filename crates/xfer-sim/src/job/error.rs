//! Why a job cannot be simulated, or what went wrong in it.

use super::Slow;
use crate::cluster::ClusterError;
use crate::network::NetworkError;
use crate::time::Time;

/// See the module.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// The cluster cannot be.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The network cannot be.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The two sides of a description disagree.
    #[error("the manifest has {ranks} {side}, the cluster {placed}: give the same number")]
    Ranks {
        /// Of which side.
        side: &'static str,
        /// In the manifest.
        ranks: usize,
        /// In the cluster.
        placed: u32,
    },
    /// Ranks stand on other hosts than the cluster puts them.
    #[error("{side} {rank} is on host {host:?}, but the cluster has {gpus} ranks on each host, in order")]
    Hosts {
        /// Of which side.
        side: &'static str,
        /// Which.
        rank: usize,
        /// The manifest's host.
        host: String,
        /// Ranks of a host.
        gpus: usize,
    },
    /// Weights in host memory.
    #[error("trainers that keep weights in host memory (`offloaded`) are planned, but not simulated")]
    Offloaded,
    /// Nothing to push.
    #[error("versions: 0 is nothing to simulate; give at least 1")]
    Versions,
    /// A slow rank that is none.
    #[error("slow: {slow:?} names no rank or NIC of this job, or its factor is not above 0 and at most 1")]
    Slow {
        /// What was given.
        slow: Slow,
    },
    /// The job did not do what it should.
    #[error("simulated: at {at} the job ended: {reason}")]
    Ended {
        /// When.
        at: Time,
        /// Why, as its controller says.
        reason: String,
    },
    /// It did not end.
    #[error(
        "simulated: no end after {events} events, at {at}: raise the event budget, or find out why{last}"
    )]
    Budget {
        /// The budget.
        events: u64,
        /// When.
        at: Time,
        /// The last events, a line each.
        last: String,
    },
    /// Nothing more will happen, and the job is not over.
    #[error("simulated: at {at} nothing more happens, and the job is not over{last}")]
    Stuck {
        /// When.
        at: Time,
        /// The last events, a line each.
        last: String,
    },
    /// An invariant does not hold.
    #[error("simulated: at {at}: {what}{last}")]
    Invariant {
        /// When.
        at: Time,
        /// What is broken.
        what: String,
        /// The last events, a line each.
        last: String,
    },
}
