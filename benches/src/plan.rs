//! Planning at the size of a real job: Kimi-K2 from 256 to 128 GPUs, each figure beside its target.

use std::time::Instant;

use anyhow::{Context, bail};
use serde::Serialize;
use xfer_plan::model::{InferLayout, Machine as Gpus, ModelSpec, TrainLayout};
use xfer_plan::{BlockQuant, Manifest, Plan, PlanOptions, PlanReport, Planner, RankPlan, Relay, TrainerRank};

use crate::machine::Machine;

#[derive(clap::Parser)]
#[command(
    bin_name = "bench plan",
    about = "The schedules of whole jobs: time, memory and balance beside targets"
)]
pub(crate) struct Options {
    /// Print JSON instead of the table
    #[arg(long)]
    json: bool,
}

/// A model and the layouts of both sides.
struct Job {
    model: &'static str,
    train: &'static str,
    infer: &'static str,
    fp8: bool,
    /// What the wire needs at least according to what the field reports, in seconds, direct and once per host.
    floors: Option<[f64; 2]>,
}

const JOBS: [Job; 3] = [
    Job {
        model: "kimi-k2",
        train: "fsdp=16,pp=2,ep=8",
        infer: "ep=32,replicas=4",
        fp8: true,
        floors: Some([0.92, 0.67]),
    },
    Job {
        model: "deepseek-v3",
        train: "fsdp=16,pp=2,ep=8",
        infer: "ep=32,replicas=4",
        fp8: true,
        floors: None,
    },
    Job { model: "qwen3-235b-a22b", train: "fsdp=16,ep=8", infer: "tp=4,ep=32", fp8: false, floors: None },
];

#[derive(Serialize)]
struct Results {
    benchmark: &'static str,
    machine: Machine,
    jobs: Vec<Planned>,
}

#[derive(Serialize)]
struct Planned {
    model: &'static str,
    from: String,
    to: String,
    relay: Relay,
    transfers: usize,
    /// Operations of the busiest trainer.
    part_ops: usize,
    /// Of the busiest trainer's part, as it is sent.
    part_bytes: usize,
    manifest_seconds: f64,
    plan_seconds: f64,
    part_seconds: f64,
    /// The parts of all trainers, one after the other.
    parts_seconds: f64,
    load_seconds: f64,
    /// Again by the same planner, after the last receiver was lost, and after it came back.
    lost_seconds: f64,
    back_seconds: f64,
    check_seconds: f64,
    /// The busiest NIC over the mean of all, where trainers send and where receivers take in.
    imbalance: [f64; 2],
    /// What the busiest NIC of a receiver takes in.
    nic_in_bytes_max: u64,
    bound_seconds: f64,
    predicted_seconds: f64,
    floor_seconds: Option<f64>,
    /// Of this process since it began: the first job's is its own.
    peak_rss_bytes: u64,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let mut jobs = Vec::new();
    for job in &JOBS {
        for (number, relay) in [Relay::Never, Relay::PerHost].into_iter().enumerate() {
            eprintln!("planning {} with relay {relay:?}", job.model);
            jobs.push(measure(job, relay, job.floors.map(|floors| floors[number]))?);
        }
    }
    let results = Results { benchmark: "plan", machine: Machine::read()?, jobs };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&results)?);
        return Ok(());
    }
    println!("machine  {}", results.machine);
    for job in &results.jobs {
        print(job);
    }
    Ok(())
}

fn timed<T>(work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(T, f64)> {
    let began = Instant::now();
    let result = work()?;
    Ok((result, began.elapsed().as_secs_f64()))
}

fn measure(job: &Job, relay: Relay, floor_seconds: Option<f64>) -> anyhow::Result<Planned> {
    let (mut manifest, manifest_seconds) = timed(|| manifest(job, relay))?;
    let mut planner = Planner::new();
    let (plan, plan_seconds) = timed(|| Ok(planner.plan(&manifest)?))?;
    let peak_rss_bytes = crate::roles::peak_rss_bytes();
    let [lost_seconds, back_seconds] = replan(&mut planner, &mut manifest, &plan)?;
    drop(planner);
    let busiest = plan.trainers.iter().zip(0..).max_by_key(|(part, _)| part.bytes).context("no trainer")?.1;
    let (part, part_seconds) = timed(|| Ok(plan.part(TrainerRank(busiest), &manifest)?))?;
    let every_part = || {
        let mut parts = (0..).zip(&plan.trainers).map(|(rank, _)| plan.part(TrainerRank(rank), &manifest));
        Ok(parts.try_for_each(|part| part.map(drop))?)
    };
    let ((), parts_seconds) = timed(every_part)?;
    let bytes = postcard::to_stdvec(&part)?;
    let (loaded, load_seconds) = timed(|| Ok(postcard::from_bytes::<RankPlan>(&bytes)?))?;
    if loaded != part {
        bail!("a part is not what was sent");
    }
    let ((), check_seconds) = timed(|| Ok(plan.check(&manifest)?))?;
    let report = PlanReport::new(&plan, &manifest)?;
    let nics = [&report.trainers.sends.nics, &report.receivers.receives.nics];
    Ok(Planned {
        model: job.model,
        from: job.train.into(),
        to: job.infer.into(),
        relay,
        transfers: plan.fills.iter().map(|fill| fill.transfers.len()).sum(),
        part_ops: part.ops.len(),
        part_bytes: bytes.len(),
        manifest_seconds,
        plan_seconds,
        part_seconds,
        load_seconds,
        lost_seconds,
        back_seconds,
        parts_seconds,
        check_seconds,
        imbalance: nics.map(|nics| nics.imbalance.unwrap_or(1.0)),
        nic_in_bytes_max: report.receivers.receives.nics.max,
        bound_seconds: plan.bound.seconds(),
        predicted_seconds: plan.predicted.seconds(),
        floor_seconds,
        peak_rss_bytes,
    })
}

/// As a controller does that loses the last receiver, which keeps its number but has and needs nothing, and then gets it back.
fn replan(planner: &mut Planner, manifest: &mut Manifest, plan: &Plan) -> anyhow::Result<[f64; 2]> {
    let last = manifest.receivers.last_mut().context("no receiver")?;
    let params = std::mem::take(&mut last.params);
    let (_, lost_seconds) = timed(|| Ok(planner.plan(manifest)?))?;
    manifest.receivers.last_mut().context("no receiver")?.params = params;
    let (again, back_seconds) = timed(|| Ok(planner.plan(manifest)?))?;
    if again.digest != plan.digest {
        bail!("planned again, the plan is another");
    }
    Ok([lost_seconds, back_seconds])
}

fn manifest(job: &Job, relay: Relay) -> anyhow::Result<Manifest> {
    let (model, gpus) = (ModelSpec::preset(job.model)?, Gpus::default());
    let train: TrainLayout = job.train.parse()?;
    let mut infer: InferLayout = job.infer.parse()?;
    if job.fp8 {
        infer = infer.with_fp8(BlockQuant::default());
    }
    Ok(Manifest {
        trainers: train.trainers(&model, &gpus)?,
        receivers: infer.receivers(&model, &gpus)?,
        options: PlanOptions { relay, ..PlanOptions::default() },
    })
}

fn print(job: &Planned) {
    let Planned { model, from, to, relay, .. } = job;
    println!("{model}  {from} -> {to}  relay {relay:?}: {} transfers", job.transfers);
    println!(
        "  planned {:.2} s (target 2)   again without one receiver {:.2} s, with it {:.2} s   peak memory so far {} MiB (target 1024)",
        job.plan_seconds,
        job.lost_seconds,
        job.back_seconds,
        job.peak_rss_bytes >> 20,
    );
    println!(
        "  a part: {} operations cut in {:.1} ms, {} kB loaded in {:.1} ms (target 10)   all parts cut in {:.1} s   checked {:.2} s   manifest {:.2} s",
        job.part_ops,
        job.part_seconds * 1e3,
        job.part_bytes / 1000,
        job.load_seconds * 1e3,
        job.parts_seconds,
        job.check_seconds,
        job.manifest_seconds
    );
    println!(
        "  busiest NIC over mean: out {:.3}, in {:.3} (target 1.02)   at most {:.2} GB into one",
        job.imbalance[0],
        job.imbalance[1],
        job.nic_in_bytes_max as f64 / 1e9
    );
    let floor =
        job.floor_seconds.map(|floor| format!("   the field's floor {floor:.2} s")).unwrap_or_default();
    println!(
        "  bound {:.3} s   predicted {:.3} s ({:.3} x bound, target 1.05){floor}",
        job.bound_seconds,
        job.predicted_seconds,
        job.predicted_seconds / job.bound_seconds
    );
}
