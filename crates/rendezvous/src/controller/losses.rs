//! Goodbyes, losses and deadlines.
//!
//! A loss is never silent: everybody who is left is told who was lost, and during what. What it does to the job is the job's
//! policy.

use std::time::Duration;

use xfer_plan::Rank;

use super::{
    Action, Actions, Cause, Controller, Phase, Report, SILENCE_DIVISOR, STALL_TICKS, Seat, Stage, list,
    refuse,
};
use crate::protocol::{OnLoss, ToMember};

impl Controller {
    pub(super) fn leave(&mut self, member: Rank, now: Duration, actions: &mut Actions) {
        let between_versions = match self.phase {
            Phase::Idle => true,
            // It need not know yet that it is to join again.
            Phase::Joining(_) => self.started,
            _ => false,
        };
        if !between_versions || matches!(member, Rank::Receiver(_)) {
            return self.expel(member, "it left", now, actions);
        }
        if let Some(seat) = self.seats.get_mut(&member) {
            (seat.left, seat.manifest) = (true, None);
            self.members.remove(&seat.connection);
            actions.push(Action::Close(seat.connection));
            actions.push(Action::Report(Report::Left(member)));
        }
        let joining = matches!(self.phase, Phase::Joining(_));
        let staying = self.seats.iter().filter(|(_, seat)| !seat.left);
        let trainers = staying.clone().filter(|(member, _)| matches!(member, Rank::Trainer(_)));
        if trainers.clone().any(|(member, _)| joining || self.assembly.contains(member)) {
            return;
        }
        for (member, seat) in staying {
            let message = match member {
                Rank::Receiver(_) => ToMember::Finished,
                // It came back when the last one left.
                Rank::Trainer(_) => ToMember::Refused { reason: "all other trainers have left".into() },
            };
            actions.push(Action::Send(seat.connection, message));
        }
        self.end(None, actions);
    }

    /// Gives up a member that has broken the protocol or has given up itself. It can come back as a new process only.
    pub(super) fn expel(&mut self, member: Rank, reason: &str, now: Duration, actions: &mut Actions) {
        self.part_with(member, reason, false, now, actions);
    }

    /// Gives up a member that is gone, silent or late. If it is still there, it may join over a new connection.
    pub(super) fn lose(&mut self, member: Rank, reason: &str, now: Duration, actions: &mut Actions) {
        self.part_with(member, reason, true, now, actions);
    }

    fn part_with(
        &mut self,
        member: Rank,
        reason: &str,
        may_return: bool,
        now: Duration,
        actions: &mut Actions,
    ) {
        let Some(seat) = self.seats.remove(&member) else {
            return;
        };
        self.members.remove(&seat.connection);
        self.history.lost(member);
        let during = match &self.phase {
            Phase::Ended => return actions.push(Action::Close(seat.connection)),
            Phase::Joining(_) => "while others joined".into(),
            Phase::Connecting { .. } => "while connecting".into(),
            Phase::Idle => "between versions".into(),
            Phase::Pushing(push) => {
                format!("during version {} (stage: {})", push.version, push.stage)
            }
        };
        let reason = format!("{member} was lost {during}: {reason}");
        if may_return && self.started && self.config.on_loss != OnLoss::Fail {
            actions.push(Action::Send(seat.connection, ToMember::Regroup { reason: reason.clone() }));
            actions.push(Action::Close(seat.connection));
        } else {
            refuse(seat.connection, reason.clone(), actions);
        }
        actions.push(Action::Report(Report::Lost { rank: member, reason: reason.clone() }));
        if self.started && self.config.on_loss == OnLoss::Continue {
            self.absent.insert(member);
        }
        // A rank that waits to take part in the next plan is no loss to this one.
        let took_part = self.assembly.remove(&member);
        match &mut self.phase {
            // It may be started again and join: nobody depends on it yet.
            Phase::Joining(_) if self.started => self.plan_if_complete(now, actions),
            Phase::Joining(_) | Phase::Ended => {}
            _ if !took_part => {}
            // The decision is taken: the others still learn it, and the trainers who did not confirm.
            Phase::Pushing(push) if push.stage.is_decided() => {
                if matches!(member, Rank::Receiver(_))
                    && (push.waiting.remove(&member) || push.stage == Stage::Recording)
                {
                    push.unconfirmed.push(member);
                }
                push.lost.get_or_insert(reason);
                if push.stage == Stage::Committing && push.waiting.is_empty() {
                    self.finish(now, actions);
                }
            }
            Phase::Pushing(_) => {
                self.abort(Cause::Loss, reason.clone(), now, actions);
                self.after_loss(reason, now, actions);
            }
            Phase::Connecting { .. } | Phase::Idle => self.after_loss(reason, now, actions),
        }
    }

    /// Ends the job or regroups. While trainers leave, no version can come: then there is nothing to regroup for.
    pub(super) fn after_loss(&mut self, reason: String, now: Duration, actions: &mut Actions) {
        match (self.config.on_loss, &self.phase) {
            // A rank that came back meanwhile has made the job regroup already.
            (_, Phase::Joining(_) | Phase::Ended) => {}
            (OnLoss::Fail, _) => self.end(Some(reason), actions),
            _ if self.seats.values().any(|seat| seat.left) => self.end(Some(reason), actions),
            _ => self.regroup(reason, now, actions),
        }
    }

    pub(super) fn end(&mut self, reason: Option<String>, actions: &mut Actions) {
        if let Some(reason) = &reason {
            self.tell_everyone(&ToMember::Refused { reason: reason.clone() }, actions);
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
            return self.tell_everyone(&ToMember::Heartbeat, actions);
        }
        let deadline = self.config.deadline;
        let silence_max = deadline / SILENCE_DIVISOR;
        let silent = |seat: &Seat| !seat.left && now.saturating_sub(seat.heard_at) > silence_max;
        while let Some(member) = self.seats.iter().find(|(_, seat)| silent(seat)).map(|(member, _)| *member) {
            self.lose(member, &format!("nothing was heard from it for {silence_max:?}"), now, actions);
        }
        self.tell_everyone(&ToMember::Heartbeat, actions);
        let late = |since: Duration| now.saturating_sub(since) > deadline;
        match &self.phase {
            Phase::Joining(Some(since)) if late(*since) => self.nobody_joins(now, actions),
            Phase::Connecting { since, waiting } if late(*since) => {
                let waited = format!("waited {deadline:?} for");
                if self.config.on_loss == OnLoss::Fail {
                    let late = list(waiting.iter().copied());
                    return self.end(Some(format!("{waited} {late} to connect its rails")), actions);
                }
                for member in waiting.clone() {
                    self.lose(member, &format!("{waited} it to connect its rails"), now, actions);
                }
            }
            Phase::Pushing(push) => {
                // While it writes, a rank is late when it makes no progress; otherwise when the stage is. Who passes on waits for
                // others: it is not late before all trainers have written, nor while anybody makes progress.
                let trainers_write = push.waiting.iter().any(|member| matches!(member, Rank::Trainer(_)));
                let progress_at = |member: &Rank| self.seats.get(member).map(|seat| seat.progress_at);
                let last_progress_at = self.quotas.keys().filter_map(progress_at).max();
                let is_late = |member: &Rank| match (push.stage, member) {
                    (Stage::Writing, Rank::Receiver(_)) => {
                        !trainers_write && last_progress_at.is_some_and(late)
                    }
                    (Stage::Writing | Stage::Verifying, _) => progress_at(member).is_some_and(late),
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
                        let reason = format!("waited {deadline:?} for it to confirm the commit");
                        self.lose(member, &reason, now, actions);
                    }
                } else {
                    self.abort(Cause::Deadline, reason, now, actions);
                }
            }
            _ => {}
        }
    }

    /// Somebody waits to push, and others have not joined within the deadline.
    fn nobody_joins(&mut self, now: Duration, actions: &mut Actions) {
        let waited = format!("waited {:?} for", self.config.deadline);
        let missing = self.missing();
        let named = list(missing.iter().copied());
        if !self.started {
            return self.end(Some(format!("{waited} {named} to join")), actions);
        }
        if self.config.on_loss == OnLoss::Continue {
            self.absent.extend(missing);
            self.plan_if_complete(now, actions);
        }
        if let Phase::Joining(_) = self.phase {
            let hindrance =
                self.hindrance.iter().map(|reason| format!(" (without: {reason})")).collect::<String>();
            self.lapse(&format!("{waited} {named} to join again{hindrance}"), actions);
        }
    }

    /// To all who have joined, whether they take part in the present plan or not.
    fn tell_everyone(&self, message: &ToMember, actions: &mut Actions) {
        let seats = self.seats.values().filter(|seat| !seat.left);
        actions.extend(seats.map(|seat| Action::Send(seat.connection, message.clone())));
    }
}
