//! The command line of `weightsync plan`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use xfer_plan::model::Machine;

use crate::args::positive;
use crate::commands::transfer::TransferArgs;

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
pub(crate) struct MakeArgs {
    #[command(flatten)]
    pub(crate) transfer: TransferArgs,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
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

/// The hosts of both sides, where no job file says what they are.
#[derive(Args)]
pub(crate) struct MachineArgs {
    /// Bandwidth of one NIC in Gb/s [default: 100]
    #[arg(long, value_name = "GBPS", value_parser = positive, conflicts_with = "spec")]
    nic_gbps: Option<f64>,
    /// NICs of one GPU [default: 4]
    #[arg(long, value_name = "N", conflicts_with = "spec")]
    nics_per_gpu: Option<u32>,
    /// GPUs of one host [default: 8]
    #[arg(long, value_name = "N", conflicts_with = "spec")]
    gpus_per_host: Option<u32>,
}

impl MachineArgs {
    pub(crate) fn machine(&self) -> Machine {
        let standard = Machine::default();
        Machine {
            gpus_per_host: self.gpus_per_host.unwrap_or(standard.gpus_per_host),
            rails_per_gpu: self.nics_per_gpu.unwrap_or(standard.rails_per_gpu),
            bytes_per_second: self
                .nic_gbps
                .map_or(standard.bytes_per_second, |gbps| ((gbps * 1e9 / 8.0) as u64).max(1)),
        }
    }
}
