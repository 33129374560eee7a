//! A rail that moves nothing: it completes what is posted after a number of polls. With it the cost of the engine and
//! the driver themselves is measured, and tests see a rail that is always late by the same amount.

use std::collections::VecDeque;

use efa_core::Lease;

use crate::program::WriteId;
use crate::rail::{Armed, Done, Rail, RailError, RailLimits, RailWrite};

/// See the module.
pub struct NullRail {
    limits: RailLimits,
    polls: u64,
    polled: u64,
    /// What was posted, and the poll that completes it.
    in_flight: VecDeque<(u64, RailWrite<Lease>)>,
}

impl NullRail {
    /// A rail that completes a WRITE in the poll number `polls` after its post; 0 is the next one.
    pub fn new(limits: RailLimits, polls: u64) -> Self {
        Self { limits, polls, polled: 0, in_flight: VecDeque::with_capacity(limits.depth as usize) }
    }
}

impl Rail for NullRail {
    type Buffer = Lease;

    fn name(&self) -> String {
        "null (moves nothing)".into()
    }

    fn limits(&self) -> RailLimits {
        self.limits
    }

    fn post(&mut self, writes: &mut VecDeque<RailWrite<Lease>>) -> Result<(), RailError> {
        while self.in_flight.len() < self.limits.depth as usize
            && let Some(write) = writes.pop_front()
        {
            self.in_flight.push_back((self.polled + self.polls, write));
        }
        Ok(())
    }

    fn poll(&mut self, done: &mut Vec<Done<Lease>>) -> Result<(), RailError> {
        while self.in_flight.front().is_some_and(|(due, _)| *due <= self.polled)
            && let Some((_, RailWrite { id, from, .. })) = self.in_flight.pop_front()
        {
            done.push(Done { id, from, result: Ok(()) });
        }
        self.polled += 1;
        Ok(())
    }

    fn arm(&mut self) -> Armed<'_> {
        Armed::Ready
    }

    fn close(self: Box<Self>, unfinished: &mut Vec<WriteId>) -> Result<(), RailError> {
        unfinished.extend(self.in_flight.iter().map(|(_, write)| write.id));
        Ok(())
    }
}
