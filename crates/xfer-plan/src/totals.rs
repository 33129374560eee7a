//! Totals: what every rank moves, added up over transfers and routes.

use std::collections::BTreeMap;

use crate::cut::Cut;
use crate::ids::{GroupIndex, Rank, ReceiverRank, TrainerRank};
use crate::manifest::PlanOptions;
use crate::plan::{Arrival, Placed, Plan, ReceiverPart, Transfer};
use crate::route::{Link, Loads, ReceiverLoad, TrainerLoad};
use crate::transform::Transform;

/// See the module.
pub(crate) struct Totals {
    pub(crate) loads: Loads,
    pub(crate) receivers: Vec<ReceiverPart>,
}

#[derive(Clone, Copy, Default)]
struct Sum {
    bytes: u64,
    ops: u64,
    writes: u64,
}

impl Sum {
    fn add(&mut self, other: Sum) {
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.ops = self.ops.saturating_add(other.ops);
        self.writes = self.writes.saturating_add(other.writes);
    }
}

/// What a transfer reads to transform it, and what it sends as it lies in memory. Scales are of elements that are sent too.
pub(crate) fn reads(transfer: &Transfer) -> (u64, u64) {
    let (bytes, transform) = (transfer.bytes(), transfer.transform);
    let read = if transform.is_copy() { 0 } else { transform.read_bytes(bytes) };
    let source = if let Transform::Scales { .. } = transform { 0 } else { transform.source_bytes(bytes) };
    (read, source)
}

impl Plan {
    /// What every rank moves in a push.
    pub fn loads(&self, options: &PlanOptions) -> Loads {
        self.totals(options, self.receivers.len()).loads
    }

    pub(crate) fn totals(&self, options: &PlanOptions, receivers: usize) -> Totals {
        let mut loads = Loads {
            trainers: vec![TrainerLoad::default(); self.trainers.len()],
            receivers: vec![ReceiverLoad::default(); receivers],
            nic_hops_max: 0,
        };
        let mut arrivals: Vec<BTreeMap<Rank, Sum>> = vec![BTreeMap::new(); receivers];
        // First by route: there are few, and many transfers.
        let mut by_route: Vec<BTreeMap<(GroupIndex, u16), Sum>> = vec![BTreeMap::new(); self.trainers.len()];
        let mut last: Option<(TrainerRank, (GroupIndex, u16), Sum)> = None;
        let mut flush = |last: Option<(TrainerRank, (GroupIndex, u16), Sum)>| {
            if let Some((trainer, route, sum)) = last
                && let Some(routes) = by_route.get_mut(trainer.index())
            {
                routes.entry(route).or_default().add(sum);
            }
        };
        let mut known_cut = None;
        for Placed { to, lane, transfer, .. } in self.transfers() {
            // Neighbours are cut alike, as a rule: the divisions are worth remembering.
            let contiguous = transfer.destination.stride == transfer.row_bytes;
            let alike = (transfer.rows, transfer.row_bytes, contiguous, transfer.transform);
            if known_cut.is_none_or(|(known, _)| known != alike) {
                let cut = Cut::new(transfer, options);
                known_cut = Some((alike, (cut.ops(transfer), cut.writes(transfer))));
            }
            let (ops, writes) = known_cut.map(|(_, counts)| counts).unwrap_or_default();
            let (bytes, trainer) = (transfer.bytes(), transfer.trainer);
            if let Some(load) = loads.trainers.get_mut(trainer.index()) {
                let (read, source) = reads(transfer);
                load.transform_bytes = load.transform_bytes.saturating_add(read);
                load.source_bytes = load.source_bytes.saturating_add(source);
            }
            let (route, sum) = ((to, lane), Sum { bytes, ops, writes });
            match &mut last {
                Some((known, on, total)) if (*known, *on) == (trainer, route) => total.add(sum),
                _ => flush(last.replace((trainer, route, sum))),
            }
        }
        flush(last);
        for (trainer, routes) in (0..).map(TrainerRank).zip(by_route) {
            for ((group, lane), sum) in routes {
                self.add_route(trainer, group, lane, sum, &mut loads, &mut arrivals);
            }
        }
        let receivers = arrivals.into_iter().map(|by_rank| {
            let arrivals: Vec<Arrival> = by_rank
                .into_iter()
                .map(|(from, Sum { bytes, writes, .. })| Arrival { from, bytes, writes })
                .collect();
            let sum = |of: fn(&Arrival) -> u64| arrivals.iter().map(of).fold(0, u64::saturating_add);
            ReceiverPart { bytes: sum(|a| a.bytes), writes: sum(|a| a.writes), arrivals }
        });
        Totals { receivers: receivers.collect(), loads }
    }

    fn add_route(
        &self,
        trainer: TrainerRank,
        group: GroupIndex,
        lane: u16,
        sum: Sum,
        loads: &mut Loads,
        arrivals: &mut [BTreeMap<Rank, Sum>],
    ) {
        let Some(group) = self.group(group) else { return };
        let mut hops: BTreeMap<ReceiverRank, u64> = BTreeMap::new();
        for leg in group.legs(trainer, lane) {
            let Some(arrived) = arrivals.get_mut(leg.to.index()) else { continue };
            arrived.entry(leg.from).or_default().add(sum);
            let before = match leg.from {
                Rank::Trainer(_) => 0,
                Rank::Receiver(from) => hops.get(&from).copied().unwrap_or(0),
            };
            let count = before + u64::from(leg.link == Link::Nic);
            hops.insert(leg.to, count);
            loads.nic_hops_max = loads.nic_hops_max.max(count);
            let add = |total: &mut u64| *total = total.saturating_add(sum.bytes);
            match (leg.from, leg.link) {
                (Rank::Trainer(from), _) => {
                    if let Some(load) = loads.trainers.get_mut(from.index()) {
                        add(&mut load.nic_out_bytes);
                        load.ops = load.ops.saturating_add(sum.ops);
                        load.writes = load.writes.saturating_add(sum.writes);
                    }
                }
                (Rank::Receiver(from), link) => {
                    if let Some(load) = loads.receivers.get_mut(from.index()) {
                        add(if link == Link::Nic {
                            &mut load.nic_out_bytes
                        } else {
                            &mut load.nvlink_out_bytes
                        });
                    }
                }
            }
            if let Some(load) = loads.receivers.get_mut(leg.to.index()) {
                add(if leg.link == Link::Nic { &mut load.nic_in_bytes } else { &mut load.nvlink_in_bytes });
            }
        }
    }
}
