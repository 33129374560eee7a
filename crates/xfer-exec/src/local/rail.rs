//! WRITEs as copies into attached memory.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use efa_core::Lease;
use xfer_plan::ReceiverRank;

use super::shared::Attached;
use crate::rail::{Done, Rail, RailError, RailWrite};

/// WRITEs taken at once. Each is copied when it is posted, so a deeper rail would only delay the other rails of the
/// thread.
const DEPTH: u32 = 4;

/// A rail to receivers of the same host. A WRITE is delivered by the time it is posted.
pub struct LocalRail {
    peers: BTreeMap<ReceiverRank, Vec<Attached>>,
    done: Vec<Done<Lease>>,
}

impl LocalRail {
    /// A rail to these receivers, with their regions by index.
    pub fn new(peers: BTreeMap<ReceiverRank, Vec<Attached>>) -> Self {
        Self { peers, done: Vec::with_capacity(DEPTH as usize) }
    }
}

impl Rail for LocalRail {
    type Buffer = Lease;

    fn name(&self) -> String {
        "local (shared memory)".into()
    }

    fn depth(&self) -> u32 {
        DEPTH
    }

    fn post(&mut self, writes: &mut VecDeque<RailWrite<Lease>>) -> Result<(), RailError> {
        while let Some(RailWrite { id, from, to, region, offset }) = writes.pop_front() {
            let memory = self.peers.get_mut(&to).and_then(|regions| regions.get_mut(region.index()));
            let copied = memory.and_then(|memory| memory.copy_in(offset, from.bytes()));
            let bytes = from.len();
            let result =
                copied.ok_or_else(|| format!("{bytes} bytes at {offset} are outside {region} of {to}"));
            self.done.push(Done { id, from, result });
        }
        Ok(())
    }

    fn poll(&mut self, done: &mut Vec<Done<Lease>>) -> Result<(), RailError> {
        done.append(&mut self.done);
        Ok(())
    }

    fn wait(&mut self, _at_most: Duration) {}

    fn close(self: Box<Self>) -> Result<(), RailError> {
        Ok(())
    }
}
