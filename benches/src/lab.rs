//! A push over 32 shaped links: a p5 host's NICs at 1:1000, from two trainers to two inference ranks.
//!
//! Beside it, a plain libfabric loop over one of the links, times as many as there are. Both are shares of what the links can
//! carry as TCP payload. Nothing here says anything about a real network's latency.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde::Serialize;
use weightsync_lab::{LINKS_MAX, Lab, LabOptions, Side};

use crate::machine::Machine;
use crate::process::Process;
use crate::roles::Transfer;
use crate::series::{Better, Series};

mod job;
mod push;
mod role;

pub(crate) use job::Job;
pub(crate) use push::Ranks;
pub(crate) use role::{controller, inference, trainer};

/// Ranks a side.
const RANKS: u32 = 2;

/// The link that is slow where one is, and the divisor of its rate.
const SLOW_LINK: u16 = 3;
const SLOW_DIVISOR: u64 = 4;

/// What the plain loop moves over one link.
const PLAIN_BYTES: u64 = 64 << 20;

/// For how long the idle ranks are watched.
const IDLE: Duration = Duration::from_secs(5);

/// What an idle rank may take of a core, in percent.
const IDLE_TARGET: f64 = 1.0;

/// Payload shares that are asked for: with even links, and with one slow link of the new sum.
const TARGETS: [f64; 2] = [97.0, 95.0];

#[derive(clap::Parser)]
#[command(
    bin_name = "bench lab",
    about = "A push over shaped links between two network namespaces, beside a plain loop over one of them"
)]
pub(crate) struct Options {
    /// Links between the two sides
    #[arg(long, default_value_t = 32, value_name = "N", value_parser = clap::value_parser!(u16).range(8..=i64::from(LINKS_MAX)))]
    links: u16,
    /// What a round moves
    #[arg(long, default_value_t = 2, value_name = "GIB", value_parser = clap::value_parser!(u64).range(1..=64))]
    gib: u64,
    /// Rounds that count; one more goes first and does not
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// The plain libfabric loop; without it there is no reference over libfabric
    #[arg(long, value_name = "PATH")]
    plain_loop: Option<PathBuf>,
    /// Print a record for `bench compare`
    #[arg(long)]
    json: bool,
}

impl Options {
    fn bytes(&self) -> u64 {
        self.gib << 30
    }
}

#[derive(Serialize)]
struct Results {
    benchmark: &'static str,
    machine: Machine,
    settings: Settings,
    series: Vec<Series>,
    /// What each rail of the trainers carried in the last round, by series and trainer.
    rails: Vec<(String, Vec<Vec<u64>>)>,
}

/// What the figures are of.
#[derive(Serialize)]
struct Settings {
    links: u16,
    rate_bits: u64,
    mtu: u32,
    bytes: u64,
    trainers: u32,
    inference: u32,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let even = LabOptions { links: options.links, ..LabOptions::default() };
    let slow = LabOptions { slow: vec![(SLOW_LINK, even.rate_bits / SLOW_DIVISOR)], ..even.clone() };
    let (mut series, mut rails) = (Vec::new(), Vec::new());
    for (links, named) in [(&even, "even links"), (&slow, "one link at a quarter")] {
        let lab = Lab::up("bench", links)?;
        for chunk_bytes in [64 << 10, 1 << 20] {
            let name = format!("{named}, WRITEs of {} KiB", chunk_bytes >> 10);
            eprintln!("{name}");
            if let (Some(plain_loop), true) = (&options.plain_loop, links.slow.is_empty()) {
                let rounds = plain(&lab, plain_loop, chunk_bytes, options.rounds.into())?;
                series.push(Series::new(
                    format!("{name}: plain loop"),
                    "% of payload",
                    Better::Higher,
                    rounds,
                ));
            }
            let pushed = push(&lab, chunk_bytes, options)?;
            series.push(Series::new(
                format!("{name}: weightsync"),
                "% of payload",
                Better::Higher,
                pushed.shares,
            ));
            if links.slow.is_empty() {
                series.push(Series::new(
                    format!("{name}: idle ranks"),
                    "% of a core",
                    Better::Lower,
                    pushed.idle,
                ));
            }
            rails.push((name, pushed.by_rail));
        }
    }
    let settings = Settings {
        links: even.links,
        rate_bits: even.rate_bits,
        mtu: even.mtu,
        bytes: options.bytes(),
        trainers: RANKS,
        inference: RANKS,
    };
    let results = Results { benchmark: "lab", machine: Machine::read()?, settings, series, rails };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&results)?);
    } else {
        print(&results);
    }
    Ok(())
}

fn print(results: &Results) {
    let Settings { links, rate_bits, mtu, bytes, trainers, inference } = &results.settings;
    println!("machine  {}", results.machine);
    println!(
        "lab      {links} links of {} Mb/s, MTU {mtu}: at most {:.1} % of it TCP payload (headers of Ethernet, IP and TCP counted)",
        rate_bits / 1_000_000,
        Lab::payload_share(*mtu) * 100.0
    );
    println!(
        "push     {} GiB from {trainers} trainers to {inference} inference ranks, {} links each",
        bytes >> 30,
        u32::from(*links) / trainers
    );
    println!(
        "{:52}  {:>7}  {:>15}  {:>7}",
        "% of the payload that the links can carry", "median", "min - max", "target"
    );
    for series in &results.series {
        let spread = series.spread();
        let slow = usize::from(series.name.contains("quarter"));
        let target = match series.name.rsplit_once(": ") {
            Some((_, "weightsync")) => format!("> {:.0}", TARGETS[slow]),
            Some((_, "idle ranks")) => format!("< {IDLE_TARGET:.0}"),
            _ => String::new(),
        };
        let range = format!("{:.1} - {:.1}", spread.min, spread.max);
        println!("{:52}  {:>7.1}  {range:>15}  {target:>7}", series.name, spread.median);
    }
    println!("(idle ranks: % of a core that each rank takes between pushes, connected and waiting)");
    println!("(bursts that a shaper lets through after a pause can take a short round over 100)");
}

/// Bytes per second that the links carry as payload, all together.
fn capacity(options: &LabOptions) -> f64 {
    let bits: u64 = (0..options.links).map(|link| options.rate_of(link)).sum();
    bits as f64 / 8.0 * Lab::payload_share(options.mtu)
}

/// What pushes between ranks in both namespaces gave.
#[derive(Default)]
struct Pushed {
    /// Of the payload that the links can carry, in percent, by round.
    shares: Vec<f64>,
    /// Of the last round, by trainer and rail.
    by_rail: Vec<Vec<u64>>,
    /// What each rank takes of a core while it waits, in percent.
    idle: Vec<f64>,
}

fn push(lab: &Lab, chunk_bytes: u64, options: &Options) -> anyhow::Result<Pushed> {
    let LabOptions { links, rate_bits, mtu, .. } = *lab.options();
    let job = Job {
        trainers: RANKS,
        inference: RANKS,
        links,
        shares_links: false,
        is_replicated: false,
        bytes: options.bytes(),
        chunk_bytes,
        rail_bytes_per_second: (rate_bits as f64 / 8.0 * Lab::payload_share(mtu)) as u64,
    };
    let mut ranks = Ranks::start(lab, &job)?;
    let mut pushed = Pushed::default();
    for round in 0..=options.rounds {
        let push = ranks.push()?;
        let share = push.bytes() as f64 / push.write_seconds() / capacity(lab.options()) * 100.0;
        eprintln!("  {share:.1} %{}", if round == 0 { " (warm-up, not counted)" } else { "" });
        if round > 0 {
            pushed.shares.push(share);
        }
        pushed.by_rail = push.by_rail();
    }
    let before: Vec<_> = ranks.members().map(Process::cpu_seconds).collect();
    std::thread::sleep(IDLE);
    let after = ranks.members().map(Process::cpu_seconds);
    let used = after.zip(before).filter_map(|(after, before)| Some(after? - before?));
    pushed.idle = used.map(|seconds| seconds / IDLE.as_secs_f64() * 100.0).collect();
    ranks.finish()?;
    Ok(pushed)
}

/// The plain loop over the first link, as a share of what that link can carry.
fn plain(lab: &Lab, program: &PathBuf, chunk_bytes: u64, rounds: usize) -> anyhow::Result<Vec<f64>> {
    let (bytes, chunk) = (PLAIN_BYTES.to_string(), chunk_bytes.to_string());
    let sizes = ["--region-bytes", &bytes, "--total-bytes", &bytes, "--chunk-bytes", &chunk];
    let mut shares = Vec::new();
    for _ in 0..rounds {
        let at = |side| ["--source".to_owned(), Lab::address(side, 0).to_string()];
        let command = |side, role: &str| -> Command {
            let mut command = lab.command(side, program);
            command.arg(role).args(at(side));
            command
        };
        let mut server = Process::launch(command(Side::B, "server"), &sizes)?;
        let mut client = command(Side::A, "client");
        client.arg(server.line()?);
        let transfer: Transfer = Process::launch(client, &sizes)?.answer()?;
        let link = lab.options().rate_of(0) as f64 / 8.0 * Lab::payload_share(lab.options().mtu);
        shares.push(transfer.bytes as f64 / transfer.seconds / link * 100.0);
        server.finish()?;
    }
    Ok(shares)
}
