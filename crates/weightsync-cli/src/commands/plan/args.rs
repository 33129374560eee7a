//! The command line of `weightsync plan`.

use std::path::PathBuf;

use clap::{ArgGroup, Args, Subcommand};
use xfer_plan::{Relay, ScaleFormat};

use crate::args::positive;

/// The page's name where none is given.
const PAGE_FILE: &str = "weightsync-plan.html";

#[derive(Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_long_help = "Examples:\n  weightsync plan --model kimi-k2 --from fsdp=16,pp=2,ep=8 --to ep=32,replicas=4 \
                       --train-gpus 256 --infer-gpus 128 --fp8\n      the plan of a large job, on a laptop\n  \
                       weightsync plan --model qwen3-0.6b --from fsdp=4 --to tp=2 --html\n      the same as a page to look \
                       at, weightsync-plan.html\n  weightsync plan --spec job.json --explain model.norm.weight --rank 3\n      \
                       who sends a tensor to inference rank 3, from where to where, and why\n  weightsync plan --spec \
                       job.json --out a.bin; weightsync plan diff a.bin b.bin\n      what a change does to the plan\n\n\
                       All times are predicted by a cost model of the hardware. Without --html, --out and a subcommand, \
                       nothing is written but the summary."
)]
pub(crate) struct PlanCommand {
    #[command(subcommand)]
    pub(crate) command: Option<PlanSubcommand>,
    #[command(flatten)]
    pub(crate) make: MakeArgs,
}

#[derive(Subcommand)]
pub(crate) enum PlanSubcommand {
    /// Say how two plans differ; ends with 1 if they do
    Diff(DiffArgs),
}

#[derive(Args)]
pub(crate) struct DiffArgs {
    /// A plan that --out wrote
    #[arg(value_name = "A")]
    pub(crate) a: PathBuf,
    /// Another one
    #[arg(value_name = "B")]
    pub(crate) b: PathBuf,
    /// Print one JSON object instead
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
#[command(group = ArgGroup::new("what").required(true).args(["model", "config", "spec"]))]
pub(crate) struct MakeArgs {
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
        conflicts_with_all = [
            "from", "to", "train_gpus", "infer_gpus", "fp8", "scales", "nic_gbps", "nics_per_gpu", "gpus_per_host"
        ]
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
    #[arg(long, value_name = "HOW", value_parser = relay)]
    pub(crate) relay: Option<Relay>,
    /// The longest WRITE, in KiB [default: 1024]
    #[arg(long, value_name = "KIB", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub(crate) chunk: Option<u64>,
    /// Bandwidth of one NIC in Gb/s [default: 100]
    #[arg(long, value_name = "GBPS", value_parser = positive)]
    pub(crate) nic_gbps: Option<f64>,
    /// NICs of one GPU [default: 4]
    #[arg(long, value_name = "N")]
    pub(crate) nics_per_gpu: Option<u32>,
    /// GPUs of one host [default: 8]
    #[arg(long, value_name = "N")]
    pub(crate) gpus_per_host: Option<u32>,
    /// Write the plan: FILE.bin (compact) or FILE.json
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Write a page that shows the plan; without FILE, weightsync-plan.html
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = PAGE_FILE)]
    pub(crate) html: Option<PathBuf>,
    /// Print one JSON object instead of the summary
    #[arg(long)]
    pub(crate) json: bool,
    /// Prove that every byte of every parameter is written exactly once and from the right place, and say how long that took
    #[arg(long)]
    pub(crate) check: bool,
    /// Say who sends the parts of this source tensor, or parameter, from where to where and why, instead of the summary
    #[arg(long, value_name = "NAME")]
    pub(crate) explain: Option<String>,
    /// Only what reaches this inference rank
    #[arg(long, value_name = "R", requires = "explain")]
    pub(crate) rank: Option<u32>,
}

fn relay(text: &str) -> Result<Relay, String> {
    match text {
        "never" => Ok(Relay::Never),
        "per-host" => Ok(Relay::PerHost),
        "chain" => Ok(Relay::Chain),
        "auto" => Ok(Relay::Auto),
        _ => Err("one of never, per-host, chain and auto is expected".into()),
    }
}

fn scales(text: &str) -> Result<ScaleFormat, String> {
    match text {
        "f32" => Ok(ScaleFormat::F32),
        "ue8m0" => Ok(ScaleFormat::Ue8m0),
        _ => Err("f32 or ue8m0 is expected".into()),
    }
}
