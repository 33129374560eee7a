//! What attacks cost a job that pushes without rest: all attacks at once, beside the same attacks on another job's controller, beside
//! none.
//!
//! On a machine of few cores an attacker takes time from everybody, wherever it knocks, and so does what answers it. So there are
//! two things to compare with: the same attacks on another controller cost the machine as much, but the job's own controller
//! nothing. The three alternate, so that all see the same machine, each is compared with its neighbour in time, and what counts is
//! the median of the rounds.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::Serialize;

use crate::attacks::{Attack, FileLimit, Tally, Target, all_at_once};
use crate::series::Spread;
use crate::table::Table;
use crate::usage::cpu_seconds;
use crate::victim::{Victim, WORLD, Work};
use crate::{BETWEEN, KEPT_MIN};

/// A round is at least so long: some ten pushes of a second.
const LENGTH_MIN: Duration = Duration::from_secs(10);

/// What is done to the job, in the order of the first round.
const CONDITIONS: [&str; 3] =
    ["nobody is attacked", "another controller is attacked", "its controller is attacked"];

/// CPU time, in seconds a second.
#[derive(Serialize, Clone, Copy, Default)]
struct Cpu {
    attacker: f64,
    /// The controller that is attacked, if one is, else the job's.
    controller: f64,
    ranks: f64,
}

#[derive(Serialize)]
struct Condition {
    name: &'static str,
    /// By round.
    pushes_per_second: Vec<f64>,
    cpu: Vec<Cpu>,
    attempts_per_second: Vec<f64>,
}

impl Condition {
    /// The median of the ratios of rounds that were near each other in time.
    fn beside(&self, other: &Self) -> f64 {
        let pairs = self.pushes_per_second.iter().zip(&other.pushes_per_second);
        Spread::of(&pairs.map(|(ours, theirs)| ours / theirs).collect::<Vec<_>>()).median
    }

    fn cpu(&self, of: impl Fn(&Cpu) -> f64) -> f64 {
        Spread::of(&self.cpu.iter().map(of).collect::<Vec<_>>()).median
    }
}

/// What came of one job.
#[derive(Serialize)]
pub(crate) struct Throughput {
    fabric: String,
    /// Of all trainers, per push.
    mib: u64,
    conditions: Vec<Condition>,
    /// Throughput under attack, over that while nobody is attacked, and over that while another controller is.
    of_undisturbed: f64,
    of_control: f64,
    /// What did not go as it must.
    pub(crate) wrong: Vec<String>,
}

/// A job under attack, and one that is attacked in its place.
struct Stage<'a> {
    runtime: &'a tokio::runtime::Runtime,
    victim: Victim,
    other: Victim,
    attacks: &'a [&'a Attack],
    length: Duration,
}

/// Measures a job of this work.
pub(crate) fn measure(
    runtime: &tokio::runtime::Runtime,
    weightsync: &Path,
    (fabric, mib): (&str, u64),
    attacks: &[&Attack],
    rounds: usize,
) -> anyhow::Result<Throughput> {
    let longest = attacks.iter().map(|attack| attack.length_min).max().unwrap_or_default();
    let length = longest.max(LENGTH_MIN);
    let other = Victim::start(weightsync, &Work::Rest).context("the job that stands there")?;
    let victim = Victim::start(weightsync, &Work::Push { fabric: fabric.into(), mib })?;
    let _limit = FileLimit::raised();
    let mut stage = Stage { runtime, victim, other, attacks, length };
    let empty = |name| Condition {
        name,
        pushes_per_second: Vec::new(),
        cpu: Vec::new(),
        attempts_per_second: Vec::new(),
    };
    let (mut conditions, mut wrong) = (CONDITIONS.map(empty), Vec::new());
    for round in 0..rounds {
        for turn in 0..CONDITIONS.len() {
            let number = (round + turn) % CONDITIONS.len();
            wrong.extend(stage.round(number, &mut conditions[number])?);
        }
    }
    let [undisturbed, control, attacked] = &conditions;
    let (of_undisturbed, of_control) = (attacked.beside(undisturbed), attacked.beside(control));
    // Also where there was no pace at all, and the ratio is none.
    if of_control.is_nan() || of_control < KEPT_MIN {
        let percent = 100.0 * of_control;
        wrong.push(format!("the job kept {percent:.0} % of what it has beside an attack on another job"));
    }
    let (fabric, mib) = (fabric.to_owned(), mib * u64::from(WORLD.trainers));
    Ok(Throughput { fabric, mib, conditions: conditions.into(), of_undisturbed, of_control, wrong })
}

impl Stage<'_> {
    /// One round under this condition; gives what did not go as it must.
    fn round(&mut self, number: usize, condition: &mut Condition) -> anyhow::Result<Vec<String>> {
        let attacked = match number {
            0 => None,
            1 => Some(&self.other),
            _ => Some(&self.victim),
        };
        let (began, before) = (Instant::now(), self.cpu_seconds(number));
        let tally = match attacked {
            None => {
                std::thread::sleep(self.length);
                Tally::default()
            }
            Some(Victim { job, .. }) => {
                let target = Target { address: job.address, secret: job.secret.clone() };
                self.runtime.block_on(all_at_once(self.attacks, &target, began + self.length))?
            }
        };
        let seconds = began.elapsed().as_secs_f64();
        let after = self.cpu_seconds(number);
        condition.pushes_per_second.push(self.victim.rate(began, began + self.length));
        condition.attempts_per_second.push(tally.attempts as f64 / seconds);
        condition.cpu.push(Cpu {
            attacker: (after.attacker - before.attacker) / seconds,
            controller: (after.controller - before.controller) / seconds,
            ranks: (after.ranks - before.ranks) / seconds,
        });
        std::thread::sleep(BETWEEN);
        for Victim { job, .. } in [&mut self.victim, &mut self.other] {
            job.check_alive().with_context(|| format!("after a round in which {}", condition.name))?;
        }
        // The other job is there for its load alone.
        if number == 1 {
            return Ok(Vec::new());
        }
        let mut wrong = tally.wrong;
        if tally.refused != tally.attempts {
            wrong.push(format!("{} of {} attempts were refused", tally.refused, tally.attempts));
        }
        Ok(wrong)
    }

    /// So far; 0 where the kernel does not say.
    fn cpu_seconds(&self, number: usize) -> Cpu {
        let of = |victim: &Victim, controller: bool| {
            let is = |name: &str| name.starts_with("controller") == controller;
            let processes = victim.job.processes().filter(|(name, _)| is(name));
            processes.filter_map(|(_, process)| cpu_seconds(process)).sum()
        };
        let controller = of(if number == 1 { &self.other } else { &self.victim }, true);
        let attacker = cpu_seconds(std::process::id()).unwrap_or(0.0);
        Cpu { attacker, controller, ranks: of(&self.victim, false) }
    }
}

/// Tables of all jobs.
pub(crate) fn print(all: &[Throughput]) {
    let head = [
        "push",
        "while",
        "pushes/s, median (least to most)",
        "attempts/s",
        "CPU: ranks",
        "controller",
        "attacker",
    ];
    let mut table = Table::new(&head);
    for Throughput { fabric, mib, conditions, .. } in all {
        for condition in conditions {
            let Spread { median, min, max } = Spread::of(&condition.pushes_per_second);
            table.row(vec![
                format!("{mib} MiB over {fabric}"),
                condition.name.into(),
                format!("{median:.2} ({min:.2} to {max:.2})"),
                format!("{:.0}", Spread::of(&condition.attempts_per_second).median),
                format!("{:.2}", condition.cpu(|cpu| cpu.ranks)),
                format!("{:.2}", condition.cpu(|cpu| cpu.controller)),
                format!("{:.2}", condition.cpu(|cpu| cpu.attacker)),
            ]);
        }
    }
    print!("\n{}\n", table.markdown());
    for Throughput { fabric, mib, of_undisturbed, of_control, wrong, .. } in all {
        println!(
            "{mib} MiB over {fabric}: under attack {of_control:.2} of the throughput beside an attack on another job, \
             {of_undisturbed:.2} of the undisturbed"
        );
        for wrong in wrong {
            println!("    not as it must be: {wrong}");
        }
    }
}
