//! What is still to be written to one receiver.
//!
//! An operation is written from where it is, or once it has been staged, or, where this rank passes on, once it has arrived.
//! The plan deals operations to rails; each rail finds its own here, in the plan's order. A rail that has none left takes
//! from one that cannot keep up, so that nobody waits for the slowest. What came back from a rail goes first.

use std::collections::VecDeque;

use xfer_plan::Op;

use super::Slot;
use crate::program::WriteId;

/// Operations that the plan deals to one rail, as indices into the program, and how far they are.
#[derive(Debug, Default)]
struct Home {
    ops: Vec<u32>,
    next: usize,
    /// The next row of that operation, where each is a WRITE.
    row: u32,
}

impl Home {
    fn op(&self) -> Option<u32> {
        self.ops.get(self.next).copied()
    }

    fn left(&self) -> usize {
        self.ops.len() - self.next
    }
}

/// Where a WRITE was found.
#[derive(Debug, Clone, Copy)]
enum Place {
    Back,
    Queue,
    Home(usize),
}

/// An operation that has become ready, and how far it is.
#[derive(Debug)]
struct Ready {
    op: u32,
    slot: Option<Slot>,
    row: u32,
    writes: u32,
}

impl Ready {
    /// Its next WRITE.
    fn id(&self) -> WriteId {
        match self.slot {
            Some(slot) => WriteId::staged(self.op, slot, self.row),
            None => WriteId { op: self.op, row: self.row },
        }
    }
}

/// A WRITE that was found and not yet taken.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    pub(super) id: WriteId,
    place: Place,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Backlog {
    homes: Vec<Home>,
    /// Operations that go through staging memory, in the plan's order.
    staged: Vec<u32>,
    next_staged: usize,
    /// Of the operations that wait until they have arrived here, at the start.
    held_bytes: u64,
    /// Staged or arrived, to be written.
    queue: VecDeque<Ready>,
    /// Posted before, and not delivered.
    back: VecDeque<WriteId>,
    /// WRITEs that could be posted now.
    ready: u64,
    /// Of everything that is not in flight or delivered, ready or not.
    pub(super) bytes: u64,
}

impl Backlog {
    /// For a receiver that `rails` rails lead to.
    pub(super) fn new(rails: usize) -> Self {
        Self {
            homes: (0..rails).map(|_| Home::default()).collect(),
            staged: Vec::new(),
            next_staged: 0,
            held_bytes: 0,
            queue: VecDeque::new(),
            back: VecDeque::new(),
            ready: 0,
            bytes: 0,
        }
    }

    /// Adds an operation of the program that is written from where it is.
    pub(super) fn add(&mut self, index: u32, op: &Op) {
        let homes = self.homes.len().max(1);
        if let Some(home) = self.homes.get_mut(usize::from(op.rail) % homes) {
            home.ops.push(index);
        }
    }

    /// Adds one that goes through staging memory.
    pub(super) fn add_staged(&mut self, index: u32) {
        self.staged.push(index);
    }

    /// Adds one that waits until it is made ready.
    pub(super) fn hold(&mut self, op: &Op) {
        self.held_bytes += op.bytes();
    }

    /// Begins from the start. `writes` and `bytes` count an operation.
    pub(super) fn start(&mut self, writes: impl Fn(u32) -> u64, bytes: impl Fn(u32) -> u64) {
        self.next_staged = 0;
        self.queue.clear();
        self.back.clear();
        (self.ready, self.bytes) = (0, self.held_bytes);
        for home in &mut self.homes {
            (home.next, home.row) = (0, 0);
            self.ready += home.ops.iter().map(|op| writes(*op)).sum::<u64>();
            self.bytes += home.ops.iter().map(|op| bytes(*op)).sum::<u64>();
        }
        self.bytes += self.staged.iter().map(|op| bytes(*op)).sum::<u64>();
    }

    /// Forgets what has not been posted. Names what was ready: a WRITE, and with it so many of the same operation.
    pub(super) fn give_up(&mut self, mut unposted: impl FnMut(WriteId, u32)) {
        self.queue.drain(..).for_each(|ready| unposted(ready.id(), ready.writes - ready.row));
        self.back.drain(..).for_each(|id| unposted(id, 1));
        self.next_staged = self.staged.len();
        for home in &mut self.homes {
            home.next = home.ops.len();
        }
        (self.ready, self.bytes) = (0, 0);
    }

    /// Whether there is something to post.
    pub(super) fn has_ready(&self) -> bool {
        self.ready > 0
    }

    /// Whether there is anything to stage.
    pub(super) fn has_unstaged(&self) -> bool {
        self.next_staged < self.staged.len()
    }

    /// The next operation to stage.
    pub(super) fn take_unstaged(&mut self) -> Option<u32> {
        let op = self.staged.get(self.next_staged).copied()?;
        self.next_staged += 1;
        Some(op)
    }

    /// The WRITEs of `op` may be posted: it is in this slot, or has arrived where it is read.
    pub(super) fn make_ready(&mut self, op: u32, slot: Option<Slot>, writes: u32) {
        self.queue.push_back(Ready { op, slot, row: 0, writes });
        self.ready += u64::from(writes);
    }

    /// A WRITE of so many bytes came back from its rail, to be the next one or to wait its turn.
    pub(super) fn give_back(&mut self, id: WriteId, bytes: u64, next: bool) {
        if next {
            self.back.push_front(id)
        } else {
            self.back.push_back(id)
        }
        self.ready += 1;
        self.bytes += bytes;
    }

    /// The next WRITE for the rail at `home`; where it has none of its own, of another one that `cannot` keep up.
    pub(super) fn find(&self, home: usize, cannot: impl Fn(usize, u32) -> bool) -> Option<Found> {
        if let Some(id) = self.back.front() {
            return Some(Found { id: *id, place: Place::Back });
        }
        let own = self.homes.get(home).and_then(Home::op).map(|op| (op, home));
        let direct = own.or_else(|| {
            let next = self.homes.iter().enumerate().filter_map(|(at, other)| Some((other.op()?, at)));
            next.filter(|(op, at)| cannot(*at, *op)).max_by_key(|(_, at)| self.homes[*at].left())
        });
        match (self.queue.front(), direct) {
            (Some(ready), direct) if direct.is_none_or(|(other, _)| ready.op < other) => {
                Some(Found { id: ready.id(), place: Place::Queue })
            }
            (_, Some((op, at))) => {
                let row = self.homes.get(at)?.row;
                Some(Found { id: WriteId { op, row }, place: Place::Home(at) })
            }
            _ => None,
        }
    }

    /// Takes what was found just before. `rows` is the number of WRITEs of its operation.
    pub(super) fn take(&mut self, found: Found, rows: u64, bytes: u64) {
        match found.place {
            Place::Back => drop(self.back.pop_front()),
            Place::Queue => {
                if let Some(ready) = self.queue.front_mut() {
                    ready.row += 1;
                    if ready.row >= ready.writes {
                        self.queue.pop_front();
                    }
                }
            }
            Place::Home(at) => {
                if let Some(home) = self.homes.get_mut(at) {
                    home.row += 1;
                    if u64::from(home.row) >= rows {
                        (home.next, home.row) = (home.next + 1, 0);
                    }
                }
            }
        }
        self.ready = self.ready.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}
