//! Which NICs and which CPU a rank takes when nobody names them: those that the topology of its host gives to its number
//! among the ranks there.
//!
//! [`choose`] is a function of a snapshot. It must never give a rank fewer NICs than the topology does: one that
//! libfabric does not offer is an error that names it.

use std::collections::BTreeSet;

use efa_core::{Hints, Library, Provider};
use topology::{CPU_INDEX_MAX, NumaIndex, Pairing, RdmaKind, Reason, Roots, Snapshot, pair};

use super::{Fabric, FabricError, is_rdma};
use crate::config::SessionConfig;

/// Ranks of one host: no more than a kernel has CPUs.
const LOCAL_RANKS_MAX: u32 = CPU_INDEX_MAX + 1;

/// A rank among those of its host.
#[derive(Debug, Clone, Copy)]
struct LocalRank {
    index: u32,
    count: u32,
}

/// What a rank takes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    /// NICs, as libfabric names their domains.
    nics: Vec<String>,
    /// For the thread of the rails. None if no CPU is known, or if there are too few for a core each: threads that share
    /// one are better moved about by the kernel.
    cpu: Option<usize>,
    /// The NUMA node of the NICs, or of the GPU.
    numa_node: Option<NumaIndex>,
    /// Why these NICs.
    reason: Reason,
}

/// Names the NICs and the CPU of a rank in `config`, where it names none and libfabric offers RDMA here.
pub(crate) fn place(
    config: &mut SessionConfig,
    local_rank: u32,
    local_ranks: u32,
) -> Result<(), FabricError> {
    let rank = LocalRank::new(local_rank, local_ranks)?;
    let providers: &[Provider] = match config.fabric {
        Fabric::Auto => &[Provider::Efa, Provider::Verbs],
        Fabric::Efa => &[Provider::Efa],
        Fabric::Verbs => &[Provider::Verbs],
        Fabric::Local | Fabric::Tcp | Fabric::Shm => return Ok(()),
    };
    if !config.nics.is_empty() {
        return Ok(());
    }
    // What libfabric lacks is said when the rails are opened.
    let Ok(library) = Library::open() else { return Ok(()) };
    let offer = providers.iter().find_map(|&provider| {
        let infos = library.infos(&Hints::new(provider)).ok().filter(|infos| !infos.is_empty())?;
        Some((provider, infos))
    });
    let Some((provider, infos)) = offer else { return Ok(()) };
    let snapshot = match Snapshot::read(&Roots::default()) {
        Ok(snapshot) => snapshot,
        Err(error) => {
            tracing::warn!(%error, "the topology of this host is unknown: NICs have to be named");
            return Ok(());
        }
    };
    let offered: Vec<&str> = infos.iter().map(|info| info.facts().domain.as_str()).collect();
    let Some(place) = choose(&snapshot, rank, provider, &offered)? else {
        tracing::warn!(%provider, "its NICs are not in the topology of this host: they have to be named");
        return Ok(());
    };
    place.log(rank);
    config.nics = place.nics;
    if config.cpus.is_empty() {
        config.cpus.extend(place.cpu);
    }
    Ok(())
}

/// The place of one rank on a host whose libfabric offers `offered` domains of an RDMA `provider`. None where the snapshot has
/// no hardware that such a provider drives.
///
/// With as many ranks as GPUs, rank `i` has the NICs of GPU `i` in the order of PCI addresses; otherwise all ranks have even
/// shares of the host's NICs.
fn choose(
    snapshot: &Snapshot,
    rank: LocalRank,
    provider: Provider,
    offered: &[&str],
) -> Result<Option<Place>, FabricError> {
    debug_assert!(is_rdma(provider));
    let mut host = snapshot.clone();
    let is_efa = provider == Provider::Efa;
    host.rdma_devices.retain(|device| device.pci.is_some() && (device.kind == RdmaKind::Efa) == is_efa);
    if host.rdma_devices.is_empty() {
        return Ok(None);
    }
    let Pairing { gpus, notes, .. } = pair(&host);
    let ranks = rank.count as usize;
    let all = if gpus.len() == ranks { gpus } else { Pairing::host_ranks(&host, ranks) };
    let Some(mine) = all.get(rank.index as usize) else { return Err(rank.not_there()) };
    if mine.nics.is_empty() {
        let notes = notes.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        return Err(FabricError::NoUsableNic { notes });
    }
    for note in &notes {
        tracing::info!(%note, "topology");
    }
    let nics = mine.nics.iter().map(|nic| domain_of(nic, provider, offered)).collect::<Result<_, _>>()?;
    let is_alone = |cpu: &u32| all.iter().filter(|other| other.rail_cpu == Some(*cpu)).count() == 1;
    let cpu = mine.rail_cpu.filter(is_alone).map(|cpu| cpu as usize);
    Ok(Some(Place { nics, cpu, numa_node: mine.numa_node, reason: mine.reason }))
}

/// libfabric's name of a NIC: `efa` writes `-rdm` behind the device's, `verbs` nothing.
fn domain_of(nic: &str, provider: Provider, offered: &[&str]) -> Result<String, FabricError> {
    let is_its = |domain: &&&str| **domain == nic || domain.strip_suffix("-rdm") == Some(nic);
    offered.iter().find(is_its).map(|domain| (*domain).to_owned()).ok_or_else(|| {
        let offered = Vec::from_iter(BTreeSet::from_iter(offered.iter().copied())).join(", ");
        FabricError::NicNotOffered { nic: nic.to_owned(), provider, offered }
    })
}

impl LocalRank {
    fn new(index: u32, count: u32) -> Result<Self, FabricError> {
        let rank = Self { index, count };
        if index < count && count <= LOCAL_RANKS_MAX { Ok(rank) } else { Err(rank.not_there()) }
    }

    fn not_there(self) -> FabricError {
        FabricError::NoSuchLocalRank { local_rank: self.index, local_ranks: self.count, max: LOCAL_RANKS_MAX }
    }
}

impl Place {
    fn log(&self, rank: LocalRank) {
        let Self { nics, cpu, numa_node, reason } = self;
        let LocalRank { index, count } = rank;
        if *reason == Reason::ByOrder || numa_node.is_none() {
            tracing::warn!(index, count, ?nics, ?cpu, %reason, "whether these NICs are near is not known");
        } else {
            tracing::info!(index, count, ?nics, ?cpu, %reason, "took NICs by the topology of this host");
        }
    }
}

#[cfg(test)]
mod tests;
