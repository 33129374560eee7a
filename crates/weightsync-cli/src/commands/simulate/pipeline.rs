//! `--pipeline`: another way to push, which gathers weights in full before it writes them, on the same cluster. Its stages are
//! published for one job alone, so it is refused for others instead of being guessed for them.

use std::time::Instant;

use serde::Serialize;
use xfer_plan::model::{InferLayout, TrainLayout};
use xfer_sim::{PipelineConfig, PipelineReport, simulate_pipeline};

use super::args::{Pipeline, SimulateArgs};
use super::case::Case;
use super::facts::ClusterFacts;
use super::summary::cluster_text;
use crate::WrongInput;
use crate::say::say;
use crate::spinner::spinner;
use crate::table::{Table, bytes_text, seconds_text};

/// The job whose stages are published.
const MODEL: &str = "kimi-k2";
const FROM: TrainLayout = TrainLayout { pp: 2, replicas: 1, ep: 8, fsdp: 16, tp: 1, dtype: None };
const TO: InferLayout = InferLayout { tp: 1, ep: 32, replicas: 4, fp8: None, experts: None };
const TRAINERS: u32 = 256;
const RECEIVERS: u32 = 128;

#[derive(Serialize)]
struct Facts {
    simulated: bool,
    pipeline: Pipeline,
    cluster: ClusterFacts,
    report: PipelineReport,
    wall_seconds: f64,
}

pub(crate) fn run(args: &SimulateArgs, pipeline: Pipeline) -> anyhow::Result<()> {
    let case = Case::new(args)?;
    if !is_published(&case) {
        return Err(WrongInput(format!(
            "the stages of --pipeline {pipeline} are known for one job only: give --model {MODEL} --from fsdp=16,pp=2,ep=8 --to \
             ep=32,replicas=4 --fp8"
        ))
        .into());
    }
    let mut config = PipelineConfig::published();
    config.cluster = case.cluster.for_ranks(TRAINERS, RECEIVERS);
    config.seed = case.conditions.seed;
    config.tolerance = case.conditions.tolerance;
    let spinner = spinner("simulating the pipeline");
    let started = Instant::now();
    let report = simulate_pipeline(&config).map_err(|error| WrongInput(error.to_string()))?;
    let wall_seconds = started.elapsed().as_secs_f64();
    spinner.finish_and_clear();
    let cluster = ClusterFacts::new(&case.cluster, config.cluster);
    let facts = Facts { simulated: true, pipeline, cluster, report, wall_seconds };
    if args.json {
        say!("{}", serde_json::to_string(&facts)?);
    } else {
        say!("{}", text(&facts));
    }
    Ok(())
}

fn is_published(Case { job, .. }: &Case) -> bool {
    job.model.preset.as_deref() == Some(MODEL)
        && job.trainers.layout.as_deref().is_some_and(|layout| layout.parse() == Ok(FROM))
        && job.receivers.layout.parse() == Ok(TO)
        && job.receivers.fp8.is_some()
}

fn text(Facts { pipeline, cluster, report, wall_seconds, .. }: &Facts) -> String {
    let mut stages = Table::new(&["stage, mean of the ranks", "exposed ms", "%", "busy ms"]);
    for stage in &report.stages {
        let share = stage.exposed_seconds / report.seconds.max(f64::MIN_POSITIVE) * 100.0;
        stages.row(vec![
            stage.name.to_owned(),
            format!("{:.1}", stage.exposed_seconds * 1e3),
            format!("{share:.1}"),
            format!("{:.1}", stage.busy_seconds * 1e3),
        ]);
    }
    let [copied, gathered, written] =
        [report.copied_bytes, report.gathered_bytes, report.written_bytes].map(bytes_text);
    format!(
        "simulated on {}\n{pipeline} pipeline of {MODEL}, {TRAINERS} trainers to {RECEIVERS} inference ranks, FP8\n\n\
         to the end   {}\n\
         moves        {copied} from host memory, {gathered} in gathers, {written} in {} WRITEs\n\n\
         {}\n\
         exposed is what no stage above hides; simulated in {} of this machine",
        cluster_text(cluster),
        seconds_text(report.seconds),
        report.writes,
        stages.render(),
        seconds_text(*wall_seconds),
    )
}
