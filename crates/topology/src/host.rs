//! Facts about the whole host that decide whether memory can be registered and threads pinned.

use serde::Serialize;

use crate::TopologyError;
use crate::cpu_set::CpuSet;
use crate::numa::cpu_list;
use crate::tree::{Malformed, Parsed, Tree, number};

/// The host, and the limits of this process on it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Host {
    /// Its name.
    pub name: Option<String>,
    /// The kernel's release, for instance `6.1.0-18-amd64`.
    pub kernel_release: Option<String>,
    /// CPUs that are online.
    pub cpus_online: Option<CpuSet>,
    /// CPUs that this process may run on.
    pub cpus_allowed: Option<CpuSet>,
    /// All memory.
    pub memory_bytes: Option<u64>,
    /// Memory that a new process could have without swapping.
    pub memory_available_bytes: Option<u64>,
    /// How much memory this process may lock, and so register with a NIC (soft limit).
    pub locked_memory_max: Option<Limit>,
    /// Huge pages, one entry per page size, the smallest first.
    pub huge_pages: Vec<HugePages>,
}

/// A resource limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Limit {
    /// No limit.
    Unlimited,
    /// At most so many bytes.
    Bytes(u64),
}

/// The pool of one huge page size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct HugePages {
    /// Size of one page.
    pub page_bytes: u64,
    /// Pages in the pool.
    pub pages_total: Option<u64>,
    /// Pages that nothing uses.
    pub pages_free: Option<u64>,
}

pub(crate) fn read(tree: &mut Tree) -> Result<Host, TopologyError> {
    let (hostname, osrelease) = (tree.proc("sys/kernel/hostname"), tree.proc("sys/kernel/osrelease"));
    let (online, status) = (tree.sys("devices/system/cpu/online"), tree.proc("self/status"));
    let (meminfo, limits) = (tree.proc("meminfo"), tree.proc("self/limits"));
    Ok(Host {
        name: tree.text(&hostname),
        kernel_release: tree.text(&osrelease),
        cpus_online: tree.read(&online, cpu_list),
        cpus_allowed: tree.read(&status, cpus_allowed),
        memory_bytes: tree.read(&meminfo, |text| meminfo_bytes(text, "MemTotal")),
        memory_available_bytes: tree.read(&meminfo, |text| meminfo_bytes(text, "MemAvailable")),
        locked_memory_max: tree.read(&limits, locked_memory_max),
        huge_pages: huge_pages(tree)?,
    })
}

fn huge_pages(tree: &mut Tree) -> Result<Vec<HugePages>, TopologyError> {
    let dir = tree.sys("kernel/mm/hugepages");
    let mut pools = Vec::new();
    for name in tree.names(&dir)? {
        let kib = name.strip_prefix("hugepages-").and_then(|rest| rest.strip_suffix("kB")?.parse().ok());
        let Some(page_bytes) = kib.and_then(|kib: u64| kib.checked_mul(1024)) else {
            continue;
        };
        pools.push(HugePages {
            page_bytes,
            pages_total: tree.read(&dir.join(&name).join("nr_hugepages"), number),
            pages_free: tree.read(&dir.join(&name).join("free_hugepages"), number),
        });
    }
    Ok(pools)
}

/// `MemTotal:  24063852 kB`, with `Node 0 ` before it in a node's own file. The kernel's kB are 1024 bytes.
pub(crate) fn meminfo_bytes(text: &str, key: &str) -> Parsed<u64> {
    let expected = Malformed("lines such as \"MemTotal: 24063852 kB\"");
    let value = text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.split_whitespace().last() == Some(key)).then_some(value)
    });
    // An old kernel may lack a line; that is no fault of the file.
    let Some(value) = value else { return Ok(None) };
    let kib: u64 = value.trim().strip_suffix(" kB").and_then(|kib| kib.parse().ok()).ok_or(expected)?;
    kib.checked_mul(1024).map(Some).ok_or(expected)
}

/// The soft limit, the first column after the name.
fn locked_memory_max(text: &str) -> Parsed<Limit> {
    let expected = Malformed("a line \"Max locked memory  8388608  8388608  bytes\"");
    let line = text.lines().find_map(|line| line.strip_prefix("Max locked memory")).ok_or(expected)?;
    match line.split_whitespace().next() {
        Some("unlimited") => Ok(Some(Limit::Unlimited)),
        Some(bytes) => bytes.parse().map(|bytes| Some(Limit::Bytes(bytes))).map_err(|_| expected),
        None => Err(expected),
    }
}

fn cpus_allowed(text: &str) -> Parsed<CpuSet> {
    let line = text.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    line.map_or(Ok(None), |list| cpu_list(list.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_in_kibibytes() {
        let node = "Node 0 MemTotal:        4024532 kB\nNode 0 MemFree:         3879676 kB";
        assert_eq!(meminfo_bytes(node, "MemTotal"), Ok(Some(4024532 * 1024)));
        assert_eq!(meminfo_bytes(node, "MemAvailable"), Ok(None));
        assert!(meminfo_bytes("MemTotal: 5 pages", "MemTotal").is_err());
        assert!(meminfo_bytes("MemTotal: 18446744073709551615 kB", "MemTotal").is_err());
    }

    #[test]
    fn the_soft_limit_counts() {
        let line = |soft| {
            format!(
                "Limit  Soft Limit  Hard Limit  Units\nMax locked memory         {soft}    unlimited   bytes"
            )
        };
        assert_eq!(locked_memory_max(&line("8388608")), Ok(Some(Limit::Bytes(8388608))));
        assert_eq!(locked_memory_max(&line("unlimited")), Ok(Some(Limit::Unlimited)));
        assert!(locked_memory_max(&line("much")).is_err());
        assert!(locked_memory_max("").is_err());
    }
}
