//! The sender's engine: given a [`Program`], what to stage, post, retry and give up, and when a push is over.
//!
//! It is a state machine. [`Engine::handle`] takes an event and the time and appends actions; it does nothing else, so
//! it runs alike on real rails and in a simulator. Time is a [`Duration`] since the push began.
//!
//! A receiver is reached over one rail or several. Each pair is a *path* with a credit that follows the rate it delivers
//! at; the operations that wait are kept per receiver. A rail takes turns among the receivers whose paths have credit, so
//! neither a slow rail nor a slow receiver stalls the others.
//!
//! What is gathered or transformed is staged first: rows are put together in a slot of staging memory, and leave from there.
//! Stages are joined by bounds: operations -> (staging slots) -> credit -> in flight. A stage that is full stops the one
//! before it; staging never exceeds its slots, a rail never holds more than its limits.
//!
//! An inference rank that passes on what it receives runs the same engine: there operations wait until what they read has
//! arrived.
//!
//! A WRITE that fails ends its path; a rail that stalls while others reach the same receivers is closed. Both times the
//! rest goes over the other rails. Where none is left the push fails: it stops posting at once, but ends only when every
//! buffer that is in flight or being filled has come back.

use core::time::Duration;
use std::collections::VecDeque;

use xfer_plan::ReceiverRank;

use crate::program::{Program, SLOTS_MAX};
use crate::rail::{RailIndex, RailLimits};

mod backlog;
mod deadline;
mod failover;
mod failure;
mod message;
mod outcome;
mod path;
mod posting;
mod relay;
mod staging;

use backlog::Backlog;
pub use failure::Failure;
pub use message::{Action, Delivered, Event, Post, RailUse, Slot, Source};
use path::Path;
use relay::Arrivals;
pub use relay::Attempt;
use staging::Staging;

/// Bounds of an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// The rails, as the program's routes number them.
    pub rails: Vec<RailLimits>,
    /// Staging slots: the memory watermark over the bytes of a slot. More than 4096 are not used.
    pub slots: u32,
    /// A peer that owes a completion for longer fails the push.
    pub deadline: Duration,
    /// A rail that owes a completion for longer, while other rails reach the same receiver, is closed.
    pub stall: Duration,
    /// How long a failed push waits for what is in flight before the rails that hold it are closed.
    pub drain: Duration,
}

enum RailPhase {
    Open,
    /// It posts nothing more since then; what still moves on it may arrive.
    Retiring(String, Duration),
    Closing(String),
    Closed(String),
}

struct Rail {
    limits: RailLimits,
    phase: RailPhase,
    in_flight: u32,
    in_flight_bytes: u64,
    /// It refused a WRITE and has not been polled since.
    full: bool,
    /// Receivers that may have something for it, in the order of their turns.
    ring: VecDeque<u32>,
    bytes: u64,
    writes: u64,
}

impl Rail {
    /// Why it posts nothing more.
    fn given_up(&self) -> Option<&str> {
        match &self.phase {
            RailPhase::Open => None,
            RailPhase::Retiring(reason, _) | RailPhase::Closing(reason) | RailPhase::Closed(reason) => {
                Some(reason)
            }
        }
    }
}

struct Peer {
    backlog: Backlog,
    /// Whether what is gathered for it goes through staging memory; what is transformed always does, and all where the
    /// program says so.
    stages: bool,
    slots: u32,
    in_flight: u32,
    in_flight_bytes: u64,
    /// A WRITE to it was refused or came back, and none has been delivered since.
    held_up: bool,
    /// Since when it owes something.
    since: Duration,
    /// Of its fastest path and of all together, in bytes per second.
    rate_max: f64,
    rate_sum: f64,
}

enum Phase {
    Idle,
    Writing,
    /// Failed at this time; waiting for buffers.
    Draining(Failure, Duration),
}

/// See the module.
pub struct Engine {
    program: Program,
    config: EngineConfig,
    attempt: Attempt,
    phase: Phase,
    rails: Vec<Rail>,
    peers: Vec<Peer>,
    /// By receiver, then by rail.
    paths: Vec<Path>,
    /// Receivers in the order in which the program first writes to them.
    order: Vec<u32>,
    staging: Staging,
    /// Slots that one receiver may hold, so that a slow one does not hold all.
    slots_per_peer: u32,
    /// Receivers that wait for a slot.
    staging_ring: VecDeque<u32>,
    arrivals: Arrivals,
    in_flight: u32,
    /// Rails that are being closed.
    closing: u32,
    delivered: Delivered,
    /// When anything last moved.
    moved_at: Duration,
    ticked_at: Duration,
}

type Actions = VecDeque<Action>;

impl Engine {
    /// An engine for pushes of `program`.
    pub fn new(program: Program, config: EngineConfig) -> Self {
        let peers = program.ranks();
        let rail = |limits: &RailLimits| Rail {
            limits: *limits,
            phase: RailPhase::Open,
            in_flight: 0,
            in_flight_bytes: 0,
            full: false,
            ring: VecDeque::with_capacity(peers),
            bytes: 0,
            writes: 0,
        };
        let rails: Vec<Rail> = config.rails.iter().map(rail).collect();
        let mut engine = Self {
            attempt: Attempt::default(),
            phase: Phase::Idle,
            peers: Vec::with_capacity(peers),
            paths: Vec::with_capacity(peers * rails.len()),
            order: Vec::new(),
            rails,
            staging: Staging::new(config.slots.min(SLOTS_MAX)),
            slots_per_peer: 1,
            staging_ring: VecDeque::with_capacity(peers),
            arrivals: Arrivals::new(&program),
            in_flight: 0,
            closing: 0,
            delivered: Delivered::default(),
            moved_at: Duration::ZERO,
            ticked_at: Duration::ZERO,
            program,
            config,
        };
        engine.lay_out();
        engine
    }

    /// Which attempt the next push is.
    pub fn set_attempt(&mut self, attempt: Attempt) {
        if let Phase::Idle = self.phase {
            self.attempt = attempt;
        }
    }

    /// Deals the program's operations to receivers and rails.
    fn lay_out(&mut self) {
        for rank in 0..self.program.ranks() {
            let route = self.program.route(ReceiverRank(rank as u32));
            let ways: &[RailIndex] = route.map_or(&[], |route| &route.rails);
            let takes_rows =
                |rail: &RailIndex| self.rails.get(rail.index()).is_some_and(|rail| rail.limits.takes_rows);
            self.peers.push(Peer {
                backlog: Backlog::new(ways.len()),
                stages: !ways.iter().all(takes_rows),
                slots: 0,
                in_flight: 0,
                in_flight_bytes: 0,
                held_up: false,
                since: Duration::ZERO,
                rate_max: 0.0,
                rate_sum: 0.0,
            });
            let rails = (0..self.rails.len()).map(|rail| RailIndex(rail as u16));
            self.paths.extend(rails.map(|rail| Path::new(ways.contains(&rail))));
        }
        let mut seen = vec![false; self.peers.len()];
        for (index, op) in (0..).zip(self.program.ops()) {
            let Some(peer) = self.peers.get_mut(op.to.index()) else { continue };
            if self.program.is_relay() {
                peer.backlog.hold(op);
            } else if self.program.is_staged(op, peer.stages) {
                peer.backlog.add_staged(index);
            } else {
                peer.backlog.add(index, op);
            }
            if !std::mem::replace(&mut seen[op.to.index()], true) {
                self.order.push(op.to.0);
            }
        }
        let staged = self.peers.iter().filter(|peer| peer.backlog.has_unstaged()).count() as u32;
        self.slots_per_peer = (self.config.slots.min(SLOTS_MAX) / staged.max(1)).max(1);
    }

    /// The program that it pushes.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// What the present push (or the last) has delivered so far.
    pub fn delivered(&self) -> Delivered {
        self.delivered
    }

    /// What each rail did in the present push, or the last.
    pub fn rails(&self) -> impl Iterator<Item = RailUse> {
        let paths =
            |rail| (0..).map(ReceiverRank).zip(self.paths.iter().skip(rail).step_by(self.rails.len()));
        let lost = |(to, path): (ReceiverRank, &Path)| Some((to, path.lost.clone()?));
        self.rails.iter().enumerate().map(move |(at, rail)| RailUse {
            bytes: rail.bytes,
            writes: rail.writes,
            closed: rail.given_up().map(str::to_owned),
            lost: paths(at).filter_map(lost).collect(),
            unfinished: paths(at)
                .filter(|(to, path)| self.left_behind(*to, path, rail))
                .map(|(to, _)| to)
                .collect(),
        })
    }

    /// Whether bytes of this push may still arrive over a path that is given up. The last one to a receiver is not, while its
    /// rail is open: the next push tries it again.
    fn left_behind(&self, to: ReceiverRank, path: &Path, rail: &Rail) -> bool {
        let is_given_up =
            || !matches!(rail.phase, RailPhase::Open) || self.paths(to.0).iter().any(|other| other.live);
        path.unfinished && !path.live && is_given_up()
    }

    /// WRITEs in flight, over all rails.
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// WRITEs in flight on one rail.
    pub fn in_flight_on(&self, rail: usize) -> u32 {
        self.rails.get(rail).map_or(0, |rail| rail.in_flight)
    }

    /// Takes one event and appends what is to be done.
    pub fn handle(&mut self, event: Event, now: Duration, actions: &mut Actions) {
        match event {
            Event::Start => self.start(now, actions),
            Event::Staged(slot) => self.staged(slot, now, actions),
            Event::Refused(rail, id) => self.put_back(rail, id, true, now, actions),
            Event::Unoffered(rail, id) => self.put_back(rail, id, false, now, actions),
            Event::Polled(rail) => {
                if let Some(state) = self.rails.get_mut(rail.index()) {
                    state.full = false;
                }
                self.pump(rail, now, actions);
            }
            Event::Delivered(rail, id) => self.delivered_one(rail, id, now, actions),
            Event::Failed(rail, id, reason) => self.failed_one(rail, id, reason, now, actions),
            Event::RailFailed(rail, reason) => self.close_rail(rail, reason, now, actions),
            Event::Returned(rail, id) => self.returned(rail, id, now, actions),
            Event::RailClosed(rail, result) => self.rail_closed(rail, result, now),
            Event::Arrived(tag) => self.arrived(tag, now, actions),
            Event::Abort(reason) => self.fail(Failure::Aborted(reason), now),
            Event::Tick => self.tick(now, actions),
        }
        self.finish(actions);
    }

    fn start(&mut self, now: Duration, actions: &mut Actions) {
        if !matches!(self.phase, Phase::Idle) {
            return self.fail(Failure::Protocol("a push was started while another runs".into()), now);
        }
        self.phase = Phase::Writing;
        self.delivered = Delivered::default();
        (self.moved_at, self.ticked_at) = (now, now);
        for rail in &mut self.rails {
            (rail.bytes, rail.writes, rail.full) = (0, 0, false);
            rail.ring.clear();
        }
        self.paths.iter_mut().for_each(|path| path.start(now));
        self.revive();
        self.staging_ring.clear();
        self.arrivals.start(&self.program);
        let ops = self.program.ops();
        let op = |index: u32| ops.get(index as usize);
        for peer in &mut self.peers {
            peer.backlog.start(
                |index| op(index).map_or(0, |op| op.writes()),
                |index| op(index).map_or(0, |op| op.bytes()),
            );
            (peer.slots, peer.in_flight, peer.in_flight_bytes) = (0, 0, 0);
            (peer.held_up, peer.since) = (false, now);
        }
        if let Some(failure) = self.cannot_run() {
            return self.fail(failure, now);
        }
        for at in 0..self.order.len() {
            let peer = self.order[at];
            if self.peers[peer as usize].backlog.has_unstaged() {
                self.staging_ring.push_back(peer);
            }
            for rail in 0..self.rails.len() {
                self.offer(peer, RailIndex(rail as u16));
            }
        }
        self.begin_staging(actions);
        self.pump_all(now, actions);
    }

    /// Why the program can never end on these rails and slots.
    fn cannot_run(&self) -> Option<Failure> {
        let defect = |reason: &str| Some(Failure::Protocol(reason.into()));
        for &rank in &self.order {
            let to = ReceiverRank(rank);
            let peer = &self.peers[to.index()];
            let ways: &[RailIndex] = self.program.route(to).map_or(&[], |route| &route.rails);
            if ways.is_empty() || ways.iter().any(|rail| rail.index() >= self.rails.len()) {
                return defect("an operation's rail does not exist");
            }
            if ways.iter().any(|rail| self.rails[rail.index()].limits.depth == 0) {
                return defect("a rail has no depth");
            }
            if peer.backlog.has_unstaged() && !self.staging.is_possible() {
                return defect("a gather or a transform has no staging memory; raise the watermark");
            }
            if !ways.iter().any(|rail| self.path(to.0, *rail).live) {
                return Some(Failure::Closed { to });
            }
        }
        None
    }

    fn path(&self, peer: u32, rail: RailIndex) -> &Path {
        &self.paths[peer as usize * self.rails.len() + rail.index()]
    }

    fn path_mut(&mut self, peer: u32, rail: RailIndex) -> &mut Path {
        &mut self.paths[peer as usize * self.rails.len() + rail.index()]
    }

    /// The paths to a receiver, by rail.
    fn paths(&self, peer: u32) -> &[Path] {
        let rails = self.rails.len();
        &self.paths[peer as usize * rails..][..rails]
    }

    /// Ends the push when nothing is left to do or to wait for.
    fn finish(&mut self, actions: &mut Actions) {
        if self.staging.filling > 0 || self.in_flight > 0 || self.closing > 0 {
            return;
        }
        let result = match &self.phase {
            Phase::Writing if self.peers.iter().all(|peer| peer.backlog.bytes == 0) => self.account(),
            Phase::Draining(failure, _) => Err(failure.clone()),
            _ => return,
        };
        self.phase = Phase::Idle;
        actions.push_back(Action::Finish(result));
    }

    /// Pairs what was delivered with what was planned.
    fn account(&self) -> Result<Delivered, Failure> {
        let Delivered { bytes, writes, .. } = self.delivered;
        let (bytes_planned, writes_planned) = (self.program.bytes(), self.program.writes());
        if (bytes, writes) == (bytes_planned, writes_planned) {
            Ok(Delivered { writes: self.program.writes_planned(), ..self.delivered })
        } else {
            Err(Failure::Accounting { bytes, writes, bytes_planned, writes_planned })
        }
    }

    /// The first failure of a push decides; what has not been posted never will be.
    fn fail(&mut self, failure: Failure, now: Duration) {
        let Phase::Writing = self.phase else { return };
        self.phase = Phase::Draining(failure, now);
        let Self { program, peers, staging, .. } = self;
        for peer in peers {
            let stages = peer.stages;
            peer.backlog.give_up(|id, writes| {
                let op = program.ops().get(id.op as usize);
                if op.is_some_and(|op| program.is_staged(op, stages)) {
                    staging.release(id.slot_and_row().0, writes);
                }
            });
        }
    }
}

#[cfg(test)]
mod tests;
