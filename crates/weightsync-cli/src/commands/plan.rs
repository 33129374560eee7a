//! `weightsync plan`: makes the plan of a transfer without any of its machines, and shows what it means.
//!
//! Everything is computed here: no rank is asked, no GPU is needed, no figure is measured.

pub(crate) mod args;
mod file;
mod page;
mod summary;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use indicatif::ProgressBar;
use serde::Serialize;
use xfer_plan::model::{JobSpec, Machine, ModelJob, ModelSpec, ReceiversJob, TrainersJob};
use xfer_plan::report::PlanReport;
use xfer_plan::{BlockQuant, Manifest, Plan, PlanOptions, ReceiverRank, Relay, diff, explain, plan};

use self::args::{DiffArgs, MakeArgs, PlanCommand, PlanSubcommand};
use self::file::PlanFile;
use crate::say::say;
use crate::table::bytes_text;

/// Length of a `config.json` or a job file.
const TEXT_BYTES_MAX: u64 = 64 << 20;

/// How often the spinner turns.
const TICK: Duration = Duration::from_millis(120);

/// What was planned, in words.
#[derive(Serialize)]
struct JobFacts {
    /// The model, and how many parameters it has.
    title: String,
    /// The two sides.
    subtitle: String,
    /// Elements of all source tensors that trainers declare.
    parameters: u64,
    trainers: usize,
    receivers: usize,
}

#[derive(Serialize)]
struct Facts<'a> {
    job: &'a JobFacts,
    report: &'a PlanReport,
    /// Seconds that the check took; none where it was not asked for.
    checked_in_seconds: Option<f64>,
}

pub(crate) fn run(command: &PlanCommand) -> anyhow::Result<()> {
    match &command.command {
        Some(PlanSubcommand::Diff(args)) => compare(args),
        None => make(&command.make),
    }
}

fn make(args: &MakeArgs) -> anyhow::Result<()> {
    // What cannot be written in the end is refused before the work.
    let out = args.out.as_deref().map(PlanFile::at).transpose()?;
    let job = job(args)?;
    let progress = ProgressBar::new_spinner();
    progress.enable_steady_tick(TICK);
    progress.set_message("building the manifest");
    let manifest = job.manifest()?;
    progress.set_message("planning");
    let plan = plan(&manifest)?;
    let checked_in_seconds = match args.check {
        true => {
            progress.set_message("checking the plan");
            let started = Instant::now();
            plan.check(&manifest).context("the plan does not pass its check")?;
            Some(started.elapsed().as_secs_f64())
        }
        false => None,
    };
    let facts = job_facts(&job, &manifest)?;
    progress.set_message("adding up");
    let report = PlanReport::new(&plan, &manifest)?;
    let facts = Facts { job: &facts, report: &report, checked_in_seconds };
    if let Some(out) = &out {
        progress.set_message("writing the plan");
        out.write(&plan)?;
    }
    if let Some(path) = &args.html {
        page::write(path, &facts)?;
    }
    progress.finish_and_clear();
    match &args.explain {
        Some(name) => say_explanation(&plan, &manifest, name, args)?,
        None if args.json => say!("{}", serde_json::to_string(&facts)?),
        None => say!("{}", summary::text(&facts)),
    }
    for path in args.out.iter().chain(&args.html) {
        eprintln!("weightsync: wrote {}", path.display());
    }
    Ok(())
}

fn say_explanation(plan: &Plan, manifest: &Manifest, name: &str, args: &MakeArgs) -> anyhow::Result<()> {
    let explanation = explain(plan, manifest, name, args.rank.map(ReceiverRank))?;
    if args.json {
        say!("{}", serde_json::to_string(&explanation)?);
    } else {
        say!("{}", explanation.to_string().trim_end());
    }
    Ok(())
}

/// The job that the command line describes.
fn job(args: &MakeArgs) -> anyhow::Result<JobSpec> {
    let mut job = match &args.spec {
        Some(path) => {
            let text = read_text(path).with_context(|| format!("cannot read {}", path.display()))?;
            JobSpec::from_json(&text).with_context(|| format!("cannot use {}", path.display()))?
        }
        None => job_of_layouts(args)?,
    };
    if let Some(relay) = args.relay {
        job.options.relay = relay;
    }
    if let Some(chunk) = args.chunk {
        job.options.chunk_bytes_max = chunk << 10;
        job.options.gather_chunk_bytes_max = chunk << 10;
    }
    Ok(job)
}

fn job_of_layouts(args: &MakeArgs) -> anyhow::Result<JobSpec> {
    let config = match &args.config {
        Some(path) => {
            let read = || anyhow::Ok(serde_json::from_str(&read_text(path)?)?);
            Some(read().with_context(|| format!("cannot use {}", path.display()))?)
        }
        None => None,
    };
    let (Some(from), Some(to)) = (&args.from, &args.to) else { bail!("give --from and --to") };
    let standard = Machine::default();
    let machine = Machine {
        gpus_per_host: args.gpus_per_host.unwrap_or(standard.gpus_per_host),
        rails_per_gpu: args.nics_per_gpu.unwrap_or(standard.rails_per_gpu),
        bytes_per_second: args
            .nic_gbps
            .map_or(standard.bytes_per_second, |gbps| ((gbps * 1e9 / 8.0) as u64).max(1)),
    };
    let quant = BlockQuant { scales: args.scales.unwrap_or_default(), ..BlockQuant::default() };
    Ok(JobSpec {
        model: ModelJob { preset: args.model.clone(), config, ..ModelJob::default() },
        trainers: TrainersJob {
            layout: Some(from.clone()),
            gpus: args.train_gpus,
            machine,
            ..TrainersJob::default()
        },
        receivers: ReceiversJob {
            layout: to.clone(),
            gpus: args.infer_gpus,
            fp8: args.fp8.then_some(quant),
            machine,
            ..ReceiversJob::default()
        },
        options: PlanOptions { relay: Relay::Auto, ..PlanOptions::default() },
    })
}

fn job_facts(job: &JobSpec, manifest: &Manifest) -> anyhow::Result<JobFacts> {
    let model = match (&job.model.preset, &job.model.config) {
        (Some(name), _) => Some(ModelSpec::preset(name)?),
        (None, Some(config)) => Some(ModelSpec::from_config(&serde_json::to_string(config)?)?),
        (None, None) => None,
    };
    let name = model.as_ref().map_or("tensors of a job file", ModelSpec::name);
    let parameters = model.as_ref().map_or_else(|| elements(manifest), ModelSpec::parameters);
    let hosts = |hosts: &mut dyn Iterator<Item = &String>| {
        let count = hosts.collect::<BTreeSet<_>>().len();
        format!("{count} host{}", if count == 1 { "" } else { "s" })
    };
    let (trainers, receivers) = (manifest.trainers.len(), manifest.receivers.len());
    let fp8 = if job.receivers.fp8.is_some() { ", FP8" } else { "" };
    Ok(JobFacts {
        title: format!(
            "{name}, {} parameters, {trainers} trainers to {receivers} inference ranks",
            billions(parameters)
        ),
        subtitle: format!(
            "trainers on {}: {}; inference on {}: {}{fp8}",
            hosts(&mut manifest.trainers.iter().map(|rank| &rank.host)),
            job.trainers.layout.as_deref().unwrap_or("meshes"),
            hosts(&mut manifest.receivers.iter().map(|rank| &rank.host)),
            job.receivers.layout,
        ),
        parameters,
        trainers,
        receivers,
    })
}

/// Elements of all tensors, each counted once.
fn elements(manifest: &Manifest) -> u64 {
    let pieces = manifest.trainers.iter().flat_map(|trainer| &trainer.pieces);
    let shapes: BTreeMap<&str, &[u64]> =
        pieces.map(|piece| (piece.tensor.as_str(), piece.shape.as_slice())).collect();
    let elements = |shape: &&[u64]| shape.iter().fold(1, |product: u64, len| product.saturating_mul(*len));
    shapes.values().map(elements).fold(0, u64::saturating_add)
}

fn billions(count: u64) -> String {
    match count as f64 {
        n if n >= 1e9 => format!("{:.1} B", n / 1e9),
        n if n >= 1e6 => format!("{:.1} M", n / 1e6),
        _ => count.to_string(),
    }
}

fn read_text(path: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(TEXT_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > TEXT_BYTES_MAX {
        bail!("it is longer than {}", bytes_text(TEXT_BYTES_MAX));
    }
    Ok(text)
}

fn compare(args: &DiffArgs) -> anyhow::Result<()> {
    let [a, b] = [&args.a, &args.b].map(|path| PlanFile::at(path).and_then(|file| file.read()));
    let diff = diff(&a?, &b?);
    if args.json {
        say!("{}", serde_json::to_string(&diff)?);
    } else {
        say!("{}", diff.to_string().trim_end());
    }
    if diff.equal { Ok(()) } else { bail!("the plans differ") }
}
