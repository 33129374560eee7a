//! What can be busy, numbered: NICs each way, uplinks of racks, NVLink ports, copy engines, memories. And which of them a
//! transfer takes at once.

use crate::cluster::{Cluster, GpuId, NicId};

/// Links that one transfer takes at most: NIC, uplink, downlink, NIC.
pub(super) const HOPS_MAX: usize = 4;

/// Something that moves bytes at a limited rate, shared by all who use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Link {
    /// What a NIC sends.
    NicOut(NicId),
    /// What a NIC receives.
    NicIn(NicId),
    /// What a rack sends to other racks; racks are numbered from 0.
    RackUp(u32),
    /// What a rack receives from other racks.
    RackDown(u32),
    /// What a GPU sends over NVLink.
    NvlinkOut(GpuId),
    /// What a GPU receives over NVLink.
    NvlinkIn(GpuId),
    /// A GPU's copy engine from host memory.
    HostToDevice(GpuId),
    /// A GPU's copy engine to host memory.
    DeviceToHost(GpuId),
    /// A GPU's memory, for kernels.
    Hbm(GpuId),
}

/// How a transfer goes. The transfers of one way are served one after another, in the order in which they were started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// From NIC to NIC, over the uplinks of their racks if these differ.
    Nic {
        /// The sender's.
        from: NicId,
        /// The receiver's.
        to: NicId,
    },
    /// From GPU to GPU of one host.
    Nvlink {
        /// The GPU that reads.
        from: GpuId,
        /// The GPU that is written to.
        to: GpuId,
    },
    /// From host memory to a GPU.
    HostToDevice(GpuId),
    /// From a GPU to host memory.
    DeviceToHost(GpuId),
    /// A kernel that reads and writes so many bytes of its GPU's memory.
    Kernel(GpuId),
}

/// The links of a way.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Path {
    links: [u32; HOPS_MAX],
    hops: u8,
}

impl Path {
    fn of<const N: usize>(hops: [u32; N]) -> Path {
        let mut links = [0; HOPS_MAX];
        links[..N].copy_from_slice(&hops);
        Path { links, hops: N as u8 }
    }

    pub(super) fn links(&self) -> &[u32] {
        &self.links[..usize::from(self.hops)]
    }
}

/// The numbers of all links of a cluster.
pub(super) struct Links {
    nics: u32,
    gpus: u32,
    racks: u32,
}

impl Links {
    pub(super) fn of(cluster: &Cluster) -> Links {
        Links { nics: cluster.nics(), gpus: cluster.gpus(), racks: cluster.rack_count() }
    }

    /// What each moves, in the order of their numbers, in bytes a second.
    pub(super) fn capacities(&self, cluster: &Cluster) -> Vec<f64> {
        let gpu = &cluster.host.gpu;
        let uplink = cluster.racks.map_or(0, |racks| racks.uplink_bytes_per_second);
        let kinds = [
            (2 * self.nics, cluster.nic.bytes_per_second),
            (2 * self.racks, uplink),
            (2 * self.gpus, gpu.nvlink_bytes_per_second),
            (2 * self.gpus, gpu.copy_engine_bytes_per_second),
            (self.gpus, gpu.hbm_bytes_per_second),
        ];
        kinds.iter().flat_map(|&(count, rate)| core::iter::repeat_n(rate as f64, count as usize)).collect()
    }

    /// A link's number; `None` if the cluster has no such link.
    pub(super) fn number(&self, link: Link) -> Option<u32> {
        let (kind, index, count) = match link {
            Link::NicOut(nic) => (0, nic.0, self.nics),
            Link::NicIn(nic) => (self.nics, nic.0, self.nics),
            Link::RackUp(rack) => (2 * self.nics, rack, self.racks),
            Link::RackDown(rack) => (2 * self.nics + self.racks, rack, self.racks),
            Link::NvlinkOut(gpu) => (self.first_gpu(), gpu.0, self.gpus),
            Link::NvlinkIn(gpu) => (self.first_gpu() + self.gpus, gpu.0, self.gpus),
            Link::HostToDevice(gpu) => (self.first_gpu() + 2 * self.gpus, gpu.0, self.gpus),
            Link::DeviceToHost(gpu) => (self.first_gpu() + 3 * self.gpus, gpu.0, self.gpus),
            Link::Hbm(gpu) => (self.first_gpu() + 4 * self.gpus, gpu.0, self.gpus),
        };
        (index < count).then_some(kind + index)
    }

    /// The links of a way; `None` if the cluster has no such way.
    pub(super) fn path(&self, way: Way, cluster: &Cluster) -> Option<Path> {
        Some(match way {
            Way::Nic { from, to } => {
                let (out, into) = (self.number(Link::NicOut(from))?, self.number(Link::NicIn(to))?);
                match (cluster.rack_of(from), cluster.rack_of(to)) {
                    (Some(up), Some(down)) if up != down => {
                        let (up, down) = (Link::RackUp(up), Link::RackDown(down));
                        Path::of([out, self.number(up)?, self.number(down)?, into])
                    }
                    _ => Path::of([out, into]),
                }
            }
            Way::Nvlink { from, to } => {
                let host = |gpu: GpuId| gpu.0.checked_div(cluster.host.gpus);
                if from == to || host(from) != host(to) {
                    return None;
                }
                Path::of([self.number(Link::NvlinkOut(from))?, self.number(Link::NvlinkIn(to))?])
            }
            Way::HostToDevice(gpu) => Path::of([self.number(Link::HostToDevice(gpu))?]),
            Way::DeviceToHost(gpu) => Path::of([self.number(Link::DeviceToHost(gpu))?]),
            Way::Kernel(gpu) => Path::of([self.number(Link::Hbm(gpu))?]),
        })
    }

    fn first_gpu(&self) -> u32 {
        2 * (self.nics + self.racks)
    }
}
