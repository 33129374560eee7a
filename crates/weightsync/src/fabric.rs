//! Which way the bytes go: what this host has, and what both ends of a pair have.
//!
//! A choice is never changed in silence. `auto` takes shared memory for peers on the same host, and otherwise the best
//! libfabric provider here, which must be the peer's too. A host with RDMA NICs that libfabric cannot drive is an error
//! and not a slow push over TCP.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::{Duration, Instant};

use efa_core::{Hints, Info, InfoError, Library, Provider, Rail, RailConfig};
use topology::{Roots, Snapshot};
use xfer_plan::RailDecl;

use crate::config::SessionConfig;
use crate::device::Device;
use crate::endpoint::{Endpoint, RAILS_MAX};
use crate::gpu::Gpu;

mod place;

pub(crate) use place::place;

/// How to reach peers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Fabric {
    /// Per peer the best that both ends have.
    #[default]
    Auto,
    /// Shared memory; every peer must be on this host.
    Local,
    /// libfabric over TCP sockets: `tcp`, or `tcp;ofi_rxm` before libfabric 1.18.
    Tcp,
    /// libfabric's shared memory provider. For tests.
    Shm,
    /// AWS Elastic Fabric Adapter.
    Efa,
    /// InfiniBand or RoCE.
    Verbs,
}

impl Fabric {
    /// Every choice and its name.
    pub const ALL: [(Self, &'static str); 6] = [
        (Self::Auto, "auto"),
        (Self::Local, "local"),
        (Self::Tcp, "tcp"),
        (Self::Shm, "shm"),
        (Self::Efa, "efa"),
        (Self::Verbs, "verbs"),
    ];

    /// Whether its rails read and write GPU memory. Where they do not, it is staged through the host.
    pub(crate) fn reaches_gpus(self) -> bool {
        !matches!(self, Self::Tcp | Self::Shm)
    }

    /// Whether peers on this host may be reached by shared memory.
    pub(crate) fn allows_local(self) -> bool {
        matches!(self, Self::Auto | Self::Local)
    }
}

impl fmt::Display for Fabric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(fabric, _)| fabric == self).map_or("?", |(_, name)| name);
        f.write_str(name)
    }
}

impl FromStr for Fabric {
    type Err = FabricError;

    fn from_str(name: &str) -> Result<Self, FabricError> {
        let found = Self::ALL.iter().find(|(_, known)| *known == name).map(|(fabric, _)| *fabric);
        found.ok_or_else(|| FabricError::Unknown(name.to_owned()))
    }
}

/// Why there is no way to peers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FabricError {
    /// Not a fabric.
    #[error("unknown fabric '{0}'; choose one of auto, local, tcp, shm, efa, verbs")]
    Unknown(String),
    /// No libfabric, but one was asked for.
    #[error("{fabric} needs libfabric: {source}")]
    NoLibrary {
        /// What was asked for.
        fabric: Fabric,
        /// Where it was looked for.
        source: Box<efa_core::OpenError>,
    },
    /// libfabric has no such provider here.
    #[error("no {fabric} rail here: {source}")]
    NoProvider {
        /// What was asked for.
        fabric: Fabric,
        /// libfabric's answer.
        source: InfoError,
    },
    /// There are RDMA NICs, but this libfabric does not drive them.
    #[error(
        "this host has RDMA NICs ({devices}), but {library} drives none of them; install a libfabric with the efa or \
         verbs provider (on AWS the EFA installer's), or ask for the slow way by name: fabric tcp"
    )]
    NicsUnused {
        /// The NICs.
        devices: String,
        /// The library that was opened, or why none was.
        library: String,
    },
    /// More rails than a rank may have.
    #[error("{nics} NICs for one rank, more than {RAILS_MAX}; give each rank its own")]
    TooManyNics {
        /// How many.
        nics: usize,
    },
    /// Several RDMA NICs, and no word on which are this rank's.
    #[error(
        "libfabric offers {count} RDMA NICs here ({nics}), and nothing says which of them are this rank's: name them, or \
         this rank's number among the ranks of its host and how many these are"
    )]
    NicsUndecided {
        /// How many.
        count: usize,
        /// Their names.
        nics: String,
    },
    /// Not a rank that a host can have.
    #[error(
        "there is no local rank {local_rank} of {local_ranks}: they count from 0, and a host has at most {max}"
    )]
    NoSuchLocalRank {
        /// The rank.
        local_rank: u32,
        /// How many the host was said to have.
        local_ranks: u32,
        /// How many it may have.
        max: u32,
    },
    /// RDMA NICs, none of which can be used.
    #[error("no RDMA NIC of this host can be used: {notes}")]
    NoUsableNic {
        /// What is wrong with each.
        notes: String,
    },
    /// A NIC that belongs to this rank by the topology of its host, but not by libfabric.
    #[error(
        "{nic} belongs to this rank, but libfabric's {provider} does not offer it (only {offered}): give this process \
         its device (/dev/infiniband), with verbs an IP address too; or name the NICs to use"
    )]
    NicNotOffered {
        /// The device.
        nic: String,
        /// The provider.
        provider: Provider,
        /// What it offers.
        offered: String,
    },
    /// A rail did not open or connect.
    #[error("{0}")]
    Rail(String),
    /// The two ends have nothing in common.
    #[error("no common fabric with {peer}: here {here}, there {there}; choose the same fabric on both sides")]
    NothingInCommon {
        /// The peer.
        peer: String,
        /// What this rank has.
        here: String,
        /// What the peer has.
        there: String,
    },
    /// Shared memory with a peer on another host.
    #[error(
        "{peer} is on another host (or in another network namespace): shared memory cannot reach it; choose fabric tcp, efa or verbs"
    )]
    NotLocal {
        /// The peer.
        peer: String,
    },
    /// Shared memory failed.
    #[error("{peer}: {reason}")]
    Local {
        /// The peer, or this rank.
        peer: String,
        /// What happened.
        reason: String,
    },
    /// What a peer said of itself makes no sense.
    #[error("{peer} sent a malformed endpoint: {reason}")]
    Endpoint {
        /// The peer.
        peer: String,
        /// Why.
        reason: String,
    },
}

/// A libfabric rail of a rank, and its bandwidth where the NIC tells it.
pub(crate) struct OpenRail {
    pub(crate) rail: Rail,
    pub(crate) provider: Provider,
    pub(crate) link_bytes_per_second: Option<u64>,
}

/// Opens this rank's rails, on the NICs that were named or the only one. None where the fabric can do without: `local`,
/// and `auto` without a libfabric.
pub(crate) fn open(config: &SessionConfig, source: IpAddr) -> Result<Vec<OpenRail>, FabricError> {
    let fabric = config.fabric;
    if config.nics.len() > RAILS_MAX {
        return Err(FabricError::TooManyNics { nics: config.nics.len() });
    }
    let on_gpu = config.device != Device::Cpu;
    let providers: &[fn(&Library) -> Provider] = match fabric {
        Fabric::Local => return Ok(Vec::new()),
        Fabric::Auto if on_gpu => &[|_| Provider::Efa, |_| Provider::Verbs],
        Fabric::Auto => &[|_| Provider::Efa, |_| Provider::Verbs, Library::tcp_provider],
        Fabric::Tcp => &[Library::tcp_provider],
        Fabric::Shm => &[|_| Provider::Shm],
        Fabric::Efa => &[|_| Provider::Efa],
        Fabric::Verbs => &[|_| Provider::Verbs],
    };
    let library = match Library::open() {
        Ok(library) => library,
        Err(error) if fabric == Fabric::Auto => {
            refuse_idle_nics("no libfabric")?;
            tracing::info!(%error, "no libfabric: only peers on this host can be reached");
            return Ok(Vec::new());
        }
        Err(error) => {
            return Err(FabricError::NoLibrary { fabric, source: Box::new(error) });
        }
    };
    let mut missing = None;
    for provider in providers {
        let provider = provider(&library);
        if fabric == Fabric::Auto && !is_rdma(provider) {
            refuse_idle_nics(&format!("libfabric {} at {}", library.version(), library.path().display()))?;
        }
        match find(&library, provider, config, source) {
            Ok(infos) => return take(provider, config, infos)?.iter().map(open_rail).collect(),
            Err(error) => missing = Some(error),
        }
    }
    if fabric == Fabric::Auto && on_gpu {
        refuse_idle_nics(&format!("libfabric {} at {}", library.version(), library.path().display()))?;
        tracing::info!(?missing, "no RDMA NIC reaches GPU memory: only GPUs of this host can be reached");
        return Ok(Vec::new());
    }
    match missing {
        Some(source) => Err(FabricError::NoProvider { fabric, source }),
        None => Err(FabricError::Rail(format!("libfabric has no {fabric} rail here"))),
    }
}

/// Whether a provider drives RDMA NICs.
fn is_rdma(provider: Provider) -> bool {
    matches!(provider, Provider::Efa | Provider::Verbs)
}

/// What a provider has for each of the NICs that were named, in their order; or all that it has.
fn find(
    library: &Library,
    provider: Provider,
    config: &SessionConfig,
    source: IpAddr,
) -> Result<Vec<Info>, InfoError> {
    let has_ip = matches!(provider, Provider::Tcp | Provider::TcpRxm);
    let on_gpu = config.device != Device::Cpu && config.fabric.reaches_gpus();
    if config.nics.is_empty() {
        let hints = Hints::new(provider).device_memory(on_gpu);
        let hints = if has_ip { hints.source(config.bind.unwrap_or(source)) } else { hints };
        return library.infos(&hints);
    }
    let mut infos = Vec::with_capacity(config.nics.len());
    for nic in &config.nics {
        let hints = Hints::new(provider).domain(nic.clone()).device_memory(on_gpu);
        let hints = match config.bind.filter(|_| has_ip) {
            Some(address) => hints.source(address),
            None => hints,
        };
        infos.extend(library.infos(&hints)?.into_iter().next());
    }
    Ok(infos)
}

/// What to open of what was found: a rail for each NIC that was named, or one. Which of several RDMA NICs that is, is not
/// decided by the order in which libfabric lists them: every rank of the host would take the same.
fn take(provider: Provider, config: &SessionConfig, mut infos: Vec<Info>) -> Result<Vec<Info>, FabricError> {
    if !config.nics.is_empty() {
        return Ok(infos);
    }
    let nics: BTreeSet<&str> = infos.iter().map(|info| info.facts().domain.as_str()).collect();
    if is_rdma(provider) && nics.len() > 1 {
        let (count, nics) = (nics.len(), Vec::from_iter(nics).join(", "));
        return Err(FabricError::NicsUndecided { count, nics });
    }
    infos.truncate(1);
    Ok(infos)
}

/// The rails of a manifest: their bandwidth as given, the NIC's, the GPU's, or a memory copy's.
pub(crate) fn declare(config: &SessionConfig, opened: &[OpenRail], gpu: Option<&Gpu>) -> Vec<RailDecl> {
    let declare = |link: Option<u64>| {
        let memory = || gpu.map_or_else(copy_bytes_per_second, Gpu::link_bytes_per_second);
        let bytes_per_second = config.rail_bytes_per_second.or(link).unwrap_or_else(memory);
        RailDecl { bytes_per_second }
    };
    match opened {
        [] => vec![declare(None)],
        opened => opened.iter().map(|opened| declare(opened.link_bytes_per_second)).collect(),
    }
}

/// WRITEs that may be on their way at once to a rank that is told of each, because it passes them on: 128 of as many senders, each
/// with a rail to this one. Where a NIC counts on that room it takes a completion queue of 1 MiB.
const IMMEDIATES_MAX: u32 = 128 * 128;

fn open_rail(info: &Info) -> Result<OpenRail, FabricError> {
    let mut config = RailConfig::for_info(info);
    if is_rdma(info.provider()) {
        config.immediates_max = IMMEDIATES_MAX;
    }
    let rail = Rail::open(info, &config).map_err(|error| FabricError::Rail(error.to_string()))?;
    tracing::info!(rail = rail.name(), "opened");
    Ok(OpenRail {
        rail,
        provider: info.provider(),
        link_bytes_per_second: info
            .facts()
            .link_bits_per_second
            .map(|bits| bits / 8)
            .filter(|bytes| *bytes > 0),
    })
}

/// An error when this host has RDMA NICs: what was opened so far does not use them.
fn refuse_idle_nics(library: &str) -> Result<(), FabricError> {
    // A /sys that cannot be read names no NIC.
    let Ok(snapshot) = Snapshot::read(&Roots::default()) else {
        return Ok(());
    };
    let nics: Vec<_> = snapshot.rdma_devices.iter().filter(|device| device.pci.is_some()).collect();
    if nics.is_empty() {
        return Ok(());
    }
    let devices = nics.iter().map(|device| device.name.clone()).collect::<Vec<_>>().join(", ");
    Err(FabricError::NicsUnused { devices, library: library.to_owned() })
}

/// What a host is called whose identity cannot be read.
const UNKNOWN_HOST: &str = "unknown";

/// Names this host and its network namespace.
pub(crate) fn host_identity() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    let namespace = std::fs::read_link("/proc/self/ns/net");
    match (boot, namespace) {
        (Ok(boot), Ok(namespace)) if !boot.trim().is_empty() => {
            format!("{} {}", boot.trim(), namespace.display())
        }
        _ => UNKNOWN_HOST.into(),
    }
}

/// Whether two ranks can share memory.
pub(crate) fn same_host(here: &str, there: &str) -> bool {
    here == there && here != UNKNOWN_HOST
}

/// Whether this process may run on so many `cores` for itself and each of the `peers` that are on this host: then its rail
/// threads poll without sleeping. Peers that it exchanges nothing with are not known to it and not counted.
pub(crate) fn cores_each(cores: usize, here: &str, peers: &[Endpoint]) -> bool {
    let neighbours = peers.iter().filter(|peer| same_host(here, &peer.host)).count();
    std::thread::available_parallelism().is_ok_and(|all| all.get() >= cores * (neighbours + 1))
}

/// What one thread of this host copies per second: the bandwidth of a rail that is a memory copy. The median over spans
/// of 1 MiB, walking through more memory than one core's caches: a rank that loses the core now and then still measures
/// the copy and not its neighbours. Takes some milliseconds.
pub(crate) fn copy_bytes_per_second() -> u64 {
    const SPAN_BYTES: usize = 1 << 20;
    const SPANS: usize = 16;
    const ROUNDS: usize = 4;
    let (source, mut target) = (vec![1_u8; SPANS * SPAN_BYTES], vec![2_u8; SPANS * SPAN_BYTES]);
    let mut times = Vec::with_capacity(SPANS * ROUNDS);
    for _ in 0..ROUNDS {
        for (source, target) in source.chunks(SPAN_BYTES).zip(target.chunks_mut(SPAN_BYTES)) {
            let began = Instant::now();
            target.copy_from_slice(std::hint::black_box(source));
            times.push(began.elapsed());
            std::hint::black_box(target);
        }
    }
    times.sort_unstable();
    let median = times.get(times.len() / 2).map_or(1.0, Duration::as_secs_f64);
    (SPAN_BYTES as f64 / median.max(1e-9)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_fabrics_agree() {
        for (fabric, name) in Fabric::ALL {
            assert_eq!(name.parse::<Fabric>().unwrap(), fabric);
            assert_eq!(fabric.to_string(), name);
        }
        let error = "rdma".parse::<Fabric>().unwrap_err().to_string();
        assert!(error.contains("'rdma'") && error.contains("efa"), "{error}");
    }

    #[test]
    fn a_copy_takes_time() {
        let rate = copy_bytes_per_second();
        assert!(rate > 1 << 20 && rate < 1 << 50, "{rate}");
    }
}
