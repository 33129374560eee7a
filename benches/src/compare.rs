//! `bench compare a.json b.json`: what got slower or faster from one run of a benchmark to another, and whether that is
//! more than noise.
//!
//! The rule, per series. With at least five rounds on both sides: the two-sided Mann-Whitney test gives p <= 0.01 *and*
//! the medians differ by more than the margin, because rounds of one run resemble each other more than runs do. With
//! fewer rounds the test cannot say anything, so both sides' ranges must lie more than a quarter apart. It must never
//! compare what was measured on different machines or with different settings unless it was told to.

mod read;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use crate::series::{Better, Series, Spread};
use crate::table::Table;
use read::Record;

/// The largest p at which a difference counts: five rounds against five that do not overlap give 0.008.
const P_MAX: f64 = 0.01;

/// Rounds from which on the test can reach [`P_MAX`].
const ROUNDS_MIN: usize = 5;

/// Rounds of a side that are looked at; beyond, the test only takes longer.
const ROUNDS_MAX: usize = 200;

/// How far apart ranges of few rounds must lie: a single figure of the `plan` benchmark moves by a tenth by itself.
const APART_MIN: f64 = 0.25;

/// Exit status where something got worse; 1 is also that of any other failure.
const WORSE: u8 = 1;

/// Exit status where the files are of different things.
const REFUSED: u8 = 2;

/// Say what got slower or faster between two runs; ends with 1 if something got slower beyond noise.
#[derive(Parser)]
#[command(bin_name = "bench compare")]
pub(crate) struct Options {
    /// JSON of a benchmark: before
    a: PathBuf,
    /// JSON of the same benchmark: after
    b: PathBuf,
    /// Medians that differ by less are the same, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 5.0)]
    margin: f64,
    /// Compare even if benchmark, machine or settings differ
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Better,
    Worse,
    Same,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let (a, b) = (Record::read(&options.a)?, Record::read(&options.b)?);
    let differences = a.differences(&b);
    for difference in &differences {
        eprintln!("different {difference}");
    }
    if !differences.is_empty() && !options.force {
        eprintln!("these runs are not of the same thing; --force compares them all the same");
        return Ok(ExitCode::from(REFUSED));
    }
    let mut table =
        Table::new(&["series", "unit", "a (min .. max)", "b (min .. max)", "change", "p", "verdict"]);
    let (mut worse, mut better, mut common) = (0, 0, 0);
    for (before, after) in pairs(&a.series, &b.series) {
        let verdict = verdict(before, after, options.margin / 100.0);
        common += 1;
        worse += usize::from(verdict == Verdict::Worse);
        better += usize::from(verdict == Verdict::Better);
        table.row(row(before, after, verdict));
    }
    println!("{}", table.markdown());
    for (name, here, there) in [(&options.a, &a.series, &b.series), (&options.b, &b.series, &a.series)] {
        for series in here.iter().filter(|series| there.iter().all(|other| other.name != series.name)) {
            println!("only in {}: {}", name.display(), series.name);
        }
    }
    println!("{common} series: {worse} worse, {better} better, {} the same", common - worse - better);
    println!(
        "rule: p <= {P_MAX} (Mann-Whitney, two-sided) and medians more than {} % apart; with fewer than {ROUNDS_MIN} rounds \
         a side, ranges more than {} % apart",
        options.margin,
        APART_MIN * 100.0
    );
    if common == 0 {
        anyhow::bail!("the two files have no series in common");
    }
    Ok(if worse > 0 { ExitCode::from(WORSE) } else { ExitCode::SUCCESS })
}

fn pairs<'a>(a: &'a [Series], b: &'a [Series]) -> impl Iterator<Item = (&'a Series, &'a Series)> {
    a.iter()
        .filter_map(|before| b.iter().find(|after| after.name == before.name).map(|after| (before, after)))
}

fn row(before: &Series, after: &Series, verdict: Verdict) -> Vec<String> {
    let spread = |series: &Series| {
        let Spread { median, min, max } = series.spread();
        // Bytes are whole and long, seconds may be short.
        let digits = if median.abs() >= 1e3 { 0 } else { 4 };
        format!("{median:.digits$} ({min:.digits$} .. {max:.digits$})")
    };
    let change = after.spread().median / before.spread().median - 1.0;
    let p = match few(before, after) {
        true => "-".into(),
        false => format!("{:.4}", mann_whitney(&before.rounds, &after.rounds)),
    };
    let verdict = match verdict {
        Verdict::Better => "better",
        Verdict::Worse => "WORSE",
        Verdict::Same => "same",
    };
    vec![
        before.name.clone(),
        before.unit.clone(),
        spread(before),
        spread(after),
        format!("{:+.1} %", change * 100.0),
        p,
        verdict.into(),
    ]
}

fn few(before: &Series, after: &Series) -> bool {
    before.rounds.len().min(after.rounds.len()) < ROUNDS_MIN
}

fn verdict(before: &Series, after: &Series, margin: f64) -> Verdict {
    let (a, b) = (before.spread(), after.spread());
    let differs = match few(before, after) {
        true => b.min > a.max * (1.0 + APART_MIN) || a.min > b.max * (1.0 + APART_MIN),
        false => {
            // Of the smaller one, so that a halving and a doubling count alike.
            let apart = (b.median - a.median).abs() > margin * a.median.abs().min(b.median.abs());
            apart && mann_whitney(&before.rounds, &after.rounds) <= P_MAX
        }
    };
    match differs {
        false => Verdict::Same,
        true if (b.median > a.median) == (after.better == Better::Higher) => Verdict::Better,
        true => Verdict::Worse,
    }
}

/// The two-sided p of the Mann-Whitney U test: how often two sides that are alike would be as far apart. Exact; ties
/// count half and are rounded towards "alike".
fn mann_whitney(a: &[f64], b: &[f64]) -> f64 {
    let (a, b) = (a.get(..ROUNDS_MAX).unwrap_or(a), b.get(..ROUNDS_MAX).unwrap_or(b));
    let pairs = a.iter().flat_map(|a| b.iter().map(move |b| a.total_cmp(b)));
    let doubled: usize =
        pairs.map(|order| 1 + order as i8).map(|wins| usize::from(wins.unsigned_abs())).sum();
    let whole = 2 * a.len() * b.len();
    let u = doubled.min(whole - doubled).div_ceil(2);
    let at_most: f64 = u_distribution(a.len(), b.len()).iter().take(u + 1).sum();
    (2.0 * at_most).min(1.0)
}

/// The probability of each U for sides of `n` and `m` that are alike: the coefficients of the Gaussian binomial
/// `prod (1 - q^(m + i)) / (1 - q^i)`, i = 1 .. n, over their sum.
fn u_distribution(n: usize, m: usize) -> Vec<f64> {
    let mut of = vec![0.0; n * m + 1];
    if let Some(first) = of.first_mut() {
        *first = 1.0;
    }
    for i in 1..=n {
        for u in (m + i..of.len()).rev() {
            of[u] -= of[u - m - i];
        }
        for u in i..of.len() {
            of[u] += of[u - i];
        }
        // The sum of the coefficients grows by this factor.
        let grown = (m + i) as f64 / i as f64;
        of.iter_mut().for_each(|probability| *probability /= grown);
    }
    of
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn series(better: Better, rounds: &[f64]) -> Series {
        Series::new("s", "GB/s", better, rounds.to_vec())
    }

    /// Every way of dealing the values to the two sides, counted.
    fn oracle(a: &[f64], b: &[f64]) -> f64 {
        let all: Vec<f64> = a.iter().chain(b).copied().collect();
        let u_of = |mask: u32| {
            let side = |one| (0..all.len()).filter(move |i| (mask >> i & 1 == 1) == one);
            side(true)
                .flat_map(|i| side(false).map(move |j| (i, j)))
                .filter(|&(i, j)| all[i] > all[j])
                .count()
        };
        let least = |u: usize| u.min(a.len() * b.len() - u);
        let observed = least(u_of((1 << a.len()) - 1));
        let deals: Vec<u32> =
            (0..1u32 << all.len()).filter(|mask| mask.count_ones() as usize == a.len()).collect();
        let far = deals.iter().filter(|&&mask| least(u_of(mask)) <= observed).count();
        far as f64 / deals.len() as f64
    }

    proptest! {
        #[test]
        fn p_is_the_share_of_deals_that_are_as_far_apart(
            values in proptest::sample::subsequence((0..40).collect::<Vec<i32>>(), 2..10).prop_shuffle(),
            cut in any::<prop::sample::Index>(),
        ) {
            let values: Vec<f64> = values.into_iter().map(f64::from).collect();
            let (a, b) = values.split_at(1 + cut.index(values.len() - 1));
            let (ours, counted) = (mann_whitney(a, b), oracle(a, b));
            prop_assert!((ours - counted).abs() < 1e-9, "{ours} and {counted}");
        }

        #[test]
        fn the_order_of_the_files_turns_the_verdict_and_keeps_p(
            a in prop::collection::vec(1.0..9.0f64, 1..12), b in prop::collection::vec(1.0..9.0f64, 1..12), lower: bool,
        ) {
            let better = if lower { Better::Lower } else { Better::Higher };
            let (x, y) = (series(better, &a), series(better, &b));
            prop_assert!((mann_whitney(&a, &b) - mann_whitney(&b, &a)).abs() < 1e-12);
            let turned = match verdict(&x, &y, 0.05) {
                Verdict::Better => Verdict::Worse,
                Verdict::Worse => Verdict::Better,
                Verdict::Same => Verdict::Same,
            };
            prop_assert_eq!(verdict(&y, &x, 0.05), turned);
        }
    }

    #[test]
    fn noise_is_the_same_and_a_real_loss_is_worse() {
        let before = series(Better::Higher, &[10.0, 10.2, 9.9, 10.1, 10.0]);
        let judge = |rounds: &[f64]| verdict(&before, &series(Better::Higher, rounds), 0.05);
        assert_eq!(judge(&[10.1, 9.8, 10.0, 10.2, 9.9]), Verdict::Same);
        assert_eq!(judge(&[8.0, 8.1, 7.9, 8.2, 8.0]), Verdict::Worse);
        assert_eq!(judge(&[12.0, 12.1, 11.9, 12.2, 12.0]), Verdict::Better);
        // Real, but less than the margin.
        assert_eq!(judge(&[9.8, 9.81, 9.79, 9.82, 9.8]), Verdict::Same);
        // Too few to tell, unless far apart.
        assert_eq!(judge(&[9.0, 9.1]), Verdict::Same);
        assert_eq!(judge(&[5.0, 5.1]), Verdict::Worse);
    }

    #[test]
    fn many_rounds_stay_probabilities() {
        let sum: f64 = u_distribution(ROUNDS_MAX, ROUNDS_MAX).iter().sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
    }
}
