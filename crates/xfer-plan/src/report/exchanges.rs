//! Exchanges: the few bytes that trainers send each other about blocks that their borders cut.

use serde::Serialize;

use crate::plan::Plan;

/// A largest magnitude travels as f32.
const AMAX_BYTES: u64 = 4;

/// What trainers tell each other before they quantise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Exchanges {
    /// Quantised tensors.
    pub tensors: u64,
    /// Ranges of blocks that are cut alike.
    pub ranges: u64,
    /// Blocks in them.
    pub blocks: u64,
    /// Reports to owners, and answers of owners, one per range and rank.
    pub messages: u64,
    /// Bytes of both, 4 per block and message.
    pub bytes: u64,
}

impl Exchanges {
    pub(super) fn new(plan: &Plan) -> Exchanges {
        let mut sums = Exchanges { tensors: plan.tables.len() as u64, ..Exchanges::default() };
        for exchange in plan.tables.iter().flat_map(|table| &table.exchanges) {
            let others = |ranks: &[_]| ranks.iter().filter(|rank| **rank != exchange.owner).count() as u64;
            let messages = others(&exchange.reporters) + others(&exchange.holders);
            let blocks = exchange.blocks.volume().unwrap_or(u64::MAX);
            sums.ranges += 1;
            sums.blocks = sums.blocks.saturating_add(blocks);
            sums.messages = sums.messages.saturating_add(messages);
            let bytes = blocks.saturating_mul(messages).saturating_mul(AMAX_BYTES);
            sums.bytes = sums.bytes.saturating_add(bytes);
        }
        sums
    }
}
