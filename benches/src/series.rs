//! What every benchmark's JSON has in common, so that `compare` can read all of them: named series of rounds.
//!
//! A record is an object with `benchmark`, `machine`, `series` and whatever else a benchmark wants to say. A series holds
//! every counted round as it was measured; medians are for readers and never stored in its place.

use serde::{Deserialize, Serialize};

/// Which way is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Better {
    Higher,
    Lower,
}

/// The rounds of one figure, without warm-ups.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Series {
    /// Unique in its record, and the same in every run of the same measurement.
    pub(crate) name: String,
    pub(crate) unit: String,
    pub(crate) better: Better,
    pub(crate) rounds: Vec<f64>,
}

impl Series {
    pub(crate) fn new(name: impl Into<String>, unit: &str, better: Better, rounds: Vec<f64>) -> Self {
        Self { name: name.into(), unit: unit.into(), better, rounds }
    }

    pub(crate) fn spread(&self) -> Spread {
        Spread::of(&self.rounds)
    }
}

/// Median, least and most of some rounds; all NaN where there are none.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    pub(crate) fn of(rounds: &[f64]) -> Self {
        let mut sorted = rounds.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        let last = sorted.len().saturating_sub(1);
        // The mean of the two in the middle, which are one where the number is odd.
        Self { median: (at(last / 2) + at(last.div_ceil(2))) / 2.0, min: at(0), max: at(last) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(Spread::of(&[3.0, 1.0, 2.0]), Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Spread::of(&[4.0, 1.0, 2.0, 3.0]).median, 2.5);
        assert!(Spread::of(&[]).median.is_nan());
    }
}
