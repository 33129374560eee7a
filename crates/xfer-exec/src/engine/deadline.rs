//! How long anything may take: a peer that owes something, this process itself, and the end of a push that failed.
//!
//! Nobody is blamed for a time in which this process did not run.

use core::time::Duration;

use xfer_plan::ReceiverRank;

use super::{Actions, Engine, Failure, Peer, Phase};
use crate::rail::RailIndex;

impl Engine {
    pub(super) fn tick(&mut self, now: Duration, actions: &mut Actions) {
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
                let stalled = now.saturating_sub(self.moved_at) > deadline
                    && !self.peers.iter().any(owes)
                    && !self.waits_for_arrivals();
                if let Some((rank, peer)) = found {
                    let to = ReceiverRank(rank as u32);
                    let failure = Failure::Deadline { to, waited: waited(peer), in_flight: peer.in_flight };
                    return self.fail(failure, now);
                }
                if stalled {
                    return self
                        .fail(Failure::Stalled { waited: deadline, filling: self.staging.filling }, now);
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
                self.staging.give_up_fills();
            }
            _ => {}
        }
    }
}
