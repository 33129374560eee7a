//! What goes into the controller, and what comes out of it.

use std::time::Duration;

use xfer_plan::{Digest, Rank};

use super::{ConnectionId, Stage};
use crate::protocol::{Commit, PushId, ToController, ToMember};
use crate::refusal::Refusal;

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// A connection has proved itself; where it comes from, for observers. A driver may leave this out.
    Connected(ConnectionId, String),
    /// A connection that has proved itself sent a message.
    Received(ConnectionId, ToController),
    /// What [`Action::Record`] asked for is on disk, or why not.
    Recorded(Result<(), String>),
    /// A connection ended, with the reason.
    Disconnected(ConnectionId, String),
    /// Time has passed.
    Tick,
}

/// What to do.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Send a message.
    Send(ConnectionId, ToMember),
    /// Record this decision so that it outlives the process, then answer with [`Event::Recorded`].
    Record(Commit),
    /// Close a connection once what was sent before has left.
    Close(ConnectionId),
    /// Tell whoever watches.
    Report(Report),
}

/// What an observer of the job sees.
#[derive(Debug, Clone, PartialEq)]
pub enum Report {
    /// Another controller is in charge of the job: this one takes over when that one is gone.
    StandingBy {
        /// Where that one listens.
        holder: String,
    },
    /// This controller is in charge of the job, where others could have been.
    InCharge {
        /// The version that an earlier one recorded last.
        version: Option<u64>,
    },
    /// A member joined.
    Joined(Rank),
    /// A member left in good order.
    Left(Rank),
    /// A member was lost.
    Lost {
        /// Who.
        rank: Rank,
        /// During what, and why.
        reason: String,
    },
    /// Everybody is told to join again.
    Regrouping {
        /// Who was lost or came back.
        reason: String,
    },
    /// A connection was not let in.
    Refused {
        /// Who, as far as is known: an address, or the rank that it says it is.
        peer: String,
        /// As a class.
        refusal: Refusal,
        /// In words.
        reason: String,
    },
    /// All have joined and there is a plan.
    Planned {
        /// Its digest.
        digest: Digest,
        /// Bytes per push.
        bytes: u64,
        /// WRITEs per push.
        writes: u64,
        /// Lower bound in seconds.
        bound_seconds: f64,
        /// Whose NICs limit it; `None` when nothing moves.
        limited_by: Option<Rank>,
        /// Ranks of the job that it goes on without.
        without: Vec<Rank>,
    },
    /// All members are connected.
    Started,
    /// All trainers have begun a version.
    Pushing {
        /// The version.
        version: u64,
        /// The attempt.
        push: PushId,
    },
    /// A version is committed: from here on it may be served.
    Committed {
        /// The version.
        version: u64,
        /// The attempt.
        push: PushId,
        /// From the moment that all trainers had begun.
        elapsed: Duration,
    },
    /// An attempt failed.
    Aborted {
        /// The version that was not committed.
        version: u64,
        /// The attempt.
        push: PushId,
        /// Where it stood.
        stage: Stage,
        /// Why, as a class.
        cause: Cause,
        /// Why.
        reason: String,
    },
    /// The job is over: in good order without a reason.
    Ended {
        /// What went wrong.
        reason: Option<String>,
    },
}

/// Why an attempt was aborted, as a class: what is counted and watched over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// Trainers began different versions, or one had left.
    Disagreement,
    /// A rank could not go on with it, and stays in the job.
    Failure,
    /// A rank took longer than the deadline.
    Deadline,
    /// A rank was lost.
    Loss,
}

impl Cause {
    /// All of them.
    pub const ALL: [Cause; 4] = [Self::Disagreement, Self::Failure, Self::Deadline, Self::Loss];

    /// One word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Disagreement => "disagreement",
            Self::Failure => "failure",
            Self::Deadline => "deadline",
            Self::Loss => "loss",
        }
    }
}
