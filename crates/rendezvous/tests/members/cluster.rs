//! The controller and all members of a job, joined by queues, and a network that holds every write until it is let land.
//!
//! Nothing happens by itself: a test picks one of [`Cluster::possible`] after the other. Memory is modelled by operation:
//! which attempt's bytes are where that operation writes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rendezvous::controller::{Action, ConnectionId, Controller, ControllerConfig, Event, Report};
use rendezvous::member::{InferenceStep, Served, TrainerStep};
use rendezvous::{Fence, OnLoss, Planned, PlannedPart, PushId, ToController, ToMember, Verify, World};
use xfer_plan::{Inbound, NO_TAG, PlanOptions, Rank, RankPlan, Relay, RelayPlan, TrainerRank};

use crate::member::{Member, Protocol, Writing};

pub(crate) const WORLD: World = World { trainers: 2, inference: 4 };
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// Something that can happen next.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Next {
    /// The controller reads what this member said.
    Hear(Rank),
    /// This member reads what the controller said.
    Tell(Rank),
    /// This write lands.
    Land(usize),
    /// This trainer begins the next version.
    Begin(Rank),
    /// This rank says how its writes ended.
    Report(Rank),
    /// Time passes.
    Tick,
    /// This write lands, which its sender has given up on.
    LandLate(usize),
    /// This rank takes another rail for what has not landed yet.
    ChangeRail(Rank),
    /// This rank's writes fail.
    Fail(Rank),
    /// The next rails that this rank has to close do not close.
    Stick(Rank),
    /// A byte of this rank's memory becomes another.
    Flip(Rank),
    /// This member's connection drops.
    Drop(Rank),
    /// This member is stopped.
    Silence(Rank),
}

impl Next {
    pub(crate) fn is_fault(self) -> bool {
        !matches!(
            self,
            Self::Hear(_) | Self::Tell(_) | Self::Land(_) | Self::Begin(_) | Self::Report(_) | Self::Tick
        )
    }

    pub(crate) fn is_loss(self) -> bool {
        matches!(self, Self::Drop(_) | Self::Silence(_))
    }
}

/// A write on its way.
struct Flight {
    from: Rank,
    op: usize,
    to: Rank,
    tag: u32,
    rail: u16,
    /// Whose bytes it carries.
    push: PushId,
    /// The sender has given up on it.
    given_up: bool,
}

pub(crate) struct Cluster {
    pub(crate) controller: Controller,
    pub(crate) ended: Option<Option<String>>,
    pub(crate) aborts: Vec<String>,
    pub(crate) lost: Vec<Rank>,
    members: BTreeMap<Rank, Member>,
    network: Vec<Flight>,
    rails_used: u16,
    now: Duration,
}

impl Cluster {
    pub(crate) fn new(relay: Relay, relays: bool, verify: Verify) -> Self {
        let config = ControllerConfig {
            job: "job".into(),
            world: WORLD,
            deadline: DEADLINE,
            options: PlanOptions { relay, ..PlanOptions::default() },
            relays,
            verify,
            on_loss: OnLoss::Fail,
            resume: None,
            seed: [7; 32],
        };
        let members = WORLD.members().map(|rank| (rank, Member::join(rank))).collect();
        Self {
            controller: Controller::new(config).unwrap(),
            ended: None,
            aborts: Vec::new(),
            lost: Vec::new(),
            members,
            network: Vec::new(),
            rails_used: 0,
            now: Duration::ZERO,
        }
    }

    /// What can happen next, in a fixed order. Versions are begun up to `target`.
    pub(crate) fn possible(&self, target: u64) -> Vec<Next> {
        let land = |(place, flight): (usize, &Flight)| match flight.given_up {
            true => Next::LandLate(place),
            false => Next::Land(place),
        };
        let mut next: Vec<Next> = self.network.iter().enumerate().map(land).collect();
        for (&rank, member) in self.members.iter().filter(|(_, member)| !member.gone) {
            let trainer = matches!(rank, Rank::Trainer(_));
            let writing = member.writing.as_ref();
            let outstanding = |writing: &Writing| writing.landed.len() < member.writes.plan.ops.len();
            let unfinished = writing.is_some_and(|writing| !writing.failed && outstanding(writing));
            // A relay counts what arrives: it must not arrive twice.
            let counted = member.writes.plan.tags.iter().any(|tag| *tag != NO_TAG);
            let awake = !member.silent;
            let all = [
                (member.open && !member.said.is_empty(), Next::Hear(rank)),
                (awake && !member.told.is_empty(), Next::Tell(rank)),
                (awake && trainer && member.idle && member.committed < target, Next::Begin(rank)),
                (awake && writing.is_some() && !unfinished, Next::Report(rank)),
                (awake && unfinished && !counted, Next::ChangeRail(rank)),
                (awake && unfinished, Next::Fail(rank)),
                (awake && !trainer && !member.sticks, Next::Stick(rank)),
                (awake && member.flip_would_be_found(), Next::Flip(rank)),
                (true, Next::Drop(rank)),
                (awake, Next::Silence(rank)),
            ];
            next.extend(all.into_iter().filter(|(possible, _)| *possible).map(|(_, next)| next));
        }
        next.push(Next::Tick);
        next
    }

    pub(crate) fn step(&mut self, next: Next) {
        match next {
            Next::Hear(rank) => {
                let message = self.member(rank).said.pop_front().unwrap();
                self.member(rank).joined = true;
                self.control(Event::Received(connection(rank), message));
            }
            Next::Tell(rank) => {
                let message = self.member(rank).told.pop_front().unwrap();
                self.tell(rank, message);
            }
            Next::Land(flight) | Next::LandLate(flight) => self.land(flight),
            Next::Begin(rank) => {
                let member = self.member(rank);
                member.idle = false;
                let version = member.committed + 1;
                member.say(|protocol| protocol.trainer().begin(version));
            }
            Next::Report(rank) => self.report(rank),
            Next::ChangeRail(rank) => {
                let flights = self.give_up(rank);
                self.member(rank).rail = self.fresh_rail();
                let (rail, again) = (self.member(rank).rail, flights.into_iter());
                self.network.extend(again.map(|flight| Flight { rail, ..flight }));
            }
            Next::Fail(rank) => self.member(rank).fail(),
            Next::Stick(rank) => self.member(rank).sticks = true,
            Next::Flip(rank) => self.member(rank).flip(),
            Next::Silence(rank) => {
                self.member(rank).silent = true;
                self.lost.push(rank);
            }
            Next::Drop(rank) => {
                self.member(rank).gone = true;
                self.lost.push(rank);
                self.control(Event::Disconnected(connection(rank), "dropped".into()));
            }
            Next::Tick => {
                self.now += Duration::from_secs(1);
                let progress = self.now.as_secs();
                for rank in WORLD.members() {
                    let member = self.member(rank);
                    if member.joined && member.open && !member.silent && !member.gone {
                        let message = ToController::Heartbeat { progress };
                        self.control(Event::Received(connection(rank), message));
                    }
                }
                self.control(Event::Tick);
            }
        }
        for member in self.members.values().filter(|member| !member.gone) {
            if let Protocol::Inference(protocol) = &member.protocol {
                assert!(protocol.committed_version() <= self.controller.committed());
                if let Served::Version(version) = protocol.served() {
                    assert_eq!(version, protocol.committed_version());
                }
            }
        }
    }

    /// All trainers say goodbye.
    pub(crate) fn leave(&mut self) {
        for rank in (0..WORLD.trainers).map(|rank| Rank::Trainer(TrainerRank(rank))) {
            self.control(Event::Received(connection(rank), ToController::Leave { reason: None }));
        }
    }

    /// Which version each inference rank serves that is still there.
    pub(crate) fn served(&self) -> Vec<Served> {
        let here = self.members.values().filter(|member| !member.gone && !member.silent);
        let served = here.filter_map(|member| match &member.protocol {
            Protocol::Trainer(_) => None,
            Protocol::Inference(protocol) => Some((protocol.served(), protocol.committed_version())),
        });
        served.map(|(served, committed)| self.check_committed(served, committed)).collect()
    }

    /// The version that every trainer which is still there knows to be committed.
    pub(crate) fn known_to_trainers(&self) -> u64 {
        let trainers = self.members.iter().filter(|(rank, _)| matches!(rank, Rank::Trainer(_)));
        trainers.map(|(_, member)| member.committed).min().unwrap()
    }

    pub(crate) fn is_writing(&self, rank: Rank) -> bool {
        self.members[&rank].writing.is_some()
    }

    /// How many ranks write: trainers, and inference ranks that pass bytes on.
    pub(crate) fn writers(&self) -> usize {
        self.members.values().filter(|member| !member.writes.plan.ops.is_empty()).count()
    }

    fn check_committed(&self, served: Served, committed: u64) -> Served {
        assert_eq!(committed, self.controller.committed(), "{served}");
        served
    }

    fn member(&mut self, rank: Rank) -> &mut Member {
        self.members.get_mut(&rank).unwrap()
    }

    fn fresh_rail(&mut self) -> u16 {
        self.rails_used += 1;
        self.rails_used
    }

    fn control(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.controller.handle(event, self.now, &mut actions);
        for action in actions {
            match action {
                Action::Send(to, message) => self.member(rank(to)).told.push_back(message),
                Action::Record(_) => self.control(Event::Recorded(Ok(()))),
                Action::Close(to) => self.member(rank(to)).open = false,
                Action::Report(Report::Committed { .. }) => self.check_memory(),
                Action::Report(Report::Aborted { reason, .. }) => self.aborts.push(reason),
                Action::Report(Report::Ended { reason }) => {
                    assert_eq!(self.ended, None);
                    self.ended = Some(reason);
                }
                Action::Report(_) => {}
            }
        }
    }

    /// When a version is committed its bytes are everywhere, and none of them can change any more.
    fn check_memory(&self) {
        for (rank, member) in self.members.iter().filter(|(_, member)| !member.expected.is_empty()) {
            let pushes: BTreeSet<_> = member.expected.keys().map(|cell| member.memory.get(cell)).collect();
            assert!(pushes.len() == 1 && !pushes.contains(&None), "torn at {rank}");
        }
        assert!(self.network.is_empty(), "committed with writes on their way");
    }

    fn tell(&mut self, rank: Rank, message: ToMember) {
        let rail = self.fresh_rail();
        match &mut self.member(rank).protocol {
            Protocol::Trainer(protocol) => match protocol.handle(message).unwrap() {
                Some(TrainerStep::Connect(planned)) => self.planned(rank, *planned),
                Some(TrainerStep::Started) => self.member(rank).idle = true,
                Some(TrainerStep::Write { push, .. }) => {
                    self.member(rank).start(push, rail);
                    self.post(rank, usize::MAX);
                }
                Some(TrainerStep::Stop { .. }) => {
                    self.member(rank).fail();
                    self.member(rank).stopped = true;
                }
                Some(TrainerStep::Committed { version, .. }) => {
                    (self.member(rank).idle, self.member(rank).committed) = (true, version);
                }
                Some(TrainerStep::Aborted { .. }) => self.member(rank).idle = true,
                Some(TrainerStep::Regroup { reason }) => panic!("{rank} is to join again: {reason}"),
                Some(TrainerStep::Refused { .. }) | None => {}
            },
            Protocol::Inference(protocol) => match protocol.handle(message).unwrap() {
                Some(InferenceStep::Planned(planned)) => self.planned(rank, *planned),
                Some(InferenceStep::Prepare { push, close, .. }) => {
                    let closed = self.close(rank, &close);
                    let member = self.member(rank);
                    (member.compared, member.flipped) = (false, false);
                    if closed.is_ok() && !member.writes.plan.ops.is_empty() {
                        member.start(push, rail);
                    }
                    member.say(|protocol| protocol.inference().prepared(closed));
                }
                Some(InferenceStep::Fence { close, .. }) => {
                    let closed = self.close(rank, &close);
                    self.member(rank).say(|protocol| protocol.inference().fenced(closed));
                }
                Some(InferenceStep::Verify { push, sums, .. }) => {
                    let member = self.member(rank);
                    let compared = member.compare(push, sums);
                    member.say(|protocol| protocol.inference().verified(compared));
                }
                Some(InferenceStep::Commit { .. }) => {
                    self.member(rank).say(|protocol| protocol.inference().committed());
                }
                Some(InferenceStep::Aborted { .. }) => self.member(rank).fail(),
                Some(_) | None => {}
            },
        }
    }

    fn planned(&mut self, rank: Rank, planned: Planned) {
        let (writes, names) = match planned.part {
            PlannedPart::Trainer { plan, names } => (RelayPlan { plan, ..RelayPlan::default() }, names),
            PlannedPart::Inference { part, relay, names, inbound } => {
                let listed: u64 = inbound.iter().map(Inbound::bytes).sum();
                assert_eq!(listed, if planned.verify.is_on() { part.bytes } else { 0 });
                (relay, names)
            }
        };
        let peers: BTreeSet<Rank> = planned.peers.iter().map(|peer| peer.member).collect();
        for (number, op) in writes.plan.ops.iter().enumerate() {
            assert_eq!(op.writes(), 1);
            assert!(peers.contains(&Rank::Receiver(op.to)), "{rank} is not told how to reach {}", op.to);
            self.member(Rank::Receiver(op.to)).expected.insert((rank, number), op.param);
        }
        let member = self.member(rank);
        (member.writes, member.names, member.verify) = (writes, names, planned.verify);
        member.say(|protocol| match protocol {
            Protocol::Trainer(protocol) => protocol.ready(),
            Protocol::Inference(protocol) => protocol.ready(),
        });
    }

    /// Puts operations on the network up to `end`, from the first that is not.
    fn post(&mut self, rank: Rank, end: usize) {
        let member = self.members.get_mut(&rank).unwrap();
        let (plan, writing) = (&member.writes.plan, member.writing.as_mut().unwrap());
        let end = end.min(plan.ops.len());
        for op in writing.posted..end {
            let tag = plan.tags.get(op).copied().unwrap_or(NO_TAG);
            let (to, push) = (Rank::Receiver(plan.ops[op].to), writing.push);
            self.network.push(Flight { from: rank, op, to, tag, rail: member.rail, push, given_up: false });
        }
    }

    fn land(&mut self, flight: usize) {
        let Flight { from, op, to, tag, push, given_up, .. } = self.network.swap_remove(flight);
        if !given_up && let Some(writing) = &mut self.member(from).writing {
            writing.landed.insert(op);
        }
        let member = self.member(to);
        if let Protocol::Inference(protocol) = &member.protocol {
            assert!(matches!(protocol.served(), Served::Torn(_)), "{to} serves what {from} still writes");
        }
        member.memory.insert((from, op), push);
        let Some(writing) = member.writing.as_mut().filter(|_| tag != NO_TAG) else { return };
        assert_eq!(writing.push, push, "{to} counts what {from} wrote in another attempt");
        assert!(writing.arrived.insert(tag), "{to} counts twice what {from} wrote");
        if !writing.failed {
            let first = member.writes.first[tag as usize] as usize;
            let next = member.writes.first.get(tag as usize + 1).map_or(usize::MAX, |next| *next as usize);
            writing.posted = first;
            self.post(to, next);
        }
    }

    /// What has not landed of what this rank wrote, and is not given up yet. It is now, and fences are owed.
    fn give_up(&mut self, rank: Rank) -> Vec<Flight> {
        let mut given_up = Vec::new();
        let mut fences = Vec::new();
        for flight in self.network.iter_mut().filter(|flight| flight.from == rank && !flight.given_up) {
            flight.given_up = true;
            let (Rank::Receiver(at), rail) = (flight.to, flight.rail) else { continue };
            fences.push(Fence { at, rail });
            given_up.push(Flight { given_up: false, ..*flight });
        }
        self.member(rank).writing.as_mut().unwrap().fences.extend(fences);
        given_up
    }

    fn report(&mut self, rank: Rank) {
        self.give_up(rank);
        let member = self.member(rank);
        let writing = member.writing.take().unwrap();
        member.idle |= std::mem::take(&mut member.stopped);
        let RankPlan { bytes, writes, .. } = member.writes.plan;
        let sums = member.sums(rank, writing.push);
        let result = if writing.failed { Err("it failed".to_owned()) } else { Ok((bytes, writes)) };
        member.say(|protocol| match protocol {
            Protocol::Trainer(protocol) => protocol.written(result, writing.fences, sums),
            Protocol::Inference(protocol) => protocol.relayed(result, writing.fences, sums),
        });
    }

    fn close(&mut self, rank: Rank, rails: &[u16]) -> Result<(), String> {
        if !rails.is_empty() && std::mem::take(&mut self.member(rank).sticks) {
            return Err("it does not close".into());
        }
        self.network.retain(|flight| flight.to != rank || !rails.contains(&flight.rail));
        Ok(())
    }
}

fn connection(rank: Rank) -> ConnectionId {
    let place = WORLD.members().position(|member| member == rank).unwrap();
    ConnectionId(place as u64)
}

fn rank(connection: ConnectionId) -> Rank {
    WORLD.members().nth(connection.0 as usize).unwrap()
}
