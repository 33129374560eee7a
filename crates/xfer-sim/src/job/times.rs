//! Where a rank's time goes: what it waits for, moment by moment.

use super::report::Stage;
use crate::time::Time;

/// What is under way for a rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct UnderWay {
    pub(super) over_nics: u32,
    pub(super) over_nvlink: u32,
    pub(super) stages: u32,
    pub(super) launches: u32,
}

/// See the module. Starts with each push.
#[derive(Clone, Debug, Default)]
pub(super) struct Times {
    pub(super) began: Time,
    pub(super) written: Option<Time>,
    pub(super) under_way: UnderWay,
    pub(super) bytes: u64,
    /// Whether it has nothing to do but what arrives.
    pub(super) passes_on: bool,
    nanoseconds: [u64; Stage::ALL.len()],
    since: Time,
}

impl Times {
    /// A push begins.
    pub(super) fn begin(&mut self, now: Time, passes_on: bool) {
        *self = Times { began: now, since: now, passes_on, ..Times::default() };
    }

    /// Counts the time until now, then changes what is under way.
    pub(super) fn change(&mut self, now: Time, change: impl FnOnce(&mut UnderWay)) {
        self.settle(now);
        change(&mut self.under_way);
    }

    /// Its last WRITE is delivered.
    pub(super) fn end(&mut self, now: Time) {
        self.settle(now);
        self.written = Some(now);
    }

    fn settle(&mut self, now: Time) {
        if self.written.is_none() {
            self.nanoseconds[self.waits_for() as usize] += now.nanos_since(self.since);
        }
        self.since = now;
    }

    /// Of several things under way the one that is worth it: the rest is hidden behind.
    fn waits_for(&self) -> Stage {
        let UnderWay { over_nics, over_nvlink, stages, launches } = self.under_way;
        match () {
            () if over_nics > 0 => Stage::Transfer,
            () if over_nvlink > 0 => Stage::Nvlink,
            () if stages > 0 => Stage::Transform,
            () if launches == 0 && self.passes_on => Stage::Arrivals,
            () => Stage::Post,
        }
    }

    /// What it waited for, in seconds.
    pub(super) fn stages(&self) -> impl Iterator<Item = (Stage, f64)> + '_ {
        let seconds = self.nanoseconds.iter().map(|nanoseconds| *nanoseconds as f64 / 1e9);
        Stage::ALL.into_iter().zip(seconds).filter(|(_, seconds)| *seconds > 0.0)
    }
}
