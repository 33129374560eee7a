//! The ranks that need longest.

use std::cmp::Reverse;

use serde::Serialize;

use crate::cost::{Resource, Use, receiver_uses, trainer_uses};
use crate::error::shorten;
use crate::ids::{Rank, ReceiverRank, TrainerRank};
use crate::manifest::Manifest;
use crate::route::{Loads, ReceiverLoad, TrainerLoad};

/// How many are named.
const BUSIEST_MAX: usize = 5;

/// A rank, and what it spends most time on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Busy {
    /// Who.
    pub rank: Rank,
    /// Where it runs.
    pub host: String,
    /// On what.
    pub resource: Resource,
    /// How much: WRITEs for [`Resource::Posts`], else bytes.
    pub amount: u64,
    /// The predicted time for that.
    pub nanoseconds: u64,
}

/// A rank, and what takes it longest.
#[derive(Clone, Copy)]
pub(crate) struct RankUse {
    pub(crate) rank: Rank,
    pub(crate) longest: Use,
}

/// What each rank spends most time on, by the cost model: the first of equals; ranks that do nothing are left out.
pub(crate) fn uses(
    manifest: &Manifest,
    trainers: &[TrainerLoad],
    receivers: &[ReceiverLoad],
) -> impl Iterator<Item = RankUse> {
    let cost = &manifest.options.cost;
    let trainers = (0..).zip(trainers).zip(&manifest.trainers).map(|((rank, load), declared)| {
        let uses = trainer_uses(load, &declared.rails, cost);
        (Rank::Trainer(TrainerRank(rank)), longest(uses))
    });
    let receivers = (0..).zip(receivers).zip(&manifest.receivers).map(|((rank, load), declared)| {
        let uses = receiver_uses(load, &declared.rails, cost);
        (Rank::Receiver(ReceiverRank(rank)), longest(uses))
    });
    let uses = trainers.chain(receivers);
    uses.filter_map(|(rank, longest)| {
        Some(RankUse { rank, longest: longest.filter(|(_, _, time)| *time > 0)? })
    })
}

/// The one that takes longest, the first of equals.
fn longest(uses: impl IntoIterator<Item = Use>) -> Option<Use> {
    uses.into_iter().reduce(|longest, other| if other.2 > longest.2 { other } else { longest })
}

pub(super) fn busiest(manifest: &Manifest, loads: &Loads) -> Vec<Busy> {
    let mut uses: Vec<RankUse> = uses(manifest, &loads.trainers, &loads.receivers).collect();
    uses.sort_by_key(|of| Reverse(of.longest.2)); // stable: of equals, trainers and low ranks first
    let busy = uses.into_iter().take(BUSIEST_MAX).map(|RankUse { rank, longest }| {
        let host = match rank {
            Rank::Trainer(rank) => manifest.trainers.get(rank.index()).map(|trainer| &trainer.host),
            Rank::Receiver(rank) => manifest.receivers.get(rank.index()).map(|receiver| &receiver.host),
        };
        let (resource, amount, nanoseconds) = longest;
        Busy {
            rank,
            host: host.map_or_else(String::new, |host| shorten(host)),
            resource,
            amount,
            nanoseconds,
        }
    });
    busy.collect()
}
