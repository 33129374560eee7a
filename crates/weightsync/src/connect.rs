//! From a plan to rails: which way leads to each inference rank, opened, connected and warm.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use efa_core::{LeaseMut, MemoryRef};
use rendezvous::{Fence, Peer, Planned, PlannedPart, RendezvousError, Verify};
use weight_ops::cuda::DeviceRange;
use xfer_exec::arrivals::Arrivals;
use xfer_exec::cuda::{CudaRailConfig, GpuMemory, GpuMemoryConfig};
use xfer_exec::driver::{Driver, HostRail, RelayMemory, Sender, ThreadConfig};
use xfer_exec::ofi::{DeviceOfiRail, OfiRail, for_nics};
use xfer_exec::{Program, RailUse, RankLimits};
use xfer_plan::{Op, OpKind, ParamId, ReceiverRank, RelayPlan, TrainerRank};

use crate::config::SessionConfig;
use crate::endpoint::Endpoint;
use crate::error::Error;
use crate::fabric::{self, FabricError, OpenRail};
use crate::gpu::Gpu;
use crate::memory::Exposed;
use crate::pusher::Pusher;
use crate::relay::{Passer, Relay};
use crate::verify::Outgoing;

mod driving;
mod ways;

use driving::{Rails, STALL_DIVISOR};
use ways::{Reach, Routes, Ways};

/// Everything that is needed to get from a plan to a trainer's rails.
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

/// Everything that is needed to get from a plan to the rails of an inference rank that passes on.
pub(crate) struct PassingOn {
    pub(crate) config: SessionConfig,
    pub(crate) endpoint: Endpoint,
    /// Where its rails bind to, if it needs any of its own.
    pub(crate) bind: IpAddr,
    /// What trainers write to, of equal length: a push is passed on from one of them.
    pub(crate) arenas: Vec<Exposed>,
    pub(crate) arrivals: Arrivals,
    pub(crate) verify: Verify,
    pub(crate) relay: RelayPlan,
    pub(crate) names: BTreeMap<ParamId, String>,
    pub(crate) peers: Vec<Peer>,
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

/// What the plan's peers say of themselves.
pub(crate) fn decode_peers(peers: &[Peer]) -> Result<Vec<Endpoint>, FabricError> {
    peers
        .iter()
        .map(|Peer { member, endpoint, .. }| Endpoint::decode(&member.to_string(), endpoint))
        .collect()
}

/// Which rails inference ranks have to close: those over which bytes may still come that were given up on. A kernel goes
/// on sending what a TCP socket has taken, and a network may hold what a NIC has sent.
pub(crate) fn fences(rails: &[ConnectedRail], used: &[RailUse]) -> Vec<Fence> {
    let fences = rails.iter().zip(used).flat_map(|(rail, used)| {
        used.unfinished.iter().filter_map(|at| Some(Fence { at: *at, rail: *rail.theirs.get(at)? }))
    });
    fences.collect()
}

/// Not all of the deadline: the rail and the peer are named before the controller gives up on this rank.
fn connected_by(deadline: Duration) -> Instant {
    Instant::now() + deadline * 3 / 4
}

/// The engine's deadline. Half: it fails, drains and says which peer is to blame before the controller gives up on this rank.
fn writing_deadline(deadline: Duration) -> Duration {
    deadline / 2
}

/// Binds a plan to rails, with the banks of those who have two.
fn with_banks(mut program: Program, banks: Vec<(ReceiverRank, bool)>) -> Result<Program, Error> {
    for (to, turned) in banks {
        program = program.with_banks(to, turned)?;
    }
    Ok(program)
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
        let until = connected_by(self.config.deadline);
        let endpoints = decode_peers(&planned.peers)?;
        let busy_poll = fabric::cores_each(1, &self.endpoint.host, &endpoints);
        let reach = Reach { config: &self.config, here: &self.endpoint, gpu: self.gpu.as_deref(), until };
        let Ways { local, device, fabric, banks } = reach.ways(&plan.ops, &planned.peers, endpoints)?;
        let (config, region_bytes, progress) =
            (self.config.clone(), self.region_bytes.clone(), self.progress.clone());
        let mut routes = Routes::default();
        // A staging slot holds the longest operation that is staged, and all slots together the watermark. Rails within a host take
        // rows as they are: without other rails and without transforms nothing is staged.
        let all = self.stages_all();
        let staged = |op: &Op| if all { op.bytes() } else { op.staged_bytes() };
        let slot_bytes = plan.ops.iter().map(staged).max().unwrap_or(0);
        let transforms = plan.ops.iter().any(|op| op.kind() == OpKind::Transform);
        let stages = all || transforms || !fabric.is_empty();
        let staged_bytes = if stages { self.staged_bytes(slot_bytes)? } else { 0 };
        let rails = match self.gpu.clone() {
            Some(gpu) if self.offloaded => {
                let local = routes.add_device(&gpu, device)?;
                // They are told of staging memory alone, when it is there.
                let connect = |rail, peers, left| DeviceOfiRail::connect(rail, &[], peers, left);
                let over_nics = routes.add_fabric(self.opened, rank, fabric, until, connect)?;
                Rails::Offloaded { local, over_nics, gpu }
            }
            Some(gpu) if all => {
                let staging = LeaseMut::new(gpu.pinned(staged_bytes)?);
                let memories = [staging.memory().clone()];
                let connect = |rail, peers, left| OfiRail::connect(rail, &memories, peers, left);
                let rails = routes.add_fabric(self.opened, rank, fabric, until, connect)?;
                Rails::Staged { rails: boxed(rails), staging, gpu }
            }
            Some(gpu) => {
                // NICs are told of it only where there are any.
                let regions = self.device_memories.iter().filter(|_| !fabric.is_empty());
                let memories: Vec<_> = regions.map(for_nics).collect::<Result<_, _>>()?;
                let local = routes.add_device(&gpu, device)?;
                let connect = |rail, peers, left| DeviceOfiRail::connect(rail, &memories, peers, left);
                let over_nics = routes.add_fabric(self.opened, rank, fabric, until, connect)?;
                Rails::Device { local, over_nics, gpu }
            }
            None => {
                let staging = LeaseMut::zeroed(usize::try_from(staged_bytes).unwrap_or(usize::MAX));
                let staging = staging.map_err(|error| no_staging(error.to_string()))?;
                let mut memories = self.memories;
                memories.push(staging.memory().clone());
                let mut rails = routes.add_local(local);
                let connect = |rail, peers, left| OfiRail::connect(rail, &memories, peers, left);
                rails.extend(boxed(routes.add_fabric(self.opened, rank, fabric, until, connect)?));
                Rails::Host { rails, staging }
            }
        };
        let described = routes.in_words();
        let Routes { connected, routes } = routes;
        let limits = RankLimits { region_bytes, slot_bytes, transforms: true };
        let outgoing = Outgoing::new(planned.verify, &plan.ops, &names, progress.clone())?;
        let bind = if all { Program::staged } else { Program::new };
        let program = bind(plan, names, &limits, routes)?.with_quantization(&quant, &limits)?;
        let outgoing = outgoing.map(|outgoing| outgoing.quantising(program.quantization()));
        let program = with_banks(program, banks)?;
        let thread = ThreadConfig { name: rank.to_string(), busy_poll, cpus: config.cpus, progress };
        let deadline = writing_deadline(config.deadline);
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
}

impl PassingOn {
    /// As [`Connecting::connect`]. It sends from where it is written to, over rails of its own.
    pub(crate) fn connect(self) -> Result<Relay, Error> {
        let Self { config, endpoint, bind, arenas, arrivals, verify, relay, names, peers, progress } = self;
        let (rank, until) = (TrainerRank(config.rank), connected_by(config.deadline));
        let endpoints = decode_peers(&peers)?;
        // Beside the thread that receives.
        let busy_poll = fabric::cores_each(2, &endpoint.host, &endpoints);
        let on_gpu = arenas.iter().find_map(Exposed::on_gpu);
        let reach = Reach { config: &config, here: &endpoint, gpu: on_gpu.map(|(gpu, _)| &**gpu), until };
        let Ways { local, device, fabric, banks } = reach.ways(&relay.plan.ops, &peers, endpoints)?;
        let opened = if fabric.is_empty() { Vec::new() } else { fabric::open(&config, bind)? };
        let region_bytes = vec![arenas.first().map_or(0, Exposed::len)];
        let limits = RankLimits { region_bytes, slot_bytes: 0, transforms: false };
        let outgoing = Outgoing::new(verify, &relay.plan.ops, &names, progress.clone())?.map(Arc::new);
        let deadline = writing_deadline(config.deadline);
        let stall = deadline / STALL_DIVISOR;
        // It shares no core with the thread that receives, which has those that were chosen.
        let thread =
            ThreadConfig { name: format!("relay {}", config.rank), busy_poll, cpus: Vec::new(), progress };
        let mut routes = Routes::default();
        let (passer, connected) = if let Some((gpu, _)) = on_gpu {
            let memories = arenas.iter().filter_map(Exposed::on_gpu).filter(|_| !fabric.is_empty());
            let memories: Vec<_> = memories.map(|(_, range)| for_nics(range)).collect::<Result<_, _>>()?;
            let mut rails = routes.add_device(gpu, device)?;
            let connect = |rail, peers, left| DeviceOfiRail::connect(rail, &memories, peers, left);
            let over_nics = routes.add_fabric(opened, rank, fabric, until, connect)?;
            rails.extend(over_nics.into_iter().map(|rail| Box::new(rail) as Box<_>));
            let Routes { connected, routes } = routes;
            let program = with_banks(Program::relay(relay, names, &limits, routes)?, banks)?;
            let nothing_staged = GpuMemoryConfig {
                staging_bytes: 0,
                slot_bytes: 0,
                multiprocessors: CudaRailConfig::default().multiprocessors,
                close_max: deadline,
            };
            let memory = GpuMemory::new(gpu.kernels(), &program, nothing_staged, Some(arrivals))?;
            let driver = Driver::over(memory, program, rails, deadline, stall);
            (Passer::Device(Sender::drive(driver, thread)?), connected)
        } else {
            let memories: Vec<_> =
                arenas.iter().filter_map(Exposed::in_host).map(|to| to.memory().clone()).collect();
            let mut rails = routes.add_local(local);
            let connect = |rail, peers, left| OfiRail::connect(rail, &memories, peers, left);
            let over_nics = routes.add_fabric(opened, rank, fabric, until, connect)?;
            rails.extend(over_nics.into_iter().map(|rail| Box::new(rail) as Box<_>));
            let Routes { connected, routes } = routes;
            let program = with_banks(Program::relay(relay, names, &limits, routes)?, banks)?;
            let driver = Driver::over(RelayMemory::new(arrivals, deadline), program, rails, deadline, stall);
            (Passer::Host(Sender::drive(driver, thread)?), connected)
        };
        Ok(Relay::new(passer, connected, outgoing))
    }
}

fn boxed(rails: Vec<OfiRail>) -> Vec<HostRail> {
    rails.into_iter().map(|rail| Box::new(rail) as HostRail).collect()
}

fn no_staging(reason: String) -> Error {
    Error::Memory { what: "staging", reason }
}
