//! What is known of an attempt to push a version.
//!
//! Stages only go forward; [`super::Controller`] says when.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use xfer_plan::{ParamId, Rank, ReceiverRank};

use crate::protocol::PushId;
use crate::verify::Checksum;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Collecting,
    Stopping,
    Preparing,
    Writing,
    Fencing,
    Verifying,
    Committing,
}

impl Stage {
    /// What a member that is waited for has not done.
    pub(super) fn missing(self) -> &'static str {
        match self {
            Self::Collecting => "to begin the version",
            Self::Stopping => "to stop passing on what the attempt before left",
            Self::Preparing => "to stop serving and prepare",
            Self::Writing => "to finish its writes",
            Self::Fencing => "to close the rails that a trainer gave up on",
            Self::Verifying => "to compare what arrived with what was sent",
            Self::Committing => "to confirm the commit",
        }
    }
}

pub(super) struct Push {
    pub(super) version: u64,
    pub(super) id: PushId,
    pub(super) stage: Stage,
    /// When the present stage began.
    pub(super) since: Duration,
    /// When all trainers had begun.
    pub(super) began_at: Duration,
    pub(super) waiting: BTreeSet<Rank>,
    /// What was sent, by those who have written.
    pub(super) sums: BTreeMap<ReceiverRank, BTreeMap<ParamId, Checksum>>,
    pub(super) unconfirmed: Vec<Rank>,
    /// Who was lost after the decision: the job ends once the others have learnt of the commit.
    pub(super) lost: Option<String>,
}
