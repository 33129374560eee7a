//! The simulator beside the lab: the same pushes by real processes over shaped links and by the same engine in virtual time.
//!
//! What is compared is how long the slowest trainer wrote, on both sides from being told to write to the delivery of its last
//! WRITE. Nothing of the simulator is fitted here: it gets the links' rates and MTU, and otherwise the preset's numbers.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::ensure;
use weightsync_lab::Lab;
use xfer_plan::Rank;
use xfer_sim::JobReport;

use crate::lab::Ranks;

mod model;
mod record;
mod scene;

use record::{Record, Row};
use scene::Scene;

/// Between pushes: every shaper's bucket is full again, at 10 Mb/s after 0.21 s.
const PAUSE: Duration = Duration::from_millis(500);

/// The page that has the table.
const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/simulator-validation.md");

#[derive(clap::Parser)]
#[command(
    bin_name = "bench simulator",
    about = "Pushes in the lab beside the same pushes simulated; needs root for the lab"
)]
pub(crate) struct Options {
    /// Pushes that count; one more goes first and does not
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u16).range(3..=1000))]
    rounds: u16,
    /// Only configurations whose name has this in it
    #[arg(long, value_name = "TEXT", conflicts_with = "write_docs")]
    only: Option<String>,
    /// Simulate alone, without the lab
    #[arg(long, conflicts_with = "write_docs")]
    no_lab: bool,
    /// Write a record for `bench compare`
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Put the table into docs/simulator-validation.md
    #[arg(long)]
    write_docs: bool,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let mut scenes = scene::all();
    scenes.retain(|scene| options.only.as_ref().is_none_or(|only| scene.name.contains(only)));
    ensure!(
        !scenes.is_empty(),
        "no configuration has {:?} in its name",
        options.only.as_deref().unwrap_or("")
    );
    let (mut rows, mut series) = (Vec::new(), Vec::new());
    for scene in &scenes {
        eprintln!("{}", scene.name);
        let report = scene.simulate()?;
        let measured = if options.no_lab { Vec::new() } else { measure(scene, &report, options.rounds)? };
        rows.push(Row::new(scene, &report, &measured));
        if !measured.is_empty() {
            series.push((scene.name.clone(), measured));
        }
    }
    let record = Record::new(rows, series)?;
    print!("{}", record.text());
    if let Some(path) = &options.json {
        record.write_json(path)?;
    }
    if options.write_docs {
        record.write_docs(Path::new(PAGE))?;
    }
    Ok(())
}

/// Seconds in which the slowest trainer wrote, in the last push that was simulated.
fn write_seconds(report: &JobReport) -> f64 {
    let trainers = report.ranks.iter().filter(|times| matches!(times.rank, Rank::Trainer(_)));
    trainers.map(|times| times.written_at - times.writes_at).fold(0.0, f64::max)
}

/// The same by real processes, by push.
fn measure(scene: &Scene, simulated: &JobReport, rounds: u16) -> anyhow::Result<Vec<f64>> {
    let lab = Lab::up("simulator", &scene.links)?;
    let mut ranks = Ranks::start(&lab, &scene.job)?;
    let mut measured = Vec::new();
    for round in 0..=rounds {
        std::thread::sleep(PAUSE);
        let push = ranks.push()?;
        // Otherwise two different things are compared.
        ensure!(
            (push.bytes(), push.writes()) == (simulated.bytes, simulated.writes),
            "the lab moved {} bytes in {} WRITEs, the simulator {} in {}",
            push.bytes(),
            push.writes(),
            simulated.bytes,
            simulated.writes
        );
        let seconds = push.write_seconds();
        eprintln!("  {seconds:.3} s{}", if round == 0 { " (warm-up, not counted)" } else { "" });
        if round > 0 {
            measured.push(seconds);
        }
    }
    ranks.finish()?;
    Ok(measured)
}
