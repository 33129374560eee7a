//! What receivers pass on: the other half of a route that goes over them.
//!
//! A receiver cannot see what arrives, so it is told: every WRITE of an operation that somebody passes on carries a *tag*, a
//! small number that the receiver looks up. Tags are given out over the whole plan at once, so sender and receiver agree on
//! them without a word.

use serde::{Deserialize, Serialize};

use crate::cut::Routed;
use crate::error::PlanError;
use crate::ids::{Rank, ReceiverRank, TrainerRank};
use crate::limits::OPS_MAX;
use crate::manifest::Manifest;
use crate::plan::{Op, Plan, RankPlan};
use crate::route::Route;
use crate::transform::Transform;

/// The tag of what nobody passes on.
pub const NO_TAG: u32 = u32::MAX;

/// Bits that a tag needs: a rank has at most [`OPS_MAX`] of them. Whoever sends it has the others to itself.
pub const TAG_BITS: u32 = OPS_MAX.ilog2();

/// What a receiver passes on to others: operations of its own, released by what arrives.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayPlan {
    /// What it writes, in the order of what releases it, from where the bytes arrive.
    pub plan: RankPlan,
    /// By tag, the first operation that it releases; it releases all up to the first of the next tag.
    pub first: Vec<u32>,
    /// By tag, how many WRITEs must have arrived.
    pub awaited: Vec<u32>,
}

/// The operations of every rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// By trainer.
    pub trainers: Vec<RankPlan>,
    /// By receiver; without operations for those that pass nothing on.
    pub receivers: Vec<RelayPlan>,
}

impl Plan {
    /// What every rank does. As [`Plan::part`] for each trainer, with tags, and what receivers pass on.
    ///
    /// # Errors
    /// When a rank has more than [`OPS_MAX`] operations.
    pub fn parts(&self, manifest: &Manifest) -> Result<Parts, PlanError> {
        self.parts_with(manifest, |_, ops| ops)
    }

    /// As [`Plan::parts`], where `change` is shown the operations of one trainer after the other, and may put others in their
    /// place: a simulation of a large plan takes short ones together. It must keep how many bytes take which way. Only one
    /// trainer's operations are there before they are changed, so memory follows what is made of them.
    ///
    /// # Errors
    /// As [`Plan::parts`].
    pub fn parts_with(
        &self,
        manifest: &Manifest,
        mut change: impl FnMut(TrainerRank, Vec<Routed>) -> Vec<Routed>,
    ) -> Result<Parts, PlanError> {
        let mut relays = Relays { plan: self, receivers: vec![RelayPlan::default(); self.receivers.len()] };
        let passed_on = self.groups.iter().any(|group| group.route != Route::Direct && group.len() > 1);
        let mut trainers = Vec::with_capacity(self.trainers.len());
        for (rank, part) in (0..).map(TrainerRank).zip(&self.trainers) {
            let routed = change(rank, self.routed(rank, manifest)?);
            let tags = match passed_on {
                true => routed.iter().map(|routed| relays.arrive(routed)).collect::<Result<_, _>>()?,
                false => Vec::new(),
            };
            let writes = routed.iter().map(|routed| routed.op.writes()).sum();
            // Of their own size: collected from `routed`, they would keep its room.
            let mut ops = Vec::with_capacity(routed.len());
            ops.extend(routed.into_iter().map(|routed| routed.op));
            trainers.push(RankPlan { ops, bytes: part.bytes, writes, tags });
        }
        for RelayPlan { plan, first, awaited } in &mut relays.receivers {
            plan.ops.shrink_to_fit();
            [&mut plan.tags, first, awaited].into_iter().for_each(Vec::shrink_to_fit);
        }
        Ok(Parts { trainers, receivers: relays.receivers })
    }
}

struct Relays<'p> {
    plan: &'p Plan,
    receivers: Vec<RelayPlan>,
}

impl Relays<'_> {
    /// The tag of an operation: what its receiver passes on, it is given here.
    fn arrive(&mut self, Routed { op, way }: &Routed) -> Result<u32, PlanError> {
        let at = Rank::Receiver(op.to);
        // The trainer's legs are known; whoever it is, the others are the same.
        let legs = self.plan.group(way.0).into_iter().flat_map(|group| group.legs(TrainerRank(0), way.1));
        let next: Vec<ReceiverRank> = legs.filter(|leg| leg.from == at).map(|leg| leg.to).collect();
        if next.is_empty() {
            return Ok(NO_TAG);
        }
        let mut onward = Vec::with_capacity(next.len());
        for to in next {
            let op = passed_on(op, to);
            onward.push((op, self.arrive(&Routed { op, way: *way })?));
        }
        let Some(relay) = self.receivers.get_mut(op.to.index()) else { return Ok(NO_TAG) };
        if relay.plan.ops.len() + onward.len() > OPS_MAX {
            return Err(PlanError::TooManyOps { max: OPS_MAX });
        }
        let tag = relay.first.len() as u32;
        relay.first.push(relay.plan.ops.len() as u32);
        // At most as many as an operation has bytes, which fits 32 bits.
        relay.awaited.push(op.writes() as u32);
        for (op, tag) in onward {
            relay.plan.bytes = relay.plan.bytes.saturating_add(op.bytes());
            relay.plan.writes = relay.plan.writes.saturating_add(op.writes());
            relay.plan.ops.push(op);
            relay.plan.tags.push(tag);
        }
        Ok(tag)
    }
}

/// What has arrived by `op`, written to the same place at another receiver, in as many WRITEs.
fn passed_on(op: &Op, to: ReceiverRank) -> Op {
    let (mut rows, mut row_bytes, mut place) = (op.rows, op.row_bytes, op.destination);
    if op.writes() == 1 {
        (rows, row_bytes, place.stride) = (1, op.bytes() as u32, op.bytes());
    }
    let (source, destination) = (place, place);
    Op { to, rows, row_bytes, source, destination, gather: false, transform: Transform::Copy, wave: 0, ..*op }
}
