//! Goodbyes, losses and deadlines.
//!
//! A member that is lost ends the job, never in silence: everybody who is left is told who was lost, and during what.

use std::time::Duration;

use xfer_plan::Rank;

use super::{
    Action, Actions, Cause, Controller, Phase, Report, SILENCE_DIVISOR, STALL_TICKS, Seat, Stage, list,
    refuse,
};
use crate::protocol::ToMember;

impl Controller {
    pub(super) fn leave(&mut self, member: Rank, actions: &mut Actions) {
        if !matches!(self.phase, Phase::Idle) || matches!(member, Rank::Receiver(_)) {
            return self.lose(member, "it left", actions);
        }
        if let Some(seat) = self.seats.get_mut(&member) {
            seat.left = true;
            self.members.remove(&seat.connection);
            actions.push(Action::Close(seat.connection));
            actions.push(Action::Report(Report::Left(member)));
        }
        let all_left = self.trainers().all(|trainer| self.seats.get(&trainer).is_none_or(|seat| seat.left));
        if all_left {
            self.send_all(|_| true, ToMember::Finished, actions);
            self.end(None, actions);
        }
    }

    pub(super) fn lose(&mut self, member: Rank, reason: &str, actions: &mut Actions) {
        let Some(seat) = self.seats.remove(&member) else {
            return;
        };
        self.members.remove(&seat.connection);
        self.history.lost(member);
        let during = match &self.phase {
            Phase::Ended => return actions.push(Action::Close(seat.connection)),
            // It may be started again and join: nobody depends on it yet.
            Phase::Joining(_) => {
                actions.push(Action::Report(Report::Lost { rank: member, reason: reason.to_owned() }));
                return refuse(seat.connection, format!("{member}: {reason}"), actions);
            }
            Phase::Connecting { .. } => "while connecting".into(),
            Phase::Idle => "between versions".into(),
            Phase::Pushing(push) => {
                format!("during version {} (stage: {})", push.version, push.stage)
            }
        };
        let reason = format!("{member} was lost {during}: {reason}");
        refuse(seat.connection, reason.clone(), actions);
        actions.push(Action::Report(Report::Lost { rank: member, reason: reason.clone() }));
        match &mut self.phase {
            // The decision is taken: the others still learn it, and the trainers who did not confirm.
            Phase::Pushing(push) if push.stage == Stage::Committing => {
                if push.waiting.remove(&member) {
                    push.unconfirmed.push(member);
                }
                push.lost.get_or_insert(reason);
                if push.waiting.is_empty() {
                    self.finish(actions);
                }
            }
            Phase::Pushing(_) => {
                self.abort(Cause::Loss, reason.clone(), actions);
                self.end(Some(reason), actions);
            }
            _ => self.end(Some(reason), actions),
        }
    }

    pub(super) fn end(&mut self, reason: Option<String>, actions: &mut Actions) {
        if let Some(reason) = &reason {
            self.send_all(|_| true, ToMember::Refused { reason: reason.clone() }, actions);
        }
        for connection in self.members.keys() {
            actions.push(Action::Close(*connection));
        }
        self.phase = Phase::Ended;
        self.history.settled();
        actions.push(Action::Report(Report::Ended { reason }));
    }

    pub(super) fn tick(&mut self, now: Duration, actions: &mut Actions) {
        // Time in which this process itself did not run (it was stopped, or planned for long) is nobody's silence.
        let stalled = now.saturating_sub(std::mem::replace(&mut self.ticked_at, now));
        if stalled > STALL_TICKS * self.tick_interval() {
            for seat in self.seats.values_mut() {
                (seat.heard_at, seat.progress_at) = (now, now);
            }
            return self.send_all(|_| true, ToMember::Heartbeat, actions);
        }
        let deadline = self.config.deadline;
        let silence_max = deadline / SILENCE_DIVISOR;
        let silent = |seat: &Seat| !seat.left && now.saturating_sub(seat.heard_at) > silence_max;
        while let Some(member) = self.seats.iter().find(|(_, seat)| silent(seat)).map(|(member, _)| *member) {
            self.lose(member, &format!("nothing was heard from it for {silence_max:?}"), actions);
        }
        self.send_all(|_| true, ToMember::Heartbeat, actions);
        let late = |since: Duration| now.saturating_sub(since) > deadline;
        match &self.phase {
            Phase::Joining(Some(since)) if late(*since) => {
                let missing = self.config.world.members().filter(|member| !self.seats.contains_key(member));
                let reason = format!("waited {deadline:?} for {} to join", list(missing));
                self.end(Some(reason), actions);
            }
            Phase::Connecting { since, waiting } if late(*since) => {
                let reason =
                    format!("waited {deadline:?} for {} to connect its rails", list(waiting.iter().copied()));
                self.end(Some(reason), actions);
            }
            Phase::Pushing(push) => {
                // While it writes, a rank is late when it makes no progress; otherwise when the stage is.
                let is_late = |member: &Rank| match push.stage {
                    Stage::Writing | Stage::Verifying => {
                        self.seats.get(member).is_some_and(|seat| late(seat.progress_at))
                    }
                    _ => late(push.since),
                };
                let missing: Vec<Rank> = push.waiting.iter().copied().filter(is_late).collect();
                if missing.is_empty() {
                    return;
                }
                let reason = format!(
                    "version {}: waited {deadline:?} for {} {}",
                    push.version,
                    list(missing.iter().copied()),
                    push.stage.missing()
                );
                if push.stage == Stage::Committing {
                    for member in missing {
                        self.lose(
                            member,
                            &format!("waited {deadline:?} for it to confirm the commit"),
                            actions,
                        );
                    }
                } else {
                    self.abort(Cause::Deadline, reason, actions);
                }
            }
            _ => {}
        }
    }
}
