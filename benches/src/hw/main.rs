//! What this host's GPUs do for a push, each figure beside CUDA's own copy in the same run. Started by `cargo xtask hw`, or by
//! the `run.sh` that it makes for hosts without Rust.
//!
//! Whatever is measured is first run once on poisoned memory and compared with what the CPU computes, byte for byte. A figure
//! that cannot be had is a line of the table that says why; it never keeps the others from being measured.

#![forbid(unsafe_code)]

mod data;
mod gpu;
mod kernels;
mod link;
mod machine;
mod measure;
mod nccl;
mod peers;
mod pipeline;
mod push;
mod registration;
mod report;
// As in the other benchmarks of this package, which use more of it.
#[allow(dead_code)]
#[path = "../series.rs"]
mod series;
#[path = "../table.rs"]
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Parser as _;
use gpu_mem::{Cuda, Device};
use serde::Serialize;

use data::Weights;
use gpu::Gpu;
use machine::Machine;
use report::Report;

/// Rows of 128 x 128 blocks of [`kernels::COLUMNS`] columns are whole in multiples of 4 MiB, in BF16 and in F32; the longest
/// spans have 8 MiB.
const GRAIN_MIB: u64 = 8;

#[derive(clap::Parser, Serialize)]
#[command(bin_name = "hw", about = "GPU kernels, copies and registration beside CUDA's own copies")]
struct Options {
    /// What a kernel reads, in MiB; rounded down to a multiple of 8
    #[arg(long, default_value_t = 1024, value_name = "MIB", value_parser = clap::value_parser!(u64).range(GRAIN_MIB..=1 << 16))]
    mib: u64,
    /// Rounds that count; three more go first and do not
    #[arg(long, default_value_t = 21, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// The most memory that is registered at once, in MiB; the host's is at most 16 GiB, a GPU's 70 GB
    #[arg(long, default_value_t = 1 << 20, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    arena_mib: u64,
    /// Where the results go as JSON
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    json: Option<PathBuf>,
}

fn main() -> anyhow::Result<ExitCode> {
    let options = Options::parse();
    let cuda = Cuda::open().context("no CUDA device")?;
    let devices = cuda.devices().context("no CUDA device")?;
    let Some(first) = devices.first() else { bail!("no CUDA device: the driver shows none") };
    let machine = Machine::read(&cuda, &devices)?;
    println!("{machine}");
    let bytes = (options.mib / GRAIN_MIB * GRAIN_MIB) << 20;
    let mut report = Report::new(options.rounds.into());
    report.part("one GPU", |report| on_one(report, first, bytes, options.arena_mib << 20));
    report.part("several GPUs", |report| between(report, &devices, bytes));
    println!("{}", report.table());
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&report.record(&machine, &options))?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
        println!("as JSON: {}", path.display());
    }
    Ok(if report.has_failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn on_one(report: &mut Report, device: &Device, bytes: u64, arena_bytes: u64) -> anyhow::Result<()> {
    let gpu = Gpu::new(device)?;
    {
        let weights = Weights::new(&gpu, bytes)?;
        report.part("kernels", |report| kernels::measure(report, &gpu, &weights));
        report.part("host and GPU", |report| link::measure(report, &gpu, &weights.halves));
        report.part("pipeline", |report| pipeline::measure(report, &gpu, &weights.halves));
    }
    report.part("offloaded pushes", |report| push::measure_offloaded(report, &gpu, bytes));
    report.part("host arena", |report| registration::host(report, &gpu, bytes, arena_bytes));
    report.part("GPU arena", |report| registration::device(report, device, arena_bytes));
    Ok(())
}

fn between(report: &mut Report, devices: &[Device], bytes: u64) -> anyhow::Result<()> {
    if devices.len() < 2 {
        report.skip("between GPUs", "one CUDA device");
        return Ok(());
    }
    let gpus = devices.iter().map(Gpu::new).collect::<anyhow::Result<Vec<_>>>()?;
    for peer in &devices[1..] {
        if !devices[0].can_access(peer)? {
            report.skip("between GPUs", &format!("{} cannot reach {peer}", devices[0]));
            return Ok(());
        }
    }
    let peer_copy = peers::measure(report, &gpus, bytes)?;
    report.part("pushes", |report| push::measure(report, &gpus, bytes));
    nccl::measure(report, bytes, peer_copy);
    Ok(())
}
