//! One tortured job, from its first process to the end of its last.
//!
//! It starts, faults fall for a time, everything is healed, everybody has to take part again within a bounded time, and then the
//! trainers leave and every process has to end well. The first thing that must not be ends it with an error.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use weightsync_lab::Lab;

use super::cast::{Cast, Line, Setting};
use super::eye::recorded;
use super::fault::{Blow, Fault, Schedule, Who};
use super::judge::Judge;
use super::rank::{Said, WRONG};
use super::tally::Tally;
use super::weights::WORLD;
use crate::soak::left::SharedMemory;

/// How often processes are looked at.
const TICK: Duration = Duration::from_millis(10);

/// Until the first commit.
const START_MAX: Duration = Duration::from_secs(60);

/// After the last fault, until everybody takes part again; and then until every process has ended.
const RECOVERY_DEADLINES: u32 = 12;

/// How long a fault waits for a push to fall into.
const PUSH_MAX: Duration = Duration::from_millis(500);

/// A process that gave up by itself is started again after this time.
const AGAIN: Duration = Duration::from_millis(300);

/// Versions that are pushed when all is well again, before the trainers leave.
const LAST_PUSHES: u64 = 5;

/// Blows that a failure shows.
pub(super) const BLOWS_SHOWN: usize = 12;

/// See the module.
pub(super) struct Phase<'a> {
    deadline: Duration,
    cast: Cast,
    lines: Receiver<Line>,
    judge: Judge,
    tally: &'a mut Tally,
    /// When a push began last.
    pushing: Option<Instant>,
    heals: Vec<Heal>,
    began: Instant,
    /// What fell when, in words.
    blows: Vec<String>,
    /// Of each inference rank's present process: bytes and looks.
    seen: [(u64, u64); WORLD.inference as usize],
    /// What each rank took part in last.
    part: std::collections::BTreeMap<Who, u64>,
}

struct Heal {
    at: Instant,
    blow: Blow,
    number: Option<usize>,
}

/// How a job ended that did not end well.
pub(super) struct Failure {
    pub(super) error: anyhow::Error,
    /// The last that fell before it.
    pub(super) blows: Vec<String>,
}

/// Runs it; `show` is called now and then with the newest version.
pub(super) fn run(
    setting: Setting,
    lab: Option<Lab>,
    seed: u64,
    length: Duration,
    tally: &mut Tally,
    show: &mut dyn FnMut(&Tally, u64),
) -> Result<(), Failure> {
    let before = SharedMemory::now();
    let (send, lines) = mpsc::channel();
    let links = lab.as_ref().map_or(0, |lab| lab.options().links);
    let deadline = setting.deadline;
    let cast = Cast::new(setting, lab, send).map_err(|error| Failure { error, blows: Vec::new() })?;
    let mut phase = Phase {
        deadline,
        cast,
        lines,
        judge: Judge::default(),
        tally,
        pushing: None,
        heals: Vec::new(),
        began: Instant::now(),
        blows: Vec::new(),
        seen: Default::default(),
        part: Default::default(),
    };
    let schedule = Schedule::new(seed, deadline, links);
    let ran = phase.whole(schedule, length, &before, show);
    (0..WORLD.inference).for_each(|rank| phase.count_seen(rank));
    phase.tally.ends();
    let skip = phase.blows.len().saturating_sub(BLOWS_SHOWN);
    ran.map_err(|error| Failure { error, blows: phase.blows.split_off(skip) })
}

impl Phase<'_> {
    fn whole(
        &mut self,
        mut schedule: Schedule,
        length: Duration,
        before: &SharedMemory,
        show: &mut dyn FnMut(&Tally, u64),
    ) -> anyhow::Result<()> {
        Who::all().try_for_each(|who| self.cast.start(who))?;
        self.until(START_MAX, "the first commit", |phase| phase.judge.newest() > 0)?;
        let end = Instant::now() + length;
        while let Some(fault) = schedule.next()
            && Instant::now() < end
        {
            self.strike(fault, end)?;
            show(self.tally, self.judge.newest());
        }
        self.heal_all()?;
        let newest = self.judge.newest();
        let recovery = RECOVERY_DEADLINES * self.deadline;
        self.until(recovery, "everybody to take part again", |phase| {
            let ranks = Who::all().filter(|who| *who != Who::Controller);
            phase.heals.is_empty()
                && ranks.into_iter().all(|who| phase.part.get(&who).is_some_and(|at| *at > newest))
        })?;
        let last = (self.judge.newest() + LAST_PUSHES).to_string();
        (0..WORLD.trainers).try_for_each(|rank| self.cast.tell(Who::Trainer(rank), &last))?;
        self.end(recovery)?;
        self.judge.end(self.recorded()?, 0..WORLD.inference).map_err(|wrong| anyhow!(wrong))?;
        let orphans = self.cast.orphans();
        if !orphans.is_empty() {
            bail!("processes that are left: {orphans:?}");
        }
        let left = before.left_by(&self.cast.pids);
        if !left.is_empty() {
            bail!("left in /dev/shm: {}", left.join(", "));
        }
        Ok(())
    }

    /// Waits for it, and for the moment in a push, and strikes.
    fn strike(&mut self, fault: Fault, end: Instant) -> anyhow::Result<()> {
        let due = (Instant::now() + fault.after).min(end);
        while Instant::now() < due {
            self.step(due)?;
        }
        let aimed = fault.into_push.is_some();
        if let Some(into_push) = fault.into_push {
            self.pushing = None;
            let until = Instant::now() + PUSH_MAX;
            while self.pushing.is_none() && Instant::now() < until {
                self.step(until)?;
            }
            if let Some(pushing) = self.pushing {
                std::thread::sleep((pushing + into_push).saturating_duration_since(Instant::now()));
            }
        }
        for (blow, length) in fault.blows {
            let is_up = blow.who().is_none_or(|who| self.cast.is_running(who));
            let is_same =
                |heal: &Heal| heal.blow == blow || blow.who().is_some_and(|who| heal.blow.who() == Some(who));
            // What is down already cannot be struck.
            if !is_up || self.heals.iter().any(is_same) {
                continue;
            }
            let at = Instant::now();
            self.blows.push(format!("{:8.3} s  {blow:?} for {length:?}", (at - self.began).as_secs_f64()));
            match blow {
                Blow::Kill(who) => {
                    self.cast.kill(who)?;
                    self.is_gone(who)?;
                }
                // It goes on with its write when it wakes, and others should be further by then.
                Blow::Stop(who @ Who::Trainer(_)) if aimed && length >= self.deadline / 2 => {
                    self.cast.stop_in_a_write(who)?;
                }
                Blow::Stop(who) => self.cast.stop(who)?,
                Blow::LinkDown { on_trainers, link } => self.cast.set_link(on_trainers, link, false)?,
                Blow::NoAddress { on_trainers, link } => self.cast.set_address(on_trainers, link, false)?,
                Blow::ControlDown { on_trainers } => self.cast.set_control(on_trainers, false)?,
            }
            let number = self.tally.falls(blow, at);
            self.heals.push(Heal { at: Instant::now() + length, blow, number: Some(number) });
        }
        Ok(())
    }

    fn heal(&mut self, heal: Heal) -> anyhow::Result<()> {
        let now = Instant::now();
        match heal.blow {
            Blow::Kill(who) => self.cast.start(who)?,
            Blow::Stop(who) => self.cast.resume(who)?,
            Blow::LinkDown { on_trainers, link } => self.cast.set_link(on_trainers, link, true)?,
            Blow::NoAddress { on_trainers, link } => self.cast.set_address(on_trainers, link, true)?,
            Blow::ControlDown { on_trainers } => self.cast.set_control(on_trainers, true)?,
        }
        if let Some(number) = heal.number {
            self.tally.healed(number, now);
        }
        Ok(())
    }

    fn heal_all(&mut self) -> anyhow::Result<()> {
        std::mem::take(&mut self.heals).into_iter().try_for_each(|heal| self.heal(heal))?;
        Who::all().try_for_each(|who| self.cast.resume(who))
    }

    /// Lets the job run until this holds.
    fn until(&mut self, at_most: Duration, what: &str, holds: impl Fn(&Self) -> bool) -> anyhow::Result<()> {
        let until = Instant::now() + at_most;
        while !holds(self) {
            if Instant::now() > until {
                bail!(
                    "waited {at_most:?} for {what}; the newest version is {}, {:?}",
                    self.judge.newest(),
                    self.part
                );
            }
            self.step(until)?;
        }
        Ok(())
    }

    /// Lets time pass: takes what was said, heals what is due, and sees who has ended by itself.
    fn step(&mut self, until: Instant) -> anyhow::Result<()> {
        let wait = TICK.min(until.saturating_duration_since(Instant::now()));
        match self.lines.recv_timeout(wait) {
            Ok(line) => self.hear(line)?,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => bail!("defect: nobody can say anything any more"),
        }
        let now = Instant::now();
        while let Some(due) = self.heals.iter().position(|heal| heal.at <= now) {
            let heal = self.heals.swap_remove(due);
            self.heal(heal)?;
        }
        for (who, status) in self.cast.ended()? {
            self.hear_all()?;
            self.is_gone(who)?;
            match (who, status.code()) {
                (Who::Controller, _) => {
                    bail!("the controller ended with {status}, though ranks may come back")
                }
                (_, Some(code)) if code != WRONG => {}
                _ => bail!("{who} ended with {status}"),
            }
            self.heals.push(Heal { at: now + AGAIN, blow: Blow::Kill(who), number: None });
        }
        Ok(())
    }

    /// A process has ended: what it compared counts, and what it had recorded is committed.
    fn is_gone(&mut self, who: Who) -> anyhow::Result<()> {
        if who == Who::Controller {
            let recorded = self.recorded()?;
            // What it has said of that may not have come yet.
            self.hear_all()?;
            if recorded > 0 {
                self.judge.commits(recorded).map_err(|wrong| anyhow!(wrong))?;
            }
        }
        if let Who::Inference(rank) = who {
            self.count_seen(rank);
        }
        Ok(())
    }

    /// The version of the controller's record; 0 before the first.
    fn recorded(&self) -> anyhow::Result<u64> {
        let (record, newest) = (self.cast.record(), self.judge.newest());
        match recorded(&record)? {
            None if newest > 0 => {
                bail!(
                    "this run cannot judge: version {newest} was committed, and {} is gone",
                    record.display()
                )
            }
            version => Ok(version.unwrap_or(0)),
        }
    }

    fn count_seen(&mut self, rank: u32) {
        if let Some(seen) = self.seen.get_mut(rank as usize) {
            let (bytes, looks) = std::mem::take(seen);
            self.tally.figures.bytes_checked += bytes;
            self.tally.figures.looks += looks;
        }
    }

    fn hear_all(&mut self) -> anyhow::Result<()> {
        // Threads read what a process has said, also after its end; they need a moment.
        std::thread::sleep(Duration::from_millis(5));
        while let Ok(line) = self.lines.try_recv() {
            self.hear(line)?;
        }
        Ok(())
    }

    fn hear(&mut self, Line { who, at, text }: Line) -> anyhow::Result<()> {
        if who == Who::Controller {
            return self.hear_controller(at, &text);
        }
        let said = serde_json::from_str(&text).with_context(|| format!("{who} said '{text}'"))?;
        match (who, said) {
            (_, Said::Wrong { what }) => bail!("{who}: {what}"),
            // A NIC that is down cannot be opened anew. Nothing else ends a session that was once part of the job.
            (_, Said::GaveUp { connected: true, reason }) if !self.cast.has_links() => {
                bail!("{who} gave up: {reason}");
            }
            (_, Said::GaveUp { connected, .. }) => {
                let since = if connected { "for want of a NIC" } else { "before it was part of the job" };
                *self.tally.figures.gave_up.entry(format!("{}, {since}", who.role())).or_default() += 1;
            }
            (Who::Inference(rank), Said::Served { version, bytes, looks }) => {
                if let Some(seen) = self.seen.get_mut(rank as usize) {
                    *seen = (bytes, looks);
                }
                self.judge.serves(rank, version).map_err(|wrong| anyhow!(wrong))?;
                self.tally.takes_part(Some(who), at);
                self.part.insert(who, version);
            }
            (Who::Trainer(_), Said::Pushed { version }) => {
                self.tally.takes_part(Some(who), at);
                self.part.insert(who, version);
            }
            (Who::Inference(rank), Said::Ended { bytes, looks }) => {
                if let Some(seen) = self.seen.get_mut(rank as usize) {
                    *seen = (bytes, looks);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn hear_controller(&mut self, at: Instant, text: &str) -> anyhow::Result<()> {
        let report: serde_json::Value =
            serde_json::from_str(text).with_context(|| format!("the controller said '{text}'"))?;
        match report["event"].as_str() {
            Some("pushing") => self.pushing = Some(at),
            Some("aborted") => self.tally.figures.aborted += 1,
            Some("regrouping") => self.tally.figures.regroups += 1,
            Some("committed") => {
                let version = report["version"].as_u64().context("a commit without a version")?;
                self.judge.commits(version).map_err(|wrong| anyhow!(wrong))?;
                self.tally.commits(at);
            }
            _ => {}
        }
        Ok(())
    }

    /// Waits until every process has ended by itself, and well.
    fn end(&mut self, at_most: Duration) -> anyhow::Result<()> {
        let until = Instant::now() + at_most;
        while !self.cast.is_empty() {
            if Instant::now() > until {
                bail!(
                    "{} did not end within {at_most:?} after the trainers were told to leave",
                    self.cast.names()
                );
            }
            if let Ok(line) = self.lines.recv_timeout(TICK) {
                self.hear(line)?;
            }
            for (who, status) in self.cast.ended()? {
                if !status.success() {
                    self.hear_all()?;
                    bail!("{who} ended with {status} when the trainers left");
                }
            }
        }
        self.hear_all()
    }
}
