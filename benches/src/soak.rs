//! `cargo xtask soak`: a job of real processes pushes a small model so often that a leak of a byte or two per push shows.
//!
//! For each fabric a controller, two trainers and two inference ranks of the `weightsync` command push and commit, with
//! checksums in band, and the ranks compare every byte that they serve of every so many versions with the reference. Meanwhile
//! memory, descriptors and threads of every process are read. The exit code says whether all of them are flat, as [`flat`]
//! defines it, every comparison was made, every process ended well and nothing stayed behind. It never compares times.

mod flat;
pub(crate) mod left;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use serde::Serialize;
use weightsync::Fabric;

use crate::machine::Machine;
use crate::table::Table;
use flat::Flatness;
use left::SharedMemory;
use watch::{Series, Watched, watch};

/// What is said of a run that has too few samples.
const TOO_SHORT: &str = "it was over too soon after the warm-up to say anything: ask for more --pushes";

#[derive(Parser)]
#[command(name = "soak", about = "Pushes a small model very often and checks that nothing grows")]
pub(crate) struct Options {
    /// The weightsync command
    #[arg(long, value_name = "FILE")]
    weightsync: PathBuf,
    /// Pushes over each fabric. Warm-up is a tenth of them and 15 s at least
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(4000..=1_000_000_000))]
    pushes: u64,
    /// One run each: local (shared memory), tcp
    #[arg(long, default_value = "local,tcp", value_name = "NAME,...", value_delimiter = ',')]
    fabric: Vec<Fabric>,
    /// The inference ranks are replicas, and pass on to each other what they get
    #[arg(long)]
    relay: bool,
    /// Inference ranks compare every byte that they serve of each Nth version
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    check_every: u64,
    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,
}

/// What came of all runs.
#[derive(Serialize)]
struct Results {
    benchmark: &'static str,
    machine: Machine,
    pushes: u64,
    relay: bool,
    runs: Vec<Run>,
}

/// What came of the run over one fabric.
#[derive(Serialize)]
struct Run {
    fabric: String,
    /// After the warm-up.
    pushes_per_second: f64,
    /// Versions of which every served byte was compared, of all inference ranks together.
    checked: u64,
    processes: Vec<Process>,
    /// What the processes logged.
    log: Vec<String>,
    /// What did not go as it must, in words.
    wrong: Vec<String>,
}

/// What came of one process.
#[derive(Serialize)]
struct Process {
    name: String,
    #[serde(flatten)]
    flatness: Flatness,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let mut runs = Vec::new();
    for fabric in &options.fabric {
        runs.push(soak(options, *fabric).with_context(|| format!("the run over {fabric}"))?);
    }
    let Options { pushes, relay, .. } = *options;
    let results = Results { benchmark: "soak", machine: Machine::read()?, pushes, relay, runs };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&results)?);
    } else {
        print(&results);
    }
    let flat = results.runs.iter().all(|run| run.wrong.is_empty());
    Ok(if flat { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn soak(options: &Options, fabric: Fabric) -> anyhow::Result<Run> {
    let before = SharedMemory::now();
    let watched = watch(options, fabric)?;
    let pushes_per_second = watched.pushes_per_second().context(TOO_SHORT)?;
    let (mut processes, mut wrong) = (Vec::new(), Vec::new());
    for Series { name, samples, .. } in &watched.processes {
        let flatness = Flatness::of(samples).context(TOO_SHORT)?;
        wrong.extend(flatness.wrong.iter().map(|what| format!("{name}: {what}")));
        processes.push(Process { name: name.clone(), flatness });
    }
    let to_check = options.pushes / options.check_every * u64::from(watch::WORLD.inference);
    if watched.checked != to_check {
        wrong.push(format!("{} versions were compared, and not {to_check}", watched.checked));
    }
    let left = before.left_by(&watched.processes.iter().map(|process| process.pid).collect::<Vec<_>>());
    if !left.is_empty() {
        wrong.push(format!("left in /dev/shm: {}", left.join(", ")));
    }
    let Watched { checked, log, .. } = watched;
    Ok(Run { fabric: fabric.to_string(), pushes_per_second, checked, processes, log, wrong })
}

fn print(results: &Results) {
    println!("machine  {}", results.machine);
    println!(
        "job      {} trainers, {} inference ranks{}; {} pushes over each fabric",
        watch::WORLD.trainers,
        watch::WORLD.inference,
        if results.relay { " that pass on to each other" } else { "" },
        results.pushes
    );
    for run in &results.runs {
        println!(
            "{:8} {:.0} pushes/s; every byte compared of {} versions, all ranks together",
            run.fabric, run.pushes_per_second, run.checked
        );
    }
    let mut table = Table::new(&[
        "fabric",
        "process",
        "resident, KiB",
        "growth, bytes/push",
        "flat up to",
        "files",
        "threads",
        "CPU, ms/push",
    ]);
    for run in &results.runs {
        for Process { name, flatness } in &run.processes {
            let (from, to) = flatness.resident_bytes;
            table.row(vec![
                run.fabric.clone(),
                name.clone(),
                format!("{} to {}", from >> 10, to >> 10),
                format!("{:.2}", flatness.bytes_per_push),
                format!("{:.2}", flatness.bytes_per_push_max),
                counts(flatness.files),
                counts(flatness.threads),
                format!("{:.2}", flatness.cpu_seconds_per_push * 1e3),
            ]);
        }
    }
    print!("\n{}\n", table.markdown());
    if results.runs.iter().all(|run| run.wrong.is_empty()) {
        println!("all of it is flat, and nothing was left in /dev/shm");
    }
    for run in &results.runs {
        for line in &run.log {
            println!("logged: {}: {line}", run.fabric);
        }
        for wrong in &run.wrong {
            println!("not as it must be: {}: {wrong}", run.fabric);
        }
    }
}

/// One number, if both are the same.
fn counts((least, most): (u64, u64)) -> String {
    if least == most { least.to_string() } else { format!("{least} to {most}") }
}
