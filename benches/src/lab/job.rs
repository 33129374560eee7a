//! What ranks in the lab move, and over which links: one description for the processes and for whoever simulates them.
//!
//! It must never start anything. What it says of tensors is all that there is: ranks declare exactly these.

use serde::{Deserialize, Serialize};
use weightsync::{DType, Error, TensorSpec, World};

/// Columns of a tensor in bytes: the longest WRITE that is measured.
pub(crate) const ROW_BYTES: u64 = 1 << 20;

/// Trainers on side A, inference ranks on side B. Travels as JSON to the processes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) trainers: u32,
    pub(crate) inference: u32,
    pub(crate) links: u16,
    /// Whether every rank has all links of its side, and not a share of its own.
    pub(crate) shares_links: bool,
    /// Whether all inference ranks want the same tensors.
    pub(crate) is_replicated: bool,
    /// What one push writes in all: a multiple of [`ROW_BYTES`] for every pair of ranks.
    pub(crate) bytes: u64,
    /// The longest WRITE.
    pub(crate) chunk_bytes: u64,
    /// What a rank declares for each of its links, for the lower bound.
    pub(crate) rail_bytes_per_second: u64,
}

impl Job {
    pub(crate) fn world(&self) -> World {
        World { trainers: self.trainers, inference: self.inference }
    }

    /// The tensor that trainer `from` has for inference rank `to`, which may be everybody's.
    fn name(&self, from: u32, to: u32) -> String {
        if self.is_replicated { format!("w.{from}") } else { format!("w.{from}.{to}") }
    }

    /// Of each tensor.
    fn shape(&self) -> [u64; 2] {
        [self.bytes / u64::from(self.trainers * self.inference) / ROW_BYTES, ROW_BYTES]
    }

    fn tensor(&self, from: u32, to: u32) -> Result<TensorSpec, Error> {
        TensorSpec::whole(self.name(from, to), DType::U8, &self.shape())
    }

    /// What a trainer has, in the order in which it lies in memory.
    pub(crate) fn sources(&self, trainer: u32) -> Result<Vec<TensorSpec>, Error> {
        let wanted = if self.is_replicated { 0..1 } else { 0..self.inference };
        wanted.map(|to| self.tensor(trainer, to)).collect()
    }

    /// What an inference rank wants, in the order in which it lies in memory.
    pub(crate) fn wanted(&self, inference: u32) -> Result<Vec<TensorSpec>, Error> {
        (0..self.trainers).map(|from| self.tensor(from, inference)).collect()
    }

    /// The links of rank `rank` on a side that has `ranks`.
    pub(crate) fn links_of(&self, rank: u32, ranks: u32) -> std::ops::Range<u16> {
        let each = self.links / ranks as u16;
        if self.shares_links { 0..self.links } else { rank as u16 * each..(rank as u16 + 1) * each }
    }
}
