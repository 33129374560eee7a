//! The sender's engine: given a [`Program`], what to gather, post, retry and give up, and when a push is over.
//!
//! It is a state machine. [`Engine::handle`] takes an event and the time and appends actions; it does nothing else, so
//! it runs alike on real rails and in a simulator. Time is a [`Duration`] since the push began.
//!
//! A receiver is reached over one rail or several. Each pair is a *path* with a credit that follows the rate it delivers
//! at; the operations that wait are kept per receiver. A rail takes turns among the receivers whose paths have credit, so
//! neither a slow rail nor a slow receiver stalls the others.
//!
//! Stages are joined by bounds: operations -> (staging slots) gather -> credit -> in flight. A stage that is full stops
//! the one before it; staging never exceeds its slots, a rail never holds more than its limits.
//!
//! A WRITE that fails ends its path; a rail that stalls while others reach the same receivers is closed. Both times the
//! rest goes over the other rails. Where none is left the push fails: it stops posting at once, but ends only when every
//! buffer that is in flight or being gathered has come back.

use core::time::Duration;
use std::collections::VecDeque;

use xfer_plan::{OpKind, ReceiverRank};

use crate::program::{Program, WriteId};
use crate::rail::{RailIndex, RailLimits, Rows};

mod backlog;
mod failover;
mod failure;
mod message;
mod path;

use backlog::{Backlog, Found};
pub use failure::Failure;
pub use message::{Action, Delivered, Event, Post, RailUse, Slot, Source};
use path::Path;

/// WRITEs that a rail posts to one receiver before it turns to the next: they share doorbells, and no other waits long.
const TURN: u32 = 4;

/// A path below this part of the fastest one to the same receiver is slow: near the end it takes no WRITE that would arrive
/// after everything else.
const SLOW: f64 = 0.75;

/// Bounds of an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// The rails, as the program's routes number them.
    pub rails: Vec<RailLimits>,
    /// Staging slots: the memory watermark over the bytes of a slot.
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

struct Peer {
    backlog: Backlog,
    /// Whether what is gathered for it goes through staging memory.
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

/// What a slot was last used for.
#[derive(Clone, Copy)]
struct SlotUse {
    op: u32,
    gather: Gather,
}

#[derive(Clone, Copy, PartialEq)]
enum Gather {
    Over,
    Begun,
    /// Its push has ended without it.
    GivenUp,
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
    phase: Phase,
    rails: Vec<Rail>,
    peers: Vec<Peer>,
    /// By receiver, then by rail.
    paths: Vec<Path>,
    /// Receivers in the order in which the program first writes to them.
    order: Vec<u32>,
    free: Vec<Slot>,
    slots: Vec<SlotUse>,
    /// Slots that one receiver may hold, so that a slow one does not hold all.
    slots_per_peer: u32,
    /// Receivers that wait for a slot.
    gather_ring: VecDeque<u32>,
    gathering: u32,
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
            phase: Phase::Idle,
            peers: Vec::with_capacity(peers),
            paths: Vec::with_capacity(peers * rails.len()),
            order: Vec::new(),
            rails,
            // Popped from the end: low slots are used first, so memory that is never needed is never touched.
            free: (0..config.slots).rev().map(Slot).collect(),
            slots: vec![SlotUse { op: 0, gather: Gather::Over }; config.slots as usize],
            slots_per_peer: 1,
            gather_ring: VecDeque::with_capacity(peers),
            gathering: 0,
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
            peer.backlog.add(index, op, op.kind() == OpKind::Gather && peer.stages);
            if !std::mem::replace(&mut seen[op.to.index()], true) {
                self.order.push(op.to.0);
            }
        }
        let gatherers = self.peers.iter().filter(|peer| peer.backlog.has_gathers()).count() as u32;
        self.slots_per_peer = (self.config.slots / gatherers.max(1)).max(1);
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
            closed: match &rail.phase {
                RailPhase::Open => None,
                RailPhase::Retiring(reason, _) | RailPhase::Closing(reason) | RailPhase::Closed(reason) => {
                    Some(reason.clone())
                }
            },
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
            Event::Gathered(slot) => self.gathered(slot, now, actions),
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
        self.gather_ring.clear();
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
            if self.peers[peer as usize].backlog.has_gathers() {
                self.gather_ring.push_back(peer);
            }
            for rail in 0..self.rails.len() {
                self.offer(peer, RailIndex(rail as u16));
            }
        }
        self.begin_gathers(actions);
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
            let comes_back = |slot: &SlotUse| slot.gather == Gather::GivenUp;
            if peer.backlog.has_gathers() && self.free.is_empty() && !self.slots.iter().any(comes_back) {
                return defect("a gather has no staging memory; raise the watermark");
            }
            if !ways.iter().any(|rail| self.path(to.0, *rail).live) {
                return Some(Failure::Closed { to });
            }
        }
        None
    }

    /// The rail to which the plan deals an operation.
    fn home(&self, op: u32) -> usize {
        let op = self.program.ops().get(op as usize);
        let rail = op.and_then(|op| {
            let ways = &self.program.route(op.to)?.rails;
            ways.get(usize::from(op.rail).checked_rem(ways.len())?)
        });
        rail.map_or(0, |rail| rail.index())
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
        if self.gathering > 0 || self.in_flight > 0 || self.closing > 0 {
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
            Ok(self.delivered)
        } else {
            Err(Failure::Accounting { bytes, writes, bytes_planned, writes_planned })
        }
    }

    // --- gathering and posting -----------------------------------------------------------------------------------

    /// Begins gathers while there are slots, for one receiver after another.
    fn begin_gathers(&mut self, actions: &mut Actions) {
        let Phase::Writing = self.phase else { return };
        while !self.free.is_empty()
            && let Some(rank) = self.gather_ring.pop_front()
        {
            let peer = &mut self.peers[rank as usize];
            let Some(op) = peer.backlog.take_gather() else { continue };
            let Some(slot) = self.free.pop() else { return };
            peer.slots += 1;
            self.slots[slot.0 as usize] = SlotUse { op, gather: Gather::Begun };
            self.gathering += 1;
            // Who has all that it may have asks again when it gives one back.
            if peer.slots < self.slots_per_peer && peer.backlog.has_gathers() {
                self.gather_ring.push_back(rank);
            }
            actions.push_back(Action::Gather { slot, op });
        }
    }

    /// Puts a receiver into the ring of a rail, if there may be something to post.
    fn offer(&mut self, peer: u32, rail: RailIndex) {
        let ready = self.peers[peer as usize].backlog.has_ready();
        let path = self.path_mut(peer, rail);
        if ready && !path.queued && path.has_credit() {
            path.queued = true;
            self.rails[rail.index()].ring.push_back(peer);
        }
    }

    /// There is something new for a receiver: whichever rail has room may take it, from `first` on and around.
    fn offer_to_all(&mut self, peer: u32, first: usize, now: Duration, actions: &mut Actions) {
        let rails = self.rails.len();
        for rail in (first..first + rails).map(|rail| rail % rails) {
            let rail = RailIndex(rail as u16);
            if self.peers[peer as usize].backlog.has_ready() {
                self.offer(peer, rail);
                self.pump(rail, now, actions);
            }
        }
    }

    /// Fills all rails evenly: one turn each, until none can take more.
    fn pump_all(&mut self, now: Duration, actions: &mut Actions) {
        let mut moved = true;
        while std::mem::take(&mut moved) {
            for rail in 0..self.rails.len() {
                moved |= self.turn(RailIndex(rail as u16), now, actions);
            }
        }
    }

    /// Posts to a rail until it can take no more.
    fn pump(&mut self, rail: RailIndex, now: Duration, actions: &mut Actions) {
        while self.turn(rail, now, actions) {}
    }

    /// Gives the rail's next receiver its turn; `false` when the rail is full, or nobody waits.
    fn turn(&mut self, rail: RailIndex, now: Duration, actions: &mut Actions) -> bool {
        let Some(state) = self.rails.get_mut(rail.index()) else { return false };
        let Phase::Writing = self.phase else { return false };
        if state.full || state.in_flight >= state.limits.depth || !matches!(state.phase, RailPhase::Open) {
            return false;
        }
        let Some(peer) = state.ring.pop_front() else { return false };
        self.path_mut(peer, rail).queued = false;
        for _ in 0..TURN {
            if !self.path(peer, rail).has_credit() {
                return true;
            }
            let Some((found, post)) = self.next(peer, rail) else { return true };
            let bytes = post.rows.total_bytes();
            let state = &self.rails[rail.index()];
            let over = state.in_flight_bytes.saturating_add(bytes) > state.limits.in_flight_bytes_max;
            if state.in_flight >= state.limits.depth || state.in_flight > 0 && over {
                self.path_mut(peer, rail).queued = true;
                self.rails[rail.index()].ring.push_front(peer);
                return false;
            }
            if self.is_late(peer, rail, bytes) {
                return true;
            }
            self.take(found, &post, now);
            actions.push_back(Action::Post(post));
        }
        self.offer(peer, rail);
        true
    }

    /// What a rail would post next to a receiver.
    fn next(&self, peer: u32, rail: RailIndex) -> Option<(Found, Post)> {
        let ways = &self.program.route(ReceiverRank(peer))?.rails;
        let home = ways.iter().position(|way| *way == rail)?;
        let cannot = |home: usize, op: u32| {
            let bytes = self.program.ops().get(op as usize).map_or(0, |op| op.bytes() / op.writes().max(1));
            ways.get(home).is_none_or(|way| !self.can_take(peer, *way, bytes))
        };
        let found = self.peers[peer as usize].backlog.find(home, cannot)?;
        Some((found, self.post(found.id, rail)?))
    }

    /// Whether a rail can take so many bytes more for a receiver right now.
    fn can_take(&self, peer: u32, rail: RailIndex, bytes: u64) -> bool {
        let state = &self.rails[rail.index()];
        let has_room = !state.full
            && state.in_flight < state.limits.depth
            && state.in_flight_bytes < state.limits.in_flight_bytes_max;
        has_room && self.path(peer, rail).has_credit() && !self.is_late(peer, rail, bytes)
    }

    /// Whether a WRITE over a slow path would arrive after all that is left has arrived over the others.
    fn is_late(&self, peer: u32, rail: RailIndex, bytes: u64) -> bool {
        let Peer { backlog, in_flight, in_flight_bytes, rate_max, rate_sum, held_up, .. } =
            &self.peers[peer as usize];
        let path = self.path(peer, rail);
        // Where nothing moves, the rates of the other paths say nothing: they may not take a WRITE at all.
        if path.rate >= SLOW * rate_max || *held_up && *in_flight == 0 {
            return false;
        }
        let rest = (backlog.bytes + in_flight_bytes) as f64 / rate_sum;
        path.seconds_until(bytes).is_some_and(|seconds| seconds > rest)
    }

    /// Counts a WRITE as in flight.
    fn take(&mut self, found: Found, post: &Post, now: Duration) {
        let bytes = post.rows.total_bytes();
        let writes = self.program.ops().get(found.id.op as usize).map_or(1, |op| op.writes());
        let peer = &mut self.peers[post.to.index()];
        peer.backlog.take(found, writes, bytes);
        if peer.in_flight == 0 && !peer.held_up {
            peer.since = now;
        }
        peer.in_flight += 1;
        peer.in_flight_bytes += bytes;
        let state = &mut self.rails[post.rail.index()];
        state.in_flight += 1;
        state.in_flight_bytes += bytes;
        self.in_flight += 1;
        self.path_mut(post.to.0, post.rail).posted(bytes, now);
    }

    /// The WRITE that `id` names, over `rail`; `None` for an id that names none.
    fn post(&self, id: WriteId, rail: RailIndex) -> Option<Post> {
        let op = self.program.ops().get(id.op as usize)?;
        let stages = self.peers.get(op.to.index())?.stages;
        let row = u64::from(id.row);
        let region = |row: u64| Source::Region(op.source.region, op.source.offset + row * op.source.stride);
        let whole = Rows { count: op.rows, bytes: op.row_bytes, stride: op.source.stride };
        let (source, rows, row) = match op.kind() {
            OpKind::Gather if stages && row < self.slots.len() as u64 => {
                (Source::Slot(Slot(id.row)), Rows::one(op.bytes() as u32), 0)
            }
            OpKind::Gather if !stages => (region(0), whole, 0),
            OpKind::Direct | OpKind::Rows if row < op.writes() => (region(row), Rows::one(op.row_bytes), row),
            _ => return None,
        };
        Some(Post {
            id,
            rail,
            source,
            rows,
            to: op.to,
            region: op.destination.region,
            offset: op.destination.offset + row * op.destination.stride,
        })
    }

    // --- what came back ------------------------------------------------------------------------------------------

    fn gathered(&mut self, slot: Slot, now: Duration, actions: &mut Actions) {
        let was = self.slots.get_mut(slot.0 as usize);
        let was = was.map(|slot| (slot.op, std::mem::replace(&mut slot.gather, Gather::Over)));
        let op = match was {
            Some((op, Gather::Begun)) => op,
            Some((_, Gather::GivenUp)) => {
                self.free.push(slot);
                return self.begin_gathers(actions);
            }
            _ => return self.fail(Failure::Protocol("a gather ended that was not begun".into()), now),
        };
        self.gathering -= 1;
        self.moved_at = now;
        let peer = self.program.ops().get(op as usize).map_or(0, |op| op.to.0);
        match self.phase {
            Phase::Writing => {
                self.peers[peer as usize].backlog.stage(op, slot);
                self.offer_to_all(peer, self.home(op), now, actions);
            }
            _ => self.free.push(slot),
        }
    }

    /// Takes a WRITE out of what is in flight.
    fn end(&mut self, rail: RailIndex, id: WriteId, now: Duration) -> Option<Post> {
        let in_flight = |post: &Post| {
            let path = self.path(post.to.0, rail);
            path.in_flight > 0 && path.in_flight_bytes >= post.rows.total_bytes()
        };
        let known = self.post(id, rail).filter(|_| rail.index() < self.rails.len());
        let Some(post) = known.filter(in_flight) else {
            self.fail(Failure::Protocol(format!("{id:?} is not in flight on {rail}")), now);
            return None;
        };
        let bytes = post.rows.total_bytes();
        let state = &mut self.rails[rail.index()];
        state.in_flight -= 1;
        state.in_flight_bytes -= bytes;
        let peer = &mut self.peers[post.to.index()];
        peer.in_flight -= 1;
        peer.in_flight_bytes -= bytes;
        self.in_flight -= 1;
        Some(post)
    }

    /// Frees the staging slot of a WRITE, if it has one.
    fn release(&mut self, post: &Post, actions: &mut Actions) {
        let Source::Slot(slot) = post.source else { return };
        self.free.push(slot);
        let peer = &mut self.peers[post.to.index()];
        let was_full = peer.slots >= self.slots_per_peer;
        peer.slots = peer.slots.saturating_sub(1);
        if was_full && peer.backlog.has_gathers() {
            self.gather_ring.push_back(post.to.0);
        }
        self.begin_gathers(actions);
    }

    /// A WRITE comes back unposted; `refused` by its rail or not even offered.
    fn put_back(
        &mut self,
        rail: RailIndex,
        id: WriteId,
        refused: bool,
        now: Duration,
        actions: &mut Actions,
    ) {
        let Some(post) = self.end(rail, id, now) else { return };
        let (peer, bytes) = (post.to.0, post.rows.total_bytes());
        self.path_mut(peer, rail).ended(bytes);
        self.delivered.refusals += u64::from(refused);
        let Phase::Writing = self.phase else { return self.release(&post, actions) };
        self.peers[peer as usize].held_up |= refused;
        self.peers[peer as usize].backlog.give_back(id, bytes, true);
        let path = self.path_mut(peer, rail);
        let (live, queued) = (path.live, std::mem::replace(&mut path.queued, true));
        let state = &mut self.rails[rail.index()];
        state.full = true;
        if refused {
            // It may be the receiver and not the rail that has no room: the others come first, and other rails may try.
            state.ring.retain(|other| *other != peer);
            state.ring.extend(live.then_some(peer));
            self.offer_to_all(peer, rail.index() + 1, now, actions);
        } else if live && !queued {
            state.ring.push_front(peer);
        }
    }

    fn delivered_one(&mut self, rail: RailIndex, id: WriteId, now: Duration, actions: &mut Actions) {
        let Some(post) = self.end(rail, id, now) else { return };
        let bytes = post.rows.total_bytes();
        self.delivered.bytes += bytes;
        self.delivered.writes += 1;
        if let Source::Slot(_) = post.source {
            self.delivered.bytes_gathered += bytes;
        }
        let state = &mut self.rails[rail.index()];
        state.bytes += bytes;
        state.writes += 1;
        self.moved_at = now;
        if self.path_mut(post.to.0, rail).delivered(bytes, now) {
            self.sum_rates(post.to.0);
        }
        let peer = &mut self.peers[post.to.index()];
        peer.held_up = false;
        let silent = now.saturating_sub(std::mem::replace(&mut peer.since, now));
        if silent > self.config.stall / 2 {
            // The receiver itself did not run: its other rails are not late for that.
            let rails = self.rails.len();
            self.paths[post.to.index() * rails..][..rails].iter_mut().for_each(|path| path.since = now);
        }
        self.release(&post, actions);
        self.offer(post.to.0, rail);
        self.pump(rail, now, actions);
    }

    fn sum_rates(&mut self, peer: u32) {
        let (mut max, mut sum) = (0.0_f64, 0.0);
        for path in self.paths(peer).iter().filter(|path| path.live) {
            max = max.max(path.rate);
            sum += path.rate;
        }
        let peer = &mut self.peers[peer as usize];
        (peer.rate_max, peer.rate_sum) = (max, sum);
    }

    fn failed_one(
        &mut self,
        rail: RailIndex,
        id: WriteId,
        reason: String,
        now: Duration,
        actions: &mut Actions,
    ) {
        let Some(post) = self.end(rail, id, now) else { return };
        let bytes = post.rows.total_bytes();
        let path = self.path_mut(post.to.0, rail);
        path.ended(bytes);
        path.live = false;
        path.unfinished = true;
        path.lost.get_or_insert_with(|| reason.clone());
        self.sum_rates(post.to.0);
        if matches!(self.phase, Phase::Writing) && self.paths(post.to.0).iter().any(|path| path.live) {
            self.again(&post, now, actions);
            return;
        }
        self.release(&post, actions);
        let op = self.program.ops().get(id.op as usize);
        let param = op.map_or("?", |op| self.program.name(op.param)).to_owned();
        self.fail(Failure::Write { param, to: post.to, rail, reason }, now);
    }

    /// A WRITE that did not arrive over one rail goes over another.
    fn again(&mut self, post: &Post, now: Duration, actions: &mut Actions) {
        let peer = &mut self.peers[post.to.index()];
        peer.held_up = true;
        peer.backlog.give_back(post.id, post.rows.total_bytes(), false);
        self.offer_to_all(post.to.0, post.rail.index() + 1, now, actions);
    }

    fn tick(&mut self, now: Duration, actions: &mut Actions) {
        let missed = now.saturating_sub(std::mem::replace(&mut self.ticked_at, now));
        if missed > self.config.stall / 2 {
            // This process itself did not run: nobody else is late for that.
            self.moved_at = now;
            self.peers.iter_mut().for_each(|peer| peer.since = now);
            self.paths.iter_mut().for_each(|path| path.since = now);
        }
        if let Phase::Draining(_, since) = &mut self.phase {
            // So here; but it ends however seldom this process runs.
            *since = now.min(*since + missed.saturating_sub(self.config.drain / 2));
        }
        self.close_retired(now, actions);
        match &self.phase {
            Phase::Writing => {
                self.retire_stalled(now);
                let deadline = self.config.deadline;
                let owes = |peer: &Peer| peer.in_flight > 0 || peer.held_up;
                let waited = |peer: &Peer| now.saturating_sub(peer.since);
                // Who is held up may be waiting for room that somebody else fills.
                let silent = |after: Duration| move |peer: &Peer| peer.in_flight > 0 && waited(peer) > after;
                let holds_room = self.peers.iter().any(silent(deadline / 2));
                let cut_off = |peer: &Peer| peer.held_up && !holds_room && waited(peer) > deadline;
                let late = |peer: &Peer| silent(deadline)(peer) || cut_off(peer);
                let found = self.peers.iter().position(late).map(|rank| (rank, &self.peers[rank]));
                let stalled = now.saturating_sub(self.moved_at) > deadline && !self.peers.iter().any(owes);
                if let Some((rank, peer)) = found {
                    let to = ReceiverRank(rank as u32);
                    let failure = Failure::Deadline { to, waited: waited(peer), in_flight: peer.in_flight };
                    return self.fail(failure, now);
                }
                if stalled {
                    return self.fail(Failure::Stalled { waited: deadline, gathering: self.gathering }, now);
                }
                // Who could take nothing a while ago may now take from those who cannot keep up.
                for at in 0..self.order.len() {
                    for rail in 0..self.rails.len() {
                        self.offer(self.order[at], RailIndex(rail as u16));
                    }
                }
                self.pump_all(now, actions);
            }
            Phase::Draining(failure, since) if now.saturating_sub(*since) > self.config.drain => {
                let reason = failure.to_string();
                let held = (0..self.rails.len()).filter(|rail| self.rails[*rail].in_flight > 0);
                for rail in held.collect::<Vec<_>>() {
                    self.close_rail(RailIndex(rail as u16), reason.clone(), now, actions);
                }
                // A gather that has not ended by now holds its slot for as long as it likes.
                self.gathering = 0;
                for slot in self.slots.iter_mut().filter(|slot| slot.gather == Gather::Begun) {
                    slot.gather = Gather::GivenUp;
                }
            }
            _ => {}
        }
    }

    /// The first failure of a push decides; what has not been posted never will be.
    fn fail(&mut self, failure: Failure, now: Duration) {
        let Phase::Writing = self.phase else { return };
        self.phase = Phase::Draining(failure, now);
        let ops = self.program.ops();
        for peer in &mut self.peers {
            let stages = peer.stages;
            let slot_of = |id: WriteId| {
                let op = ops.get(id.op as usize)?;
                (stages && op.kind() == OpKind::Gather).then_some(Slot(id.row))
            };
            peer.backlog.give_up(&mut self.free, slot_of);
        }
    }
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
