//! From the beginning of a version to its commit, or to the end of the attempt without one.
//!
//! A version is committed at one point only: `Controller::commit`. The decision is on record before anybody is told, and what
//! is on record is never taken back.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use xfer_plan::Rank;

use super::push::{Push, Stage};
use super::{Action, Actions, Cause, Controller, Phase, Quota, Report};
use crate::protocol::{Commit, Fence, Holds, PushId, ToMember};

impl Controller {
    pub(super) fn begin(&mut self, member: Rank, version: u64, now: Duration, actions: &mut Actions) {
        let Rank::Trainer(_) = member else {
            return self.expel(member, "only trainers begin versions", now, actions);
        };
        let committed = self.committed();
        // The committed version again, for those who have not got it.
        let repeats = version == committed && version > 0 && !self.behind().is_empty();
        if version <= committed && !repeats {
            let reason = format!("version {version} is not newer than the committed version {committed}");
            return self.reply(member, ToMember::Abort { version, reason }, actions);
        }
        match &mut self.phase {
            Phase::Idle => {
                let id = self.next_push_id(version);
                let mut waiting: BTreeSet<Rank> = self.trainers().collect();
                waiting.remove(&member);
                self.phase = Phase::Pushing(Push {
                    version,
                    id,
                    stage: Stage::Collecting,
                    since: now,
                    began_at: now,
                    waiting,
                    sums: BTreeMap::new(),
                    unconfirmed: Vec::new(),
                    lost: None,
                });
            }
            Phase::Pushing(push) if push.stage == Stage::Collecting && push.version == version => {
                if !push.waiting.remove(&member) {
                    return self.expel(member, "it began the same version twice", now, actions);
                }
            }
            Phase::Pushing(push) if push.stage == Stage::Collecting => {
                let reason =
                    format!("{member} began version {version} while others began version {}", push.version);
                self.abort(Cause::Disagreement, reason.clone(), now, actions);
                return self.reply(member, ToMember::Abort { version, reason }, actions);
            }
            _ => {
                return self.expel(member, "it began a version before the last one ended", now, actions);
            }
        }
        let has_left = |trainer: &Rank| self.seats.get(trainer).is_none_or(|seat| seat.left);
        let gone = self.trainers().find(has_left);
        if let Some(gone) = gone {
            return self.abort(Cause::Disagreement, format!("{gone} has left the job"), now, actions);
        }
        if self.nobody_waited_for() {
            self.enter(Stage::Stopping, now, actions);
        }
    }

    /// `member` has done what `stage` waits for.
    pub(super) fn advance(
        &mut self,
        member: Rank,
        push: PushId,
        stage: Stage,
        now: Duration,
        actions: &mut Actions,
    ) {
        match &mut self.phase {
            Phase::Pushing(current) if current.id == push && current.stage == stage => {
                if !current.waiting.remove(&member) {
                    return self.expel(member, "it answered what it was not asked", now, actions);
                }
                self.history.advanced(member, stage, current.version);
            }
            // An answer to an attempt that has ended meanwhile.
            _ => return,
        }
        if let Some(seat) = self.seats.get_mut(&member) {
            seat.progress_at = now;
            if stage == Stage::Committing {
                seat.holds = self.committed.map_or(Holds::Nothing, Holds::Version);
            }
        }
        if let (Stage::Preparing | Stage::Fencing, Rank::Receiver(rank)) = (stage, member) {
            // It was told all that there is: who writes says what it owes before the stage begins.
            self.fences.retain(|fence| fence.at != rank);
        }
        if self.nobody_waited_for() {
            match stage {
                Stage::Collecting | Stage::Stopping | Stage::Committing | Stage::Recording => {
                    self.finish(now, actions);
                }
                Stage::Measuring => self.enter(Stage::Preparing, now, actions),
                Stage::Preparing => self.enter(Stage::Writing, now, actions),
                Stage::Writing if !self.fences.is_empty() => self.enter(Stage::Fencing, now, actions),
                Stage::Writing | Stage::Fencing if self.config.verify.is_on() => {
                    self.enter(Stage::Verifying, now, actions);
                }
                Stage::Writing | Stage::Fencing | Stage::Verifying => self.commit(now, actions),
            }
        }
    }

    pub(super) fn written(
        &mut self,
        member: Rank,
        push: PushId,
        quota: Quota,
        now: Duration,
        actions: &mut Actions,
    ) {
        match self.quotas.get(&member) {
            Some(planned) if *planned == quota => self.advance(member, push, Stage::Writing, now, actions),
            Some(planned) => {
                let reason = format!(
                    "it reports {} bytes in {} writes where the plan has {} bytes in {} writes",
                    quota.bytes, quota.writes, planned.bytes, planned.writes
                );
                self.expel(member, &reason, now, actions);
            }
            None => self.expel(member, "the plan has nothing for it to write", now, actions),
        }
    }

    pub(super) fn failed(
        &mut self,
        member: Rank,
        push: PushId,
        reason: String,
        now: Duration,
        actions: &mut Actions,
    ) {
        match &self.phase {
            Phase::Pushing(current) if current.id != push => {}
            // The decision is taken: who cannot follow it is lost.
            Phase::Pushing(current) if current.stage.is_decided() => {
                self.expel(member, &format!("it failed after the commit: {reason}"), now, actions);
            }
            Phase::Pushing(_) => self.abort(Cause::Failure, format!("{member}: {reason}"), now, actions),
            _ => {}
        }
    }

    /// `member` writes nothing any more for the attempt `push`.
    pub(super) fn stopped(&mut self, member: Rank, push: PushId, now: Duration, actions: &mut Actions) {
        if self.relaying.get(&member) != Some(&push) {
            return;
        }
        self.relaying.remove(&member);
        if let Phase::Pushing(current) = &mut self.phase
            && current.stage == Stage::Stopping
            && current.waiting.remove(&member)
            && current.waiting.is_empty()
        {
            self.enter(Stage::Measuring, now, actions);
        }
    }

    /// Remembers rails that have to be closed.
    pub(super) fn owe(&mut self, fences: Vec<Fence>) {
        let known = |fence: &Fence| self.assembly.contains(&Rank::Receiver(fence.at));
        self.fences.extend(fences.into_iter().filter(known));
    }

    pub(super) fn enter(&mut self, stage: Stage, now: Duration, actions: &mut Actions) {
        let waiting: BTreeSet<Rank> = match stage {
            Stage::Recording => BTreeSet::new(),
            Stage::Collecting => self.trainers().collect(),
            // What an inference rank still passes on could arrive in the next attempt, and count for it.
            Stage::Stopping => self.relaying.keys().copied().collect(),
            Stage::Measuring => self.start_measuring(),
            Stage::Preparing | Stage::Verifying | Stage::Committing => self.receivers().collect(),
            Stage::Writing => self.quotas.keys().copied().collect(),
            Stage::Fencing => self.fences.iter().map(|fence| Rank::Receiver(fence.at)).collect(),
        };
        for seat in self.seats.values_mut() {
            (seat.progress, seat.progress_at) = (0, now);
        }
        self.history.entered();
        let Phase::Pushing(push) = &mut self.phase else {
            return;
        };
        (push.stage, push.since, push.waiting) = (stage, now, waiting.clone());
        let (id, version) = (push.id, push.version);
        let mut sums = match stage {
            Stage::Verifying => std::mem::take(&mut push.sums),
            _ => BTreeMap::new(),
        };
        if stage == Stage::Stopping {
            push.began_at = now;
            if waiting.is_empty() {
                return self.enter(Stage::Measuring, now, actions);
            }
        }
        if stage == Stage::Measuring && waiting.is_empty() {
            return self.enter(Stage::Preparing, now, actions);
        }
        if stage == Stage::Preparing {
            actions.push(Action::Report(Report::Pushing { version, push: id }));
            // They pass on what arrives from the moment that they are prepared.
            let relays = self.quotas.keys().filter(|member| matches!(member, Rank::Receiver(_)));
            self.relaying = relays.map(|member| (*member, id)).collect();
            for member in &waiting {
                if let Some(seat) = self.seats.get_mut(member) {
                    seat.holds = Holds::Torn;
                }
            }
        }
        let bank = self.bank;
        for member in waiting {
            let rails = self.fences.iter().filter(|fence| Rank::Receiver(fence.at) == member);
            let rails = rails.map(|fence| fence.rail).collect();
            let message = match (stage, member) {
                (Stage::Collecting | Stage::Stopping | Stage::Recording, _)
                | (Stage::Writing, Rank::Receiver(_)) => continue,
                (Stage::Verifying, Rank::Trainer(_)) => continue,
                (Stage::Verifying, Rank::Receiver(rank)) => {
                    let sums = sums.remove(&rank).unwrap_or_default().into_iter().collect();
                    ToMember::Verify { push: id, sums }
                }
                (Stage::Measuring, _) => ToMember::Measure { push: id, version },
                (Stage::Preparing, _) => ToMember::Prepare { push: id, version, fence: rails, bank },
                (Stage::Writing, Rank::Trainer(rank)) => {
                    ToMember::Write { push: id, version, bank, told: self.told(rank) }
                }
                (Stage::Fencing, _) => ToMember::Fence { push: id, rails },
                (Stage::Committing, _) => ToMember::Commit { push: id, version },
            };
            self.reply(member, message, actions);
        }
    }

    /// The decision: everyone who writes has reported every byte of its part, and nobody found others. It is recorded
    /// before anybody is told.
    pub(super) fn commit(&mut self, now: Duration, actions: &mut Actions) {
        if let Phase::Pushing(push) = &self.phase {
            actions.push(Action::Record(Commit { version: push.version, push: push.id }));
            self.enter(Stage::Recording, now, actions);
        }
    }

    /// The decision is on record: nothing else sets `committed`. Where it could not be recorded, nobody knows what the
    /// next controller will find there, so nobody may be told anything: the job ends.
    pub(super) fn recorded(&mut self, result: Result<(), String>, now: Duration, actions: &mut Actions) {
        let Phase::Pushing(push) = &self.phase else { return };
        if push.stage != Stage::Recording {
            return;
        }
        let (version, id, elapsed) = (push.version, push.id, now.saturating_sub(push.began_at));
        if let Err(reason) = result {
            let reason = format!("the commit of version {version} could not be recorded: {reason}");
            return self.end(Some(reason), actions);
        }
        self.history.ended(push, None);
        self.committed = Some(Commit { version, push: id });
        self.bank = self.bank.turned();
        actions.push(Action::Report(Report::Committed { version, push: id, elapsed }));
        self.enter(Stage::Committing, now, actions);
        // All inference ranks may have been lost meanwhile.
        if self.nobody_waited_for() {
            self.finish(now, actions);
        }
    }

    /// All inference ranks that are still there have confirmed the commit.
    pub(super) fn finish(&mut self, now: Duration, actions: &mut Actions) {
        if let Phase::Pushing(push) = std::mem::replace(&mut self.phase, Phase::Idle) {
            let message =
                ToMember::Done { push: push.id, version: push.version, unconfirmed: push.unconfirmed };
            self.send_all(|member| matches!(member, Rank::Trainer(_)), message, actions);
            match push.lost {
                Some(reason) => self.after_loss(reason, now, actions),
                None => self.let_in(now, actions),
            }
        }
    }

    /// Ends the attempt without a commit. The job goes on.
    pub(super) fn abort(&mut self, cause: Cause, reason: String, now: Duration, actions: &mut Actions) {
        let Phase::Pushing(push) = std::mem::replace(&mut self.phase, Phase::Idle) else {
            return;
        };
        self.history.ended(&push, Some(reason.clone()));
        let version = push.version;
        let message = ToMember::Abort { version, reason: reason.clone() };
        // A trainer that has not begun, or an inference rank that was not told, knows of no attempt.
        let involved = |member: Rank| match member {
            Rank::Trainer(_) => push.stage != Stage::Collecting || !push.waiting.contains(&member),
            Rank::Receiver(_) => push.stage >= Stage::Preparing,
        };
        self.send_all(involved, message, actions);
        let (push, stage) = (push.id, push.stage);
        actions.push(Action::Report(Report::Aborted { version, push, stage, cause, reason }));
        self.let_in(now, actions);
    }

    fn next_push_id(&mut self, version: u64) -> PushId {
        self.attempts += 1;
        let mut hasher = blake3::Hasher::new_keyed(&self.config.seed);
        hasher.update(&version.to_le_bytes()).update(&self.attempts.to_le_bytes());
        let mut id = [0; 16];
        hasher.finalize_xof().fill(&mut id);
        PushId(id)
    }
}
