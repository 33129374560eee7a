//! Clusters by name, each number with its source.
//!
//! "Assumed" marks what no source that we know of states: such a number is a guess of the right size, to be replaced by a
//! measurement of the cluster at hand. No preset has racks: EC2 UltraClusters and rail-optimised InfiniBand are published as
//! non-blocking.

use core::fmt;
use core::str::FromStr;

use super::{Cluster, Control, Gpu, Host, Nic, Semantics};

/// A kind of host with its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Preset {
    /// AWS `p5.48xlarge`: 8 H100, 32 EFA NICs of 100 Gb/s.
    P5,
    /// AWS `p5en.48xlarge`: 8 H200, 16 EFA NICs of 200 Gb/s.
    P5en,
    /// 8 H100, each with a ConnectX-7 of 400 Gb/s on InfiniBand, as in a DGX H100.
    H100Ib400,
    /// Two network namespaces of one Linux machine with 32 shaped links of 100 Mb/s: the 3200 Gb/s host at 1:1000.
    Lab32x100M,
}

/// A name that no preset has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no cluster is called {0:?}; there are p5.48xlarge, p5en.48xlarge, h100-ib400 and lab-32x100M")]
pub struct NoSuchPreset(pub String);

impl Preset {
    /// Every preset.
    pub const ALL: [Preset; 4] = [Preset::P5, Preset::P5en, Preset::H100Ib400, Preset::Lab32x100M];

    /// Its name, as it is parsed.
    pub const fn name(self) -> &'static str {
        match self {
            Preset::P5 => "p5.48xlarge",
            Preset::P5en => "p5en.48xlarge",
            Preset::H100Ib400 => "h100-ib400",
            Preset::Lab32x100M => "lab-32x100M",
        }
    }

    /// So many ranks on as many hosts as they need, at least one.
    pub fn cluster(self, trainers: u32, receivers: u32) -> Cluster {
        let (host, nic, control) = match self {
            Preset::P5 => (eight_gpus(H100, 32), P5_NIC, ENA),
            Preset::P5en => (eight_gpus(H200, 16), P5EN_NIC, ENA),
            Preset::H100Ib400 => (eight_gpus(H100, 8), CONNECTX_7, ETHERNET),
            Preset::Lab32x100M => {
                (Host { gpus: 1, nics: 32, gpu_nics: None, gpu: HOST_MEMORY }, VETH, LOOPBACK)
            }
        };
        let hosts = trainers.div_ceil(host.gpus).saturating_add(receivers.div_ceil(host.gpus)).max(1);
        Cluster { hosts, trainers, receivers, host, nic, racks: None, control }
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Preset {
    type Err = NoSuchPreset;

    fn from_str(name: &str) -> Result<Preset, NoSuchPreset> {
        let found = Preset::ALL.into_iter().find(|preset| preset.name() == name);
        found.ok_or_else(|| NoSuchPreset(name.to_owned()))
    }
}

/// NICs hang off the PCIe switch of their GPU, the same number at each.
fn eight_gpus(gpu: Gpu, nics: u32) -> Host {
    Host { gpus: 8, nics, gpu_nics: None, gpu }
}

/// An H100 SXM.
const H100: Gpu = Gpu {
    // One kernel between two H200, whose NVLink is the same, copied 370 GB/s (measured); the data sheet says 450 each way.
    nvlink_bytes_per_second: 370_000_000_000,
    // PCIe 5 x16 from pinned memory on an H200 (measured): 55.5 GB/s in, 55.3 out.
    copy_engine_bytes_per_second: 55_000_000_000,
    // NVIDIA's data sheet.
    hbm_bytes_per_second: 3_350_000_000_000,
    // Assumed.
    launch_nanoseconds: 5_000,
};

/// An H200 SXM: the same chip with other memory, 4.8 TB/s by NVIDIA's data sheet.
const H200: Gpu = Gpu { hbm_bytes_per_second: 4_800_000_000_000, ..H100 };

/// An EFA NIC of a `p5.48xlarge`.
const P5_NIC: Nic = Nic {
    // The EFA documentation of AWS.
    semantics: Semantics::Srd,
    // EC2's instance tables: 3200 Gb/s over 32 network cards.
    bytes_per_second: 12_500_000_000,
    // 2.1 million WRITEs a second were reported for the NICs of one GPU, posted by one thread.
    post_nanoseconds: 476,
    // Assumed: one NIC alone is as fast as that thread.
    message_nanoseconds: 476,
    // libfabric's efa provider: the size of its transmit queue.
    queue_depth: 4096,
    // The device's longest datagram.
    packet_payload_bytes: 8928,
    // Derived: EC2's jumbo frame of 9001 bytes less the payload, and 38 bytes of Ethernet framing. The ladder that is
    // published for this host ends at 97.1 %; this allows 98.8.
    packet_header_bytes: 111,
    // Assumed: half of the 20 us from a post to the completion of an empty WRITE, which the planner takes too.
    latency_nanoseconds: 10_000,
    // Assumed: SRD sprays packets over many ways; how far they spread is not published.
    jitter_nanoseconds: 5_000,
    // Assumed: the other half.
    completion_nanoseconds: 10_000,
};

/// An EFA NIC of a `p5en.48xlarge`: as on a p5, except where said.
const P5EN_NIC: Nic = Nic {
    // EC2's instance tables: 3200 Gb/s over 16 network cards.
    bytes_per_second: 25_000_000_000,
    // AWS announced up to 35 % less latency than on a p5.
    latency_nanoseconds: 6_500,
    completion_nanoseconds: 6_500,
    ..P5_NIC
};

/// A ConnectX-7 with one port of NDR InfiniBand.
const CONNECTX_7: Nic = Nic {
    semantics: Semantics::Rc,
    // NVIDIA's data sheet: 400 Gb/s.
    bytes_per_second: 50_000_000_000,
    // 11 million WRITEs a second were reported; assumed to be both what a thread posts and what the NIC takes.
    post_nanoseconds: 91,
    message_nanoseconds: 91,
    // Assumed: what is commonly asked for; the card takes more.
    queue_depth: 1024,
    // The largest MTU of the InfiniBand specification, which counts payload alone.
    packet_payload_bytes: 4096,
    // The specification's local route, base transport and checksum fields: 8 + 12 + 4 + 2. The first packet of a WRITE has 16
    // more, which we leave out.
    packet_header_bytes: 26,
    // Assumed: two NICs and three switches.
    latency_nanoseconds: 2_000,
    // Assumed: one way per connection, so nothing spreads.
    jitter_nanoseconds: 0,
    // Assumed.
    completion_nanoseconds: 2_000,
};

/// A shaped veth under libfabric's `tcp` provider.
const VETH: Nic = Nic {
    semantics: Semantics::Tcp,
    // The rate that the shaper is given.
    bytes_per_second: 12_500_000,
    // Measured on 2 cores of an EPYC, over one link shaped to 100 Gb/s: WRITEs of 4, 16 and 64 KiB take 8, 11 and 18 us each, which
    // is 6.5 us and the bytes at 3 to 5.5 GB/s. Which end limits was not measured: both numbers allow for all of it.
    post_nanoseconds: 6_500,
    message_nanoseconds: 6_500,
    // The provider's transmit queue.
    queue_depth: 256,
    // TCP over IPv4 with timestamps at MTU 1500; the shaper counts the 14 bytes of the Ethernet header as well. Measured:
    // 95.6 % of the rate is payload.
    packet_payload_bytes: 1448,
    packet_header_bytes: 66,
    // Assumed: two passes through the kernel.
    latency_nanoseconds: 50_000,
    jitter_nanoseconds: 0,
    // Assumed: the peer's thread has to read before it acknowledges.
    completion_nanoseconds: 50_000,
};

/// Where the lab has GPUs: one thread's memcpy, 10 GB/s (measured), and nothing to launch.
const HOST_MEMORY: Gpu = Gpu {
    nvlink_bytes_per_second: 10_000_000_000,
    copy_engine_bytes_per_second: 10_000_000_000,
    hbm_bytes_per_second: 10_000_000_000,
    launch_nanoseconds: 0,
};

/// TCP over EC2's ENA: one flow within a placement group is limited to 10 Gb/s (EC2's documentation); the latency is assumed.
const ENA: Control = Control { latency_nanoseconds: 50_000, bytes_per_second: 1_250_000_000 };

/// TCP over a host's Ethernet of 100 Gb/s, of which one connection gets 25; both assumed.
const ETHERNET: Control = Control { latency_nanoseconds: 30_000, bytes_per_second: 3_125_000_000 };

/// TCP within one machine: 2 to 5 GB/s (measured); the latency is assumed.
const LOOPBACK: Control = Control { latency_nanoseconds: 30_000, bytes_per_second: 3_000_000_000 };
