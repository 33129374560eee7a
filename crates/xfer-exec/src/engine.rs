//! The sender's engine: given a [`Program`], what to gather, post, retry and give up, and when a push is over.
//!
//! It is a state machine. [`Engine::handle`] takes an event and the time and appends actions; it does nothing else, so
//! it runs alike on real rails and in a simulator. Time is a [`Duration`] since any fixed moment.
//!
//! Stages are joined by bounded queues: operations -> (staging slots) gather -> per-rail queue -> in flight. A stage
//! that is full stops the one before it; staging never exceeds its slots, a rail never holds
//! more than its limits.
//!
//! A push that fails stops posting at once, but ends only when every buffer that is in flight or being gathered has
//! come back, or the rails are closed.

use core::time::Duration;
use std::collections::VecDeque;

use xfer_plan::{OpKind, ReceiverRank, RegionIndex};

use crate::program::{Program, WriteId};
use crate::rail::{RailIndex, RailLimits, Rows};

/// WRITEs that wait in front of a rail, as a multiple of its depth: enough that a rail whose completions come in a
/// burst finds its next WRITEs ready, small enough that the order of the plan is kept.
const READY_PER_DEPTH: usize = 2;

/// A piece of staging memory, as long as the longest gathered operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

/// Bounds of an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// The rails, as the program's routes number them.
    pub rails: Vec<RailLimits>,
    /// Staging slots: the memory watermark over the bytes of a slot.
    pub slots: u32,
    /// A peer that owes a completion for longer fails the push.
    pub deadline: Duration,
    /// How long a failed push waits for what is in flight before the rails are closed.
    pub drain: Duration,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Begin a push. The weights do not change until [`Action::Finish`].
    Start,
    /// A gather is done.
    Gathered(Slot),
    /// A rail had no room for a WRITE.
    Refused(WriteId),
    /// A WRITE was not offered to its rail, which had refused another: it waits its turn.
    Unoffered(WriteId),
    /// A rail has been polled: it may have room again.
    Polled(RailIndex),
    /// A WRITE is in the peer's memory.
    Delivered(WriteId),
    /// A WRITE failed; its buffer is free.
    Failed(WriteId, String),
    /// A rail is broken.
    RailFailed(RailIndex, String),
    /// Somebody else ended this push.
    Abort(String),
    /// The rails have been closed, as asked: nothing is in flight.
    RailsClosed,
    /// Time has passed.
    Tick,
}

/// Where a WRITE's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// In a region of this rank: no copy is made.
    Region(RegionIndex, u64),
    /// In a staging slot, from its start.
    Slot(Slot),
}

/// One WRITE to post.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Post {
    /// Names it in later events.
    pub id: WriteId,
    /// Over which rail.
    pub rail: RailIndex,
    /// From where.
    pub source: Source,
    /// How its bytes lie there.
    pub rows: Rows,
    /// To whom.
    pub to: ReceiverRank,
    /// To which of its regions.
    pub region: RegionIndex,
    /// Where in it.
    pub offset: u64,
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Copy the rows of operation `op` into a slot, one after another.
    Gather {
        /// The slot.
        slot: Slot,
        /// Index of the operation.
        op: u32,
    },
    /// Post a WRITE.
    Post(Post),
    /// Close every rail, then report [`Event::RailsClosed`].
    CloseRails,
    /// The push is over and no buffer of it is in use.
    Finish(Result<Delivered, Failure>),
}

/// What a finished push did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Delivered {
    /// Bytes in the peers' memory.
    pub bytes: u64,
    /// WRITEs.
    pub writes: u64,
    /// Of the bytes, those that went through staging.
    pub bytes_gathered: u64,
    /// How often a rail had no room.
    pub refusals: u64,
}

/// Why a push failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// A WRITE completed in error.
    #[error("writing {param} to {to} over {rail} failed: {reason}")]
    Write {
        /// The parameter.
        param: String,
        /// The receiver.
        to: ReceiverRank,
        /// The rail.
        rail: RailIndex,
        /// The rail's reason.
        reason: String,
    },
    /// A peer owes completions for too long.
    #[error("{to} took no write for {waited:?} ({in_flight} in flight): is it stopped, dead or cut off?")]
    Deadline {
        /// The receiver.
        to: ReceiverRank,
        /// How long.
        waited: Duration,
        /// WRITEs in flight to it.
        in_flight: u32,
    },
    /// Nothing moves, and no peer is to blame.
    #[error(
        "nothing has moved for {waited:?} ({gathering} gathers in progress): is this process starved of its cores?"
    )]
    Stalled {
        /// How long.
        waited: Duration,
        /// Gathers that have not ended.
        gathering: u32,
    },
    /// A rail broke.
    #[error("{rail} failed: {reason}")]
    Rail {
        /// The rail.
        rail: RailIndex,
        /// Its reason.
        reason: String,
    },
    /// An earlier push ended by closing the rails.
    #[error("the rails of this rank were closed by an earlier failure; leave and join again")]
    Closed,
    /// Ended from outside.
    #[error("{0}")]
    Aborted(String),
    /// All WRITEs are over, but they are not what was planned: a defect of this program.
    #[error(
        "defect: delivered {bytes} bytes in {writes} writes where the plan has {bytes_planned} in {writes_planned}"
    )]
    Accounting {
        /// Bytes delivered.
        bytes: u64,
        /// WRITEs delivered.
        writes: u64,
        /// Bytes planned.
        bytes_planned: u64,
        /// WRITEs planned.
        writes_planned: u64,
    },
    /// An event that is not possible now: a defect of the driver.
    #[error("defect: {0}")]
    Protocol(String),
}

struct RailState {
    limits: RailLimits,
    in_flight: u32,
    in_flight_bytes: u64,
    /// It refused a WRITE and has not been polled since.
    full: bool,
    ready: VecDeque<Post>,
}

/// What is owed by a receiver.
#[derive(Clone, Default)]
struct PeerState {
    in_flight: u32,
    /// A WRITE to it was refused and has not been accepted since.
    refused: bool,
    /// Since when it owes something.
    since: Duration,
}

enum Phase {
    Idle,
    Writing,
    /// Failed at this time; waiting for buffers.
    Draining(Failure, Duration),
    /// As above, and the rails are being closed.
    Closing(Failure),
}

/// See the module.
pub struct Engine {
    program: Program,
    config: EngineConfig,
    phase: Phase,
    rails: Vec<RailState>,
    peers: Vec<PeerState>,
    free: Vec<Slot>,
    /// The operation that each slot was last given to.
    slots: Vec<u32>,
    gathering: u32,
    next_op: usize,
    next_row: u32,
    delivered: Delivered,
    /// When anything last moved.
    moved_at: Duration,
    /// The rails have been closed: there is no further push.
    closed: bool,
}

type Actions = VecDeque<Action>;

impl Engine {
    /// An engine for pushes of `program`.
    pub fn new(program: Program, config: EngineConfig) -> Self {
        let rail = |limits: &RailLimits| RailState {
            limits: *limits,
            in_flight: 0,
            in_flight_bytes: 0,
            full: false,
            ready: VecDeque::new(),
        };
        let rails = config.rails.iter().map(rail).collect();
        let peers = vec![PeerState::default(); program.ranks()];
        // Popped from the end: low slots are used first, so memory that is never needed is never touched.
        let free = (0..config.slots).rev().map(Slot).collect();
        let slots = config.slots as usize;
        Self {
            program,
            config,
            phase: Phase::Idle,
            rails,
            peers,
            free,
            slots: vec![0; slots],
            gathering: 0,
            next_op: 0,
            next_row: 0,
            delivered: Delivered::default(),
            moved_at: Duration::ZERO,
            closed: false,
        }
    }

    /// The program that it pushes.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// What the present push (or the last) has delivered so far.
    pub fn delivered(&self) -> Delivered {
        self.delivered
    }

    /// WRITEs in flight, over all rails.
    pub fn in_flight(&self) -> u32 {
        self.rails.iter().map(|rail| rail.in_flight).sum()
    }

    /// Takes one event and appends what is to be done.
    pub fn handle(&mut self, event: Event, now: Duration, actions: &mut Actions) {
        match event {
            Event::Start => self.start(now),
            Event::Gathered(slot) => self.gathered(slot, now),
            Event::Refused(id) => self.put_back(id, true, now),
            Event::Unoffered(id) => self.put_back(id, false, now),
            Event::Polled(rail) => {
                if let Some(rail) = self.rails.get_mut(rail.index()) {
                    rail.full = false;
                }
            }
            Event::Delivered(id) => self.delivered_one(id, now),
            Event::Failed(id, reason) => self.failed_one(id, reason, now),
            Event::RailFailed(rail, reason) => self.fail(Failure::Rail { rail, reason }, now),
            Event::Abort(reason) => self.fail(Failure::Aborted(reason), now),
            Event::RailsClosed => self.rails_closed(now),
            Event::Tick => self.tick(now, actions),
        }
        self.advance(now, actions);
    }

    fn start(&mut self, now: Duration) {
        if !matches!(self.phase, Phase::Idle) {
            return self.fail(Failure::Protocol("a push was started while another runs".into()), now);
        }
        self.phase = Phase::Writing;
        (self.next_op, self.next_row) = (0, 0);
        self.delivered = Delivered::default();
        for peer in &mut self.peers {
            *peer = PeerState::default();
        }
        self.moved_at = now;
        if self.closed {
            self.fail(Failure::Closed, now);
        } else if let Some(defect) = self.cannot_run() {
            self.fail(Failure::Protocol(defect.into()), now);
        }
    }

    /// Why the program could never end on these rails and slots.
    fn cannot_run(&self) -> Option<&'static str> {
        for op in self.program.ops() {
            let rail = self.program.route(op.to).and_then(|route| self.rails.get(route.rail.index()));
            match rail.map(|rail| rail.limits) {
                None => return Some("an operation's rail does not exist"),
                Some(limits) if limits.depth == 0 => return Some("a rail has no depth"),
                Some(limits)
                    if op.kind() == OpKind::Gather && !limits.takes_rows && self.slots.is_empty() =>
                {
                    return Some("a gather has no staging memory; raise the watermark");
                }
                Some(_) => {}
            }
        }
        None
    }

    /// Moves work on as far as the bounds allow, and ends the push when nothing is left.
    fn advance(&mut self, now: Duration, actions: &mut Actions) {
        if let Phase::Writing = self.phase {
            self.begin_ops(actions);
            for rail in 0..self.rails.len() {
                self.post_ready(rail, now, actions);
            }
        }
        let quiet = self.gathering == 0 && self.in_flight() == 0;
        let done =
            self.next_op == self.program.ops().len() && self.rails.iter().all(|rail| rail.ready.is_empty());
        let result = match &self.phase {
            Phase::Writing if quiet && done => self.account(),
            Phase::Draining(failure, _) if quiet => Err(failure.clone()),
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
            Ok(self.delivered)
        } else {
            Err(Failure::Accounting { bytes, writes, bytes_planned, writes_planned })
        }
    }

    /// Hands operations to the rails' queues, in the plan's order, until a queue or the staging memory is full.
    fn begin_ops(&mut self, actions: &mut Actions) {
        while let Some(op) = self.program.ops().get(self.next_op) {
            let Some(rail) =
                self.program.route(op.to).and_then(|route| self.rails.get_mut(route.rail.index()))
            else {
                return;
            };
            if rail.ready.len() >= READY_PER_DEPTH * rail.limits.depth as usize {
                return;
            }
            let index = self.next_op as u32;
            if op.kind() == OpKind::Gather && rail.limits.takes_rows {
                self.queue(WriteId { op: index, row: 0 }, End::Back);
            } else if op.kind() == OpKind::Gather {
                let Some(slot) = self.free.pop() else { return };
                self.slots[slot.0 as usize] = index;
                self.gathering += 1;
                actions.push_back(Action::Gather { slot, op: index });
            } else {
                let id = WriteId { op: index, row: self.next_row };
                let rows = op.rows;
                self.queue(id, End::Back);
                self.next_row += 1;
                if self.next_row < rows {
                    continue;
                }
            }
            (self.next_op, self.next_row) = (self.next_op + 1, 0);
        }
    }

    fn post_ready(&mut self, rail: usize, now: Duration, actions: &mut Actions) {
        let rail = &mut self.rails[rail];
        while !rail.full && rail.in_flight < rail.limits.depth {
            let Some(&post) = rail.ready.front() else {
                return;
            };
            let bytes = rail.in_flight_bytes.saturating_add(post.rows.total_bytes());
            if rail.in_flight > 0 && bytes > rail.limits.in_flight_bytes_max {
                return;
            }
            rail.ready.pop_front();
            rail.in_flight += 1;
            rail.in_flight_bytes = bytes;
            let peer = &mut self.peers[post.to.index()];
            if peer.in_flight == 0 && !peer.refused {
                peer.since = now;
            }
            peer.in_flight += 1;
            actions.push_back(Action::Post(post));
        }
    }

    /// The WRITE that `id` names; `None` for an id that names none.
    fn post(&self, id: WriteId) -> Option<Post> {
        let op = self.program.ops().get(id.op as usize)?;
        let route = self.program.route(op.to)?;
        let row = u64::from(id.row);
        let region = |row: u64| Source::Region(op.source.region, op.source.offset + row * op.source.stride);
        let whole = Rows { count: op.rows, bytes: op.row_bytes, stride: op.source.stride };
        let takes_rows = self.rails.get(route.rail.index())?.limits.takes_rows;
        let (source, rows, row) = match op.kind() {
            OpKind::Gather if takes_rows => (region(0), whole, 0),
            OpKind::Gather => (Source::Slot(Slot(id.row)), Rows::one(op.bytes() as u32), 0),
            _ => (region(row), Rows::one(op.row_bytes), row),
        };
        Some(Post {
            id,
            rail: route.rail,
            source,
            rows,
            to: op.to,
            region: op.destination.region,
            offset: op.destination.offset + row * op.destination.stride,
        })
    }

    fn queue(&mut self, id: WriteId, end: End) {
        let Some(post) = self.post(id) else { return };
        if let Some(rail) = self.rails.get_mut(post.rail.index()) {
            match end {
                End::Front => rail.ready.push_front(post),
                End::Back => rail.ready.push_back(post),
            }
        }
    }

    fn gathered(&mut self, slot: Slot, now: Duration) {
        let Some(&op) = self.slots.get(slot.0 as usize).filter(|_| self.gathering > 0) else {
            return self.fail(Failure::Protocol("a gather ended that was not begun".into()), now);
        };
        self.gathering -= 1;
        self.moved_at = now;
        match self.phase {
            Phase::Writing => self.queue(WriteId { op, row: slot.0 }, End::Back),
            _ => self.free.push(slot),
        }
    }

    /// Takes a WRITE out of what is in flight.
    fn take(&mut self, id: WriteId, now: Duration) -> Option<Post> {
        let post = self.post(id);
        let posted = post.filter(|post| {
            self.rails.get(post.rail.index()).is_some_and(|rail| rail.in_flight > 0)
                && self.peers.get(post.to.index()).is_some_and(|peer| peer.in_flight > 0)
        });
        let Some(post) = posted else {
            self.fail(Failure::Protocol(format!("{id:?} is not in flight")), now);
            return None;
        };
        let rail = &mut self.rails[post.rail.index()];
        rail.in_flight -= 1;
        rail.in_flight_bytes = rail.in_flight_bytes.saturating_sub(post.rows.total_bytes());
        self.peers[post.to.index()].in_flight -= 1;
        Some(post)
    }

    /// Frees the staging slot of a WRITE, if it has one.
    fn release(&mut self, post: &Post) {
        if let Source::Slot(slot) = post.source {
            self.free.push(slot);
        }
    }

    /// A WRITE comes back unposted; `refused` by its rail or not even offered.
    fn put_back(&mut self, id: WriteId, refused: bool, now: Duration) {
        let Some(post) = self.take(id, now) else { return };
        self.delivered.refusals += u64::from(refused);
        match self.phase {
            Phase::Writing => {
                self.rails[post.rail.index()].full = true;
                self.peers[post.to.index()].refused |= refused;
                self.queue(id, End::Front);
            }
            _ => self.release(&post),
        }
    }

    fn delivered_one(&mut self, id: WriteId, now: Duration) {
        let Some(post) = self.take(id, now) else { return };
        let bytes = post.rows.total_bytes();
        self.delivered.bytes += bytes;
        self.delivered.writes += 1;
        if let Source::Slot(_) = post.source {
            self.delivered.bytes_gathered += bytes;
        }
        let peer = &mut self.peers[post.to.index()];
        (peer.since, peer.refused) = (now, false);
        self.moved_at = now;
        self.release(&post);
    }

    fn failed_one(&mut self, id: WriteId, reason: String, now: Duration) {
        let Some(post) = self.take(id, now) else { return };
        self.release(&post);
        let op = self.program.ops().get(id.op as usize);
        let param = op.map_or("?", |op| self.program.name(op.param)).to_owned();
        self.fail(Failure::Write { param, to: post.to, rail: post.rail, reason }, now);
    }

    fn rails_closed(&mut self, now: Duration) {
        self.closed = true;
        for rail in &mut self.rails {
            (rail.in_flight, rail.in_flight_bytes) = (0, 0);
        }
        // A gather that has not ended by now never will; what it holds is its own.
        self.gathering = 0;
        if let Phase::Closing(failure) = &self.phase {
            self.phase = Phase::Draining(failure.clone(), now);
        }
    }

    fn tick(&mut self, now: Duration, actions: &mut Actions) {
        match &self.phase {
            Phase::Writing => {
                let deadline = self.config.deadline;
                let owes = |peer: &PeerState| peer.in_flight > 0 || peer.refused;
                let waited = |peer: &PeerState| now.saturating_sub(peer.since);
                let late = |peer: &PeerState| owes(peer) && waited(peer) > deadline;
                let found = self.peers.iter().position(late).map(|rank| (rank, &self.peers[rank]));
                let stalled = now.saturating_sub(self.moved_at) > deadline && !self.peers.iter().any(owes);
                if let Some((rank, peer)) = found {
                    let to = ReceiverRank(rank as u32);
                    let failure = Failure::Deadline { to, waited: waited(peer), in_flight: peer.in_flight };
                    self.fail(failure, now);
                } else if stalled {
                    self.fail(Failure::Stalled { waited: deadline, gathering: self.gathering }, now);
                }
            }
            Phase::Draining(failure, since) if now.saturating_sub(*since) > self.config.drain => {
                self.phase = Phase::Closing(failure.clone());
                actions.push_back(Action::CloseRails);
            }
            _ => {}
        }
    }

    /// The first failure of a push decides; what has not been posted never will be.
    fn fail(&mut self, failure: Failure, now: Duration) {
        if !matches!(self.phase, Phase::Writing) {
            return;
        }
        self.phase = Phase::Draining(failure, now);
        for rail in &mut self.rails {
            for post in rail.ready.drain(..) {
                if let Source::Slot(slot) = post.source {
                    self.free.push(slot);
                }
            }
        }
    }
}

/// Where a WRITE joins a rail's queue: again at its front, or for the first time at its back.
#[derive(Clone, Copy)]
enum End {
    Front,
    Back,
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
