//! What a simulation says, for the summary, for programs and for the page alike. All of it is simulated.

use serde::Serialize;
use xfer_plan::Rank;
use xfer_sim::{Cluster, GpuId, JobReport, NicId, NicUse, PushTimes, Slow, StageTime};

use super::case::Case;
use super::cluster::NamedCluster;
use crate::commands::transfer::JobFacts;

/// Ranks that are listed.
const SLOWEST: usize = 5;

/// A simulated job and what it was simulated on.
#[derive(Serialize)]
pub(crate) struct Facts {
    /// Always: a reader of these facts shall not take them for measurements.
    pub(crate) simulated: bool,
    pub(crate) job: JobFacts,
    pub(crate) cluster: ClusterFacts,
    pub(crate) conditions: ConditionFacts,
    pub(crate) report: JobReport,
    /// The last push over the lower bound; none where nothing moves.
    pub(crate) ratio: Option<f64>,
    /// By the plan's cost model.
    pub(crate) predicted_seconds: f64,
    /// Ranges of blocks whose scales trainers find out together before they quantise: messages that are planned, but not
    /// simulated.
    pub(crate) exchanges: usize,
    pub(crate) utilisation: Utilisation,
    /// Ranks whose last WRITE was delivered last, the last first.
    pub(crate) slowest: Vec<SlowRank>,
    /// What the simulation itself took, on this machine.
    pub(crate) wall_seconds: f64,
    pub(crate) events_per_second: f64,
}

/// The cluster with its name.
#[derive(Serialize)]
pub(crate) struct ClusterFacts {
    pub(crate) name: String,
    /// Payload that a NIC moves, in bytes a second.
    pub(crate) payload_bytes_per_second: u64,
    #[serde(flatten)]
    pub(crate) cluster: Cluster,
}

/// What else was given.
#[derive(Serialize)]
pub(crate) struct ConditionFacts {
    pub(crate) seed: u64,
    pub(crate) tolerance: f64,
    pub(crate) skew_seconds: f64,
    pub(crate) slow: Vec<Slow>,
}

/// Payload over what the NICs could move from the first WRITE to the last, between 0 and 1; none where nothing moves.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct Utilisation {
    /// Trainers' NICs, sending.
    pub(crate) trainers_out: Option<f64>,
    /// Receivers' NICs, receiving.
    pub(crate) receivers_in: Option<f64>,
}

/// A rank that was late.
#[derive(Serialize)]
pub(crate) struct SlowRank {
    pub(crate) rank: Rank,
    /// When its last WRITE was delivered, in seconds from the beginning of the push.
    pub(crate) written_at: f64,
    /// What took it longest.
    pub(crate) longest: Option<StageTime>,
}

impl ClusterFacts {
    pub(crate) fn new(named: &NamedCluster, cluster: Cluster) -> ClusterFacts {
        let payload_bytes_per_second = cluster.nic.payload_bytes_per_second();
        ClusterFacts { name: named.name.clone(), payload_bytes_per_second, cluster }
    }
}

/// What the plan says, beside what was simulated.
pub(crate) struct Planned {
    pub(crate) predicted_seconds: f64,
    pub(crate) exchanges: usize,
}

impl Facts {
    pub(crate) fn new(
        job: JobFacts,
        case: &Case,
        cluster: Cluster,
        Planned { predicted_seconds, exchanges }: Planned,
        report: JobReport,
        wall_seconds: f64,
    ) -> Facts {
        let seconds = report.pushes.last().map_or(0.0, |push| push.seconds);
        let conditions = &case.conditions;
        Facts {
            simulated: true,
            job,
            conditions: ConditionFacts {
                seed: conditions.seed,
                tolerance: conditions.tolerance,
                skew_seconds: conditions.skew.as_secs_f64(),
                slow: conditions.slow.clone(),
            },
            ratio: (report.bound_seconds > 0.0).then(|| seconds / report.bound_seconds),
            predicted_seconds,
            exchanges,
            utilisation: utilisation(&cluster, &report),
            slowest: slowest(&report),
            wall_seconds,
            events_per_second: report.events as f64 / wall_seconds.max(f64::MIN_POSITIVE),
            cluster: ClusterFacts::new(&case.cluster, cluster),
            report,
        }
    }

    /// The push that is shown: the last one.
    pub(crate) fn push(&self) -> Option<&PushTimes> {
        self.report.pushes.last()
    }

    /// What the NICs of each side did, trainers' first.
    pub(crate) fn nics(&self) -> [Vec<NicUse>; 2] {
        let cluster = &self.cluster.cluster;
        [trainer_gpus(cluster), receiver_gpus(cluster)].map(|gpus| nics_of(cluster, &self.report, gpus))
    }
}

fn trainer_gpus(cluster: &Cluster) -> Vec<GpuId> {
    (0..cluster.trainers).filter_map(|rank| cluster.trainer_gpu(rank)).collect()
}

fn receiver_gpus(cluster: &Cluster) -> Vec<GpuId> {
    (0..cluster.receivers).filter_map(|rank| cluster.receiver_gpu(rank)).collect()
}

/// What the NICs of these GPUs did, each once, in order.
fn nics_of(cluster: &Cluster, report: &JobReport, gpus: Vec<GpuId>) -> Vec<NicUse> {
    let mut used: Vec<NicId> = gpus.into_iter().flat_map(|gpu| cluster.nics_of(gpu)).collect();
    used.sort_unstable();
    used.dedup();
    let number = |of: &NicUse| NicId(of.host.saturating_mul(cluster.host.nics).saturating_add(of.nic));
    let mut nics: Vec<NicUse> =
        report.nics.iter().filter(|of| used.binary_search(&number(of)).is_ok()).copied().collect();
    nics.sort_unstable_by_key(number);
    nics
}

fn utilisation(cluster: &Cluster, report: &JobReport) -> Utilisation {
    let first = report.ranks.iter().map(|rank| rank.writes_at).fold(f64::INFINITY, f64::min);
    let last = report.ranks.iter().map(|rank| rank.written_at).fold(0.0, f64::max);
    let rate = cluster.nic.payload_bytes_per_second() as f64;
    let mean = |gpus: Vec<GpuId>, bytes: fn(&NicUse) -> u64| {
        let nics = nics_of(cluster, report, gpus);
        let could = rate * nics.len() as f64 * (last - first);
        (could > 0.0).then(|| nics.iter().map(bytes).sum::<u64>() as f64 / could)
    };
    Utilisation {
        trainers_out: mean(trainer_gpus(cluster), |nic| nic.out_bytes),
        receivers_in: mean(receiver_gpus(cluster), |nic| nic.in_bytes),
    }
}

fn slowest(report: &JobReport) -> Vec<SlowRank> {
    let mut ranks: Vec<_> = report.ranks.iter().collect();
    // Of equals the first rank: the order is part of what is the same everywhere.
    ranks.sort_by(|a, b| b.written_at.total_cmp(&a.written_at).then(a.rank.cmp(&b.rank)));
    let longest =
        |stages: &[StageTime]| stages.iter().copied().max_by(|a, b| a.seconds.total_cmp(&b.seconds));
    let slow = ranks.into_iter().take(SLOWEST);
    slow.map(|of| SlowRank { rank: of.rank, written_at: of.written_at, longest: longest(&of.stages) })
        .collect()
}
