//! WRITEs as copies into attached memory.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use efa_core::{Lease, Target};
use xfer_plan::ReceiverRank;

use super::LocalError;
use super::doorman::{DoormanAddress, fetch, fetch_teller};
use super::shared::Attached;
use super::telling::{Arrived, Teller, Untold};
use crate::program::WriteId;
use crate::rail::{Armed, Done, Rail, RailError, RailLimits, RailWrite, Rows};

/// WRITEs taken at once. Each is copied when it is posted, so a deeper rail would only delay the other rails of the
/// thread.
const DEPTH: u32 = 4;

/// What such a rail reads: the bytes of this process, or memory that others write to.
pub trait LocalSource: Send + 'static {
    /// Copies `len` of its bytes from `at` on to `offset` of a peer's memory. `None` if they do not fit, at either end.
    fn copy_to(&self, at: usize, len: usize, memory: &mut Attached, offset: u64) -> Option<()>;
}

impl LocalSource for Lease {
    fn copy_to(&self, at: usize, len: usize, memory: &mut Attached, offset: u64) -> Option<()> {
        memory.copy_in(offset, self.bytes().get(at..at.checked_add(len)?)?)
    }
}

impl LocalSource for Target {
    fn copy_to(&self, at: usize, len: usize, memory: &mut Attached, offset: u64) -> Option<()> {
        memory.copy_from(offset, &self.slice(at..at.checked_add(len)?)?)
    }
}

/// A receiver of this host: its regions, attached, and where to tell it what has arrived.
pub struct LocalPeer {
    regions: Vec<Attached>,
    teller: Teller,
}

impl LocalPeer {
    /// Attaches all regions of a peer, which have these lengths by its manifest. Each step takes `deadline` at most.
    ///
    /// # Errors
    ///
    /// [`LocalError`] when the peer does not answer or refuses, or what it answers is not what it said.
    pub fn open(
        address: &DoormanAddress,
        region_bytes: &[u64],
        deadline: Duration,
    ) -> Result<Self, LocalError> {
        let attach =
            |(region, bytes): (u32, &u64)| Attached::new(&fetch(address, region, deadline)?, region, *bytes);
        let regions = (0..).zip(region_bytes).map(attach).collect::<Result<_, _>>()?;
        Ok(Self { regions, teller: fetch_teller(address, deadline)? })
    }
}

impl AsMut<Teller> for LocalPeer {
    fn as_mut(&mut self) -> &mut Teller {
        &mut self.teller
    }
}

/// A rail to receivers of the same host. A WRITE's bytes are there by the time it is posted.
pub struct LocalRail<S = Lease> {
    peers: BTreeMap<ReceiverRank, LocalPeer>,
    untold: Untold<S>,
    done: Vec<Done<S>>,
}

impl<S: LocalSource> LocalRail<S> {
    /// A rail to these receivers.
    pub fn new(peers: BTreeMap<ReceiverRank, LocalPeer>) -> Self {
        Self { peers, untold: Untold::new(), done: Vec::with_capacity(DEPTH as usize) }
    }
}

impl<S: LocalSource> Rail for LocalRail<S> {
    type Buffer = S;

    fn name(&self) -> String {
        "local (shared memory)".into()
    }

    fn limits(&self) -> RailLimits {
        RailLimits { depth: DEPTH, in_flight_bytes_max: u64::MAX, takes_rows: true }
    }

    fn post(&mut self, writes: &mut VecDeque<RailWrite<S>>) -> Result<(), RailError> {
        while let Some(RailWrite { id, from, rows, to, region, offset, tag }) = writes.pop_front() {
            let memory = self.peers.get_mut(&to).and_then(|peer| peer.regions.get_mut(region.index()));
            match memory.and_then(|memory| copy_rows(memory, offset, &from, rows)) {
                Some(()) => self.untold.push(Arrived { id, from, to, tag }),
                None => {
                    let result = Err(format!("{rows:?} at {offset} are outside {region} of {to}"));
                    self.done.push(Done { id, from, result });
                }
            }
        }
        Ok(())
    }

    fn poll(&mut self, done: &mut Vec<Done<S>>) -> Result<(), RailError> {
        self.untold.tell(&mut self.peers, &mut self.done);
        done.append(&mut self.done);
        Ok(())
    }

    fn arm(&mut self) -> Armed<'_> {
        // A receiver that does not listen cannot be waited for together with the descriptors of other rails.
        if self.untold.is_empty() { Armed::Ready } else { Armed::Blind }
    }

    fn close(self: Box<Self>, unfinished: &mut Vec<WriteId>) -> Result<(), RailError> {
        unfinished.extend(self.untold.ids());
        unfinished.extend(self.done.iter().map(|done| done.id));
        Ok(())
    }
}

/// Copies rows one after another to `offset` on. `None` if they do not fit, at either end.
fn copy_rows(memory: &mut Attached, offset: u64, from: &impl LocalSource, rows: Rows) -> Option<()> {
    let stride = usize::try_from(rows.stride).ok()?;
    let (mut at, mut to) = (0_usize, offset);
    for _ in 0..rows.count {
        from.copy_to(at, rows.bytes as usize, memory, to)?;
        (at, to) = (at.checked_add(stride)?, to.checked_add(u64::from(rows.bytes))?);
    }
    Some(())
}
