//! Which way leads to each peer: by memory where both are on one host, else over rails. Here the ways are opened and connected,
//! and what leads where is written down.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use rendezvous::Peer;
use xfer_exec::cuda::{CudaPeer, CudaRail, CudaRailConfig, DeviceRail};
use xfer_exec::local::{LocalPeer, LocalRail, LocalSource};
use xfer_exec::ofi::OfiPeer;
use xfer_exec::program::Route;
use xfer_exec::{Rail, RailError, RailIndex};
use xfer_plan::{Op, Rank, ReceiverRank, TrainerRank, paired_rail};

use super::ConnectedRail;
use crate::config::SessionConfig;
use crate::endpoint::{Endpoint, LocalMemory, RailEndpoint};
use crate::error::Error;
use crate::fabric::{self, Fabric, FabricError, OpenRail};
use crate::gpu::Gpu;

/// Who looks for ways.
pub(super) struct Reach<'a> {
    pub(super) config: &'a SessionConfig,
    /// What it has said of itself.
    pub(super) here: &'a Endpoint,
    /// Where what it sends is on one, or goes by it.
    pub(super) gpu: Option<&'a Gpu>,
    pub(super) until: Instant,
}

/// Peers, by the way that leads to them, with the lengths of their regions.
#[derive(Default)]
pub(super) struct Ways {
    pub(super) local: BTreeMap<ReceiverRank, (LocalPeer, Vec<u64>)>,
    pub(super) device: BTreeMap<ReceiverRank, (CudaPeer, Vec<u64>)>,
    pub(super) fabric: BTreeMap<ReceiverRank, Vec<RailEndpoint>>,
    /// Who has two banks of regions, and whether they have changed places.
    pub(super) banks: Vec<(ReceiverRank, bool)>,
}

impl Reach<'_> {
    /// The ways to all that these operations write to.
    pub(super) fn ways(
        &self,
        ops: &[Op],
        peers: &[Peer],
        endpoints: Vec<Endpoint>,
    ) -> Result<Ways, FabricError> {
        let wanted: BTreeSet<ReceiverRank> = ops.iter().map(|op| op.to).collect();
        let mut ways = Ways::default();
        for (Peer { member, turned, .. }, peer) in peers.iter().zip(endpoints) {
            let Rank::Receiver(to) = *member else { continue };
            if !wanted.contains(&to) {
                continue;
            }
            if peer.stages {
                ways.banks.push((to, *turned));
            }
            self.choose(to, peer, &mut ways)?;
        }
        Ok(ways)
    }

    fn choose(&self, to: ReceiverRank, peer: Endpoint, ways: &mut Ways) -> Result<(), FabricError> {
        let name = || to.to_string();
        let same_host = fabric::same_host(&peer.host, &self.here.host);
        let memory = if self.gpu.is_some() { LocalMemory::Device } else { LocalMemory::Host };
        if self.config.fabric.allows_local()
            && same_host
            && let Some(local) = peer.local.as_ref().filter(|local| local.memory == memory)
        {
            let failed = |reason: String| FabricError::Local { peer: name(), reason };
            let bytes = local.region_bytes.clone();
            // A socket takes no timeout of 0.
            let left = self.until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            if let Some(gpu) = self.gpu {
                let peer = CudaPeer::open(gpu.device(), &local.doorman(), &bytes, left);
                ways.device.insert(to, (peer.map_err(|error| failed(error.to_string()))?, bytes));
            } else {
                let peer = LocalPeer::open(&local.doorman(), &bytes, left);
                ways.local.insert(to, (peer.map_err(|error| failed(error.to_string()))?, bytes));
            }
            return Ok(());
        }
        if self.config.fabric == Fabric::Local && !same_host {
            return Err(FabricError::NotLocal { peer: name() });
        }
        let provider = self.here.rails.first().map(|rail| rail.provider.as_str());
        let fits = |rail: &RailEndpoint| Some(rail.provider.as_str()) == provider && rail.scratch.is_some();
        if !peer.rails.is_empty() && peer.rails.iter().all(fits) {
            ways.fabric.insert(to, peer.rails);
            return Ok(());
        }
        let mut here = self.here.offers();
        if self.gpu.is_some() {
            here = format!("GPU memory, which reaches that of GPUs on the same host, and {here}");
        }
        let there = peer.offers();
        Err(FabricError::NothingInCommon { peer: name(), here, there })
    }
}

/// The rails so far, in their order, and where they lead.
#[derive(Default)]
pub(super) struct Routes {
    pub(super) connected: Vec<ConnectedRail>,
    pub(super) routes: BTreeMap<ReceiverRank, Route>,
}

impl Routes {
    pub(super) fn add_local<S: LocalSource>(
        &mut self,
        peers: BTreeMap<ReceiverRank, (LocalPeer, Vec<u64>)>,
    ) -> Vec<Box<dyn Rail<Buffer = S> + Send>> {
        if peers.is_empty() {
            return Vec::new();
        }
        let local = LocalRail::new(self.add_each(peers));
        self.connected.push(ConnectedRail { name: local.name(), theirs: BTreeMap::new() });
        vec![Box::new(local)]
    }

    pub(super) fn add_device(
        &mut self,
        gpu: &Gpu,
        peers: BTreeMap<ReceiverRank, (CudaPeer, Vec<u64>)>,
    ) -> Result<Vec<Box<DeviceRail>>, Error> {
        if peers.is_empty() {
            return Ok(Vec::new());
        }
        let rail = CudaRail::new(gpu.kernels(), self.add_each(peers), CudaRailConfig::default())?;
        self.connected.push(ConnectedRail { name: rail.name(), theirs: BTreeMap::new() });
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

    /// Connects every rail of a rank, all at once, each to its pair at every peer. A rank that passes on pairs as the trainer of its
    /// number does.
    pub(super) fn add_fabric<R: Send>(
        &mut self,
        opened: Vec<OpenRail>,
        from: TrainerRank,
        peers: BTreeMap<ReceiverRank, Vec<RailEndpoint>>,
        until: Instant,
        connect: impl Fn(efa_core::Rail, BTreeMap<ReceiverRank, OfiPeer>, Duration) -> Result<R, RailError> + Sync,
    ) -> Result<Vec<R>, FabricError> {
        if peers.is_empty() {
            return Ok(Vec::new());
        }
        let first = self.connected.len();
        let count = opened.len();
        for (to, theirs) in &peers {
            let region_bytes = theirs
                .first()
                .map_or_else(Vec::new, |rail| rail.regions.iter().map(|region| region.len).collect());
            let all = (first..first + count).map(|rail| RailIndex(rail as u16)).collect();
            self.routes.insert(*to, Route { rails: all, region_bytes });
        }
        let left = until.saturating_duration_since(Instant::now());
        let connect = |number: usize, opened: OpenRail| {
            let name = opened.rail.name().to_owned();
            let paired = || {
                peers.iter().map(|(to, theirs)| (*to, paired_rail(from, count, number, theirs.len()), theirs))
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
            self.connected.push(described);
        }
        Ok(rails)
    }

    /// The rails to each peer, in words: the first of them, and how many more there are.
    pub(super) fn in_words(&self) -> BTreeMap<ReceiverRank, String> {
        let words = |route: &Route| {
            let rails = route.rails.iter().filter_map(|rail| self.connected.get(rail.index()));
            let mut names = rails.map(|rail| rail.name.clone());
            let first = names.next().unwrap_or_default();
            match names.count() {
                0 => first,
                more => format!("{first} and {more} more"),
            }
        };
        self.routes.iter().map(|(to, route)| (*to, words(route))).collect()
    }
}
