//! What strangers and liars can do to a running job: `cargo xtask attack`.
//!
//! A job of real processes on loopback pushes in a loop. Its pace is measured undisturbed, then under one attack after
//! another. Each attack must be refused and named in the controller's log, and the job must keep its pace. Everything stays on
//! loopback, against processes that this program started, and is bounded in number and time.

#![forbid(unsafe_code)]

mod attacks;
// `soak` uses more of it.
#[allow(dead_code)]
#[path = "../job.rs"]
mod job;
mod victim;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use serde::Serialize;

use crate::attacks::{ATTACKS, Attack, Target};
use crate::victim::Victim;

/// Pushes are counted in windows of this length, and medians of them are compared.
const WINDOW: Duration = Duration::from_secs(1);

/// The part of its undisturbed pace that a job must keep.
const KEPT_MIN: f64 = 0.9;

/// After an attack, before the next: what it left behind has ended, and a line of the log has come.
const BETWEEN: Duration = Duration::from_millis(700);

#[derive(Parser)]
#[command(about = "Attacks a job of its own on loopback, and checks that the job does not mind")]
struct Options {
    /// The weightsync command
    #[arg(long, value_name = "FILE")]
    weightsync: PathBuf,
    /// How long each attack lasts, in seconds; the slow one takes 12 at least
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(2..=60))]
    seconds: u64,
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
    let options = Options::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mut victim = Victim::start(&options.weightsync)?;
    let target = Target { address: victim.job.address, secret: victim.job.secret.clone() };
    // After the job was started, so that its processes have the limit that a user's have.
    attacks::raise_file_limit();
    let mut outcomes = Vec::new();
    for attack in ATTACKS.iter().filter(|attack| attack.name.contains(&options.only)) {
        let outcome = attacked(&runtime, &mut victim, &target, attack, Duration::from_secs(options.seconds))?;
        if !options.json {
            print(&outcome, outcomes.is_empty());
        }
        outcomes.push(outcome);
    }
    let failed = outcomes.iter().filter(|outcome| !outcome.wrong.is_empty()).count();
    if options.json {
        println!("{}", serde_json::json!({ "benchmark": "attack", "attacks": outcomes, "failed": failed }));
    } else {
        println!("{} attacks, {failed} of them not as they must be", outcomes.len());
    }
    Ok(if failed == 0 && !outcomes.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
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
