//! Hosts from XML dumps, so that a topology can be looked at away from its machine. What comes in is a stranger's file:
//! it is bounded in length, depth and number before it is believed, and what is wrong is an error that names the line,
//! never a panic.

mod hwloc;
mod nccl;

use std::collections::BTreeSet;
use std::fmt::Display;
use std::str::FromStr;

use roxmltree::{Document, Node, ParsingOptions, TextPos};

use crate::Snapshot;
use crate::cpu_set::CpuSet;
use crate::gpu::{CLASS_DISPLAY, Gpu, VENDOR_NVIDIA};
use crate::net::NetDevice;
use crate::numa::{NumaIndex, NumaNode};
use crate::pci::{HostBridge, PciAddress, PciDevice, PciId};
use crate::rdma::{self, RdmaKind, RdmaPort};
use crate::tree::{ENTRIES_MAX, natural_key};

/// The longest dump that is read, in bytes. hwloc writes about 2 KB for each CPU of a host with all its caches.
pub const XML_BYTES_MAX: usize = 8 << 20;

/// Elements and the texts between them; a host with 1024 CPUs has some 30,000.
const XML_NODES_MAX: u32 = 1 << 19;

/// Elements inside each other. hwloc has some 12 levels from the machine to a CPU, and two for each PCI switch.
const DEPTH_MAX: usize = 64;

/// Attributes of one element; hwloc writes up to 15. The parser compares each with all before it.
const ATTRIBUTES_MAX: usize = 512;

/// NUMA nodes; Linux is built for at most as many.
const NUMA_NODES_MAX: usize = 1024;

/// Class of InfiniBand controllers, without the programming interface.
const CLASS_INFINIBAND: u16 = 0x0207;
/// The upper byte of the class: network controllers, InfiniBand among them.
const CLASS_NETWORK: u16 = 0x02;

const WHAT_TO_GIVE: &str =
    "expected <topology>, from `lstopo --of xml`, or <system>, from NCCL_TOPO_DUMP_FILE";

/// Why a text is not the dump of a host, and where in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {what}")]
#[non_exhaustive]
pub struct DumpError {
    /// Line, from 1.
    pub line: u32,
    /// Column, from 1.
    pub column: u32,
    /// What is wrong, and what to do where that is not plain.
    pub what: String,
}

impl DumpError {
    fn at(position: TextPos, what: impl Into<String>) -> Self {
        Self { line: position.row, column: position.col, what: what.into() }
    }

    /// Something is wrong with an element.
    fn of(element: Node<'_, '_>, what: impl Display) -> Self {
        let position = element.document().text_pos_at(element.range().start);
        Self::at(position, format!("<{}>: {what}", element.tag_name().name()))
    }
}

pub(crate) fn read(text: &str) -> Result<Snapshot, DumpError> {
    check_form(text)?;
    let options = ParsingOptions { allow_dtd: true, nodes_limit: XML_NODES_MAX, ..ParsingOptions::default() };
    let document = Document::parse_with_options(text, options)
        .map_err(|error| DumpError::at(error.pos(), format!("not XML ({error}); {WHAT_TO_GIVE}")))?;
    let root = document.root_element();
    let mut host = Host::default();
    match root.tag_name().name() {
        "topology" => hwloc::read(root, &mut host)?,
        "system" => nccl::read(root, &mut host)?,
        "graphs" => {
            let advice = "this is NCCL's dump of its rings; take the one that NCCL_TOPO_DUMP_FILE names";
            return Err(DumpError::of(root, advice));
        }
        _ => {
            return Err(DumpError::of(root, format!("not the dump of a host; {WHAT_TO_GIVE}")));
        }
    }
    Ok(host.into_snapshot())
}

/// Refuses what no dump has and what would take a parser long.
fn check_form(text: &str) -> Result<(), DumpError> {
    let at_start = |what: String| Err(DumpError { line: 1, column: 1, what });
    if text.len() > XML_BYTES_MAX {
        return at_start(format!("longer than {XML_BYTES_MAX} bytes; is it the dump of one host?"));
    }
    if ["<!ENTITY", "xmlns"].iter().any(|word| text.contains(word)) {
        return at_start("it has entities or namespaces, which neither hwloc nor NCCL writes".to_owned());
    }
    if text.split('<').any(|element| element.bytes().filter(|&c| c == b'=').count() > ATTRIBUTES_MAX) {
        return at_start(format!("an element has more than {ATTRIBUTES_MAX} attributes"));
    }
    Ok(())
}

/// Where in the host the walk through a dump is.
#[derive(Clone, Default)]
struct At {
    depth: usize,
    numa_node: Option<NumaIndex>,
    host_bridge: Option<HostBridge>,
    bridges: Vec<PciAddress>,
}

impl At {
    fn deeper(&self, element: Node<'_, '_>) -> Result<Self, DumpError> {
        if self.depth == DEPTH_MAX {
            return Err(DumpError::of(element, format!("more than {DEPTH_MAX} elements inside each other")));
        }
        Ok(Self { depth: self.depth + 1, ..self.clone() })
    }
}

/// A PCI function as a dump tells it.
struct Function {
    pci: PciDevice,
    /// Class and subclass, for instance 0x0302.
    class: Option<u16>,
}

impl Function {
    fn is_nvidia_gpu(&self) -> bool {
        let of_nvidia = self.pci.vendor_id.is_some_and(|PciId(vendor)| u32::from(vendor) == VENDOR_NVIDIA);
        of_nvidia && self.class.is_some_and(|class| u32::from(class >> 8) == CLASS_DISPLAY)
    }

    fn is_network(&self) -> bool {
        self.class.is_some_and(|class| class >> 8 == CLASS_NETWORK)
    }

    /// Whether a network function is one that RDMA goes through, as far as class and ids tell.
    fn is_rdma(&self) -> bool {
        self.class == Some(CLASS_INFINIBAND) || rdma::kind(Some(&self.pci)) != RdmaKind::Other
    }
}

/// What was found so far, each thing once.
#[derive(Default)]
struct Host {
    snapshot: Snapshot,
    cores: crate::core::Cores,
    functions: BTreeSet<PciAddress>,
    names: BTreeSet<String>,
}

impl Host {
    fn function(&mut self, element: Node<'_, '_>, address: PciAddress) -> Result<(), DumpError> {
        if !self.functions.insert(address) {
            return Err(DumpError::of(element, format!("PCI function {address} stands here a second time")));
        }
        if self.functions.len() > ENTRIES_MAX {
            return Err(DumpError::of(element, format!("more than {ENTRIES_MAX} PCI functions")));
        }
        Ok(())
    }

    fn numa_node(&mut self, element: Node<'_, '_>, node: NumaNode) -> Result<(), DumpError> {
        if self.snapshot.numa_nodes.iter().any(|other| other.index == node.index) {
            let again = format!("NUMA node {} stands here a second time; is it one host's dump?", node.index);
            return Err(DumpError::of(element, again));
        }
        if self.snapshot.numa_nodes.len() == NUMA_NODES_MAX {
            return Err(DumpError::of(element, format!("more than {NUMA_NODES_MAX} NUMA nodes")));
        }
        self.snapshot.numa_nodes.push(node);
        Ok(())
    }

    fn name(&mut self, element: Node<'_, '_>, name: &str) -> Result<(), DumpError> {
        if !self.names.insert(name.to_owned()) {
            return Err(DumpError::of(element, format!("device {name:?} stands here a second time")));
        }
        Ok(())
    }

    fn gpu(&mut self, pci: PciDevice, model: Option<String>) {
        self.snapshot.gpus.push(Gpu { pci, model });
    }

    fn rdma(&mut self, name: String, pci: Option<PciDevice>, ports: Vec<RdmaPort>) {
        self.snapshot.rdma_devices.push(rdma::of_dump(name, pci, ports));
    }

    fn net(&mut self, name: String, pci: Option<PciDevice>, megabits_per_second: Option<u64>) {
        let (operstate, mtu_bytes) = (None, None);
        self.snapshot.net_devices.push(NetDevice { name, operstate, megabits_per_second, mtu_bytes, pci });
    }

    /// A network function that the dump gives no device for: it goes by its address.
    fn nameless(&mut self, function: Function) {
        let name = function.pci.address.to_string();
        if function.is_rdma() {
            self.rdma(name, Some(function.pci), Vec::new());
        } else {
            self.net(name, Some(function.pci), None);
        }
    }

    /// In the order that a running host's snapshot has.
    fn into_snapshot(self) -> Snapshot {
        let mut snapshot = self.snapshot;
        snapshot.cores = self.cores.list;
        snapshot.cores.sort_by_key(|core| core.cpus.first());
        snapshot.numa_nodes.sort_by_key(|node| node.index);
        snapshot.gpus.sort_by_key(|gpu| gpu.pci.address);
        snapshot.rdma_devices.sort_by_cached_key(|nic| natural_key(&nic.name));
        snapshot.net_devices.sort_by_cached_key(|nic| natural_key(&nic.name));
        snapshot
    }
}

/// An attribute in its form; `None` if the element has none.
fn attribute<T>(element: Node<'_, '_>, name: &str) -> Result<Option<T>, DumpError>
where
    T: FromStr,
    T::Err: Display,
{
    attribute_as(element, name, |text| text.parse::<T>().map_err(|error| error.to_string()))
}

fn mask(element: Node<'_, '_>, name: &str) -> Result<Option<CpuSet>, DumpError> {
    attribute_as(element, name, |text| CpuSet::from_mask(text).map_err(|error| error.to_string()))
}

fn attribute_as<T>(
    element: Node<'_, '_>,
    name: &str,
    parse: impl FnOnce(&str) -> Result<T, String>,
) -> Result<Option<T>, DumpError> {
    let Some(text) = element.attribute(name) else { return Ok(None) };
    let shown: String = text.chars().take(80).collect();
    let value = parse(text).map_err(|why| DumpError::of(element, format!("{name}={shown:?}: {why}")))?;
    Ok(Some(value))
}

fn required<T>(element: Node<'_, '_>, name: &str, value: Option<T>) -> Result<T, DumpError> {
    value.ok_or_else(|| DumpError::of(element, format!("it has no {name}")))
}

/// Elements directly below.
fn children<'a, 'input>(element: Node<'a, 'input>) -> impl Iterator<Item = Node<'a, 'input>> {
    element.children().filter(Node::is_element)
}
