//! Which machine a figure is from.

use serde::{Deserialize, Serialize};
use topology::{Roots, Snapshot};

/// Facts that a reader needs to compare figures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    cpu: String,
    cores: Option<usize>,
    memory_bytes: Option<u64>,
    kernel: Option<String>,
    libfabric: String,
}

impl Machine {
    pub(crate) fn read() -> anyhow::Result<Self> {
        let host = Snapshot::read(&Roots::default())?.host;
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let libfabric = match efa_core::Library::open() {
            Ok(library) => library.version().to_string(),
            Err(_) => "none".into(),
        };
        Ok(Self {
            cpu: model.map_or_else(|| "unknown CPU".into(), |(_, name)| name.to_owned()),
            cores: host.cpus_allowed.as_ref().map(topology::CpuSet::count),
            memory_bytes: host.memory_bytes,
            kernel: host.kernel_release,
            libfabric,
        })
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let cores = self.cores.map_or_else(|| "?".into(), |cores| cores.to_string());
        let gib = self.memory_bytes.map_or(0, |bytes| bytes >> 30);
        let kernel = self.kernel.as_deref().unwrap_or("?");
        write!(f, "{}, {cores} cores, {gib} GiB, Linux {kernel}, libfabric {}", self.cpu, self.libfabric)
    }
}
