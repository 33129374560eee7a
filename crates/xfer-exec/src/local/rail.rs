//! WRITEs as copies into attached memory.

use std::collections::{BTreeMap, VecDeque};

use efa_core::Lease;
use xfer_plan::ReceiverRank;

use super::shared::Attached;
use crate::program::WriteId;
use crate::rail::{Armed, Done, Rail, RailError, RailLimits, RailWrite, Rows};

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

    fn limits(&self) -> RailLimits {
        RailLimits { depth: DEPTH, in_flight_bytes_max: u64::MAX, takes_rows: true }
    }

    fn post(&mut self, writes: &mut VecDeque<RailWrite<Lease>>) -> Result<(), RailError> {
        while let Some(RailWrite { id, from, rows, to, region, offset, .. }) = writes.pop_front() {
            let memory = self.peers.get_mut(&to).and_then(|regions| regions.get_mut(region.index()));
            let copied = memory.and_then(|memory| copy_rows(memory, offset, from.bytes(), rows));
            let result = copied.ok_or_else(|| format!("{rows:?} at {offset} are outside {region} of {to}"));
            self.done.push(Done { id, from, result });
        }
        Ok(())
    }

    fn poll(&mut self, done: &mut Vec<Done<Lease>>) -> Result<(), RailError> {
        done.append(&mut self.done);
        Ok(())
    }

    fn arm(&mut self) -> Armed<'_> {
        Armed::Ready
    }

    fn close(self: Box<Self>, unfinished: &mut Vec<WriteId>) -> Result<(), RailError> {
        unfinished.extend(self.done.iter().map(|done| done.id));
        Ok(())
    }
}

/// Copies rows one after another to `offset` on. `None` if they do not fit, at either end.
fn copy_rows(memory: &mut Attached, offset: u64, from: &[u8], rows: Rows) -> Option<()> {
    let stride = usize::try_from(rows.stride).ok()?;
    let (mut at, mut to) = (0_usize, offset);
    for _ in 0..rows.count {
        let row = from.get(at..at.checked_add(rows.bytes as usize)?)?;
        memory.copy_in(to, row)?;
        (at, to) = (at.checked_add(stride)?, to.checked_add(u64::from(rows.bytes))?);
    }
    Some(())
}
