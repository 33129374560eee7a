//! The members' half of the protocol, as state machines: what a trainer and an inference rank answer, and what they do next.
//!
//! A driver hands over what the controller says ([`TrainerMember::handle`], [`InferenceMember::handle`]), does what the step
//! says, and sends what the machine answers. There is no socket, clock or memory in here, so a session and a simulated
//! cluster run the same code. Whatever comes where it does not belong is [`Unexpected`], never a panic and never half
//! obeyed. A method that answers returns `None` where its state has nothing to answer.
//!
//! Whoever was told to write says exactly once how that ended, with what it owes: [`ToController::Written`] or
//! [`ToController::Failed`], also when the attempt is over meanwhile. Until then the controller begins no other.
//!
//! A trainer (heartbeats and a refusal may come in any state):
//!
//! | state | what happens | answer | then |
//! |---|---|---|---|
//! | joining | `Planned` | step `Connect` | connecting |
//! | connecting | `ready()` | `Ready` | starting |
//! | starting | `Start` | step `Started` | idle |
//! | idle | `begin()` | `Begin` | begun |
//! | begun | `Measure` | step `Measure` | measuring |
//! | measuring | `measured(Ok)` | `Magnitudes` | measured |
//! | measuring | `measured(Err)` | `Failed` | failed |
//! | begun, measured | `Write` | step `Write` | writing |
//! | begun, measuring, measured | `Abort` | step `Aborted` | idle |
//! | writing | `written(Ok)` | `Written` | deciding |
//! | writing | `written(Err)` | `Failed` | failed |
//! | writing | `Abort` | step `Stop` | stopping |
//! | stopping | `written()` | `Written` or `Failed` | idle |
//! | deciding | `Done` | step `Committed` | idle |
//! | deciding, failed | `Abort` | step `Aborted` | idle |
//! | joining, connecting, starting | `Abort` | step `Aborted` | out |
//! | any but writing, stopping | `Regroup` | step `Regroup` | out |
//! | writing | `Regroup` | step `Stop` | leaving |
//! | stopping | `Regroup` | | leaving |
//! | leaving | `written()` | `Written` or `Failed` | out |
//! | any | `rejoin()` | `Join` | joining |
//!
//! An inference rank. One that passes bytes on does so from `prepared()` to `relayed()`, beside these states and past
//! an abort:
//!
//! | state | what happens | answer | then |
//! |---|---|---|---|
//! | joining, connecting, starting | as a trainer | | between |
//! | between | `Prepare` | step `Prepare` | preparing |
//! | preparing | `prepared(Ok)` | `Prepared` | receiving |
//! | preparing | `prepared(Err)` | `Failed` | between |
//! | between, receiving | `Fence` | step `Fence` | fencing |
//! | fencing | `fenced()` | `Fenced` or `Failed` | as before the fence |
//! | receiving | `Verify` | step `Verify` | verifying |
//! | verifying | `verified()` | `Verified` or `Failed` | receiving |
//! | receiving | `Commit` | step `Commit` | committing |
//! | receiving | `Commit` of another attempt | | receiving |
//! | between | `Commit` | | between |
//! | committing | `committed()` | `Committed` | between |
//! | between, receiving | `Abort` | step `Aborted` | between |
//! | between, receiving | `Finished` | step `Finished` | between |
//! | out, joining, connecting, starting | `Finished` | step `Finished` | as before |
//! | joining, connecting, starting, between, receiving | `Regroup` | step `Regroup` | out |
//! | any | `rejoin()` | `Join` | joining |
//!
//! A rank that loses its connection, or whose controller comes back, joins again over a new one. It says what its bytes are
//! ([`Holds`](crate::Holds)), and the plan that it gets says what is committed: a rank that waited for the end of an attempt
//! learns there whether it was the commit. One that serves a version beside the one that arrives has named its arenas before it
//! knew: where it had missed the commit they have changed places ([`Peer::bank`](crate::Peer::bank)).

use std::fmt;

use serde::{Deserialize, Serialize};
use xfer_plan::Digest;

use crate::protocol::{Fence, Planned, PushId, ToController, ToMember};
use crate::verify::ParamSum;

mod inference;
mod trainer;

pub use inference::{InferenceMember, InferenceStep};
pub use trainer::{TrainerMember, TrainerStep};

/// Which version the bytes of a rank are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Served {
    /// This version, whole. 0 is what was there at the start: zeros.
    Version(u64),
    /// None: a push of this version began and has not been committed.
    Torn(u64),
    /// None: this rank has just come to a job that is at this version, and has what was loaded at its start.
    Behind(u64),
}

impl Served {
    /// Whether the bytes may be served.
    pub fn is_whole(self) -> bool {
        matches!(self, Self::Version(_))
    }
}

impl fmt::Display for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version(version) => version.fmt(f),
            Self::Torn(version) => write!(f, "none (torn by the push of version {version})"),
            Self::Behind(version) => {
                write!(f, "none (the job is at version {version}, which it has not got)")
            }
        }
    }
}

/// A message that is not possible now. Either end is defective, or runs another release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the controller sent {found} while this rank waited for {expected}")]
pub struct Unexpected {
    /// What was waited for.
    pub expected: &'static str,
    /// What came.
    pub found: &'static str,
}

impl Unexpected {
    fn new(expected: &'static str, found: &ToMember) -> Self {
        Self { expected, found: found.name() }
    }
}

/// One attempt to push one version.
#[derive(Debug, Clone, Copy)]
struct Attempt {
    push: PushId,
    version: u64,
}

/// The way from the join to the start, the same on both sides.
#[derive(Debug, Clone, Copy)]
enum Admission {
    Joining,
    Connecting(Digest),
    Starting,
}

enum AdmissionStep {
    Planned(Box<Planned>),
    Started,
}

impl Admission {
    fn handle(&mut self, message: ToMember) -> Result<AdmissionStep, Unexpected> {
        match (&*self, message) {
            (Self::Joining, ToMember::Planned(planned)) => {
                *self = Self::Connecting(planned.digest);
                Ok(AdmissionStep::Planned(planned))
            }
            (Self::Starting, ToMember::Start) => Ok(AdmissionStep::Started),
            (Self::Joining, other) => Err(Unexpected::new("the plan", &other)),
            (Self::Connecting(_), other) => Err(Unexpected::new("its own rails", &other)),
            (Self::Starting, other) => Err(Unexpected::new("the start", &other)),
        }
    }

    fn ready(&mut self) -> Option<ToController> {
        let Self::Connecting(digest) = *self else { return None };
        *self = Self::Starting;
        Some(ToController::Ready { digest })
    }
}

/// How a rank's writes ended: bytes and writes delivered, or why not all were.
fn report(
    push: PushId,
    result: Result<(u64, u64), String>,
    fences: Vec<Fence>,
    sums: Vec<ParamSum>,
) -> ToController {
    match result {
        Ok((bytes, writes)) => ToController::Written { push, bytes, writes, fences, sums },
        Err(reason) => ToController::Failed { push, reason, fences },
    }
}

#[cfg(test)]
mod tests;
