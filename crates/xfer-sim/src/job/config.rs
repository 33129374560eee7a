//! What is simulated: a cluster, a manifest, who is slow. Checked before anything runs.

use core::time::Duration;

use serde::{Deserialize, Serialize};
use xfer_plan::{Manifest, Rank};

use super::error::JobError;
use crate::cluster::Cluster;

/// A job to be simulated: its ranks join, agree on a plan and push.
#[derive(Clone, Debug)]
pub struct JobConfig {
    /// Where it runs. Trainer and receiver `i` are the ranks `i` of the manifest.
    pub cluster: Cluster,
    /// What both sides have and want, and how the plan cuts it. Hosts' names decide who may pass on over NVLink, so they must
    /// be those of the cluster: [`JobConfig::check`] compares.
    pub manifest: Manifest,
    /// Versions that are pushed, one after another; at least 1.
    pub versions: u32,
    /// Trainers begin a version at moments spread evenly over so long: what stragglers cost before the first byte.
    pub skew: Duration,
    /// Ranks that are slower than the cluster says.
    pub slow: Vec<Slow>,
    /// The job's deadline, as sessions are given it.
    pub deadline: Duration,
    /// Short operations that go the same way are simulated as one, up to so many bytes; 0: each by itself. Time to post, room
    /// on the wire and kernels are counted for each all the same.
    pub bundle_bytes: u64,
    /// See [`Network::new`](crate::Network::new).
    pub tolerance: f64,
    /// Of all chance.
    pub seed: u64,
    /// Events after which the simulation is given up.
    pub events_max: u64,
}

/// A rank that is slow: its NICs, its memory and its copies.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slow {
    /// Which rank.
    pub rank: Rank,
    /// What is left of its speed: above 0, at most 1.
    pub factor: f64,
    /// Only this one of its NICs, as its rails are numbered; without it all that it has.
    pub nic: Option<u32>,
}

impl JobConfig {
    /// One version on a cluster without stragglers.
    pub fn new(cluster: Cluster, manifest: Manifest) -> JobConfig {
        JobConfig {
            cluster,
            bundle_bytes: manifest.options.chunk_bytes_max,
            manifest,
            versions: 1,
            skew: Duration::ZERO,
            slow: Vec::new(),
            deadline: Duration::from_secs(30),
            tolerance: 0.1,
            seed: 1,
            events_max: 1_000_000_000,
        }
    }

    /// Whether it can be simulated.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong, by name.
    pub fn check(&self) -> Result<(), JobError> {
        self.cluster.check()?;
        let Manifest { trainers, receivers, options } = &self.manifest;
        for (side, ranks, placed) in [
            ("trainers", trainers.len(), self.cluster.trainers),
            ("receivers", receivers.len(), self.cluster.receivers),
        ] {
            if ranks != placed as usize {
                return Err(JobError::Ranks { side, ranks, placed });
            }
        }
        if options.cost.offloaded {
            return Err(JobError::Offloaded);
        }
        if self.versions == 0 {
            return Err(JobError::Versions);
        }
        self.check_hosts("trainer", trainers.iter().map(|rank| rank.host.as_str()))?;
        self.check_hosts("receiver", receivers.iter().map(|rank| rank.host.as_str()))?;
        for slow in &self.slow {
            let gpu = match slow.rank {
                Rank::Trainer(rank) => self.cluster.trainer_gpu(rank.0),
                Rank::Receiver(rank) => self.cluster.receiver_gpu(rank.0),
            };
            let is_there = gpu.is_some_and(|gpu| {
                let nics = self.cluster.nics_of(gpu).len();
                slow.nic.is_none_or(|nic| (nic as usize) < nics)
            });
            if !(is_there && slow.factor > 0.0 && slow.factor <= 1.0) {
                return Err(JobError::Slow { slow: *slow });
            }
        }
        Ok(())
    }

    /// Ranks that share a host in the manifest share one in the cluster, and the other way round.
    fn check_hosts<'m>(
        &self,
        side: &'static str,
        hosts: impl Iterator<Item = &'m str>,
    ) -> Result<(), JobError> {
        let gpus = self.cluster.host.gpus as usize;
        let mut before: Option<&str> = None;
        for (rank, host) in hosts.enumerate() {
            let is_same = before.replace(host) == Some(host);
            if is_same != (rank % gpus != 0) {
                return Err(JobError::Hosts { side, rank, host: host.to_owned(), gpus });
            }
        }
        Ok(())
    }
}
