//! The arguments of one rank, trainer or inference.

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::bail;
use clap::Args;
use topology::CpuSet;
use weightsync::SessionConfig;

use super::access::{NAME_VARIABLE, RENDEZVOUS_VARIABLE};
use super::local_rank::{self, LocalRank};
use super::{DeviceArg, JobArgs, MetricsArgs, RailArgs};

/// Which rank of a job, where it runs and what it loads.
#[derive(Args, Clone)]
pub(crate) struct RankArgs {
    /// The controller's HOST:PORT, or where in etcd it says where it is: etcd://HOST:2379/PREFIX [default: port 7070 of
    /// MASTER_ADDR, of SLURM_LAUNCH_NODE_IPADDR or of the first in SLURM_STEP_NODELIST, if one is set]
    #[arg(long, visible_alias = "rendezvous", value_name = "ADDR", env = RENDEZVOUS_VARIABLE, hide_env_values = true)]
    pub(crate) controller: String,
    /// This rank, counted from 0 on its side [default: from RANK, OMPI_COMM_WORLD_RANK, PMI_RANK or SLURM_PROCID, the nearest
    /// launcher first; and the number of ranks on this side from WORLD_SIZE and so on]
    #[arg(long, value_name = "R")]
    pub(crate) rank: u32,
    #[command(flatten)]
    pub(crate) job: JobArgs,
    /// The name or address in the controller's certificate, with TLS [default: the host of --controller]
    #[arg(long, value_name = "NAME", env = NAME_VARIABLE, hide_env_values = true)]
    pub(crate) tls_name: Option<String>,
    /// Where this rank's weights are: cpu, cuda:N, or cuda, which is the GPU of this rank's number on its host (--local-rank)
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub(crate) device: DeviceArg,
    #[command(flatten)]
    pub(crate) rail: RailArgs,
    /// The address that this rank's rail binds to [default: the one that reaches the controller]
    #[arg(long, value_name = "IP")]
    pub(crate) bind: Option<IpAddr>,
    /// This rank among the N ranks of its host, trainers and inference ranks together, counted from 0: it takes the RDMA
    /// NICs and a core near them that the topology gives to it [default: from LOCAL_RANK and LOCAL_WORLD_SIZE, or from
    /// what Open MPI or Slurm set]
    #[arg(long, value_name = "I/N")]
    pub(crate) local_rank: Option<LocalRank>,
    /// The CPUs that the thread of the rails may run on, such as 3 or 0-3,8 [default: with --local-rank a core near its RDMA
    /// NICs, else all]
    #[arg(long, value_name = "LIST", value_parser = cpus)]
    pub(crate) cpus: Option<CpuSet>,
    /// The checkpoint: trainers load their shard of it, inference ranks read its shapes
    #[arg(long, value_name = "PATH")]
    pub(crate) checkpoint: PathBuf,
    #[command(flatten)]
    pub(crate) metrics: MetricsArgs,
    /// Print one JSON object per line, each with an "event"
    #[arg(long)]
    pub(crate) json: bool,
    /// End when standard input is closed: a parent process that dies takes this one along
    #[arg(long, hide = true)]
    pub(crate) until_stdin_closes: bool,
}

impl RankArgs {
    /// Refuses a rank that its side does not have, before anything is loaded for it.
    pub(crate) fn check(&self, side: &str, ranks: u32) -> anyhow::Result<()> {
        if self.rank >= ranks {
            bail!("there is no {side} {}: the job has {ranks}, and ranks count from 0", self.rank);
        }
        Ok(())
    }

    pub(crate) fn config(&self) -> anyhow::Result<SessionConfig> {
        let mut config = SessionConfig::new(self.controller.clone(), self.job.world(), self.rank);
        config.job = self.job.job.clone();
        config.secret = self.job.access.secret()?;
        config.transport =
            self.job.access.transport(self.tls_name.as_deref().filter(|name| !name.is_empty()))?;
        config.bind = self.bind;
        self.rail.apply(&mut config);
        config.cpus = self.cpus.iter().flat_map(CpuSet::iter).map(|cpu| cpu as usize).collect();
        let variable = |name: &str| Some(std::env::var_os(name)?.to_string_lossy().into_owned());
        let launched = || local_rank::of_launcher(&variable);
        let local_rank = self.local_rank.map_or_else(launched, |rank| Ok(Some(rank)))?;
        config.device = self.device.of_local_rank(local_rank.map_or(0, |rank| rank.index))?;
        if let Some(LocalRank { index, count }) = local_rank {
            config.place(index, count)?;
        }
        Ok(config)
    }
}

fn cpus(text: &str) -> Result<CpuSet, String> {
    match text.parse::<CpuSet>() {
        Ok(cpus) if cpus.is_empty() => Err("name at least one CPU".into()),
        Ok(cpus) => Ok(cpus),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_a_list_that_is_not_empty() {
        assert_eq!(cpus("0-3,8").map(|cpus| cpus.iter().collect()), Ok(vec![0, 1, 2, 3, 8]));
        for wrong in ["", ",", "3-1", "-1", "8192", "all"] {
            assert!(cpus(wrong).is_err(), "{wrong}");
        }
    }
}
