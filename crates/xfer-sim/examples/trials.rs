//! Runs trials by their seeds: `cargo xtask sim --help`.

use std::process::ExitCode;

use clap::Parser;
use xfer_sim::{Sabotage, Time, Trial};

/// Failures that are told in full; of more, only how many.
const TOLD: u64 = 5;

/// Small jobs in virtual time in which things go wrong, from seeds; every invariant is checked at every event.
#[derive(Parser)]
#[command(name = "cargo xtask sim")]
struct Args {
    /// How many trials
    #[arg(long, value_name = "N", default_value_t = 1000)]
    seeds: u64,
    /// The seed of the first
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    first: u64,
    /// This one alone
    #[arg(long, value_name = "SEED", conflicts_with_all = ["seeds", "first", "defects"])]
    seed: Option<u64>,
    /// Tell of every event
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Break something on purpose
    #[arg(long, value_name = "DEFECT", conflicts_with = "defects")]
    defect: Option<Sabotage>,
    /// Break each thing in turn, until a trial notices
    #[arg(long)]
    defects: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let good = match (args.seed, args.defects) {
        (Some(seed), _) => one(seed, &args),
        (None, true) => defects(&args),
        (None, false) => many(&args),
    };
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn one(seed: u64, args: &Args) -> bool {
    let trial = Trial::new(seed);
    println!("seed {seed}: {trial}");
    let mut tell = |at: Time, what: &str| println!("{at:>16}  {what}");
    match trial.run(args.defect, if args.trace { Some(&mut tell) } else { None }) {
        Ok(end) => println!("{end}"),
        Err(error) => println!("{error}"),
    }
    trial.run(args.defect, None).is_ok()
}

fn many(args: &Args) -> bool {
    let (mut whole, mut with_reason, mut broken, mut events) = (0, 0, 0_u64, 0);
    for seed in args.first..args.first.saturating_add(args.seeds) {
        let trial = Trial::new(seed);
        match trial.run(args.defect, None) {
            Ok(end) => {
                events += end.events;
                if end.committed == end.versions { whole += 1 } else { with_reason += 1 }
            }
            Err(error) => {
                broken += 1;
                if broken <= TOLD {
                    println!("seed {seed}: {trial}\n{error}  again: cargo xtask sim --seed {seed} --trace\n");
                }
            }
        }
    }
    println!(
        "simulated {} jobs, {events} events: {whole} committed every version, {with_reason} ended with a reason, {broken} broke \
         an invariant",
        args.seeds
    );
    broken == 0
}

fn defects(args: &Args) -> bool {
    let mut all = true;
    for defect in Sabotage::ALL {
        let mut seeds = args.first..args.first.saturating_add(args.seeds);
        match seeds.find(|seed| Trial::new(*seed).run(Some(defect), None).is_err()) {
            Some(seed) => println!("{defect:22} found with seed {seed}"),
            None => {
                println!("{defect:22} NOT FOUND in {} seeds", args.seeds);
                all = false;
            }
        }
    }
    all
}
