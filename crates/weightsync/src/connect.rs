//! From a plan to rails: which way leads to each inference rank, opened, connected and warm.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use efa_core::{LeaseMut, MemoryRef};
use rendezvous::{Peer, Planned, PlannedPart, RendezvousError};
use weight_ops::cuda::DeviceRange;
use xfer_exec::cuda::{CudaPeer, CudaRail, CudaRailConfig, DeviceRail};
use xfer_exec::driver::{HostRail, ThreadConfig};
use xfer_exec::local::{Attached, LocalError, LocalRail, fetch};
use xfer_exec::ofi::{DeviceOfiRail, OfiPeer, OfiRail, for_nics};
use xfer_exec::program::Route;
use xfer_exec::{Program, RailError, RailIndex, RankLimits};
use xfer_plan::{Op, OpKind, Rank, ReceiverRank, TrainerRank, paired_rail};

use crate::config::SessionConfig;
use crate::endpoint::{Endpoint, LocalMemory, RailEndpoint};
use crate::error::Error;
use crate::fabric::{self, Fabric, FabricError, OpenRail};
use crate::gpu::Gpu;
use crate::pusher::Pusher;
use crate::verify::Outgoing;

mod driving;

use driving::Rails;

/// Everything that is needed to get from a plan to rails.
pub(crate) struct Connecting {
    pub(crate) config: SessionConfig,
    pub(crate) endpoint: Endpoint,
    pub(crate) opened: Vec<OpenRail>,
    pub(crate) memories: Vec<MemoryRef>,
    /// Where the weights are on one, or go by it; on it they are here, in place of `memories`.
    pub(crate) gpu: Option<Arc<Gpu>>,
    pub(crate) device_memories: Vec<DeviceRange>,
    /// Whether they are in host memory and go by the GPU.
    pub(crate) offloaded: bool,
    pub(crate) region_bytes: Vec<u64>,
    pub(crate) progress: Arc<AtomicU64>,
}

/// A rail of the sender.
#[derive(Debug, Clone)]
pub(crate) struct ConnectedRail {
    pub(crate) name: String,
    /// The rail of each inference rank that it leads to.
    pub(crate) theirs: BTreeMap<ReceiverRank, u16>,
}

/// A sender, and where it leads.
pub(crate) struct Connected {
    pub(crate) pusher: Pusher,
    pub(crate) rails: Vec<ConnectedRail>,
    /// The rails to each inference rank, in words.
    pub(crate) routes: BTreeMap<ReceiverRank, String>,
    /// What to hash, where the job verifies.
    pub(crate) outgoing: Option<Outgoing>,
}

enum Way {
    Local(Vec<Attached>, Vec<u64>),
    Device(CudaPeer, Vec<u64>),
    Fabric(Vec<RailEndpoint>),
}

/// The rails so far, in their order, and where they lead.
#[derive(Default)]
struct Routes {
    connected: Vec<ConnectedRail>,
    routes: BTreeMap<ReceiverRank, Route>,
}

/// What the plan's peers say of themselves.
pub(crate) fn decode_peers(peers: &[Peer]) -> Result<Vec<Endpoint>, FabricError> {
    peers
        .iter()
        .map(|Peer { member, endpoint, .. }| Endpoint::decode(&member.to_string(), endpoint))
        .collect()
}

impl Connecting {
    /// Blocks while it attaches, connects and warms up.
    pub(crate) fn connect(self, rank: TrainerRank, planned: Planned) -> Result<Connected, Error> {
        let PlannedPart::Trainer { plan, names, quant } = planned.part else {
            return Err(Error::Rendezvous(RendezvousError::Unexpected {
                expected: "a trainer's part of the plan",
                found: "an inference rank's".into(),
            }));
        };
        // Not all of it: the rail and the peer are named before the controller gives up on this rank.
        let until = Instant::now() + self.config.deadline * 3 / 4;
        let peers = decode_peers(&planned.peers)?;
        let busy_poll = fabric::a_core_each(&self.endpoint.host, &peers);
        let (mut by_fabric, mut by_memory, mut by_device) =
            (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let mut banks = Vec::new();
        for (Peer { member, turned, .. }, peer) in planned.peers.iter().zip(peers) {
            let Rank::Receiver(to) = *member else { continue };
            if peer.stages {
                banks.push((to, *turned));
            }
            match self.choose(to, peer, until)? {
                Way::Local(attached, bytes) => drop(by_memory.insert(to, (attached, bytes))),
                Way::Device(peer, bytes) => drop(by_device.insert(to, (peer, bytes))),
                Way::Fabric(rails) => drop(by_fabric.insert(to, rails)),
            }
        }
        let (config, region_bytes, progress) =
            (self.config.clone(), self.region_bytes.clone(), self.progress.clone());
        let mut routes = Routes::default();
        // A staging slot holds the longest operation that is staged, and all slots together the watermark. Rails within a host take
        // rows as they are: without other rails and without transforms nothing is staged.
        let all = self.stages_all();
        let staged = |op: &Op| if all { op.bytes() } else { op.staged_bytes() };
        let slot_bytes = plan.ops.iter().map(staged).max().unwrap_or(0);
        let transforms = plan.ops.iter().any(|op| op.kind() == OpKind::Transform);
        let stages = all || transforms || !by_fabric.is_empty();
        let staged_bytes = if stages { self.staged_bytes(slot_bytes)? } else { 0 };
        let rails = match self.gpu.clone() {
            Some(gpu) if self.offloaded => {
                let local = routes.add_device(&gpu, by_device)?;
                // They are told of staging memory alone, when it is there.
                let connect = |rail, peers, left| DeviceOfiRail::connect(rail, &[], peers, left);
                let over_nics = add_fabric(self.opened, rank, by_fabric, until, &mut routes, connect)?;
                Rails::Offloaded { local, over_nics, gpu }
            }
            Some(gpu) if all => {
                let staging = LeaseMut::new(gpu.pinned(staged_bytes)?);
                let memories = [staging.memory().clone()];
                let connect = |rail, peers, left| OfiRail::connect(rail, &memories, peers, left);
                let rails = add_fabric(self.opened, rank, by_fabric, until, &mut routes, connect)?;
                Rails::Staged { rails: boxed(rails), staging, gpu }
            }
            Some(gpu) => {
                // NICs are told of it only where there are any.
                let regions = self.device_memories.iter().filter(|_| !by_fabric.is_empty());
                let memories: Vec<_> = regions.map(for_nics).collect::<Result<_, _>>()?;
                let local = routes.add_device(&gpu, by_device)?;
                let connect = |rail, peers, left| DeviceOfiRail::connect(rail, &memories, peers, left);
                let over_nics = add_fabric(self.opened, rank, by_fabric, until, &mut routes, connect)?;
                Rails::Device { local, over_nics, gpu }
            }
            None => {
                let staging = LeaseMut::zeroed(usize::try_from(staged_bytes).unwrap_or(usize::MAX));
                let staging = staging.map_err(|error| no_staging(error.to_string()))?;
                let mut memories = self.memories;
                memories.push(staging.memory().clone());
                let mut rails = routes.add_local(by_memory);
                let connect = |rail, peers, left| OfiRail::connect(rail, &memories, peers, left);
                rails.extend(boxed(add_fabric(self.opened, rank, by_fabric, until, &mut routes, connect)?));
                Rails::Host { rails, staging }
            }
        };
        let Routes { connected, routes } = routes;
        let described = routes.iter().map(|(to, route)| (*to, in_words(route, &connected))).collect();
        // Half: it fails, drains and says which peer is to blame before the controller gives up on this trainer.
        let deadline = config.deadline / 2;
        let limits = RankLimits { region_bytes, slot_bytes, transforms: true };
        // Where a job verifies nothing is transformed: what is sent is what stands at the source.
        let outgoing = Outgoing::new(planned.verify, &plan.ops, &names, progress.clone())?;
        let bind = if all { Program::staged } else { Program::new };
        let mut program = bind(plan, names, &limits, routes)?.with_quantization(&quant, &limits)?;
        for (to, turned) in banks {
            program = program.with_banks(to, turned)?;
        }
        let thread = ThreadConfig { name: rank.to_string(), busy_poll, cpus: config.cpus, progress };
        let pusher = rails.drive(program, (staged_bytes, slot_bytes), deadline, thread)?;
        Ok(Connected { pusher, rails: connected, routes: described, outgoing })
    }

    /// Whether its rails cannot read where its weights are.
    fn stages_all(&self) -> bool {
        self.offloaded || (self.gpu.is_some() && !self.config.fabric.reaches_gpus())
    }

    /// Bytes of staging memory: the watermark, if anything is staged at all.
    fn staged_bytes(&self, slot_bytes: u64) -> Result<u64, Error> {
        let watermark_bytes = self.config.watermark_bytes;
        if slot_bytes > watermark_bytes {
            return Err(no_staging(format!(
                "the plan stages {slot_bytes} bytes at once, more than the watermark of {watermark_bytes}; raise it or shorten \
                 the chunks"
            )));
        }
        Ok(if slot_bytes == 0 { 0 } else { watermark_bytes })
    }

    /// The way to one peer.
    fn choose(&self, to: ReceiverRank, peer: Endpoint, until: Instant) -> Result<Way, FabricError> {
        let name = || to.to_string();
        let same_host = fabric::same_host(&peer.host, &self.endpoint.host);
        let memory = if self.gpu.is_some() { LocalMemory::Device } else { LocalMemory::Host };
        if self.config.fabric.allows_local()
            && same_host
            && let Some(local) = peer.local.as_ref().filter(|local| local.memory == memory)
        {
            let failed = |reason: String| FabricError::Local { peer: name(), reason };
            let bytes = local.region_bytes.clone();
            // A socket takes no timeout of 0.
            let left = || until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            if let Some(gpu) = &self.gpu {
                let peer = CudaPeer::open(gpu.device(), &local.doorman(), &bytes, left());
                return Ok(Way::Device(peer.map_err(|error| failed(error.to_string()))?, bytes));
            }
            let attach = |(region, bytes): (u32, &u64)| {
                let file = fetch(&local.doorman(), region, left())?;
                Attached::new(&file, region, *bytes)
            };
            let attached = (0..).zip(&bytes).map(attach).collect::<Result<_, LocalError>>();
            return Ok(Way::Local(attached.map_err(|error| failed(error.to_string()))?, bytes));
        }
        if self.config.fabric == Fabric::Local && !same_host {
            return Err(FabricError::NotLocal { peer: name() });
        }
        let provider = self.opened.first().map(|here| here.provider.name());
        let fits = |rail: &RailEndpoint| Some(rail.provider.as_str()) == provider && rail.scratch.is_some();
        if !peer.rails.is_empty() && peer.rails.iter().all(fits) {
            return Ok(Way::Fabric(peer.rails));
        }
        let mut here = self.endpoint.offers();
        if self.gpu.is_some() {
            here = format!("GPU memory, which reaches that of GPUs on the same host, and {here}");
        }
        let there = peer.offers();
        Err(FabricError::NothingInCommon { peer: name(), here, there })
    }
}

fn boxed(rails: Vec<OfiRail>) -> Vec<HostRail> {
    rails.into_iter().map(|rail| Box::new(rail) as HostRail).collect()
}

fn no_staging(reason: String) -> Error {
    Error::Memory { what: "staging", reason }
}

/// Connects every rail of a rank, all at once, each to its pair at every peer.
fn add_fabric<R: Send>(
    opened: Vec<OpenRail>,
    trainer: TrainerRank,
    peers: BTreeMap<ReceiverRank, Vec<RailEndpoint>>,
    until: Instant,
    routes: &mut Routes,
    connect: impl Fn(efa_core::Rail, BTreeMap<ReceiverRank, OfiPeer>, Duration) -> Result<R, RailError> + Sync,
) -> Result<Vec<R>, FabricError> {
    if peers.is_empty() {
        return Ok(Vec::new());
    }
    let first = routes.connected.len();
    let count = opened.len();
    for (to, theirs) in &peers {
        let region_bytes = theirs
            .first()
            .map_or_else(Vec::new, |rail| rail.regions.iter().map(|region| region.len).collect());
        let all = (first..first + count).map(|rail| RailIndex(rail as u16)).collect();
        routes.routes.insert(*to, Route { rails: all, region_bytes });
    }
    let left = until.saturating_duration_since(Instant::now());
    let connect = |number: usize, opened: OpenRail| {
        let name = opened.rail.name().to_owned();
        let paired = || {
            peers.iter().map(|(to, theirs)| (*to, paired_rail(trainer, count, number, theirs.len()), theirs))
        };
        let peer = |(to, at, theirs): (ReceiverRank, usize, &Vec<RailEndpoint>)| {
            let RailEndpoint { address, regions, scratch, .. } = theirs.get(at)?.clone();
            Some((to, OfiPeer { address, regions, scratch: scratch? }))
        };
        let theirs = paired().map(|(to, at, _)| (to, at as u16)).collect();
        let connected = connect(opened.rail, paired().filter_map(peer).collect(), left);
        connected.map(|rail| (rail, ConnectedRail { name, theirs }))
    };
    let connected = std::thread::scope(|scope| {
        let connect = &connect;
        let rails = opened.into_iter().enumerate();
        let threads: Vec<_> = rails.map(|(at, rail)| scope.spawn(move || connect(at, rail))).collect();
        threads.into_iter().map(|thread| thread.join()).collect::<Vec<_>>()
    });
    let mut rails = Vec::new();
    for one in connected {
        let one = one.map_err(|_| FabricError::Rail("defect: a thread that connects panicked".into()))?;
        let (rail, described) = one.map_err(|error| FabricError::Rail(error.to_string()))?;
        rails.push(rail);
        routes.connected.push(described);
    }
    Ok(rails)
}

impl Routes {
    fn add_local(&mut self, peers: BTreeMap<ReceiverRank, (Vec<Attached>, Vec<u64>)>) -> Vec<HostRail> {
        if peers.is_empty() {
            return Vec::new();
        }
        let local = LocalRail::new(self.add_each(peers));
        let name = xfer_exec::Rail::name(&local);
        self.connected.push(ConnectedRail { name, theirs: BTreeMap::new() });
        vec![Box::new(local)]
    }

    fn add_device(
        &mut self,
        gpu: &Gpu,
        peers: BTreeMap<ReceiverRank, (CudaPeer, Vec<u64>)>,
    ) -> Result<Vec<Box<DeviceRail>>, Error> {
        if peers.is_empty() {
            return Ok(Vec::new());
        }
        let rail = CudaRail::new(gpu.kernels(), self.add_each(peers), CudaRailConfig::default())?;
        let name = xfer_exec::Rail::name(&rail);
        self.connected.push(ConnectedRail { name, theirs: BTreeMap::new() });
        Ok(vec![Box::new(rail)])
    }

    /// Peers that the next rail leads to, with the lengths of their regions.
    fn add_each<P>(&mut self, peers: BTreeMap<ReceiverRank, (P, Vec<u64>)>) -> BTreeMap<ReceiverRank, P> {
        let rail = RailIndex(self.connected.len() as u16);
        let add = |(to, (peer, region_bytes))| {
            self.routes.insert(to, Route { rails: vec![rail], region_bytes });
            (to, peer)
        };
        peers.into_iter().map(add).collect()
    }
}

/// The first rail of a route, and how many more there are.
fn in_words(route: &Route, rails: &[ConnectedRail]) -> String {
    let mut names =
        route.rails.iter().filter_map(|rail| rails.get(rail.index())).map(|rail| rail.name.clone());
    let first = names.next().unwrap_or_default();
    match names.count() {
        0 => first,
        more => format!("{first} and {more} more"),
    }
}
