//! Cutting and ordering: from a trainer's transfers to its operations.
//!
//! Nothing is rounded: the last operation of a transfer takes what is left. The order is a queue per receiver, in it
//! low priorities first and among equals long operations before short ones, and then one from each queue in turn.
//! Trainers start at different receivers, so that at any moment they feed different ones.

use std::collections::BTreeMap;

use smallvec::SmallVec;

use crate::error::PlanError;
use crate::ids::{GroupIndex, ParamId, ReceiverRank, RegionIndex, TrainerRank};
use crate::limits::OPS_MAX;
use crate::manifest::{Manifest, PlanOptions};
use crate::plan::{Op, Placed, Plan, RankPlan, Strided, Transfer};
use crate::transform::Transform;

impl Plan {
    /// What `trainer` does, in order: its transfers, cut into operations, to every receiver that it writes to itself. Without
    /// tags: what receivers pass on is in [`Plan::parts`].
    ///
    /// # Errors
    /// When there are more than [`OPS_MAX`] operations.
    pub fn part(&self, trainer: TrainerRank, manifest: &Manifest) -> Result<RankPlan, PlanError> {
        let part = self.trainers.get(trainer.index()).copied().unwrap_or_default();
        let ops = self.routed(trainer, manifest)?.into_iter().map(|routed| routed.op).collect();
        Ok(RankPlan { ops, bytes: part.bytes, writes: part.writes, tags: Vec::new() })
    }

    /// The operations of one trainer, in order, and which way each takes.
    pub(crate) fn routed(&self, trainer: TrainerRank, manifest: &Manifest) -> Result<Vec<Routed>, PlanError> {
        let options = &manifest.options;
        let rails = manifest.trainers.get(trainer.index()).map_or(1, |declared| declared.rails.len());
        let mut rails = Rails::new(trainer, rails);
        let mut ops = Vec::new();
        for Placed { fill, to: group_index, param, lane, transfer, .. } in self.transfers_of(trainer) {
            let mut transfer = *transfer;
            if let Transform::Scales { .. } = transfer.transform
                && let Some(&table) =
                    self.fills.get(fill).and_then(|fill| fill.tables.get(transfer.source.region.index()))
            {
                transfer.source.region = RegionIndex(table);
            }
            let cut = Cut::new(&transfer, options);
            let Some(group) = self.group(group_index) else { continue };
            let count = cut.ops(&transfer).saturating_mul(group.copies() as u64);
            if count.saturating_add(ops.len() as u64) > OPS_MAX as u64 {
                return Err(PlanError::TooManyOps { max: OPS_MAX });
            }
            let dealt = rails.deal((group_index, lane), &Pieces::new(&transfer, options));
            let way = (group_index, lane);
            for (place, to) in group.entries(lane).enumerate() {
                cut.append(&transfer, (to, param, way), |operation| dealt.rail(place, operation), &mut ops);
            }
        }
        let receivers = self.receivers.len();
        let first = trainer.index() * receivers / self.trainers.len().max(1);
        Ok(in_waves(self.interleave(&ops, ReceiverRank(first as u32)), options.watermark_bytes))
    }

    fn interleave(&self, ops: &[Routed], start: ReceiverRank) -> Vec<Routed> {
        // By place too, as the input is in the order of transfers: equals stay in the order of their addresses. Places are
        // sorted and not operations, which are ten times as long.
        let key = |(place, Routed { op, .. }): (u32, &Routed)| {
            (op.to, self.priority(op.param), std::cmp::Reverse(op.bytes()), place)
        };
        let mut keys: Vec<_> = (0..).zip(ops).map(key).collect();
        keys.sort_unstable();
        let mut queues: Vec<&[_]> = keys.chunk_by(|a, b| a.0 == b.0).collect();
        let mut ordered = Vec::with_capacity(ops.len());
        let first = queues.partition_point(|queue| queue.first().is_some_and(|first| first.0 < start));
        queues.rotate_left(first);
        while !queues.is_empty() {
            queues.retain_mut(|queue| {
                if let Some(((.., place), rest)) = queue.split_first() {
                    ordered.extend(ops.get(*place as usize));
                    *queue = rest;
                }
                !queue.is_empty()
            });
        }
        ordered
    }
}

/// An operation of a trainer and the way that it takes, which says who passes it on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Routed {
    /// The operation.
    pub op: Op,
    /// Its way.
    pub way: Way,
}

/// Numbers the waves: as many operations as fit under the watermark, in order.
fn in_waves(mut ops: Vec<Routed>, watermark_bytes: u64) -> Vec<Routed> {
    let (mut wave, mut staged) = (0u32, 0u64);
    for Routed { op, .. } in &mut ops {
        let bytes = op.staged_bytes();
        if staged > 0 && staged.saturating_add(bytes) > watermark_bytes {
            wave = wave.saturating_add(1);
            staged = 0;
        }
        staged = staged.saturating_add(bytes);
        op.wave = wave;
    }
    ops
}

/// A group and one of its lanes: transfers of one trainer with the same one take the same way.
pub type Way = (GroupIndex, u16);

/// Bytes by rail. Machines have 1 to 8 a GPU.
pub(crate) type ByRail = SmallVec<[u64; 8]>;

/// Deals the operations of a trainer to its rails. Within a transfer neighbours go to different rails, and so do the copies
/// for different receivers; a transfer begins at the rail that has the fewest bytes of its way so far. So both ends of
/// every way have their rails evenly loaded, to within an operation, and what is over lands on another rail for every
/// trainer and way.
pub(crate) struct Rails {
    trainer: usize,
    rails: usize,
    bytes: BTreeMap<Way, ByRail>,
}

impl Rails {
    pub(crate) fn new(trainer: TrainerRank, rails: usize) -> Rails {
        Rails { trainer: trainer.index(), rails: rails.max(1), bytes: BTreeMap::new() }
    }

    /// Deals a transfer.
    pub(crate) fn deal(&mut self, way: Way, pieces: &Pieces) -> Dealt {
        let rails = self.rails;
        let bytes = self.bytes.entry(way).or_insert_with(|| ByRail::from_elem(0, rails));
        let offset = self.trainer + way.0.index() + usize::from(way.1);
        let in_turn = (0..rails).map(|rail| (rail + offset) % rails);
        let first = in_turn.min_by_key(|&rail| bytes.get(rail)).unwrap_or(0) as u64;
        pieces.deal(first, bytes);
        Dealt { first, rails: rails as u64 }
    }

    /// What each way has on each rail, for the first receiver that the trainer writes to.
    pub(crate) fn into_bytes(self) -> BTreeMap<Way, ByRail> {
        self.bytes
    }
}

/// A transfer that has been dealt to rails.
#[derive(Clone, Copy)]
pub(crate) struct Dealt {
    first: u64,
    rails: u64,
}

impl Dealt {
    /// The rail of an operation, by its number, to the receiver at this place of the group.
    pub(crate) fn rail(self, place: usize, operation: u64) -> u8 {
        ((self.first + place as u64 + operation) % self.rails) as u8
    }
}

/// The operations of one transfer to one receiver, not listed but counted. `Cut` decides how many there are; their sizes
/// follow from its rule: whole rows together, or, where not even one row fits, each row in parts.
pub(crate) struct Pieces {
    pub(crate) count: u64,
    pub(crate) bytes: u64,
    pub(crate) staged_bytes: u64,
    /// Of an operation that is not the last one of its run.
    full_bytes: u64,
    /// Of the last one of a run.
    last_bytes: u64,
    /// Operations of a run: of a row that is cut into parts, and else of the whole transfer.
    run: u64,
}

impl Pieces {
    pub(crate) fn new(transfer: &Transfer, options: &PlanOptions) -> Pieces {
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

/// How a transfer is cut: into groups of whole rows, or, where not even one row fits, rows into parts.
pub(crate) struct Cut {
    /// Whether several rows of a copy are gathered.
    pub(crate) gather: bool,
    /// Whether several rows leave as one WRITE.
    joined: bool,
    rows_max: u64,
    /// No operation is longer, in bytes.
    pub(crate) part_bytes_max: u64,
}

impl Cut {
    pub(crate) fn new(transfer: &Transfer, options: &PlanOptions) -> Cut {
        let transform = transfer.transform;
        let row_bytes = transfer.row_bytes;
        let staging_bytes_max = options.chunk_bytes_max.min(options.gather_chunk_bytes_max);
        let contiguous = transfer.destination.stride == row_bytes;
        let gather = transform.is_copy()
            && transfer.rows > 1
            && contiguous
            && row_bytes < options.gather_row_bytes_max
            && row_bytes <= staging_bytes_max / 2;
        let staged = gather || !transform.is_copy();
        let bytes_max = if staged { staging_bytes_max } else { options.chunk_bytes_max };
        let rows_max = (bytes_max / row_bytes.max(1)).max(1);
        Cut { gather, joined: staged && contiguous, rows_max, part_bytes_max: bytes_max.max(1) }
    }

    /// Number of operations for one receiver.
    pub(crate) fn ops(&self, transfer: &Transfer) -> u64 {
        let parts = transfer.row_bytes.div_ceil(self.part_bytes_max);
        u64::from(transfer.rows).div_ceil(self.rows_max).saturating_mul(parts)
    }

    /// Number of WRITEs for one receiver.
    pub(crate) fn writes(&self, transfer: &Transfer) -> u64 {
        if self.joined || self.rows_max == 1 {
            return self.ops(transfer);
        }
        u64::from(transfer.rows)
    }

    fn append(
        &self,
        transfer: &Transfer,
        (to, param, way): (ReceiverRank, ParamId, Way),
        rail: impl Fn(u64) -> u8,
        ops: &mut Vec<Routed>,
    ) {
        let transform = transfer.transform;
        let (mut row, mut number) = (0, 0);
        let total = u64::from(transfer.rows);
        while row < total {
            let rows = self.rows_max.min(total - row);
            let mut start = 0;
            while start < transfer.row_bytes {
                let bytes = self.part_bytes_max.min(transfer.row_bytes - start);
                let side = |side: Strided, start: u64, bytes: u64| Strided {
                    region: side.region,
                    offset: side.offset + row * side.stride + start,
                    // A single row has no next one; its stride is its length, so that equal operations are
                    // equal.
                    stride: if rows == 1 { bytes } else { side.stride },
                };
                let op = Op {
                    to,
                    param,
                    // Both are at most CHUNK_BYTES_MAX, which fits 32 bits.
                    row_bytes: bytes as u32,
                    rows: rows as u32,
                    source: side(
                        transfer.source,
                        transform.source_bytes(start),
                        transform.source_bytes(bytes),
                    ),
                    destination: side(transfer.destination, start, bytes),
                    gather: self.gather && rows > 1,
                    transform,
                    rail: rail(number),
                    wave: 0,
                };
                ops.push(Routed { op, way });
                start += bytes;
                number += 1;
            }
            row += rows;
        }
    }
}
