//! Operations in bundles: for large jobs, many short operations of one rank to one receiver are simulated as one.
//!
//! A model's plan has many WRITEs for each megabyte: scales, norms, slices. What they cost is kept exactly: time to post, room on
//! the wire, bytes of kernels. What is lost is how finely they interleave. A bundle of what a receiver passes on is passed on
//! as a bundle.

use rendezvous::PlannedPart;
use xfer_plan::{BlockQuant, DType, NO_TAG, Op, RankPlan, RegionIndex, RelayPlan, Strided, Transform};

use crate::cluster::Nic;

/// What an operation of a bundled program costs, besides its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cost {
    /// WRITEs that it stands for.
    pub(super) writes: u32,
    /// What it takes of a NIC's wire.
    pub(super) wire_bytes: u64,
    /// What its kernel moves in the GPU's memory.
    pub(super) kernel_bytes: u64,
}

impl Cost {
    fn of(op: &Op, nic: &Nic) -> Cost {
        let writes = op.writes().max(1);
        let wire_bytes = nic.wire_bytes(op.bytes() / writes).saturating_mul(writes);
        Cost { writes: writes as u32, wire_bytes, kernel_bytes: super::kernel_bytes(op) }
    }

    /// Of one of its WRITEs.
    fn of_one(self) -> Cost {
        let wire_bytes = self.wire_bytes / u64::from(self.writes.max(1));
        Cost { writes: 1, wire_bytes, ..self }
    }

    fn add(&mut self, other: Cost) {
        self.writes = self.writes.saturating_add(other.writes);
        self.wire_bytes = self.wire_bytes.saturating_add(other.wire_bytes);
        self.kernel_bytes = self.kernel_bytes.saturating_add(other.kernel_bytes);
    }
}

/// Bundles the parts of all ranks, trainers first: bundles of up to `bytes_max`, where their first operations stood. What each
/// costs, by rank and operation.
pub(super) fn bundle_all(parts: &mut [PlannedPart], bytes_max: u64, nic: &Nic) -> Vec<Vec<Cost>> {
    let trainers = parts.iter().take_while(|part| matches!(part, PlannedPart::Trainer { .. })).count();
    let (trainers, receivers) = parts.split_at_mut(trainers);
    let mut relays: Vec<Relay> = receivers.iter_mut().map(Relay::of).collect();
    // Along a chain a tag leads to another: those stay as they are.
    let chained = relays.iter().flat_map(|relay| &relay.plan.plan.tags).any(|tag| *tag != NO_TAG);
    let mut costs = Vec::with_capacity(trainers.len() + receivers.len());
    for part in trainers {
        let PlannedPart::Trainer { plan, .. } = part else { continue };
        let (bundled, own) =
            Bundler { bytes_max, nic, chained, open: Vec::new() }.bundle(std::mem::take(plan), &mut relays);
        *plan = bundled;
        costs.push(own);
    }
    for (part, relay) in receivers.iter_mut().zip(relays) {
        let PlannedPart::Inference { relay: into, .. } = part else { continue };
        let (relay, own) = relay.bundled(nic);
        *into = relay;
        costs.push(own);
    }
    costs
}

/// What a receiver passes on, and by old tag which bundle has it.
struct Relay {
    plan: RelayPlan,
    /// By new tag: the old one that it began with, and how many bytes and WRITEs it stands for.
    bundles: Vec<(u32, u64, u32)>,
}

impl Relay {
    fn of(part: &mut PlannedPart) -> Relay {
        let plan = match part {
            PlannedPart::Inference { relay, .. } => std::mem::take(relay),
            PlannedPart::Trainer { .. } => RelayPlan::default(),
        };
        Relay { plan, bundles: Vec::new() }
    }

    /// What a tag releases.
    fn released(&self, tag: u32) -> &[Op] {
        let RelayPlan { plan, first, .. } = &self.plan;
        let start = first.get(tag as usize).map_or(0, |first| *first as usize);
        let end = first.get(tag as usize + 1).map_or(plan.ops.len(), |next| *next as usize);
        plan.ops.get(start..end).unwrap_or_default()
    }

    /// Whether two tags lead to the same receivers.
    fn are_alike(&self, a: u32, b: u32) -> bool {
        let to = |op: &Op| op.to;
        self.released(a).iter().map(to).eq(self.released(b).iter().map(to))
    }

    /// With its new tags.
    fn bundled(self, nic: &Nic) -> (RelayPlan, Vec<Cost>) {
        if self.bundles.is_empty() {
            let costs = self.plan.plan.ops.iter().map(|op| Cost::of(op, nic).of_one()).collect();
            return (self.plan, costs);
        }
        let mut relay = RelayPlan::default();
        let mut costs = Vec::new();
        for &(tag, bytes, writes) in &self.bundles {
            relay.first.push(relay.plan.ops.len() as u32);
            relay.awaited.push(1);
            for op in self.released(tag) {
                let op = as_one(op, bytes);
                costs.push(Cost { writes, wire_bytes: nic.wire_bytes(bytes), kernel_bytes: 0 });
                relay.plan.bytes += bytes;
                relay.plan.writes += 1;
                relay.plan.ops.push(op);
                relay.plan.tags.push(NO_TAG);
            }
        }
        (relay, costs)
    }
}

/// A bundle that may grow: its place, and the tag that it began with.
#[derive(Clone, Copy)]
struct Open {
    place: usize,
    tag: u32,
}

/// Bundles one trainer's operations: together go those to the same receiver over the same rail, that are staged or not alike, and
/// passed on alike.
struct Bundler<'n> {
    bytes_max: u64,
    nic: &'n Nic,
    /// Whether what is passed on stays as it is.
    chained: bool,
    /// By receiver, rail, and whether it is staged and passed on.
    open: Vec<Option<Open>>,
}

/// Rails that are told apart.
const RAILS: usize = 16;

impl Bundler<'_> {
    fn bundle(mut self, plan: RankPlan, relays: &mut [Relay]) -> (RankPlan, Vec<Cost>) {
        let RankPlan { ops, bytes, tags, .. } = plan;
        let mut bundled = RankPlan { bytes, ..RankPlan::default() };
        let mut costs: Vec<Cost> = Vec::new();
        for (at, op) in ops.iter().enumerate() {
            let tag = tags.get(at).copied().unwrap_or(NO_TAG);
            if tag != NO_TAG && self.chained {
                bundled.ops.push(*op);
                bundled.tags.push(tag);
                costs.push(Cost::of(op, self.nic).of_one());
                continue;
            }
            let relay = relays.get_mut(op.to.index()).filter(|_| tag != NO_TAG);
            let alike = |other| relay.as_ref().is_none_or(|relay| relay.are_alike(tag, other));
            let cost = Cost::of(op, self.nic);
            let place = self.place(op, tag != NO_TAG);
            if let Some(Some(open)) = self.open.get(place)
                && alike(open.tag)
                && let (Some(known), Some(sum)) = (bundled.ops.get_mut(open.place), costs.get_mut(open.place))
                && known.bytes() + op.bytes() <= self.bytes_max
            {
                known.row_bytes += op.bytes() as u32;
                sum.add(cost);
                if let (Some(relay), Some(tag)) = (relay, bundled.tags.get(open.place))
                    && let Some((_, bytes, writes)) = relay.bundles.get_mut(*tag as usize)
                {
                    (*bytes, *writes) = (*bytes + op.bytes(), *writes + cost.writes);
                }
                continue;
            }
            if let Some(open) = self.open.get_mut(place) {
                *open = Some(Open { place: bundled.ops.len(), tag });
            }
            let tag = relay.map_or(NO_TAG, |relay| {
                relay.bundles.push((tag, op.bytes(), cost.writes));
                relay.bundles.len() as u32 - 1
            });
            bundled.ops.push(as_one(op, op.bytes()));
            if !tags.is_empty() {
                bundled.tags.push(tag);
            }
            costs.push(cost);
        }
        bundled.ops.shrink_to_fit();
        bundled.writes = bundled.ops.iter().map(Op::writes).sum();
        (bundled, costs)
    }

    fn place(&mut self, op: &Op, is_passed_on: bool) -> usize {
        let kind = usize::from(op.staged_bytes() > 0) * 2 + usize::from(is_passed_on);
        let place = (op.to.index() * RAILS + usize::from(op.rail) % RAILS) * 4 + kind;
        if self.open.len() <= place {
            self.open.resize(place + 1, None);
        }
        place
    }
}

/// An operation of so many bytes, staged or not, and without a place: nothing looks at what is written.
fn as_one(op: &Op, bytes: u64) -> Op {
    let place = Strided { region: RegionIndex(0), offset: 0, stride: bytes };
    // Any transform that is staged as it is long: what the kernel moves is known.
    let staged = Transform::Quantize { from: DType::BF16, quant: BlockQuant::default() };
    let transform = if op.staged_bytes() > 0 { staged } else { Transform::Copy };
    let (source, destination) = (place, place);
    Op { row_bytes: bytes as u32, rows: 1, source, destination, gather: false, transform, ..*op }
}

#[cfg(test)]
mod tests {
    use xfer_plan::{ParamId, ReceiverRank};

    use super::*;
    use crate::cluster::Preset;

    fn op(to: u32, bytes: u32) -> Op {
        let place = Strided { region: RegionIndex(0), offset: 0, stride: bytes.into() };
        Op {
            to: ReceiverRank(to),
            param: ParamId(0),
            row_bytes: bytes,
            rows: 1,
            source: place,
            destination: place,
            gather: false,
            transform: Transform::Copy,
            rail: 0,
            wave: 0,
        }
    }

    fn plan(ops: Vec<Op>, tags: Vec<u32>) -> RankPlan {
        let (bytes, writes) = (ops.iter().map(Op::bytes).sum(), ops.iter().map(Op::writes).sum());
        RankPlan { ops, bytes, writes, tags }
    }

    /// Receiver 0 passes two operations on to 1 and 2, and a third to 1 alone: that is no part of their bundle.
    #[test]
    fn what_is_passed_on_alike_is_bundled_and_every_byte_stays() {
        let trainer =
            plan((0..5).map(|at| op(u32::from(at == 4), 10)).collect(), vec![0, 1, 2, NO_TAG, NO_TAG]);
        let relayed = plan([1, 2, 1, 2, 1].map(|to| op(to, 10)).into(), vec![NO_TAG; 5]);
        let (part, names) = (Default::default(), std::collections::BTreeMap::new);
        let relay = RelayPlan { plan: relayed, first: vec![0, 2, 4], awaited: vec![1; 3] };
        let mut parts = [
            PlannedPart::Trainer { plan: trainer, names: names() },
            PlannedPart::Inference { part, relay, names: names() },
        ];
        let nic = Preset::P5.cluster(1, 1).nic;
        let costs = bundle_all(&mut parts, 100, &nic);
        let [PlannedPart::Trainer { plan, .. }, PlannedPart::Inference { relay, .. }] = &parts else {
            panic!("{parts:?}")
        };
        let bytes = |plan: &RankPlan| plan.ops.iter().map(|op| (op.to.0, op.bytes())).collect::<Vec<_>>();
        assert_eq!(bytes(plan), [(0, 20), (0, 10), (0, 10), (1, 10)]);
        assert_eq!(plan.tags, [0, 1, NO_TAG, NO_TAG]);
        assert_eq!(bytes(&relay.plan), [(1, 20), (2, 20), (1, 10)]);
        assert_eq!((&relay.first[..], &relay.awaited[..], relay.plan.bytes), (&[0, 2][..], &[1, 1][..], 50));
        // What goes over the wire is what single operations take.
        let of_trainer: u64 = costs[0].iter().map(|cost| cost.wire_bytes).sum();
        assert_eq!(of_trainer, 5 * nic.wire_bytes(10));
        assert_eq!(costs[0].iter().map(|cost| cost.writes).collect::<Vec<_>>(), [2, 1, 1, 1]);
    }
}
