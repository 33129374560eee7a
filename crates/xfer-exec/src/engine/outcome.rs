//! What becomes of WRITEs: delivered, failed, or back unposted.
//!
//! A WRITE that is over is in flight nowhere: its room on the rail and the path, and its part of a staging slot, are given back
//! exactly once.

use core::time::Duration;

use xfer_plan::NO_TAG;

use super::{Actions, Engine, Failure, Phase, Post, Source};
use crate::program::WriteId;
use crate::rail::RailIndex;

impl Engine {
    /// Takes a WRITE out of what is in flight.
    pub(super) fn end(&mut self, rail: RailIndex, id: WriteId, now: Duration) -> Option<Post> {
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

    /// A WRITE comes back unposted; `refused` by its rail or not even offered.
    pub(super) fn put_back(
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

    pub(super) fn delivered_one(
        &mut self,
        rail: RailIndex,
        id: WriteId,
        now: Duration,
        actions: &mut Actions,
    ) {
        let Some(post) = self.end(rail, id, now) else { return };
        let bytes = post.rows.total_bytes();
        self.delivered.bytes += bytes;
        self.delivered.writes += 1;
        if let Source::Slot(..) = post.source {
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

    pub(super) fn sum_rates(&mut self, peer: u32) {
        let (mut max, mut sum) = (0.0_f64, 0.0);
        for path in self.paths(peer).iter().filter(|path| path.live) {
            max = max.max(path.rate);
            sum += path.rate;
        }
        let peer = &mut self.peers[peer as usize];
        (peer.rate_max, peer.rate_sum) = (max, sum);
    }

    pub(super) fn failed_one(
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
            return self.again(&post, reason, now, actions);
        }
        let param = self.param(id);
        self.fail(Failure::Write { param, to: post.to, rail, reason }, now);
        self.release(&post, actions);
    }

    /// The parameter of a WRITE, for a message.
    fn param(&self, id: WriteId) -> String {
        let op = self.program.ops().get(id.op as usize);
        op.map_or("?", |op| self.program.name(op.param)).to_owned()
    }

    /// A WRITE that may not have arrived over one rail goes over another, unless it is one that its receiver counts.
    pub(super) fn again(&mut self, post: &Post, reason: String, now: Duration, actions: &mut Actions) {
        if post.tag != NO_TAG {
            let param = self.param(post.id);
            self.fail(Failure::Uncertain { param, to: post.to, rail: post.rail, reason }, now);
            return self.release(post, actions);
        }
        let peer = &mut self.peers[post.to.index()];
        peer.held_up = true;
        peer.backlog.give_back(post.id, post.rows.total_bytes(), false);
        self.offer_to_all(post.to.0, post.rail.index() + 1, now, actions);
    }
}
