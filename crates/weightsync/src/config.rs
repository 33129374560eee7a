//! What a session is told about its job.

use std::net::IpAddr;
use std::time::Duration;

use rendezvous::{ClientConfig, DEADLINE_DEFAULT, JOB_DEFAULT, Secret, World};

use crate::fabric::Fabric;

/// Staging memory of a trainer, unless told otherwise: twice the chunks of 1 MiB that a rail has in flight.
pub const WATERMARK_BYTES_DEFAULT: u64 = 256 << 20;

/// What a rank needs to know to take part in a job. [`SessionConfig::new`] fills in the rest.
#[derive(Debug, Clone)]
pub struct SessionConfig {
    /// The controller's `host:port`.
    pub controller: String,
    /// The job's name, the controller's too.
    pub job: String,
    /// How many ranks the job has.
    pub world: World,
    /// This rank, counted from 0 on its side.
    pub rank: u32,
    /// The job's secret.
    pub secret: Secret,
    /// How to reach peers.
    pub fabric: Fabric,
    /// The longest wait without progress; every wait has it.
    pub deadline: Duration,
    /// A trainer's staging memory in bytes.
    pub watermark_bytes: u64,
    /// The address that this rank's rail binds to; `None` takes those of the NICs that were named, else the one that reaches
    /// the controller.
    pub bind: Option<IpAddr>,
    /// The NICs of this rank, a rail each, as libfabric names their domains (`rdmap79s0-rdm`, `mlx5_0`, `eth0`); empty
    /// takes the first that libfabric offers. Ranks of one host that should use different NICs name them. Rail `i` of a
    /// trainer writes to rail `i` of an inference rank, modulo how many that has.
    pub nics: Vec<String>,
    /// The CPUs that the thread of the rails runs on, by the system's numbers: best of the NICs' NUMA node. Empty takes
    /// all that the process may use.
    pub cpus: Vec<usize>,
    /// Each rail's bandwidth for the lower bound; `None` takes the NIC's line rate, or over loopback and shared memory
    /// what one thread copies here.
    pub rail_bytes_per_second: Option<u64>,
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
            fabric: Fabric::Auto,
            deadline: DEADLINE_DEFAULT,
            watermark_bytes: WATERMARK_BYTES_DEFAULT,
            bind: None,
            nics: Vec::new(),
            cpus: Vec::new(),
            rail_bytes_per_second: None,
        }
    }

    pub(crate) fn client(&self) -> ClientConfig {
        ClientConfig {
            controller: self.controller.clone(),
            secret: self.secret.clone(),
            deadline: self.deadline,
        }
    }
}
