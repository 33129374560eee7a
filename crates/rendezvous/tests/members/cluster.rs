//! The controller and all members of a job, joined by queues, and a network that holds every write until it is let land.
//!
//! Nothing happens by itself: a test picks one of [`Cluster::possible`] after the other. What holds at every step is asserted
//! here.

use std::collections::BTreeMap;
use std::time::Duration;

use rendezvous::controller::{Action, ConnectionId, Controller, ControllerConfig, Event, Report};
use rendezvous::member::Served;
use rendezvous::{Commit, OnLoss, ToController, ToMember};
use xfer_plan::{Manifest, Parts, Plan, PlanError, PlanOptions, Rank, TrainerRank};

use crate::job::{DEADLINE, Setup, TARGET, WORLD};
use crate::ledger::Ledger;
use crate::link::Link;
use crate::memory::is_whole;
use crate::network::{Flight, Network};
use crate::next::Next;
use crate::process::{Process, Protocol};

/// A rank, whether there is a process of it or not.
#[derive(Default)]
pub(crate) struct Member {
    pub(crate) process: Option<Process>,
    /// It is stopped.
    pub(crate) silent: bool,
    /// It does nothing, but for its signs of life.
    pub(crate) busy: bool,
}

pub(crate) struct Cluster {
    pub(crate) setup: Setup,
    pub(crate) controller: Option<Controller>,
    pub(crate) ended: Option<Option<String>>,
    pub(crate) aborts: Vec<String>,
    pub(crate) lost: Vec<Rank>,
    /// How many ranks and controllers were lost.
    pub(crate) losses: usize,
    pub(crate) members: BTreeMap<Rank, Member>,
    pub(crate) links: BTreeMap<u64, Link>,
    pub(crate) network: Network,
    pub(crate) ledger: Ledger,
    /// What the controller has asked to be recorded, and whether that is on disk.
    pub(crate) recording: Option<(Commit, bool)>,
    /// What is on disk.
    record: Option<Commit>,
    /// The newest version that a controller with a record has said to be committed.
    floor: u64,
    controllers: u8,
    /// How many connections and rails there have been.
    pub(crate) opened: u64,
    now: Duration,
}

impl Cluster {
    pub(crate) fn new(setup: Setup) -> Self {
        let start = |rank| {
            (rank, Member { process: Some(Process::new(rank, setup.stages(rank))), ..Member::default() })
        };
        let mut cluster = Self {
            members: WORLD.members().map(start).collect(),
            setup,
            controller: None,
            ended: None,
            aborts: Vec::new(),
            lost: Vec::new(),
            losses: 0,
            links: BTreeMap::new(),
            network: Network::default(),
            ledger: Ledger::default(),
            recording: None,
            record: None,
            floor: 0,
            controllers: 0,
            opened: 0,
            now: Duration::ZERO,
        };
        cluster.start();
        cluster
    }

    fn start(&mut self) {
        self.controllers += 1;
        let config = ControllerConfig {
            job: "job".into(),
            world: WORLD,
            deadline: DEADLINE,
            options: PlanOptions { relay: self.setup.relay, ..PlanOptions::default() },
            verify: self.setup.verify,
            on_loss: self.setup.on_loss,
            resume: self.record,
            seed: [self.controllers; 32],
        };
        self.controller = Some(Controller::with_parts(config, Box::new(as_from_scratch)).unwrap());
    }

    pub(crate) fn regroups(&self) -> bool {
        self.setup.on_loss != OnLoss::Fail
    }

    /// Whether this rank comes back once it is lost. Nobody starts a job without one of its ranks.
    pub(crate) fn returns(&self, rank: Rank) -> bool {
        self.regroups() && (self.setup.forever != Some(rank) || self.record.is_none())
    }

    pub(crate) fn step(&mut self, next: Next) {
        self.losses += usize::from(next.is_loss());
        match next {
            Next::Hear(id) => self.hear(id),
            Next::Tell(rank) => self.tell(rank),
            Next::Join(rank) => self.join(rank),
            Next::Land(flight) | Next::LandLate(flight) => self.land(flight),
            Next::Begin(rank) => {
                let repeats = self.setup.repeats;
                let process = self.process(rank);
                let again = process.behind && (repeats || process.known >= TARGET);
                process.begun = if again { process.known } else { process.known + 1 };
                let version = process.begun;
                self.say(rank, |protocol| protocol.trainer().begin(version));
            }
            Next::Report(rank) => self.report(rank),
            Next::Measured(rank) => self.measured(rank, true),
            Next::NotMeasured(rank) => self.measured(rank, false),
            Next::Store => self.store(),
            Next::Recorded => {
                let (commit, _) = self.recording.take().unwrap();
                if !self.setup.records {
                    self.ledger.commit(commit);
                }
                self.control(Event::Recorded(Ok(())));
            }
            Next::Tick => self.tick(),
            Next::Pass => (0..=DEADLINE.as_secs()).for_each(|_| self.tick()),
            Next::Return(rank) => {
                let process = Process::new(rank, self.setup.stages(rank));
                self.members.insert(rank, Member { process: Some(process), ..Member::default() });
            }
            Next::Wake(rank) => {
                let member = self.members.get_mut(&rank).unwrap();
                (member.silent, member.busy) = (false, false);
                self.post(rank);
            }
            Next::Start => self.start(),
            Next::ChangeRail(rank) => {
                let flights = self.give_up(rank);
                let rail = self.network.fresh_rail();
                self.process(rank).rail = rail;
                let again = flights.into_iter().map(|flight| Flight { rail, ..flight });
                self.network.flights.extend(again);
            }
            Next::Fail(rank) => self.process(rank).fail(),
            Next::Stick(rank) => self.process(rank).sticks = true,
            Next::Flip(rank) => {
                let process = self.process(rank);
                process.flipped = true;
                process.memory.flip();
            }
            Next::Busy(rank) => self.members.get_mut(&rank).unwrap().busy = true,
            Next::Silence(rank) => {
                self.members.get_mut(&rank).unwrap().silent = true;
                self.lost.push(rank);
            }
            Next::Cut(rank, delivered) => {
                let id = self.process(rank).link.unwrap();
                self.links.get_mut(&id).unwrap().cut(delivered);
            }
            Next::GiveUp(rank) => {
                self.say(rank, |_| {
                    Some(ToController::Leave { reason: Some("its rails do not open".into()) })
                });
                self.lost.push(rank);
                self.die(rank, true);
            }
            Next::Die(rank, delivered) => {
                self.lost.push(rank);
                self.die(rank, delivered);
            }
            Next::Crash(delivered) => {
                for link in self.links.values_mut().filter(|link| link.heard) {
                    link.close();
                    if !delivered {
                        link.told.clear();
                    }
                }
                (self.controller, self.recording) = (None, None);
                self.ledger.forgets |= !self.setup.records;
            }
            Next::RecordFails(stored) => {
                if stored {
                    self.store();
                }
                self.recording = None;
                self.control(Event::Recorded(Err("no space".into())));
            }
        }
        self.links.retain(|_, link| link.heard || link.read);
        self.check();
    }

    /// What holds at every moment.
    fn check(&mut self) {
        if let Some(controller) = self.controller.as_ref().filter(|_| self.setup.records) {
            assert!(controller.committed() >= self.floor, "what was committed is not any more");
            self.floor = controller.committed();
        }
        for (rank, member) in &self.members {
            let Some(process) = &member.process else { continue };
            let Protocol::Inference(protocol) = &process.protocol else { continue };
            let (served, bytes) = (protocol.served(), process.memory.served());
            match served {
                Served::Version(0) => assert!(bytes.iter().all(Option::is_none), "{rank}"),
                Served::Version(version) => {
                    let push = bytes[0].unwrap().0;
                    assert!(
                        is_whole(bytes, push),
                        "{rank} serves other bytes than those of version {version}"
                    );
                    assert!(
                        self.ledger.is_committed(version, push),
                        "{rank} serves {version}: not committed"
                    );
                    assert!(version <= protocol.committed_version());
                }
                Served::Torn(_) => assert!(!process.memory.stages, "{rank} stages, and is torn"),
                Served::Behind(version) => self.ledger.told_committed(version),
            }
        }
    }

    /// All trainers say goodbye.
    pub(crate) fn leave(&mut self) {
        for rank in (0..WORLD.trainers).map(|rank| Rank::Trainer(TrainerRank(rank))) {
            let link = self.members[&rank].process.as_ref().and_then(|process| process.link);
            if let Some(id) = link {
                self.control(Event::Received(ConnectionId(id), ToController::Leave { reason: None }));
            }
        }
    }

    /// Which version each inference rank serves that is still there, and has heard what there is to hear.
    pub(crate) fn served(&self) -> Vec<Served> {
        let here = self.members.values().filter(|member| !member.silent);
        let processes = here.filter_map(|member| member.process.as_ref());
        let served = processes.filter_map(|process| match &process.protocol {
            Protocol::Trainer(_) => None,
            Protocol::Inference(protocol) => Some(protocol.served()),
        });
        served.collect()
    }

    /// Whether everybody who comes back is there, agrees that the last version is committed, and has it.
    pub(crate) fn is_at_the_target(&self) -> bool {
        let here = |(rank, member): (&Rank, &Member)| match &member.process {
            Some(process) if !member.silent && !process.refused => match &process.protocol {
                Protocol::Trainer(trainer) => trainer.is_idle() && process.known == TARGET && !process.behind,
                Protocol::Inference(protocol) => protocol.served() == Served::Version(TARGET),
            },
            _ => !self.returns(*rank) && self.regroups(),
        };
        self.recording.is_none() && self.members.iter().all(here)
    }

    pub(crate) fn is_writing(&self, rank: Rank) -> bool {
        self.members[&rank].process.as_ref().is_some_and(|process| process.writing.is_some())
    }

    /// How many ranks write: trainers, and inference ranks that pass bytes on.
    pub(crate) fn writers(&self) -> usize {
        let writes = |process: &Process| !process.part.writes.plan.ops.is_empty();
        self.members.values().filter(|member| member.process.as_ref().is_some_and(writes)).count()
    }

    pub(crate) fn process(&mut self, rank: Rank) -> &mut Process {
        self.members.get_mut(&rank).unwrap().process.as_mut().unwrap()
    }

    // --- the controller ------------------------------------------------------------------------------------------

    fn hear(&mut self, id: u64) {
        let link = self.links.get_mut(&id).unwrap();
        let event = match link.said.pop_front() {
            Some(message) => {
                link.joined |= matches!(message, ToController::Join(_));
                if let ToController::Committed { push } = message {
                    self.ledger.confirm(link.rank, push);
                }
                Event::Received(ConnectionId(id), message)
            }
            None => {
                link.heard = false;
                Event::Disconnected(ConnectionId(id), "dropped".into())
            }
        };
        self.control(event);
    }

    fn tick(&mut self) {
        self.now += Duration::from_secs(1);
        if self.controller.is_none() {
            return;
        }
        let progress = self.now.as_secs();
        let beats = |id: &u64| {
            let link = &self.links[id];
            link.heard && link.joined && link.from_member && !self.members[&link.rank].silent
        };
        let alive: Vec<u64> = self.links.keys().copied().filter(beats).collect();
        for id in alive {
            self.control(Event::Received(ConnectionId(id), ToController::Heartbeat { progress }));
        }
        self.control(Event::Tick);
    }

    /// What is to be recorded is on disk, where there is one.
    fn store(&mut self) {
        let (commit, stored) = self.recording.as_mut().unwrap();
        *stored = true;
        if self.setup.records {
            self.record = Some(*commit);
            self.ledger.commit(*commit);
        }
    }

    fn control(&mut self, event: Event) {
        let Some(controller) = &mut self.controller else { return };
        let mut actions = Vec::new();
        controller.handle(event, self.now, &mut actions);
        let mut over = false;
        for action in actions {
            match action {
                Action::Send(to, message) => self.send(to.0, message),
                Action::Record(commit) => {
                    assert_eq!(self.recording, None);
                    self.check_written(commit);
                    self.recording = Some((commit, false));
                }
                Action::Close(to) => self.links.get_mut(&to.0).unwrap().close(),
                Action::Report(Report::Committed { version, push, .. }) => {
                    assert!(self.ledger.is_committed(version, push));
                }
                Action::Report(Report::Aborted { version, push, reason, .. }) => {
                    self.ledger.told_aborted(version, push);
                    self.aborts.push(reason);
                }
                Action::Report(Report::Ended { reason }) => {
                    over = true;
                    self.end(reason);
                }
                Action::Report(Report::Regrouping { .. }) => assert!(self.regroups()),
                Action::Report(_) => {}
            }
        }
        if over {
            self.links.values_mut().filter(|link| link.heard).for_each(Link::close);
            self.controller = None;
        }
    }

    fn end(&mut self, reason: Option<String>) {
        assert_eq!(self.ended, None);
        match &reason {
            Some(reason) if self.regroups() => {
                let by_name = ["could not be recorded", "to join"];
                assert!(by_name.iter().any(|name| reason.contains(name)), "{reason}");
                // A commit that is told to nobody because it was not recorded may be on disk.
                self.ledger.forgets |= !self.setup.records;
            }
            _ => self.ended = Some(reason),
        }
    }

    fn send(&mut self, to: u64, message: ToMember) {
        let link = self.links.get_mut(&to).unwrap();
        match &message {
            ToMember::Prepare { push, .. } => self.ledger.ask(link.rank, *push),
            ToMember::Done { push, version, unconfirmed } => {
                self.ledger.told_done(*version, *push, unconfirmed);
            }
            // Members do nothing on it.
            ToMember::Heartbeat => return,
            _ => {}
        }
        link.tell(message);
    }

    /// When a version is decided upon its bytes are everywhere, and none of them can change any more.
    fn check_written(&self, Commit { push, .. }: Commit) {
        for rank in self.ledger.asked(push) {
            // Whoever was started again meanwhile has nothing.
            if let Some(process) =
                self.members[&rank].process.as_ref().filter(|process| process.is_undecided())
            {
                assert!(is_whole(process.memory.written(), push), "torn at {rank}");
                let late = self.network.flights.iter().any(|flight| flight.to == rank);
                assert!(!late, "committed with writes on their way to {rank}");
            }
        }
    }
}

/// Whatever the controller knew before, its plan is the one that is made from the manifest alone.
fn as_from_scratch(plan: &Plan, manifest: &Manifest) -> Result<Parts, PlanError> {
    assert_eq!(Ok(plan), xfer_plan::plan(manifest).as_ref());
    plan.parts(manifest)
}
