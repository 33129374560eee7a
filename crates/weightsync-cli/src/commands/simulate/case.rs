//! One simulation: prepared from what the command line says, run, and told of on the way.

use std::time::Instant;

use anyhow::Context;
use indicatif::ProgressBar;
use xfer_plan::model::{JobSpec, Machine};
use xfer_plan::{Manifest, RailDecl, plan};
use xfer_sim::{Cluster, GpuId, JobConfig, Progress, simulate};

use super::args::{Conditions, SimulateArgs};
use super::cluster::NamedCluster;
use super::facts::{Facts, Planned};
use crate::WrongInput;
use crate::commands::transfer::JobFacts;

/// What is simulated.
#[derive(Clone)]
pub(crate) struct Case {
    pub(crate) job: JobSpec,
    pub(crate) cluster: NamedCluster,
    pub(crate) conditions: Conditions,
}

impl Case {
    pub(crate) fn new(args: &SimulateArgs) -> anyhow::Result<Case> {
        let cluster = args.cluster.clone();
        let machine = cluster.machine();
        let mut job = args.transfer.job(machine)?;
        for (side, stated) in
            [("trainers", &mut job.trainers.machine), ("receivers", &mut job.receivers.machine)]
        {
            if *stated != machine && *stated != Machine::default() {
                return Err(WrongInput(format!(
                    "the job file states {side}.machine, but here the cluster says what hosts and NICs are: leave it out"
                ))
                .into());
            }
            *stated = machine;
        }
        job.options.cost = cluster.cost(job.options.cost);
        Ok(Case { job, cluster, conditions: args.conditions.clone() })
    }

    /// What both sides have and want, and the cluster under it.
    pub(crate) fn placed(&self) -> anyhow::Result<(Manifest, Cluster)> {
        let mut manifest = self.job.manifest()?;
        let ranks = |count: usize| u32::try_from(count).context("there are more ranks than a cluster has");
        let cluster =
            self.cluster.for_ranks(ranks(manifest.trainers.len())?, ranks(manifest.receivers.len())?);
        // A cluster may give its GPUs different numbers of NICs.
        let declared = RailDecl { bytes_per_second: cluster.nic.payload_bytes_per_second() };
        let rails = |gpu: Option<GpuId>| gpu.map(|gpu| vec![declared; cluster.nics_of(gpu).len()]);
        for (rank, trainer) in (0..).zip(&mut manifest.trainers) {
            if let Some(rails) = rails(cluster.trainer_gpu(rank)) {
                trainer.rails = rails;
            }
        }
        for (rank, receiver) in (0..).zip(&mut manifest.receivers) {
            if let Some(rails) = rails(cluster.receiver_gpu(rank)) {
                receiver.rails = rails;
            }
        }
        Ok((manifest, cluster))
    }

    /// Simulates it, and says on the spinner how far it is.
    pub(crate) fn run(&self, spinner: &ProgressBar) -> anyhow::Result<Facts> {
        spinner.set_message("building the manifest");
        let (manifest, cluster) = self.placed()?;
        let job = JobFacts::new(&self.job, &manifest)?;
        let Conditions { slow, skew, versions, seed, tolerance, events_max, deadline } =
            self.conditions.clone();
        let config = JobConfig {
            versions,
            skew,
            slow,
            deadline,
            tolerance,
            seed,
            events_max,
            ..JobConfig::new(cluster, manifest)
        };
        config.check().map_err(|error| WrongInput(error.to_string()))?;
        spinner.set_message("planning");
        let planned = planned(&config.manifest)?;
        spinner.set_message("simulating");
        let started = Instant::now();
        let report = simulate(&config, &mut |progress| {
            spinner.set_message(progress_text(progress, started.elapsed().as_secs_f64()));
        })?;
        let wall_seconds = started.elapsed().as_secs_f64();
        Ok(Facts::new(job, self, config.cluster, planned, report, wall_seconds))
    }
}

/// The job makes a plan of its own; this one is gone before it does, because large ones fill memory.
fn planned(manifest: &Manifest) -> anyhow::Result<Planned> {
    let plan = plan(manifest)?;
    let exchanges = plan.tables.iter().map(|table| table.exchanges.len()).sum();
    Ok(Planned { predicted_seconds: plan.predicted.seconds(), exchanges })
}

fn progress_text(progress: &Progress, wall_seconds: f64) -> String {
    let Progress { at, events, delivered_bytes, total_bytes } = progress;
    let share = *delivered_bytes as f64 / (*total_bytes).max(1) as f64 * 100.0;
    let rate = *events as f64 / wall_seconds.max(f64::MIN_POSITIVE) / 1e6;
    let simulated = at.nanos() as f64 / 1e6;
    format!("simulated {simulated:.1} ms, {share:.0} % of the bytes, {rate:.2} M events/s")
}
