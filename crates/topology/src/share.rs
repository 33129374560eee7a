//! Cores for rail threads: near a NIC, one SMT thread of a physical core each, and no core twice while there are enough.

use std::collections::BTreeSet;

use crate::Snapshot;
use crate::cpu_set::CpuSet;
use crate::numa::NumaIndex;

/// The cores of one NUMA node, or of the whole host where no node is known to have any.
struct Pool {
    node: Option<NumaIndex>,
    /// One CPU of each physical core, ascending.
    cores: Vec<u32>,
    /// Who has a share, as indices into the request.
    sharers: Vec<usize>,
}

/// An even share of cores for each of `nodes`, on its node. One whose node is unknown, or has no core that this process
/// may use, gets its share where most cores are left for each. The first core of a node, which interrupts and
/// housekeeping prefer, is left out if there are enough others.
///
/// Also says whether every CPU's siblings were known.
pub(crate) fn cores(snapshot: &Snapshot, nodes: &[Option<NumaIndex>]) -> (Vec<CpuSet>, bool) {
    let (cores, siblings_known) = physical_cores(snapshot);
    let mut pools = pools(snapshot, cores);
    let mut elsewhere = Vec::new();
    for (sharer, node) in nodes.iter().enumerate() {
        match pools.iter_mut().find(|pool| node.is_some() && pool.node == *node) {
            Some(pool) => pool.sharers.push(sharer),
            None => elsewhere.push(sharer),
        }
    }
    for sharer in elsewhere {
        // Of equal ones the first: `max_by` would take the last.
        let roomiest = pools.iter_mut().rev().max_by(|a, b| {
            (a.cores.len() * (b.sharers.len() + 1)).cmp(&(b.cores.len() * (a.sharers.len() + 1)))
        });
        if let Some(pool) = roomiest {
            pool.sharers.push(sharer);
        }
    }
    let mut shares = vec![CpuSet::default(); nodes.len()];
    for pool in &pools {
        let skipped = usize::from(pool.cores.len() > pool.sharers.len());
        let cores = &pool.cores[skipped..];
        for (at, &sharer) in pool.sharers.iter().enumerate() {
            let start = at * cores.len() / pool.sharers.len();
            let end = ((at + 1) * cores.len() / pool.sharers.len()).max(start + 1);
            shares[sharer] = CpuSet::of(cores[start..end].iter().copied());
        }
    }
    (shares, siblings_known)
}

/// One CPU, the lowest that this process may use, of every physical core that has one.
fn physical_cores(snapshot: &Snapshot) -> (BTreeSet<u32>, bool) {
    let host = &snapshot.host;
    let may_use = |cpu: &u32| {
        [&host.cpus_online, &host.cpus_allowed].into_iter().flatten().all(|cpus| cpus.contains(*cpu))
    };
    let of_nodes = snapshot.numa_nodes.iter().filter_map(|node| node.cpus.as_ref());
    let of_host = host.cpus_online.iter().chain(&host.cpus_allowed);
    let all: BTreeSet<u32> = of_nodes.chain(of_host).flat_map(CpuSet::iter).filter(may_use).collect();
    let mut cores: BTreeSet<u32> =
        snapshot.cores.iter().filter_map(|core| core.cpus.iter().find(may_use)).collect();
    let known: BTreeSet<u32> = snapshot.cores.iter().flat_map(|core| core.cpus.iter()).collect();
    let lone: Vec<u32> = all.difference(&known).copied().collect();
    cores.extend(&lone);
    (cores, lone.is_empty())
}

fn pools(snapshot: &Snapshot, cores: BTreeSet<u32>) -> Vec<Pool> {
    let mut pools: Vec<Pool> = Vec::new();
    for node in &snapshot.numa_nodes {
        let near = |cpu: &u32| node.cpus.as_ref().is_some_and(|cpus| cpus.contains(*cpu));
        let cores: Vec<u32> = cores.iter().copied().filter(near).collect();
        pools.push(Pool { node: Some(node.index), cores, sharers: Vec::new() });
    }
    pools.retain(|pool| !pool.cores.is_empty());
    if pools.is_empty() && !cores.is_empty() {
        pools.push(Pool { node: None, cores: cores.into_iter().collect(), sharers: Vec::new() });
    }
    pools
}
