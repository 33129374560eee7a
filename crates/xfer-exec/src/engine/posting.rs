//! Which WRITE goes next over which rail.
//!
//! A rail takes turns among the receivers whose paths have credit. Nothing is posted over its limits, and nothing on a path so
//! slow that it would be the last to arrive.

use core::time::Duration;

use xfer_plan::{OpKind, ReceiverRank};

use super::backlog::Found;
use super::{Action, Actions, Engine, Peer, Phase, Post, RailPhase, Source};
use crate::program::WriteId;
use crate::rail::{RailIndex, Rows};

/// WRITEs that a rail posts to one receiver before it turns to the next: they share doorbells, and no other waits long.
const TURN: u32 = 4;

/// A path below this part of the fastest one to the same receiver is slow: near the end it takes no WRITE that would arrive
/// after everything else.
const SLOW: f64 = 0.75;

impl Engine {
    /// The rail to which the plan deals an operation.
    pub(super) fn home(&self, op: u32) -> usize {
        let op = self.program.ops().get(op as usize);
        let rail = op.and_then(|op| {
            let ways = &self.program.route(op.to)?.rails;
            ways.get(usize::from(op.rail).checked_rem(ways.len())?)
        });
        rail.map_or(0, |rail| rail.index())
    }

    /// Puts a receiver into the ring of a rail, if there may be something to post.
    pub(super) fn offer(&mut self, peer: u32, rail: RailIndex) {
        let ready = self.peers[peer as usize].backlog.has_ready();
        let path = self.path_mut(peer, rail);
        if ready && !path.queued && path.has_credit() {
            path.queued = true;
            self.rails[rail.index()].ring.push_back(peer);
        }
    }

    /// There is something new for a receiver: whichever rail has room may take it, from `first` on and around.
    pub(super) fn offer_to_all(&mut self, peer: u32, first: usize, now: Duration, actions: &mut Actions) {
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
    pub(super) fn pump_all(&mut self, now: Duration, actions: &mut Actions) {
        let mut moved = true;
        while std::mem::take(&mut moved) {
            for rail in 0..self.rails.len() {
                moved |= self.turn(RailIndex(rail as u16), now, actions);
            }
        }
    }

    /// Posts to a rail until it can take no more.
    pub(super) fn pump(&mut self, rail: RailIndex, now: Duration, actions: &mut Actions) {
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
    pub(super) fn post(&self, id: WriteId, rail: RailIndex) -> Option<Post> {
        let op = self.program.ops().get(id.op as usize)?;
        let stages = self.peers.get(op.to.index())?.stages;
        let region = |row: u64| Source::Region(op.source.region, op.source.offset + row * op.source.stride);
        let whole = Rows { count: op.rows, bytes: op.row_bytes, stride: op.source.stride };
        let row = u64::from(id.row);
        let (source, rows, row) = match op.kind() {
            _ if self.program.is_staged(op, stages) => {
                let (slot, row) = id.slot_and_row();
                let writes = op.writes();
                if !self.staging.holds(slot, id.op) || u64::from(row) >= writes {
                    return None;
                }
                // Within 32 bits, as the program was checked.
                let bytes = op.bytes() / writes;
                (Source::Slot(slot, u64::from(row) * bytes), Rows::one(bytes as u32), row.into())
            }
            OpKind::Gather => (region(0), whole, 0),
            _ if row < op.writes() => (region(row), Rows::one(op.row_bytes), row),
            _ => return None,
        };
        Some(Post {
            id,
            rail,
            source,
            rows,
            to: op.to,
            region: self.program.region(op, self.attempt.second_bank),
            offset: op.destination.offset + row * op.destination.stride,
            tag: self.attempt.marked(self.program.tag(id.op)),
        })
    }
}
