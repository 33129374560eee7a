//! The command line of `weightsync simulate`.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use xfer_plan::{Rank, ReceiverRank, TrainerRank};
use xfer_sim::Slow;

use super::cluster::NamedCluster;
use super::sweep::Sweep;
use crate::args::{count, seconds, seconds_or_none};
use crate::commands::transfer::TransferArgs;

/// The page's name where none is given.
const PAGE_FILE: &str = "weightsync-simulation.html";

#[derive(Args)]
#[command(
    after_long_help = "Examples:\n  weightsync simulate --cluster p5.48xlarge --model kimi-k2 --from fsdp=16,pp=2,ep=8 --to \
                       ep=32,replicas=4 --train-gpus 256 --infer-gpus 128 --fp8 --html\n      a large job, as text and as a \
                       page to look at, weightsync-simulation.html\n  weightsync simulate --cluster h100-ib400 --model \
                       qwen3-0.6b --from fsdp=16 --to tp=2,replicas=4 --slow trainer3=0.5 --slow inference0.nic0=0.1\n      \
                       what one slow trainer and one slow NIC cost\n  weightsync simulate --cluster p5.48xlarge --model \
                       qwen3-0.6b --from fsdp=16 --to tp=2 --print-cluster > mine.toml\n      a cluster to change, and then \
                       to give as --cluster mine.toml\n  weightsync simulate ... --sweep train-gpus=64,128,256 --csv \
                       out.csv --svg out.svg\n      the same job in several sizes\n\nAll times are simulated: virtual \
                       time on a modelled cluster, the same on every machine for the same arguments. \
                       docs/simulate.md says how to read them."
)]
pub(crate) struct SimulateArgs {
    /// Where the job runs: p5.48xlarge, p5en.48xlarge, h100-ib400 or lab-32x100M, on as many hosts as the job needs; or a
    /// file that ends in .toml or .json and describes a whole cluster, as --print-cluster prints it. It says how many GPUs
    /// a host has, which NICs a GPU has and how fast they are
    #[arg(long, value_name = "NAME|FILE", value_parser = NamedCluster::read)]
    pub(crate) cluster: NamedCluster,
    #[command(flatten)]
    pub(crate) transfer: TransferArgs,
    #[command(flatten)]
    pub(crate) conditions: Conditions,
    /// Simulate the job once for each value of one parameter, with a line for each: train-gpus (changes fsdp), infer-gpus or
    /// replicas (both change replicas), watermark (MiB), chunk (KiB), relay, slow (what is left of trainer 0's speed) or
    /// skew-ms. With the first three the cluster gets the hosts that the job needs
    #[arg(long, value_name = "PARAM=V,V,...", conflicts_with = "html")]
    pub(crate) sweep: Option<Sweep>,
    /// Write the sweep as comma-separated values
    #[arg(long, value_name = "FILE", requires = "sweep")]
    pub(crate) csv: Option<PathBuf>,
    /// Write the sweep as a drawing
    #[arg(long, value_name = "FILE", requires = "sweep")]
    pub(crate) svg: Option<PathBuf>,
    /// Write a page that shows the push; without FILE, weightsync-simulation.html
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = PAGE_FILE)]
    pub(crate) html: Option<PathBuf>,
    /// Print one JSON object instead of the summary
    #[arg(long)]
    pub(crate) json: bool,
    /// Simulate another way to push instead: full-gather gathers weights in full, then quantises and writes them, in stages
    /// that are published for Kimi-K2 from 256 to 128 GPUs alone
    #[arg(
        long,
        value_name = "NAME",
        value_parser = pipeline,
        conflicts_with_all = [
            "sweep", "html", "print_cluster", "relay", "chunk", "watermark", "slow", "skew", "versions", "events_max", "deadline"
        ]
    )]
    pub(crate) pipeline: Option<Pipeline>,
    /// Print the cluster as TOML, with the hosts that this job needs, and simulate nothing
    #[arg(long, conflicts_with_all = ["sweep", "html", "json"])]
    pub(crate) print_cluster: bool,
}

/// Other ways to push than ours.
#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Pipeline {
    FullGather,
}

impl fmt::Display for Pipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Pipeline::FullGather => "full-gather",
        })
    }
}

/// What happens beside the transfer itself, and how exactly it is simulated.
#[derive(Args, Clone)]
pub(crate) struct Conditions {
    /// A slow rank: trainer3=0.5 leaves half of the speed of its NICs, memory and copies; trainer3.nic2=0.5 of one NIC, as
    /// its rails are numbered. Can be repeated
    #[arg(long, value_name = "RANK[.nicN]=FACTOR", value_parser = slow)]
    pub(crate) slow: Vec<Slow>,
    /// Trainers have their weights ready at moments spread evenly over so many milliseconds
    #[arg(long = "skew-ms", value_name = "MS", default_value = "0", value_parser = milliseconds)]
    pub(crate) skew: Duration,
    /// Versions to push, one after another; the last one is shown
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) versions: u32,
    /// Of all chance: another number gives another run, the same number the same
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    /// What rates of transfers may be off by, from 0 (exact, slow) to 0.5
    #[arg(long, value_name = "SHARE", default_value_t = 0.1, value_parser = tolerance)]
    pub(crate) tolerance: f64,
    /// Give up after so many events
    #[arg(long, value_name = "N", default_value = "1e9", value_parser = count)]
    pub(crate) events_max: u64,
    /// The job's deadline in simulated seconds, as `push --deadline`
    #[arg(long = "deadline-s", value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub(crate) deadline: Duration,
}

pub(crate) fn milliseconds(text: &str) -> Result<Duration, String> {
    let milliseconds: f64 = text.parse().map_err(|_| "a number of milliseconds is expected".to_owned())?;
    seconds_or_none(&(milliseconds / 1e3).to_string())
}

/// The same range as that of the network that takes it.
fn tolerance(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|tolerance| (0.0..=0.5).contains(tolerance))
        .ok_or_else(|| "a number from 0 to 0.5 is expected".into())
}

/// What is left of a rank's speed.
pub(crate) fn factor(text: &str) -> Result<f64, String> {
    let factor = text.parse().ok().filter(|factor| *factor > 0.0 && *factor <= 1.0);
    factor.ok_or_else(|| format!("{text:?} is no factor above 0 and at most 1"))
}

fn pipeline(text: &str) -> Result<Pipeline, String> {
    match text {
        "full-gather" => Ok(Pipeline::FullGather),
        _ => Err("full-gather is the only one".into()),
    }
}

fn slow(text: &str) -> Result<Slow, String> {
    let parse = || {
        let (what, left) = text.split_once('=')?;
        let (rank, nic) = match what.split_once('.') {
            Some((rank, nic)) => (rank, Some(nic.strip_prefix("nic")?.parse().ok()?)),
            None => (what, None),
        };
        let number = |side: &str| rank.strip_prefix(side)?.parse::<u32>().ok();
        let trainer = || Some(Rank::Trainer(TrainerRank(number("trainer")?)));
        let rank = trainer().or_else(|| Some(Rank::Receiver(ReceiverRank(number("inference")?))))?;
        Some((rank, nic, left))
    };
    let (rank, nic, left) =
        parse().ok_or("something like trainer3=0.5 or inference0.nic2=0.5 is expected")?;
    Ok(Slow { rank, nic, factor: factor(left)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_ranks_are_named() {
        let trainer = Slow { rank: Rank::Trainer(TrainerRank(3)), factor: 0.5, nic: None };
        assert_eq!(slow("trainer3=0.5"), Ok(trainer));
        let receiver = Slow { rank: Rank::Receiver(ReceiverRank(0)), factor: 1.0, nic: Some(2) };
        assert_eq!(slow("inference0.nic2=1"), Ok(receiver));
        for wrong in [
            "",
            "trainer3",
            "trainer=0.5",
            "trainer3=0",
            "trainer3=1.5",
            "trainer3=nan",
            "trainer3.2=0.5",
            "host3=0.5",
        ] {
            assert!(slow(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn milliseconds_are_bounded() {
        assert_eq!(milliseconds("2.5"), Ok(Duration::from_micros(2500)));
        assert_eq!(milliseconds("0"), Ok(Duration::ZERO));
        for wrong in ["-1", "nan", "inf", "1e12", "soon"] {
            assert!(milliseconds(wrong).is_err(), "{wrong}");
        }
    }
}
