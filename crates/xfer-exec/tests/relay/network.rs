//! A toy network: it delivers in any order, and reads a buffer only when it delivers, so that bytes that are posted too soon, or
//! overwritten too soon, are seen.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use xfer_exec::engine::Slot;
use xfer_exec::{
    Armed, Done, Memory, Post, Rail, RailError, RailIndex, RailLimits, RailWrite, Source, WriteId,
};
use xfer_plan::{Op, ReceiverRank, RegionIndex, Transform};

/// What no weight is: a receiver's memory before a push.
pub(crate) const NOTHING: u8 = 0xEE;
/// Every rank has one.
pub(crate) const REGION: RegionIndex = RegionIndex(0);

pub(crate) type Bytes = Rc<RefCell<Vec<u8>>>;

/// Bytes that are read when they are delivered.
pub(crate) struct Span {
    pub(crate) memory: Bytes,
    pub(crate) from: usize,
}

#[derive(Default)]
pub(crate) struct Network {
    /// Beside each WRITE its wire.
    pub(crate) in_flight: Vec<(usize, RailWrite<Span>)>,
    /// By wire.
    pub(crate) done: Vec<Vec<Done<Span>>>,
    /// By receiver.
    pub(crate) regions: Vec<Bytes>,
}

impl Network {
    /// Delivers one WRITE; to whom, and what it tells.
    pub(crate) fn deliver(&mut self, at: usize) -> (ReceiverRank, u32) {
        let (wire, write) = self.in_flight.swap_remove(at);
        let RailWrite { id, from, rows, to, region, offset, tag } = write;
        assert_eq!(region, REGION);
        let mut arriving = Vec::new();
        for row in 0..rows.count as usize {
            let start = from.from + row * rows.stride as usize;
            arriving.extend_from_slice(&from.memory.borrow()[start..start + rows.bytes as usize]);
        }
        let offset = offset as usize;
        self.regions[to.index()].borrow_mut()[offset..offset + arriving.len()].copy_from_slice(&arriving);
        self.done[wire].push(Done { id, from, result: Ok(()) });
        (to, tag)
    }
}

/// One rail. As it shares a network that has no locks, it stays on one thread.
pub(crate) struct Wire {
    pub(crate) network: Rc<RefCell<Network>>,
    pub(crate) number: usize,
    pub(crate) limits: RailLimits,
}

impl Rail for Wire {
    type Buffer = Span;

    fn name(&self) -> String {
        format!("wire {}", self.number)
    }

    fn limits(&self) -> RailLimits {
        self.limits
    }

    fn post(&mut self, writes: &mut VecDeque<RailWrite<Span>>) -> Result<(), RailError> {
        let in_flight = &mut self.network.borrow_mut().in_flight;
        // It refuses now and then: it has less room than it says.
        while in_flight.iter().filter(|(wire, _)| *wire == self.number).count()
            < self.limits.depth as usize - 1
            && let Some(write) = writes.pop_front()
        {
            in_flight.push((self.number, write));
        }
        Ok(())
    }

    fn poll(&mut self, done: &mut Vec<Done<Span>>) -> Result<(), RailError> {
        done.append(&mut self.network.borrow_mut().done[self.number]);
        Ok(())
    }

    fn arm(&mut self) -> Armed<'_> {
        Armed::Blind
    }

    fn close(self: Box<Self>, _unfinished: &mut Vec<WriteId>) -> Result<(), RailError> {
        panic!("no rail is given up here")
    }
}

/// The memory of one rank.
pub(crate) struct Host {
    pub(crate) region: Bytes,
    pub(crate) slots: Vec<Bytes>,
    pub(crate) filling: Vec<(Slot, Op)>,
}

impl Host {
    /// What is in a slot once it is filled.
    pub(crate) fn fill(&self, (slot, op): (Slot, Op)) {
        let rows = (0..u64::from(op.rows)).flat_map(|row| made(&op, &self.region.borrow(), row));
        let rows: Vec<u8> = rows.collect();
        self.slots[slot.0 as usize].borrow_mut()[..rows.len()].copy_from_slice(&rows);
    }
}

impl Memory for Host {
    type Rail = Wire;

    fn buffer(&mut self, post: &Post) -> Option<Span> {
        let (memory, from) = match post.source {
            Source::Region(region, offset) => {
                assert_eq!(region, REGION);
                (&self.region, offset as usize)
            }
            Source::Slot(slot, offset) => (&self.slots[slot.0 as usize], offset as usize),
        };
        for row in 0..post.rows.count as usize {
            let start = from + row * post.rows.stride as usize;
            let there = &memory.borrow()[start..start + post.rows.bytes as usize];
            assert!(!there.contains(&NOTHING), "posted before it is there");
        }
        Some(Span { memory: memory.clone(), from })
    }

    fn stage(&mut self, slot: Slot, _index: u32, op: &Op) -> Result<(), String> {
        self.filling.push((slot, *op));
        Ok(())
    }

    fn close(&mut self, number: RailIndex, _rail: Box<Wire>) {
        panic!("{number} is given up")
    }
}

/// A row as it arrives. The cast takes the upper half of each float.
pub(crate) fn made(op: &Op, source: &[u8], row: u64) -> Vec<u8> {
    let start = (op.source.offset + row * op.source.stride) as usize;
    let row_bytes = op.row_bytes as usize;
    match op.transform {
        Transform::Copy => source[start..start + row_bytes].to_vec(),
        _ => source[start..start + 2 * row_bytes].chunks(4).flat_map(|float| [float[2], float[3]]).collect(),
    }
}
