//! The rules of a job, as a state machine: who has joined, what is being waited for, which version is committed.
//!
//! `handle(event, now, &mut actions)` is the whole interface. It opens no socket, reads no clock and draws no random
//! number (the seed of the push ids is an argument), so the same code runs behind `server` and in a simulated
//! cluster. A version is committed at one point only: `Controller::commit` in `versions`, reached when everyone who writes
//! has reported every byte that the plan gives it (every trainer, and every inference rank that passes bytes on), and where
//! the job verifies, when every inference rank has found the bytes that were sent.
//!
//! The decision to commit is recorded before anybody is told: [`Action::Record`], then [`Event::Recorded`].
//!
//! A member that fails without being lost aborts the attempt; the next attempt is welcome. What a loss does is the job's
//! policy ([`OnLoss`]): it ends the job, or the job *regroups*. Then everybody closes all rails and joins again with fresh ones,
//! over which nothing can arrive that a lost rank still sends, there is a new plan, and versions go on. A rank that comes
//! back, or a controller that does, is met in the same way. `assembly` is who takes part in the present plan.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use xfer_plan::{
    Digest, Magnitudes, Manifest, Parts, Plan, PlanError, PlanOptions, Planner, Rank, ReceiverRank,
};

use crate::protocol::{
    Bank, Commit, DEADLINE_RANGE, Fence, Holds, JOB_BYTES_MAX, MemberManifest, OnLoss, PushId, RANKS_MAX,
    SessionId, ToController, ToMember, World, cut,
};
use crate::verify::Verify;

mod event;
mod joining;
mod losses;
mod measuring;
mod push;
mod status;
mod verifying;
mod versions;

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
    session: SessionId,
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
    /// Knows the last plan: after a loss or a return only what is new is planned.
    planner: Planner,
    parts: PartsFn,
    phase: Phase,
    seats: BTreeMap<Rank, Seat>,
    members: BTreeMap<ConnectionId, Rank>,
    digest: Digest,
    /// Every trainer, and the inference ranks that pass bytes on.
    quotas: BTreeMap<Rank, Quota>,
    /// Of those, how many checksums each may report; empty where nothing is verified.
    sums_max: BTreeMap<Rank, usize>,
    /// Of the present attempt, where the plan cuts quantised blocks.
    magnitudes: Option<Magnitudes>,
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
            planner: Planner::new(),
            parts,
            phase: Phase::Joining(None),
            seats: BTreeMap::new(),
            members: BTreeMap::new(),
            digest: Digest([0; 32]),
            quotas: BTreeMap::new(),
            sums_max: BTreeMap::new(),
            magnitudes: None,
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
            ToController::Magnitudes { push, magnitudes } => {
                self.measured(member, push, &magnitudes, now, actions);
            }
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
