//! What a session is told about its job.

use std::net::IpAddr;
use std::time::Duration;

use rendezvous::{ClientConfig, DEADLINE_DEFAULT, JOB_DEFAULT, Secret, Transport, World};

use crate::device::Device;
use crate::fabric::{self, Fabric, FabricError};
use crate::metrics::Metrics;

/// Staging memory of a trainer, unless told otherwise: twice the chunks of 1 MiB that a rail has in flight.
pub const WATERMARK_BYTES_DEFAULT: u64 = 256 << 20;

/// What a rank needs to know to take part in a job. [`SessionConfig::new`] fills in the rest.
#[derive(Debug, Clone)]
pub struct SessionConfig {
    /// The controller's `host:port`; or, with the feature `etcd`, where in etcd it says where it is: `etcd://host:2379/prefix`.
    /// [`rendezvous::Record::Etcd`] tells where user, password and certificates come from.
    pub controller: String,
    /// The job's name, the controller's too.
    pub job: String,
    /// How many ranks the job has.
    pub world: World,
    /// This rank, counted from 0 on its side.
    pub rank: u32,
    /// The job's secret.
    pub secret: Secret,
    /// How this rank talks to the controller: plain TCP, or TLS where the controller has it too.
    pub transport: Transport,
    /// Where this rank's weights are, or with [`Trainer::offloaded`](crate::Trainer::offloaded) by which GPU they go. GPUs of one host reach each other, and NICs reach GPUs (`efa`, `verbs`); on `tcp` and `shm`
    /// they are staged through page-locked host memory, which takes an inference rank as much of that as its weights have bytes.
    pub device: Device,
    /// How to reach peers.
    pub fabric: Fabric,
    /// The longest wait without progress; every wait has it.
    pub deadline: Duration,
    /// A trainer's staging memory in bytes.
    pub watermark_bytes: u64,
    /// The address that this rank's rail binds to; `None` takes those of the NICs that were named, else the one that reaches
    /// the controller.
    pub bind: Option<IpAddr>,
    /// The NICs of this rank, a rail each, as libfabric names their domains (`rdmap79s0-rdm`, `mlx5_0`, `eth0`).
    /// [`SessionConfig::place`] names them by the topology of the host. Empty takes the only RDMA NIC, and is an error where
    /// there are several; on `tcp` it takes the interface that reaches the controller. Rail `i` of a trainer writes to rail
    /// `i` of an inference rank; [`xfer_plan::paired_rail`] says to which where one has more than the other.
    pub nics: Vec<String>,
    /// The CPUs that the thread of the rails runs on, by the system's numbers: best of the NICs' NUMA node, as
    /// [`SessionConfig::place`] chooses. Empty takes all that the process may use.
    pub cpus: Vec<usize>,
    /// Each rail's bandwidth for the lower bound; `None` takes the NIC's line rate, or over loopback and shared memory
    /// what one thread copies here.
    pub rail_bytes_per_second: Option<u64>,
    /// What this rank counts into. Ranks of one process may share one, and a controller with them.
    pub metrics: Metrics,
}

impl SessionConfig {
    /// Rank `rank` of the job `"default"`, without a secret, with the best fabric that both ends have.
    pub fn new(controller: impl Into<String>, world: World, rank: u32) -> Self {
        Self {
            controller: controller.into(),
            job: JOB_DEFAULT.into(),
            world,
            rank,
            secret: Secret::none(),
            transport: Transport::tcp(),
            device: Device::Cpu,
            fabric: Fabric::Auto,
            deadline: DEADLINE_DEFAULT,
            watermark_bytes: WATERMARK_BYTES_DEFAULT,
            bind: None,
            nics: Vec::new(),
            cpus: Vec::new(),
            rail_bytes_per_second: None,
            metrics: Metrics::new(),
        }
    }

    /// Fills in `nics` and `cpus` by the topology of this host, for rank `local_rank` of the `local_ranks` that run on it,
    /// trainers and inference ranks together: what torchrun calls `LOCAL_RANK` and `LOCAL_WORLD_SIZE`. Every rank of a
    /// host must say the same `local_ranks` and the same fabric.
    ///
    /// With as many ranks as GPUs, a rank takes the NICs nearest to the GPU of its number, in the order of PCI addresses;
    /// otherwise ranks take even shares of the host's NICs. The thread of the rails is pinned to a core near them that no
    /// other rank of the host has, while there are enough. What was named before stays as it is, so set `fabric`, `nics`
    /// and `cpus` first. Without RDMA NICs, and on other fabrics, nothing changes.
    ///
    /// # Errors
    ///
    /// A local rank that the host does not have; RDMA NICs none of which has a link; and a NIC of this rank that libfabric
    /// does not offer.
    pub fn place(&mut self, local_rank: u32, local_ranks: u32) -> Result<(), FabricError> {
        fabric::place(self, local_rank, local_ranks)
    }

    pub(crate) fn client(&self) -> ClientConfig {
        ClientConfig {
            controller: self.controller.clone(),
            job: self.job.clone(),
            secret: self.secret.clone(),
            transport: self.transport.clone(),
            deadline: self.deadline,
        }
    }
}
