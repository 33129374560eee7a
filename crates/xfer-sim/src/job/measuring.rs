//! Trainers that measure the quantised blocks that they share: through the real protocol, for a time that a GPU takes.

use xfer_plan::{QuantPart, TensorBox};

use super::rank::Half;
use super::world::{Event, World};

/// What a trainer measures in every push.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Measures {
    /// Blocks that it shares with others.
    pub(super) blocks: u64,
    /// Their bytes at the source, if all of each were here.
    pub(super) bytes: u64,
}

impl Measures {
    pub(super) fn new(part: &QuantPart) -> Measures {
        let mut sum = Measures::default();
        for table in &part.tables {
            let blocks = table.reports.iter().filter_map(TensorBox::volume).fold(0, u64::saturating_add);
            let [rows, columns] = table.quant.block.map(u64::from);
            let block = rows.saturating_mul(columns).saturating_mul(table.dtype.bytes());
            sum.blocks = sum.blocks.saturating_add(blocks);
            sum.bytes = sum.bytes.saturating_add(blocks.saturating_mul(block));
        }
        sum
    }
}

impl World<'_> {
    /// A kernel reads the blocks that a trainer shares with others, as if it had all of each: at most what it takes.
    pub(super) fn measure(&mut self, number: u32) {
        let gpu = self.config.cluster.host.gpu;
        let rank = &mut self.ranks[number as usize];
        rank.agenda.measured += 1;
        let read =
            u128::from(rank.measures.bytes) * 1_000_000_000 / u128::from(gpu.hbm_bytes_per_second.max(1));
        let at = self.now.plus_nanos(gpu.launch_nanoseconds).plus_nanos(read as u64);
        self.events.push(at, Event::Measured(number, rank.agenda.measured));
    }

    /// Elements are names here and have no magnitudes: as many zeros as the plan wants.
    pub(super) fn measured(&mut self, number: u32, attempt: u32) {
        let rank = &mut self.ranks[number as usize];
        let Half::Trainer(member) = &mut rank.half else { return };
        // It was told of another attempt meanwhile.
        if !(rank.alive && rank.ended.is_none() && rank.agenda.measured == attempt) {
            return;
        }
        let message = member.measured(Ok(vec![0.0; rank.measures.blocks as usize]));
        self.answer(number, message);
    }
}
