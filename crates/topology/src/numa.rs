//! NUMA nodes: which CPUs and how much memory are near each other.

use std::fmt;

use serde::Serialize;

use crate::TopologyError;
use crate::cpu_set::CpuSet;
use crate::host::meminfo_bytes;
use crate::tree::{Malformed, Parsed, Tree};

/// The kernel's number of a NUMA node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct NumaIndex(pub u32);

impl fmt::Display for NumaIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One NUMA node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct NumaNode {
    /// Its number.
    pub index: NumaIndex,
    /// Its CPUs; empty for a node of memory alone.
    pub cpus: Option<CpuSet>,
    /// All its memory.
    pub memory_bytes: Option<u64>,
    /// Its memory that nothing uses, caches counted as use.
    pub memory_free_bytes: Option<u64>,
}

pub(crate) fn read(tree: &mut Tree) -> Result<Vec<NumaNode>, TopologyError> {
    let dir = tree.sys("devices/system/node");
    let mut nodes = Vec::new();
    for name in tree.names(&dir)? {
        let Some(Ok(index)) = name.strip_prefix("node").map(str::parse) else {
            continue;
        };
        let (node, meminfo) = (dir.join(&name), dir.join(&name).join("meminfo"));
        nodes.push(NumaNode {
            index: NumaIndex(index),
            cpus: tree.read(&node.join("cpulist"), cpu_list),
            memory_bytes: tree.read(&meminfo, |text| meminfo_bytes(text, "MemTotal")),
            memory_free_bytes: tree.read(&meminfo, |text| meminfo_bytes(text, "MemFree")),
        });
    }
    Ok(nodes)
}

pub(crate) fn cpu_list(text: &str) -> Parsed<CpuSet> {
    text.parse().map(Some).map_err(|_| Malformed("a list of CPUs such as 0-47,96-143"))
}

/// A device's `numa_node`: the kernel writes -1 where it does not know.
pub(crate) fn index_or_none(text: &str) -> Parsed<NumaIndex> {
    if text == "-1" {
        return Ok(None);
    }
    text.parse().map(|index| Some(NumaIndex(index))).map_err(|_| Malformed("a NUMA node or -1"))
}
