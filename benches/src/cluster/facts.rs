//! What a rank's host has: read here, and told to rank 0, so that a figure never stands without its machine.

use std::collections::BTreeSet;

use efa_core::{Hints, Library, Provider};
use serde::{Deserialize, Serialize};
use topology::{Roots, Snapshot};

use crate::machine::Machine;

/// The commit that this program was built from, where the build said it.
pub(crate) const COMMIT: Option<&str> = option_env!("WEIGHTSYNC_COMMIT");

/// What decides how fast a host is, without what differs between equal hosts: two runs on equal hosts can be compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct HostKind {
    #[serde(flatten)]
    pub(crate) machine: Machine,
    /// Models, as many times as there are GPUs.
    pub(crate) gpus: Vec<String>,
    pub(crate) nvidia_driver: Option<String>,
    pub(crate) nics: Vec<Nic>,
    /// What libfabric offers.
    pub(crate) rails: Vec<RailOffer>,
}

/// A network card that is up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Nic {
    pub(crate) name: String,
    /// 10^9 bits a second of all its ports; `None` where the driver does not say.
    pub(crate) gigabits_per_second: Option<f64>,
    pub(crate) driver_version: Option<String>,
}

/// A provider of libfabric on one NIC.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct RailOffer {
    pub(crate) provider: String,
    pub(crate) domain: String,
    pub(crate) bits_per_second: Option<u64>,
}

/// A rank and its host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct RankFacts {
    pub(crate) host: String,
    pub(crate) local_rank: Option<u32>,
    pub(crate) version: String,
    pub(crate) commit: Option<String>,
    pub(crate) kind: HostKind,
    /// Memory that a new process could have. Not part of the kind: it changes by the minute.
    pub(crate) memory_available_bytes: Option<u64>,
    /// Everything that `topology` read.
    pub(crate) topology: serde_json::Value,
}

impl RankFacts {
    pub(crate) fn read(local_rank: Option<u32>) -> anyhow::Result<Self> {
        let snapshot = Snapshot::read(&Roots::default())?;
        Ok(Self {
            host: snapshot.host.name.clone().unwrap_or_else(|| "unknown host".into()),
            local_rank,
            version: env!("CARGO_PKG_VERSION").into(),
            commit: COMMIT.map(str::to_owned),
            memory_available_bytes: snapshot.host.memory_available_bytes,
            kind: HostKind {
                machine: Machine::read()?,
                gpus: snapshot
                    .gpus
                    .iter()
                    .map(|gpu| gpu.model.clone().unwrap_or("NVIDIA GPU".into()))
                    .collect(),
                nvidia_driver: snapshot.nvidia_driver_version.clone(),
                nics: nics(&snapshot),
                rails: rails(),
            },
            topology: serde_json::to_value(&snapshot)?,
        })
    }
}

/// RDMA devices, and network devices with hardware that are up; where there is no hardware, whatever is up.
fn nics(snapshot: &Snapshot) -> Vec<Nic> {
    let rdma = snapshot.rdma_devices.iter().map(|device| {
        let speeds: Vec<f64> = device.ports.iter().filter_map(|port| port.gigabits_per_second).collect();
        Nic {
            name: device.name.clone(),
            gigabits_per_second: (!speeds.is_empty()).then(|| speeds.iter().sum()),
            driver_version: device.driver_version.clone(),
        }
    });
    let up = || snapshot.net_devices.iter().filter(|device| device.name != "lo" && device.is_up());
    let hardware = snapshot.net_devices.iter().any(|device| device.pci.is_some());
    let plain = up().filter(|device| !hardware || device.pci.is_some()).map(|device| Nic {
        name: device.name.clone(),
        gigabits_per_second: device.megabits_per_second.map(|megabits| megabits as f64 / 1e3),
        driver_version: None,
    });
    rdma.chain(plain).collect()
}

/// What libfabric offers for a push; nothing where there is no libfabric.
fn rails() -> Vec<RailOffer> {
    let Ok(library) = Library::open() else { return Vec::new() };
    let providers = [Provider::Efa, Provider::Verbs, library.tcp_provider()];
    // One address of an interface is an info of its own: a set keeps one of each.
    let offers: BTreeSet<RailOffer> = providers
        .into_iter()
        .flat_map(|provider| library.infos(&Hints::new(provider)).unwrap_or_default())
        .map(|info| {
            let facts = info.facts();
            RailOffer {
                provider: facts.provider.clone(),
                domain: facts.domain.clone(),
                bits_per_second: facts.link_bits_per_second.filter(|bits| *bits > 0),
            }
        })
        .collect();
    offers.into_iter().collect()
}
