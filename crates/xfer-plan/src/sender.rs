//! The choice of the sender: who sends a rectangle that several trainers hold.
//!
//! The push is over when the slowest trainer is done, so each replicated rectangle goes to the holder that
//! would be done first. Ties go to the lower rank. Greedy and in the order of the manifest: not always the
//! best, always the same.

use crate::error::PlanError;
use crate::ids::TrainerRank;
use crate::manifest::{PlanOptions, TrainerManifest, bandwidth};
use crate::plan::Transfer;
use crate::source_index::Holder;
use crate::template::{Declared, Template, coalesce, send};
use crate::tensor_box::TensorBox;

/// Replicated rectangles are dealt out in blocks that cost a trainer at most this many chunks, so that the replicas share
/// large ones. Larger blocks balance worse, smaller ones break up long runs.
const REPLICA_BLOCK_CHUNKS: u64 = 16;

/// No block is smaller than this, in bytes, however many receivers want it: smaller WRITEs do not fill a NIC.
const REPLICA_BLOCK_BYTES_MIN: u64 = 64 << 10;

/// What every trainer has been given to send so far.
pub(crate) struct Senders<'m> {
    trainers: &'m [TrainerManifest],
    bytes: Vec<u64>,
    bytes_per_second: Vec<u64>,
}

impl<'m> Senders<'m> {
    pub(crate) fn new(trainers: &'m [TrainerManifest]) -> Senders<'m> {
        Senders {
            trainers,
            bytes: vec![0; trainers.len()],
            bytes_per_second: trainers.iter().map(|trainer| bandwidth(&trainer.rails)).collect(),
        }
    }

    /// Gives a trainer so much more to send.
    pub(crate) fn load(&mut self, trainer: TrainerRank, bytes: u64) {
        if let Some(sum) = self.bytes.get_mut(trainer.index()) {
            *sum = sum.saturating_add(bytes);
        }
    }

    /// Deals what several trainers hold out to whoever would be done with it first; each sends `copies` of it.
    pub(crate) fn deal(
        &mut self,
        template: &Template,
        declared: Declared<'_>,
        copies: u64,
        options: &PlanOptions,
        room: &mut usize,
    ) -> Result<Vec<Transfer>, PlanError> {
        let Some(resolved) = &template.resolved else { return Ok(Vec::new()) };
        let whole = TensorBox::whole(&resolved.shape).unwrap_or_default(); // resolved: not too many dimensions
        let to = declared.place(&whole);
        let width = declared.param.dtype.bytes();
        let block_bytes_max = options.chunk_bytes_max.saturating_mul(REPLICA_BLOCK_CHUNKS) / copies.max(1);
        let block_bytes_max = block_bytes_max.max(REPLICA_BLOCK_BYTES_MIN.min(options.chunk_bytes_max));
        let mut sent = Vec::new();
        for dealt in &template.dealt {
            let Some(leaf) = resolved.leaves.get(dealt.leaf) else { continue };
            // Depth first, so that blocks are dealt in the order of their addresses.
            let mut blocks = vec![dealt.bounds.clone()];
            while let Some(block) = blocks.pop() {
                let bytes = block.volume().unwrap_or(u64::MAX).saturating_mul(width);
                if bytes > block_bytes_max
                    && let Some((below, above)) = halve(&block)
                {
                    blocks.extend([above, below]);
                    continue;
                }
                let bytes = bytes.saturating_mul(copies);
                let holder = self.choose(&dealt.holders, bytes);
                let holder = holder.ok_or(PlanError::Defect { detail: "no holder" })?;
                self.load(holder.trainer, bytes);
                send((self.trainers, holder), leaf, &block, &to, room, &mut sent)?;
            }
        }
        coalesce(&mut sent);
        Ok(sent)
    }

    /// The holder that would have sent everything first, were it given `bytes` more.
    fn choose(&self, holders: &[Holder], bytes: u64) -> Option<Holder> {
        let load = |holder: &Holder| {
            let rank = holder.trainer.index();
            let bytes = u128::from(*self.bytes.get(rank)?) + u128::from(bytes);
            Some((bytes, u128::from(*self.bytes_per_second.get(rank)?)))
        };
        // a / b < c / d without rounding; the first of equals, which is the lowest rank.
        holders.iter().copied().reduce(|best, other| match (load(&best), load(&other)) {
            (Some((a, b)), Some((c, d))) if c * b < a * d => other,
            _ => best,
        })
    }
}

/// Cuts a box in the middle of its outermost dimension that can be cut.
fn halve(block: &TensorBox) -> Option<(TensorBox, TensorBox)> {
    let (dim, start, len) = block
        .start()
        .zip(block.len())
        .enumerate()
        .find_map(|(d, (s, len))| (len > 1).then_some((d, s, len)))?;
    block.split(dim, start + len / 2)
}
