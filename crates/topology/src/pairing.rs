//! GPUs, or ranks on host memory, with the NICs and the cores that serve them. A function of the snapshot alone: nothing
//! is read and nothing is pinned here.
//!
//! What the snapshot does not know is not guessed: without a PCI tree GPUs and NICs are paired by order, evenly, and
//! [`Assignment::reason`] says so.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::Snapshot;
use crate::cpu_set::CpuSet;
use crate::meet::meet;
use crate::nics::{self, Nic, Note};
use crate::numa::NumaIndex;
use crate::pci::PciAddress;
use crate::place::{Place, Places};
use crate::share;

/// Every GPU with its NICs and cores.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Pairing {
    /// One entry for every GPU, in the snapshot's order.
    pub gpus: Vec<Assignment>,
    /// What was left out or assumed.
    pub notes: Vec<Note>,
}

/// What serves one GPU, or one rank on host memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Assignment {
    /// The GPU; `None` for a rank on host memory.
    pub gpu: Option<PciAddress>,
    /// Names of its NICs, in the snapshot's order. Others may share them where there are fewer NICs than takers.
    pub nics: Vec<String>,
    /// CPUs for its threads, one of each physical core, near its NICs. No other assignment has them while there are
    /// enough. Empty only if no CPU is known.
    pub cores: CpuSet,
    /// The CPU of its rail thread: the lowest of `cores`.
    pub rail_cpu: Option<u32>,
    /// The NUMA node of its NICs; where they are on several or none is known, its GPU's.
    pub numa_node: Option<NumaIndex>,
    /// Why these NICs: what is true of the farthest.
    pub reason: Reason,
}

/// How NICs were chosen; the nearest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// Behind the same PCI switch.
    SameSwitch,
    /// Below the same host bridge, on a host that has several.
    SameHostBridge,
    /// On the same NUMA node.
    SameNumaNode,
    /// On another NUMA node: all nearer ones serve other GPUs, or there are none.
    OtherNumaNode,
    /// Nothing is known that tells NICs apart.
    ByOrder,
    /// A rank on host memory: an even share of the host's NICs.
    EvenShare,
    /// There is no NIC that could be used.
    NoNic,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SameSwitch => "same PCI switch",
            Self::SameHostBridge => "same host bridge",
            Self::SameNumaNode => "same NUMA node",
            Self::OtherNumaNode => "another NUMA node: none nearer is free",
            Self::ByOrder => "by order: the PCI tree says nothing",
            Self::EvenShare => "an even share of the host's NICs",
            Self::NoNic => "no usable NIC",
        })
    }
}

impl Serialize for Reason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Pairs every GPU with the NICs that are nearest in the PCI tree, evenly, and gives each an even share of the cores
/// on its NICs' NUMA node.
///
/// NICs are the RDMA devices with hardware behind them, or on a host without any the plain network devices; those
/// without a link and those slower than the fastest are left out, and noted. Every usable NIC serves a GPU, and with
/// fewer NICs than GPUs several share one.
pub fn pair(snapshot: &Snapshot) -> Pairing {
    let places = Places::of(snapshot);
    let (nics, mut notes) = nics::usable(snapshot);
    let nic_paths: Vec<Vec<Place>> = nics.iter().map(|nic| places.path(Some(nic.pci))).collect();
    let gpu_paths: Vec<Vec<Place>> = snapshot.gpus.iter().map(|gpu| places.path(Some(&gpu.pci))).collect();
    let nics_of = meet(&gpu_paths, &nic_paths);
    let nodes: Vec<Option<NumaIndex>> = gpu_paths
        .iter()
        .zip(&nics_of)
        .map(|(path, of_gpu)| common_node(of_gpu.iter().map(|&nic| node(&nic_paths[nic]))).or(node(path)))
        .collect();
    let (cores, siblings_known) = share::cores(snapshot, &nodes);
    if !siblings_known {
        notes.push(Note::SiblingsUnknown);
    }
    let many_host_bridges = has_many_host_bridges(gpu_paths.iter().chain(&nic_paths));
    let gpus = snapshot.gpus.iter().zip(&gpu_paths).zip(nics_of).zip(nodes.into_iter().zip(cores));
    let gpus = gpus.map(|(((gpu, path), of_gpu), (numa_node, cores))| Assignment {
        gpu: Some(gpu.pci.address),
        nics: names(&nics, &of_gpu),
        rail_cpu: cores.first(),
        cores,
        numa_node,
        reason: {
            let reasons = of_gpu.iter().map(|&nic| reason(path, &nic_paths[nic], many_host_bridges));
            reasons.max().unwrap_or(Reason::NoNic)
        },
    });
    Pairing { gpus: gpus.collect(), notes }
}

impl Pairing {
    /// `ranks` ranks on host memory of one host: the usable NICs, node by node, cut into even runs, and an even share
    /// of the cores on their NUMA node. With more ranks than NICs several share one.
    pub fn host_ranks(snapshot: &Snapshot, ranks: usize) -> Vec<Assignment> {
        let places = Places::of(snapshot);
        let (nics, _) = nics::usable(snapshot);
        let mut order: Vec<(Option<NumaIndex>, usize)> =
            nics.iter().enumerate().map(|(nic, of)| (node(&places.path(Some(of.pci))), nic)).collect();
        // Those whose node is unknown come last.
        order.sort_by_key(|&(node, nic)| (node.is_none(), node, nic));
        let run = |rank: usize| {
            let start = rank * order.len() / ranks;
            let end = ((rank + 1) * order.len() / ranks).max(start + 1);
            order.get(start..end).unwrap_or(&[])
        };
        let nodes: Vec<Option<NumaIndex>> =
            (0..ranks).map(|rank| common_node(run(rank).iter().map(|&(node, _)| node))).collect();
        let (cores, _) = share::cores(snapshot, &nodes);
        let shares = nodes.into_iter().zip(cores).enumerate();
        let assignments = shares.map(|(rank, (numa_node, cores))| Assignment {
            gpu: None,
            nics: names(&nics, &run(rank).iter().map(|&(_, nic)| nic).collect::<Vec<_>>()),
            rail_cpu: cores.first(),
            cores,
            numa_node,
            reason: if nics.is_empty() { Reason::NoNic } else { Reason::EvenShare },
        });
        assignments.collect()
    }
}

fn names(nics: &[Nic<'_>], indices: &[usize]) -> Vec<String> {
    indices.iter().map(|&nic| nics[nic].name.to_owned()).collect()
}

/// The node on a way down.
fn node(path: &[Place]) -> Option<NumaIndex> {
    path.iter().find_map(|place| match place {
        Place::NumaNode(node) => Some(*node),
        _ => None,
    })
}

/// The node that all of them are on.
fn common_node(mut nodes: impl Iterator<Item = Option<NumaIndex>>) -> Option<NumaIndex> {
    let first = nodes.next()??;
    nodes.all(|node| node == Some(first)).then_some(first)
}

/// One host bridge for everything, as most virtual machines have it, tells nothing apart.
fn has_many_host_bridges<'a>(paths: impl Iterator<Item = &'a Vec<Place>>) -> bool {
    let mut host_bridges = paths.flatten().filter(|place| matches!(place, Place::HostBridge(_)));
    let first = host_bridges.next();
    host_bridges.any(|other| Some(other) != first)
}

fn reason(gpu: &[Place], nic: &[Place], many_host_bridges: bool) -> Reason {
    let shared = gpu.iter().zip(nic).take_while(|(a, b)| a == b).map(|(place, _)| place);
    match shared.last() {
        Some(Place::Bridge(_)) => Reason::SameSwitch,
        Some(Place::HostBridge(_)) if many_host_bridges => Reason::SameHostBridge,
        Some(_) if node(gpu).is_some() => Reason::SameNumaNode,
        None if node(gpu).is_some() && node(nic).is_some() => Reason::OtherNumaNode,
        _ => Reason::ByOrder,
    }
}
