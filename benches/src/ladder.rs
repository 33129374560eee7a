//! What each technique is worth: switched on one by one, on rails that move nothing and over the lab's shaped links,
//! beside the ladder that others climbed on a p5 host.
//!
//! Without a technique nothing is simulated: the thread really is one, the counters really are shared.

use std::sync::Arc;

use efa_core::LeaseMut;
use serde::Serialize;
use weightsync_lab::{Lab, LabOptions, Side};
use xfer_exec::RailLimits;
use xfer_exec::driver::HostRail;
use xfer_exec::null::NullRail;

use crate::machine::Machine;
use crate::process::Process;
use crate::roles::Transfer;
use crate::series::{Better, Series};

mod gpu;
mod handicap;
mod link;

use gpu::{Gpu, on};
use handicap::Shared;
pub(crate) use link::{sender, target};

/// What is switched on. Each rung has what those before it have.
pub(crate) struct Rung {
    name: &'static str,
    warm: bool,
    threads: bool,
    pinned: bool,
    sharded: bool,
    batches: bool,
    lazy: bool,
    /// Gb/s that the reference program reached with the same on a p5 host of 3200 Gb/s.
    reference_gbps: u32,
}

const NOTHING: Rung = Rung {
    name: "one thread",
    warm: false,
    threads: false,
    pinned: false,
    sharded: false,
    batches: false,
    lazy: false,
    reference_gbps: 287,
};
const WARM: Rung = Rung { name: "+ warm-up", warm: true, reference_gbps: 293, ..NOTHING };
const THREADS: Rung = Rung { name: "+ a thread per GPU", threads: true, reference_gbps: 355, ..WARM };
const PINNED: Rung = Rung { name: "+ pinned to a core", pinned: true, reference_gbps: 1238, ..THREADS };
const SHARDED: Rung = Rung { name: "+ state of its own", sharded: true, reference_gbps: 1523, ..PINNED };
const BATCHES: Rung = Rung { name: "+ 16 posts a poll", batches: true, reference_gbps: 2589, ..SHARDED };
const LAZY: Rung = Rung { name: "+ lazy posting", lazy: true, reference_gbps: 3108, ..BATCHES };
const RUNGS: [Rung; 7] = [NOTHING, WARM, THREADS, PINNED, SHARDED, BATCHES, LAZY];

/// Of the reference's host.
const REFERENCE_MAX_GBPS: u32 = 3200;

/// As the reference's: a p5 host has 4 NICs a GPU, and wrote in pages of 64 KiB.
const RAILS_PER_GPU: u32 = 4;
const CHUNK_BYTES: u32 = 64 << 10;

/// Receivers of the null rails: a host's worth, so that turns are taken.
const RECEIVERS: u32 = 8;

/// Polls until a null rail completes a WRITE.
const POLLS: u64 = 4;

/// WRITEs of a GPU in a push on null rails, about as many as a trainer of Kimi-K2 needs for its 23 GB; and pushes of a round.
const WRITES: u64 = 1 << 18;
const PUSHES: usize = 8;

/// In the lab: two GPUs a host, each with half of the links, and what each holds: about a second's worth.
const LAB_GPUS: u16 = 2;
const LAB_BYTES: usize = 192 << 20;

#[derive(clap::Parser)]
#[command(
    bin_name = "bench ladder",
    about = "What each technique is worth, on rails that move nothing and in the lab"
)]
pub(crate) struct Options {
    /// Rounds that count; one more goes first and does not
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Print a record for `bench compare`
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Results {
    benchmark: &'static str,
    machine: Machine,
    settings: Settings,
    series: Vec<Series>,
    /// Gb/s of the reference program on its p5 host, by rung.
    reference_gbps: Vec<u32>,
}

/// What the figures are of.
#[derive(Serialize)]
struct Settings {
    gpus: usize,
    rails_per_gpu: u32,
    chunk_bytes: u32,
    lab_links: u16,
    lab_rate_bits: u64,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let gpus = std::thread::available_parallelism()?.get().min(8);
    let lab = LabOptions::default();
    let mut series = Vec::new();
    for rung in &RUNGS {
        eprintln!("null rails, {}", rung.name);
        let rounds = null(rung, gpus, options.rounds.into())?;
        series.push(Series::new(
            format!("null rails: {}", rung.name),
            "million WRITEs/s",
            Better::Higher,
            rounds,
        ));
    }
    match Lab::up("ladder", &lab) {
        Ok(lab) => {
            for (number, rung) in RUNGS.iter().enumerate() {
                eprintln!("lab, {}", rung.name);
                let rounds = links(&lab, number, rung, options.rounds.into())?;
                series.push(Series::new(
                    format!("lab: {}", rung.name),
                    "% of payload",
                    Better::Higher,
                    rounds,
                ));
            }
        }
        Err(why) => eprintln!("skipped: the lab: {why}"),
    }
    let results = Results {
        benchmark: "ladder",
        machine: Machine::read()?,
        settings: Settings {
            gpus,
            rails_per_gpu: RAILS_PER_GPU,
            chunk_bytes: CHUNK_BYTES,
            lab_links: lab.links,
            lab_rate_bits: lab.rate_bits,
        },
        series,
        reference_gbps: RUNGS.iter().map(|rung| rung.reference_gbps).collect(),
    };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&results)?);
    } else {
        print(&results, &lab);
    }
    Ok(())
}

fn print(results: &Results, lab: &LabOptions) {
    let Settings { gpus, rails_per_gpu, chunk_bytes, .. } = &results.settings;
    println!("machine  {}", results.machine);
    println!(
        "null     {gpus} GPUs of {rails_per_gpu} rails that move nothing, WRITEs of {} KiB; a p5 GPU needs 0.76 million WRITEs/s",
        chunk_bytes >> 10
    );
    println!(
        "lab      {LAB_GPUS} GPUs a side over {} shaped links of {} Mb/s; share of what they carry as TCP payload",
        lab.links,
        lab.rate_bits / 1_000_000
    );
    println!("{:22}  {:>13}  {:>7}  {:>20}", "", "null, Mop/s", "lab, %", "reference, Gb/s (%)");
    let median = |name: String| {
        let found = results.series.iter().find(|series| series.name == name);
        found.map_or_else(|| "-".into(), |series| format!("{:.2}", series.spread().median))
    };
    for rung in &RUNGS {
        let reference = f64::from(rung.reference_gbps) * 100.0 / f64::from(REFERENCE_MAX_GBPS);
        println!(
            "{:22}  {:>13}  {:>7}  {:>20}",
            rung.name,
            median(format!("null rails: {}", rung.name)),
            median(format!("lab: {}", rung.name)),
            format!("{} ({reference:.1})", rung.reference_gbps),
        );
    }
}

/// The share, in percent, of the payload that the lab's links can carry, by round.
fn links(lab: &Lab, number: usize, rung: &Rung, rounds: usize) -> anyhow::Result<Vec<f64>> {
    let options = lab.options();
    let (links, bytes) = (options.links.to_string(), LAB_BYTES.to_string());
    let (gpus, number) = (LAB_GPUS.to_string(), number.to_string());
    let mut target = Process::launch(
        lab.command(Side::B, std::env::current_exe()?),
        &["ladder-target", &gpus, &links, &bytes],
    )?;
    let endpoints: serde_json::Value = target.answer()?;
    let start = || -> anyhow::Result<Process> {
        let command = lab.command(Side::A, std::env::current_exe()?);
        let mut sender = Process::launch(command, &["ladder-sender", &number, &links, &bytes])?;
        sender.ask(&endpoints.to_string())?;
        Ok(sender)
    };
    let capacity_bits = options.rate_bits as f64 * f64::from(options.links) * Lab::payload_share(options.mtu);
    let mut shares = Vec::with_capacity(rounds);
    let mut sender = start()?;
    // What is warm is measured warm; what is cold has a new process each time.
    if rung.warm {
        sender.round::<Transfer>("push")?;
    }
    for round in 0..rounds {
        if !rung.warm && round > 0 {
            std::mem::replace(&mut sender, start()?).finish()?;
        }
        let Transfer { bytes, seconds, .. } = sender.round("push")?;
        shares.push(bytes as f64 * 8.0 / seconds / capacity_bits * 100.0);
    }
    sender.finish()?;
    target.finish()?;
    Ok(shares)
}

/// Million WRITEs per second of all GPUs together over rails that move nothing, by round.
fn null(rung: &Rung, gpus: usize, rounds: usize) -> anyhow::Result<Vec<f64>> {
    let shared = Arc::new(Shared::default());
    let limits = RailLimits { depth: 128, in_flight_bytes_max: u64::MAX, takes_rows: false };
    let gpu = |_| {
        let rail = |_| -> HostRail { on(rung, Box::new(NullRail::new(limits, POLLS)), &shared) };
        let rails = (0..RAILS_PER_GPU).map(rail).collect();
        // Nothing reads it: a few chunks stand for all.
        let weights = LeaseMut::zeroed(CHUNK_BYTES as usize * 16)?.freeze();
        Gpu::new(weights, CHUNK_BYTES, WRITES / 16, RECEIVERS, rails)
    };
    let mut gpus = (0..gpus).map(gpu).collect::<anyhow::Result<Vec<_>>>()?;
    let mut rates = Vec::with_capacity(rounds);
    for round in 0..=rounds {
        let (mut writes, mut seconds) = (0, 0.0);
        for _ in 0..PUSHES {
            let pushed = gpu::push(&mut gpus, rung)?;
            (writes, seconds) = (writes + pushed.0, seconds + pushed.1);
        }
        // The first one touches memory and learns what rails deliver.
        if round > 0 {
            rates.push(writes as f64 / seconds / 1e6);
        }
    }
    Ok(rates)
}
