//! hwloc's XML, versions 1 and 2: `<object type="...">` inside each other, from the machine down to CPUs and, beside them,
//! from host bridges down to devices.
//!
//! Source: the XML export of hwloc 2 (`lstopo --of xml`). PCI devices name no NUMA node: the nearest object above them
//! that is not a bridge says which nodes they are near.

use roxmltree::Node;

use super::{At, DumpError, Function, Host, attribute, attribute_as, children, mask, required};
use crate::numa::{NumaIndex, NumaNode};
use crate::pci::{HostBridge, PciAddress, PciDevice, PciId};
use crate::rdma::{PortState, RdmaPort};

/// `osdev_type` of what the kernel makes of a PCI function.
const OSDEV_NETWORK: &str = "2";
const OSDEV_OPENFABRICS: &str = "3";

pub(super) fn read(root: Node<'_, '_>, host: &mut Host) -> Result<(), DumpError> {
    let version = root.attribute("version").unwrap_or("1");
    if !matches!(version.split('.').next(), Some("1" | "2")) {
        let advice = "it is newer than 2: write it with `lstopo --of xml --export-xml-flags v2`";
        return Err(DumpError::of(root, format!("hwloc XML version {version:?} is not known; {advice}")));
    }
    objects(root, &At::default(), host)
}

fn objects(parent: Node<'_, '_>, at: &At, host: &mut Host) -> Result<(), DumpError> {
    for object in children(parent).filter(|child| child.has_tag_name("object")) {
        self::object(object, at.deeper(object)?, host)?;
    }
    Ok(())
}

fn object(object: Node<'_, '_>, mut at: At, host: &mut Host) -> Result<(), DumpError> {
    match required(object, "type", object.attribute("type"))? {
        "Bridge" => bridge(object, &mut at, host)?,
        "PCIDev" => return device(object, &at, host),
        // Those of PCI functions are read with their function; others are of the whole host, such as a RAM disk.
        "OSDev" | "Misc" => return Ok(()),
        kind => {
            if let Some(nodes) = mask(object, "nodeset")? {
                at.numa_node = (nodes.count() == 1).then(|| nodes.first().map(NumaIndex)).flatten();
            }
            match kind {
                "Machine" | "System" => machine(object, host)?,
                "NUMANode" => {
                    let index = required(object, "os_index", attribute(object, "os_index")?)?;
                    let node = NumaNode {
                        index: NumaIndex(index),
                        cpus: mask(object, "cpuset")?,
                        memory_bytes: attribute(object, "local_memory")?,
                        memory_free_bytes: None,
                    };
                    host.numa_node(object, node)?;
                }
                "Core" => host.cores.add(mask(object, "cpuset")?.unwrap_or_default().iter()),
                _ => {}
            }
        }
    }
    objects(object, &at, host)
}

fn machine(object: Node<'_, '_>, host: &mut Host) -> Result<(), DumpError> {
    let facts = &mut host.snapshot.host;
    facts.cpus_online = mask(object, "cpuset")?;
    facts.cpus_allowed = mask(object, "allowed_cpuset")?;
    facts.name = info(object, "HostName");
    facts.kernel_release = info(object, "OSRelease");
    Ok(())
}

/// From the host to PCI (`0-1`), or between PCI buses (`1-1`), which is a PCI function itself.
fn bridge(object: Node<'_, '_>, at: &mut At, host: &mut Host) -> Result<(), DumpError> {
    if object.has_attribute("pci_busid") {
        let address = address(object)?;
        host.function(object, address)?;
        at.bridges.push(address);
    } else {
        at.host_bridge = attribute_as(object, "bridge_pci", |text| {
            // `0000:[44-54]`: the domain, and the buses behind it.
            let parts = text.split_once(":[").and_then(|(domain, buses)| Some((domain, buses.get(..2)?)));
            let found =
                parts.and_then(|(domain, bus)| format!("pci{domain}:{bus}").parse::<HostBridge>().ok());
            found.ok_or_else(|| "expected a domain and buses such as 0000:[44-54]".to_owned())
        })?;
        at.bridges.clear();
    }
    Ok(())
}

fn address(object: Node<'_, '_>) -> Result<PciAddress, DumpError> {
    required(object, "pci_busid", attribute(object, "pci_busid")?)
}

fn device(object: Node<'_, '_>, at: &At, host: &mut Host) -> Result<(), DumpError> {
    let address = address(object)?;
    host.function(object, address)?;
    let ids = attribute_as(object, "pci_type", |text| {
        ids(text).ok_or_else(|| "expected a class and ids such as 0302 [10de:2330]".to_owned())
    })?;
    let pci = PciDevice {
        address,
        host_bridge: at.host_bridge,
        bridges: at.bridges.clone(),
        numa_node: at.numa_node,
        vendor_id: ids.map(|ids| ids.vendor),
        device_id: ids.map(|ids| ids.device),
        driver: None,
    };
    let function = Function { pci, class: ids.map(|ids| ids.class) };
    if function.is_nvidia_gpu() {
        let model = system_devices(object).find_map(|device| info(device, "GPUModel"));
        host.gpu(function.pci, model.or_else(|| info(object, "PCIDevice")));
        return Ok(());
    }
    let mut has_name = false;
    for device in system_devices(object) {
        let kind = device.attribute("osdev_type");
        if !matches!(kind, Some(OSDEV_NETWORK | OSDEV_OPENFABRICS)) {
            continue;
        }
        let name = required(device, "name", device.attribute("name"))?;
        host.name(device, name)?;
        has_name = true;
        let (name, pci) = (name.to_owned(), Some(function.pci.clone()));
        match kind {
            Some(OSDEV_OPENFABRICS) => host.rdma(name, pci, ports(device)),
            _ => host.net(name, pci, None),
        }
    }
    if !has_name && function.is_network() {
        host.nameless(function);
    }
    Ok(())
}

fn system_devices<'a, 'input>(pci: Node<'a, 'input>) -> impl Iterator<Item = Node<'a, 'input>> {
    children(pci).filter(|child| child.attribute("type") == Some("OSDev"))
}

/// `Port1State` and so on, the state by its number; the rate is not in the dump.
fn ports(device: Node<'_, '_>) -> Vec<RdmaPort> {
    let port = |number: u32| {
        let state = match info(device, &format!("Port{number}State"))?.as_str() {
            "1" => Some(PortState::Down),
            "2" => Some(PortState::Init),
            "3" => Some(PortState::Armed),
            "4" => Some(PortState::Active),
            "5" => Some(PortState::Deferred),
            _ => None,
        };
        Some(RdmaPort { number, state, gigabits_per_second: None, link_layer: None })
    };
    // No device has more ports than that.
    (1..=16).map_while(port).collect()
}

#[derive(Clone, Copy)]
struct Ids {
    class: u16,
    vendor: PciId,
    device: PciId,
}

/// `0302 [10de:2330] [10de:16c1] a1`: class, ids, the subsystem's ids and the revision.
fn ids(text: &str) -> Option<Ids> {
    let hex = |text: &str| u16::from_str_radix(text, 16).ok();
    let mut words = text.split(' ');
    let class = hex(words.next()?)?;
    let (vendor, device) = words.next()?.strip_prefix('[')?.strip_suffix(']')?.split_once(':')?;
    Some(Ids { class, vendor: PciId(hex(vendor)?), device: PciId(hex(device)?) })
}

/// The value of `<info name=... value=...>` directly below.
fn info(object: Node<'_, '_>, name: &str) -> Option<String> {
    let infos = children(object).filter(|child| child.has_tag_name("info"));
    let mut named = infos.filter(|info| info.attribute("name") == Some(name));
    let value = named.next()?.attribute("value")?.trim();
    (!value.is_empty()).then(|| value.to_owned())
}
