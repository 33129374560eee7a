//! Cutting: from one trainer's segments to its operations.
//!
//! Nothing is rounded: the last operation of a segment takes what is left. How many operations there will be
//! is known before the first is made, so that a plan that would be too large costs no memory.

use crate::error::PlanError;
use crate::intersect::Segment;
use crate::limits::OPS_MAX;
use crate::manifest::PlanOptions;
use crate::plan::{Op, Strided};

/// Joins and cuts the segments of one trainer. `ops_left` is what the limit of the plan leaves for it and
/// those after.
pub(crate) fn operations(
    segments: Vec<Segment>,
    options: &PlanOptions,
    ops_left: &mut usize,
) -> Result<Vec<Op>, PlanError> {
    let segments = coalesce(segments);
    let count = segments.iter().fold(0u64, |sum, s| sum.saturating_add(Cut::new(s, options).ops(s)));
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    *ops_left = ops_left.checked_sub(count).ok_or(PlanError::TooManyOps { max: OPS_MAX })?;
    let mut ops = Vec::with_capacity(count);
    for segment in &segments {
        Cut::new(segment, options).append(segment, &mut ops);
    }
    Ok(ops)
}

/// Sorts a trainer's segments by where they land, and joins those that follow each other on both sides. Only
/// within one parameter: messages name the parameter of an operation, and neighbouring parameters rarely
/// touch at the source too.
fn coalesce(mut segments: Vec<Segment>) -> Vec<Segment> {
    segments.sort_unstable_by_key(|s| (s.to, s.destination.region, s.destination.offset));
    segments.dedup_by(|next, joined| {
        let follows = (next.to, next.param) == (joined.to, joined.param)
            && (next.rows, joined.rows) == (1, 1)
            && next.source.region == joined.source.region
            && next.source.offset == joined.source.offset + joined.row_bytes
            && next.destination.region == joined.destination.region
            && next.destination.offset == joined.destination.offset + joined.row_bytes;
        if follows {
            joined.row_bytes += next.row_bytes;
        }
        follows
    });
    segments
}

/// How a segment is cut: into groups of whole rows, or, where not even one row fits, rows into parts.
struct Cut {
    gather: bool,
    rows_max: u64,
    part_bytes_max: u64,
}

impl Cut {
    fn new(segment: &Segment, options: &PlanOptions) -> Cut {
        let row_bytes = segment.row_bytes;
        let staging_bytes_max = options.chunk_bytes_max.min(options.gather_chunk_bytes_max);
        let gather = segment.rows > 1
            && segment.destination.stride == row_bytes
            && row_bytes < options.gather_row_bytes_max
            && row_bytes <= staging_bytes_max / 2;
        let bytes_max = if gather { staging_bytes_max } else { options.chunk_bytes_max };
        Cut { gather, rows_max: (bytes_max / row_bytes).max(1), part_bytes_max: bytes_max }
    }

    fn ops(&self, segment: &Segment) -> u64 {
        let parts = segment.row_bytes.div_ceil(self.part_bytes_max);
        segment.rows.div_ceil(self.rows_max).saturating_mul(parts)
    }

    fn append(&self, segment: &Segment, ops: &mut Vec<Op>) {
        let mut row = 0;
        while row < segment.rows {
            let rows = self.rows_max.min(segment.rows - row);
            let mut start = 0;
            while start < segment.row_bytes {
                let bytes = self.part_bytes_max.min(segment.row_bytes - start);
                let side = |side: Strided| Strided {
                    region: side.region,
                    offset: side.offset + row * side.stride + start,
                    // A single row has no next one; its stride is its length, so that equal operations are
                    // equal.
                    stride: if rows == 1 { bytes } else { side.stride },
                };
                ops.push(Op {
                    to: segment.to,
                    param: segment.param,
                    // Both are at most CHUNK_BYTES_MAX, which fits 32 bits.
                    row_bytes: bytes as u32,
                    rows: rows as u32,
                    source: side(segment.source),
                    destination: side(segment.destination),
                    gather: self.gather && rows > 1,
                });
                start += bytes;
            }
            row += rows;
        }
    }
}
