//! A simulated rank's memory: it knows what is in use, and notes what the world has to do.

use std::rc::Rc;

use xfer_exec::engine::Slot;
use xfer_exec::{Memory, Post, RailIndex};
use xfer_plan::Op;

use super::rail::{Piece, SimRail};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct SimMemory {
    /// Shared by every [`Piece`] of it that is out.
    pub(super) held: Rc<()>,
    /// To be filled: slots, and the operation of each.
    pub(super) to_stage: Vec<(Slot, u32)>,
    /// To be closed.
    pub(super) to_close: Vec<RailIndex>,
}

impl SimMemory {
    /// Pieces that are out.
    pub(super) fn in_use(&self) -> usize {
        Rc::strong_count(&self.held) - 1
    }
}

impl Memory for SimMemory {
    type Rail = SimRail;

    fn buffer(&mut self, post: &Post) -> Option<Piece> {
        Some(Piece { source: post.source, _held: Rc::clone(&self.held) })
    }

    fn stage(&mut self, slot: Slot, index: u32, _op: &Op) -> Result<(), String> {
        self.to_stage.push((slot, index));
        Ok(())
    }

    fn close(&mut self, number: RailIndex, _rail: Box<SimRail>) {
        self.to_close.push(number);
    }
}
