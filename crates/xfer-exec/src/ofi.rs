//! Rails over libfabric: WRITEs as one-sided RDMA writes, on the sender's side and the receiver's.
//!
//! Every WRITE asks for delivery-complete, so its completion means that the bytes are in the peer's memory. A WRITE whose tag its
//! receiver counts carries it as an immediate.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use efa_core::{Completion, Lease, PeerId, RailAddress, RegionId, RemoteRegion, Write};
use xfer_plan::{NO_TAG, ReceiverRank, RegionIndex};

use crate::program::WriteId;
use crate::rail::{Armed, Done, Rail, RailError, RailLimits, RailWrite, Rows, SOFTWARE_IN_FLIGHT_BYTES_MAX};

#[cfg(feature = "cuda")]
mod device;
mod source;
mod target;
mod warm_up;

#[cfg(feature = "cuda")]
pub use device::{DeviceOfiRail, for_nics};
pub use source::OfiSource;
pub use target::OfiTarget;
use warm_up::{Scratch, warm_up};

/// A receiver as it described itself.
#[derive(Debug, Clone)]
pub struct OfiPeer {
    /// Its rail.
    pub address: RailAddress,
    /// Its regions, by index.
    pub regions: Vec<RemoteRegion>,
    /// A few bytes that anybody may overwrite: warm-ups go there.
    pub scratch: RemoteRegion,
}

/// The sender's side of a rail, which reads host memory or a GPU's.
pub struct OfiRail<S: OfiSource = Lease> {
    rail: efa_core::Rail,
    depth: u32,
    /// By base address.
    memories: Vec<(S::Memory, RegionId)>,
    /// By receiver.
    peers: Vec<Option<(PeerId, Vec<RemoteRegion>)>>,
    batch: VecDeque<Write<S>>,
    /// Beside `batch`: what a refused WRITE is turned back into.
    targets: VecDeque<(ReceiverRank, RegionIndex, u64, u32)>,
    completions: Vec<Completion>,
}

impl<S: OfiSource> OfiRail<S> {
    /// Registers `memories`, connects to `peers`, and writes a few bytes to each: the first push finds every
    /// connection made, and a peer that cannot be reached is named before it.
    ///
    /// # Errors
    ///
    /// [`RailError`] naming the peer that could not be written to within `deadline`.
    pub fn connect(
        rail: efa_core::Rail,
        memories: &[S::Memory],
        peers: BTreeMap<ReceiverRank, OfiPeer>,
        deadline: Duration,
    ) -> Result<Self, RailError> {
        let (mut this, scratches) = Self::insert(rail, memories, peers)?;
        warm_up(&mut this.rail, &scratches, deadline).map_err(|reason| this.error(reason))?;
        Ok(this)
    }

    /// As [`OfiRail::connect`], without the writes: the first push pays for the connections, and finds out who cannot be
    /// reached. To measure what the warm-up is worth.
    ///
    /// # Errors
    ///
    /// [`RailError`] where memory cannot be registered, or an address makes no sense.
    pub fn connect_cold(
        rail: efa_core::Rail,
        memories: &[S::Memory],
        peers: BTreeMap<ReceiverRank, OfiPeer>,
    ) -> Result<Self, RailError> {
        Ok(Self::insert(rail, memories, peers)?.0)
    }

    /// Registers memories and inserts peers; also where the warm-ups go.
    fn insert(
        mut rail: efa_core::Rail,
        memories: &[S::Memory],
        peers: BTreeMap<ReceiverRank, OfiPeer>,
    ) -> Result<(Self, Vec<Scratch>), RailError> {
        let name = rail.name().to_owned();
        let failed = |reason: String| RailError { rail: name.clone(), reason };
        let ranks = peers.last_key_value().map_or(0, |(last, _)| last.index() + 1);
        let mut connected = vec![None; ranks];
        let mut scratches = Vec::new();
        for (rank, peer) in peers {
            let to = rail.insert_peer(&peer.address).map_err(|error| failed(format!("{rank}: {error}")))?;
            scratches.push((rank, to, peer.scratch));
            connected[rank.index()] = Some((to, peer.regions));
        }
        let mut this = Self {
            depth: rail.room(),
            rail,
            memories: Vec::new(),
            peers: connected,
            batch: VecDeque::new(),
            targets: VecDeque::new(),
            completions: Vec::new(),
        };
        memories.iter().try_for_each(|memory| this.register(memory))?;
        Ok((this, scratches))
    }

    /// Registers one more memory to write from.
    ///
    /// # Errors
    ///
    /// [`RailError`] where it cannot be registered.
    pub fn register(&mut self, memory: &S::Memory) -> Result<(), RailError> {
        let id = S::register(&mut self.rail, memory).map_err(|error| self.error(error.to_string()))?;
        let base = S::base_address(memory);
        let at = self.memories.partition_point(|(other, _)| S::base_address(other) < base);
        self.memories.insert(at, (memory.clone(), id));
        Ok(())
    }

    fn error(&self, reason: String) -> RailError {
        RailError { rail: self.rail.name().to_owned(), reason }
    }

    /// A WRITE as libfabric takes it.
    fn prepare(&self, write: RailWrite<S>) -> Result<Write<S>, Box<(RailWrite<S>, String)>> {
        let memory = write.from.memory();
        let base = S::base_address(memory);
        let at = self.memories.partition_point(|(other, _)| S::base_address(other) < base);
        let region = self.memories.get(at).filter(|(other, _)| S::same(other, memory)).map(|(_, id)| *id);
        let target = self.peers.get(write.to.index()).and_then(Option::as_ref).and_then(|(peer, regions)| {
            let remote = regions.get(write.region.index())?;
            Some((*peer, remote.at(write.offset, write.from.bytes())))
        });
        match (region, target) {
            _ if write.rows.count != 1 => Err(Box::new((write, "a rail of libfabric takes one row".into()))),
            (Some(region), Some((to, Ok(remote)))) => Ok(Write {
                from: write.from,
                region,
                to,
                remote,
                immediate: (write.tag != NO_TAG).then_some(write.tag),
                delivery_complete: true,
                token: write.id.to_token(),
            }),
            (None, _) => Err(Box::new((write, "its buffer is not registered".into()))),
            (_, Some((_, Err(error)))) => Err(Box::new((write, error.to_string()))),
            (_, None) => {
                let reason = format!("{} has no {}", write.to, write.region);
                Err(Box::new((write, reason)))
            }
        }
    }
}

impl<S: OfiSource> Rail for OfiRail<S> {
    type Buffer = S;

    fn name(&self) -> String {
        self.rail.name().to_owned()
    }

    fn limits(&self) -> RailLimits {
        // Where the NIC moves the bytes, what is posted costs no cache.
        let in_flight_bytes_max =
            if self.rail.is_offloaded() { u64::MAX } else { SOFTWARE_IN_FLIGHT_BYTES_MAX };
        RailLimits { depth: self.depth, in_flight_bytes_max, takes_rows: false }
    }

    fn post(&mut self, writes: &mut VecDeque<RailWrite<S>>) -> Result<(), RailError> {
        let mut failed = None;
        while let Some(write) = writes.pop_front() {
            let target = (write.to, write.region, write.offset, write.tag);
            match self.prepare(write) {
                Ok(write) => {
                    self.batch.push_back(write);
                    self.targets.push_back(target);
                }
                Err(refused) => {
                    let (write, reason) = *refused;
                    failed = Some((write.id, reason));
                    writes.push_front(write);
                    break;
                }
            }
        }
        match self.rail.write_batch(&mut self.batch) {
            Ok(posted) => drop(self.targets.drain(..posted.min(self.targets.len()))),
            Err(error) => {
                let posted = self.targets.len() - self.batch.len();
                self.targets.drain(..posted);
                failed =
                    self.batch.front().map(|write| (WriteId::from_token(write.token), error.to_string()));
            }
        }
        // What was not taken goes back, the last one first.
        while let (Some(write), Some((to, region, offset, tag))) =
            (self.batch.pop_back(), self.targets.pop_back())
        {
            writes.push_front(RailWrite {
                id: WriteId::from_token(write.token),
                rows: Rows::one(write.from.bytes() as u32),
                from: write.from,
                to,
                region,
                offset,
                tag,
            });
        }
        match failed {
            // Only the WRITE at the front may be blamed: what was ready before a bad one goes first.
            Some((id, reason)) if writes.front().is_some_and(|write| write.id == id) => {
                Err(self.error(reason))
            }
            _ => Ok(()),
        }
    }

    fn poll(&mut self, done: &mut Vec<Done<S>>) -> Result<(), RailError> {
        let polled = self.rail.poll(&mut self.completions);
        for completion in self.completions.drain(..) {
            match completion {
                Completion::Op { token, result, lease, .. } => {
                    if let Some(from) = S::returned(lease) {
                        let result = result.map(drop).map_err(|error| error.to_string());
                        done.push(Done { id: WriteId::from_token(token), from, result });
                    }
                }
                other => tracing::warn!(rail = self.rail.name(), ?other, "unasked"),
            }
        }
        polled.map(drop).map_err(|error| self.error(error.to_string()))
    }

    fn arm(&mut self) -> Armed<'_> {
        match self.rail.arm() {
            Ok(efa_core::Armed::Ready) => Armed::Ready,
            Ok(efa_core::Armed::On(queue)) => Armed::On(queue),
            Ok(efa_core::Armed::Blind) => Armed::Blind,
            Err(error) => {
                // Polling finds what there is; only the sleep is lost.
                tracing::debug!(%error, "arm");
                Armed::Blind
            }
        }
    }

    fn close(self: Box<Self>, unfinished: &mut Vec<WriteId>) -> Result<(), RailError> {
        let name = self.rail.name().to_owned();
        match self.rail.close() {
            Ok(held) => {
                unfinished.extend(held.iter().map(|one| WriteId::from_token(one.token)));
                Ok(())
            }
            Err(error) => Err(RailError { rail: name, reason: error.to_string() }),
        }
    }
}
