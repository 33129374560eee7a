//! Rails that stall or break: when one is given up, and what becomes of the WRITEs that it had.
//!
//! A rail is given up only for a receiver that others reach; where a stalled rail is somebody's last one, deadlines decide. What
//! it had in flight is written again over others, but never before it has been closed and has given the buffers back.

use core::time::Duration;

use xfer_plan::ReceiverRank;

use super::path::Path;
use super::{Action, Actions, Engine, EngineConfig, Failure, Peer, Phase, RailPhase};
use crate::program::WriteId;
use crate::rail::RailIndex;

/// A path is not stalled before it has taken so many times as long as its rate lets expect.
const PATIENCE: f64 = 4.0;

impl Engine {
    /// Gives a receiver that no path leads to any more those whose rails are open: a WRITE that failed once may not fail again,
    /// and there is nothing else to try.
    pub(super) fn revive(&mut self) {
        for &peer in &self.order {
            let ways = self.program.route(ReceiverRank(peer)).map_or(&[][..], |route| &route.rails);
            let first = peer as usize * self.rails.len();
            if ways.iter().any(|rail| self.paths.get(first + rail.index()).is_some_and(|path| path.live)) {
                continue;
            }
            for rail in ways {
                let is_open =
                    self.rails.get(rail.index()).is_some_and(|rail| matches!(rail.phase, RailPhase::Open));
                if let Some(path) = self.paths.get_mut(first + rail.index()).filter(|_| is_open) {
                    (path.live, path.lost) = (true, None);
                }
            }
        }
    }

    /// Retires a rail on which a receiver owes completions for long, where another rail vouches for the receiver: it has
    /// delivered something to it meanwhile, or, when half of the deadline is gone, is free to try. Not a rail that somebody
    /// else has no other than: there the deadline decides.
    pub(super) fn retire_stalled(&mut self, now: Duration) {
        let EngineConfig { stall, deadline, .. } = self.config;
        let waited = |path: &Path| now.saturating_sub(path.since);
        // A slow path takes its time for what it holds.
        let expected = |path: &Path| {
            path.seconds_until(0).map_or(Duration::ZERO, |seconds| {
                Duration::try_from_secs_f64(PATIENCE * seconds).unwrap_or(Duration::MAX)
            })
        };
        let suspect = |peer: u32| {
            let paths = self.paths(peer);
            let is_stalled =
                |path: &Path| path.live && path.in_flight > 0 && waited(path) > stall.max(expected(path));
            let suspect = paths.iter().position(is_stalled)?;
            let stalled = &paths[suspect];
            let may_try = waited(stalled) > deadline / 2;
            let vouches =
                |path: &Path| path.delivered_at > stalled.since + stall / 2 || may_try && path.in_flight == 0;
            let rail = RailIndex(suspect as u16);
            let vouched = paths.iter().any(|path| path.live && vouches(path));
            (vouched && !self.is_last_way(rail)).then_some((peer, rail))
        };
        let suspects: Vec<_> = self.order.iter().filter_map(|peer| suspect(*peer)).collect();
        for (peer, rail) in suspects {
            let to = ReceiverRank(peer);
            let (in_flight, waited) = (self.path(peer, rail).in_flight, waited(self.path(peer, rail)));
            let reason = format!(
                "{to} took none of {in_flight} writes over it for {waited:.1?}, and other rails reach {to}"
            );
            // One that retired just now may have left another as the last one.
            if matches!(self.rails[rail.index()].phase, RailPhase::Open) && !self.is_last_way(rail) {
                self.rails[rail.index()].phase = RailPhase::Retiring(reason, now);
                self.leave(rail);
            }
        }
    }

    /// Whether a receiver that is not done has no other rail.
    fn is_last_way(&self, rail: RailIndex) -> bool {
        self.order.iter().any(|&peer| {
            let Peer { backlog, in_flight, .. } = &self.peers[peer as usize];
            let mut others = self.paths(peer).iter().enumerate().filter(|(at, _)| *at != rail.index());
            (backlog.bytes > 0 || *in_flight > 0) && !others.any(|(_, path)| path.live)
        })
    }

    /// Closes rails that retire, once nothing moves on them any more or they have had as long as they kept others waiting.
    pub(super) fn close_retired(&mut self, now: Duration, actions: &mut Actions) {
        for at in 0..self.rails.len() {
            let RailPhase::Retiring(reason, since) = &self.rails[at].phase else { continue };
            let stall = self.config.stall;
            let moves = |path: &&Path| path.in_flight > 0 && now.saturating_sub(path.since) <= stall;
            let on_it = self.paths.iter().skip(at).step_by(self.rails.len());
            if now.saturating_sub(*since) > stall || on_it.filter(moves).count() == 0 {
                self.close_rail(RailIndex(at as u16), reason.clone(), now, actions);
            }
        }
    }

    /// Closes a rail at once: it is broken, or has had its time.
    pub(super) fn close_rail(
        &mut self,
        rail: RailIndex,
        reason: String,
        now: Duration,
        actions: &mut Actions,
    ) {
        let Some(state) = self.rails.get_mut(rail.index()) else { return };
        let reason = match &state.phase {
            RailPhase::Open => reason,
            RailPhase::Retiring(reason, _) => reason.clone(),
            RailPhase::Closing(_) | RailPhase::Closed(_) => return,
        };
        state.phase = RailPhase::Closing(reason.clone());
        self.closing += 1;
        actions.push_back(Action::CloseRail(rail));
        self.leave(rail);
        for peer in 0..self.peers.len() as u32 {
            let needed = self.peers[peer as usize].backlog.bytes > 0 || self.path(peer, rail).in_flight > 0;
            if needed && !self.paths(peer).iter().any(|path| path.live) {
                self.fail(Failure::Rail { rail, reason: reason.clone() }, now);
            }
        }
    }

    /// Sends nobody over a rail any more.
    fn leave(&mut self, rail: RailIndex) {
        for peer in 0..self.peers.len() as u32 {
            if std::mem::take(&mut self.path_mut(peer, rail).live) {
                self.sum_rates(peer);
            }
        }
    }

    pub(super) fn returned(&mut self, rail: RailIndex, id: WriteId, now: Duration, actions: &mut Actions) {
        let Some(post) = self.end(rail, id, now) else { return };
        let path = self.path_mut(post.to.0, rail);
        path.ended(post.rows.total_bytes());
        path.unfinished = true;
        let reason =
            self.rails.get(rail.index()).and_then(|rail| rail.given_up()).unwrap_or_default().to_owned();
        match self.phase {
            Phase::Writing => self.again(&post, reason, now, actions),
            _ => self.release(&post, actions),
        }
    }

    pub(super) fn rail_closed(&mut self, rail: RailIndex, result: Result<(), String>, now: Duration) {
        let Some(state) = self.rails.get_mut(rail.index()) else { return };
        let RailPhase::Closing(reason) = &mut state.phase else {
            return self.fail(Failure::Protocol(format!("{rail} was closed unasked")), now);
        };
        state.phase = RailPhase::Closed(std::mem::take(reason));
        self.closing -= 1;
        // What it still holds it holds for ever, staging slots included: nothing of it comes back.
        let leaked = std::mem::take(&mut state.in_flight);
        state.in_flight_bytes = 0;
        self.in_flight -= leaked;
        for peer in 0..self.peers.len() as u32 {
            let path = self.path_mut(peer, rail);
            let (writes, bytes) =
                (std::mem::take(&mut path.in_flight), std::mem::take(&mut path.in_flight_bytes));
            let peer = &mut self.peers[peer as usize];
            (peer.in_flight, peer.in_flight_bytes) = (peer.in_flight - writes, peer.in_flight_bytes - bytes);
        }
        if let Err(reason) = result {
            // It may still write; nobody can say when.
            self.fail(Failure::Rail { rail, reason }, now);
        } else if leaked > 0 {
            self.fail(Failure::Protocol(format!("{rail} was closed and kept {leaked} writes")), now);
        }
    }
}
