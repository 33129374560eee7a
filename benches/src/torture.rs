//! `cargo xtask torture`: jobs whose processes are killed, stopped and cut off without a break, and whose inference ranks must
//! at every moment serve exactly one committed version.
//!
//! One job after another, of a few seconds each: a controller that records its commits, three trainers of which any one can be
//! done without, three inference ranks. Faults fall about once a second, drawn from a seed that is printed. Inference ranks compare
//! what they serve with [`weights`], which knows nothing of the product, all the time ([`eye`]); [`judge`] compares what was
//! served with what was committed. After the last fault everybody has to take part again within a bounded time, and every
//! process has to end well. The exit code says whether all of that held.

mod cast;
mod eye;
mod fault;
mod judge;
mod phase;
mod random;
mod rank;
mod tally;
mod weights;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Parser;
use serde::Serialize;
use weightsync::{CommitMode, OnLoss};
use weightsync_lab::{Lab, LabOptions};

use crate::machine::Machine;
use crate::progress::Progress;
use crate::table::Table;
use cast::Setting;
use phase::{Failure, run as run_phase};
use random::Random;
use tally::{Figures, Tally, Times};

pub(crate) use cast::{LEASH, on_leash};
pub(crate) use rank::{inference, trainer};

/// The longest that a rank waits without progress: short, so that whoever is stopped is soon missed.
const DEADLINE: Duration = Duration::from_secs(2);

/// Links of a lab, and their rate: a push takes some tens of milliseconds.
const LINKS: u16 = 3;
const RATE_BITS: u64 = 2_000_000_000;

#[derive(Parser)]
#[command(
    name = "torture",
    about = "Kills, stops and cuts off the processes of a job, and checks what is served at every moment"
)]
pub(crate) struct Options {
    /// The weightsync command
    #[arg(long, value_name = "FILE")]
    weightsync: PathBuf,
    /// For how long faults fall, in all; the job that is under way then is still brought to its end
    #[arg(long, default_value_t = 10.0, value_parser = minutes)]
    minutes: f64,
    /// For how long they fall on one job, in seconds
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=3600))]
    job_seconds: u64,
    /// Repeats the faults of the run that printed it [default: a random one]
    #[arg(long)]
    seed: Option<u64>,
    /// The fabrics of the inference ranks, in turn: local (shared memory), tcp
    #[arg(long, default_value = "local,tcp", value_name = "NAME,...", value_delimiter = ',', value_parser = ["local", "tcp"])]
    fabric: Vec<String>,
    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,
}

fn minutes(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(minutes) if (0.01..=10_000.0).contains(&minutes) => Ok(minutes),
        _ => Err("a number between 0.01 and 10000".into()),
    }
}

#[derive(Serialize)]
struct Results {
    benchmark: &'static str,
    machine: Machine,
    seed: u64,
    seconds: f64,
    jobs: u64,
    /// Of them, those in a lab; or why there were none.
    in_a_lab: Result<u64, String>,
    #[serde(flatten)]
    figures: Figures,
    seconds_from_fault_to_commit: Times,
    seconds_from_healing_to_part: Times,
    /// What did not go as it must; `None` if all did.
    wrong: Option<Wrong>,
}

#[derive(Serialize)]
struct Wrong {
    job: u64,
    what: String,
    blows: Vec<String>,
    /// Logs and output of every process.
    folder: PathBuf,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let seed = match options.seed {
        Some(seed) => seed,
        None => getrandom::u32()?.into(),
    };
    eprintln!("torture: --seed {seed}");
    let no_lab = match options.fabric.iter().any(|fabric| fabric == "tcp") {
        true => weightsync_lab::check().err().map(|why| why.to_string()),
        false => Some("a lab is for tcp".into()),
    };
    if let Some(why) = &no_lab {
        eprintln!("torture: links are left alone: {why}");
    }
    let (mut tally, mut progress, began) = (Tally::default(), Progress::new(), Instant::now());
    let (length, mut jobs, mut labs, mut wrong) =
        (Duration::from_secs_f64(60.0 * options.minutes), 0, 0, None);
    let mut seeds = Random::new(seed);
    while wrong.is_none() && began.elapsed() < length {
        let job = Job::new(jobs, no_lab.is_none(), seeds.word());
        let faults_for = Duration::from_secs(options.job_seconds).min(length - began.elapsed());
        labs += u64::from(job.in_lab);
        let name = job.to_string();
        let folder = tempfile::Builder::new().prefix("weightsync-torture-").tempdir()?;
        let mut show = |tally: &Tally, newest: u64| {
            let (faults, figures) = (tally.faults(), &tally.figures);
            progress.show(|elapsed| {
                let seconds = elapsed.as_secs();
                let commits = figures.committed;
                format!(
                    "{seconds} s, job {jobs} ({name}) at version {newest}; {faults} faults, {commits} commits"
                )
            });
        };
        if let Err(Failure { error, blows }) = job.run(options, &folder, faults_for, &mut tally, &mut show)? {
            wrong =
                Some(Wrong { job: jobs, what: format!("{name}: {error:#}"), blows, folder: folder.keep() });
        }
        jobs += 1;
    }
    progress.end();
    let results = Results {
        benchmark: "torture",
        machine: Machine::read()?,
        seed,
        seconds: began.elapsed().as_secs_f64(),
        jobs,
        in_a_lab: no_lab.map_or(Ok(labs), Err),
        seconds_from_fault_to_commit: tally.until_commit(),
        seconds_from_healing_to_part: tally.until_back(),
        figures: tally.figures,
        wrong,
    };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&results)?);
    } else {
        print(&results);
    }
    Ok(if results.wrong.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What is tortured in its turn: policies alternate, inference ranks take commit modes in turn, and some jobs compare
/// checksums, have inference ranks pass on what they get, or run in a lab.
struct Job {
    number: u64,
    on_loss: OnLoss,
    verify: bool,
    relay: bool,
    in_lab: bool,
    modes: [CommitMode; 3],
    seed: u64,
}

impl Job {
    fn new(number: u64, lab: bool, seed: u64) -> Self {
        let on_loss = if number.is_multiple_of(2) { OnLoss::Continue } else { OnLoss::Wait };
        let mut modes = CommitMode::ALL.map(|(mode, _)| mode);
        modes.rotate_left((number / 2 % 3) as usize);
        let (in_lab, verify, relay) =
            (lab && number % 3 == 2, number % 8 >= 5, number % 3 == 1 || number % 6 == 5);
        Self { number, on_loss, in_lab, verify, relay, modes, seed }
    }

    fn run(
        &self,
        options: &Options,
        folder: &tempfile::TempDir,
        length: Duration,
        tally: &mut Tally,
        show: &mut dyn FnMut(&Tally, u64),
    ) -> anyhow::Result<Result<(), Failure>> {
        let lab_options = LabOptions { links: LINKS, rate_bits: RATE_BITS, ..LabOptions::default() };
        let lab = self
            .in_lab
            .then(|| Lab::up(&format!("torture-{}", std::process::id()), &lab_options))
            .transpose()
            .context("the lab")?;
        let fabrics = match (self.in_lab, self.relay) {
            (true, _) => vec!["tcp".into()],
            (false, false) => options.fabric.clone(),
            // Those who pass on to each other have one in common.
            (false, true) => {
                let count = options.fabric.len().max(1);
                options.fabric.iter().skip((self.number / 3) as usize % count).take(1).cloned().collect()
            }
        };
        let setting = Setting {
            weightsync: options.weightsync.clone(),
            folder: folder.path().to_owned(),
            on_loss: self.on_loss,
            verify: self.verify,
            relay: self.relay,
            deadline: DEADLINE,
            modes: self.modes,
            fabrics,
        };
        Ok(run_phase(setting, lab, self.seed, length, tally, show))
    }
}

impl std::fmt::Display for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { on_loss, verify, relay, in_lab, .. } = self;
        write!(f, "on-loss {on_loss}")?;
        f.write_str(if *verify { ", verify" } else { "" })?;
        f.write_str(if *relay { ", relay" } else { "" })?;
        f.write_str(if *in_lab { ", lab" } else { "" })
    }
}

fn print(results: &Results) {
    let Results { machine, seed, seconds, jobs, in_a_lab, figures, .. } = results;
    println!("machine  {machine}");
    let labs = in_a_lab
        .as_ref()
        .map_or_else(|why| format!("none in a lab: {why}"), |labs| format!("{labs} in a lab"));
    println!("run      seed {seed}: {jobs} jobs ({labs}) in {seconds:.0} s");
    let mut table = Table::new(&["what", "count"]);
    let mut row = |what: &str, count: String| table.row(vec![what.to_owned(), count]);
    for (kind, count) in &figures.faults {
        row(kind, count.to_string());
    }
    row("versions committed", figures.committed.to_string());
    row("attempts aborted", figures.aborted.to_string());
    row("regroups", figures.regroups.to_string());
    let times = |times: &Times| format!("{:.2} s, at most {:.2} s", times.median, times.longest);
    row("from a fault to the next commit, median", times(&results.seconds_from_fault_to_commit));
    row("from healing until it takes part again, median", times(&results.seconds_from_healing_to_part));
    row("looks at a version that is served", figures.looks.to_string());
    row("GB compared by them", format!("{:.1}", figures.bytes_checked as f64 / 1e9));
    for (what, count) in &figures.gave_up {
        row(&format!("gave up, and was started again: {what}"), count.to_string());
    }
    print!("\n{}\n", table.markdown());
    match &results.wrong {
        None => println!(
            "at every moment every rank served exactly one committed version, and everybody came back"
        ),
        Some(Wrong { job, what, blows, folder }) => {
            println!("not as it must be: job {job}, {what}");
            blows.iter().for_each(|blow| println!("    {blow}"));
            println!("logs of all processes: {}", folder.display());
            println!("to repeat the faults: --seed {seed}");
        }
    }
}
