//! From a plan to rails: which way leads to each inference rank, opened, connected and warm.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use efa_core::{LeaseMut, MemoryRef};
use rendezvous::{Peer, Planned, PlannedPart, RendezvousError};
use xfer_exec::driver::{DriverConfig, HostRail, Sender, ThreadConfig};
use xfer_exec::local::{Attached, LocalRail, fetch};
use xfer_exec::ofi::{OfiPeer, OfiRail};
use xfer_exec::program::Route;
use xfer_exec::{Program, RailIndex, RankLimits};
use xfer_plan::{Op, OpKind, Rank, ReceiverRank, TrainerRank, paired_rail};

use crate::config::SessionConfig;
use crate::endpoint::{Endpoint, RailEndpoint};
use crate::error::Error;
use crate::fabric::{self, Fabric, FabricError, OpenRail};
use crate::verify::Outgoing;

/// A rail that holds writes back for this part of the sender's deadline is given up, if other rails reach the receiver.
const STALL_DIVISOR: u32 = 5;

/// Everything that is needed to get from a plan to rails.
pub(crate) struct Connecting {
    pub(crate) config: SessionConfig,
    pub(crate) endpoint: Endpoint,
    pub(crate) opened: Vec<OpenRail>,
    pub(crate) memories: Vec<MemoryRef>,
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
    pub(crate) sender: Sender,
    pub(crate) rails: Vec<ConnectedRail>,
    /// The rails to each inference rank, in words.
    pub(crate) routes: BTreeMap<ReceiverRank, String>,
    /// What to hash, where the job verifies.
    pub(crate) outgoing: Option<Outgoing>,
}

enum Way {
    Local(Vec<Attached>, Vec<u64>),
    Fabric(Vec<RailEndpoint>),
}

/// The rails so far, and where they lead.
#[derive(Default)]
struct Rails {
    rails: Vec<HostRail>,
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
        let (mut by_fabric, mut by_memory) = (BTreeMap::new(), BTreeMap::new());
        let mut banks = Vec::new();
        for (Peer { member, turned, .. }, peer) in planned.peers.iter().zip(peers) {
            let Rank::Receiver(to) = *member else { continue };
            if peer.stages {
                banks.push((to, *turned));
            }
            match self.choose(to, peer, until)? {
                Way::Local(attached, bytes) => drop(by_memory.insert(to, (attached, bytes))),
                Way::Fabric(rails) => drop(by_fabric.insert(to, rails)),
            }
        }
        // A staging slot holds the longest operation that is staged, and all slots together the watermark. Shared memory takes rows as
        // they are: without another fabric and without transforms nothing is staged.
        let slot_bytes = plan.ops.iter().map(Op::staged_bytes).max().unwrap_or(0);
        let transforms = plan.ops.iter().any(|op| op.kind() == OpKind::Transform);
        let staging = self.staging(if by_fabric.is_empty() && !transforms { 0 } else { slot_bytes })?;
        let (config, region_bytes, progress) =
            (self.config.clone(), self.region_bytes.clone(), self.progress.clone());
        let mut rails = Rails::default();
        rails.add_local(by_memory);
        self.add_fabric(rank, by_fabric, &staging, until, &mut rails)?;
        let Rails { rails, connected, routes } = rails;
        let described = routes.iter().map(|(to, route)| (*to, in_words(route, &connected))).collect();
        // Half: it fails, drains and says which peer is to blame before the controller gives up on this trainer.
        let deadline = config.deadline / 2;
        let limits = RankLimits { region_bytes, slot_bytes, transforms: true };
        // Where a job verifies nothing is transformed: what is sent is what stands at the source.
        let outgoing = Outgoing::new(planned.verify, &plan.ops, &names, progress.clone())?;
        let mut program = Program::new(plan, names, &limits, routes)?.with_quantization(&quant, &limits)?;
        for (to, turned) in banks {
            program = program.with_banks(to, turned)?;
        }
        let stall = deadline / STALL_DIVISOR;
        let driver = DriverConfig { program, rails, staging, slot_bytes, deadline, stall };
        let thread = ThreadConfig { name: rank.to_string(), busy_poll, cpus: config.cpus, progress };
        let sender = Sender::start(driver, thread)?;
        Ok(Connected { sender, rails: connected, routes: described, outgoing })
    }

    /// Staging memory: the watermark, if anything is staged at all.
    fn staging(&self, slot_bytes: u64) -> Result<LeaseMut, Error> {
        let watermark_bytes = self.config.watermark_bytes;
        if slot_bytes > watermark_bytes {
            let reason = format!(
                "the plan stages {slot_bytes} bytes at once, more than the watermark of {watermark_bytes}; raise it or shorten \
                 the chunks"
            );
            return Err(Error::Memory { what: "staging", reason });
        }
        let bytes = if slot_bytes == 0 { 0 } else { watermark_bytes };
        LeaseMut::zeroed(usize::try_from(bytes).unwrap_or(usize::MAX))
            .map_err(|error| Error::Memory { what: "staging", reason: error.to_string() })
    }

    /// Connects every rail of this rank, all at once, each to its pair at every peer.
    fn add_fabric(
        self,
        trainer: TrainerRank,
        peers: BTreeMap<ReceiverRank, Vec<RailEndpoint>>,
        staging: &LeaseMut,
        until: Instant,
        rails: &mut Rails,
    ) -> Result<(), FabricError> {
        if peers.is_empty() {
            return Ok(());
        }
        let mut memories = self.memories;
        memories.push(staging.memory().clone());
        let first = rails.rails.len();
        let count = self.opened.len();
        for (to, theirs) in &peers {
            let region_bytes = theirs
                .first()
                .map_or_else(Vec::new, |rail| rail.regions.iter().map(|region| region.len).collect());
            let all = (first..first + count).map(|rail| RailIndex(rail as u16)).collect();
            rails.routes.insert(*to, Route { rails: all, region_bytes });
        }
        let left = until.saturating_duration_since(Instant::now());
        let connect = |number: usize, opened: OpenRail| {
            let name = opened.rail.name().to_owned();
            let paired = || {
                peers
                    .iter()
                    .map(|(to, theirs)| (*to, paired_rail(trainer, count, number, theirs.len()), theirs))
            };
            let peer = |(to, at, theirs): (ReceiverRank, usize, &Vec<RailEndpoint>)| {
                let RailEndpoint { address, regions, scratch, .. } = theirs.get(at)?.clone();
                Some((to, OfiPeer { address, regions, scratch: scratch? }))
            };
            let theirs = paired().map(|(to, at, _)| (to, at as u16)).collect();
            let connected =
                OfiRail::connect(opened.rail, &memories, paired().filter_map(peer).collect(), left);
            connected.map(|rail| (rail, ConnectedRail { name, theirs }))
        };
        let connected = std::thread::scope(|scope| {
            let connect = &connect;
            let rails = self.opened.into_iter().enumerate();
            let threads: Vec<_> = rails.map(|(at, rail)| scope.spawn(move || connect(at, rail))).collect();
            threads.into_iter().map(|thread| thread.join()).collect::<Vec<_>>()
        });
        for one in connected {
            let one = one.map_err(|_| FabricError::Rail("defect: a thread that connects panicked".into()))?;
            let (rail, described) = one.map_err(|error| FabricError::Rail(error.to_string()))?;
            rails.rails.push(Box::new(rail));
            rails.connected.push(described);
        }
        Ok(())
    }

    /// The way to one peer.
    fn choose(&self, to: ReceiverRank, peer: Endpoint, until: Instant) -> Result<Way, FabricError> {
        let name = || to.to_string();
        let same_host = fabric::same_host(&peer.host, &self.endpoint.host);
        if self.config.fabric.allows_local()
            && same_host
            && let Some(local) = &peer.local
        {
            let failed = |error: xfer_exec::local::LocalError| FabricError::Local {
                peer: name(),
                reason: error.to_string(),
            };
            let attach = |(region, bytes): (u32, &u64)| {
                // A socket takes no timeout of 0.
                let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
                let file = fetch(&local.doorman(), region, left)?;
                Attached::new(&file, region, *bytes)
            };
            let attached =
                (0..).zip(&local.region_bytes).map(attach).collect::<Result<_, _>>().map_err(failed)?;
            return Ok(Way::Local(attached, local.region_bytes.clone()));
        }
        if self.config.fabric == Fabric::Local && !same_host {
            return Err(FabricError::NotLocal { peer: name() });
        }
        let provider = self.opened.first().map(|here| here.provider.name());
        let fits = |rail: &RailEndpoint| Some(rail.provider.as_str()) == provider && rail.scratch.is_some();
        if !peer.rails.is_empty() && peer.rails.iter().all(fits) {
            return Ok(Way::Fabric(peer.rails));
        }
        let (here, there) = (self.endpoint.offers(), peer.offers());
        Err(FabricError::NothingInCommon { peer: name(), here, there })
    }
}

impl Rails {
    fn add_local(&mut self, peers: BTreeMap<ReceiverRank, (Vec<Attached>, Vec<u64>)>) {
        if peers.is_empty() {
            return;
        }
        let rail = RailIndex(self.rails.len() as u16);
        let mut attached = BTreeMap::new();
        for (to, (memory, region_bytes)) in peers {
            self.routes.insert(to, Route { rails: vec![rail], region_bytes });
            attached.insert(to, memory);
        }
        let local = LocalRail::new(attached);
        self.connected.push(ConnectedRail { name: xfer_exec::Rail::name(&local), theirs: BTreeMap::new() });
        self.rails.push(Box::new(local));
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
