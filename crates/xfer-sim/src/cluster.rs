//! The description of a cluster: what stands where and how fast it is. Plain data, read from TOML or JSON by whoever has a
//! file, and checked before anything is simulated on it.
//!
//! Every host is like every other. Trainers have one GPU each from the first host on; receivers follow from the next whole
//! host on. It must never hold a default that nobody sees: all numbers are stated, or come from a named [`Preset`].

mod check;
mod error;
mod preset;

use core::ops::Range;

use serde::{Deserialize, Serialize};

pub use error::ClusterError;
pub use preset::{NoSuchPreset, Preset};

/// A GPU of the cluster: host by host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GpuId(pub u32);

/// A NIC of the cluster: host by host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NicId(pub u32);

/// A whole cluster. [`Cluster::check`] before use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// Hosts, at least 1.
    pub hosts: u32,
    /// Ranks that send, a GPU each.
    pub trainers: u32,
    /// Ranks that receive, a GPU each.
    pub receivers: u32,
    /// What each host is made of.
    pub host: Host,
    /// What each NIC is.
    pub nic: Nic,
    /// What hosts of different racks share. Without it the fabric is non-blocking: only NICs limit.
    pub racks: Option<Racks>,
    /// The network of the control plane, apart from the NICs above.
    pub control: Control,
}

/// A host: GPUs, and NICs near them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// GPUs, at least 1.
    pub gpus: u32,
    /// NICs, at least 1.
    pub nics: u32,
    /// For each GPU the NICs that it uses, as numbers within the host. Without it they are dealt evenly and in order: with
    /// 8 GPUs and 32 NICs GPU 1 has 4 to 7, with 8 GPUs and 2 NICs GPUs 0 to 3 share NIC 0.
    pub gpu_nics: Option<Vec<Vec<u32>>>,
    /// What each GPU is.
    pub gpu: Gpu,
}

/// A GPU, as far as moving bytes is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// NVLink, each way, in bytes a second.
    pub nvlink_bytes_per_second: u64,
    /// Between host memory and the GPU, each way, in bytes a second.
    pub copy_engine_bytes_per_second: u64,
    /// Its memory, reads and writes together, in bytes a second.
    pub hbm_bytes_per_second: u64,
    /// From the launch of a kernel or copy to its start, in nanoseconds.
    pub launch_nanoseconds: u64,
}

/// A NIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// What is promised about order and failure.
    pub semantics: Semantics,
    /// On the wire, each way, headers included, in bytes a second.
    pub bytes_per_second: u64,
    /// What posting one message costs the thread that posts it, in nanoseconds. For the driver that is simulated; a network
    /// does not look at it.
    pub post_nanoseconds: u64,
    /// The shortest time from one message to the next that the NIC sends, in nanoseconds: one over its message rate.
    pub message_nanoseconds: u64,
    /// Messages that may be posted and not completed, at least 1. The driver's to respect: a network takes any number.
    pub queue_depth: u32,
    /// Payload of a full packet, at least 1: the MTU less the headers that count against it.
    pub packet_payload_bytes: u32,
    /// What a packet takes of the wire besides payload.
    pub packet_header_bytes: u32,
    /// From a message's last byte on the wire to its being in the receiver's memory, in nanoseconds.
    pub latency_nanoseconds: u64,
    /// A message takes up to this much longer, by chance, in nanoseconds. Where `semantics` are unordered it is this that
    /// lets messages overtake.
    pub jitter_nanoseconds: u64,
    /// From being in the receiver's memory to the sender's completion, in nanoseconds.
    pub completion_nanoseconds: u64,
}

/// What a NIC promises about the messages of one pair of NICs. All are reliable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Semantics {
    /// EFA's Scalable Reliable Datagram: messages arrive in any order.
    Srd,
    /// Reliable connections of InfiniBand and RoCE: messages arrive in the order in which they were sent.
    Rc,
    /// A byte stream: in order, and all of it fails together.
    Tcp,
}

impl Semantics {
    /// Whether messages of one pair of NICs arrive in the order in which they were sent.
    pub const fn ordered(self) -> bool {
        !matches!(self, Semantics::Srd)
    }
}

/// An oversubscribed fabric: hosts of one rack reach those of others over a shared uplink.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Racks {
    /// Hosts of one rack, at least 1. The last rack may have fewer.
    pub hosts: u32,
    /// What one rack sends to all others, and as much back, in bytes a second.
    pub uplink_bytes_per_second: u64,
}

/// The control plane's network: a message is late by a latency and its own length, and never waits for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Control {
    /// One way, in nanoseconds.
    pub latency_nanoseconds: u64,
    /// In bytes a second.
    pub bytes_per_second: u64,
}

impl Control {
    /// How long a message of `bytes` takes, in nanoseconds.
    pub fn delay_nanoseconds(&self, bytes: u64) -> u64 {
        let sending = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second.max(1));
        self.latency_nanoseconds.saturating_add(u64::try_from(sending).unwrap_or(u64::MAX))
    }
}

impl Nic {
    /// What a message takes of the wire, in bytes: payload and a header per packet, or as much as passes in the time that
    /// the NIC needs for any message. An empty message is one packet.
    pub fn wire_bytes(&self, payload_bytes: u64) -> u64 {
        let packets = payload_bytes.div_ceil(u64::from(self.packet_payload_bytes.max(1))).max(1);
        let bytes = payload_bytes.saturating_add(packets.saturating_mul(self.packet_header_bytes.into()));
        let least = u128::from(self.message_nanoseconds) * u128::from(self.bytes_per_second) / 1_000_000_000;
        bytes.max(u64::try_from(least).unwrap_or(u64::MAX))
    }

    /// Payload that long messages move, in bytes a second.
    pub fn payload_bytes_per_second(&self) -> u64 {
        let (payload, header) = (u128::from(self.packet_payload_bytes), u128::from(self.packet_header_bytes));
        let rate = u128::from(self.bytes_per_second) * payload / (payload + header).max(1);
        u64::try_from(rate).unwrap_or(u64::MAX)
    }
}

impl Cluster {
    /// GPUs of all hosts.
    pub fn gpus(&self) -> u32 {
        self.hosts.saturating_mul(self.host.gpus)
    }

    /// NICs of all hosts.
    pub fn nics(&self) -> u32 {
        self.hosts.saturating_mul(self.host.nics)
    }

    /// Where a trainer runs; `None` if there are fewer.
    pub fn trainer_gpu(&self, trainer: u32) -> Option<GpuId> {
        (trainer < self.trainers).then_some(GpuId(trainer))
    }

    /// Where a receiver runs; `None` if there are fewer.
    pub fn receiver_gpu(&self, receiver: u32) -> Option<GpuId> {
        let first = self.trainers.checked_next_multiple_of(self.host.gpus)?;
        (receiver < self.receivers).then_some(GpuId(first.checked_add(receiver)?))
    }

    /// The NICs that a GPU uses, in the order of its rails.
    pub fn nics_of(&self, gpu: GpuId) -> Vec<NicId> {
        let (Host { gpus, nics, .. }, gpu) = (&self.host, gpu.0);
        let (host, gpu) = (gpu / gpus.max(&1), gpu % gpus.max(&1));
        let first = host.saturating_mul(*nics);
        match &self.host.gpu_nics {
            Some(listed) => {
                let used = listed.get(gpu as usize).map(Vec::as_slice).unwrap_or_default();
                used.iter().map(|nic| NicId(first.saturating_add(*nic))).collect()
            }
            None => dealt(gpu, *gpus, *nics).map(|nic| NicId(first.saturating_add(nic))).collect(),
        }
    }

    /// The rack of a NIC's host; `None` where the fabric is non-blocking.
    pub(crate) fn rack_of(&self, nic: NicId) -> Option<u32> {
        let racks = self.racks?;
        (nic.0 / self.host.nics.max(1)).checked_div(racks.hosts)
    }

    /// Racks, the last of which may be smaller; 0 where the fabric is non-blocking.
    pub fn rack_count(&self) -> u32 {
        self.racks.map_or(0, |racks| self.hosts.div_ceil(racks.hosts.max(1)))
    }
}

/// The NICs of a GPU when all are dealt evenly and in order: some to each GPU, or each to some GPUs.
fn dealt(gpu: u32, gpus: u32, nics: u32) -> Range<u32> {
    let start = |gpu: u32| (u64::from(gpu) * u64::from(nics) / u64::from(gpus.max(1))) as u32;
    start(gpu)..start(gpu + 1).max(start(gpu) + 1)
}
