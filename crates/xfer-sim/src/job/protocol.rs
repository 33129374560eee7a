//! The control plane: messages between members and the controller, each over a connection of its own, in order.
//!
//! What is said is decided by the controller and the members of `rendezvous`; here it is only carried, and what a step asks
//! for is done.

use core::time::Duration;
use std::collections::BTreeSet;

use rendezvous::controller::{Action, ConnectionId, Event as ControllerEvent, heartbeat_interval};
use rendezvous::member::{InferenceMember, InferenceStep, Served, TrainerMember, TrainerStep};
use rendezvous::{
    Holds, JOB_DEFAULT, Join, MemberManifest, Planned, PlannedPart, SessionId, ToController, ToMember,
    World as JobWorld,
};
use xfer_exec::program::RankLimits;
use xfer_exec::{Program, ProgramError, Runner};
use xfer_plan::{Op, Rank, ReceiverRank};

use super::measuring::Measures;
use super::rail::SimRail;
use super::rank::Half;
use super::sabotage::Sabotage;
use super::world::{Event, World, short};
use crate::time::Time;

/// From the plan to connected rails: assumed, and in no push.
const CONNECT_NANOSECONDS: u64 = 10_000_000;

/// Between the end of one version and the weights of the next.
const PAUSE_NANOSECONDS: u64 = 1_000_000;

/// Attempts at one version before a trainer gives up its job.
const ATTEMPTS_MAX: u32 = 4;

/// A trainer's and a receiver's staging slots at most, as in the real driver.
const SLOTS_MAX: u64 = 1024;

/// A stalled rail is given up after this part of a rank's deadline, as in real sessions.
const STALL_DIVISOR: u32 = 5;

/// When the last message of each connection arrives, one way and the other: they do not overtake.
pub(super) struct Wires {
    to_controller: Vec<Time>,
    to_member: Vec<Time>,
    /// Until when nothing comes through.
    pub(super) cut_until: Vec<Time>,
}

impl Wires {
    pub(super) fn new(members: usize) -> Wires {
        let never = || vec![Time::ZERO; members];
        Wires { to_controller: never(), to_member: never(), cut_until: never() }
    }
}

/// The connection of a rank.
pub(super) fn connection(rank: u32) -> ConnectionId {
    ConnectionId(rank.into())
}

impl World<'_> {
    fn since_start(&self) -> Duration {
        self.now.since(Time::ZERO)
    }

    /// How long a message takes. Plans and manifests are sent before any push: they take a latency, whatever their length.
    fn delay(&self, bytes: Option<u64>) -> u64 {
        self.config.cluster.control.delay_nanoseconds(bytes.unwrap_or(0))
    }

    // --- the controller ------------------------------------------------------------------------------------------

    pub(super) fn controller_receives(&mut self, from: u32, message: ToController) {
        self.controller_handles(ControllerEvent::Received(connection(from), message));
    }

    pub(super) fn controller_handles(&mut self, event: ControllerEvent) {
        let now = self.since_start();
        let Some(controller) = &mut self.controller else { return };
        let mut actions = Vec::new();
        controller.handle(event, now, &mut actions);
        for action in actions {
            match action {
                Action::Send(to, message) => self.tell_member(to.0 as u32, message),
                Action::Close(to) => self.hang_up(to.0 as u32),
                // A disk that takes no time: nothing comes between a decision and its record.
                Action::Record(_) => self.controller_handles(ControllerEvent::Recorded(Ok(()))),
                Action::Report(report) => self.report(report),
            }
        }
    }

    pub(super) fn controller_tick(&mut self) {
        let Some(controller) = self.controller.as_ref().filter(|controller| !controller.has_ended()) else {
            return;
        };
        let interval = controller.tick_interval();
        if self.sabotage != Some(Sabotage::NoDeadlines) {
            self.controller_handles(ControllerEvent::Tick);
        }
        self.events.push(self.now.plus(interval), Event::ControllerTick);
    }

    fn tell_member(&mut self, to: u32, message: ToMember) {
        let bytes = (!matches!(message, ToMember::Planned(_))).then(|| message.encoded_bytes());
        let arrives = self.now.max(self.control.cut_until[to as usize]).plus_nanos(self.delay(bytes));
        let last = &mut self.control.to_member[to as usize];
        *last = arrives.max(*last);
        self.events.push(*last, Event::ToMember(to, Box::new(message)));
    }

    /// Closes a connection once what was sent before has left.
    fn hang_up(&mut self, to: u32) {
        let at = self.control.to_member[to as usize].max(self.now.plus_nanos(self.delay(None)));
        self.events.push(at, Event::ControllerGone(to));
    }

    // --- members -------------------------------------------------------------------------------------------------

    pub(super) fn tell_controller(&mut self, from: u32, message: ToController) {
        if !self.ranks[from as usize].is_in() {
            return;
        }
        let rank = self.ranks[from as usize].rank;
        if !matches!(message, ToController::Heartbeat { .. } | ToController::Join(_)) {
            self.log.say(self.now, || format!("{rank} says {message:?}"));
        }
        let bytes = (!matches!(message, ToController::Join(_))).then(|| message.encoded_bytes());
        let arrives = self.now.max(self.control.cut_until[from as usize]).plus_nanos(self.delay(bytes));
        let last = &mut self.control.to_controller[from as usize];
        *last = arrives.max(*last);
        self.events.push(*last, Event::ToController(from, Box::new(message)));
    }

    pub(super) fn join(&mut self, number: u32) {
        let rank = &self.ranks[number as usize];
        if !rank.is_in() {
            return;
        }
        let (trainers, receivers) = (&self.config.manifest.trainers, &self.config.manifest.receivers);
        let manifest = match rank.rank {
            Rank::Trainer(rank) => trainers.get(rank.index()).cloned().map(MemberManifest::Trainer),
            Rank::Receiver(rank) => receivers.get(rank.index()).cloned().map(MemberManifest::Inference),
        };
        let Some(manifest) = manifest else { return };
        let join = Join {
            job: JOB_DEFAULT.to_owned(),
            member: rank.rank,
            world: JobWorld { trainers: trainers.len() as u32, inference: receivers.len() as u32 },
            deadline: self.config.deadline,
            manifest,
            endpoint: Vec::new(),
            holds: Holds::Nothing,
            stages: false,
            session: SessionId::default(),
        };
        let (half, message) = match rank.rank {
            Rank::Trainer(_) => {
                let (member, message) = TrainerMember::join(join);
                (Half::Trainer(member), message)
            }
            Rank::Receiver(_) => {
                let (member, message) = InferenceMember::join(join, false);
                (Half::Receiver(member), message)
            }
        };
        let now = self.now;
        let rank = &mut self.ranks[number as usize];
        (rank.half, rank.heard_at) = (half, now);
        self.tell_controller(number, message);
        self.events.push(self.now.plus(heartbeat_interval(self.config.deadline)), Event::Beat(number));
    }

    /// A member's heartbeat, and whether it still hears the controller.
    pub(super) fn beat(&mut self, number: u32) {
        let rank = &self.ranks[number as usize];
        if !rank.is_in() {
            return;
        }
        if self.now.since(rank.heard_at) > self.config.deadline {
            return self.end_rank(number, "nothing was heard from the controller");
        }
        let progress = rank.runner.as_ref().map_or(0, |runner| runner.engine().delivered().bytes);
        self.tell_controller(number, ToController::Heartbeat { progress });
        self.events.push(self.now.plus(heartbeat_interval(self.config.deadline)), Event::Beat(number));
    }

    pub(super) fn member_receives(&mut self, number: u32, message: ToMember) {
        let now = self.now;
        let rank = &mut self.ranks[number as usize];
        if !rank.is_in() {
            return;
        }
        rank.heard_at = now;
        let who = rank.rank;
        if !matches!(message, ToMember::Heartbeat | ToMember::Planned(_)) {
            self.log.say(now, || format!("{who} hears {message:?}"));
        }
        let unexpected = match &mut rank.half {
            Half::Out => return,
            Half::Trainer(member) => match member.handle(message) {
                Ok(None) => return,
                Ok(Some(step)) => return self.trainer_step(number, step),
                Err(unexpected) => unexpected,
            },
            Half::Receiver(member) => match member.handle(message) {
                Ok(None) => return,
                Ok(Some(step)) => return self.inference_step(number, step),
                Err(unexpected) => unexpected,
            },
        };
        self.breaks(format!("{who}: {unexpected}"));
    }

    fn trainer_step(&mut self, number: u32, step: TrainerStep) {
        match step {
            TrainerStep::Connect(planned) => self.connect(number, *planned),
            TrainerStep::Started => self.plan_version(number, 0),
            TrainerStep::Measure { .. } => self.measure(number),
            TrainerStep::Write { push, version, .. } => {
                self.log
                    .say(self.now, || format!("trainer {number} writes version {version} ({})", short(push)));
                self.start_push(number);
                if self.sabotage == Some(Sabotage::EarlyCommit) {
                    self.says_written_early(number);
                }
            }
            TrainerStep::Stop { reason } => {
                let at = self.ranks[number as usize].push_time(self.now);
                if let Some(runner) = &mut self.ranks[number as usize].runner {
                    runner.abort(reason, at);
                }
                self.ranks[number as usize].stopped = true;
                self.wake(number);
            }
            TrainerStep::Committed { version, .. } => {
                self.tally.done(version, &self.ranks);
                let agenda = &mut self.ranks[number as usize].agenda;
                (agenda.version, agenda.failed) = (version + 1, 0);
                self.next_version(number);
            }
            TrainerStep::Aborted { .. } => self.aborted(number),
            TrainerStep::Refused { reason } => self.end_rank(number, &reason),
            TrainerStep::Regroup { reason } => self.regroups(number, &reason),
        }
    }

    /// An attempt of a trainer is over without a commit.
    fn aborted(&mut self, number: u32) {
        let agenda = &mut self.ranks[number as usize].agenda;
        agenda.failed += 1;
        if agenda.failed >= ATTEMPTS_MAX {
            let reason = format!("version {} was aborted {ATTEMPTS_MAX} times", agenda.version);
            self.tell_controller(number, ToController::Leave { reason: Some(reason.clone()) });
            return self.end_rank(number, &reason);
        }
        self.next_version(number);
    }

    fn next_version(&mut self, number: u32) {
        if self.ranks[number as usize].agenda.version > self.config.versions.into() {
            self.tell_controller(number, ToController::Leave { reason: None });
            return self.end_rank(number, "it has pushed all versions");
        }
        self.plan_version(number, PAUSE_NANOSECONDS);
    }

    /// Trainers finish their steps one after another, within what is their skew.
    fn plan_version(&mut self, number: u32, pause: u64) {
        let trainers = self.config.manifest.trainers.len().max(2) as u128 - 1;
        let skew = self.config.skew.as_nanos() * u128::from(number) / trainers;
        let at = self.now.plus_nanos(pause).plus_nanos(skew as u64);
        self.events.push(at, Event::Begin(number));
    }

    pub(super) fn begin(&mut self, number: u32) {
        let rank = &mut self.ranks[number as usize];
        if !rank.is_in() {
            return;
        }
        let version = rank.agenda.version;
        let Half::Trainer(member) = &mut rank.half else { return };
        let Some(message) = member.begin(version) else { return };
        if let Some(bytes) = &mut self.bytes {
            bytes.set_version(number, version);
        }
        self.tally.begins(version, self.now);
        self.tell_controller(number, message);
    }

    fn inference_step(&mut self, number: u32, step: InferenceStep) {
        match step {
            InferenceStep::Planned(planned) => self.connect(number, *planned),
            InferenceStep::Started => {}
            InferenceStep::Prepare { version, close, .. } => {
                let closed = self.fence(number, &close);
                if let Some(bytes) = self.bytes.as_mut().filter(|_| closed.is_ok()) {
                    bytes.prepare(number);
                }
                if let Half::Receiver(member) = &mut self.ranks[number as usize].half {
                    let message = member.prepared(closed);
                    let prepared = member.served() == Served::Torn(version);
                    if prepared {
                        // Passes on, if the plan has it do so.
                        self.start_push(number);
                    }
                    self.answer(number, message);
                }
            }
            InferenceStep::Fence { close, .. } => {
                let closed = self.fence(number, &close);
                if let Half::Receiver(member) = &mut self.ranks[number as usize].half {
                    let message = member.fenced(closed);
                    self.answer(number, message);
                }
            }
            InferenceStep::Verify { version, .. } => {
                let compared = self.bytes.as_ref().map_or(Ok(()), |bytes| bytes.check(number, version));
                if let Half::Receiver(member) = &mut self.ranks[number as usize].half {
                    let message = member.verified(compared);
                    self.answer(number, message);
                }
            }
            InferenceStep::Commit { version, .. } => {
                self.tally.serves(version, self.now);
                let message = match &mut self.ranks[number as usize].half {
                    Half::Receiver(member) => member.committed(),
                    _ => None,
                };
                if let Some(bytes) = &self.bytes
                    && let Err(what) = bytes.check(number, version)
                {
                    self.breaks(what);
                }
                if version > self.committed {
                    self.breaks(format!("inference rank serves version {version}, which is not committed"));
                }
                self.answer(number, message);
            }
            InferenceStep::Aborted { reason, .. } => {
                let at = self.ranks[number as usize].push_time(self.now);
                let rank = &mut self.ranks[number as usize];
                if let (Some(_), Some(runner)) = (rank.pushing, &mut rank.runner) {
                    runner.abort(reason, at);
                    self.wake(number);
                }
            }
            InferenceStep::Finished => self.end_rank(number, "all trainers have left"),
            InferenceStep::Refused { reason } => self.end_rank(number, &reason),
            InferenceStep::Regroup { reason } => self.regroups(number, &reason),
        }
    }

    /// The jobs that are simulated end with a loss.
    fn regroups(&mut self, number: u32, reason: &str) {
        self.breaks(format!("{} is to join again: {reason}", self.ranks[number as usize].rank));
    }

    pub(super) fn answer(&mut self, number: u32, message: Option<ToController>) {
        if let Some(message) = message {
            self.tell_controller(number, message);
        }
    }

    /// A rank's push is over: its half of the protocol says so.
    pub(super) fn said_written(&mut self, number: u32, result: Result<(u64, u64), String>) {
        let fences = self.fences_of(number);
        let rank = &mut self.ranks[number as usize];
        let stopped = std::mem::take(&mut rank.stopped);
        let message = match &mut rank.half {
            Half::Trainer(member) => member.written(result, fences, Vec::new()),
            Half::Receiver(member) => member.relayed(result, fences, Vec::new()),
            Half::Out => None,
        };
        self.answer(number, message);
        if stopped {
            self.aborted(number);
        }
    }

    /// What [`Sabotage::EarlyCommit`] does: a trainer that says it has written everything, and has not.
    fn says_written_early(&mut self, number: u32) {
        let rank = &mut self.ranks[number as usize];
        let Some(runner) = &rank.runner else { return };
        let program = runner.engine().program();
        let said = (program.bytes(), program.writes());
        let Half::Trainer(member) = &mut rank.half else { return };
        let message = member.written(Ok(said), Vec::new(), Vec::new());
        self.answer(number, message);
    }

    /// A rank takes no further part: its process goes on, or ends in good order.
    pub(super) fn end_rank(&mut self, number: u32, reason: &str) {
        let now = self.now;
        let rank = &mut self.ranks[number as usize];
        if rank.ended.is_some() {
            return;
        }
        rank.ended = Some(reason.to_owned());
        let who = rank.rank;
        self.log.say(now, || format!("{who} ends: {reason}"));
        self.hangs_up(number);
        self.drop_flights_of(number);
    }

    /// A member's connection ends, behind what it said last.
    pub(super) fn hangs_up(&mut self, number: u32) {
        let last = self.control.to_controller[number as usize];
        let at = last.max(self.now.plus_nanos(self.delay(None)));
        self.events.push(at, Event::MemberGone(number));
    }

    // --- the plan ------------------------------------------------------------------------------------------------

    /// Takes a rank's part of the plan; its rails are connected a little later.
    fn connect(&mut self, number: u32, planned: Planned) {
        if let Err(reason) = self.make_runner(number, planned.part) {
            self.breaks(format!("{}: {reason}", self.ranks[number as usize].rank));
        }
        self.events.push(self.now.plus_nanos(CONNECT_NANOSECONDS), Event::Ready(number));
    }

    fn make_runner(&mut self, number: u32, part: PlannedPart) -> Result<(), ProgramError> {
        let (cluster, manifest) = (&self.config.cluster, &self.config.manifest);
        let is_bundled = self.config.bundle_bytes > 0;
        let costs = self.costs.lock().map(|mut all| all.get_mut(number as usize).map(std::mem::take));
        let rank = &mut self.ranks[number as usize];
        rank.costs = costs.ok().flatten().unwrap_or_default();
        let (own, plan) = match (rank.rank, &part) {
            (Rank::Trainer(rank), PlannedPart::Trainer { plan, .. }) => {
                (manifest.trainers.get(rank.index()).map(|own| &own.regions), plan)
            }
            (Rank::Receiver(rank), PlannedPart::Inference { relay, .. }) => {
                (manifest.receivers.get(rank.index()).map(|own| &own.regions), &relay.plan)
            }
            _ => return Ok(()),
        };
        // A bundle has no place.
        let room = |regions: &Vec<u64>| {
            if is_bundled { vec![u64::MAX; regions.len().max(1)] } else { regions.clone() }
        };
        if plan.ops.is_empty() && matches!(part, PlannedPart::Inference { .. }) {
            return Ok(());
        }
        let slot_bytes = plan.ops.iter().map(Op::staged_bytes).max().unwrap_or(0);
        if let PlannedPart::Trainer { quant, .. } = &part {
            rank.measures = Measures::new(quant);
        }
        let limits =
            RankLimits { region_bytes: own.map(room).unwrap_or_default(), slot_bytes, transforms: true };
        let regions = |to: ReceiverRank| {
            manifest.receivers.get(to.index()).map(|receiver| room(&receiver.regions)).unwrap_or_default()
        };
        let to: BTreeSet<ReceiverRank> = plan.ops.iter().map(|op| op.to).collect();
        let routes = rank.routes(to.into_iter(), cluster, regions);
        let program = match part {
            PlannedPart::Trainer { plan, names, .. } => Program::new(plan, names, &limits, routes)?,
            PlannedPart::Inference { relay, names, .. } => Program::relay(relay, names, &limits, routes)?,
        };
        let slots = match slot_bytes {
            0 => 0,
            bytes => (manifest.options.watermark_bytes / bytes).min(SLOTS_MAX) as u32,
        };
        let rails = rank.rails.iter().map(|queue| Box::new(SimRail(queue.clone()))).collect();
        // Half, as in a real session: it fails and says whom it waited for before the controller gives up on it.
        let deadline = self.config.deadline / 2;
        rank.runner = Some(Runner::new(program, rails, slots, deadline, deadline / STALL_DIVISOR));
        Ok(())
    }

    pub(super) fn ready(&mut self, number: u32) {
        let message = match &mut self.ranks[number as usize].half {
            Half::Trainer(member) => member.ready(),
            Half::Receiver(member) => member.ready(),
            Half::Out => None,
        };
        self.answer(number, message);
    }
}
