//! `weightsync topo`: which NICs and cores serve which GPU, on this host or on one that a dump describes. It reads and
//! draws; it pins nothing and opens no device.

mod svg;
mod text;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use serde::Serialize;
use topology::{
    Assignment, Device, NetDevice, Pairing, PciAddress, RdmaDevice, RdmaKind, Roots, Snapshot, pair,
};

use crate::say::say;

#[derive(Args)]
#[command(
    after_long_help = "Examples:\n  weightsync topo\n      this host\n  lstopo --of xml > host.xml; weightsync topo --from \
                       host.xml --svg host.svg\n      another host from hwloc's dump, as a drawing too\n  \
                       NCCL_TOPO_DUMP_FILE=nccl.xml torchrun ...; weightsync topo --from nccl.xml\n      a host as NCCL \
                       saw it"
)]
pub(crate) struct TopoArgs {
    /// Describe another host: XML of hwloc (lstopo --of xml) or of NCCL (NCCL_TOPO_DUMP_FILE), or a folder that holds
    /// copies of its sys and proc
    #[arg(long, value_name = "PATH")]
    from: Option<PathBuf>,
    /// Show also what N ranks on host memory would share
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    host_ranks: Option<u16>,
    /// Write a drawing that any browser shows
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print one JSON object instead
    #[arg(long)]
    json: bool,
}

/// What is told, in every form.
#[derive(Serialize)]
struct Facts {
    snapshot: Snapshot,
    pairing: Pairing,
    /// Empty unless asked for.
    host_ranks: Vec<Assignment>,
    /// How many GPUs each NIC serves.
    #[serde(skip)]
    gpus_of_nics: BTreeMap<String, usize>,
}

pub(crate) fn run(args: &TopoArgs) -> anyhow::Result<()> {
    let snapshot = match &args.from {
        Some(path) => Snapshot::load(path)?,
        None => Snapshot::read(&Roots::default())?,
    };
    let pairing = pair(&snapshot);
    let host_ranks =
        args.host_ranks.map_or_else(Vec::new, |ranks| Pairing::host_ranks(&snapshot, ranks.into()));
    let mut gpus_of_nics = BTreeMap::new();
    for nic in pairing.gpus.iter().flat_map(|of| &of.nics) {
        *gpus_of_nics.entry(nic.clone()).or_insert(0) += 1;
    }
    let facts = Facts { snapshot, pairing, host_ranks, gpus_of_nics };
    if let Some(path) = &args.svg {
        fs::write(path, svg::drawing(&facts)).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if args.json {
        say!("{}", serde_json::to_string_pretty(&facts)?);
    } else {
        for line in text::lines(&facts) {
            say!("{line}");
        }
        if let Some(path) = &args.svg {
            say!("\nthe drawing is in {}", path.display());
        }
    }
    Ok(())
}

impl Facts {
    /// The host in one line.
    fn title(&self) -> String {
        let Snapshot { host, numa_nodes, cores, rdma_devices, net_devices, gpus, .. } = &self.snapshot;
        let mut parts = Vec::new();
        if let Some(cpus) = &host.cpus_online {
            parts.push(match cores.len() {
                0 => counted(cpus.count(), "CPU"),
                cores => format!("{} on {}", counted(cpus.count(), "CPU"), counted(cores, "core")),
            });
        }
        let counts = [
            (numa_nodes.len(), "NUMA node"),
            (gpus.len(), "GPU"),
            (rdma_devices.len(), "RDMA device"),
            (net_devices.len(), "network device"),
        ];
        parts.extend(counts.map(|(count, what)| counted(count, what)));
        format!("{}: {}", host.name.as_deref().unwrap_or("host"), parts.join(", "))
    }

    /// What serves a GPU.
    fn of(&self, gpu: PciAddress) -> Option<&Assignment> {
        // They are in the snapshot's order, which is by address.
        let at = self.pairing.gpus.binary_search_by_key(&Some(gpu), |of| of.gpu).ok()?;
        self.pairing.gpus.get(at)
    }

    /// What a person should know beside the drawing.
    fn remarks(&self) -> Vec<String> {
        let mut remarks: Vec<String> = self.pairing.notes.iter().map(ToString::to_string).collect();
        let unread = self.snapshot.unread.len();
        if unread > 0 {
            remarks.push(format!("{} could not be used: --json lists what and why", counted(unread, "file")));
        }
        if self.snapshot.gpus.is_empty() && self.host_ranks.is_empty() {
            remarks.push(
                "no NVIDIA GPU here: --host-ranks N shows what N ranks on host memory would share".to_owned(),
            );
        }
        remarks
    }
}

fn counted(count: usize, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

/// The cores of a GPU or a rank.
fn cores(of: &Assignment) -> String {
    let Some(rail) = of.rail_cpu else { return "cores unknown".to_owned() };
    match of.cores.count() {
        1 => format!("rail thread on CPU {rail}"),
        _ => format!("rail thread on CPU {rail}, its cores are {}", of.cores),
    }
}

/// What kind of NIC, and what is known of its link: equal ones are drawn together.
fn kind(device: Device<'_>) -> Option<String> {
    match device {
        Device::Gpu(_) => None,
        Device::Rdma(nic) => Some(rdma_kind(nic)),
        Device::Net(nic) => Some(net_kind(nic)),
    }
}

fn rdma_kind(nic: &RdmaDevice) -> String {
    let mut words = vec![match nic.kind {
        RdmaKind::Efa => "EFA".to_owned(),
        RdmaKind::Mellanox => "NVIDIA RDMA".to_owned(),
        _ => "RDMA".to_owned(),
    }];
    let rates = nic.ports.iter().filter_map(|port| port.gigabits_per_second);
    words.extend(rates.reduce(f64::max).map(|rate| format!("{rate} Gb/s")));
    let states: Vec<_> = nic.ports.iter().filter_map(|port| port.state).collect();
    if !states.is_empty() && !states.contains(&topology::PortState::Active) {
        words.push("not active".to_owned());
    }
    if nic.pci.is_none() {
        words.push("software".to_owned());
    }
    words.join(", ")
}

fn net_kind(nic: &NetDevice) -> String {
    let mut words = vec!["network".to_owned()];
    words.extend(nic.megabits_per_second.map(|rate| format!("{} Gb/s", rate as f64 / 1000.0)));
    if nic.operstate.is_some() && !nic.is_up() {
        words.push("not up".to_owned());
    }
    if nic.pci.is_none() {
        words.push("not on PCI".to_owned());
    }
    words.join(", ")
}

fn name(device: Device<'_>) -> String {
    match device {
        Device::Gpu(gpu) => gpu.pci.address.to_string(),
        Device::Rdma(nic) => nic.name.clone(),
        Device::Net(nic) => nic.name.clone(),
    }
}

/// Device names come from a stranger's file: what a terminal or a browser would act on is not passed on.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}
