//! Physical cores and their SMT siblings, so that no two busy threads are pinned to one core.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::TopologyError;
use crate::cpu_set::{CPU_INDEX_MAX, CpuSet};
use crate::numa::cpu_list;
use crate::tree::Tree;

/// One physical core.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Core {
    /// Its SMT siblings: the CPUs that share it. Never empty, and no CPU is in two cores.
    pub cpus: CpuSet,
}

pub(crate) fn read(tree: &mut Tree) -> Result<Vec<Core>, TopologyError> {
    let dir = tree.sys("devices/system/cpu");
    let mut cores = Cores::default();
    for name in tree.names(&dir)? {
        let Some(Ok(cpu)) = name.strip_prefix("cpu").map(str::parse::<u32>) else {
            continue;
        };
        // A CPU that is offline has no such file.
        let siblings = dir.join(&name).join("topology/thread_siblings_list");
        if cpu <= CPU_INDEX_MAX
            && let Some(siblings) = tree.read(&siblings, cpu_list)
        {
            cores.add(siblings.iter().chain([cpu]));
        }
    }
    Ok(cores.list)
}

/// Cores so far, each CPU in one of them at most, whatever a file says.
#[derive(Default)]
pub(crate) struct Cores {
    pub(crate) list: Vec<Core>,
    seen: BTreeSet<u32>,
}

impl Cores {
    pub(crate) fn add(&mut self, cpus: impl Iterator<Item = u32>) {
        let cpus = CpuSet::of(cpus.filter(|&cpu| self.seen.insert(cpu)));
        if !cpus.is_empty() {
            self.list.push(Core { cpus });
        }
    }
}
