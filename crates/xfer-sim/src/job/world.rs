//! The loop: what happens next, and who is told.
//!
//! Ranks, the controller and the network know nothing of each other; everything between them passes through here, one event
//! at a time. It must never decide what a rank would decide.

use std::sync::{Arc, Mutex};

use rendezvous::controller::{Controller, ControllerConfig, PartsFn, Report};
use rendezvous::{JOB_DEFAULT, OnLoss, PushId, ToController, ToMember, Verify, World as JobWorld};
use xfer_exec::engine::Slot;
use xfer_exec::runner::TICK;
use xfer_exec::{Delivered, Failure, RailIndex, Turn, WriteId};
use xfer_plan::Rank;

use super::bundle::{Cost, bundled_parts};
use super::bytes::Bytes;
use super::config::JobConfig;
use super::error::JobError;
use super::faults::{Fault, Faults};
use super::log::{Log, Trace};
use super::rail::Piece;
use super::rank::SimRank;
use super::report::JobReport;
use super::sabotage::Sabotage;
use super::tally::Tally;
use super::wire::Flights;
use super::{Progress, protocol};
use crate::network::{self, Link, Network, Outcome};
use crate::queue::EventQueue;
use crate::random::Random;
use crate::time::Time;

/// What a turn of a rank's thread costs besides posting, in nanoseconds: assumed, a poll of an empty queue takes as long.
const TURN_NANOSECONDS: u64 = 100;

/// Short WRITEs are simulated as one transfer while a NIC is done with them in one part in so many of a second: 10 us.
const BURSTS_PER_SECOND: u64 = 100_000;

/// How often progress is told, in events.
const PROGRESS_EVENTS: u64 = 1 << 16;

/// Events at the end of the budget that are described.
const DESCRIBED: u64 = 24;

/// What will happen. Ranks are numbers: trainers first.
pub(super) enum Event {
    /// A rank's thread takes a turn.
    Step(u32),
    /// A rank's thread has posted what is due.
    Launch(u32),
    /// A rank's runner is told the time.
    EngineTick(u32),
    /// A flight that nobody waits for arrives.
    Lands(u32),
    /// The sender of a flight is told how it ended.
    Complete(u32),
    /// A rail of a rank has closed.
    RailClosed(Box<Closed>),
    /// A message arrives.
    ToController(u32, Box<ToController>),
    /// A message arrives.
    ToMember(u32, Box<ToMember>),
    /// The controller learns that a member's connection has ended.
    MemberGone(u32),
    /// A member learns that its connection has ended.
    ControllerGone(u32),
    ControllerTick,
    /// A member's heartbeat is due.
    Beat(u32),
    Join(u32),
    /// A rank's rails are connected.
    Ready(u32),
    /// A trainer's weights are final.
    Begin(u32),
    /// A trainer has measured the blocks that it shares with others, for the attempt of this number among its own.
    Measured(u32, u32),
    Fault(Fault),
}

/// A rail that closes, and what it had in flight.
pub(super) struct Closed {
    pub(super) rank: u32,
    pub(super) rail: RailIndex,
    pub(super) unfinished: Vec<WriteId>,
    pub(super) held: Vec<Piece>,
    pub(super) result: Result<(), String>,
}

/// See the module.
pub(super) struct World<'w> {
    pub(super) config: &'w JobConfig,
    pub(super) now: Time,
    pub(super) network: Network,
    pub(super) events: EventQueue<Event>,
    pub(super) ranks: Vec<SimRank>,
    pub(super) flights: Flights,
    /// `None` once it has crashed.
    pub(super) controller: Option<Controller>,
    /// The last version that the controller committed, and how the job ended.
    pub(super) committed: u64,
    pub(super) job_ended: Option<Option<String>>,
    pub(super) control: protocol::Wires,
    /// What bundles cost, by trainer, until the trainer has its part of the plan.
    pub(super) costs: Arc<Mutex<Vec<Vec<Cost>>>>,
    pub(super) tally: Tally,
    pub(super) log: Log<'w>,
    /// What every byte is; only where that is checked.
    pub(super) bytes: Option<Bytes>,
    pub(super) faults: Faults,
    pub(super) sabotage: Option<Sabotage>,
    pub(super) random: Random,
    /// Short WRITEs that follow each other to one receiver are simulated as one transfer up to so many bytes.
    pub(super) burst_bytes_max: u64,
    /// What is broken, once something is.
    pub(super) broken: Option<String>,
}

/// What is checked and what goes wrong, besides the job itself.
#[derive(Default)]
pub(super) struct Extras<'w> {
    pub(super) bytes: Option<Bytes>,
    pub(super) faults: Faults,
    pub(super) sabotage: Option<Sabotage>,
    pub(super) trace: Option<&'w mut Trace<'w>>,
    /// Whether every WRITE is a transfer of its own.
    pub(super) is_fine: bool,
    /// Whether events are described for an error, even if nobody is told of them.
    pub(super) describes: bool,
}

impl<'w> World<'w> {
    pub(super) fn new(config: &'w JobConfig, extras: Extras<'w>) -> Result<World<'w>, JobError> {
        config.check()?;
        let JobConfig { cluster, manifest, .. } = config;
        let mut network = cluster.clone();
        if config.bundle_bytes > 0 {
            // One event instead of two: a sender is told when bytes arrive, and that is when it is told.
            network.nic.latency_nanoseconds += std::mem::take(&mut network.nic.completion_nanoseconds);
        }
        let network = Network::new(&network, config.tolerance, config.seed)?;
        let world =
            JobWorld { trainers: manifest.trainers.len() as u32, inference: manifest.receivers.len() as u32 };
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&config.seed.to_le_bytes());
        let costs: Arc<Mutex<Vec<Vec<Cost>>>> = Arc::default();
        let parts: PartsFn = match config.bundle_bytes {
            0 => Box::new(|plan, manifest| plan.parts(manifest)),
            bytes_max => {
                // A bundle's length has 32 bits, as an operation's.
                let bytes_max = bytes_max.min(u32::MAX.into());
                let (nic, costs) = (cluster.nic, costs.clone());
                Box::new(move |plan, manifest| {
                    let (parts, found) = bundled_parts(plan, manifest, bytes_max, &nic)?;
                    if let Ok(mut costs) = costs.lock() {
                        *costs = found;
                    }
                    Ok(parts)
                })
            }
        };
        let controller_config = ControllerConfig {
            job: JOB_DEFAULT.to_owned(),
            world,
            deadline: config.deadline,
            options: manifest.options,
            verify: Verify::Off,
            on_loss: OnLoss::Fail,
            resume: None,
            seed,
        };
        let controller = Controller::with_parts(controller_config, parts);
        let controller = controller.map_err(|reason| JobError::Ended { at: Time::ZERO, reason })?;
        let mut ranks: Vec<SimRank> = world.members().map(|rank| SimRank::new(rank, cluster)).collect();
        ranks.iter_mut().for_each(|rank| rank.make_rails(cluster));
        let mut world = World {
            now: Time::ZERO,
            network,
            events: EventQueue::new(),
            flights: Flights::default(),
            controller: Some(controller),
            committed: 0,
            job_ended: None,
            control: protocol::Wires::new(ranks.len()),
            costs,
            tally: Tally::new(config),
            log: Log::new(extras.trace, extras.describes),
            bytes: extras.bytes,
            faults: extras.faults,
            sabotage: extras.sabotage,
            burst_bytes_max: if extras.is_fine {
                0
            } else {
                cluster.nic.bytes_per_second / BURSTS_PER_SECOND
            },
            random: Random::new(config.seed ^ 0x5eed),
            broken: None,
            ranks,
            config,
        };
        world.set_out()?;
        Ok(world)
    }

    /// Who is slow, who joins when, and what will go wrong.
    fn set_out(&mut self) -> Result<(), JobError> {
        for slow in &self.config.slow {
            let rank = &self.ranks[self.number(slow.rank) as usize];
            let of = |rate: u64| (rate as f64 * slow.factor) as u64;
            let (nic, gpu) = (&self.config.cluster.nic, &self.config.cluster.host.gpu);
            let nics = rank.nics.iter().enumerate();
            for (_, &id) in nics.filter(|(at, _)| slow.nic.is_none_or(|nic| nic as usize == *at)) {
                for link in [Link::NicOut(id), Link::NicIn(id)] {
                    self.network.set_rate(Time::ZERO, link, of(nic.bytes_per_second))?;
                }
            }
            if slow.nic.is_none() {
                let gpu_id = rank.gpu;
                for (link, rate) in [
                    (Link::Hbm(gpu_id), gpu.hbm_bytes_per_second),
                    (Link::NvlinkOut(gpu_id), gpu.nvlink_bytes_per_second),
                    (Link::NvlinkIn(gpu_id), gpu.nvlink_bytes_per_second),
                ] {
                    self.network.set_rate(Time::ZERO, link, of(rate))?;
                }
            }
        }
        let forgets = self.sabotage == Some(Sabotage::MissedRetry);
        for queue in self.ranks.iter().flat_map(|rank| &rank.rails) {
            queue.borrow_mut().forgets = forgets;
        }
        for rank in 0..self.ranks.len() as u32 {
            let at = self.faults.joins_at(rank);
            self.events.push(at, Event::Join(rank));
        }
        for (at, fault) in self.faults.timed() {
            self.events.push(at, Event::Fault(fault));
        }
        self.events.push(Time::ZERO, Event::ControllerTick);
        Ok(())
    }

    /// The number of a rank.
    pub(super) fn number(&self, rank: Rank) -> u32 {
        match rank {
            Rank::Trainer(rank) => rank.0,
            Rank::Receiver(rank) => self.config.manifest.trainers.len() as u32 + rank.0,
        }
    }

    /// Runs until the job is over.
    pub(super) fn run(&mut self, progress: &mut dyn FnMut(&Progress)) -> Result<(), JobError> {
        let (mut done, mut told) = (Vec::new(), 0);
        while !self.is_over() {
            let next = match (self.network.next_time(), self.events.next_time()) {
                (Some(a), Some(b)) => a.min(b),
                (Some(next), None) | (None, Some(next)) => next,
                (None, None) => return Err(JobError::Stuck { at: self.now, last: self.log.last() }),
            };
            while self.tally.look_due().is_some_and(|due| due <= next) {
                self.tally.look(&mut self.network, &self.config.cluster)?;
            }
            self.now = next;
            self.network.advance(next, &mut done);
            for over in done.drain(..) {
                self.count()?;
                self.network_done(over);
            }
            while self.events.next_time() == Some(next)
                && let Some((_, event)) = self.events.pop()
            {
                self.count()?;
                self.handle(event);
            }
            if let Some(what) = self.broken.take() {
                return Err(JobError::Invariant { at: self.now, what, last: self.log.last() });
            }
            if self.log.events / PROGRESS_EVENTS != told {
                told = self.log.events / PROGRESS_EVENTS;
                progress(&self.progress());
            }
        }
        Ok(())
    }

    fn count(&mut self) -> Result<(), JobError> {
        self.log.events += 1;
        let (events, events_max) = (self.log.events, self.config.events_max);
        if events + DESCRIBED >= events_max {
            self.log.on = true;
        }
        if events >= events_max {
            return Err(JobError::Budget { events: events_max, at: self.now, last: self.log.last() });
        }
        while let Some(fault) = self.faults.at_event(events) {
            self.fault(fault);
        }
        Ok(())
    }

    fn progress(&self) -> Progress {
        Progress {
            at: self.now,
            events: self.log.events,
            delivered_bytes: self.tally.delivered_bytes,
            total_bytes: self.tally.total_bytes,
        }
    }

    /// Whether nobody has anything left to do.
    pub(super) fn is_over(&self) -> bool {
        let controller_is = self.controller.as_ref().is_none_or(Controller::has_ended);
        controller_is && self.ranks.iter().all(|rank| !rank.is_in())
    }

    /// What came out.
    pub(super) fn report_job(&self) -> Result<JobReport, JobError> {
        if self.committed < self.config.versions.into() {
            let reason = match &self.job_ended {
                Some(Some(reason)) => reason.clone(),
                _ => format!("version {} was the last to be committed", self.committed),
            };
            return Err(JobError::Ended { at: self.now, reason });
        }
        let JobConfig { cluster, .. } = self.config;
        Ok(self.tally.report(cluster, &self.ranks, self.log.events))
    }

    /// An invariant does not hold. The first one counts.
    pub(super) fn breaks(&mut self, what: String) {
        self.broken.get_or_insert(what);
    }

    fn network_done(&mut self, done: network::Done) {
        match unpack(done.tag) {
            Tag::Flight(flight) => self.landed(flight, done.outcome),
            Tag::Stage(rank, slot) => self.staged(rank, slot),
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Step(rank) => {
                self.ranks[rank as usize].step = None;
                self.step(rank);
            }
            Event::Launch(rank) => self.launch_due(rank),
            Event::EngineTick(rank) => self.engine_tick(rank),
            Event::Complete(flight) => self.complete(flight),
            Event::RailClosed(closed) => self.rail_closed(*closed),
            Event::ToController(from, message) => {
                self.controller_receives(from, *message);
            }
            Event::ToMember(to, message) => self.member_receives(to, *message),
            Event::MemberGone(rank) => self.member_gone(rank),
            Event::Lands(flight) => self.landed(flight, Outcome::Delivered { completed: self.now }),
            Event::ControllerGone(rank) => self.end_rank(rank, "the controller has closed the connection"),
            Event::ControllerTick => self.controller_tick(),
            Event::Beat(rank) => self.beat(rank),
            Event::Join(rank) => self.join(rank),
            Event::Ready(rank) => self.ready(rank),
            Event::Begin(rank) => self.begin(rank),
            Event::Measured(rank, attempt) => self.measured(rank, attempt),
            Event::Fault(fault) => self.fault(fault),
        }
    }

    // --- a rank's thread -----------------------------------------------------------------------------------------

    /// A rank's thread takes a turn as soon as it can.
    pub(super) fn wake(&mut self, rank: u32) {
        let at = self.now.max(self.ranks[rank as usize].busy_until);
        self.wake_at(rank, at);
    }

    fn wake_at(&mut self, number: u32, at: Time) {
        let rank = &mut self.ranks[number as usize];
        if rank.step.is_some_and(|(time, _)| time <= at) {
            return;
        }
        if let Some((_, event)) = rank.step.take() {
            self.events.cancel(event);
        }
        rank.step = Some((at, self.events.push(at, Event::Step(number))));
    }

    /// Begins a push of a rank's runner.
    pub(super) fn start_push(&mut self, number: u32) {
        let now = self.now;
        let rank = &mut self.ranks[number as usize];
        let Some(runner) = &mut rank.runner else { return };
        rank.pushing = Some(now);
        rank.times.begin(now, matches!(rank.rank, Rank::Receiver(_)));
        runner.start(core::time::Duration::ZERO);
        self.events.push(now.plus(TICK), Event::EngineTick(number));
        self.wake(number);
    }

    fn engine_tick(&mut self, number: u32) {
        let now = self.now;
        let rank = &mut self.ranks[number as usize];
        let (true, Some(_)) = (rank.is_in(), rank.pushing) else { return };
        let at = rank.push_time(now);
        if let Some(runner) = &mut rank.runner {
            runner.tick(at);
        }
        self.events.push(now.plus(TICK), Event::EngineTick(number));
        self.wake(number);
    }

    fn step(&mut self, number: u32) {
        let now = self.now;
        let rank = &mut self.ranks[number as usize];
        let (true, Some(_)) = (rank.is_in(), rank.pushing) else { return };
        let at = rank.push_time(now);
        let Some(runner) = &mut rank.runner else { return };
        let mut turn = runner.step(&mut rank.memory, at);
        if let Turn::Moved = turn {
            // What follows from completions is posted in the same moment.
            turn = runner.step(&mut rank.memory, at);
        }
        rank.busy_until = rank.busy_until.max(now).plus_nanos(TURN_NANOSECONDS);
        self.take_posted(number);
        self.take_stages(number);
        self.take_closes(number);
        match turn {
            Turn::Over(result) => {
                let result = result.map(|Delivered { bytes, writes, .. }| (bytes, writes));
                self.push_over(number, result);
            }
            Turn::Moved => self.wake(number),
            Turn::Still => {}
        }
    }

    /// Kernels and copies that fill slots.
    fn take_stages(&mut self, number: u32) {
        let rank = &mut self.ranks[number as usize];
        let stages = std::mem::take(&mut rank.memory.to_stage);
        let Some(runner) = &rank.runner else { return };
        for &(slot, index) in &stages {
            let Some(op) = runner.engine().program().ops().get(index as usize) else { continue };
            let bytes = rank.cost(index).map_or_else(|| super::kernel_bytes(op), |cost| cost.kernel_bytes);
            let way = network::Way::Kernel(rank.gpu);
            if self.network.start(self.now, way, bytes, Tag::Stage(number, slot).pack()).is_err() {
                self.broken.get_or_insert_with(|| format!("{} has no GPU", rank.rank));
            }
            if let Some(bytes) = &mut self.bytes
                && let Err(what) = bytes.staging(number, slot, index, op)
            {
                self.broken.get_or_insert(what);
            }
        }
        self.tally.seen.stages += stages.len() as u64;
        rank.times.change(self.now, |under_way| under_way.stages += stages.len() as u32);
        // Its room is kept.
        let room = &mut self.ranks[number as usize].memory.to_stage;
        *room = stages;
        room.clear();
    }

    fn staged(&mut self, number: u32, slot: Slot) {
        let now = self.now;
        let rank = &mut self.ranks[number as usize];
        rank.times.change(now, |under_way| under_way.stages = under_way.stages.saturating_sub(1));
        if !rank.is_in() {
            return;
        }
        let at = rank.push_time(now);
        let Some(runner) = &mut rank.runner else { return };
        if let Some(bytes) = &mut self.bytes {
            bytes.staged(number, slot, runner.engine().program().ops());
        }
        runner.staged(slot, Ok(()), at);
        if rank.pushing.is_some() {
            self.wake(number);
        }
    }

    /// A runner's push is over.
    fn push_over(&mut self, number: u32, result: Result<(u64, u64), Failure>) {
        let now = self.now;
        let in_use = self.ranks[number as usize].memory.in_use();
        let rank = &mut self.ranks[number as usize];
        rank.pushing = None;
        self.tally.seen.refusals +=
            rank.runner.as_ref().map_or(0, |runner| runner.engine().delivered().refusals);
        if result.is_ok() {
            rank.times.end(now);
        }
        let who = rank.rank;
        self.log.say(now, || match &result {
            Ok((bytes, writes)) => format!("{who} has written {bytes} bytes in {writes} writes"),
            Err(failure) => format!("{who} failed: {failure}"),
        });
        let leaked = self.faults.leaked(number);
        if in_use > leaked {
            self.breaks(format!("{who} ended its push while {} buffers are in use", in_use - leaked));
        }
        if leaked > 0 && result.is_ok() {
            self.breaks(format!(
                "{who} has written everything, and a rail that did not close has {leaked} buffers"
            ));
        }
        self.said_written(number, result.map_err(|failure| failure.to_string()));
        if leaked > 0 {
            // As a session whose weights do not come back.
            let reason = "its weights are lost to a rail that did not close".to_owned();
            self.tell_controller(number, ToController::Leave { reason: Some(reason.clone()) });
            self.end_rank(number, &reason);
        }
    }

    /// Something that a watcher of the controller sees.
    pub(super) fn report(&mut self, report: Report) {
        let now = self.now;
        self.log.say(now, || format!("controller: {report:?}"));
        match report {
            Report::Planned { bytes, writes, bound_seconds, limited_by, .. } => {
                self.tally.planned(bytes, writes, bound_seconds, limited_by);
            }
            Report::Committed { version, .. } => {
                self.committed = version;
                if let Some(bytes) = &mut self.bytes
                    && let Err(what) = bytes.check_all(version)
                {
                    self.broken.get_or_insert(what);
                }
            }
            Report::Ended { reason } => self.job_ended = Some(reason),
            Report::Aborted { .. } => self.tally.seen.aborts += 1,
            // A simulated job has one.
            Report::StandingBy { .. }
            | Report::InCharge { .. }
            | Report::Joined(_)
            | Report::Left(_)
            | Report::Lost { .. }
            | Report::Regrouping { .. }
            | Report::Refused { .. }
            | Report::Started
            | Report::Pushing { .. } => {}
        }
    }
}

/// What a transfer of the network is.
pub(super) enum Tag {
    Flight(u32),
    Stage(u32, Slot),
}

/// Marks a [`Tag::Stage`].
const STAGE: u64 = 1 << 63;

impl Tag {
    pub(super) fn pack(&self) -> u64 {
        match self {
            Tag::Flight(flight) => u64::from(*flight),
            Tag::Stage(rank, slot) => STAGE | u64::from(*rank) << 32 | u64::from(slot.0),
        }
    }
}

fn unpack(tag: u64) -> Tag {
    match tag & STAGE {
        0 => Tag::Flight(tag as u32),
        _ => Tag::Stage(((tag & !STAGE) >> 32) as u32, Slot(tag as u32)),
    }
}

/// A push id, short.
pub(super) fn short(push: PushId) -> String {
    push.to_string().chars().take(8).collect()
}
