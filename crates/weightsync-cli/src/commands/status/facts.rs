//! The status as a program reads it, and as the text is made of: ranks in words, times in seconds, sums and rates.

use serde::Serialize;
use weightsync::status::{PhaseStatus, RailStatus, RankStatus, Status};
use weightsync::{Rank, Served};

/// See the module.
#[derive(Serialize)]
pub(super) struct Facts {
    pub(super) controller: String,
    pub(super) job: String,
    pub(super) trainers: u32,
    pub(super) inference: u32,
    pub(super) joined_trainers: u32,
    pub(super) joined_inference: u32,
    pub(super) up_seconds: f64,
    pub(super) deadline_seconds: f64,
    pub(super) verify: String,
    /// joining, connecting, idle, ended, or the stage of the push.
    pub(super) phase: String,
    pub(super) phase_seconds: f64,
    pub(super) waiting_for: Vec<String>,
    /// What they have not done.
    pub(super) waiting_to: Option<&'static str>,
    pub(super) committed: u64,
    pub(super) plan: Option<PlanFacts>,
    pub(super) push: Option<PushFacts>,
    pub(super) ranks: Vec<RankFacts>,
    pub(super) attempts: Vec<AttemptFacts>,
}

#[derive(Serialize)]
pub(super) struct PlanFacts {
    digest: String,
    pub(super) bytes: u64,
    pub(super) writes: u64,
    pub(super) bound_seconds: f64,
}

#[derive(Serialize)]
pub(super) struct PushFacts {
    pub(super) version: u64,
    pub(super) push: String,
    pub(super) seconds: f64,
    pub(super) bytes: u64,
    pub(super) bytes_planned: u64,
    pub(super) gb_per_second: f64,
}

#[derive(Serialize)]
pub(super) struct RankFacts {
    pub(super) rank: String,
    pub(super) address: String,
    pub(super) heard_seconds: f64,
    pub(super) left: bool,
    /// Of an inference rank: the version that it serves; none while it is torn, or not known.
    pub(super) serves: Option<u64>,
    /// The version whose push has torn it.
    pub(super) torn_by: Option<u64>,
    /// It has come back, and has not got the committed version.
    pub(super) behind: bool,
    pub(super) waited_for: bool,
    pub(super) bytes: u64,
    pub(super) bytes_planned: Option<u64>,
    pub(super) gb_per_second: f64,
    /// In the last attempt that it finished writing.
    pub(super) rails: Vec<RailFacts>,
}

#[derive(Serialize)]
pub(super) struct RailFacts {
    pub(super) name: String,
    pub(super) bytes: u64,
    pub(super) gb_per_second: f64,
    pub(super) up: bool,
}

#[derive(Serialize)]
pub(super) struct AttemptFacts {
    pub(super) version: u64,
    pub(super) push: String,
    pub(super) ended_seconds_ago: f64,
    pub(super) seconds: f64,
    /// The plan's bytes over the seconds; none where it was aborted.
    pub(super) gb_per_second: Option<f64>,
    pub(super) aborted: Option<String>,
}

const GB: f64 = 1e9;

impl Facts {
    pub(super) fn new(controller: &str, status: Status) -> Self {
        let is_trainer = |rank: &Rank| matches!(rank, Rank::Trainer(_));
        let joined = status.ranks.iter().filter(|rank| !rank.left).map(|rank| rank.rank);
        let (trainers, inference): (Vec<Rank>, Vec<Rank>) = joined.partition(is_trainer);
        let writes = matches!(status.phase, PhaseStatus::Pushing(_));
        let written = status.ranks.iter().filter(|rank| rank.planned.is_some());
        let bytes: u64 = written.clone().map(|rank| rank.bytes).fold(0, u64::saturating_add);
        let rate: f64 = written.map(|rank| rank.bytes_per_second).sum();
        let planned = status.plan.map_or(0, |plan| plan.bytes);
        let waited_for = |rank: Rank| status.waiting.contains(&rank);
        let ranks = status.ranks.iter().map(|rank| RankFacts::new(rank, waited_for(rank.rank))).collect();
        let rank_names = |ranks: &[Rank]| ranks.iter().map(Rank::to_string).collect();
        Self {
            controller: controller.to_owned(),
            trainers: status.world.trainers,
            inference: status.world.inference,
            joined_trainers: count(&trainers),
            joined_inference: count(&inference),
            up_seconds: status.up.as_secs_f64(),
            deadline_seconds: status.deadline.as_secs_f64(),
            verify: status.verify.to_string(),
            phase: status.phase.to_string(),
            phase_seconds: status.since.as_secs_f64(),
            waiting_for: rank_names(&status.waiting),
            waiting_to: status.phase.missing(),
            committed: status.committed,
            plan: status.plan.map(|plan| PlanFacts {
                digest: plan.digest.to_string(),
                bytes: plan.bytes,
                writes: plan.writes,
                bound_seconds: plan.bound_seconds,
            }),
            push: status.push.filter(|_| writes).map(|push| PushFacts {
                version: push.version,
                push: push.push.to_string(),
                seconds: push.elapsed.as_secs_f64(),
                bytes,
                bytes_planned: planned,
                gb_per_second: rate / GB,
            }),
            attempts: status
                .attempts
                .iter()
                .map(|attempt| AttemptFacts {
                    version: attempt.version,
                    push: attempt.push.to_string(),
                    ended_seconds_ago: attempt.ended.as_secs_f64(),
                    seconds: attempt.took.as_secs_f64(),
                    gb_per_second: (attempt.aborted.is_none() && !attempt.took.is_zero())
                        .then(|| planned as f64 / attempt.took.as_secs_f64() / GB),
                    aborted: attempt.aborted.clone(),
                })
                .collect(),
            job: status.job,
            ranks,
        }
    }
}

fn count(ranks: &[Rank]) -> u32 {
    u32::try_from(ranks.len()).unwrap_or(u32::MAX)
}

impl RankFacts {
    fn new(status: &RankStatus, waited_for: bool) -> Self {
        let (serves, torn_by) = match status.served {
            Some(Served::Version(version)) => (Some(version), None),
            Some(Served::Torn(version)) => (None, Some(version)),
            Some(Served::Behind(_)) | None => (None, None),
        };
        Self {
            rank: status.rank.to_string(),
            address: status.address.clone(),
            heard_seconds: status.heard.as_secs_f64(),
            left: status.left,
            serves,
            torn_by,
            behind: matches!(status.served, Some(Served::Behind(_))),
            waited_for,
            bytes: status.bytes,
            bytes_planned: status.planned,
            gb_per_second: status.bytes_per_second / GB,
            rails: status.rails.iter().map(RailFacts::new).collect(),
        }
    }
}

impl RailFacts {
    fn new(rail: &RailStatus) -> Self {
        let gb_per_second = rail.bytes_per_second() / GB;
        Self { name: rail.name.clone(), bytes: rail.bytes, gb_per_second, up: rail.up }
    }
}
