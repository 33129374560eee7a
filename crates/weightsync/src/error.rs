//! What can go wrong in a session.

use std::time::Duration;

use rendezvous::RendezvousError;
use xfer_exec::cuda::CudaError;
use xfer_exec::{Failure, ProgramError, QuantError};
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
    /// What the plan has this rank quantise does not fit it.
    #[error("the controller's plan does not fit this rank: {0}")]
    Quantization(#[from] QuantError),
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
    /// A GPU, or its driver.
    #[error(transparent)]
    Gpu(Box<CudaError>),
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
    /// The job has lost ranks, and cannot go on before they are back. Nothing was pushed: push again to wait for them again.
    #[error("the job is not complete: {reason}; push again to wait for them")]
    Incomplete {
        /// Who is missing, and why it does not go on without them.
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
    /// This rank has just come to a job that is at a version which it has not got.
    #[error(
        "the job is at version {version}, which this rank has not got yet; read the weights after the next commit"
    )]
    Behind {
        /// The job's version.
        version: u64,
    },
    /// The weights are with the rails.
    #[error("the weights are in use by a push that was given up half way; it has not ended yet")]
    Busy,
    /// The session has ended: an earlier call was dropped in the middle, or the job is over for this rank.
    #[error(
        "this session has ended, by a push that was given up half way or by an error before; connect a new one"
    )]
    Broken,
    /// The engine could not follow a commit.
    #[error("version {version} is committed, but the engine cannot serve it: {reason}")]
    Hook {
        /// The version.
        version: u64,
        /// What the hook said.
        reason: String,
    },
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

impl From<CudaError> for Error {
    fn from(error: CudaError) -> Self {
        Self::Gpu(Box::new(error))
    }
}

impl From<gpu_mem::Error> for Error {
    fn from(error: gpu_mem::Error) -> Self {
        CudaError::from(error).into()
    }
}

impl From<weight_ops::cuda::Error> for Error {
    fn from(error: weight_ops::cuda::Error) -> Self {
        CudaError::from(error).into()
    }
}

impl Error {
    /// Whether the same call may be made again on the same session: the version was not committed as far as is known, and the
    /// job may go on. After [`Error::Unconfirmed`] it is committed, and after any other error the session has ended.
    pub fn may_be_tried_again(&self) -> bool {
        match self {
            Self::Push { .. } | Self::Aborted { .. } | Self::Incomplete { .. } | Self::NotYet { .. } => true,
            Self::Rendezvous(error) => matches!(
                error,
                RendezvousError::Unreachable { .. }
                    | RendezvousError::Lost { .. }
                    | RendezvousError::Deadline { .. }
            ),
            _ => false,
        }
    }
}

fn names(members: &[Rank]) -> String {
    members.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
