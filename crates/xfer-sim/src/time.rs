//! Virtual time: whole nanoseconds since the simulation began.
//!
//! Integers, so that two runs agree to the bit and an hour is as fine as a microsecond. It must never be read from a clock.

use core::fmt;
use core::time::Duration;

/// A moment of a simulation. 64 bits of nanoseconds last 584 years.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(u64);

impl Time {
    /// When the simulation begins.
    pub const ZERO: Time = Time(0);

    /// That many nanoseconds after the beginning.
    pub const fn from_nanos(nanoseconds: u64) -> Time {
        Time(nanoseconds)
    }

    /// Nanoseconds since the beginning.
    pub const fn nanos(self) -> u64 {
        self.0
    }

    /// Nanoseconds later, or the last moment that there is.
    #[must_use]
    pub const fn plus_nanos(self, nanoseconds: u64) -> Time {
        Time(self.0.saturating_add(nanoseconds))
    }

    /// Later by `duration`, or the last moment that there is.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Time {
        self.plus_nanos(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX))
    }

    /// How long after `earlier`; zero if it is not.
    pub const fn since(self, earlier: Time) -> Duration {
        Duration::from_nanos(self.nanos_since(earlier))
    }

    /// How many nanoseconds after `earlier`; 0 if it is not.
    pub const fn nanos_since(self, earlier: Time) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Time {
    /// In milliseconds, to the nanosecond: `1.250000 ms`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:06} ms", self.0 / 1_000_000, self.0 % 1_000_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_adds_subtracts_and_ends() {
        let time = Time::from_nanos(1_250_000);
        assert_eq!(time.to_string(), "1.250000 ms");
        assert_eq!(time.plus(Duration::from_micros(2)).since(time), Duration::from_micros(2));
        assert_eq!(Time::ZERO.since(time), Duration::ZERO);
        assert_eq!(time.plus(Duration::MAX), Time::from_nanos(u64::MAX));
        assert_eq!(time.plus_nanos(u64::MAX).nanos(), u64::MAX);
    }
}
