//! A simulated rail: the trait that real rails implement, with the simulation at its other end.
//!
//! It decides nothing about the network. It takes what fits into its queue, and gives back what the world says is over.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use xfer_exec::{Armed, Done, Rail, RailError, RailLimits, RailWrite, Source, WriteId};

/// What a WRITE reads from. Whoever has one keeps the rank's memory in use.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) source: Source,
    pub(super) _held: Rc<()>,
}

/// The queue between a rank and the world.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) limits: RailLimits,
    pub(super) name: String,
    /// Posted, and not yet taken by the world.
    pub(super) posted: Vec<RailWrite<Piece>>,
    /// Over, and not yet polled.
    pub(super) done: Vec<Done<Piece>>,
    /// Posted, and not yet polled.
    pub(super) in_flight: u32,
    /// It takes nothing for now.
    pub(super) refuses: bool,
    /// It loses what it refuses: a defect, on purpose.
    pub(super) forgets: bool,
    /// It is broken.
    pub(super) broken: Option<String>,
}

/// A rank's end of a [`Queue`].
#[derive(Debug)]
pub(super) struct SimRail(pub(super) Rc<RefCell<Queue>>);

impl Rail for SimRail {
    type Buffer = Piece;

    fn name(&self) -> String {
        self.0.borrow().name.clone()
    }

    fn limits(&self) -> RailLimits {
        self.0.borrow().limits
    }

    fn post(&mut self, writes: &mut VecDeque<RailWrite<Piece>>) -> Result<(), RailError> {
        let mut queue = self.0.borrow_mut();
        let room = if queue.refuses { 0 } else { queue.limits.depth.saturating_sub(queue.in_flight) };
        let taken = writes.len().min(room as usize);
        queue.in_flight += taken as u32;
        queue.posted.extend(writes.drain(..taken));
        if queue.forgets {
            writes.clear();
        }
        Ok(())
    }

    fn poll(&mut self, done: &mut Vec<Done<Piece>>) -> Result<(), RailError> {
        let mut queue = self.0.borrow_mut();
        let over = queue.done.len() as u32;
        queue.in_flight = queue.in_flight.saturating_sub(over);
        done.append(&mut queue.done);
        match &queue.broken {
            Some(reason) => Err(RailError { rail: queue.name.clone(), reason: reason.clone() }),
            None => Ok(()),
        }
    }

    fn arm(&mut self) -> Armed<'_> {
        Armed::Ready
    }

    /// Closing takes time, so the world does it: see [`xfer_exec::Memory::close`].
    fn close(self: Box<Self>, _unfinished: &mut Vec<WriteId>) -> Result<(), RailError> {
        Ok(())
    }
}
