//! Why a push failed, for a person: who, where, for how long, and what to look at.

use core::time::Duration;

use xfer_plan::ReceiverRank;

use crate::rail::RailIndex;

/// Why a push failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// A WRITE completed in error, and cannot be written again: no other rail leads to the receiver.
    #[error("writing {param} to {to} over {rail} failed: {reason}")]
    Write {
        /// The parameter.
        param: String,
        /// The receiver.
        to: ReceiverRank,
        /// The rail.
        rail: RailIndex,
        /// The rail's reason.
        reason: String,
    },
    /// A WRITE that its receiver passes on did not complete: whether it has arrived is unknown. Written again it could be
    /// counted twice, and something passed on that has not arrived.
    #[error(
        "whether {param} has arrived at {to} over {rail} is unknown ({reason}), and {to} passes it on: push once more"
    )]
    Uncertain {
        /// The parameter.
        param: String,
        /// The receiver.
        to: ReceiverRank,
        /// The rail.
        rail: RailIndex,
        /// The rail's reason.
        reason: String,
    },
    /// A peer owes completions for too long.
    #[error("{to} took no write for {waited:?} ({in_flight} in flight): is it stopped, dead or cut off?")]
    Deadline {
        /// The receiver.
        to: ReceiverRank,
        /// How long.
        waited: Duration,
        /// WRITEs in flight to it.
        in_flight: u32,
    },
    /// Nothing moves, and no peer is to blame.
    #[error(
        "nothing has moved for {waited:?} ({filling} slots are being filled): is this process starved of its cores?"
    )]
    Stalled {
        /// How long.
        waited: Duration,
        /// Staging slots that are still being filled.
        filling: u32,
    },
    /// A rail broke, and some receiver cannot be reached without it.
    #[error("{rail} failed: {reason}")]
    Rail {
        /// The rail.
        rail: RailIndex,
        /// Its reason.
        reason: String,
    },
    /// Earlier failures have left no rail to some receiver.
    #[error("no rail to {to} is left after earlier failures; leave and join again")]
    Closed {
        /// The receiver.
        to: ReceiverRank,
    },
    /// Ended from outside.
    #[error("{0}")]
    Aborted(String),
    /// All WRITEs are over, but they are not what was planned: a defect of this program.
    #[error(
        "defect: delivered {bytes} bytes in {writes} writes where the plan has {bytes_planned} in {writes_planned}"
    )]
    Accounting {
        /// Bytes delivered.
        bytes: u64,
        /// WRITEs delivered.
        writes: u64,
        /// Bytes planned.
        bytes_planned: u64,
        /// WRITEs planned.
        writes_planned: u64,
    },
    /// An event that is not possible now: a defect of the driver.
    #[error("defect: {0}")]
    Protocol(String),
}
