//! Sums over transfers: everything that a report needs of them, found in one pass over each trainer's list.
//!
//! Operations are never listed: how many bytes a transfer puts on which NIC follows from how it is cut.

use std::collections::BTreeMap;

use smallvec::SmallVec;

use crate::cut::Cut;
use crate::ids::GroupIndex;
use crate::manifest::{Manifest, PlanOptions};
use crate::plan::{Placed, Plan, Transfer};

/// A group and one of its lanes: transfers of one trainer with the same one take the same way.
pub(crate) type Way = (GroupIndex, u16);

/// Bytes by rail. Machines have 1 to 8 a GPU.
pub(crate) type ByRail = SmallVec<[u64; 8]>;

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
        // Where the dealing to rails stands, by trainer.
        let mut turns = vec![0; trainers];
        for Placed { to, lane, transfer, .. } in plan.transfers() {
            let trainer = transfer.trainer.index();
            let rails = manifest.trainers.get(trainer).map_or(1, |trainer| trainer.rails.len().max(1));
            let (Some(ways), Some(turn)) = (sums.ways.get_mut(trainer), turns.get_mut(trainer)) else {
                continue;
            };
            let pieces = Pieces::new(transfer, &manifest.options);
            let way = ways.entry((to, lane)).or_default();
            way.bytes = way.bytes.saturating_add(pieces.bytes);
            way.transfers += 1;
            way.by_rail.resize(rails, 0);
            pieces.deal(*turn, &mut way.by_rail);
            *turn = (*turn + pieces.count) % rails as u64;
            if let Some(staged) = sums.staged_bytes.get_mut(trainer) {
                let copies = copies.get(to.index()).copied().unwrap_or(0);
                *staged = staged.saturating_add(pieces.staged_bytes.saturating_mul(copies));
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

/// The operations of one transfer to one receiver, not listed but counted. `Cut` decides how many there are; their sizes
/// follow from its rule: whole rows together, or, where not even one row fits, each row in parts.
struct Pieces {
    count: u64,
    bytes: u64,
    staged_bytes: u64,
    /// Of an operation that is not the last one of its run.
    full_bytes: u64,
    /// Of the last one of a run.
    last_bytes: u64,
    /// Operations of a run: of a row that is cut into parts, and else of the whole transfer.
    run: u64,
}

impl Pieces {
    fn new(transfer: &Transfer, options: &PlanOptions) -> Pieces {
        let row_bytes = transfer.row_bytes;
        let cut = Cut::new(transfer, options);
        let (count, bytes) = (cut.ops(transfer), transfer.bytes());
        let staged = cut.gather || !transfer.transform.is_copy();
        let bytes_max = cut.part_bytes_max;
        let (full_bytes, run, run_bytes) = match bytes_max / row_bytes.max(1) {
            0 => (bytes_max, row_bytes.div_ceil(bytes_max), row_bytes),
            rows_together => (row_bytes.saturating_mul(rows_together), count, bytes),
        };
        let last_bytes = run_bytes.saturating_sub(full_bytes.saturating_mul(run.saturating_sub(1)));
        // A single row is written from where it is.
        let unstaged_bytes = if cut.gather && last_bytes == row_bytes { row_bytes } else { 0 };
        let staged_bytes = if staged { bytes.saturating_sub(unstaged_bytes) } else { 0 };
        Pieces { count, bytes, staged_bytes, full_bytes, last_bytes, run: run.max(1) }
    }

    /// Adds the bytes of operation `i` to rail `turn + i`, modulo the rails.
    fn deal(&self, turn: u64, by_rail: &mut [u64]) {
        let rails = by_rail.len() as u64;
        let mut add = |operation: u64, bytes: u64| {
            let rail = ((turn + operation) % rails) as usize;
            if let Some(sum) = by_rail.get_mut(rail) {
                *sum = sum.saturating_add(bytes);
            }
        };
        // How many of `count` numbers are `first`, `first + rails`, ...
        let every = |count: u64, first: u64| count.saturating_sub(first).div_ceil(rails);
        let runs = self.count / self.run;
        // Runs end at rails that come round again after as many runs as there are rails.
        for number in 0..runs.min(rails) {
            let last = (number % rails) * (self.run % rails) + (self.run - 1) % rails;
            let again = every(runs, number);
            add(last, again.saturating_mul(self.last_bytes));
            for step in 0..(self.run - 1).min(rails) {
                let first = (number % rails) * (self.run % rails) + step;
                let again = again.saturating_mul(every(self.run - 1, step));
                add(first, again.saturating_mul(self.full_bytes));
            }
        }
    }
}
