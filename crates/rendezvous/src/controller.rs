//! The rules of a job, as a state machine: who has joined, what is being waited for, which version is committed.
//!
//! `handle(event, now, &mut actions)` is the whole interface. It opens no socket, reads no clock and draws no random
//! number (the seed of the push ids is an argument), so the same code runs behind `server` and in a simulated
//! cluster. A version is committed at one point of this file only: `Controller::commit`, reached when everyone
//! who writes has reported every byte that the plan gives it (every trainer, and every inference rank that passes bytes on),
//! and where the job verifies, when every inference rank has found the bytes that were sent.
//!
//! The decision to commit is recorded before anybody is told: [`Action::Record`], then [`Event::Recorded`].
//!
//! A member that fails without being lost aborts the attempt; the next attempt is welcome. What a loss does is the job's
//! policy ([`OnLoss`]): it ends the job, or the job *regroups*. Then everybody closes all rails and joins again with fresh ones,
//! over which nothing can arrive that a lost rank still sends, there is a new plan, and versions go on. A rank that comes
//! back, or a controller that does, is met in the same way. `assembly` is who takes part in the present plan.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use xfer_plan::{Digest, Manifest, Parts, Plan, PlanError, PlanOptions, Rank, ReceiverRank};

use crate::protocol::{
    Bank, Commit, DEADLINE_RANGE, Fence, Holds, JOB_BYTES_MAX, MemberManifest, OnLoss, PushId, RANKS_MAX,
    ToController, ToMember, World, cut,
};
use crate::verify::Verify;

mod event;
mod joining;
mod losses;
mod push;
mod status;
mod verifying;

pub use event::{Action, Cause, Event, Report};
use push::Push;
pub use push::Stage;
use status::History;

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
    /// Whether inference ranks of this job can pass bytes on. Where they cannot, a plan that has them do so ends the job.
    pub relays: bool,
    /// Which parameters are compared, as they were sent and as they arrived, before a version is committed.
    pub verify: Verify,
    /// What a loss does.
    pub on_loss: OnLoss,
    /// What an earlier controller of this job recorded last: members of it may join again.
    pub resume: Option<Commit>,
    /// Random bytes from which push ids are derived.
    pub seed: [u8; 32],
}

impl ControllerConfig {
    /// Why the job makes no sense, if it does not.
    pub(crate) fn check(&self) -> Result<(), String> {
        for (side, ranks) in [("trainers", self.world.trainers), ("inference ranks", self.world.inference)] {
            if !(1..=RANKS_MAX).contains(&ranks) {
                return Err(format!("a job needs between 1 and {RANKS_MAX} {side}, not {ranks}"));
            }
        }
        if !DEADLINE_RANGE.contains(&self.deadline) {
            return Err(format!("a deadline of {:?} is not within {DEADLINE_RANGE:?}", self.deadline));
        }
        if self.job.len() > JOB_BYTES_MAX {
            return Err(format!("the job's name has {} bytes, more than {JOB_BYTES_MAX}", self.job.len()));
        }
        self.verify.check()
    }
}

/// A member that has joined.
struct Seat {
    connection: ConnectionId,
    /// Until it is planned with.
    manifest: Option<MemberManifest>,
    endpoint: Vec<u8>,
    /// Came over this connection for the first time.
    is_new: bool,
    /// What the bytes of an inference rank are.
    holds: Holds,
    heard_at: Duration,
    progress: u64,
    progress_at: Duration,
    /// Said goodbye in good order.
    left: bool,
}

enum Phase {
    /// Since the last member joined, where somebody waits for the others.
    Joining(Option<Duration>),
    Connecting {
        since: Duration,
        waiting: BTreeSet<Rank>,
    },
    Idle,
    Pushing(Push),
    Ended,
}

/// What one rank that writes has to report for a version to be committed.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Quota {
    bytes: u64,
    writes: u64,
}

/// Makes the parts of all ranks of a plan.
pub type PartsFn = Box<dyn Fn(&Plan, &Manifest) -> Result<Parts, PlanError> + Send>;

/// The controller of one job.
pub struct Controller {
    config: ControllerConfig,
    parts: PartsFn,
    phase: Phase,
    seats: BTreeMap<Rank, Seat>,
    members: BTreeMap<ConnectionId, Rank>,
    digest: Digest,
    /// Every trainer, and the inference ranks that pass bytes on.
    quotas: BTreeMap<Rank, Quota>,
    /// Of those, how many checksums each may report; empty where nothing is verified.
    sums_max: BTreeMap<Rank, usize>,
    /// Inference ranks that were told to pass on what arrives in an attempt, and have not said how that ended.
    relaying: BTreeMap<Rank, PushId>,
    /// Rails that inference ranks have yet to close.
    fences: BTreeSet<Fence>,
    /// Who takes part in the present plan.
    assembly: BTreeSet<Rank>,
    /// Who was lost, and is not waited for.
    absent: BTreeSet<Rank>,
    /// There has been a plan, or an earlier controller had one: a loss makes the job regroup.
    started: bool,
    /// Why there is no plan without those who are lost.
    hindrance: Option<String>,
    bank: Bank,
    committed: Option<Commit>,
    attempts: u64,
    ticked_at: Duration,
    /// For observers; no rule reads it.
    history: History,
}

type Actions = Vec<Action>;

impl Controller {
    /// A controller for the job, or why the job makes no sense.
    pub fn new(config: ControllerConfig) -> Result<Self, String> {
        Self::with_parts(config, Box::new(|plan, manifest| plan.parts(manifest)))
    }

    /// As [`Controller::new`], for a simulation of so many operations that it takes some together.
    pub fn with_parts(config: ControllerConfig, parts: PartsFn) -> Result<Self, String> {
        config.check()?;
        let (committed, started) = (config.resume, config.resume.is_some());
        Ok(Self {
            config,
            parts,
            phase: Phase::Joining(None),
            seats: BTreeMap::new(),
            members: BTreeMap::new(),
            digest: Digest([0; 32]),
            quotas: BTreeMap::new(),
            sums_max: BTreeMap::new(),
            relaying: BTreeMap::new(),
            fences: BTreeSet::new(),
            assembly: BTreeSet::new(),
            absent: BTreeSet::new(),
            started,
            hindrance: None,
            bank: Bank::default(),
            committed,
            attempts: 0,
            ticked_at: Duration::ZERO,
            history: History::default(),
        })
    }

    /// The last committed version; 0 is what was loaded at start.
    pub fn committed(&self) -> u64 {
        self.committed.map_or(0, |commit| commit.version)
    }

    /// Whether the job is over, in good order or not.
    pub fn has_ended(&self) -> bool {
        matches!(self.phase, Phase::Ended)
    }

    /// The longest that any stage waits without progress.
    pub fn deadline(&self) -> Duration {
        self.config.deadline
    }

    /// Which parameters are compared before a version is committed.
    pub fn verify(&self) -> Verify {
        self.config.verify
    }

    /// What a loss does.
    pub fn on_loss(&self) -> OnLoss {
        self.config.on_loss
    }

    /// How often the driver owes an [`Event::Tick`], and members a heartbeat.
    pub fn tick_interval(&self) -> Duration {
        heartbeat_interval(self.config.deadline)
    }

    /// Takes one event at time `now` (since any fixed moment, never decreasing) and appends what is to be done.
    pub fn handle(&mut self, event: Event, now: Duration, actions: &mut Actions) {
        self.history.at(now);
        match event {
            Event::Connected(connection, address) => self.history.connected(connection, address),
            Event::Received(from, message) => self.receive(from, message, now, actions),
            Event::Disconnected(connection, reason) => {
                self.history.disconnected(connection);
                if let Some(member) = self.members.remove(&connection) {
                    self.lose(member, &format!("its connection ended: {reason}"), now, actions);
                }
            }
            Event::Recorded(result) => self.recorded(result, now, actions),
            Event::Tick => self.tick(now, actions),
        }
    }

    fn receive(&mut self, from: ConnectionId, message: ToController, now: Duration, actions: &mut Actions) {
        let Some(&member) = self.members.get(&from) else {
            return match message {
                ToController::Join(join) => self.join(from, *join, now, actions),
                ToController::Status => actions.push(Action::Send(from, self.status())),
                _ => refuse(from, "the first message must be a join".into(), actions),
            };
        };
        if let Some(seat) = self.seats.get_mut(&member) {
            seat.heard_at = now;
        }
        let takes_part = !matches!(self.phase, Phase::Joining(_)) && self.assembly.contains(&member);
        match message {
            ToController::Join(join) => self.join_again(member, *join, now, actions),
            ToController::Status => {
                self.expel(member, "it asked for what only observers are told", now, actions);
            }
            // It has not heard yet that it is to join again.
            message if !takes_part && !message.is_of_any_time() => {}
            ToController::Rails { rails } => self.history.rails(member, rails),
            ToController::Ready { digest } => self.ready(member, digest, now, actions),
            ToController::Begin { version } => self.begin(member, version, now, actions),
            ToController::Prepared { push } => self.advance(member, push, Stage::Preparing, now, actions),
            ToController::Written { push, bytes, writes, fences, sums } => {
                self.owe(fences);
                if self.summed(member, push, sums, now, actions) {
                    self.written(member, push, Quota { bytes, writes }, now, actions);
                }
                self.stopped(member, push, now, actions);
            }
            ToController::Fenced { push } => self.advance(member, push, Stage::Fencing, now, actions),
            ToController::Verified { push } => self.advance(member, push, Stage::Verifying, now, actions),
            ToController::Committed { push } => self.advance(member, push, Stage::Committing, now, actions),
            ToController::Failed { push, reason, fences } => {
                self.owe(fences);
                self.failed(member, push, bounded(reason), now, actions);
                self.stopped(member, push, now, actions);
            }
            ToController::Heartbeat { progress } => {
                self.history.progressed(member, progress);
                if let Some(seat) = self.seats.get_mut(&member)
                    && seat.progress != progress
                {
                    (seat.progress, seat.progress_at) = (progress, now);
                }
            }
            ToController::Leave { reason: Some(reason) } => {
                self.expel(member, &format!("it gave up: {}", bounded(reason)), now, actions);
            }
            ToController::Leave { reason: None } => self.leave(member, now, actions),
        }
    }

    // --- versions ------------------------------------------------------------------------------------------------

    fn begin(&mut self, member: Rank, version: u64, now: Duration, actions: &mut Actions) {
        let Rank::Trainer(_) = member else {
            return self.expel(member, "only trainers begin versions", now, actions);
        };
        let committed = self.committed();
        // The committed version again, for those who have not got it.
        let repeats = version == committed && version > 0 && !self.behind().is_empty();
        if version <= committed && !repeats {
            let reason = format!("version {version} is not newer than the committed version {committed}");
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
                    sums: BTreeMap::new(),
                    unconfirmed: Vec::new(),
                    lost: None,
                });
            }
            Phase::Pushing(push) if push.stage == Stage::Collecting && push.version == version => {
                if !push.waiting.remove(&member) {
                    return self.expel(member, "it began the same version twice", now, actions);
                }
            }
            Phase::Pushing(push) if push.stage == Stage::Collecting => {
                let reason =
                    format!("{member} began version {version} while others began version {}", push.version);
                self.abort(Cause::Disagreement, reason.clone(), now, actions);
                return self.reply(member, ToMember::Abort { version, reason }, actions);
            }
            _ => {
                return self.expel(member, "it began a version before the last one ended", now, actions);
            }
        }
        let has_left = |trainer: &Rank| self.seats.get(trainer).is_none_or(|seat| seat.left);
        let gone = self.trainers().find(has_left);
        if let Some(gone) = gone {
            return self.abort(Cause::Disagreement, format!("{gone} has left the job"), now, actions);
        }
        if self.nobody_waited_for() {
            self.enter(Stage::Stopping, now, actions);
        }
    }

    /// `member` has done what `stage` waits for.
    fn advance(&mut self, member: Rank, push: PushId, stage: Stage, now: Duration, actions: &mut Actions) {
        match &mut self.phase {
            Phase::Pushing(current) if current.id == push && current.stage == stage => {
                if !current.waiting.remove(&member) {
                    return self.expel(member, "it answered what it was not asked", now, actions);
                }
                self.history.advanced(member, stage, current.version);
            }
            // An answer to an attempt that has ended meanwhile.
            _ => return,
        }
        if let (Stage::Committing, Some(seat)) = (stage, self.seats.get_mut(&member)) {
            seat.holds = self.committed.map_or(Holds::Nothing, Holds::Version);
        }
        if let (Stage::Preparing | Stage::Fencing, Rank::Receiver(rank)) = (stage, member) {
            // It was told all that there is: who writes says what it owes before the stage begins.
            self.fences.retain(|fence| fence.at != rank);
        }
        if self.nobody_waited_for() {
            match stage {
                Stage::Collecting | Stage::Stopping | Stage::Committing | Stage::Recording => {
                    self.finish(now, actions);
                }
                Stage::Preparing => self.enter(Stage::Writing, now, actions),
                Stage::Writing if !self.fences.is_empty() => self.enter(Stage::Fencing, now, actions),
                Stage::Writing | Stage::Fencing if self.config.verify.is_on() => {
                    self.enter(Stage::Verifying, now, actions);
                }
                Stage::Writing | Stage::Fencing | Stage::Verifying => self.commit(now, actions),
            }
        }
    }

    fn written(&mut self, member: Rank, push: PushId, quota: Quota, now: Duration, actions: &mut Actions) {
        match self.quotas.get(&member) {
            Some(planned) if *planned == quota => self.advance(member, push, Stage::Writing, now, actions),
            Some(planned) => {
                let reason = format!(
                    "it reports {} bytes in {} writes where the plan has {} bytes in {} writes",
                    quota.bytes, quota.writes, planned.bytes, planned.writes
                );
                self.expel(member, &reason, now, actions);
            }
            None => self.expel(member, "the plan has nothing for it to write", now, actions),
        }
    }

    fn failed(&mut self, member: Rank, push: PushId, reason: String, now: Duration, actions: &mut Actions) {
        match &self.phase {
            Phase::Pushing(current) if current.id != push => {}
            // The decision is taken: who cannot follow it is lost.
            Phase::Pushing(current) if current.stage.is_decided() => {
                self.expel(member, &format!("it failed after the commit: {reason}"), now, actions);
            }
            Phase::Pushing(_) => self.abort(Cause::Failure, format!("{member}: {reason}"), now, actions),
            _ => {}
        }
    }

    /// `member` writes nothing any more for the attempt `push`.
    fn stopped(&mut self, member: Rank, push: PushId, now: Duration, actions: &mut Actions) {
        if self.relaying.get(&member) != Some(&push) {
            return;
        }
        self.relaying.remove(&member);
        if let Phase::Pushing(current) = &mut self.phase
            && current.stage == Stage::Stopping
            && current.waiting.remove(&member)
            && current.waiting.is_empty()
        {
            self.enter(Stage::Preparing, now, actions);
        }
    }

    /// Remembers rails that have to be closed.
    fn owe(&mut self, fences: Vec<Fence>) {
        let known = |fence: &Fence| self.assembly.contains(&Rank::Receiver(fence.at));
        self.fences.extend(fences.into_iter().filter(known));
    }

    fn enter(&mut self, stage: Stage, now: Duration, actions: &mut Actions) {
        let waiting: BTreeSet<Rank> = match stage {
            Stage::Recording => BTreeSet::new(),
            Stage::Collecting => self.trainers().collect(),
            // What an inference rank still passes on could arrive in the next attempt, and count for it.
            Stage::Stopping => self.relaying.keys().copied().collect(),
            Stage::Preparing | Stage::Verifying | Stage::Committing => self.receivers().collect(),
            Stage::Writing => self.quotas.keys().copied().collect(),
            Stage::Fencing => self.fences.iter().map(|fence| Rank::Receiver(fence.at)).collect(),
        };
        for seat in self.seats.values_mut() {
            (seat.progress, seat.progress_at) = (0, now);
        }
        self.history.entered();
        let Phase::Pushing(push) = &mut self.phase else {
            return;
        };
        (push.stage, push.since, push.waiting) = (stage, now, waiting.clone());
        let (id, version) = (push.id, push.version);
        let mut sums = match stage {
            Stage::Verifying => std::mem::take(&mut push.sums),
            _ => BTreeMap::new(),
        };
        if stage == Stage::Stopping {
            push.began_at = now;
            if waiting.is_empty() {
                return self.enter(Stage::Preparing, now, actions);
            }
        }
        if stage == Stage::Preparing {
            actions.push(Action::Report(Report::Pushing { version, push: id }));
            // They pass on what arrives from the moment that they are prepared.
            let relays = self.quotas.keys().filter(|member| matches!(member, Rank::Receiver(_)));
            self.relaying = relays.map(|member| (*member, id)).collect();
            for member in &waiting {
                if let Some(seat) = self.seats.get_mut(member) {
                    seat.holds = Holds::Torn;
                }
            }
        }
        let bank = self.bank;
        for member in waiting {
            let rails = self.fences.iter().filter(|fence| Rank::Receiver(fence.at) == member);
            let rails = rails.map(|fence| fence.rail).collect();
            let message = match (stage, member) {
                (Stage::Collecting | Stage::Stopping | Stage::Recording, _)
                | (Stage::Writing, Rank::Receiver(_)) => continue,
                (Stage::Verifying, Rank::Trainer(_)) => continue,
                (Stage::Verifying, Rank::Receiver(rank)) => {
                    let sums = sums.remove(&rank).unwrap_or_default().into_iter().collect();
                    ToMember::Verify { push: id, sums }
                }
                (Stage::Preparing, _) => ToMember::Prepare { push: id, version, fence: rails, bank },
                (Stage::Writing, Rank::Trainer(_)) => ToMember::Write { push: id, version, bank },
                (Stage::Fencing, _) => ToMember::Fence { push: id, rails },
                (Stage::Committing, _) => ToMember::Commit { push: id, version },
            };
            self.reply(member, message, actions);
        }
    }

    /// The decision: everyone who writes has reported every byte of its part, and nobody found others. It is recorded
    /// before anybody is told.
    fn commit(&mut self, now: Duration, actions: &mut Actions) {
        if let Phase::Pushing(push) = &self.phase {
            actions.push(Action::Record(Commit { version: push.version, push: push.id }));
            self.enter(Stage::Recording, now, actions);
        }
    }

    /// The decision is on record: nothing else sets `committed`. Where it could not be recorded, nobody knows what the
    /// next controller will find there, so nobody may be told anything: the job ends.
    fn recorded(&mut self, result: Result<(), String>, now: Duration, actions: &mut Actions) {
        let Phase::Pushing(push) = &self.phase else { return };
        if push.stage != Stage::Recording {
            return;
        }
        let (version, id, elapsed) = (push.version, push.id, now.saturating_sub(push.began_at));
        if let Err(reason) = result {
            let reason = format!("the commit of version {version} could not be recorded: {reason}");
            return self.end(Some(reason), actions);
        }
        self.history.ended(push, None);
        self.committed = Some(Commit { version, push: id });
        self.bank = self.bank.turned();
        actions.push(Action::Report(Report::Committed { version, push: id, elapsed }));
        self.enter(Stage::Committing, now, actions);
        // All inference ranks may have been lost meanwhile.
        if self.nobody_waited_for() {
            self.finish(now, actions);
        }
    }

    /// All inference ranks that are still there have confirmed the commit.
    fn finish(&mut self, now: Duration, actions: &mut Actions) {
        if let Phase::Pushing(push) = std::mem::replace(&mut self.phase, Phase::Idle) {
            let message =
                ToMember::Done { push: push.id, version: push.version, unconfirmed: push.unconfirmed };
            self.send_all(|member| matches!(member, Rank::Trainer(_)), message, actions);
            match push.lost {
                Some(reason) => self.after_loss(reason, now, actions),
                None => self.let_in(now, actions),
            }
        }
    }

    /// Ends the attempt without a commit. The job goes on.
    fn abort(&mut self, cause: Cause, reason: String, now: Duration, actions: &mut Actions) {
        let Phase::Pushing(push) = std::mem::replace(&mut self.phase, Phase::Idle) else {
            return;
        };
        self.history.ended(&push, Some(reason.clone()));
        let version = push.version;
        let message = ToMember::Abort { version, reason: reason.clone() };
        // A trainer that has not begun, or an inference rank that was not told, knows of no attempt.
        let involved = |member: Rank| match member {
            Rank::Trainer(_) => push.stage != Stage::Collecting || !push.waiting.contains(&member),
            Rank::Receiver(_) => !matches!(push.stage, Stage::Collecting | Stage::Stopping),
        };
        self.send_all(involved, message, actions);
        let (push, stage) = (push.id, push.stage);
        actions.push(Action::Report(Report::Aborted { version, push, stage, cause, reason }));
        self.let_in(now, actions);
    }

    // --- helpers -------------------------------------------------------------------------------------------------

    /// The trainers of the present plan.
    fn trainers(&self) -> impl Iterator<Item = Rank> {
        self.assembly.iter().copied().filter(|member| matches!(member, Rank::Trainer(_)))
    }

    /// The inference ranks of the present plan.
    fn receivers(&self) -> impl Iterator<Item = Rank> {
        self.assembly.iter().copied().filter(|member| matches!(member, Rank::Receiver(_)))
    }

    /// Inference ranks whose bytes are not the committed version.
    fn behind(&self) -> Vec<ReceiverRank> {
        let committed = self.committed.map(|commit| commit.version);
        let holds = |member: &Rank| self.seats.get(member).and_then(|seat| seat.holds.served());
        let has = |member: &Rank| holds(member).map(|commit| commit.version) == committed;
        let receivers = self.receivers().filter(|member| committed.is_some() && !has(member));
        receivers
            .filter_map(|member| if let Rank::Receiver(rank) = member { Some(rank) } else { None })
            .collect()
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

    /// To those of the present plan.
    fn send_all(&self, to: impl Fn(Rank) -> bool, message: ToMember, actions: &mut Actions) {
        let seats = self
            .seats
            .iter()
            .filter(|(member, seat)| self.assembly.contains(member) && to(**member) && !seat.left);
        actions.extend(seats.map(|(_, seat)| Action::Send(seat.connection, message.clone())));
    }
}

impl ToController {
    /// Whether it may come from a member that takes no part in the present plan.
    fn is_of_any_time(&self) -> bool {
        matches!(self, Self::Join(_) | Self::Heartbeat { .. } | Self::Leave { .. })
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
mod tests;
