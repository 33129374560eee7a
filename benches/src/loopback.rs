//! One trainer to one inference rank on this machine: `tcp` beside a plain libfabric loop, `local` beside a memcpy.

use std::cell::RefCell;
use std::path::PathBuf;

use serde::Serialize;
use weightsync::{Controller, ServerConfig, World};

use crate::machine::Machine;
use crate::process::Process;
use crate::roles::Transfer;

#[derive(clap::Parser)]
#[command(
    bin_name = "bench loopback",
    about = "One trainer to one inference rank on this machine, beside a plain loop and a memcpy"
)]
pub(crate) struct Options {
    /// What a round moves
    #[arg(long, default_value_t = 4, value_name = "GIB", value_parser = clap::value_parser!(u64).range(1..=1024))]
    gib: u64,
    /// Rounds that count; one more goes first and does not
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// The plain libfabric loop; without it there is no reference over libfabric
    #[arg(long, value_name = "PATH")]
    plain_loop: Option<PathBuf>,
    /// Print JSON instead of the table
    #[arg(long)]
    json: bool,
}

impl Options {
    fn bytes(&self) -> u64 {
        self.gib << 30
    }
}

#[derive(Serialize)]
struct Comparison {
    /// What was measured.
    name: &'static str,
    /// The ratio of medians that is asked of it, beside the fastest reference.
    target: f64,
    ratio: f64,
    ours: Series,
    references: Vec<Series>,
    /// The trainer's most memory, beyond its weights, and for `local` beyond the arena that it maps and fills.
    trainer_overhead_bytes: u64,
}

/// The rounds of one program.
#[derive(Serialize)]
struct Series {
    name: &'static str,
    gb_per_second: Vec<f64>,
    median: f64,
}

impl Series {
    fn new(name: &'static str, gb_per_second: Vec<f64>) -> Self {
        let mut sorted = gb_per_second.clone();
        sorted.sort_by(f64::total_cmp);
        let median = sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN);
        Self { name, gb_per_second, median }
    }
}

/// Something to measure beside, one round a call.
type Reference<'a> = (&'static str, &'a mut dyn FnMut() -> anyhow::Result<Transfer>);

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
            let bytes = options.bytes().to_string();
            let args = ["--ask", "--total-bytes", &bytes, "--region-bytes", &bytes];
            let plain = RefCell::new(Process::start(plain_loop, &args)?);
            let references: [Reference; 2] = [
                ("plain libfabric loop, receiver sleeps", &mut || plain.borrow_mut().round("sleep")),
                ("plain libfabric loop, receiver spins", &mut || plain.borrow_mut().round("spin")),
            ];
            comparisons.push(compare(options, "tcp", 0.95, references.into())?);
            plain.into_inner().finish()?;
        }
        None => eprintln!("skipped: tcp (no --plain-loop: no reference to measure beside)"),
    }
    let mut copier = Process::role(&["memcpy", &options.bytes().to_string()])?;
    comparisons.push(compare(
        options,
        "local",
        0.9,
        vec![("memcpy of one thread", &mut || copier.round("copy"))],
    )?);
    copier.finish()?;

    let results = Results {
        benchmark: "loopback",
        machine: Machine::read()?,
        bytes: options.bytes(),
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

/// Rounds of ours and of every reference, in turn. One round of each goes first and is not counted: it touches memory.
fn compare(
    options: &Options,
    fabric: &'static str,
    target: f64,
    mut references: Vec<Reference>,
) -> anyhow::Result<Comparison> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let world = World { trainers: 1, inference: 1 };
    let controller = runtime.block_on(async {
        let config = ServerConfig::loopback(world)?;
        anyhow::Ok(Controller::bind(config).await?.spawn(|_| {}))
    })?;
    let (address, bytes) = (controller.local_addr().to_string(), options.bytes().to_string());
    let inference = Process::role(&["inference", &address, &bytes, fabric])?;
    let mut trainer = Process::role(&["trainer", &address, &bytes, fabric])?;
    let mut ours = Vec::new();
    let mut theirs = vec![Vec::new(); references.len()];
    let mut trainer_overhead_bytes = 0;
    for round in 0..=options.rounds {
        let pushed: Transfer = trainer.round("push")?;
        let mut line = format!("{fabric} {:.2} GB/s", pushed.gb_per_second());
        for ((name, reference), series) in references.iter_mut().zip(&mut theirs) {
            let rate = reference()?.gb_per_second();
            line += &format!("; {name} {rate:.2} GB/s");
            if round > 0 {
                series.push(rate);
            }
        }
        if round > 0 {
            ours.push(pushed.gb_per_second());
        }
        eprintln!("{line}{}", if round == 0 { " (warm-up, not counted)" } else { "" });
        let mapped = if fabric == "local" { options.bytes() } else { 0 };
        trainer_overhead_bytes = pushed.peak_rss_bytes.saturating_sub(options.bytes() + mapped);
    }
    trainer.finish()?;
    inference.finish()?;
    let ours = Series::new("weightsync", ours);
    let names = references.iter().map(|(name, _)| *name);
    let references: Vec<Series> = names.zip(theirs).map(|(name, series)| Series::new(name, series)).collect();
    let fastest = references.iter().map(|series| series.median).fold(f64::NAN, f64::max);
    Ok(Comparison {
        name: fabric,
        target,
        ratio: ours.median / fastest,
        ours,
        references,
        trainer_overhead_bytes,
    })
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
            "{:6} {:6.2} GB/s   ratio {:.2} to the fastest reference (target {:.2})   {} MiB more memory than the weights",
            comparison.name,
            comparison.ours.median,
            comparison.ratio,
            comparison.target,
            comparison.trainer_overhead_bytes >> 20,
        );
        for reference in &comparison.references {
            println!("       {:6.2} GB/s   {}", reference.median, reference.name);
        }
    }
}
