//! Rails over libfabric: WRITEs as one-sided RDMA writes, on the sender's side and the receiver's.
//!
//! Every WRITE asks for delivery-complete, so its completion means that the bytes are in the peer's memory.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use efa_core::{
    Completion, Lease, LeaseMut, MemoryRef, PeerId, RailAddress, RegionId, RejectReason, RemoteRegion, Waker,
    Write,
};
use xfer_plan::{ReceiverRank, RegionIndex};

use crate::program::WriteId;
use crate::rail::{Done, Rail, RailError, RailLimits, RailWrite, Rows};

/// A warm-up writes this many bytes to each peer.
const WARM_UP_BYTES: u64 = 8;

/// How long a receiver's thread sleeps when nothing arrives: short enough to end promptly even where a provider has no
/// wait object to wake.
const IDLE_MAX: Duration = Duration::from_millis(250);

/// How long a receiver's thread polls after it was woken, before it sleeps again: long enough for the next segment of a
/// stream to arrive, short enough to leave the core to others soon.
const SPIN_MAX: Duration = Duration::from_micros(100);

/// Bytes that a software provider is given at once: eight times the bandwidth-delay product of 100 Gb/s over 160 us, and over
/// loopback TCP in WRITEs of 1 MiB a tenth faster than 128 MiB (6.3 against 5.4 GB/s on 2 cores of an EPYC).
const IN_FLIGHT_BYTES_MAX: u64 = 16 << 20;

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

/// The sender's side of a rail.
pub struct OfiRail {
    rail: efa_core::Rail,
    depth: u32,
    memories: Vec<(MemoryRef, RegionId)>,
    peers: BTreeMap<ReceiverRank, (PeerId, Vec<RemoteRegion>)>,
    batch: VecDeque<Write>,
    /// Beside `batch`: what a refused WRITE is turned back into.
    targets: VecDeque<(ReceiverRank, RegionIndex, u64)>,
    completions: Vec<Completion>,
}

impl OfiRail {
    /// Registers `memories`, connects to `peers`, and writes a few bytes to each: the first push finds every
    /// connection made, and a peer that cannot be reached is named before it.
    ///
    /// # Errors
    ///
    /// [`RailError`] naming the peer that could not be written to within `deadline`.
    pub fn connect(
        mut rail: efa_core::Rail,
        memories: &[MemoryRef],
        peers: BTreeMap<ReceiverRank, OfiPeer>,
        deadline: Duration,
    ) -> Result<Self, RailError> {
        let name = rail.name().to_owned();
        let failed = |reason: String| RailError { rail: name.clone(), reason };
        let memories = memories
            .iter()
            .map(|memory| {
                Ok((memory.clone(), rail.register(memory).map_err(|error| failed(error.to_string()))?))
            })
            .collect::<Result<Vec<_>, RailError>>()?;
        let mut connected = BTreeMap::new();
        let mut scratches = Vec::new();
        for (rank, peer) in peers {
            let to = rail.insert_peer(&peer.address).map_err(|error| failed(format!("{rank}: {error}")))?;
            scratches.push((rank, to, peer.scratch));
            connected.insert(rank, (to, peer.regions));
        }
        warm_up(&mut rail, &scratches, deadline).map_err(failed)?;
        Ok(Self {
            depth: rail.room(),
            rail,
            memories,
            peers: connected,
            batch: VecDeque::new(),
            targets: VecDeque::new(),
            completions: Vec::new(),
        })
    }

    fn error(&self, reason: String) -> RailError {
        RailError { rail: self.rail.name().to_owned(), reason }
    }

    /// A WRITE as libfabric takes it.
    fn prepare(&self, write: RailWrite<Lease>) -> Result<Write, Box<(RailWrite<Lease>, String)>> {
        let region =
            self.memories.iter().find(|(memory, _)| memory.ptr_eq(write.from.memory())).map(|(_, id)| *id);
        let target = self.peers.get(&write.to).and_then(|(peer, regions)| {
            let remote = regions.get(write.region.index())?;
            Some((*peer, remote.at(write.offset, write.from.len() as u64)))
        });
        match (region, target) {
            _ if write.rows.count != 1 => Err(Box::new((write, "a rail of libfabric takes one row".into()))),
            (Some(region), Some((to, Ok(remote)))) => Ok(Write {
                from: write.from,
                region,
                to,
                remote,
                immediate: None,
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

impl Rail for OfiRail {
    type Buffer = Lease;

    fn name(&self) -> String {
        self.rail.name().to_owned()
    }

    fn limits(&self) -> RailLimits {
        // Where the NIC moves the bytes, what is posted costs no cache.
        let in_flight_bytes_max = if self.rail.is_offloaded() { u64::MAX } else { IN_FLIGHT_BYTES_MAX };
        RailLimits { depth: self.depth, in_flight_bytes_max, takes_rows: false }
    }

    fn post(&mut self, writes: &mut VecDeque<RailWrite<Lease>>) -> Result<(), RailError> {
        let mut failed = None;
        while let Some(write) = writes.pop_front() {
            let target = (write.to, write.region, write.offset);
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
        while let (Some(write), Some((to, region, offset))) = (self.batch.pop_back(), self.targets.pop_back())
        {
            writes.push_front(RailWrite {
                id: WriteId::from_token(write.token),
                rows: Rows::one(write.from.len() as u32),
                from: write.from,
                to,
                region,
                offset,
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

    fn poll(&mut self, done: &mut Vec<Done<Lease>>) -> Result<(), RailError> {
        let polled = self.rail.poll(&mut self.completions);
        for completion in self.completions.drain(..) {
            match completion {
                Completion::Op { token, result, lease, .. } => {
                    if let Some(from) = lease.shared() {
                        let result = result.map(drop).map_err(|error| error.to_string());
                        done.push(Done { id: WriteId::from_token(token), from, result });
                    }
                }
                other => tracing::warn!(rail = self.rail.name(), ?other, "unasked"),
            }
        }
        polled.map(drop).map_err(|error| self.error(error.to_string()))
    }

    fn wait(&mut self, at_most: Duration) {
        if let Err(error) = self.rail.wait(at_most) {
            // Polling finds what there is; only the sleep is lost.
            tracing::debug!(rail = self.rail.name(), %error, "wait");
        }
    }

    fn close(self: Box<Self>) -> Result<(), RailError> {
        let name = self.rail.name().to_owned();
        match self.rail.close() {
            Ok(_) => Ok(()),
            Err(error) => Err(RailError { rail: name, reason: error.to_string() }),
        }
    }
}

/// Writes to every peer's scratch region and waits for all; the reason of the first that fails.
fn warm_up(
    rail: &mut efa_core::Rail,
    peers: &[(ReceiverRank, PeerId, RemoteRegion)],
    deadline: Duration,
) -> Result<(), String> {
    let buffer = LeaseMut::zeroed(WARM_UP_BYTES as usize).map_err(|error| error.to_string())?.freeze();
    let region = rail.register(buffer.memory()).map_err(|error| error.to_string())?;
    let began = Instant::now();
    let mut unposted: VecDeque<usize> = (0..peers.len()).collect();
    let mut waiting: Vec<bool> = vec![true; peers.len()];
    let mut completions = Vec::new();
    while let Some(owing) = waiting.iter().position(|waiting| *waiting) {
        while let Some(index) = unposted.pop_front() {
            let (rank, to, scratch) = peers[index];
            let remote =
                scratch.at(0, WARM_UP_BYTES).map_err(|error| format!("{rank}'s scratch region: {error}"))?;
            let write = Write {
                from: buffer.clone(),
                region,
                to,
                remote,
                immediate: None,
                delivery_complete: true,
                token: index as u64,
            };
            if let Err(rejected) = rail.write(write) {
                match rejected.reason {
                    RejectReason::Fatal(error) => return Err(format!("cannot write to {rank}: {error}")),
                    _ => {
                        unposted.push_front(index);
                        break;
                    }
                }
            }
        }
        let moved = rail.poll(&mut completions).map_err(|error| error.to_string())?;
        for completion in completions.drain(..) {
            if let Completion::Op { token, result, .. } = completion {
                let index = token as usize;
                if let Err(error) = result {
                    let rank =
                        peers.get(index).map_or_else(|| "a peer".into(), |(rank, ..)| rank.to_string());
                    return Err(format!("cannot write to {rank}: {error}"));
                }
                if let Some(waiting) = waiting.get_mut(index) {
                    *waiting = false;
                }
            }
        }
        if began.elapsed() > deadline {
            return Err(format!(
                "{} took no write within {deadline:?}; is its address reachable from here, are the ports open?",
                peers[owing].0
            ));
        }
        if moved == 0 {
            let _ = rail.wait(Duration::from_millis(1));
        }
    }
    rail.close_region(region).map(drop).map_err(|error| error.to_string())
}

/// The receiver's side: a thread that lets the provider make progress, without which writes to this rank stall. It
/// sleeps on the rail's wait object while nothing arrives, unless it is told to poll.
pub struct OfiTarget {
    stop: Arc<AtomicBool>,
    busy: Arc<AtomicBool>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
}

impl OfiTarget {
    /// Starts the thread. The rail's regions stay exposed until this is dropped.
    pub fn start(mut rail: efa_core::Rail) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let busy = Arc::new(AtomicBool::new(false));
        let waker = rail.waker();
        let (stopped, is_busy) = (stop.clone(), busy.clone());
        let thread = std::thread::Builder::new().name("target".into()).spawn(move || {
            let mut completions = Vec::new();
            let mut spin_until = Instant::now();
            while !stopped.load(Ordering::Relaxed) {
                match rail.poll(&mut completions) {
                    Ok(0) if is_busy.load(Ordering::Relaxed) || Instant::now() < spin_until => {}
                    Ok(0) => match rail.wait(IDLE_MAX) {
                        Ok(true) => spin_until = Instant::now() + SPIN_MAX,
                        Ok(false) => {}
                        Err(error) => tracing::debug!(%error, "wait"),
                    },
                    Ok(_) => {}
                    Err(error) => {
                        // The senders see their writes fail and say so; this end can only tell why.
                        tracing::error!(rail = rail.name(), %error, "poll");
                        return;
                    }
                }
                for completion in completions.drain(..) {
                    tracing::debug!(rail = rail.name(), ?completion);
                }
            }
        })?;
        Ok(Self { stop, busy, waker, thread: Some(thread) })
    }

    /// Polls without ever sleeping, while a version is in flight and there is a core for it: over loopback TCP on two free
    /// cores a receiver that sleeps between segments takes in little more than half of one that does not.
    pub fn busy_poll(&self, on: bool) {
        self.busy.store(on, Ordering::Relaxed);
        self.waker.wake();
    }
}

impl Drop for OfiTarget {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.waker.wake();
        if let Some(thread) = self.thread.take() {
            // It ends within `IDLE_MAX`; its rail closes the endpoint before the regions.
            let _ = thread.join();
        }
    }
}
