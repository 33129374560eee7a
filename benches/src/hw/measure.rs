//! How one thing is measured beside another: rounds of both alternate, so that both meet the same state of the machine.

use std::time::Duration;

/// Go first and are not counted: clocks rise, and pages are touched.
const WARM_UP_ROUNDS: usize = 3;

/// Something that moves so many bytes each time it is run.
pub(crate) struct Work<'a> {
    pub(crate) bytes: u64,
    round: Box<dyn FnMut() -> anyhow::Result<Duration> + 'a>,
}

impl<'a> Work<'a> {
    pub(crate) fn new(bytes: u64, round: impl FnMut() -> anyhow::Result<Duration> + 'a) -> Self {
        Self { bytes, round: Box::new(round) }
    }
}

/// The seconds of each counted round, for so many bytes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rounds {
    pub(crate) bytes: u64,
    pub(crate) seconds: Vec<f64>,
}

impl Rounds {
    pub(crate) fn gb_per_second(&self) -> Vec<f64> {
        self.seconds.iter().map(|seconds| self.bytes as f64 / seconds / 1e9).collect()
    }
}

/// What a figure is held against.
#[derive(Debug, Clone)]
pub(crate) struct Reference {
    pub(crate) name: &'static str,
    pub(crate) rounds: Rounds,
}

/// What is asked of a figure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Target {
    /// At least this share of the reference's bytes per second.
    Ratio(f64),
    /// At most so many seconds.
    Seconds(f64),
}

/// What was measured.
#[derive(Debug, Clone)]
pub(crate) struct Figures {
    pub(crate) rounds: Rounds,
    pub(crate) reference: Option<Reference>,
    pub(crate) target: Option<Target>,
}

impl Figures {
    /// Nothing is beside it.
    pub(crate) fn alone(rounds: Rounds) -> Self {
        Self { rounds, reference: None, target: None }
    }

    pub(crate) fn with_target(self, target: impl Into<Option<Target>>) -> Self {
        Self { target: target.into(), ..self }
    }

    /// Of the bytes per second in each round, to those of the reference in the same round where both have as many.
    pub(crate) fn ratio(&self) -> Option<f64> {
        let reference = &self.reference.as_ref()?.rounds;
        let (ours, theirs) = (self.rounds.gb_per_second(), reference.gb_per_second());
        if ours.len() == theirs.len() {
            let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect();
            return Some(median(&ratios));
        }
        Some(median(&ours) / median(&theirs))
    }

    /// Whether the target is met; none where there is none.
    pub(crate) fn is_met(&self) -> Option<bool> {
        match self.target? {
            Target::Ratio(least) => self.ratio().map(|ratio| ratio >= least),
            Target::Seconds(most) => Some(median(&self.rounds.seconds) <= most),
        }
    }
}

pub(crate) fn median(values: &[f64]) -> f64 {
    crate::series::Spread::of(values).median
}

/// Rounds of `work` alone.
pub(crate) fn alone(count: usize, mut work: Work<'_>) -> anyhow::Result<Figures> {
    let mut rounds = Rounds { bytes: work.bytes, seconds: Vec::new() };
    for round in 0..WARM_UP_ROUNDS + count {
        let took = (work.round)()?.as_secs_f64();
        if round >= WARM_UP_ROUNDS {
            rounds.seconds.push(took);
        }
    }
    Ok(Figures::alone(rounds))
}

/// Rounds of `work` and of its reference, which goes first in each.
pub(crate) fn beside(
    count: usize,
    mut work: Work<'_>,
    name: &'static str,
    mut reference: Work<'_>,
) -> anyhow::Result<Figures> {
    let mut ours = Rounds { bytes: work.bytes, seconds: Vec::new() };
    let mut theirs = Rounds { bytes: reference.bytes, seconds: Vec::new() };
    for round in 0..WARM_UP_ROUNDS + count {
        let their = (reference.round)()?.as_secs_f64();
        let our = (work.round)()?.as_secs_f64();
        if round >= WARM_UP_ROUNDS {
            ours.seconds.push(our);
            theirs.seconds.push(their);
        }
    }
    Ok(Figures { rounds: ours, reference: Some(Reference { name, rounds: theirs }), target: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(seconds: &[f64], bytes: u64, reference: &[f64]) -> Figures {
        let rounds = Rounds { bytes, seconds: seconds.to_vec() };
        let reference = Rounds { bytes: 100, seconds: reference.to_vec() };
        Figures { rounds, reference: Some(Reference { name: "a copy", rounds: reference }), target: None }
    }

    #[test]
    fn the_ratio_is_of_bytes_per_second_in_the_same_round() {
        // The machine was slow in one round: the ratio does not show it.
        assert_eq!(figures(&[2.0, 4.0, 20.0], 100, &[1.0, 2.0, 10.0]).ratio(), Some(0.5));
        assert_eq!(figures(&[1.0, 1.0, 1.0], 50, &[1.0, 1.0, 1.0]).ratio(), Some(0.5));
        // Fewer rounds of the reference, as of another program's: medians are compared.
        assert_eq!(figures(&[2.0, 2.0, 8.0], 100, &[1.0]).ratio(), Some(0.5));
        assert_eq!(Figures::alone(Rounds::default()).ratio(), None);
    }

    #[test]
    fn a_target_is_met_at_its_value() {
        let half = figures(&[2.0], 100, &[1.0]);
        let met = |target| half.clone().with_target(target).is_met();
        assert_eq!(met(Target::Ratio(0.5)), Some(true));
        assert_eq!(met(Target::Ratio(0.51)), Some(false));
        assert_eq!(met(Target::Seconds(2.0)), Some(true));
        assert_eq!(met(Target::Seconds(1.9)), Some(false));
        assert_eq!(half.is_met(), None);
        assert_eq!(
            half.with_target(Target::Ratio(f64::NAN)).is_met(),
            Some(false),
            "no figure meets no target"
        );
    }

    #[test]
    fn rounds_that_warm_up_are_not_counted_and_the_reference_goes_first() {
        let order = std::cell::RefCell::new(String::new());
        let work = |letter| {
            let order = &order;
            Work::new(1, move || {
                order.borrow_mut().push(letter);
                Ok(Duration::from_secs(order.borrow().len() as u64))
            })
        };
        let figures = beside(2, work('w'), "r", work('r')).unwrap();
        assert_eq!(figures.rounds.seconds, [8.0, 10.0]);
        assert_eq!(figures.reference.map(|reference| reference.rounds.seconds), Some(vec![7.0, 9.0]));
        assert_eq!(order.borrow().as_str(), "rwrwrwrwrw");
    }
}
