//! Where devices hang on a host: NUMA node, host bridge, bridges. One tree, for pairing and for drawing.
//!
//! A device's way down from the host is taken from what is known and nothing is put in for what is not: a device whose
//! NUMA node and host bridge are unknown hangs from the host itself. Devices of one host bridge share its NUMA node, as
//! the hardware does, even where the kernel tells it for some of them only.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::numa::NumaIndex;
use crate::pci::{HostBridge, PciAddress, PciDevice};
use crate::{Gpu, NetDevice, RdmaDevice, Snapshot};

/// One step on the way from the host to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// A NUMA node.
    NumaNode(NumaIndex),
    /// A PCI host bridge.
    HostBridge(HostBridge),
    /// A PCI bridge. Two devices below one are behind the same PCI switch: a root port alone leads to one card.
    Bridge(PciAddress),
}

/// What hangs at a place, and the places below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Branch<T> {
    /// The place; `None` for the host.
    pub place: Option<Place>,
    /// Places below, in order.
    pub branches: Vec<Branch<T>>,
    /// What hangs here directly, in the order in which it was given.
    pub devices: Vec<T>,
}

/// Anything that hangs on the tree of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Device<'a> {
    /// A GPU.
    Gpu(&'a Gpu),
    /// An RDMA device.
    Rdma(&'a RdmaDevice),
    /// A network device.
    Net(&'a NetDevice),
}

impl<'a> Device<'a> {
    /// Its place on PCI, if it has one.
    pub fn pci(&self) -> Option<&'a PciDevice> {
        match self {
            Self::Gpu(gpu) => Some(&gpu.pci),
            Self::Rdma(nic) => nic.pci.as_ref(),
            Self::Net(nic) => nic.pci.as_ref(),
        }
    }
}

impl Snapshot {
    /// GPUs, then RDMA devices, then network devices.
    pub fn devices(&self) -> impl Iterator<Item = Device<'_>> {
        let gpus = self.gpus.iter().map(Device::Gpu);
        gpus.chain(self.rdma_devices.iter().map(Device::Rdma)).chain(self.net_devices.iter().map(Device::Net))
    }

    /// Every device where it hangs, and every NUMA node, as a person would draw it: a chain of bridges without
    /// branches is one step, and a port that leads to a single card is none.
    pub fn tree(&self) -> Branch<Device<'_>> {
        let places = Places::of(self);
        let mut tree = Branch::grow(self.devices().map(|device| (places.path(device.pci()), device)));
        for node in &self.numa_nodes {
            tree.below(Place::NumaNode(node.index));
        }
        tree.branches = tree.branches.into_iter().map(simplified).collect();
        tree
    }
}

impl<T> Branch<T> {
    /// The tree of things with their ways down from the host.
    pub(crate) fn grow(things: impl Iterator<Item = (Vec<Place>, T)>) -> Self {
        let mut host = Self { place: None, branches: Vec::new(), devices: Vec::new() };
        for (path, thing) in things {
            path.into_iter().fold(&mut host, |branch, place| branch.below(place)).devices.push(thing);
        }
        host
    }

    /// The branch at `place`, made if it is new.
    fn below(&mut self, place: Place) -> &mut Self {
        let at = match self.branches.binary_search_by_key(&Some(place), |branch| branch.place) {
            Ok(at) => at,
            Err(at) => {
                self.branches
                    .insert(at, Self { place: Some(place), branches: Vec::new(), devices: Vec::new() });
                at
            }
        };
        &mut self.branches[at]
    }
}

fn simplified(mut branch: Branch<Device<'_>>) -> Branch<Device<'_>> {
    let mut branches = Vec::new();
    for below in branch.branches.into_iter().map(simplified) {
        if is_port(&below) { branch.devices.extend(below.devices) } else { branches.push(below) }
    }
    branch.branches = branches;
    let is_numa_node = matches!(branch.place, Some(Place::NumaNode(_)));
    match branch.branches.pop() {
        Some(only) if branch.branches.is_empty() && branch.devices.is_empty() && !is_numa_node => only,
        last => {
            branch.branches.extend(last);
            branch
        }
    }
}

/// A bridge that leads to one card, whatever number of functions it has.
fn is_port(branch: &Branch<Device<'_>>) -> bool {
    let card = |device: &Device<'_>| device.pci().map(|pci| PciAddress { function: 0, ..pci.address });
    let is_bridge = matches!(branch.place, Some(Place::Bridge(_)));
    let first = branch.devices.first().map(card);
    is_bridge && branch.branches.is_empty() && branch.devices.iter().all(|device| Some(card(device)) == first)
}

/// The NUMA node of every host bridge, or of what stands in its place where it is unknown.
pub(crate) struct Places(BTreeMap<Place, NumaIndex>);

impl Places {
    pub(crate) fn of(snapshot: &Snapshot) -> Self {
        let mut nodes = BTreeMap::new();
        for pci in snapshot.devices().filter_map(|device| device.pci()) {
            if let Some(node) = pci.numa_node {
                nodes.entry(top(pci)).or_insert(node);
            }
        }
        Self(nodes)
    }

    /// The way from the host down to what holds this function; empty where nothing is known.
    pub(crate) fn path(&self, pci: Option<&PciDevice>) -> Vec<Place> {
        let Some(pci) = pci else { return Vec::new() };
        let node = self.0.get(&top(pci)).map(|&node| Place::NumaNode(node));
        let host_bridge = pci.host_bridge.map(Place::HostBridge);
        let bridges = pci.bridges.iter().map(|&bridge| Place::Bridge(bridge));
        node.into_iter().chain(host_bridge).chain(bridges).collect()
    }
}

/// The highest place below the NUMA node that a function is known to hang from, in the last resort itself.
fn top(pci: &PciDevice) -> Place {
    match (pci.host_bridge, pci.bridges.first()) {
        (Some(host_bridge), _) => Place::HostBridge(host_bridge),
        (None, Some(&bridge)) => Place::Bridge(bridge),
        (None, None) => Place::Bridge(pci.address),
    }
}
