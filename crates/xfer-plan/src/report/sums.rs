//! Sums over transfers: everything that a report needs of them, found in one pass over each trainer's list.
//!
//! Operations are never listed: how many bytes a transfer puts on which NIC follows from how it is cut.

use std::collections::BTreeMap;

use crate::cut::{ByRail, Pieces, Rails, Way};
use crate::ids::TrainerRank;
use crate::manifest::Manifest;
use crate::plan::{Placed, Plan};

/// What one trainer sends one way.
#[derive(Clone, Debug, Default)]
pub(crate) struct OnWay {
    /// For one member of the group.
    pub(crate) bytes: u64,
    pub(crate) transfers: u64,
    /// The bytes by the rail that an operation takes to the first receiver that the trainer writes to; to the next one it
    /// takes the next rail.
    pub(crate) by_rail: ByRail,
}

/// See the module.
pub(crate) struct Sums {
    /// By trainer.
    pub(crate) ways: Vec<BTreeMap<Way, OnWay>>,
    /// By trainer: what it stages in a push.
    pub(crate) staged_bytes: Vec<u64>,
}

impl Sums {
    pub(crate) fn new(plan: &Plan, manifest: &Manifest) -> Sums {
        let copies: Vec<u64> = plan.groups.iter().map(|group| group.copies() as u64).collect();
        let trainers = plan.trainers.len();
        let mut sums = Sums { ways: vec![BTreeMap::new(); trainers], staged_bytes: vec![0; trainers] };
        let ranks = (0..).map(TrainerRank).zip(&manifest.trainers);
        let mut rails: Vec<Rails> = ranks.map(|(rank, has)| Rails::new(rank, has.rails.len())).collect();
        for Placed { to, lane, transfer, .. } in plan.transfers() {
            let trainer = transfer.trainer.index();
            let (Some(ways), Some(rails)) = (sums.ways.get_mut(trainer), rails.get_mut(trainer)) else {
                continue;
            };
            let pieces = Pieces::new(transfer, &manifest.options);
            rails.deal((to, lane), &pieces);
            let way = ways.entry((to, lane)).or_default();
            way.bytes = way.bytes.saturating_add(pieces.bytes);
            way.transfers += 1;
            if let Some(staged) = sums.staged_bytes.get_mut(trainer) {
                let copies = copies.get(to.index()).copied().unwrap_or(0);
                *staged = staged.saturating_add(pieces.staged_bytes.saturating_mul(copies));
            }
        }
        for (ways, rails) in sums.ways.iter_mut().zip(rails) {
            for (way, by_rail) in rails.into_bytes() {
                ways.entry(way).or_default().by_rail = by_rail;
            }
        }
        sums
    }

    /// What all trainers together send each way.
    pub(crate) fn by_way(&self) -> BTreeMap<Way, OnWay> {
        let mut all: BTreeMap<Way, OnWay> = BTreeMap::new();
        for (way, on_way) in self.ways.iter().flatten() {
            let sum = all.entry(*way).or_default();
            sum.bytes = sum.bytes.saturating_add(on_way.bytes);
            sum.transfers += on_way.transfers;
        }
        all
    }
}
