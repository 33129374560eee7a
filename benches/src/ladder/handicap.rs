//! A rail without the techniques that this project takes for granted, to measure what each of them is worth.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use efa_core::Lease;
use xfer_exec::driver::HostRail;
use xfer_exec::{Armed, Done, Rail, RailError, RailLimits, RailWrite, WriteId};

/// WRITEs between two polls of a rail that posts in batches.
pub(super) const BATCH: usize = 16;

/// State that every thread of a process touches for every WRITE.
#[derive(Default)]
pub(super) struct Shared {
    posted: AtomicU64,
    completed: AtomicU64,
}

/// A rail inside, and what is taken from it.
pub(super) struct Handicapped {
    rail: HostRail,
    /// WRITEs that it posts between two polls.
    posts_per_poll: usize,
    /// Counters that it shares with all others.
    shared: Option<Arc<Shared>>,
    posted: usize,
    /// What it has taken and not posted.
    taken: VecDeque<RailWrite<Lease>>,
    one: VecDeque<RailWrite<Lease>>,
}

impl Handicapped {
    pub(super) fn new(rail: HostRail, posts_per_poll: usize, shared: Option<Arc<Shared>>) -> Self {
        let depth = rail.limits().depth as usize;
        let (taken, one) = (VecDeque::with_capacity(depth), VecDeque::with_capacity(1));
        Self { rail, posts_per_poll, shared, posted: 0, taken, one }
    }
    /// Posts what may still be posted before the next poll, one by one.
    fn post_some(&mut self) -> Result<(), RailError> {
        while self.posted < self.posts_per_poll
            && let Some(write) = self.taken.pop_front()
        {
            self.one.push_back(write);
            self.rail.post(&mut self.one)?;
            if let Some(write) = self.one.pop_front() {
                // No room just now.
                self.taken.push_front(write);
                return Ok(());
            }
            self.posted += 1;
            if let Some(shared) = &self.shared {
                shared.posted.fetch_add(1, Ordering::SeqCst);
            }
        }
        Ok(())
    }
}

impl Rail for Handicapped {
    type Buffer = Lease;

    fn name(&self) -> String {
        self.rail.name()
    }

    fn limits(&self) -> RailLimits {
        self.rail.limits()
    }

    fn post(&mut self, writes: &mut VecDeque<RailWrite<Lease>>) -> Result<(), RailError> {
        self.taken.append(writes);
        self.post_some()
    }

    fn poll(&mut self, done: &mut Vec<Done<Lease>>) -> Result<(), RailError> {
        let before = done.len();
        self.rail.poll(done)?;
        if let Some(shared) = &self.shared {
            for _ in before..done.len() {
                shared.completed.fetch_add(1, Ordering::SeqCst);
            }
        }
        self.posted = 0;
        self.post_some()
    }

    fn arm(&mut self) -> Armed<'_> {
        self.rail.arm()
    }

    fn close(self: Box<Self>, unfinished: &mut Vec<WriteId>) -> Result<(), RailError> {
        unfinished.extend(self.taken.iter().map(|write| write.id));
        self.rail.close(unfinished)
    }
}
