//! Why a part of a plan is refused. Every error names the operation's parameter, or says what to change.

use xfer_plan::limits::{OPS_MAX, RANKS_MAX};
use xfer_plan::{ReceiverRank, RegionIndex, Transform};

use super::ROWS_MAX;

/// Why a part of a plan cannot be run here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProgramError {
    /// More operations than a [`WriteId`](super::WriteId) can name.
    #[error("the plan has {0} operations for this rank, more than 2^32")]
    TooManyOps(usize),
    /// Operations that are cut into more parts than there may be.
    #[error(
        "the plan's operations for this rank are more than {OPS_MAX} parts of {slot_bytes} bytes, which is a staging slot; make \
         slots longer"
    )]
    TooManyParts {
        /// Bytes of a slot.
        slot_bytes: u64,
    },
    /// More bytes or WRITEs than 2^64.
    #[error("the plan has more than 2^64 bytes or writes for this rank")]
    TooMuch,
    /// Tags that are not one for each operation.
    #[error("the plan tags {tags} of {ops} operations of this rank; do both sides run the same version?")]
    Tags {
        /// How many tags.
        tags: usize,
        /// How many operations.
        ops: usize,
    },
    /// A rank that no job has.
    #[error("there is no inference {0}: a job has at most {RANKS_MAX}")]
    Rank(usize),
    /// What this rank should pass on is not said rightly.
    #[error("what the plan has this rank pass on is not possible: {0}; do both sides run the same version?")]
    Relay(&'static str),
    /// An operation without bytes, or that is staged, exceeds a slot and cannot be cut.
    #[error("the plan's operation {op} for {param} moves {bytes} bytes where 1 to {bytes_max} are possible")]
    Size {
        /// The operation.
        op: usize,
        /// Its parameter.
        param: String,
        /// Its bytes.
        bytes: u64,
        /// The bound.
        bytes_max: u64,
    },
    /// An operation that reads outside this rank's memory.
    #[error(
        "the plan reads {param} outside {region} of this rank, which has {region_bytes:?} bytes; do both sides run the same manifest?"
    )]
    Source {
        /// Its parameter.
        param: String,
        /// The region.
        region: RegionIndex,
        /// Its length, if it exists.
        region_bytes: Option<u64>,
    },
    /// An operation that writes outside the peer's memory.
    #[error(
        "the plan writes {param} outside {region} of {to}, which exposes {region_bytes:?} bytes; its region is shorter than its manifest says"
    )]
    Destination {
        /// Its parameter.
        param: String,
        /// The receiver.
        to: ReceiverRank,
        /// The region.
        region: RegionIndex,
        /// Its length, if it exists.
        region_bytes: Option<u64>,
    },
    /// A receiver with two banks of regions that differ.
    #[error(
        "{to} exposes two arenas that differ, with regions of {region_bytes:?} bytes; does it run the same version?"
    )]
    Banks {
        /// The receiver.
        to: ReceiverRank,
        /// Bytes of each of its regions.
        region_bytes: Vec<u64>,
    },
    /// More rows in a slot than a [`WriteId`](super::WriteId) can name.
    #[error(
        "the plan transforms {rows} rows of {param} at once, which land apart: at most {ROWS_MAX} are possible; shorten the chunks"
    )]
    Rows {
        /// Its parameter.
        param: String,
        /// Its rows.
        rows: u32,
    },
    /// An operation that changes elements on the way, on a rank that cannot.
    #[error(
        "the plan wants {param} as {transform:?}; this rank writes elements as they are, so convert them on the trainer"
    )]
    Transform {
        /// Its parameter.
        param: String,
        /// What is asked for.
        transform: Transform,
    },
    /// An operation to a receiver without a rail.
    #[error("the plan writes {param} to {to}, to which this rank has no rail")]
    NoRoute {
        /// Its parameter.
        param: String,
        /// The receiver.
        to: ReceiverRank,
    },
}
