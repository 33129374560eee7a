//! The transfer that a command line describes: a model, how trainers hold it, how inference ranks hold it, and how the plan
//! cuts it. What is planned and what is simulated are said in the same words, and nothing here knows which.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{ArgGroup, Args};
use serde::Serialize;
use xfer_plan::model::{JobSpec, Machine, ModelJob, ModelSpec, ReceiversJob, TrainersJob};
use xfer_plan::{BlockQuant, Manifest, PlanOptions, Relay, ScaleFormat};

use crate::table::bytes_text;

/// Length of a `config.json`, a job file or a cluster file.
const TEXT_BYTES_MAX: u64 = 64 << 20;

#[derive(Args)]
#[command(group = ArgGroup::new("what").required(true).args(["model", "config", "spec"]))]
pub(crate) struct TransferArgs {
    /// A model that is known by name, such as kimi-k2 or qwen3-0.6b
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// The config.json of a model
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// A job file: any model and any layout, docs/job-spec.md says how
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["from", "to", "train_gpus", "infer_gpus", "fp8", "scales"]
    )]
    pub(crate) spec: Option<PathBuf>,
    /// How trainers hold the model: factors of fsdp, hsdp, tp, pp, ep and dp
    #[arg(long, value_name = "LAYOUT", required_unless_present = "spec")]
    pub(crate) from: Option<String>,
    /// How inference ranks hold it: factors of tp, ep and replicas
    #[arg(long, value_name = "LAYOUT", required_unless_present = "spec")]
    pub(crate) to: Option<String>,
    /// Trainers that there are: the product of --from must be as many
    #[arg(long, value_name = "N")]
    pub(crate) train_gpus: Option<u64>,
    /// Inference ranks that there are: the product of --to must be as many
    #[arg(long, value_name = "N")]
    pub(crate) infer_gpus: Option<u64>,
    /// Quantise linear layers to FP8 in blocks of 128 x 128 on the way
    #[arg(long)]
    pub(crate) fp8: bool,
    /// How the scales of FP8 blocks are stored: f32 or ue8m0 [default: f32]
    #[arg(long, value_name = "FORMAT", requires = "fp8", value_parser = scales)]
    pub(crate) scales: Option<ScaleFormat>,
    /// How ranks that want the same get it: never (trainers write every copy), per-host (once per host, then over
    /// NVLink), chain (once, then from host to host) or auto (what is predicted to end first) [default: auto; with --spec,
    /// what that says]
    #[arg(long, value_name = "HOW")]
    pub(crate) relay: Option<Relay>,
    /// The longest WRITE, in KiB [default: 1024; with --spec, what that says]
    #[arg(long, value_name = "KIB", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub(crate) chunk: Option<u64>,
    /// A trainer's staging memory, in MiB: what is gathered or transformed and not yet delivered [default: 256; with
    /// --spec, what that says]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub(crate) watermark: Option<u64>,
}

impl TransferArgs {
    /// The job. Without a job file both sides run on `machine`; a job file says it for itself.
    pub(crate) fn job(&self, machine: Machine) -> anyhow::Result<JobSpec> {
        let mut job = match &self.spec {
            Some(path) => {
                let text = read_text(path).with_context(|| format!("cannot read {}", path.display()))?;
                JobSpec::from_json(&text).with_context(|| format!("cannot use {}", path.display()))?
            }
            None => self.job_of_layouts(machine)?,
        };
        if let Some(relay) = self.relay {
            job.options.relay = relay;
        }
        if let Some(chunk) = self.chunk {
            set_chunk(&mut job.options, chunk);
        }
        if let Some(watermark) = self.watermark {
            set_watermark(&mut job.options, watermark);
        }
        Ok(job)
    }

    fn job_of_layouts(&self, machine: Machine) -> anyhow::Result<JobSpec> {
        let config = match &self.config {
            Some(path) => {
                let read = || anyhow::Ok(serde_json::from_str(&read_text(path)?)?);
                Some(read().with_context(|| format!("cannot use {}", path.display()))?)
            }
            None => None,
        };
        let (Some(from), Some(to)) = (&self.from, &self.to) else { bail!("give --from and --to") };
        let quant = BlockQuant { scales: self.scales.unwrap_or_default(), ..BlockQuant::default() };
        Ok(JobSpec {
            model: ModelJob { preset: self.model.clone(), config, ..ModelJob::default() },
            trainers: TrainersJob {
                layout: Some(from.clone()),
                gpus: self.train_gpus,
                machine,
                ..TrainersJob::default()
            },
            receivers: ReceiversJob {
                layout: to.clone(),
                gpus: self.infer_gpus,
                fp8: self.fp8.then_some(quant),
                machine,
                ..ReceiversJob::default()
            },
            options: PlanOptions { relay: Relay::Auto, ..PlanOptions::default() },
        })
    }
}

/// The longest WRITE, gathered or not, in KiB.
pub(crate) fn set_chunk(options: &mut PlanOptions, kib: u64) {
    options.chunk_bytes_max = kib << 10;
    options.gather_chunk_bytes_max = kib << 10;
}

/// A trainer's staging memory, in MiB.
pub(crate) fn set_watermark(options: &mut PlanOptions, mib: u64) {
    options.watermark_bytes = mib << 20;
}

/// What is transferred, in words.
#[derive(Serialize)]
pub(crate) struct JobFacts {
    /// The model, and how many parameters it has.
    pub(crate) model: String,
    /// The same, and how many ranks have it and want it.
    pub(crate) title: String,
    /// The two sides.
    pub(crate) subtitle: String,
    /// Elements of all source tensors that trainers declare.
    parameters: u64,
    trainers: usize,
    receivers: usize,
}

impl JobFacts {
    pub(crate) fn new(job: &JobSpec, manifest: &Manifest) -> anyhow::Result<JobFacts> {
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
        let model = format!("{name}, {} parameters", billions(parameters));
        let fp8 = if job.receivers.fp8.is_some() { ", FP8" } else { "" };
        Ok(JobFacts {
            title: format!("{model}, {trainers} trainers to {receivers} inference ranks"),
            subtitle: format!(
                "trainers on {}: {}; inference on {}: {}{fp8}",
                hosts(&mut manifest.trainers.iter().map(|rank| &rank.host)),
                job.trainers.layout.as_deref().unwrap_or("meshes"),
                hosts(&mut manifest.receivers.iter().map(|rank| &rank.host)),
                job.receivers.layout,
            ),
            model,
            parameters,
            trainers,
            receivers,
        })
    }
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

pub(crate) fn read_text(path: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(TEXT_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > TEXT_BYTES_MAX {
        bail!("it is longer than {}", bytes_text(TEXT_BYTES_MAX));
    }
    Ok(text)
}

fn scales(text: &str) -> Result<ScaleFormat, String> {
    match text {
        "f32" => Ok(ScaleFormat::F32),
        "ue8m0" => Ok(ScaleFormat::Ue8m0),
        _ => Err("f32 or ue8m0 is expected".into()),
    }
}
