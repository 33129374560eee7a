//! NCCL's XML: `<cpu>` for every NUMA node, in it `<pci>` inside each other, and in those `<gpu>` and `<nic><net>`.
//!
//! Source: the dump that NCCL writes to NCCL_TOPO_DUMP_FILE, and the files of the same form that vendors ship for
//! NCCL_TOPO_FILE. The latter name neither GPUs nor NICs: PCI classes and ids tell what a function is.

use std::collections::BTreeSet;

use roxmltree::Node;

use super::{At, DumpError, Function, Host, attribute, attribute_as, children, mask, required};
use crate::cpu_set::CpuSet;
use crate::numa::{NumaIndex, NumaNode};
use crate::pci::{PciAddress, PciDevice, PciId, prefixed_hex};
use crate::rdma::RdmaPort;

pub(super) fn read(root: Node<'_, '_>, host: &mut Host) -> Result<(), DumpError> {
    let mut cpus = BTreeSet::new();
    elements(root, &At::default(), host, &mut cpus)?;
    host.snapshot.host.cpus_online = (!cpus.is_empty()).then(|| CpuSet::of(cpus));
    Ok(())
}

fn elements(
    parent: Node<'_, '_>,
    at: &At,
    host: &mut Host,
    cpus: &mut BTreeSet<u32>,
) -> Result<(), DumpError> {
    let on_pci = parent.has_tag_name("pci");
    for element in children(parent) {
        let mut at = at.deeper(element)?;
        match element.tag_name().name() {
            "cpu" => at.numa_node = numa_node(element, host, cpus)?,
            "pci" => {
                let address = pci(element, &at, host)?;
                at.bridges.push(address);
            }
            "nic" if !on_pci => {
                nets(element, None, host)?;
                continue;
            }
            // Links, what a PCI function has been asked for already, and what later versions add.
            _ => continue,
        }
        elements(element, &at, host, cpus)?;
    }
    Ok(())
}

/// A node, or with `numaid="-1"` the CPUs of a host that tells no nodes.
fn numa_node(
    element: Node<'_, '_>,
    host: &mut Host,
    cpus: &mut BTreeSet<u32>,
) -> Result<Option<NumaIndex>, DumpError> {
    let near = mask(element, "affinity")?;
    cpus.extend(near.iter().flat_map(CpuSet::iter));
    let index = attribute_as(element, "numaid", |text| match text {
        "-1" => Ok(None),
        _ => text.parse().map(|index| Some(NumaIndex(index))).map_err(|_| "expected a node or -1".to_owned()),
    })?;
    let Some(index) = required(element, "numaid", index)? else { return Ok(None) };
    let node = NumaNode { index, cpus: near, memory_bytes: None, memory_free_bytes: None };
    host.numa_node(element, node)?;
    Ok(Some(index))
}

fn pci(element: Node<'_, '_>, at: &At, host: &mut Host) -> Result<PciAddress, DumpError> {
    let address = required(element, "busid", attribute(element, "busid")?)?;
    host.function(element, address)?;
    let pci = PciDevice {
        address,
        // The dump has none.
        host_bridge: None,
        bridges: at.bridges.clone(),
        numa_node: at.numa_node,
        vendor_id: id(element, "vendor")?,
        device_id: id(element, "device")?,
        driver: None,
    };
    // `0x030200`: with the programming interface.
    let class = hex(element, "class")?.and_then(|class| u16::try_from(class >> 8).ok());
    let function = Function { pci, class };
    let child = |name: &'static str| children(element).filter(move |child| child.has_tag_name(name));
    if child("gpu").next().is_some() || function.is_nvidia_gpu() {
        host.gpu(function.pci, None);
        return Ok(address);
    }
    let mut has_name = false;
    for nic in child("nic") {
        has_name |= nets(nic, Some(&function), host)?;
    }
    if !has_name && function.is_network() {
        host.nameless(function);
    }
    Ok(address)
}

/// The devices of a NIC: RDMA devices have a GUID, sockets have 0. Says whether there was one. A device with two ports is
/// one device.
fn nets(nic: Node<'_, '_>, function: Option<&Function>, host: &mut Host) -> Result<bool, DumpError> {
    let mut names = BTreeSet::new();
    for net in children(nic).filter(|child| child.has_tag_name("net")) {
        let name = required(net, "name", net.attribute("name"))?;
        if !names.insert(name) {
            continue;
        }
        host.name(net, name)?;
        let speed: Option<u64> = attribute(net, "speed")?;
        let megabits_per_second = speed.filter(|&speed| speed > 0);
        let pci = function.map(|function| function.pci.clone());
        let has_guid = net.attribute("guid").map(|guid| !guid.trim_matches(['0', 'x']).is_empty());
        if has_guid.unwrap_or_else(|| function.is_some_and(Function::is_rdma)) {
            let port = RdmaPort {
                number: attribute(net, "port")?.unwrap_or(1),
                state: None,
                gigabits_per_second: megabits_per_second.map(|rate| rate as f64 / 1000.0),
                link_layer: None,
            };
            host.rdma(name.to_owned(), pci, vec![port]);
        } else {
            host.net(name.to_owned(), pci, megabits_per_second);
        }
    }
    Ok(!names.is_empty())
}

fn id(element: Node<'_, '_>, name: &str) -> Result<Option<PciId>, DumpError> {
    Ok(hex(element, name)?.and_then(|id| u16::try_from(id).ok()).map(PciId))
}

fn hex(element: Node<'_, '_>, name: &str) -> Result<Option<u32>, DumpError> {
    attribute_as(element, name, |text| {
        prefixed_hex(text).ok_or_else(|| "expected a hexadecimal number such as 0x10de".to_owned())
    })
}
