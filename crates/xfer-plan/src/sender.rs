//! The choice of the sender: who sends a rectangle that several trainers hold.
//!
//! The push is over when the slowest trainer is done, so each replicated rectangle goes to the holder that
//! would be done first. Ties go to the lower rank. Greedy and in the order of the manifest: not always the
//! best, always the same.

use crate::error::{PlanError, shorten};
use crate::ids::{ParamId, ReceiverRank};
use crate::intersect::{Segment, segments};
use crate::limits::OPS_MAX;
use crate::manifest::{DestinationParam, Manifest, bandwidth};
use crate::param_map::Leaf;
use crate::source_index::{Holder, SourceIndex, TensorId};
use crate::tensor_box::TensorBox;

/// One rectangle that a receiver wants.
pub(crate) struct Target<'m> {
    pub(crate) receiver: ReceiverRank,
    pub(crate) param: &'m DestinationParam,
    pub(crate) name: ParamId,
    pub(crate) leaf: Leaf<TensorId>,
}

impl<'m> Target<'m> {
    /// Sends the parts that only one piece holds. Returns whether replicated parts are left.
    pub(crate) fn send_unique(
        &self,
        index: &SourceIndex<'m>,
        senders: &mut Senders,
    ) -> Result<bool, PlanError> {
        let mut replicated = false;
        index.cells(self.leaf.tensor, &self.leaf.bounds, &mut |bounds, holders| match holders {
            [] => Err(PlanError::Uncovered {
                receiver: self.receiver,
                param: shorten(&self.param.name),
                tensor: shorten(index.name(self.leaf.tensor)),
                bounds: Box::new(bounds.clone()),
            }),
            [holder] => senders.send(self, *holder, bounds),
            _ => {
                replicated = true;
                Ok(())
            }
        })?;
        Ok(replicated)
    }

    /// Deals the replicated parts out to whoever would be done with them first.
    pub(crate) fn send_replicated(
        &self,
        index: &SourceIndex<'m>,
        senders: &mut Senders,
        block_bytes_max: u64,
    ) -> Result<(), PlanError> {
        index.cells(self.leaf.tensor, &self.leaf.bounds, &mut |bounds, holders| {
            if holders.len() < 2 {
                return Ok(());
            }
            // Depth first, so that blocks are dealt in the order of their addresses.
            let mut blocks = vec![bounds.clone()];
            while let Some(block) = blocks.pop() {
                let bytes = block.volume().unwrap_or(u64::MAX).saturating_mul(self.param.dtype.bytes());
                if bytes > block_bytes_max
                    && let Some((below, above)) = halve(&block)
                {
                    blocks.extend([above, below]);
                } else {
                    let holder = senders.choose(holders, bytes);
                    senders.send(self, holder.ok_or(PlanError::Defect { detail: "no holder" })?, &block)?;
                }
            }
            Ok(())
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

/// What every trainer has been given to send so far.
pub(crate) struct Senders {
    pub(crate) segments: Vec<Vec<Segment>>,
    bytes: Vec<u64>,
    bytes_per_second: Vec<u64>,
    segments_left: usize,
}

impl Senders {
    pub(crate) fn new(manifest: &Manifest) -> Senders {
        let trainers = manifest.trainers.len();
        Senders {
            segments: vec![Vec::new(); trainers],
            bytes: vec![0; trainers],
            bytes_per_second: manifest.trainers.iter().map(|trainer| bandwidth(&trainer.rails)).collect(),
            segments_left: OPS_MAX,
        }
    }

    /// The holder that would have sent everything first, were it given `bytes` more.
    fn choose<'m>(&self, holders: &[Holder<'m>], bytes: u64) -> Option<Holder<'m>> {
        let load = |holder: &Holder<'m>| {
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

    /// Lets `holder` send `bounds`, a part of `target`.
    fn send(&mut self, target: &Target<'_>, holder: Holder<'_>, bounds: &TensorBox) -> Result<(), PlanError> {
        let rank = holder.trainer.index();
        let leaf = &target.leaf;
        let result = bounds.moved(&leaf.bounds, &leaf.result);
        let (Some(list), Some(sum), Some(result)) =
            (self.segments.get_mut(rank), self.bytes.get_mut(rank), result)
        else {
            return Err(PlanError::Defect { detail: "a cell lies outside what was looked up" });
        };
        let address = (target.receiver, target.name);
        segments(holder.piece, bounds, target.param, &result, address, &mut |segment| {
            self.segments_left =
                self.segments_left.checked_sub(1).ok_or(PlanError::TooManyOps { max: OPS_MAX })?;
            *sum += segment.row_bytes * segment.rows;
            list.push(segment);
            Ok(())
        })
    }
}
