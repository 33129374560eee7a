//! Cutting and ordering: from a trainer's transfers to its operations.
//!
//! Nothing is rounded: the last operation of a transfer takes what is left. The order is a queue per receiver, in it
//! low priorities first and among equals long operations before short ones, and then one from each queue in turn.
//! Trainers start at different receivers, so that at any moment they feed different ones.

use crate::error::PlanError;
use crate::ids::{ParamId, ReceiverRank, RegionIndex, TrainerRank};
use crate::limits::OPS_MAX;
use crate::manifest::{Manifest, PlanOptions};
use crate::plan::{Op, Placed, Plan, RankPlan, Strided, Transfer};
use crate::transform::Transform;

impl Plan {
    /// What `trainer` does, in order: its transfers, cut into operations, to every receiver that it writes to itself.
    /// Where a group has a route over receivers, these pass on as [`Group::legs`](crate::Group::legs) says.
    ///
    /// # Errors
    /// When there are more than [`OPS_MAX`] operations.
    pub fn part(&self, trainer: TrainerRank, manifest: &Manifest) -> Result<RankPlan, PlanError> {
        let Some(part) = self.trainers.get(trainer.index()) else { return Ok(RankPlan::default()) };
        let options = &manifest.options;
        let rails = manifest.trainers.get(trainer.index()).map_or(1, |declared| declared.rails.len());
        let mut rails = Rails::new(rails);
        let mut ops = Vec::new();
        for Placed { fill, to, param, lane, transfer, .. } in self.transfers_of(trainer) {
            let mut transfer = *transfer;
            if let Transform::Scales { .. } = transfer.transform
                && let Some(&table) =
                    self.fills.get(fill).and_then(|fill| fill.tables.get(transfer.source.region.index()))
            {
                transfer.source.region = RegionIndex(table);
            }
            let cut = Cut::new(&transfer, options);
            let Some(group) = self.group(to) else { continue };
            let count = cut.ops(&transfer).saturating_mul(group.copies() as u64);
            if count.saturating_add(ops.len() as u64) > OPS_MAX as u64 {
                return Err(PlanError::TooManyOps { max: OPS_MAX });
            }
            for (place, to) in group.entries(lane).enumerate() {
                cut.append(&transfer, (to, param), rails.of(place), &mut ops);
            }
            rails.pass(cut.ops(&transfer));
        }
        let receivers = self.receivers.len();
        let first = trainer.index() * receivers / self.trainers.len().max(1);
        let ops = self.interleave(ops, ReceiverRank(first as u32));
        Ok(RankPlan { ops: in_waves(ops, options.watermark_bytes), bytes: part.bytes, writes: part.writes })
    }

    fn interleave(&self, mut ops: Vec<Op>, start: ReceiverRank) -> Vec<Op> {
        // Stable, and the input is in the order of transfers: equals stay in the order of their addresses.
        ops.sort_by_key(|op| (op.to, self.priority(op.param), std::cmp::Reverse(op.bytes())));
        let mut queues: Vec<&[Op]> = ops.chunk_by(|a, b| a.to == b.to).collect();
        let mut ordered = Vec::with_capacity(ops.len());
        let first = queues.partition_point(|queue| queue.first().is_some_and(|op| op.to < start));
        queues.rotate_left(first);
        while !queues.is_empty() {
            queues.retain_mut(|queue| {
                if let Some((op, rest)) = queue.split_first() {
                    ordered.push(*op);
                    *queue = rest;
                }
                !queue.is_empty()
            });
        }
        ordered
    }
}

/// Numbers the waves: as many operations as fit under the watermark, in order.
fn in_waves(mut ops: Vec<Op>, watermark_bytes: u64) -> Vec<Op> {
    let (mut wave, mut staged) = (0u32, 0u64);
    for op in &mut ops {
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

/// Deals operations to the rails of a trainer: neighbours go to different rails, and so do the copies for different receivers.
pub(crate) struct Rails {
    rails: u64,
    turn: u64,
}

impl Rails {
    pub(crate) fn new(rails: usize) -> Rails {
        Rails { rails: rails.max(1) as u64, turn: 0 }
    }

    /// The rail of operation number `op` of the present transfer, to the receiver at this place of the group.
    pub(crate) fn of(&self, place: usize) -> impl Fn(u64) -> u8 + use<> {
        let (rails, first) = (self.rails, self.turn + place as u64);
        move |op| ((first + op) % rails) as u8
    }

    /// Goes on to the next transfer.
    pub(crate) fn pass(&mut self, ops: u64) {
        self.turn = (self.turn + ops) % self.rails;
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
        (to, param): (ReceiverRank, ParamId),
        rail: impl Fn(u64) -> u8,
        ops: &mut Vec<Op>,
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
                ops.push(Op {
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
                });
                start += bytes;
                number += 1;
            }
            row += rows;
        }
    }
}
