//! What is known of an attempt to push a version.
//!
//! Stages only go forward; [`super::Controller`] says when.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use xfer_plan::{ParamId, Rank, ReceiverRank};

use crate::protocol::PushId;
use crate::verify::Checksum;

/// Where an attempt stands. Observers and reports tell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Stage {
    /// Trainers begin the version, one after another.
    Collecting,
    /// Inference ranks stop passing on what is left of the attempt before.
    Stopping,
    /// Trainers measure their parts of the quantised blocks that shard borders cut.
    Measuring,
    /// Inference ranks stop serving.
    Preparing,
    /// Everyone who writes does.
    Writing,
    /// Inference ranks close rails that a trainer has given up on.
    Fencing,
    /// Inference ranks compare what arrived with what was sent.
    Verifying,
    /// The decision to commit is being put on record.
    Recording,
    /// The version is committed, inference ranks make it visible.
    Committing,
}

impl Stage {
    /// What a member that is waited for has not done.
    pub fn missing(self) -> &'static str {
        match self {
            Self::Collecting => "to begin the version",
            Self::Stopping => "to stop passing on what the attempt before left",
            Self::Measuring => "to measure the blocks that it shares with others",
            Self::Preparing => "to stop serving and prepare",
            Self::Writing => "to finish its writes",
            Self::Fencing => "to close the rails that a trainer gave up on",
            Self::Verifying => "to compare what arrived with what was sent",
            // Nobody: that is for this process to do.
            Self::Recording => "to record the commit",
            Self::Committing => "to confirm the commit",
        }
    }

    /// Whether there is no way back.
    pub(super) fn is_decided(self) -> bool {
        matches!(self, Self::Recording | Self::Committing)
    }

    /// One word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Collecting => "collecting",
            Self::Stopping => "stopping",
            Self::Measuring => "measuring",
            Self::Preparing => "preparing",
            Self::Writing => "writing",
            Self::Fencing => "fencing",
            Self::Verifying => "verifying",
            Self::Recording => "recording",
            Self::Committing => "committing",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
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
    /// Who was lost after the decision: what that does waits until the others have learnt of the commit.
    pub(super) lost: Option<String>,
}
