//! What the controller keeps for observers, and the picture of the job that they are given.
//!
//! No rule reads the history: a job goes the same way without it. What it keeps is bounded by the job's size and by constants
//! here, whatever members say.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use xfer_plan::Rank;

use super::{ConnectionId, Controller, Phase, Push, Seat, Stage};
use crate::member::Served;
use crate::protocol::{PushId, ToMember};
use crate::status::{
    AttemptStatus, PhaseStatus, PlanStatus, PushStatus, RAILS_TOLD_MAX, RailStatus, RankStatus, Status,
};

/// Attempts that are remembered after their end.
const ATTEMPTS_KEPT_MAX: usize = 16;

/// Rails that are remembered, of all ranks together: 512 ranks with 32 each, 3 MB. Those of further ranks are not told.
const RAILS_KEPT_MAX: usize = 16_384;

/// See the module.
#[derive(Default)]
pub(super) struct History {
    now: Duration,
    /// When the job came to rest, or to its end.
    settled_at: Duration,
    /// Of connections that have not joined.
    addresses: BTreeMap<ConnectionId, String>,
    ranks: BTreeMap<Rank, Known>,
    rails_kept: usize,
    plan: Option<PlanStatus>,
    attempts: VecDeque<Attempt>,
}

/// What is known of a member beside its seat.
#[derive(Default)]
struct Known {
    address: String,
    served: Option<Served>,
    /// What it serves stays whole while a version arrives.
    stages: bool,
    pace: Pace,
    rails: Vec<RailStatus>,
}

/// How fast a member moves bytes, by its signs of life in one stage.
#[derive(Default)]
struct Pace {
    heard: Option<(u64, Duration)>,
    bytes_per_second: f64,
}

/// An attempt that ended.
struct Attempt {
    version: u64,
    push: PushId,
    ended_at: Duration,
    took: Duration,
    aborted: Option<String>,
}

impl History {
    pub(super) fn at(&mut self, now: Duration) {
        self.now = now;
    }

    pub(super) fn connected(&mut self, connection: ConnectionId, address: String) {
        self.addresses.insert(connection, address);
    }

    pub(super) fn disconnected(&mut self, connection: ConnectionId) {
        self.addresses.remove(&connection);
    }

    pub(super) fn joined(&mut self, member: Rank, connection: ConnectionId) {
        let address = self.addresses.remove(&connection).unwrap_or_default();
        self.ranks.insert(member, Known { address, ..Known::default() });
    }

    /// A member has said what its bytes are, where it knows.
    pub(super) fn seated(&mut self, member: Rank, stages: bool, served: Option<Served>) {
        if let (Rank::Receiver(_), Some(known)) = (member, self.ranks.get_mut(&member)) {
            known.stages = stages;
            known.served = served.or(known.served);
        }
    }

    pub(super) fn lost(&mut self, member: Rank) {
        if let Some(known) = self.ranks.remove(&member) {
            self.rails_kept -= known.rails.len();
        }
    }

    pub(super) fn planned(&mut self, plan: PlanStatus) {
        self.plan = Some(plan);
    }

    pub(super) fn settled(&mut self) {
        self.settled_at = self.now;
    }

    /// A stage begins: what members have moved counts from zero.
    pub(super) fn entered(&mut self) {
        for known in self.ranks.values_mut() {
            known.pace = Pace { heard: Some((0, self.now)), bytes_per_second: 0.0 };
        }
    }

    pub(super) fn progressed(&mut self, member: Rank, bytes: u64) {
        let Some(Known { pace, .. }) = self.ranks.get_mut(&member) else { return };
        if let Some((before, at)) = pace.heard.replace((bytes, self.now)) {
            let seconds = self.now.saturating_sub(at).as_secs_f64();
            let moved = bytes.saturating_sub(before) as f64;
            pace.bytes_per_second = if seconds > 0.0 { moved / seconds } else { 0.0 };
        }
    }

    pub(super) fn advanced(&mut self, member: Rank, stage: Stage, version: u64) {
        let Some(known) = self.ranks.get_mut(&member) else { return };
        match stage {
            Stage::Preparing if !known.stages => known.served = Some(Served::Torn(version)),
            Stage::Committing => known.served = Some(Served::Version(version)),
            _ => {}
        }
    }

    pub(super) fn rails(&mut self, member: Rank, rails: Vec<RailStatus>) {
        let Some(known) = self.ranks.get_mut(&member) else { return };
        self.rails_kept -= known.rails.len();
        let room = RAILS_TOLD_MAX.min(RAILS_KEPT_MAX - self.rails_kept);
        known.rails = rails.into_iter().take(room).map(RailStatus::bounded).collect();
        self.rails_kept += known.rails.len();
    }

    /// An attempt is decided: committed, or aborted for this reason.
    pub(super) fn ended(&mut self, push: &Push, aborted: Option<String>) {
        let took = self.now.saturating_sub(push.began_at);
        self.attempts.truncate(ATTEMPTS_KEPT_MAX - 1);
        let (version, push) = (push.version, push.id);
        self.attempts.push_front(Attempt { version, push, ended_at: self.now, took, aborted });
        self.settled();
    }

    fn since(&self, moment: Duration) -> Duration {
        self.now.saturating_sub(moment)
    }
}

impl Controller {
    /// The job as it is now.
    pub(super) fn status(&self) -> ToMember {
        let history = &self.history;
        let (phase, began_at, waiting) = match &self.phase {
            Phase::Joining(since) => (PhaseStatus::Joining, since.unwrap_or_default(), self.missing()),
            Phase::Connecting { since, waiting } => {
                (PhaseStatus::Connecting, *since, waiting.iter().copied().collect())
            }
            Phase::Idle => (PhaseStatus::Idle, history.settled_at, Vec::new()),
            Phase::Pushing(push) => {
                (PhaseStatus::Pushing(push.stage), push.since, push.waiting.iter().copied().collect())
            }
            Phase::Ended => (PhaseStatus::Ended, history.settled_at, Vec::new()),
        };
        let push = match &self.phase {
            Phase::Pushing(push) => Some(push),
            _ => None,
        };
        let attempts = history.attempts.iter().map(|attempt| AttemptStatus {
            version: attempt.version,
            push: attempt.push,
            ended: history.since(attempt.ended_at),
            took: attempt.took,
            aborted: attempt.aborted.clone(),
        });
        ToMember::StatusReport(Box::new(Status {
            job: self.config.job.clone(),
            world: self.config.world,
            up: history.now,
            deadline: self.config.deadline,
            verify: self.config.verify,
            phase,
            since: history.since(began_at),
            waiting,
            committed: self.committed(),
            plan: history.plan,
            push: push.map(|push| PushStatus {
                version: push.version,
                push: push.id,
                elapsed: match push.stage {
                    Stage::Collecting => Duration::ZERO,
                    _ => history.since(push.began_at),
                },
            }),
            ranks: self.seats.iter().map(|(rank, seat)| self.rank_status(*rank, seat, push)).collect(),
            attempts: attempts.collect(),
        }))
    }

    fn rank_status(&self, rank: Rank, seat: &Seat, push: Option<&Push>) -> RankStatus {
        let planned = self.quotas.get(&rank).map(|quota| quota.bytes);
        let known = self.history.ranks.get(&rank);
        let moves = |stage: &Stage| matches!(stage, Stage::Writing | Stage::Verifying);
        let (bytes, bytes_per_second) = match push.map(|push| (push.stage, push.waiting.contains(&rank))) {
            Some((stage, true)) if moves(&stage) => {
                (seat.progress, known.map_or(0.0, |known| known.pace.bytes_per_second))
            }
            // It has said that it has written everything.
            Some((stage, _)) if stage >= Stage::Writing => (planned.unwrap_or(0), 0.0),
            _ => (0, 0.0),
        };
        RankStatus {
            rank,
            address: known.map(|known| known.address.clone()).unwrap_or_default(),
            heard: self.history.since(seat.heard_at),
            left: seat.left,
            served: known.and_then(|known| known.served),
            bytes,
            planned,
            bytes_per_second,
            rails: known.map(|known| known.rails.clone()).unwrap_or_default(),
        }
    }
}
