//! The lower bound: the time that no schedule can beat, because some rank's rails must move that many bytes.
//!
//! It is kept as integers, so that plans compare and hash the same everywhere.

use serde::{Deserialize, Serialize};

use crate::ids::{Rank, ReceiverRank, TrainerRank};
use crate::manifest::{Manifest, RailDecl, bandwidth};
use crate::plan::{RankPlan, ReceiverPart};

/// The rank whose rails take longest. What each rank moves stands in [`RankPlan::bytes`] and
/// [`ReceiverPart::bytes`].
///
/// [`RankPlan::bytes`]: crate::RankPlan::bytes
/// [`ReceiverPart::bytes`]: crate::ReceiverPart::bytes
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LowerBound {
    /// Who limits: a trainer by what it sends, a receiver by what it takes in. `None` when nothing moves.
    pub limited_by: Option<Rank>,
    /// What that rank moves, in bytes.
    pub bytes: u64,
    /// What its rails move together, in bytes a second.
    pub bytes_per_second: u64,
}

impl LowerBound {
    /// The bound in seconds; 0 when nothing moves.
    pub fn seconds(&self) -> f64 {
        if self.bytes == 0 { 0.0 } else { self.bytes as f64 / self.bytes_per_second as f64 }
    }

    pub(crate) fn new(manifest: &Manifest, trainers: &[RankPlan], receivers: &[ReceiverPart]) -> LowerBound {
        let egress = (0..).map(|rank| Rank::Trainer(TrainerRank(rank)));
        let egress = egress.zip(trainers.iter().map(|part| part.bytes)).zip(&manifest.trainers);
        let egress = egress.map(|((rank, bytes), declared)| at(rank, bytes, &declared.rails));
        let ingress = (0..).map(|rank| Rank::Receiver(ReceiverRank(rank)));
        let ingress = ingress.zip(receivers.iter().map(|part| part.bytes)).zip(&manifest.receivers);
        let ingress = ingress.map(|((rank, bytes), declared)| at(rank, bytes, &declared.rails));
        // The first of equals: trainers before receivers, low ranks before high ones.
        egress.chain(ingress).filter(|bound| bound.bytes > 0).fold(LowerBound::default(), |worst, bound| {
            if worst.limited_by.is_none() || worst.is_below(&bound) { bound } else { worst }
        })
    }

    fn is_below(&self, other: &LowerBound) -> bool {
        let time = |a: &LowerBound, b: &LowerBound| u128::from(a.bytes) * u128::from(b.bytes_per_second);
        time(self, other) < time(other, self)
    }
}

fn at(rank: Rank, bytes: u64, rails: &[RailDecl]) -> LowerBound {
    LowerBound { limited_by: Some(rank), bytes, bytes_per_second: bandwidth(rails) }
}
