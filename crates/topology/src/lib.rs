//! What a Linux host is made of, as far as moving weights is concerned: NUMA nodes, RDMA devices, network devices and
//! NVIDIA GPUs, with the PCI address and the NUMA node that tie them together.
//!
//! It reads text files below two roots, which are arguments, and nothing else: it opens no device, loads no library and
//! needs no GPU, NIC or privilege. What the kernel does not say is `None`; it is never turned into a zero or a guess.

#![forbid(unsafe_code)]

// The README's example is compiled and run as a doctest.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod cpu_set;
mod error;
mod gpu;
mod host;
mod net;
mod numa;
mod pci;
mod rdma;
mod tree;

use std::path::{Path, PathBuf};

use serde::Serialize;

pub use cpu_set::{CPU_INDEX_MAX, CpuSet, NotACpuSet};
pub use error::TopologyError;
pub use gpu::Gpu;
pub use host::{Host, HugePages, Limit};
pub use net::NetDevice;
pub use numa::{NumaIndex, NumaNode};
pub use pci::{NotAPciAddress, PciAddress, PciDevice, PciId};
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
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Snapshot {
    /// Facts about the whole host.
    pub host: Host,
    /// NUMA nodes, by index.
    pub numa_nodes: Vec<NumaNode>,
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
            rdma_devices: rdma::read(&mut tree)?,
            net_devices: net::read(&mut tree)?,
            gpus: gpu::read(&mut tree)?,
            nvidia_driver_version: gpu::driver_version(&mut tree),
            unread: tree.into_unread(),
        })
    }
}
