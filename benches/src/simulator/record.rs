//! What was measured beside what was simulated: as a table, as JSON, and in the documentation.

use std::path::Path;

use anyhow::{Context as _, bail};
use serde::Serialize;
use xfer_sim::JobReport;

use super::scene::Scene;
use crate::machine::Machine;
use crate::series::{Better, Series, Spread};
use crate::table::Table;

/// Between these lines of the documentation stands what is written.
const BEGIN: &str = "<!-- written by `bench simulator --write-docs`: begin -->\n";
const END: &str = "<!-- written by `bench simulator --write-docs`: end -->\n";

/// What the difference may be, in percent.
pub(super) const DIFFERENCE_MAX: f64 = 10.0;

#[derive(Serialize)]
pub(super) struct Record {
    benchmark: &'static str,
    machine: Machine,
    rows: Vec<Row>,
    /// What the lab measured, for `bench compare`.
    series: Vec<Series>,
}

/// A configuration. Seconds are those in which the slowest trainer wrote.
#[derive(Serialize)]
pub(super) struct Row {
    name: String,
    bytes: u64,
    writes: u64,
    /// All bytes over all rates.
    links_seconds: f64,
    simulated_seconds: f64,
    /// `None` where only the simulator ran.
    lab: Option<Spread>,
    /// Of what the lab took, in percent; positive where the simulator is slower.
    difference: Option<f64>,
}

impl Row {
    pub(super) fn new(scene: &Scene, simulated: &JobReport, lab: &[f64]) -> Self {
        let lab = (!lab.is_empty()).then(|| Spread::of(lab));
        let simulated_seconds = super::write_seconds(simulated);
        Self {
            name: scene.name.clone(),
            bytes: simulated.bytes,
            writes: simulated.writes,
            links_seconds: scene.links_seconds(),
            simulated_seconds,
            lab,
            difference: lab.map(|lab| (simulated_seconds / lab.median - 1.0) * 100.0),
        }
    }
}

impl Record {
    pub(super) fn new(rows: Vec<Row>, measured: Vec<(String, Vec<f64>)>) -> anyhow::Result<Self> {
        let series = measured.into_iter();
        let series = series.map(|(name, rounds)| Series::new(name, "s", Better::Lower, rounds)).collect();
        Ok(Self { benchmark: "simulator", machine: Machine::read()?, rows, series })
    }

    /// The table, and what to read from it.
    pub(super) fn text(&self) -> String {
        let head = [
            "configuration",
            "MiB",
            "WRITEs",
            "lab s",
            "min - max",
            "links alone s",
            "simulated s",
            "difference",
        ];
        let mut table = Table::new(&head);
        for row in &self.rows {
            let seconds = |seconds: f64| format!("{seconds:.3}");
            let lab = |text: &dyn Fn(Spread) -> String| row.lab.map_or_else(|| "-".into(), text);
            table.row(vec![
                row.name.clone(),
                (row.bytes >> 20).to_string(),
                row.writes.to_string(),
                lab(&|lab| seconds(lab.median)),
                lab(&|lab| format!("{:.3} - {:.3}", lab.min, lab.max)),
                seconds(row.links_seconds),
                seconds(row.simulated_seconds),
                row.difference.map_or_else(|| "-".into(), |percent| format!("{percent:+.1} %")),
            ]);
        }
        let known: Vec<f64> = self.rows.iter().filter_map(|row| row.difference).collect();
        let within = known.iter().filter(|percent| percent.abs() <= DIFFERENCE_MAX).count();
        let Self { machine, .. } = self;
        let summary = match known.len() {
            0 => "Nothing was measured: all times are simulated.".into(),
            all => format!("{within} of {all} are within {DIFFERENCE_MAX:.0} %."),
        };
        format!("{}\n{summary} Machine: {machine}.\n", table.markdown())
    }

    pub(super) fn write_json(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Puts the table into the documentation.
    pub(super) fn write_docs(&self, path: &Path) -> anyhow::Result<()> {
        let page =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let Some(page) = spliced(&page, &self.text()) else {
            bail!("{} has no lines {BEGIN:?} and {END:?} around what is to be written", path.display());
        };
        std::fs::write(path, page).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// A page with this text between its marks; `None` where it has none.
fn spliced(page: &str, text: &str) -> Option<String> {
    let (before, rest) = page.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{text}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_stands_between_the_marks_is_replaced() {
        let page = format!("above\n{BEGIN}old\n{END}below\n");
        let once = spliced(&page, "first").unwrap();
        assert_eq!(once, format!("above\n{BEGIN}\nfirst\n{END}below\n"));
        assert_eq!(spliced(&once, "second"), spliced(&page, "second"));
        assert_eq!(spliced("no marks", "text"), None);
        assert_eq!(spliced(&format!("{END}{BEGIN}"), "text"), None);
    }
}
