//! What is still to be written to one receiver.
//!
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
    Staged,
    Home(usize),
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
    gathers: Vec<u32>,
    next_gather: usize,
    /// Gathered, to be written.
    staged: VecDeque<(u32, Slot)>,
    /// Posted before, and not delivered.
    back: VecDeque<WriteId>,
    /// WRITEs that could be posted now.
    ready: u64,
    /// Of everything that is not in flight or delivered, gathered or not.
    pub(super) bytes: u64,
}

impl Backlog {
    /// For a receiver that `rails` rails lead to.
    pub(super) fn new(rails: usize) -> Self {
        Self {
            homes: (0..rails).map(|_| Home::default()).collect(),
            gathers: Vec::new(),
            next_gather: 0,
            staged: VecDeque::new(),
            back: VecDeque::new(),
            ready: 0,
            bytes: 0,
        }
    }

    /// Adds an operation of the program: through staging memory, or from where it is.
    pub(super) fn add(&mut self, index: u32, op: &Op, staged: bool) {
        let homes = self.homes.len().max(1);
        match self.homes.get_mut(usize::from(op.rail) % homes) {
            Some(_) if staged => self.gathers.push(index),
            Some(home) => home.ops.push(index),
            None => {}
        }
    }

    /// Begins from the start. `writes` and `bytes` count an operation.
    pub(super) fn start(&mut self, writes: impl Fn(u32) -> u64, bytes: impl Fn(u32) -> u64) {
        self.next_gather = 0;
        self.staged.clear();
        self.back.clear();
        (self.ready, self.bytes) = (0, 0);
        for home in &mut self.homes {
            (home.next, home.row) = (0, 0);
            self.ready += home.ops.iter().map(|op| writes(*op)).sum::<u64>();
            self.bytes += home.ops.iter().map(|op| bytes(*op)).sum::<u64>();
        }
        self.bytes += self.gathers.iter().map(|op| bytes(*op)).sum::<u64>();
    }

    /// Forgets what has not been posted, and gives up the staging slots of it.
    pub(super) fn give_up(&mut self, free: &mut Vec<Slot>, slot_of: impl Fn(WriteId) -> Option<Slot>) {
        free.extend(self.staged.drain(..).map(|(_, slot)| slot));
        free.extend(self.back.drain(..).filter_map(slot_of));
        self.next_gather = self.gathers.len();
        for home in &mut self.homes {
            home.next = home.ops.len();
        }
        (self.ready, self.bytes) = (0, 0);
    }

    /// Whether there is something to post.
    pub(super) fn has_ready(&self) -> bool {
        self.ready > 0
    }

    /// Whether there is anything to gather.
    pub(super) fn has_gathers(&self) -> bool {
        self.next_gather < self.gathers.len()
    }

    /// The next operation to gather.
    pub(super) fn take_gather(&mut self) -> Option<u32> {
        let op = self.gathers.get(self.next_gather).copied()?;
        self.next_gather += 1;
        Some(op)
    }

    /// `op` has been gathered.
    pub(super) fn stage(&mut self, op: u32, slot: Slot) {
        self.staged.push_back((op, slot));
        self.ready += 1;
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
        match (self.staged.front(), direct) {
            (Some(&(op, slot)), direct) if direct.is_none_or(|(other, _)| op < other) => {
                Some(Found { id: WriteId { op, row: slot.0 }, place: Place::Staged })
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
            Place::Staged => drop(self.staged.pop_front()),
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
