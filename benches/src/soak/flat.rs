//! When a process is flat: the criterion, and why a small leak breaks it.
//!
//! Resident memory moves in pages and in steps: code that runs for the first time, an allocator's arena that takes its last
//! page. So growth is judged by the slope of the least-squares line through all samples after the warm-up, beside the
//! steepest slope that one step of [`STEP_BYTES`] can give such a line. The longer the run, the less a push may leak
//! unnoticed. Descriptors and threads do not move at all.

use serde::Serialize;

use crate::usage::Usage;

/// A step that is forgiven. A thread of a runtime that ends was seen to add 52 KiB of touched code and stack.
const STEP_BYTES: f64 = 65_536.0;

/// A step of height h halfway through x pushes tilts the least-squares line by 1.5 h / x, and anywhere else by less:
/// at the part t of the way it is 6 t (1 - t) h / x.
const STEP_SLOPE: f64 = 1.5;

/// With fewer samples a line says little.
pub(crate) const SAMPLES_MIN: usize = 20;

/// A process after so many pushes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) pushes: u64,
    pub(crate) usage: Usage,
}

/// How one process fared.
#[derive(Debug, Serialize)]
pub(crate) struct Flatness {
    /// The first and the last sample.
    pub(crate) resident_bytes: (u64, u64),
    /// The slope of resident memory, and the steepest that is flat.
    pub(crate) bytes_per_push: f64,
    pub(crate) bytes_per_push_max: f64,
    /// Least and most.
    pub(crate) files: (u64, u64),
    pub(crate) threads: (u64, u64),
    pub(crate) cpu_seconds_per_push: f64,
    /// What is not flat, in words.
    pub(crate) wrong: Vec<String>,
}

impl Flatness {
    /// Judges the samples of one process, oldest first. `None` if they are too few, or of no pushes.
    pub(crate) fn of(samples: &[Sample]) -> Option<Self> {
        let (first, last) = (samples.first()?, samples.last()?);
        let pushes = last.pushes.checked_sub(first.pushes).filter(|pushes| *pushes > 0)? as f64;
        if samples.len() < SAMPLES_MIN {
            return None;
        }
        let points = samples.iter().map(|sample| (sample.pushes as f64, sample.usage.resident_bytes as f64));
        let bytes_per_push = slope(points.clone());
        let bytes_per_push_max = STEP_SLOPE * STEP_BYTES / pushes;
        let mut wrong = Vec::new();
        if bytes_per_push > bytes_per_push_max {
            wrong.push(format!("resident memory grows by {bytes_per_push:.1} bytes a push"));
        }
        let files = spread(samples.iter().map(|sample| sample.usage.files));
        let threads = spread(samples.iter().map(|sample| sample.usage.threads));
        for (what, (least, most)) in [("file descriptors", files), ("threads", threads)] {
            if least != most {
                wrong.push(format!("it has {least} to {most} {what}"));
            }
        }
        Some(Self {
            resident_bytes: (first.usage.resident_bytes, last.usage.resident_bytes),
            bytes_per_push,
            bytes_per_push_max,
            files,
            threads,
            cpu_seconds_per_push: (last.usage.cpu_seconds - first.usage.cpu_seconds) / pushes,
            wrong,
        })
    }
}

/// The slope of the least-squares line through these points, of which at least two differ in x.
fn slope(points: impl Iterator<Item = (f64, f64)> + Clone) -> f64 {
    let count = points.clone().count() as f64;
    let mean_x = points.clone().map(|(x, _)| x).sum::<f64>() / count;
    let mean_y = points.clone().map(|(_, y)| y).sum::<f64>() / count;
    let (mut xy, mut xx) = (0.0, 0.0);
    for (x, y) in points {
        xy += (x - mean_x) * (y - mean_y);
        xx += (x - mean_x) * (x - mean_x);
    }
    xy / xx
}

fn spread(counts: impl Iterator<Item = u64> + Clone) -> (u64, u64) {
    (counts.clone().min().unwrap_or(0), counts.max().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = 4096;
    /// What a run of 100 000 pushes counts.
    const COUNTED: u64 = 90_000;

    /// A run whose resident bytes are this function of the pushes, to the page.
    fn run(samples: u64, resident: impl Fn(u64) -> u64) -> Vec<Sample> {
        let sample = |index| {
            let pushes = 10_000 + index * COUNTED / (samples - 1);
            let resident_bytes = resident(pushes) / PAGE * PAGE;
            let usage = Usage { resident_bytes, files: 25, threads: 6, cpu_seconds: pushes as f64 * 0.001 };
            Sample { pushes, usage }
        };
        (0..samples).map(sample).collect()
    }

    fn wrong(samples: &[Sample]) -> Vec<String> {
        Flatness::of(samples).unwrap().wrong
    }

    #[test]
    fn a_run_without_growth_is_flat() {
        let flat = Flatness::of(&run(450, |_| 30 << 20)).unwrap();
        assert_eq!((flat.bytes_per_push, flat.wrong.len()), (0.0, 0));
        assert!((flat.cpu_seconds_per_push - 0.001).abs() < 1e-9);
    }

    #[test]
    fn a_descriptor_or_a_thread_more_in_one_sample_is_refused() {
        for index in [0, 17, 449] {
            let mut samples = run(450, |_| 30 << 20);
            samples[index].usage.files += 1;
            assert_eq!(wrong(&samples), ["it has 25 to 26 file descriptors"]);
            let mut samples = run(450, |_| 30 << 20);
            samples[index].usage.threads -= 1;
            assert_eq!(wrong(&samples), ["it has 5 to 6 threads"]);
        }
    }

    #[test]
    fn too_few_samples_say_nothing() {
        assert!(Flatness::of(&run(SAMPLES_MIN as u64 - 1, |_| 0)).is_none());
        assert!(Flatness::of(&run(SAMPLES_MIN as u64, |_| 0)).is_some());
        assert!(Flatness::of(&[run(20, |_| 0)[0]; 30]).is_none());
    }

    /// The slope by its other definition: weighted by the square of the distance, the mean slope between all pairs of points.
    fn slope_of_pairs(points: &[(f64, f64)]) -> f64 {
        let pairs = || points.iter().flat_map(|a| points.iter().map(move |b| (b.0 - a.0, b.1 - a.1)));
        pairs().map(|(x, y)| x * y).sum::<f64>() / pairs().map(|(x, _)| x * x).sum::<f64>()
    }

    proptest! {
        #[test]
        fn the_slope_is_that_of_all_pairs(points in prop::collection::vec((0u32..1000, 0u32..1000), 2..30)) {
            let points: Vec<(f64, f64)> =
                (0u32..).zip(points).map(|(i, (x, y))| (f64::from(x + i * 1000), f64::from(y))).collect();
            let (found, expected) = (slope(points.iter().copied()), slope_of_pairs(&points));
            prop_assert!((found - expected).abs() < 1e-9, "{found} {expected}");
        }

        /// From the first push on or later, in any process, under pages that come and go.
        #[test]
        fn a_leak_of_two_bytes_a_push_is_refused(
            leak in 2u64..64,
            start in 0u64..1 << 32,
            noise in prop::collection::vec(0u64..8, 450),
            samples in 20u64..450,
        ) {
            let resident = |pushes: u64| {
                start + leak * pushes + noise[pushes as usize % noise.len()] * PAGE
            };
            prop_assert_eq!(wrong(&run(samples, resident)).len(), 1);
        }

        #[test]
        fn one_step_and_pages_that_come_and_go_are_flat(
            start in 0u64..1 << 32,
            at in 0u64..110_000,
            step in 0u64..14,
            samples in 100u64..450,
        ) {
            let resident = |pushes: u64| {
                let page = pushes / 200 % 2 * PAGE;
                start / PAGE * PAGE + page + if pushes >= at { step * PAGE } else { 0 }
            };
            prop_assert_eq!(wrong(&run(samples, resident)), Vec::<String>::new());
        }

        /// Memory that is given back is no leak.
        #[test]
        fn shrinking_is_flat(slope in 0u64..50) {
            prop_assert_eq!(wrong(&run(450, |pushes| (30 << 20) - slope * pushes)), Vec::<String>::new());
        }
    }
}
