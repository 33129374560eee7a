//! Cuts operations until each fits a staging slot, for ranks that stage everything.
//!
//! The parts of an operation read and write the same bytes as the whole, each once, and never a part of an element. They follow
//! one another, so that the plan's order stays.

use xfer_plan::limits::OPS_MAX;
use xfer_plan::{DType, NO_TAG, Op, OpKind, RankPlan, Strided};

use super::{Program, ProgramError, ROWS_MAX};

impl Program {
    /// Takes over the operations of a plan that has been checked, cut to slots of so many bytes.
    pub(super) fn fit(&mut self, plan: &RankPlan, slot_bytes: u64) -> Result<(), ProgramError> {
        // What leaves as one WRITE has a length of 32 bits.
        let bytes_max = slot_bytes.min(u64::from(u32::MAX));
        for (index, op) in plan.ops.iter().enumerate() {
            let before = self.ops.len();
            let tag = plan.tags.get(index).copied();
            let cut = Cut::new(op, bytes_max);
            if !cut.is_whole(op) && (cut.bytes == 0 || tag.is_some_and(|tag| tag != NO_TAG)) {
                let (param, bytes) = (self.name(op.param).to_owned(), op.bytes());
                return Err(ProgramError::Size { op: index, param, bytes, bytes_max });
            }
            if cut.parts(op).saturating_add(before as u64) > OPS_MAX as u64 {
                return Err(ProgramError::TooManyParts { slot_bytes });
            }
            cut.append(op, &mut self.ops);
            self.tags.extend(tag.into_iter().cycle().take(self.ops.len() - before));
        }
        self.writes = self.ops.iter().map(Op::writes).sum();
        Ok(())
    }
}

/// How an operation is cut: into groups of whole rows, or, where not even one row fits, rows into parts.
struct Cut {
    rows: u32,
    /// Of a row; 0 where not even an element fits.
    bytes: u32,
}

impl Cut {
    fn new(op: &Op, bytes_max: u64) -> Self {
        // A WRITE for each row has to be named, and one for all of them is not.
        let rows_max = if op.writes() > 1 { ROWS_MAX } else { u64::from(u32::MAX) };
        // Both are at most those of the operation, which fit.
        match (bytes_max / u64::from(op.row_bytes)).min(rows_max) {
            0 => {
                // Of what is copied only bytes are known.
                let element_bytes = op.transform.destination(DType::U8).bytes();
                Self { rows: 1, bytes: (bytes_max - bytes_max % element_bytes) as u32 }
            }
            rows => Self { rows: rows.min(u64::from(op.rows)) as u32, bytes: op.row_bytes },
        }
    }

    fn is_whole(&self, op: &Op) -> bool {
        (self.rows, self.bytes) == (op.rows, op.row_bytes)
    }

    /// How many parts there are.
    fn parts(&self, op: &Op) -> u64 {
        u64::from(op.rows.div_ceil(self.rows)) * u64::from(op.row_bytes.div_ceil(self.bytes.max(1)))
    }

    fn append(&self, op: &Op, ops: &mut Vec<Op>) {
        if self.is_whole(op) {
            return ops.push(*op);
        }
        // What is gathered lands in one piece, whatever its stride says.
        let row_bytes = u64::from(op.row_bytes);
        let apart = if op.kind() == OpKind::Gather { row_bytes } else { op.destination.stride };
        let destination = Strided { stride: apart, ..op.destination };
        let source_bytes = |bytes: u32| op.transform.source_bytes(bytes.into());
        for row in (0..op.rows).step_by(self.rows as usize) {
            let rows = self.rows.min(op.rows - row);
            for start in (0..op.row_bytes).step_by(self.bytes as usize) {
                let bytes = self.bytes.min(op.row_bytes - start);
                let side = |side: Strided, start: u64, bytes: u64| Strided {
                    region: side.region,
                    // The end of the operation is an address; of scales, whose table is none, it is looked for later.
                    offset: side
                        .offset
                        .saturating_add(u64::from(row).saturating_mul(side.stride))
                        .saturating_add(start),
                    // A single row has no next one.
                    stride: if rows == 1 { bytes } else { side.stride },
                };
                ops.push(Op {
                    row_bytes: bytes,
                    rows,
                    source: side(op.source, source_bytes(start), source_bytes(bytes)),
                    destination: side(destination, start.into(), bytes.into()),
                    gather: op.gather && rows > 1,
                    ..*op
                });
            }
        }
    }
}
