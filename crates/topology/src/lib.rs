//! What a Linux host is made of, as far as moving weights is concerned: NUMA nodes, cores, RDMA devices, network devices
//! and NVIDIA GPUs, with the PCI tree and the NUMA nodes that tie them together; and which NICs and cores serve which GPU.
//!
//! It reads text files below two roots, or one XML dump of another host, all of them arguments, and nothing else: it opens
//! no device, loads no library, pins nothing and needs no GPU, NIC or privilege. What the kernel or the dump does not say
//! is `None`; it is never turned into a zero or a guess.

#![forbid(unsafe_code)]

// The README's example is compiled and run as a doctest.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod core;
mod cpu_set;
mod dump;
mod error;
mod gpu;
mod host;
mod meet;
mod net;
mod nics;
mod numa;
mod pairing;
mod pci;
mod place;
mod rdma;
mod share;
mod tree;

use std::path::{Path, PathBuf};

use serde::Serialize;

pub use core::Core;
pub use cpu_set::{CPU_INDEX_MAX, CpuSet, NotACpuSet};
pub use dump::{DumpError, XML_BYTES_MAX};
pub use error::TopologyError;
pub use gpu::Gpu;
pub use host::{Host, HugePages, Limit};
pub use net::NetDevice;
pub use nics::Note;
pub use numa::{NumaIndex, NumaNode};
pub use pairing::{Assignment, Pairing, Reason, pair};
pub use pci::{HostBridge, NotAPciAddress, PciAddress, PciDevice, PciId};
pub use place::{Branch, Device, Place};
pub use rdma::{PortState, RdmaDevice, RdmaKind, RdmaPort};
pub use tree::{ENTRIES_MAX, TEXT_BYTES_MAX, Unread};

/// Where the kernel's trees are mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    /// The sysfs tree, `/sys` on a running host.
    pub sys: PathBuf,
    /// The proc tree, `/proc` on a running host.
    pub proc: PathBuf,
}

impl Roots {
    /// `sys` and `proc` below `dir`: a copied tree, a container's root, or a test's.
    pub fn below(dir: &Path) -> Self {
        Self { sys: dir.join("sys"), proc: dir.join("proc") }
    }
}

impl Default for Roots {
    fn default() -> Self {
        Self::below(Path::new("/"))
    }
}

/// One host at one moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Snapshot {
    /// Facts about the whole host.
    pub host: Host,
    /// NUMA nodes, by index.
    pub numa_nodes: Vec<NumaNode>,
    /// Physical cores, by their lowest CPU; empty where nothing says which CPUs share one.
    pub cores: Vec<Core>,
    /// RDMA devices, by name in natural order (`mlx5_2` before `mlx5_10`).
    pub rdma_devices: Vec<RdmaDevice>,
    /// Every network device of this network namespace, by name in natural order.
    pub net_devices: Vec<NetDevice>,
    /// NVIDIA GPUs, by PCI address: the order of `CUDA_DEVICE_ORDER=PCI_BUS_ID`.
    pub gpus: Vec<Gpu>,
    /// Version of the loaded NVIDIA kernel driver, for instance `580.65.06`.
    pub nvidia_driver_version: Option<String>,
    /// Files that are there but could not be read or understood; what they would have said is `None` above.
    pub unread: Vec<Unread>,
}

impl Snapshot {
    /// Reads everything below `roots`.
    ///
    /// # Errors
    /// [`TopologyError`] when the sysfs root is not a readable directory, or when a directory holds more than
    /// [`ENTRIES_MAX`] entries. Missing, unreadable and odd files are not errors: see [`Snapshot::unread`].
    pub fn read(roots: &Roots) -> Result<Self, TopologyError> {
        let mut tree = tree::Tree::open(roots)?;
        Ok(Self {
            host: host::read(&mut tree)?,
            numa_nodes: numa::read(&mut tree)?,
            cores: core::read(&mut tree)?,
            rdma_devices: rdma::read(&mut tree)?,
            net_devices: net::read(&mut tree)?,
            gpus: gpu::read(&mut tree)?,
            nvidia_driver_version: gpu::driver_version(&mut tree),
            unread: tree.into_unread(),
        })
    }

    /// Understands a dump of a host: XML of hwloc (`lstopo --of xml`) or of NCCL (`NCCL_TOPO_DUMP_FILE`), told apart by
    /// the root element. A NIC that the dump gives no name has its PCI address for one.
    ///
    /// # Errors
    /// [`DumpError`] says at which line what is wrong: text that is not such a dump, longer than [`XML_BYTES_MAX`] or
    /// nested deeper than any host, and values that are not of their form.
    pub fn from_xml(text: &str) -> Result<Self, DumpError> {
        dump::read(text)
    }

    /// Another host: a folder with copies of `sys` and `proc`, or a file that [`Snapshot::from_xml`] understands.
    ///
    /// # Errors
    /// Those of both, and a file that cannot be read.
    pub fn load(path: &Path) -> Result<Self, TopologyError> {
        if path.is_dir() {
            return Self::read(&Roots::below(path));
        }
        let text = tree::read_text(path, XML_BYTES_MAX)
            .map_err(|source| TopologyError::File { path: path.to_owned(), source })?;
        Self::from_xml(&text).map_err(|source| TopologyError::Dump { path: path.to_owned(), source })
    }
}
