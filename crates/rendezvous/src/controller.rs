//! The rules of a job, as a state machine: who has joined, what is being waited for, which version is committed.
//!
//! `handle(event, now, &mut actions)` is the whole interface. It opens no socket, reads no clock and draws no random
//! number (the seed of the push ids is an argument), so the same code runs behind [`crate::server`] and in a simulated
//! cluster. A version is committed at one point of this file only: `Controller::commit`, reached when every trainer
//! has reported every byte that the plan gives it.
//!
//! Policy: a member that is lost ends the job, and every other member is told who was lost and during what. A member
//! that fails without being lost aborts the attempt; the next attempt is welcome.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use xfer_plan::{
    Digest, Manifest, PlanOptions, Rank, ReceiverManifest, ReceiverPart, ReceiverRank, TrainerManifest,
    TrainerRank,
};

use crate::protocol::{
    DEADLINE_RANGE, ENDPOINT_BYTES_MAX, Fence, JOB_BYTES_MAX, Join, MemberManifest, Peer, Planned,
    PlannedPart, PushId, RANKS_MAX, ToController, ToMember, World, cut,
};

/// A member is lost when nothing was heard from it for this part of the deadline, so that the stage that waits for it
/// still has time to name it.
const SILENCE_DIVISOR: u32 = 2;

/// Heartbeats per silence: a few may be late before a member is given up.
const HEARTBEATS_PER_SILENCE: u32 = 5;

/// Between heartbeats at most this long, so that progress is seen.
const HEARTBEAT_MAX: Duration = Duration::from_secs(1);

/// Ticks that may be missed before the controller takes itself for stalled.
const STALL_TICKS: u32 = 3;

/// How often members and the controller say that they are alive.
pub fn heartbeat_interval(deadline: Duration) -> Duration {
    (deadline / SILENCE_DIVISOR / HEARTBEATS_PER_SILENCE).min(HEARTBEAT_MAX)
}

/// A connection, as the driver numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u64);

/// What the job is.
#[derive(Debug, Clone)]
pub struct ControllerConfig {
    /// Its name; members of other jobs are refused.
    pub job: String,
    /// How many ranks it has.
    pub world: World,
    /// The longest that any stage waits without progress.
    pub deadline: Duration,
    /// How the plan cuts and gathers.
    pub options: PlanOptions,
    /// Random bytes from which push ids are derived.
    pub seed: [u8; 32],
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// A connection that has proved itself sent a message.
    Received(ConnectionId, ToController),
    /// A connection ended, with the reason.
    Disconnected(ConnectionId, String),
    /// Time has passed.
    Tick,
}

/// What to do.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Send a message.
    Send(ConnectionId, ToMember),
    /// Close a connection once what was sent before has left.
    Close(ConnectionId),
    /// Tell whoever watches.
    Report(Report),
}

/// What an observer of the job sees.
#[derive(Debug, Clone, PartialEq)]
pub enum Report {
    /// A member joined.
    Joined(Rank),
    /// All have joined and there is a plan.
    Planned {
        /// Its digest.
        digest: Digest,
        /// Bytes per push.
        bytes: u64,
        /// WRITEs per push.
        writes: u64,
        /// Lower bound in seconds.
        bound_seconds: f64,
        /// Whose NICs limit it; `None` when nothing moves.
        limited_by: Option<Rank>,
    },
    /// All members are connected.
    Started,
    /// All trainers have begun a version.
    Pushing {
        /// The version.
        version: u64,
        /// The attempt.
        push: PushId,
    },
    /// A version is committed: from here on it may be served.
    Committed {
        /// The version.
        version: u64,
        /// From the moment that all trainers had begun.
        elapsed: Duration,
    },
    /// An attempt failed.
    Aborted {
        /// The version that was not committed.
        version: u64,
        /// Why.
        reason: String,
    },
    /// The job is over: in good order without a reason.
    Ended {
        /// What went wrong.
        reason: Option<String>,
    },
}

/// A member that has joined.
struct Seat {
    connection: ConnectionId,
    manifest: Option<MemberManifest>,
    endpoint: Vec<u8>,
    heard_at: Duration,
    progress: u64,
    progress_at: Duration,
    /// Said goodbye in good order.
    left: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Collecting,
    Preparing,
    Writing,
    Fencing,
    Committing,
}

impl Stage {
    /// What a member that is waited for has not done.
    fn missing(self) -> &'static str {
        match self {
            Self::Collecting => "to begin the version",
            Self::Preparing => "to stop serving and prepare",
            Self::Writing => "to finish its writes",
            Self::Fencing => "to close the rails that a trainer gave up on",
            Self::Committing => "to confirm the commit",
        }
    }
}

struct Push {
    version: u64,
    id: PushId,
    stage: Stage,
    /// When the present stage began.
    since: Duration,
    /// When all trainers had begun.
    began_at: Duration,
    waiting: BTreeSet<Rank>,
    unconfirmed: Vec<Rank>,
    /// Who was lost after the decision: the job ends once the others have learnt of the commit.
    lost: Option<String>,
}

enum Phase {
    /// Since the last member joined.
    Joining(Option<Duration>),
    Connecting {
        since: Duration,
        waiting: BTreeSet<Rank>,
    },
    Idle,
    Pushing(Push),
    Ended,
}

/// What one trainer has to report for a version to be committed.
#[derive(Clone, Copy)]
struct Quota {
    bytes: u64,
    writes: u64,
}

/// The controller of one job.
pub struct Controller {
    config: ControllerConfig,
    phase: Phase,
    seats: BTreeMap<Rank, Seat>,
    members: BTreeMap<ConnectionId, Rank>,
    digest: Digest,
    quotas: Vec<Quota>,
    /// Rails that inference ranks have yet to close.
    fences: BTreeSet<Fence>,
    committed: u64,
    attempts: u64,
    ticked_at: Duration,
}

type Actions = Vec<Action>;

impl Controller {
    /// A controller for the job, or why the job makes no sense.
    pub fn new(config: ControllerConfig) -> Result<Self, String> {
        for (side, ranks) in
            [("trainers", config.world.trainers), ("inference ranks", config.world.inference)]
        {
            if !(1..=RANKS_MAX).contains(&ranks) {
                return Err(format!("a job needs between 1 and {RANKS_MAX} {side}, not {ranks}"));
            }
        }
        if !DEADLINE_RANGE.contains(&config.deadline) {
            return Err(format!("a deadline of {:?} is not within {DEADLINE_RANGE:?}", config.deadline));
        }
        if config.job.len() > JOB_BYTES_MAX {
            return Err(format!("the job's name has {} bytes, more than {JOB_BYTES_MAX}", config.job.len()));
        }
        Ok(Self {
            config,
            phase: Phase::Joining(None),
            seats: BTreeMap::new(),
            members: BTreeMap::new(),
            digest: Digest([0; 32]),
            quotas: Vec::new(),
            fences: BTreeSet::new(),
            committed: 0,
            attempts: 0,
            ticked_at: Duration::ZERO,
        })
    }

    /// The last committed version; 0 is what was loaded at start.
    pub fn committed(&self) -> u64 {
        self.committed
    }

    /// Whether the job is over, in good order or not.
    pub fn has_ended(&self) -> bool {
        matches!(self.phase, Phase::Ended)
    }

    /// The longest that any stage waits without progress.
    pub fn deadline(&self) -> Duration {
        self.config.deadline
    }

    /// How often the driver owes an [`Event::Tick`], and members a heartbeat.
    pub fn tick_interval(&self) -> Duration {
        heartbeat_interval(self.config.deadline)
    }

    /// Takes one event at time `now` (since any fixed moment, never decreasing) and appends what is to be done.
    pub fn handle(&mut self, event: Event, now: Duration, actions: &mut Actions) {
        match event {
            Event::Received(from, message) => self.receive(from, message, now, actions),
            Event::Disconnected(connection, reason) => {
                if let Some(member) = self.members.remove(&connection) {
                    self.lose(member, &format!("its connection ended: {reason}"), actions);
                }
            }
            Event::Tick => self.tick(now, actions),
        }
    }

    fn receive(&mut self, from: ConnectionId, message: ToController, now: Duration, actions: &mut Actions) {
        let Some(&member) = self.members.get(&from) else {
            return match message {
                ToController::Join(join) => self.join(from, *join, now, actions),
                _ => refuse(from, "the first message must be a join".into(), actions),
            };
        };
        if let Some(seat) = self.seats.get_mut(&member) {
            seat.heard_at = now;
        }
        match message {
            ToController::Join(_) => self.lose(member, "it joined twice", actions),
            ToController::Ready { digest } => self.ready(member, digest, actions),
            ToController::Begin { version, fences } => {
                self.owe(fences);
                self.begin(member, version, now, actions);
            }
            ToController::Prepared { push } => self.advance(member, push, Stage::Preparing, now, actions),
            ToController::Written { push, bytes, writes, fences } => {
                self.owe(fences);
                self.written(member, push, Quota { bytes, writes }, now, actions);
            }
            ToController::Fenced { push } => self.advance(member, push, Stage::Fencing, now, actions),
            ToController::Committed { push } => self.advance(member, push, Stage::Committing, now, actions),
            ToController::Failed { push, reason } => {
                let reason = bounded(reason);
                match &self.phase {
                    Phase::Pushing(current) if current.id != push => {}
                    // The decision is taken: who cannot follow it is lost.
                    Phase::Pushing(current) if current.stage == Stage::Committing => {
                        self.lose(member, &format!("it failed after the commit: {reason}"), actions);
                    }
                    Phase::Pushing(_) => self.abort(format!("{member}: {reason}"), actions),
                    _ => {}
                }
            }
            ToController::Heartbeat { progress } => {
                if let Some(seat) = self.seats.get_mut(&member)
                    && seat.progress != progress
                {
                    (seat.progress, seat.progress_at) = (progress, now);
                }
            }
            ToController::Leave { reason: Some(reason) } => {
                self.lose(member, &format!("it gave up: {}", bounded(reason)), actions);
            }
            ToController::Leave { reason: None } => self.leave(member, actions),
        }
    }

    // --- joining -------------------------------------------------------------------------------------------------

    fn join(&mut self, from: ConnectionId, join: Join, now: Duration, actions: &mut Actions) {
        if let Err(reason) = self.admits(&join) {
            return refuse(from, reason, actions);
        }
        let member = join.member;
        self.members.insert(from, member);
        let seat = Seat {
            connection: from,
            manifest: Some(join.manifest),
            endpoint: join.endpoint,
            heard_at: now,
            progress: 0,
            progress_at: now,
            left: false,
        };
        self.seats.insert(member, seat);
        actions.push(Action::Report(Report::Joined(member)));
        if let Phase::Joining(since) = &mut self.phase {
            // Whoever joins is progress: the others get the whole deadline again.
            *since = Some(now);
        }
        if self.config.world.members().all(|member| self.seats.contains_key(&member)) {
            self.plan(now, actions);
        }
    }

    fn admits(&self, join: &Join) -> Result<(), String> {
        let Join { job, member, world, deadline, manifest, endpoint } = join;
        let Phase::Joining(_) = self.phase else {
            return Err(format!("{member} comes too late: the job has started without it"));
        };
        if *job != self.config.job {
            return Err(format!("{member} wants another job than '{}'", self.config.job));
        }
        if *world != self.config.world {
            return Err(format!("{member} expects {world}, but this job has {}", self.config.world));
        }
        if *deadline != self.config.deadline {
            let ours = self.config.deadline;
            return Err(format!(
                "{member} has a deadline of {deadline:?}, this job of {ours:?}; give the same everywhere"
            ));
        }
        if !world.contains(*member) {
            return Err(format!("there is no {member} among {world}; ranks count from 0"));
        }
        if self.seats.contains_key(member) {
            return Err(format!("{member} has joined already; is the same rank started twice?"));
        }
        if endpoint.len() > ENDPOINT_BYTES_MAX {
            return Err(format!(
                "{member} has an endpoint of {} bytes, more than {ENDPOINT_BYTES_MAX}",
                endpoint.len()
            ));
        }
        match (member, manifest) {
            (Rank::Trainer(_), MemberManifest::Trainer(_))
            | (Rank::Receiver(_), MemberManifest::Inference(_)) => Ok(()),
            _ => Err(format!("{member} sent the other side's manifest")),
        }
    }

    fn plan(&mut self, now: Duration, actions: &mut Actions) {
        let mut trainers: Vec<TrainerManifest> = Vec::new();
        let mut receivers: Vec<ReceiverManifest> = Vec::new();
        // The seats are in rank order, trainers first.
        for seat in self.seats.values_mut() {
            match seat.manifest.take() {
                Some(MemberManifest::Trainer(manifest)) => trainers.push(manifest),
                Some(MemberManifest::Inference(manifest)) => receivers.push(manifest),
                None => {}
            }
        }
        let manifest = Manifest { trainers, receivers, options: self.config.options };
        let plan = match xfer_plan::plan(&manifest) {
            Ok(plan) => plan,
            Err(error) => return self.end(Some(format!("no plan: {error}")), actions),
        };
        let passed_on =
            |part: &ReceiverPart| part.arrivals.iter().any(|a| matches!(a.from, Rank::Receiver(_)));
        if plan.receivers.iter().any(passed_on) {
            let reason = "the plan has inference ranks pass bytes on, which they cannot do yet: plan with relay `never`";
            return self.end(Some(reason.into()), actions);
        }
        let ranks = (0..plan.trainers.len() as u32).map(TrainerRank);
        let parts = match ranks.map(|rank| plan.part(rank, &manifest)).collect::<Result<Vec<_>, _>>() {
            Ok(parts) => parts,
            Err(error) => return self.end(Some(format!("no plan: {error}")), actions),
        };
        self.digest = plan.digest;
        self.quotas =
            plan.trainers.iter().map(|part| Quota { bytes: part.bytes, writes: part.writes }).collect();
        let bytes_total = self.quotas.iter().map(|quota| quota.bytes).sum();
        let bound_seconds = plan.bound.seconds();
        actions.push(Action::Report(Report::Planned {
            digest: self.digest,
            bytes: bytes_total,
            writes: self.quotas.iter().map(|quota| quota.writes).sum(),
            bound_seconds,
            limited_by: plan.bound.limited_by.map(|(rank, _)| rank),
        }));

        let endpoint_of = |member| Peer {
            member,
            endpoint: self.seats.get(&member).map(|seat| seat.endpoint.clone()).unwrap_or_default(),
        };
        let mut send = |member: Rank, part, peers| {
            if let Some(seat) = self.seats.get(&member) {
                let planned = Planned { digest: self.digest, part, peers, bound_seconds, bytes_total };
                actions.push(Action::Send(seat.connection, ToMember::Planned(Box::new(planned))));
            }
        };
        for (rank, part) in (0..).map(TrainerRank).zip(parts) {
            let named = |op: &xfer_plan::Op| (op.param, plan.name(op.param).to_owned());
            let names = part.ops.iter().map(named).collect();
            let to: BTreeSet<ReceiverRank> = part.ops.iter().map(|op| op.to).collect();
            let peers = to.into_iter().map(|to| endpoint_of(Rank::Receiver(to))).collect();
            send(Rank::Trainer(rank), PlannedPart::Trainer { plan: part, names }, peers);
        }
        for (rank, part) in (0..).map(ReceiverRank).zip(plan.receivers) {
            let peers = part.arrivals.iter().map(|arrival| endpoint_of(arrival.from)).collect();
            send(Rank::Receiver(rank), PlannedPart::Inference(part), peers);
        }
        self.phase = Phase::Connecting { since: now, waiting: self.config.world.members().collect() };
    }

    fn ready(&mut self, member: Rank, digest: Digest, actions: &mut Actions) {
        if digest != self.digest {
            return self.lose(member, "it is ready for another plan than the one agreed", actions);
        }
        let Phase::Connecting { waiting, .. } = &mut self.phase else {
            return self.lose(member, "it said twice that it is ready", actions);
        };
        waiting.remove(&member);
        if waiting.is_empty() {
            self.phase = Phase::Idle;
            self.send_all(|_| true, ToMember::Start, actions);
            actions.push(Action::Report(Report::Started));
        }
    }

    // --- versions ------------------------------------------------------------------------------------------------

    fn begin(&mut self, member: Rank, version: u64, now: Duration, actions: &mut Actions) {
        let Rank::Trainer(_) = member else {
            return self.lose(member, "only trainers begin versions", actions);
        };
        if version <= self.committed {
            let reason =
                format!("version {version} is not newer than the committed version {}", self.committed);
            return self.reply(member, ToMember::Abort { version, reason }, actions);
        }
        match &mut self.phase {
            Phase::Idle => {
                let id = self.next_push_id(version);
                let mut waiting: BTreeSet<Rank> = self.trainers().collect();
                waiting.remove(&member);
                self.phase = Phase::Pushing(Push {
                    version,
                    id,
                    stage: Stage::Collecting,
                    since: now,
                    began_at: now,
                    waiting,
                    unconfirmed: Vec::new(),
                    lost: None,
                });
            }
            Phase::Pushing(push) if push.stage == Stage::Collecting && push.version == version => {
                if !push.waiting.remove(&member) {
                    return self.lose(member, "it began the same version twice", actions);
                }
            }
            Phase::Pushing(push) if push.stage == Stage::Collecting => {
                let reason =
                    format!("{member} began version {version} while others began version {}", push.version);
                self.abort(reason.clone(), actions);
                return self.reply(member, ToMember::Abort { version, reason }, actions);
            }
            _ => {
                return self.lose(member, "it began a version before the last one ended", actions);
            }
        }
        if let Some(gone) =
            self.trainers().find(|trainer| self.seats.get(trainer).is_none_or(|seat| seat.left))
        {
            return self.abort(format!("{gone} has left the job"), actions);
        }
        if self.nobody_waited_for() {
            self.enter(Stage::Preparing, now, actions);
        }
    }

    /// `member` has done what `stage` waits for.
    fn advance(&mut self, member: Rank, push: PushId, stage: Stage, now: Duration, actions: &mut Actions) {
        match &mut self.phase {
            Phase::Pushing(current) if current.id == push && current.stage == stage => {
                if !current.waiting.remove(&member) {
                    return self.lose(member, "it answered what it was not asked", actions);
                }
            }
            // An answer to an attempt that has ended meanwhile.
            _ => return,
        }
        if let (Stage::Preparing | Stage::Fencing, Rank::Receiver(rank)) = (stage, member) {
            // It was told all that there is: a trainer says what it owes before the stage begins.
            self.fences.retain(|fence| fence.at != rank);
        }
        if self.nobody_waited_for() {
            match stage {
                Stage::Collecting | Stage::Committing => self.finish(actions),
                Stage::Preparing => self.enter(Stage::Writing, now, actions),
                Stage::Writing if !self.fences.is_empty() => self.enter(Stage::Fencing, now, actions),
                Stage::Writing | Stage::Fencing => self.commit(now, actions),
            }
        }
    }

    fn written(&mut self, member: Rank, push: PushId, quota: Quota, now: Duration, actions: &mut Actions) {
        let planned = match member {
            Rank::Trainer(rank) => self.quotas.get(rank.0 as usize).copied(),
            Rank::Receiver(_) => None,
        };
        match planned {
            Some(planned) if planned.bytes == quota.bytes && planned.writes == quota.writes => {
                self.advance(member, push, Stage::Writing, now, actions);
            }
            Some(planned) => {
                let reason = format!(
                    "it reports {} bytes in {} writes where the plan has {} bytes in {} writes",
                    quota.bytes, quota.writes, planned.bytes, planned.writes
                );
                self.lose(member, &reason, actions);
            }
            None => self.lose(member, "only trainers write", actions),
        }
    }

    /// Remembers rails that have to be closed.
    fn owe(&mut self, fences: Vec<Fence>) {
        let known = |fence: &Fence| fence.at.0 < self.config.world.inference;
        self.fences.extend(fences.into_iter().filter(known));
    }

    fn enter(&mut self, stage: Stage, now: Duration, actions: &mut Actions) {
        let waiting: BTreeSet<Rank> = match stage {
            Stage::Collecting | Stage::Writing => self.trainers().collect(),
            Stage::Preparing | Stage::Committing => self.receivers().collect(),
            Stage::Fencing => self.fences.iter().map(|fence| Rank::Receiver(fence.at)).collect(),
        };
        for seat in self.seats.values_mut() {
            (seat.progress, seat.progress_at) = (0, now);
        }
        let Phase::Pushing(push) = &mut self.phase else {
            return;
        };
        (push.stage, push.since, push.waiting) = (stage, now, waiting.clone());
        let (id, version) = (push.id, push.version);
        if stage == Stage::Preparing {
            push.began_at = now;
            actions.push(Action::Report(Report::Pushing { version, push: id }));
        }
        for member in waiting {
            let rails = self.fences.iter().filter(|fence| Rank::Receiver(fence.at) == member);
            let rails = rails.map(|fence| fence.rail).collect();
            let message = match stage {
                Stage::Collecting => return,
                Stage::Preparing => ToMember::Prepare { push: id, version, fence: rails },
                Stage::Writing => ToMember::Write { push: id, version },
                Stage::Fencing => ToMember::Fence { push: id, rails },
                Stage::Committing => ToMember::Commit { push: id, version },
            };
            self.reply(member, message, actions);
        }
    }

    /// The decision: every trainer has reported every byte of its part. Nothing else sets `committed`.
    fn commit(&mut self, now: Duration, actions: &mut Actions) {
        if let Phase::Pushing(push) = &self.phase {
            self.committed = push.version;
            let elapsed = now.saturating_sub(push.began_at);
            actions.push(Action::Report(Report::Committed { version: push.version, elapsed }));
            self.enter(Stage::Committing, now, actions);
        }
    }

    /// All inference ranks that are still there have confirmed the commit.
    fn finish(&mut self, actions: &mut Actions) {
        if let Phase::Pushing(push) = std::mem::replace(&mut self.phase, Phase::Idle) {
            let message =
                ToMember::Done { push: push.id, version: push.version, unconfirmed: push.unconfirmed };
            self.send_all(|member| matches!(member, Rank::Trainer(_)), message, actions);
            if push.lost.is_some() {
                self.end(push.lost, actions);
            }
        }
    }

    /// Ends the attempt without a commit. The job goes on.
    fn abort(&mut self, reason: String, actions: &mut Actions) {
        let Phase::Pushing(push) = std::mem::replace(&mut self.phase, Phase::Idle) else {
            return;
        };
        let version = push.version;
        let message = ToMember::Abort { version, reason: reason.clone() };
        // A trainer that has not begun, or an inference rank that was not told, knows of no attempt.
        let involved = |member: Rank| match member {
            Rank::Trainer(_) => push.stage != Stage::Collecting || !push.waiting.contains(&member),
            Rank::Receiver(_) => push.stage != Stage::Collecting,
        };
        self.send_all(involved, message, actions);
        actions.push(Action::Report(Report::Aborted { version, reason }));
    }

    // --- losses and ends -----------------------------------------------------------------------------------------

    fn leave(&mut self, member: Rank, actions: &mut Actions) {
        if !matches!(self.phase, Phase::Idle) || matches!(member, Rank::Receiver(_)) {
            return self.lose(member, "it left", actions);
        }
        if let Some(seat) = self.seats.get_mut(&member) {
            seat.left = true;
            self.members.remove(&seat.connection);
            actions.push(Action::Close(seat.connection));
        }
        let all_left = self.trainers().all(|trainer| self.seats.get(&trainer).is_none_or(|seat| seat.left));
        if all_left {
            self.send_all(|_| true, ToMember::Finished, actions);
            self.end(None, actions);
        }
    }

    fn lose(&mut self, member: Rank, reason: &str, actions: &mut Actions) {
        let Some(seat) = self.seats.remove(&member) else {
            return;
        };
        self.members.remove(&seat.connection);
        let during = match &self.phase {
            Phase::Ended => return actions.push(Action::Close(seat.connection)),
            // It may be started again and join: nobody depends on it yet.
            Phase::Joining(_) => return refuse(seat.connection, format!("{member}: {reason}"), actions),
            Phase::Connecting { .. } => "while connecting".into(),
            Phase::Idle => "between versions".into(),
            Phase::Pushing(push) => {
                format!("during version {} (stage: {:?})", push.version, push.stage).to_lowercase()
            }
        };
        let reason = format!("{member} was lost {during}: {reason}");
        refuse(seat.connection, reason.clone(), actions);
        match &mut self.phase {
            // The decision is taken: the others still learn it, and the trainers who did not confirm.
            Phase::Pushing(push) if push.stage == Stage::Committing => {
                if push.waiting.remove(&member) {
                    push.unconfirmed.push(member);
                }
                push.lost.get_or_insert(reason);
                if push.waiting.is_empty() {
                    self.finish(actions);
                }
            }
            Phase::Pushing(_) => {
                self.abort(reason.clone(), actions);
                self.end(Some(reason), actions);
            }
            _ => self.end(Some(reason), actions),
        }
    }

    fn end(&mut self, reason: Option<String>, actions: &mut Actions) {
        if let Some(reason) = &reason {
            self.send_all(|_| true, ToMember::Refused { reason: reason.clone() }, actions);
        }
        for connection in self.members.keys() {
            actions.push(Action::Close(*connection));
        }
        self.phase = Phase::Ended;
        actions.push(Action::Report(Report::Ended { reason }));
    }

    // --- time ----------------------------------------------------------------------------------------------------

    fn tick(&mut self, now: Duration, actions: &mut Actions) {
        // Time in which this process itself did not run (it was stopped, or planned for long) is nobody's silence.
        let stalled = now.saturating_sub(std::mem::replace(&mut self.ticked_at, now));
        if stalled > STALL_TICKS * self.tick_interval() {
            for seat in self.seats.values_mut() {
                (seat.heard_at, seat.progress_at) = (now, now);
            }
            return self.send_all(|_| true, ToMember::Heartbeat, actions);
        }
        let deadline = self.config.deadline;
        let silence_max = deadline / SILENCE_DIVISOR;
        let silent = |seat: &Seat| !seat.left && now.saturating_sub(seat.heard_at) > silence_max;
        while let Some(member) = self.seats.iter().find(|(_, seat)| silent(seat)).map(|(member, _)| *member) {
            self.lose(member, &format!("nothing was heard from it for {silence_max:?}"), actions);
        }
        self.send_all(|_| true, ToMember::Heartbeat, actions);
        let late = |since: Duration| now.saturating_sub(since) > deadline;
        match &self.phase {
            Phase::Joining(Some(since)) if late(*since) => {
                let missing = self.config.world.members().filter(|member| !self.seats.contains_key(member));
                let reason = format!("waited {deadline:?} for {} to join", list(missing));
                self.end(Some(reason), actions);
            }
            Phase::Connecting { since, waiting } if late(*since) => {
                let reason =
                    format!("waited {deadline:?} for {} to connect its rails", list(waiting.iter().copied()));
                self.end(Some(reason), actions);
            }
            Phase::Pushing(push) => {
                // While it writes, a trainer is late when it makes no progress; otherwise when the stage is.
                let is_late = |member: &Rank| match push.stage {
                    Stage::Writing => self.seats.get(member).is_some_and(|seat| late(seat.progress_at)),
                    _ => late(push.since),
                };
                let missing: Vec<Rank> = push.waiting.iter().copied().filter(is_late).collect();
                if missing.is_empty() {
                    return;
                }
                let reason = format!(
                    "version {}: waited {deadline:?} for {} {}",
                    push.version,
                    list(missing.iter().copied()),
                    push.stage.missing()
                );
                if push.stage == Stage::Committing {
                    for member in missing {
                        self.lose(
                            member,
                            &format!("waited {deadline:?} for it to confirm the commit"),
                            actions,
                        );
                    }
                } else {
                    self.abort(reason, actions);
                }
            }
            _ => {}
        }
    }

    // --- helpers -------------------------------------------------------------------------------------------------

    fn trainers(&self) -> impl Iterator<Item = Rank> + use<> {
        (0..self.config.world.trainers).map(|rank| Rank::Trainer(TrainerRank(rank)))
    }

    fn receivers(&self) -> impl Iterator<Item = Rank> + use<> {
        (0..self.config.world.inference).map(|rank| Rank::Receiver(ReceiverRank(rank)))
    }

    fn nobody_waited_for(&self) -> bool {
        matches!(&self.phase, Phase::Pushing(push) if push.waiting.is_empty())
    }

    fn next_push_id(&mut self, version: u64) -> PushId {
        self.attempts += 1;
        let mut hasher = blake3::Hasher::new_keyed(&self.config.seed);
        hasher.update(&version.to_le_bytes()).update(&self.attempts.to_le_bytes());
        let mut id = [0; 16];
        hasher.finalize_xof().fill(&mut id);
        PushId(id)
    }

    fn reply(&self, member: Rank, message: ToMember, actions: &mut Actions) {
        if let Some(seat) = self.seats.get(&member).filter(|seat| !seat.left) {
            actions.push(Action::Send(seat.connection, message));
        }
    }

    fn send_all(&self, to: impl Fn(Rank) -> bool, message: ToMember, actions: &mut Actions) {
        let seats = self.seats.iter().filter(|(member, seat)| to(**member) && !seat.left);
        actions.extend(seats.map(|(_, seat)| Action::Send(seat.connection, message.clone())));
    }
}

fn refuse(connection: ConnectionId, reason: String, actions: &mut Actions) {
    actions.push(Action::Send(connection, ToMember::Refused { reason }));
    actions.push(Action::Close(connection));
}

/// A peer's text, cut to what may travel on.
fn bounded(mut text: String) -> String {
    cut(&mut text);
    text
}

/// The first few of a list of members, and how many more there are.
fn list(members: impl Iterator<Item = Rank>) -> String {
    const NAMED_MAX: usize = 8;
    let all: Vec<String> = members.map(|member| member.to_string()).collect();
    let named = all.get(..NAMED_MAX.min(all.len())).unwrap_or_default().join(", ");
    if all.len() > NAMED_MAX { format!("{named} and {} more", all.len() - NAMED_MAX) } else { named }
}

#[cfg(test)]
#[path = "controller_tests.rs"]
mod tests;
