//! The table and the JSON: one line for each thing that was measured, could not be, or was not there.

use serde::Serialize;

use crate::Options;
use crate::machine::Machine;
use crate::measure::{Figures, Target, median};
use crate::series::{Better, Series};
use crate::table::Table;

/// The commit that this program was built from, where the build said it.
const COMMIT: Option<&str> = option_env!("WEIGHTSYNC_COMMIT");

pub(crate) struct Report {
    rounds: usize,
    lines: Vec<Line>,
}

struct Line {
    name: String,
    outcome: Outcome,
}

enum Outcome {
    Measured(Figures),
    /// What is missing here.
    Skipped(String),
    Failed(String),
}

/// All that a run leaves behind.
#[derive(Serialize)]
pub(crate) struct Record<'a> {
    benchmark: &'static str,
    commit: Option<&'static str>,
    machine: &'a Machine,
    settings: &'a Options,
    series: Vec<Series>,
    rows: Vec<Row<'a>>,
}

/// A line of the table, in numbers; figures are medians.
#[derive(Serialize, Default)]
struct Row<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gb_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reference: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reference_gb_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pass: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    skipped: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    failed: Option<&'a str>,
}

impl Report {
    pub(crate) fn new(rounds: usize) -> Self {
        Self { rounds, lines: Vec::new() }
    }

    /// How many rounds count.
    pub(crate) fn rounds(&self) -> usize {
        self.rounds
    }

    /// Adds what was measured, or why not, and says so at once: a run takes minutes.
    pub(crate) fn add(&mut self, name: &str, figures: anyhow::Result<Figures>) {
        let outcome = match figures {
            Ok(figures) => Outcome::Measured(figures),
            Err(error) => Outcome::Failed(format!("{error:#}")),
        };
        self.push(name, outcome);
    }

    pub(crate) fn skip(&mut self, name: &str, why: &str) {
        self.push(name, Outcome::Skipped(why.to_owned()));
    }

    /// Measures one part. If it fails as a whole that is a line too, and the next parts are measured all the same.
    pub(crate) fn part(&mut self, name: &str, measure: impl FnOnce(&mut Self) -> anyhow::Result<()>) {
        if let Err(error) = measure(self) {
            self.add(name, Err(error));
        }
    }

    fn push(&mut self, name: &str, outcome: Outcome) {
        let line = Line { name: name.to_owned(), outcome };
        match &line.outcome {
            Outcome::Measured(_) => {
                let row = line.row();
                let ratio = row.ratio.map_or_else(String::new, |ratio| format!(", ratio {ratio:.3}"));
                eprintln!("{name}: {:.1} GB/s{ratio}", row.gb_per_second.unwrap_or(f64::NAN));
            }
            Outcome::Skipped(why) => eprintln!("{name}: skipped: {why}"),
            Outcome::Failed(why) => eprintln!("{name}: FAILED: {why}"),
        }
        self.lines.push(line);
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.lines.iter().any(|line| matches!(line.outcome, Outcome::Failed(_)))
    }

    /// In Markdown; below it why lines have no figures.
    pub(crate) fn table(&self) -> String {
        let mut table = Table::new(&["what", "ms", "GB/s", "beside", "GB/s", "ratio", "target", ""]);
        let mut reasons = String::new();
        for line in &self.lines {
            let row = line.row();
            let number = |figure: Option<f64>, digits: usize| {
                figure.map_or_else(String::new, |figure| format!("{figure:.digits$}"))
            };
            let outcome = match (row.pass, row.skipped, row.failed) {
                (_, Some(why), _) => {
                    reasons += &format!("{}: skipped: {why}\n", row.name);
                    "skipped"
                }
                (_, _, Some(why)) => {
                    reasons += &format!("{}: FAILED: {why}\n", row.name);
                    "FAILED"
                }
                (Some(true), ..) => "met",
                (Some(false), ..) => "missed",
                (None, ..) => "",
            };
            table.row(vec![
                row.name.to_owned(),
                number(row.seconds.map(|seconds| seconds * 1e3), 2),
                number(row.gb_per_second, 1),
                row.reference.unwrap_or_default().to_owned(),
                number(row.reference_gb_per_second, 1),
                number(row.ratio, 3),
                row.target.unwrap_or_default(),
                outcome.to_owned(),
            ]);
        }
        table.markdown() + &reasons
    }

    pub(crate) fn record<'a>(&'a self, machine: &'a Machine, settings: &'a Options) -> Record<'a> {
        let mut series = Vec::new();
        for Line { name, outcome } in &self.lines {
            let Outcome::Measured(figures) = outcome else { continue };
            series.push(Series::new(name, "GB/s", Better::Higher, figures.rounds.gb_per_second()));
            if let Some(reference) = &figures.reference {
                let name = format!("{name} / {}", reference.name);
                series.push(Series::new(name, "GB/s", Better::Higher, reference.rounds.gb_per_second()));
            }
        }
        let rows = self.lines.iter().map(Line::row).collect();
        Record { benchmark: "hw", commit: COMMIT, machine, settings, series, rows }
    }
}

impl Line {
    fn row(&self) -> Row<'_> {
        let row = Row { name: &self.name, ..Row::default() };
        match &self.outcome {
            Outcome::Measured(figures) => {
                let reference = figures.reference.as_ref();
                Row {
                    bytes: Some(figures.rounds.bytes),
                    seconds: Some(median(&figures.rounds.seconds)),
                    gb_per_second: Some(median(&figures.rounds.gb_per_second())),
                    reference: reference.map(|reference| reference.name),
                    reference_gb_per_second: reference
                        .map(|reference| median(&reference.rounds.gb_per_second())),
                    ratio: figures.ratio(),
                    target: figures.target.map(|target| match target {
                        Target::Ratio(least) => format!("at least {least:.2}"),
                        Target::Seconds(most) => format!("at most {most} s"),
                    }),
                    pass: figures.is_met(),
                    ..row
                }
            }
            Outcome::Skipped(why) => Row { skipped: Some(why), ..row },
            Outcome::Failed(why) => Row { failed: Some(why), ..row },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::{Reference, Rounds};

    #[test]
    fn every_outcome_is_a_line_and_only_a_failure_fails() {
        let rounds = |seconds| Rounds { bytes: 4_000_000_000, seconds: vec![seconds] };
        let reference = Some(Reference { name: "a copy", rounds: rounds(1.0) });
        let figures = Figures { rounds: rounds(2.0), reference, target: Some(Target::Ratio(0.8)) };
        let mut report = Report::new(1);
        report.add("slow", Ok(figures.clone()));
        report.add("fast enough", Ok(figures.with_target(Target::Seconds(2.0))));
        report.skip("far", "one CUDA device");
        assert!(!report.has_failed(), "a missed target is no failure");
        report.part("broken", |report| {
            report.add("before", Ok(Figures::alone(rounds(4.0))));
            anyhow::bail!("no memory")
        });
        assert!(report.has_failed());
        let cells = |name: &str| {
            let table = report.table();
            let line = table.lines().find(|line| line.starts_with(&format!("| {name} "))).unwrap().to_owned();
            line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>()[2..9].join(",")
        };
        assert_eq!(cells("slow"), "2000.00,2.0,a copy,4.0,0.500,at least 0.80,missed");
        assert_eq!(cells("fast enough"), "2000.00,2.0,a copy,4.0,0.500,at most 2 s,met");
        assert_eq!(cells("before"), "4000.00,1.0,,,,,");
        assert_eq!(cells("broken"), ",,,,,,FAILED");
        let table = report.table();
        assert!(table.ends_with("\nfar: skipped: one CUDA device\nbroken: FAILED: no memory\n"), "{table}");
    }
}
