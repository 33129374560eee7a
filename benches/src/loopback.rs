//! One trainer to one inference rank on this machine: `tcp` beside a plain libfabric loop, `local` beside a memcpy.

use std::path::PathBuf;

use anyhow::{Context, bail};
use serde::Serialize;
use weightsync::{Controller, ServerConfig, World};

use crate::machine::Machine;
use crate::process::Process;
use crate::roles::Transfer;

/// What was asked for.
pub(crate) struct Options {
    bytes: u64,
    rounds: usize,
    plain_loop: Option<PathBuf>,
    json: bool,
}

impl Options {
    pub(crate) fn parse(words: &[&str]) -> anyhow::Result<Self> {
        let mut options = Self { bytes: 4 << 30, rounds: 5, plain_loop: None, json: false };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let mut value = || words.next().with_context(|| format!("{word} needs a value"));
            match *word {
                "--gib" => options.bytes = value()?.parse::<u64>()?.clamp(1, 1024) << 30,
                "--rounds" => options.rounds = value()?.parse::<usize>()?.clamp(1, 1000),
                "--plain-loop" => options.plain_loop = Some(value()?.into()),
                "--json" => options.json = true,
                other => bail!("unknown option {other}"),
            }
        }
        Ok(options)
    }
}

#[derive(Serialize)]
struct Comparison {
    /// What was measured.
    name: &'static str,
    /// Beside what.
    reference: &'static str,
    /// The ratio of medians that is asked of it.
    target: f64,
    ours_gb_per_second: Vec<f64>,
    reference_gb_per_second: Vec<f64>,
    ours_median: f64,
    reference_median: f64,
    ratio: f64,
    /// The trainer's most memory, beyond its weights, and for `local` beyond the arena that it maps and fills.
    trainer_overhead_bytes: u64,
}

#[derive(Serialize)]
struct Results {
    benchmark: &'static str,
    machine: Machine,
    bytes: u64,
    span_bytes: u64,
    comparisons: Vec<Comparison>,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let mut comparisons = Vec::new();
    match &options.plain_loop {
        Some(plain_loop) => {
            let program = plain_loop.display().to_string();
            let bytes = options.bytes.to_string();
            let reference = || -> anyhow::Result<Transfer> {
                let mut process =
                    Process::start(&program, &["--total-bytes", &bytes, "--region-bytes", &bytes])?;
                let transfer = process.answer()?;
                process.finish()?;
                Ok(transfer)
            };
            comparisons.push(compare(options, "tcp", "plain libfabric loop", 0.95, reference)?);
        }
        None => eprintln!("skipped: tcp (no --plain-loop: no reference to measure beside)"),
    }
    let mut copier = Process::role(&["memcpy", &options.bytes.to_string()])?;
    let reference = || -> anyhow::Result<Transfer> {
        copier.ask("copy")?;
        copier.answer()
    };
    comparisons.push(compare(options, "local", "memcpy of one thread", 0.9, reference)?);
    copier.finish()?;

    let results = Results {
        benchmark: "loopback",
        machine: Machine::read()?,
        bytes: options.bytes,
        span_bytes: crate::roles::SPAN_BYTES,
        comparisons,
    };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&results)?);
    } else {
        print(&results);
    }
    Ok(())
}

/// Rounds of ours and of the reference, in turn. One round of each goes first and is not counted: it touches memory.
fn compare(
    options: &Options,
    fabric: &'static str,
    reference_name: &'static str,
    target: f64,
    mut reference: impl FnMut() -> anyhow::Result<Transfer>,
) -> anyhow::Result<Comparison> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let world = World { trainers: 1, inference: 1 };
    let controller = runtime.block_on(async {
        let config = ServerConfig::loopback(world)?;
        anyhow::Ok(Controller::bind(config).await?.spawn(|_| {}))
    })?;
    let (address, bytes) = (controller.local_addr().to_string(), options.bytes.to_string());
    let inference = Process::role(&["inference", &address, &bytes, fabric])?;
    let mut trainer = Process::role(&["trainer", &address, &bytes, fabric])?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let mut trainer_overhead_bytes = 0;
    for round in 0..=options.rounds {
        trainer.ask("push")?;
        let pushed: Transfer = trainer.answer()?;
        let copied = reference()?;
        if !options.json {
            let note = if round == 0 { " (warm-up, not counted)" } else { "" };
            eprintln!(
                "{fabric} {:.2} GB/s, {reference_name} {:.2} GB/s{note}",
                pushed.gb_per_second(),
                copied.gb_per_second()
            );
        }
        let mapped = if fabric == "local" { options.bytes } else { 0 };
        trainer_overhead_bytes = pushed.peak_rss_bytes.saturating_sub(options.bytes + mapped);
        if round > 0 {
            ours.push(pushed.gb_per_second());
            theirs.push(copied.gb_per_second());
        }
    }
    trainer.finish()?;
    inference.finish()?;
    let (ours_median, reference_median) = (median(&ours), median(&theirs));
    Ok(Comparison {
        name: fabric,
        reference: reference_name,
        target,
        ratio: ours_median / reference_median,
        ours_gb_per_second: ours,
        reference_gb_per_second: theirs,
        ours_median,
        reference_median,
        trainer_overhead_bytes,
    })
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

fn print(results: &Results) {
    println!("machine  {}", results.machine);
    println!(
        "moved    {} GiB in {} KiB spans, median of rounds",
        results.bytes >> 30,
        results.span_bytes >> 10
    );
    for comparison in &results.comparisons {
        println!(
            "{:6} {:6.2} GB/s   {} {:.2} GB/s   ratio {:.2} (target {:.2})   {} MiB more memory than the weights",
            comparison.name,
            comparison.ours_median,
            comparison.reference,
            comparison.reference_median,
            comparison.ratio,
            comparison.target,
            comparison.trainer_overhead_bytes >> 20,
        );
    }
}
