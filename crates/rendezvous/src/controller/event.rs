//! What goes into the controller, and what comes out of it.

use std::time::Duration;

use xfer_plan::{Digest, Rank};

use super::ConnectionId;
use crate::protocol::{PushId, ToController, ToMember};

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// A connection that has proved itself sent a message.
    Received(ConnectionId, ToController),
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
    /// Close a connection once what was sent before has left.
    Close(ConnectionId),
    /// Tell whoever watches.
    Report(Report),
}

/// What an observer of the job sees.
#[derive(Debug, Clone, PartialEq)]
pub enum Report {
    /// A member joined.
    Joined(Rank),
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
        /// From the moment that all trainers had begun.
        elapsed: Duration,
    },
    /// An attempt failed.
    Aborted {
        /// The version that was not committed.
        version: u64,
        /// Why.
        reason: String,
    },
    /// The job is over: in good order without a reason.
    Ended {
        /// What went wrong.
        reason: Option<String>,
    },
}
