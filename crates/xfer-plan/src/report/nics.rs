//! NICs: how many bytes each of them moves, by the rule by which operations are dealt to rails.

use std::collections::BTreeMap;

use serde::Serialize;

use super::sums::Sums;
use crate::cut::{ByRail, Way};
use crate::ids::{Rank, TrainerRank};
use crate::manifest::{Manifest, RailDecl};
use crate::plan::{Plan, paired_rail};
use crate::route::Link;

/// What the NICs of one side move one way, in bytes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Nics {
    /// Over all NICs.
    pub nics: Distribution,
    /// Over all ranks: each rank's mean NIC. Where this is even and `nics` is not, it is the dealing to rails that is uneven.
    pub ranks: Distribution,
    /// NICs of one bar.
    pub nics_per_bar: u64,
    /// All NICs in order, in at most 1024 bars.
    pub bars: Vec<Bar>,
}

/// NICs that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Bar {
    /// The rank of the first of them.
    pub rank: u32,
    /// Its number on that rank.
    pub rail: u32,
    /// What the busiest of them moves, in bytes.
    pub max_bytes: u64,
    /// What all of them move, in bytes.
    pub bytes: u64,
}

/// How evenly bytes are spread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Distribution {
    /// Over how many.
    pub count: u64,
    /// The least.
    pub min: u64,
    /// The middle one; the mean of both, rounded down, where there are two.
    pub median: u64,
    /// The most.
    pub max: u64,
    /// The mean, rounded down.
    pub mean: u64,
    /// The most divided by the mean: 1 is even. `None` where nothing moves.
    pub imbalance: Option<f64>,
}

/// Enough for a wide screen.
const BARS_MAX: usize = 1024;

impl Distribution {
    fn of(mut bytes: Vec<u64>) -> Distribution {
        bytes.sort_unstable();
        let (Some(&min), Some(&max)) = (bytes.first(), bytes.last()) else { return Distribution::default() };
        let sum: u128 = bytes.iter().copied().map(u128::from).sum();
        let middle = |at: usize| bytes.get(at).copied().unwrap_or(max);
        Distribution {
            count: bytes.len() as u64,
            min,
            median: middle((bytes.len() - 1) / 2).midpoint(middle(bytes.len() / 2)),
            max,
            mean: (sum / bytes.len() as u128) as u64, // at most `max`
            imbalance: (sum > 0).then(|| max as f64 * bytes.len() as f64 / sum as f64),
        }
    }
}

impl Nics {
    /// By rank and rail.
    pub(super) fn new(ranks: &[ByRail]) -> Nics {
        let nics: Vec<(u32, u32, u64)> = (0..)
            .zip(ranks)
            .flat_map(|(rank, by_rail)| (0..).zip(by_rail).map(move |(rail, &bytes)| (rank, rail, bytes)))
            .collect();
        let nics_per_bar = nics.len().div_ceil(BARS_MAX).max(1);
        let bars = nics.chunks(nics_per_bar).filter_map(|chunk| {
            let &(rank, rail, _) = chunk.first()?;
            let bytes = || chunk.iter().map(|&(_, _, bytes)| bytes);
            let max_bytes = bytes().max()?;
            Some(Bar { rank, rail, max_bytes, bytes: bytes().fold(0, u64::saturating_add) })
        });
        let mean = |by_rail: &ByRail| super::total(by_rail.iter().copied()) / by_rail.len().max(1) as u64;
        Nics {
            bars: bars.collect(),
            nics_per_bar: nics_per_bar as u64,
            ranks: Distribution::of(ranks.iter().map(mean).collect()),
            nics: Distribution::of(nics.iter().map(|&(_, _, bytes)| bytes).collect()),
        }
    }
}

/// Bytes by rank and rail.
pub(super) struct Traffic {
    pub(super) trainers_out: Vec<ByRail>,
    pub(super) receivers_in: Vec<ByRail>,
    pub(super) receivers_out: Vec<ByRail>,
}

impl Traffic {
    pub(super) fn new(plan: &Plan, manifest: &Manifest, sums: &Sums) -> Traffic {
        let silent = |rails: &[RailDecl]| ByRail::from_elem(0, rails.len());
        let receivers: Vec<ByRail> = manifest.receivers.iter().map(|rank| silent(&rank.rails)).collect();
        let mut traffic = Traffic {
            trainers_out: manifest.trainers.iter().map(|rank| silent(&rank.rails)).collect(),
            receivers_in: receivers.clone(),
            receivers_out: receivers,
        };
        // Trainers whose rails are paired alike differ no further behind them: only the sum matters.
        let mut arriving: BTreeMap<(usize, TrainerRank, Way), ByRail> = BTreeMap::new();
        let uneven = |rails: usize| manifest.receivers.iter().any(|receiver| receiver.rails.len() != rails);
        for (trainer, (ways, out)) in
            (0..).map(TrainerRank).zip(sums.ways.iter().zip(&mut traffic.trainers_out))
        {
            let alike = if uneven(out.len()) { trainer } else { TrainerRank(0) };
            for (&way, on_way) in ways {
                let copies = plan.group(way.0).map_or(0, |group| group.copies());
                deal_copies(&on_way.by_rail, copies, out);
                let sum = arriving.entry((on_way.by_rail.len(), alike, way)).or_default();
                sum.resize(on_way.by_rail.len(), 0);
                for (sum, bytes) in sum.iter_mut().zip(&on_way.by_rail) {
                    *sum = sum.saturating_add(*bytes);
                }
            }
        }
        for ((rails, trainer, (group, lane)), by_rail) in arriving {
            let Some(group) = plan.group(group) else { continue };
            // The receiver that a trainer writes to takes the operation on the rail that is paired with the trainer's, and
            // passes it on to the next host on that rail again.
            let mut place_of = BTreeMap::new();
            for leg in group.legs(TrainerRank(0), lane) {
                let place = match leg.from {
                    Rank::Trainer(_) => place_of.len(),
                    Rank::Receiver(from) => place_of.get(&from).copied().unwrap_or(0),
                };
                if leg.link == Link::Nvlink {
                    continue;
                }
                place_of.insert(leg.to, place);
                let from = match leg.from {
                    Rank::Trainer(_) => None,
                    Rank::Receiver(from) => traffic.receivers_out.get_mut(from.index()),
                };
                let to = traffic.receivers_in.get_mut(leg.to.index());
                for moved in [from, to].into_iter().flatten() {
                    for (number, bytes) in by_rail.iter().enumerate() {
                        let rail = paired_rail(trainer, rails, (number + place) % rails.max(1), moved.len());
                        if let Some(sum) = moved.get_mut(rail) {
                            *sum = sum.saturating_add(*bytes);
                        }
                    }
                }
            }
        }
        traffic
    }
}

/// Adds every copy to the rail after that of the copy before it.
fn deal_copies(by_rail: &[u64], copies: usize, out: &mut [u64]) {
    let rails = by_rail.len().max(1);
    for copy in 0..copies.min(rails) {
        let again = (copies - copy).div_ceil(rails) as u64;
        for (number, bytes) in by_rail.iter().enumerate() {
            if let Some(sum) = out.get_mut((number + copy) % rails) {
                *sum = sum.saturating_add(bytes.saturating_mul(again));
            }
        }
    }
}
