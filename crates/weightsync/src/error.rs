//! What can go wrong in a session.

use std::time::Duration;

use rendezvous::RendezvousError;
use xfer_exec::{Failure, ProgramError};
use xfer_plan::Rank;

use crate::fabric::FabricError;

/// An error of a session. The message names the rank, tensor or peer and says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The control plane.
    #[error(transparent)]
    Rendezvous(#[from] RendezvousError),
    /// No way to a peer, or to any.
    #[error(transparent)]
    Fabric(#[from] FabricError),
    /// The plan does not fit this rank.
    #[error("the controller's plan does not fit this rank: {0}")]
    Program(#[from] ProgramError),
    /// What the plan says of the bytes that arrive here, to be verified, is not possible.
    #[error("the controller's plan does not fit this rank: {0}; do both run the same release?")]
    Inbound(String),
    /// A tensor or parameter is declared wrongly.
    #[error("{name}: {reason}")]
    Declaration {
        /// The tensor or parameter.
        name: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// Memory for weights or staging.
    #[error("no memory for {what}: {reason}")]
    Memory {
        /// For what.
        what: &'static str,
        /// The system's reason.
        reason: String,
    },
    /// The operating system refused a thread.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] std::io::Error),
    /// This rank could not finish its writes. The version is not committed.
    #[error("push of version {version} failed: {failure}")]
    Push {
        /// The version.
        version: u64,
        /// What failed here.
        failure: Failure,
    },
    /// The push was ended from outside this rank. The version is not committed.
    #[error("version {version} was not committed: {reason}")]
    Aborted {
        /// The version.
        version: u64,
        /// Who failed at what.
        reason: String,
    },
    /// The version is committed, but not every inference rank confirmed that it serves it.
    #[error("version {version} is committed, but was not confirmed by {}; they are lost", names(.members))]
    Unconfirmed {
        /// The version.
        version: u64,
        /// Who did not confirm.
        members: Vec<Rank>,
    },
    /// All trainers have left; the version that was waited for will not come.
    #[error("all trainers have left; the last version is {committed}")]
    Finished {
        /// What is served.
        committed: u64,
    },
    /// No version within the time that the caller gave.
    #[error("version {wanted} did not come within {waited:?}; this rank serves version {served}")]
    NotYet {
        /// What was waited for.
        wanted: u64,
        /// For how long.
        waited: Duration,
        /// What is served meanwhile.
        served: String,
    },
    /// The bytes are of no version.
    #[error(
        "the weights are torn: the push of version {version} did not end; read them after the next commit"
    )]
    Torn {
        /// The push that did not end.
        version: u64,
    },
    /// The weights are with the rails.
    #[error("the weights are in use by a push that was given up half way; it has not ended yet")]
    Busy,
    /// An earlier call ended in the middle.
    #[error("an earlier push was given up half way or closed the rails; leave and join again")]
    Broken,
    /// A read outside a parameter.
    #[error("{bytes} bytes at {offset} are outside {name}, which has {len}")]
    Range {
        /// The parameter.
        name: String,
        /// Where.
        offset: u64,
        /// How many.
        bytes: u64,
        /// Its length.
        len: u64,
    },
}

fn names(members: &[Rank]) -> String {
    members.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
