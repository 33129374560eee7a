//! What a rank's time goes to. It must never lose a nanosecond: exposed times add up to the time that has passed.

use crate::time::Time;

/// A stage, in the order of [`PipelineReport::STAGES`](super::PipelineReport::STAGES).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Gather,
    Quantise,
    Fuse,
    Copy,
    Submit,
    Transfer,
    Wait,
}

/// Number of stages.
pub(super) const STAGES: usize = 7;

/// One rank's account.
#[derive(Clone, Debug, Default)]
pub(super) struct StageClock {
    since: Time,
    active: [bool; STAGES],
    /// In nanoseconds.
    pub(super) exposed: [u64; STAGES],
    /// In nanoseconds.
    pub(super) busy: [u64; STAGES],
}

impl StageClock {
    /// From now on a stage is under way, or is not.
    pub(super) fn set(&mut self, now: Time, stage: Stage, active: bool) {
        if self.active[stage as usize] != active {
            self.pass(now);
            self.active[stage as usize] = active;
        }
    }

    /// Accounts for the time until now. A rank of which nothing is under way waits.
    pub(super) fn pass(&mut self, now: Time) {
        let passed = now.nanos().saturating_sub(self.since.nanos());
        self.since = now;
        let first = self.active.iter().position(|active| *active);
        self.exposed[first.unwrap_or(Stage::Wait as usize)] += passed;
        for (busy, active) in self.busy.iter_mut().zip(self.active) {
            *busy += if active { passed } else { 0 };
        }
    }
}
