//! `--sweep`: the same job once for each value of one parameter. All values are tried on the job before the first one is
//! simulated, so that an impossible last one does not cost the time of the others.

mod chart;

use std::fs;
use std::str::FromStr;

use anyhow::Context;
use serde::Serialize;
use xfer_plan::model::{InferLayout, TrainLayout};
use xfer_plan::{Rank, TrainerRank};
use xfer_sim::Slow;

use super::args::{SimulateArgs, factor, milliseconds};
use super::case::Case;
use super::facts::{Facts, Utilisation};
use super::summary::cluster_text;
use crate::WrongInput;
use crate::commands::transfer::{set_chunk, set_watermark};
use crate::say::say;
use crate::spinner::spinner;
use crate::table::seconds_text;

/// What is varied, and its values as they were given.
#[derive(Clone)]
pub(crate) struct Sweep {
    param: Param,
    values: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Param {
    TrainGpus,
    InferGpus,
    Replicas,
    Watermark,
    Chunk,
    Relay,
    Slow,
    SkewMs,
}

/// One value's outcome.
#[derive(Serialize)]
struct Point {
    value: String,
    trainers: u32,
    receivers: u32,
    simulated_seconds: f64,
    bound_seconds: f64,
    ratio: Option<f64>,
    predicted_seconds: f64,
    utilisation: Utilisation,
    bytes: u64,
    writes: u64,
    events: u64,
}

/// A whole sweep, for programs.
#[derive(Serialize)]
struct SweepFacts<'a> {
    simulated: bool,
    cluster: &'a str,
    param: &'a str,
    points: &'a [Point],
}

impl FromStr for Sweep {
    type Err = String;

    fn from_str(text: &str) -> Result<Sweep, String> {
        let (name, values) = text.split_once('=').ok_or("something like train-gpus=64,128 is expected")?;
        let param = Param::ALL.into_iter().find(|param| param.name() == name).ok_or_else(|| {
            format!("{name:?} cannot be swept; {} can", Param::ALL.map(Param::name).join(", "))
        })?;
        let values: Vec<String> = values.split(',').map(|value| value.trim().to_owned()).collect();
        Ok(Sweep { param, values })
    }
}

pub(crate) fn run(args: &SimulateArgs, sweep: &Sweep) -> anyhow::Result<()> {
    let case = Case::new(args)?;
    let name = sweep.param.name();
    let mut cases = Vec::new();
    for value in &sweep.values {
        let mut case = case.clone();
        let applied = sweep.param.apply(value, &mut case);
        applied.map_err(|reason| WrongInput(format!("--sweep {name}={value}: {reason}")))?;
        cases.push((value, case));
    }
    let spinner = spinner("building the manifest");
    let mut cluster = String::new();
    let mut points = Vec::new();
    for (value, case) in cases {
        spinner.set_prefix(format!("{name}={value}: "));
        let facts = case.run(&spinner).with_context(|| format!("{name}={value}"))?;
        let point = Point::new(value, &facts);
        if cluster.is_empty() {
            cluster = cluster_text(&facts.cluster);
            if !args.json {
                spinner.suspend(|| say!("simulated on {cluster}\n{}\n\n{}", facts.job.model, head(name)));
            }
        }
        if !args.json {
            spinner.suspend(|| say!("{}", point.line()));
        }
        points.push(point);
    }
    spinner.finish_and_clear();
    if args.json {
        let facts = SweepFacts { simulated: true, cluster: &cluster, param: name, points: &points };
        say!("{}", serde_json::to_string(&facts)?);
    }
    let csv = args.csv.as_ref().map(|path| (path, csv(name, &points)));
    let svg = args.svg.as_ref().map(|path| (path, chart::draw(name, &cluster, &points)));
    for (path, text) in csv.into_iter().chain(svg) {
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
        eprintln!("weightsync: wrote {}", path.display());
    }
    Ok(())
}

impl Param {
    const ALL: [Param; 8] = [
        Param::TrainGpus,
        Param::InferGpus,
        Param::Replicas,
        Param::Watermark,
        Param::Chunk,
        Param::Relay,
        Param::Slow,
        Param::SkewMs,
    ];

    const fn name(self) -> &'static str {
        match self {
            Param::TrainGpus => "train-gpus",
            Param::InferGpus => "infer-gpus",
            Param::Replicas => "replicas",
            Param::Watermark => "watermark",
            Param::Chunk => "chunk",
            Param::Relay => "relay",
            Param::Slow => "slow",
            Param::SkewMs => "skew-ms",
        }
    }

    /// Changes the case to this value, or says why it cannot be.
    fn apply(self, value: &str, case: &mut Case) -> Result<(), String> {
        let options = &mut case.job.options;
        match self {
            Param::TrainGpus => return train_gpus(whole(value)?, case),
            Param::InferGpus => return infer_gpus(whole(value)?, case),
            Param::Replicas => return replicas(whole(value)?, case),
            Param::Watermark => set_watermark(options, size(value)?),
            Param::Chunk => set_chunk(options, size(value)?),
            Param::Relay => options.relay = value.parse()?,
            Param::SkewMs => case.conditions.skew = milliseconds(value)?,
            Param::Slow => {
                let rank = Rank::Trainer(TrainerRank(0));
                case.conditions.slow.retain(|slow| slow.rank != rank || slow.nic.is_some());
                case.conditions.slow.push(Slow { rank, factor: factor(value)?, nic: None });
            }
        }
        Ok(())
    }
}

/// So many trainers: the factor fsdp follows, and the others stay.
fn train_gpus(gpus: u32, case: &mut Case) -> Result<(), String> {
    let text =
        case.job.trainers.layout.as_deref().ok_or("the job file gives trainers meshes, not a layout")?;
    let mut layout: TrainLayout = text.parse().map_err(in_words)?;
    layout.fsdp = 1;
    layout.fsdp = shared(gpus, layout.ranks().map_err(in_words)?, &layout.to_string())?;
    case.job.trainers.layout = Some(layout.to_string());
    case.job.trainers.gpus = Some(gpus.into());
    case.cluster.follows_job = true;
    Ok(())
}

/// So many inference ranks: the factor replicas follows, and the others stay.
fn infer_gpus(gpus: u32, case: &mut Case) -> Result<(), String> {
    let mut layout: InferLayout = case.job.receivers.layout.parse().map_err(in_words)?;
    layout.replicas = 1;
    replicas(shared(gpus, layout.ranks().map_err(in_words)?, &layout.to_string())?, case)
}

/// So many copies, each of as many ranks as before.
fn replicas(replicas: u32, case: &mut Case) -> Result<(), String> {
    let layout: InferLayout = case.job.receivers.layout.parse().map_err(in_words)?;
    let layout = InferLayout { replicas, ..layout };
    case.job.receivers.gpus = Some(layout.ranks().map_err(in_words)?);
    case.job.receivers.layout = layout.to_string();
    case.cluster.follows_job = true;
    Ok(())
}

fn in_words(error: impl ToString) -> String {
    error.to_string()
}

/// How often `each` goes into `gpus`.
fn shared(gpus: u32, each: u64, layout: &str) -> Result<u32, String> {
    match u32::try_from(each) {
        Ok(each) if each > 0 && gpus.is_multiple_of(each) => Ok(gpus / each),
        _ => Err(format!("{layout} takes {each} GPUs, so there must be a multiple of that")),
    }
}

fn whole(value: &str) -> Result<u32, String> {
    value
        .parse()
        .ok()
        .filter(|value| *value > 0)
        .ok_or_else(|| "a whole number above 0 is expected".to_owned())
}

/// KiB or MiB, in the range of `--chunk` and `--watermark`.
fn size(value: &str) -> Result<u64, String> {
    let size = value.parse().ok().filter(|value| (1..=1 << 20).contains(value));
    size.ok_or_else(|| format!("a whole number from 1 to {} is expected", 1 << 20))
}

impl Point {
    fn new(value: &str, facts: &Facts) -> Point {
        let (cluster, report) = (&facts.cluster.cluster, &facts.report);
        Point {
            value: value.to_owned(),
            trainers: cluster.trainers,
            receivers: cluster.receivers,
            simulated_seconds: facts.push().map_or(0.0, |push| push.seconds),
            bound_seconds: report.bound_seconds,
            ratio: facts.ratio,
            predicted_seconds: facts.predicted_seconds,
            utilisation: facts.utilisation,
            bytes: report.bytes,
            writes: report.writes,
            events: report.events,
        }
    }

    fn line(&self) -> String {
        let Point { value, trainers, receivers, utilisation, .. } = self;
        let (seconds, bound) = (seconds_text(self.simulated_seconds), seconds_text(self.bound_seconds));
        let ratio = self.ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.3}"));
        let percent =
            |share: Option<f64>| share.map_or("-".to_owned(), |share| format!("{:.1} %", share * 100.0));
        let (sent, received) = (percent(utilisation.trainers_out), percent(utilisation.receivers_in));
        row([
            value,
            &trainers.to_string(),
            &receivers.to_string(),
            &seconds,
            &bound,
            &ratio,
            &sent,
            &received,
        ])
    }
}

fn head(name: &str) -> String {
    row([name, "trainers", "inference", "to commit", "lower bound", "ratio", "NICs out", "NICs in"])
}

/// Columns of a fixed width: lines are printed as they come.
fn row(cells: [&str; 8]) -> String {
    const WIDTHS: [usize; 8] = [10, 8, 9, 9, 11, 6, 8, 8];
    let cells = cells.iter().zip(WIDTHS).map(|(cell, width)| format!("{cell:>width$}"));
    cells.collect::<Vec<String>>().join("  ")
}

fn csv(name: &str, points: &[Point]) -> String {
    let mut text = format!(
        "{name},trainers,inference_ranks,simulated_seconds,bound_seconds,ratio,predicted_seconds,trainers_out,receivers_in,\
         bytes,writes,events\n"
    );
    for point in points {
        let share = |share: Option<f64>| share.map_or_else(String::new, |share| share.to_string());
        let cells = [
            point.value.clone(),
            point.trainers.to_string(),
            point.receivers.to_string(),
            point.simulated_seconds.to_string(),
            point.bound_seconds.to_string(),
            share(point.ratio),
            point.predicted_seconds.to_string(),
            share(point.utilisation.trainers_out),
            share(point.utilisation.receivers_in),
            point.bytes.to_string(),
            point.writes.to_string(),
            point.events.to_string(),
        ];
        text.push_str(&cells.join(","));
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sweeps_are_read() {
        let sweep: Sweep = "chunk=64, 256,1024".parse().unwrap();
        assert!(sweep.param == Param::Chunk);
        assert_eq!(sweep.values, ["64", "256", "1024"]);
        for wrong in ["", "chunk", "chunks=1", "=1"] {
            assert!(wrong.parse::<Sweep>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn layouts_share_what_they_can() {
        assert_eq!(shared(256, 16, "x"), Ok(16));
        assert_eq!(shared(16, 16, "x"), Ok(1));
        for (gpus, each) in [(24, 16), (8, 16), (8, 0), (8, 1 << 40)] {
            assert!(shared(gpus, each, "x").unwrap_err().contains(&each.to_string()));
        }
    }
}
