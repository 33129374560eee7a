//! Flows: who sends how much to whom, and by which routes.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use serde::Serialize;

use super::sums::Sums;
use crate::ids::{Rank, TrainerRank};
use crate::plan::Plan;
use crate::route::{Link, Route};

/// Groups of one kind, and what takes their route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RouteUse {
    /// The route.
    pub route: Route,
    /// Members of each group.
    pub members: u64,
    /// Hosts that these are on.
    pub hosts: u64,
    /// Groups of this kind.
    pub groups: u64,
    /// Copies that a trainer writes.
    pub copies: u64,
    /// Transfers to them.
    pub transfers: u64,
    /// Bytes for one member of each, together.
    pub bytes: u64,
}

/// Bytes by sender and receiver. Where a side has more than 128 ranks, neighbours share a cell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Flows {
    /// Trainers of one cell.
    pub trainers_per_cell: u64,
    /// Receivers of one cell.
    pub receivers_per_cell: u64,
    /// What trainers write over NICs: a row per cell of trainers, a column per cell of receivers.
    pub from_trainers: Vec<Vec<u64>>,
    /// What receivers pass on over NICs, a row per cell of those that send; empty where none does.
    pub over_nics: Vec<Vec<u64>>,
    /// The same over NVLink.
    pub over_nvlink: Vec<Vec<u64>>,
}

/// Cells of a side.
const CELLS_MAX: usize = 128;

/// Bytes by sender and receiver, each numbered in cells.
struct Matrix {
    cells: Vec<Vec<u64>>,
    per_row: usize,
    per_column: usize,
    used: bool,
}

impl Matrix {
    fn new(senders: usize, receivers: usize) -> Matrix {
        let per_cell = |ranks: usize| ranks.div_ceil(CELLS_MAX).max(1);
        let (per_row, per_column) = (per_cell(senders), per_cell(receivers));
        let cells = vec![vec![0; receivers.div_ceil(per_column)]; senders.div_ceil(per_row)];
        Matrix { cells, per_row, per_column, used: false }
    }

    fn add(&mut self, from: usize, to: usize, bytes: u64) {
        let row = self.cells.get_mut(from / self.per_row);
        if let Some(cell) = row.and_then(|row| row.get_mut(to / self.per_column)) {
            *cell = cell.saturating_add(bytes);
            self.used = true;
        }
    }

    fn cells_if_used(self) -> Vec<Vec<u64>> {
        if self.used { self.cells } else { Vec::new() }
    }
}

impl Flows {
    pub(super) fn new(plan: &Plan, sums: &Sums) -> Flows {
        let receivers = plan.receivers.len();
        let mut direct = Matrix::new(plan.trainers.len(), receivers);
        let [mut over_nics, mut over_nvlink] = [(); 2].map(|()| Matrix::new(receivers, receivers));
        for (trainer, ways) in sums.ways.iter().enumerate() {
            for (&(group, lane), on_way) in ways {
                for to in plan.group(group).into_iter().flat_map(|group| group.entries(lane)) {
                    direct.add(trainer, to.index(), on_way.bytes);
                }
            }
        }
        // Behind the first receiver, only the sum of all trainers matters.
        for ((group, lane), on_way) in sums.by_way() {
            for leg in plan.group(group).into_iter().flat_map(|group| group.legs(TrainerRank(0), lane)) {
                let Rank::Receiver(from) = leg.from else { continue };
                let matrix = if leg.link == Link::Nic { &mut over_nics } else { &mut over_nvlink };
                matrix.add(from.index(), leg.to.index(), on_way.bytes);
            }
        }
        Flows {
            trainers_per_cell: direct.per_row as u64,
            receivers_per_cell: direct.per_column as u64,
            from_trainers: direct.cells,
            over_nics: over_nics.cells_if_used(),
            over_nvlink: over_nvlink.cells_if_used(),
        }
    }
}

pub(super) fn routes(plan: &Plan, sums: &Sums) -> Vec<RouteUse> {
    let mut transfers = vec![(0, 0u64); plan.groups.len()];
    for ((group, _), on_way) in sums.by_way() {
        if let Some((transfers, bytes)) = transfers.get_mut(group.index()) {
            *transfers += on_way.transfers;
            *bytes = bytes.saturating_add(on_way.bytes);
        }
    }
    let mut kinds: BTreeMap<(Route, u64, u64), RouteUse> = BTreeMap::new();
    for (group, (transfers, bytes)) in plan.groups.iter().zip(transfers) {
        let (route, members, hosts) = (group.route, group.len() as u64, group.hosts.len() as u64);
        let copies = group.copies() as u64;
        let none = RouteUse { route, members, hosts, groups: 0, copies, transfers: 0, bytes: 0 };
        let kind = kinds.entry((route, members, hosts)).or_insert(none);
        kind.groups += 1;
        kind.transfers += transfers;
        kind.bytes = kind.bytes.saturating_add(bytes);
    }
    let mut kinds: Vec<RouteUse> = kinds.into_values().collect();
    kinds.sort_by_key(|kind| Reverse(kind.bytes)); // stable: equals stay in the order of their kind
    kinds
}
