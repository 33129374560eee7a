//! What happened, in figures: faults by kind, what the job did meanwhile, and how long it took to go on.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::fault::{Blow, Who};

/// A blow that fell.
struct Fallen {
    who: Option<Who>,
    at: Instant,
    healed: Option<Instant>,
    is_followed: bool,
    is_back: bool,
}

/// See the module.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) figures: Figures,
    fallen: Vec<Fallen>,
    until_commit: Vec<Duration>,
    until_back: Vec<Duration>,
}

/// What is counted.
#[derive(Default, Serialize)]
pub(super) struct Figures {
    pub(super) faults: BTreeMap<String, u64>,
    pub(super) committed: u64,
    pub(super) aborted: u64,
    pub(super) regroups: u64,
    /// Processes that ended because their session could not go on, or never came to be; and were started again.
    pub(super) gave_up: BTreeMap<String, u64>,
    /// Looks at a version that was served from beginning to end of the look.
    pub(super) looks: u64,
    pub(super) bytes_checked: u64,
}

/// Lengths of time of one kind, in seconds.
#[derive(Default, Serialize)]
pub(super) struct Times {
    pub(super) count: usize,
    pub(super) median: f64,
    pub(super) longest: f64,
}

impl Times {
    fn of(times: &[Duration]) -> Self {
        let mut seconds: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
        seconds.sort_by(f64::total_cmp);
        let at = |at: usize| seconds.get(at).copied().unwrap_or(0.0);
        Self {
            count: seconds.len(),
            median: at(seconds.len() / 2),
            longest: at(seconds.len().saturating_sub(1)),
        }
    }
}

impl Tally {
    /// A blow falls. Returns its number, for [`Tally::healed`].
    pub(super) fn falls(&mut self, blow: Blow, at: Instant) -> usize {
        *self.figures.faults.entry(blow.kind()).or_default() += 1;
        self.fallen.push(Fallen { who: blow.who(), at, healed: None, is_followed: false, is_back: false });
        self.fallen.len() - 1
    }

    /// What a blow hit runs again.
    pub(super) fn healed(&mut self, number: usize, at: Instant) {
        if let Some(fallen) = self.fallen.get_mut(number) {
            fallen.healed = Some(at);
        }
    }

    /// A version is committed.
    pub(super) fn commits(&mut self, at: Instant) {
        self.figures.committed += 1;
        for fallen in self.fallen.iter_mut().filter(|fallen| !fallen.is_followed && fallen.at < at) {
            fallen.is_followed = true;
            self.until_commit.push(at - fallen.at);
        }
        self.takes_part(Some(Who::Controller), at);
        self.takes_part(None, at);
    }

    /// A rank serves a version, or has pushed one.
    pub(super) fn takes_part(&mut self, who: Option<Who>, at: Instant) {
        for fallen in self.fallen.iter_mut().filter(|fallen| fallen.who == who && !fallen.is_back) {
            if let Some(healed) = fallen.healed.filter(|healed| *healed < at) {
                fallen.is_back = true;
                self.until_back.push(at - healed);
            }
        }
    }

    /// A job is over: what was not followed by anything in it never will be.
    pub(super) fn ends(&mut self) {
        self.fallen.clear();
    }

    pub(super) fn faults(&self) -> u64 {
        self.figures.faults.values().sum()
    }

    /// From a fault to the next commit.
    pub(super) fn until_commit(&self) -> Times {
        Times::of(&self.until_commit)
    }

    /// From the moment that what was hit runs again until it takes part in a commit.
    pub(super) fn until_back(&self) -> Times {
        Times::of(&self.until_back)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_taken_from_each_fault() {
        let (mut tally, start) = (Tally::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let rank = Who::Inference(1);
        let killed = tally.falls(Blow::Kill(rank), at(1));
        let stopped = tally.falls(Blow::Stop(Who::Controller), at(3));
        tally.healed(stopped, at(4));
        tally.commits(at(6));
        tally.takes_part(Some(rank), at(7));
        tally.healed(killed, at(8));
        tally.commits(at(10));
        tally.takes_part(Some(rank), at(11));
        tally.takes_part(Some(rank), at(15));
        let (commit, back) = (tally.until_commit(), tally.until_back());
        assert_eq!((commit.count, commit.median, commit.longest), (2, 5.0, 5.0));
        assert_eq!((back.count, back.median, back.longest), (2, 3.0, 3.0));
        assert_eq!((tally.faults(), tally.figures.committed), (2, 2));
    }

    #[test]
    fn no_times_are_none() {
        let times = Times::of(&[]);
        assert_eq!((times.count, times.median, times.longest), (0, 0.0, 0.0));
    }
}
