//! What strangers and liars can do to a running job: `cargo xtask attack`.
//!
//! A job of real processes on loopback pushes in a loop. Its pace is measured undisturbed, then under one attack after
//! another. Each attack must be refused and named in the controller's log, and the job must keep its pace. Then jobs that push
//! without rest are attacked in all ways at once (`throughput`). Everything stays on loopback, against processes that this program
//! started, and is bounded in number and time.

#![forbid(unsafe_code)]

mod attacks;
// `soak` uses more of it.
#[allow(dead_code)]
#[path = "../job.rs"]
mod job;
#[path = "../machine.rs"]
mod machine;
mod rank;
// Other benchmarks use more of these.
#[allow(dead_code)]
#[path = "../series.rs"]
mod series;
#[path = "../table.rs"]
mod table;
mod throughput;
#[allow(dead_code)]
#[path = "../usage.rs"]
mod usage;
mod victim;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use serde::Serialize;

use crate::attacks::{ATTACKS, Attack, FileLimit, Target};
use crate::victim::{Victim, Work};

/// Pushes are counted in windows of this length, and medians of them are compared.
const WINDOW: Duration = Duration::from_secs(1);

/// The part of its undisturbed pace that a job must keep.
pub(crate) const KEPT_MIN: f64 = 0.9;

/// What each trainer of the small job that pushes without rest pushes at a time.
const SMALL_MIB: u64 = 1;

/// After an attack, before the next: what it left behind has ended, and a line of the log has come.
pub(crate) const BETWEEN: Duration = Duration::from_millis(700);

#[derive(Parser)]
#[command(about = "Attacks a job of its own on loopback, and checks that the job does not mind")]
struct Options {
    /// The weightsync command
    #[arg(long, value_name = "FILE")]
    weightsync: PathBuf,
    /// How long each attack lasts, in seconds; the slow one takes 12 at least
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(2..=60))]
    seconds: u64,
    /// Rounds of the jobs that push without rest; a round takes about 40 seconds for each job. 0: they are left out
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(0..=100))]
    rounds: u8,
    /// What each of two trainers of the larger job pushes at a time: so much that a push takes about a second
    #[arg(long, default_value_t = 1024, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    mib: u64,
    /// How the larger job pushes
    #[arg(long, default_value = "tcp", value_parser = ["local", "tcp"])]
    fabric: String,
    /// Only attacks whose name contains this
    #[arg(long, default_value = "", hide_default_value = true)]
    only: String,
    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,
}

/// What came of one attack.
#[derive(Serialize)]
struct Outcome {
    name: &'static str,
    attempts: u64,
    refused: u64,
    named: bool,
    /// Pushes a second, medians.
    undisturbed: f64,
    attacked: f64,
    ratio: f64,
    /// What did not go as it must.
    wrong: Vec<String>,
}

fn main() -> anyhow::Result<ExitCode> {
    let words: Vec<String> = std::env::args().collect();
    if let [_, word, part] = words.as_slice()
        && word == rank::RANK
    {
        return rank::run(part).map(|()| ExitCode::SUCCESS);
    }
    let options = Options::parse();
    let (machine, load_before) = (machine::Machine::read()?, load()?);
    if !options.json {
        println!("machine  {machine}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let attacks: Vec<&Attack> = ATTACKS.iter().filter(|attack| attack.name.contains(&options.only)).collect();
    let outcomes = one_by_one(&options, &runtime, &attacks)?;
    let jobs = [("local", SMALL_MIB), (options.fabric.as_str(), options.mib)];
    let throughput = match options.rounds {
        0 => Vec::new(),
        rounds => {
            let measure = |work| {
                throughput::measure(&runtime, &options.weightsync, work, &attacks, usize::from(rounds))
            };
            jobs.into_iter().map(measure).collect::<anyhow::Result<_>>()?
        }
    };
    let wrong = outcomes.iter().map(|outcome| &outcome.wrong).chain(throughput.iter().map(|job| &job.wrong));
    let failed = wrong.filter(|wrong| !wrong.is_empty()).count();
    if options.json {
        let results = serde_json::json!({
            "benchmark": "attack", "machine": machine, "load": [load_before, load()?], "attacks": outcomes, "throughput": throughput, "failed": failed,
        });
        println!("{results}");
    } else {
        throughput::print(&throughput);
        println!("load of the machine: {load_before} before, {} after", load()?);
        println!(
            "{} attacks, {} jobs, {failed} of them not as they must be",
            outcomes.len(),
            throughput.len()
        );
    }
    Ok(if failed == 0 && !outcomes.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The machine's load average over a minute.
fn load() -> anyhow::Result<String> {
    let load = std::fs::read_to_string("/proc/loadavg")?;
    Ok(load.split(' ').next().unwrap_or_default().to_owned())
}

/// Each attack by itself, on a job that rests between pushes.
fn one_by_one(
    options: &Options,
    runtime: &tokio::runtime::Runtime,
    attacks: &[&Attack],
) -> anyhow::Result<Vec<Outcome>> {
    let mut victim = Victim::start(&options.weightsync, &Work::PushAndRest)?;
    let target = Target { address: victim.job.address, secret: victim.job.secret.clone() };
    let _limit = FileLimit::raised();
    let mut outcomes = Vec::new();
    for attack in attacks {
        let outcome = attacked(runtime, &mut victim, &target, attack, Duration::from_secs(options.seconds))?;
        if !options.json {
            print(&outcome, outcomes.is_empty());
        }
        outcomes.push(outcome);
    }
    Ok(outcomes)
}

/// Measures the pace, then attacks and measures again.
fn attacked(
    runtime: &tokio::runtime::Runtime,
    victim: &mut Victim,
    target: &Target,
    attack: &Attack,
    length: Duration,
) -> anyhow::Result<Outcome> {
    let length = length.max(attack.length_min);
    let began = Instant::now();
    std::thread::sleep(length.min(Duration::from_secs(4)));
    let undisturbed = victim.pace(began, Instant::now(), WINDOW);
    let logged = victim.job.log_since(0).len();
    let began = Instant::now();
    let tally = runtime.block_on(attack.run(target, began + length))?;
    let attacked = victim.pace(began, Instant::now(), WINDOW);
    std::thread::sleep(BETWEEN);
    let log = victim.job.log_since(logged);
    victim.job.check_alive().with_context(|| format!("after the attack '{}'", attack.name))?;

    let named = log.iter().any(|line| line.contains(attack.named_as));
    let ratio = attacked / undisturbed;
    let mut wrong = tally.wrong;
    if tally.attempts == 0 || tally.refused != tally.attempts {
        wrong.push(format!("{} of {} attempts were refused", tally.refused, tally.attempts));
    }
    if !named {
        let last = log.last().map_or("nothing", String::as_str);
        wrong.push(format!("the controller's log does not say '{}', but last {last}", attack.named_as));
    }
    // Also where there was no pace at all, and the ratio is none.
    if ratio.is_nan() || ratio < KEPT_MIN {
        wrong.push(format!("the job kept {:.0} % of its pace", 100.0 * ratio));
    }
    let (name, attempts, refused) = (attack.name, tally.attempts, tally.refused);
    Ok(Outcome { name, attempts, refused, named, undisturbed, attacked, ratio, wrong })
}

fn print(outcome: &Outcome, first: bool) {
    if first {
        println!(
            "{:34} {:>8} {:>8} {:>6} {:>12} {:>10} {:>6}",
            "attack", "attempts", "refused", "named", "pushes/s", "attacked", "ratio"
        );
    }
    let Outcome { name, attempts, refused, named, undisturbed, attacked, ratio, wrong } = outcome;
    let named = if *named { "yes" } else { "no" };
    println!(
        "{name:34} {attempts:>8} {refused:>8} {named:>6} {undisturbed:>12.1} {attacked:>10.1} {ratio:>6.2}"
    );
    for wrong in wrong {
        println!("    not as it must be: {wrong}");
    }
}
