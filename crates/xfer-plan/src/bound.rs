//! The lower bound: the time that no schedule can beat, because some rank's NICs must move that many bytes.
//!
//! It is kept as integers, so that plans compare and hash the same everywhere.

use serde::{Deserialize, Serialize};

use crate::cost::Resource;
use crate::ids::{Rank, ReceiverRank, TrainerRank};
use crate::manifest::{RailDecl, Sides, bandwidth};
use crate::route::Loads;

/// The rank whose NICs take longest, one way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LowerBound {
    /// Who limits, and whether by what it sends or takes in. `None` when nothing moves.
    pub limited_by: Option<(Rank, Resource)>,
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

    pub(crate) fn new((trainers, receivers): Sides<'_>, loads: &Loads) -> LowerBound {
        let trainers = (0..).zip(&loads.trainers).zip(trainers).map(|((rank, load), declared)| {
            at((Rank::Trainer(TrainerRank(rank)), Resource::NicOut), load.nic_out_bytes, &declared.rails)
        });
        let receivers = (0..).zip(&loads.receivers).zip(receivers).flat_map(|((rank, load), declared)| {
            let rank = Rank::Receiver(ReceiverRank(rank));
            [(Resource::NicIn, load.nic_in_bytes), (Resource::NicOut, load.nic_out_bytes)]
                .map(|(resource, bytes)| at((rank, resource), bytes, &declared.rails))
        });
        // The first of equals: trainers before receivers, low ranks before high ones.
        trainers.chain(receivers).filter(|bound| bound.bytes > 0).fold(
            LowerBound::default(),
            |worst, bound| {
                if worst.limited_by.is_none() || worst.is_below(&bound) { bound } else { worst }
            },
        )
    }

    fn is_below(&self, other: &LowerBound) -> bool {
        let time = |a: &LowerBound, b: &LowerBound| u128::from(a.bytes) * u128::from(b.bytes_per_second);
        time(self, other) < time(other, self)
    }
}

fn at(who: (Rank, Resource), bytes: u64, rails: &[RailDecl]) -> LowerBound {
    LowerBound { limited_by: Some(who), bytes, bytes_per_second: bandwidth(rails) }
}
