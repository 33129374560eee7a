//! `weightsync info`: what this machine has, and what that means for a push.

use efa_core::{Hints, Library, Provider};
use serde::Serialize;
use topology::{Limit, RdmaKind, Roots, Snapshot};

use crate::args::InfoArgs;
use crate::say::say;
use crate::table::bytes_text;

#[derive(Serialize)]
struct Facts {
    libfabric: Option<Libfabric>,
    /// Why there is none.
    libfabric_error: Option<String>,
    snapshot: Snapshot,
    /// What follows from it, the most important first.
    meaning: Vec<String>,
}

#[derive(Serialize)]
struct Libfabric {
    version: String,
    path: String,
    providers: Vec<ProviderFacts>,
}

#[derive(Serialize)]
struct ProviderFacts {
    name: &'static str,
    /// Domains that it offers here; empty when it offers nothing.
    domains: Vec<String>,
    /// Why it offers nothing.
    error: Option<String>,
}

pub(crate) fn run(args: &InfoArgs) -> anyhow::Result<()> {
    let snapshot = Snapshot::read(&Roots::default())?;
    let (libfabric, libfabric_error) = match Library::open() {
        Ok(library) => (Some(describe(&library)), None),
        Err(error) => (None, Some(error.to_string())),
    };
    let meaning = meaning(&snapshot, libfabric.as_ref());
    let facts = Facts { libfabric, libfabric_error, snapshot, meaning };
    if args.json {
        say!("{}", serde_json::to_string_pretty(&facts)?);
    } else {
        print(&facts);
    }
    Ok(())
}

fn describe(library: &Library) -> Libfabric {
    let providers = Provider::ALL.map(|provider| match library.infos(&Hints::new(provider)) {
        Ok(infos) => {
            let mut domains: Vec<String> = infos.iter().map(|info| info.facts().domain.clone()).collect();
            domains.sort();
            domains.dedup();
            ProviderFacts { name: provider.name(), domains, error: None }
        }
        Err(error) => {
            ProviderFacts { name: provider.name(), domains: Vec::new(), error: Some(error.to_string()) }
        }
    });
    Libfabric {
        version: library.version().to_string(),
        path: library.path().display().to_string(),
        providers: providers.into(),
    }
}

fn meaning(snapshot: &Snapshot, libfabric: Option<&Libfabric>) -> Vec<String> {
    let mut lines = Vec::new();
    let offers = |name: Provider| {
        libfabric.is_some_and(|library| {
            library
                .providers
                .iter()
                .any(|provider| provider.name == name.name() && !provider.domains.is_empty())
        })
    };
    let nics = |kind: RdmaKind| {
        snapshot.rdma_devices.iter().filter(move |nic| nic.kind == kind && nic.pci.is_some())
    };
    for (kind, provider, install) in [
        (RdmaKind::Efa, Provider::Efa, "install the EFA installer's libfabric, or point LIBFABRIC_SO at it"),
        (RdmaKind::Mellanox, Provider::Verbs, "install a libfabric with the verbs provider"),
    ] {
        let count = nics(kind).count();
        match (count, offers(provider)) {
            (0, _) => {}
            (_, true) => lines.push(format!("{count} {provider} NICs can be used: --fabric auto takes them")),
            (_, false) => {
                lines.push(format!("{count} RDMA NICs are idle, libfabric has no {provider} here: {install}"))
            }
        }
    }
    match libfabric {
        None => lines.push(
            "no libfabric: ranks of one host can use shared memory (--fabric local); for other hosts install libfabric 1.18 \
             or newer, or let `cargo xtask demo` build one"
                .into(),
        ),
        Some(_) if offers(Provider::Tcp) => lines.push("TCP works: --fabric tcp".into()),
        Some(library) if offers(Provider::TcpRxm) => lines.push(format!(
            "TCP works through ofi_rxm: --fabric tcp; libfabric {} is older than 1.18, whose tcp is faster",
            library.version
        )),
        Some(_) => lines.push("libfabric offers no TCP here: only shared memory is left (--fabric local)".into()),
    }
    if !snapshot.rdma_devices.is_empty()
        && let Some(Limit::Bytes(bytes)) = snapshot.host.locked_memory_max
    {
        lines.push(format!(
            "locked memory is limited to {}: registering weights with a NIC will fail beyond it; set `ulimit -l unlimited`",
            bytes_text(bytes)
        ));
    }
    match (snapshot.gpus.len(), &snapshot.nvidia_driver_version) {
        (0, _) => lines.push("no NVIDIA GPU: weights live in host memory".into()),
        (gpus, Some(_)) => lines.push(format!(
            "{gpus} NVIDIA GPUs: weights may be on them (--device cuda), where both ends of a push are on this host"
        )),
        (gpus, None) => lines.push(format!("{gpus} NVIDIA GPUs, but their driver is not loaded")),
    }
    lines
}

fn print(facts: &Facts) {
    let unknown = || "unknown".to_owned();
    let Facts { libfabric, libfabric_error, snapshot, meaning } = facts;
    let host = &snapshot.host;
    say!(
        "host        {}, Linux {}",
        host.name.clone().unwrap_or_else(unknown),
        host.kernel_release.clone().unwrap_or_else(unknown)
    );
    say!(
        "cores       {} online, {} for this process",
        host.cpus_online.as_ref().map_or_else(unknown, |cpus| cpus.count().to_string()),
        host.cpus_allowed.as_ref().map_or_else(unknown, |cpus| cpus.count().to_string()),
    );
    say!(
        "memory      {}, {} available",
        host.memory_bytes.map_or_else(unknown, bytes_text),
        host.memory_available_bytes.map_or_else(unknown, bytes_text),
    );
    let locked = match host.locked_memory_max {
        None => unknown(),
        Some(Limit::Unlimited) => "unlimited".into(),
        Some(Limit::Bytes(bytes)) => bytes_text(bytes),
    };
    say!("lockable    {locked}");
    for pages in &host.huge_pages {
        let count = |pages: Option<u64>| pages.map_or_else(unknown, |pages| pages.to_string());
        say!(
            "huge pages  {} of {} free, {} each",
            count(pages.pages_free),
            count(pages.pages_total),
            bytes_text(pages.page_bytes)
        );
    }
    say!("NUMA        {} nodes", snapshot.numa_nodes.len());
    match (libfabric, libfabric_error) {
        (Some(library), _) => {
            say!("libfabric   {} at {}", library.version, library.path);
            for provider in &library.providers {
                let offers = match provider.domains.as_slice() {
                    [] => "nothing here".into(),
                    domains => domains.join(", "),
                };
                say!("  {:14}{offers}", provider.name);
            }
        }
        (None, error) => say!("libfabric   none: {}", error.clone().unwrap_or_else(unknown)),
    }
    for nic in &snapshot.rdma_devices {
        let rate = nic.ports.iter().filter_map(|port| port.gigabits_per_second).sum::<f64>();
        let numa = nic.pci.as_ref().and_then(|pci| pci.numa_node);
        say!(
            "RDMA NIC    {} ({:?}), {rate} Gb/s, NUMA node {}",
            nic.name,
            nic.kind,
            numa.map_or_else(unknown, |node| node.0.to_string())
        );
    }
    for nic in snapshot.net_devices.iter().filter(|nic| nic.is_up()) {
        let speed =
            nic.megabits_per_second.map_or_else(|| "speed unknown".into(), |rate| format!("{rate} Mb/s"));
        say!("netdev      {}, {speed}", nic.name);
    }
    for gpu in &snapshot.gpus {
        say!("GPU         {} at {}", gpu.model.clone().unwrap_or_else(|| "NVIDIA".into()), gpu.pci.address);
    }
    say!("");
    for line in meaning {
        say!("{line}");
    }
}
