//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::bail;
use clap::{Args, Parser, Subcommand};
use weightsync::{CommitMode, Fabric, OnLoss, PlanOptions, Relay, SessionConfig, Verify, World};

use crate::commands::plan::args::PlanCommand;
use crate::commands::simulate::args::SimulateArgs;
use crate::commands::topo::TopoArgs;

mod access;
mod device;
mod launched;
mod local_rank;
mod observing;
mod rank;

pub(crate) use access::{AccessArgs, SECRET_VARIABLE, TLS_VARIABLES};
pub(crate) use device::DeviceArg;
pub(crate) use launched::parse;
pub(crate) use observing::{LogFormat, MetricsArgs, StatusArgs};
pub(crate) use rank::RankArgs;

#[derive(Parser)]
#[command(
    version,
    about = "Moves new model weights from training ranks straight into the memory of inference ranks",
    long_about = "Moves new model weights from training ranks straight into the memory of inference ranks, with \
                  one-sided writes along a plan that is made once and replayed after every training step.\n\n\
                  Start with `weightsync demo`: it runs a whole job on this machine and compares every byte. To run a \
                  job on several hosts, start one `weightsync controller`, and a `push` or `serve` per rank.",
    after_long_help = "Exit codes:\n  0  all is well\n  1  the run failed: the message says which rank, at what, and what \
                       to do\n  2  the command line is wrong\n  3  weights arrived, but not as they must be\n\n\
                       Environment:\n  LIBFABRIC_SO       the libfabric.so.1 to open, before the system's\n  \
                       WEIGHTSYNC_SECRET  the job's secret, where --secret-file is not given\n  \
                       WEIGHTSYNC_TLS_CA, _CERT, _KEY and _NAME: as --tls-ca and so on\n  \
                       WEIGHTSYNC_RENDEZVOUS: as controller --rendezvous, push --controller and status ADDR; with\n                     \
                       WEIGHTSYNC_ETCD_USER and _PASSWORD, and for etcds:// WEIGHTSYNC_ETCD_CA, _CERT and _KEY\n  \
                       LOCAL_RANK, LOCAL_WORLD_SIZE and those of Open MPI and Slurm: see push --local-rank\n  \
                       RANK, WORLD_SIZE, MASTER_ADDR and those of MPI and Slurm: see push --rank and --controller\n  \
                       WEIGHTSYNC_LOG     what to log to standard error, for example info or rendezvous=debug [default: \
                       RUST_LOG, then warn]"
)]
pub(crate) struct Cli {
    /// How to log to standard error: text, or json with one object per line, the final error included
    #[arg(long, global = true, default_value = "text", value_name = "FORMAT", hide_short_help = true)]
    pub(crate) log_format: LogFormat,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Run a whole job on this machine and compare every byte that arrives
    ///
    /// A controller, T trainer processes that own the checkpoint sharded by rows (FSDP), and I inference processes that
    /// hold it tensor-parallel with fused qkv_proj and gate_up_proj parameters. Every step changes the trainers' weights,
    /// pushes them, commits, and every inference rank compares every byte with a reference that is computed from the
    /// checkpoint and the step number alone.
    Demo(DemoArgs),
    /// Run the controller of a job: ranks join it, and it decides when a version is committed
    Controller(ControllerArgs),
    /// Be one trainer: load a shard of a checkpoint and push version after version of it
    Push(PushArgs),
    /// Be one inference rank: take version after version, and compare them if asked
    Serve(ServeArgs),
    /// Show what a running job does: who has joined, what is waited for, how far the push is
    Status(StatusArgs),
    /// Say what this machine has (libfabric, NICs, GPUs, limits) and what it means for a push
    Info(InfoArgs),
    /// Make the plan of a transfer and show what it means, without any of its machines; or compare two plans
    Plan(Box<PlanCommand>),
    /// Play a push in virtual time on a modelled cluster, and show where its time goes
    ///
    /// The plan and the engine are those of a real push; hosts, NICs and their network are modelled, with numbers that
    /// --cluster states. So a cluster of any size is tried on a laptop, with stragglers and slow NICs.
    Simulate(Box<SimulateArgs>),
    /// Draw this host, or another from a dump: NUMA nodes, PCI switches, GPUs with their NICs, and cores for their threads
    Topo(TopoArgs),
    /// Compute what the ranks of a training job send each other in an epoch, and what a push adds to it
    ///
    /// Each scheme stands alone, on the ranks of its own group, and then all three groups together. It is arithmetic
    /// from public formulas, not a measurement: the documentation of xfer_plan::traffic says what they count, and
    /// where real jobs differ.
    Traffic(TrafficArgs),
}

#[derive(Args)]
pub(crate) struct DemoArgs {
    /// Trainer processes
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) trainers: u32,
    /// Inference processes; the checkpoint is split over them
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) inference: u32,
    /// Training steps; each is one version
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) steps: u64,
    /// A checkpoint (.safetensors, model.safetensors.index.json, or a folder with one) [default: a synthetic one of
    /// the shape of Qwen3-0.6B, written once into the cache folder, 1.2 GB]
    #[arg(long, value_name = "PATH")]
    pub(crate) checkpoint: Option<PathBuf>,
    /// Where the weights are: cpu, or cuda, which deals the GPUs of this host to the ranks, trainers first
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub(crate) device: DeviceArg,
    #[command(flatten)]
    pub(crate) rail: RailArgs,
    #[command(flatten)]
    pub(crate) staging: StagingArgs,
    #[command(flatten)]
    pub(crate) plan: PlanArgs,
    #[command(flatten)]
    pub(crate) checksums: ChecksumArgs,
    #[command(flatten)]
    pub(crate) held: HeldArgs,
    #[command(flatten)]
    pub(crate) launch: LaunchArgs,
    #[command(flatten)]
    pub(crate) metrics: MetricsArgs,
    /// Write a timeline of all ranks, for Perfetto (ui.perfetto.dev) or chrome://tracing
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// Print one JSON object instead of the table
    #[arg(long)]
    pub(crate) json: bool,
}

/// Where the demo's ranks run.
#[derive(Args, Clone)]
pub(crate) struct LaunchArgs {
    /// Words to put before each trainer's command, separated by spaces: 'ip netns exec NAME', 'numactl --cpunodebind=0',
    /// 'ssh HOST'. They must pass on standard input and the environment (WEIGHTSYNC_SECRET), and this program and the
    /// checkpoint must have the same absolute paths there
    #[arg(long, default_value = "", hide_default_value = true, value_name = "WORDS")]
    pub(crate) launch_trainers: String,
    /// The same for each inference rank
    #[arg(long, default_value = "", hide_default_value = true, value_name = "WORDS")]
    pub(crate) launch_inference: String,
    /// Where the demo's controller listens, HOST:PORT: an address at which every rank reaches it; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:0", value_name = "ADDR")]
    pub(crate) listen: String,
}

/// How bytes travel, and how long to wait for them.
#[derive(Args, Clone)]
pub(crate) struct RailArgs {
    /// auto (shared memory on one host, else the best that both ends have), local, tcp, shm, efa or verbs
    #[arg(long, default_value = "auto")]
    pub(crate) fabric: Fabric,
    /// The longest that any rank waits without progress, in seconds
    #[arg(long, default_value = "30", value_name = "SECONDS", value_parser = seconds)]
    pub(crate) deadline: Duration,
    /// The NICs of this rank, a rail each, as `weightsync info` lists libfabric's domains; `demo` deals them to the ranks of
    /// each side, one after another [default: RDMA NICs by the topology of the host, see `weightsync topo` and --local-rank;
    /// with tcp the interface that reaches the controller]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub(crate) nic: Vec<String>,
    /// Bandwidth of each NIC in Gb/s, for the lower bound [default: the NIC's line rate; over loopback what one
    /// thread copies]
    #[arg(long, value_name = "GBPS", value_parser = positive)]
    pub(crate) nic_gbps: Option<f64>,
}

/// How the plan cuts transfers.
#[derive(Args, Clone)]
pub(crate) struct PlanArgs {
    /// The longest WRITE, in KiB
    #[arg(long, default_value_t = 1024, value_name = "KIB", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub(crate) chunk: u64,
    /// Rows shorter than this many bytes are copied together on the trainer and written as one; 0 writes each from
    /// where it is, with no copy
    #[arg(long, default_value_t = PlanOptions::default().gather_row_bytes_max, value_name = "BYTES")]
    pub(crate) gather_below: u64,
    /// How inference ranks that want the same bytes get them: never (trainers write each copy), per-host (trainers write one copy
    /// to each host, whose ranks pass it on), chain (trainers write one copy, and each host passes it on to the next), or auto
    /// (whichever the plan says ends first)
    #[arg(long, default_value_t = Relay::Never, value_name = "HOW")]
    pub(crate) relay: Relay,
}

impl PlanArgs {
    pub(crate) fn options(&self) -> PlanOptions {
        let chunk_bytes_max = self.chunk << 10;
        PlanOptions {
            chunk_bytes_max,
            gather_row_bytes_max: self.gather_below,
            gather_chunk_bytes_max: chunk_bytes_max,
            relay: self.relay,
            // The plan's own waves; each trainer's watermark bounds what it stages at all.
            watermark_bytes: chunk_bytes_max.max(PlanOptions::default().watermark_bytes),
            ..PlanOptions::default()
        }
    }
}

/// What is compared in band, without a reference.
#[derive(Args, Clone)]
pub(crate) struct ChecksumArgs {
    /// Compare checksums of what trainers sent with those of what arrived, before each commit: off, full, or sampled=P,
    /// which picks each parameter with probability P, others in every push
    #[arg(long, default_value_t = Verify::Off, value_name = "HOW")]
    pub(crate) verify: Verify,
}

/// A trainer's memory beside its weights.
#[derive(Args, Clone)]
pub(crate) struct StagingArgs {
    /// A trainer's staging memory, in MiB
    #[arg(long, default_value_t = 256, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub(crate) watermark: u64,
    /// Keep the trainer's weights in page-locked host memory, and push them by way of the GPU of --device
    #[arg(long)]
    pub(crate) offload: bool,
}

/// Which job.
#[derive(Args, Clone)]
pub(crate) struct JobArgs {
    /// The job's name; the same everywhere
    #[arg(long, default_value = weightsync::JOB_DEFAULT)]
    pub(crate) job: String,
    /// How many trainers the job has
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) trainers: u32,
    /// How many inference ranks the job has
    #[arg(long, value_name = "I", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) inference: u32,
    #[command(flatten)]
    pub(crate) access: AccessArgs,
}

#[derive(Args)]
pub(crate) struct ControllerArgs {
    /// Where to listen, HOST:PORT; port 0 takes a free one and says which
    #[arg(long, default_value = "127.0.0.1:7070", value_name = "ADDR")]
    pub(crate) listen: String,
    /// Record commits in etcd, at etcd://HOST:2379/PREFIX, and let ranks find the controller there: one that finds another in
    /// charge stands by, and takes over when that one is gone. See docs/several-hosts.md for passwords and TLS
    #[arg(long, value_name = "URL", conflicts_with = "record", env = access::RENDEZVOUS_VARIABLE, hide_env_values = true)]
    pub(crate) rendezvous: Option<String>,
    /// Where ranks reach this controller, HOST:PORT, for --rendezvous; port 0 is the one on which it listens [default: the
    /// address of --listen, if it is one]
    #[arg(long, value_name = "ADDR", requires = "rendezvous")]
    pub(crate) advertise: Option<String>,
    #[command(flatten)]
    pub(crate) job: JobArgs,
    #[command(flatten)]
    pub(crate) plan: PlanArgs,
    #[command(flatten)]
    pub(crate) checksums: ChecksumArgs,
    /// The longest that any rank may let the others wait without progress, in seconds
    #[arg(long, default_value = "30", value_name = "SECONDS", value_parser = seconds)]
    pub(crate) deadline: Duration,
    /// What a lost rank does to the job: fail (it ends for all), wait (pushes fail until the rank is back) or continue (it goes
    /// on without the rank until that is back; without a trainer only where others own the same tensors)
    #[arg(long, default_value_t = OnLoss::Fail, value_name = "POLICY")]
    pub(crate) on_loss: OnLoss,
    /// Record the last committed version in this file, before anybody is told of it: a controller that is started again with
    /// it goes on from there
    #[arg(long, value_name = "FILE")]
    pub(crate) record: Option<PathBuf>,
    /// Allow an address that other hosts can reach with neither a secret nor TLS
    #[arg(long)]
    pub(crate) insecure: bool,
    #[command(flatten)]
    pub(crate) metrics: MetricsArgs,
    /// Print one JSON object per line, each with an "event"
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct PushArgs {
    #[command(flatten)]
    pub(crate) rank: RankArgs,
    #[command(flatten)]
    pub(crate) staging: StagingArgs,
    /// Versions to push; each is one training step
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) steps: u64,
    /// Pause between versions, in seconds
    #[arg(long, default_value = "0", value_name = "SECONDS", value_parser = seconds_or_none)]
    pub(crate) pause: Duration,
    /// How often to try a version again whose push failed, as it does when the job has lost a rank; each time the session waits
    /// for the job's other ranks as long as its deadline
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) retries: u32,
}

/// What inference ranks hold; the same on all of them.
#[derive(Args, Clone)]
pub(crate) struct HeldArgs {
    /// How many times the inference ranks hold the model: those of each replica, one after another, split it tensor-parallel
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) replicas: u32,
    /// Hold the weights of linear layers in FP8, quantised by the trainers in blocks of 128 x 128 on the way, with their scales
    /// beside them as `..._scale_inv`; layers whose parts would cut blocks stay as they are
    #[arg(long)]
    pub(crate) fp8: bool,
    /// What a version does to the weights that are served meanwhile: in-place (written over them), staged (written beside them, and
    /// takes their place) or staged-copy (written beside them, and copied over them)
    #[arg(long, default_value_t = CommitMode::InPlace, value_name = "MODE")]
    pub(crate) commit: CommitMode,
}

impl HeldArgs {
    /// How many ranks split the model.
    pub(crate) fn tensor_parallel(&self, inference: u32) -> anyhow::Result<u32> {
        match inference.is_multiple_of(self.replicas) {
            true => Ok(inference / self.replicas),
            false => bail!(
                "--replicas {}: {inference} inference ranks cannot be split into as many; give a number that divides them",
                self.replicas
            ),
        }
    }
}

#[derive(Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) rank: RankArgs,
    #[command(flatten)]
    pub(crate) held: HeldArgs,
    /// Compare every byte of every version with a reference computed from the checkpoint, once it is committed
    #[arg(long)]
    pub(crate) verify: bool,
    /// With --verify: only versions whose number is a multiple of N
    #[arg(long, default_value_t = 1, value_name = "N", requires = "verify", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) verify_every: u64,
}

#[derive(Args)]
pub(crate) struct InfoArgs {
    /// Print one JSON object instead
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
#[command(
    group = clap::ArgGroup::new("shape").required(true).args(["model", "config"]),
    after_long_help = "Examples:\n  weightsync traffic --model llama-3-70b --tp 8 --pp 8 --dp 16\n      one epoch of C4 on \
                       1024 GPUs: about 85 EB\n  weightsync traffic --config config.json --dp 64 --tokens 1e12 --samples \
                       250e6 --batch 1024 --json\n      FSDP or data parallel on 64 GPUs, for a program\n\nWith --json, \
                       bytes and counts are strings of digits: they pass 2^53, where many readers of JSON round."
)]
pub(crate) struct TrafficArgs {
    /// A model that is known by name, such as llama-3-70b or kimi-k2
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// The config.json of a model
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Ranks that share a layer: tensor parallel
    #[arg(long, default_value_t = 1, value_name = "G")]
    pub(crate) tp: u32,
    /// Stages of the pipeline
    #[arg(long, default_value_t = 1, value_name = "G")]
    pub(crate) pp: u32,
    /// Replicas that share the batch: data parallel, or FSDP
    #[arg(long, default_value_t = 1, value_name = "G")]
    pub(crate) dp: u32,
    /// Tokens of an epoch; the default is C4's
    #[arg(long, default_value = "156e9", value_name = "N", value_parser = count)]
    pub(crate) tokens: u64,
    /// Samples of an epoch; the default is C4's
    #[arg(long, default_value = "364.6e6", value_name = "N", value_parser = count)]
    pub(crate) samples: u64,
    /// Samples of a mini-batch
    #[arg(long, default_value = "2048", value_name = "N", value_parser = count)]
    pub(crate) batch: u64,
    /// Bytes that one push moves, all replicas together [default: the weights once]
    #[arg(long, value_name = "N", value_parser = count)]
    pub(crate) push_bytes: Option<u64>,
    /// Print one JSON object instead
    #[arg(long)]
    pub(crate) json: bool,
}

/// A whole number from 1, also as 156e9.
pub(crate) fn count(text: &str) -> Result<u64, String> {
    // Up to here a float holds every whole number.
    const EXACT_MAX: f64 = (1u64 << 53) as f64;
    let whole = |value: &f64| (1.0..=EXACT_MAX).contains(value) && value.fract() == 0.0;
    match (text.parse::<u64>(), text.parse().ok().filter(whole)) {
        (Ok(value @ 1..), _) => Ok(value),
        (Err(_), Some(value)) => Ok(value as u64),
        _ => {
            Err("a whole number above 0 is expected, such as 2048 or 156e9 (with an exponent, at most 9e15)"
                .into())
        }
    }
}

pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = seconds_or_none(text)?;
    let range = weightsync::DEADLINE_RANGE;
    if range.contains(&seconds) { Ok(seconds) } else { Err(format!("must be within {range:?}")) }
}

pub(crate) fn seconds_or_none(text: &str) -> Result<Duration, String> {
    // A day is longer than anybody waits, and keeps sums of times in range.
    const SECONDS_MAX: f64 = 86_400.0;
    let seconds: f64 = text.parse().map_err(|_| "a number of seconds is expected".to_owned())?;
    if (0.0..=SECONDS_MAX).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err(format!("must be between 0 and {SECONDS_MAX} seconds"))
    }
}

pub(crate) fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value > 0.0 => Ok(value),
        _ => Err("a number above 0 is expected".into()),
    }
}

impl JobArgs {
    pub(crate) fn world(&self) -> World {
        World { trainers: self.trainers, inference: self.inference }
    }
}

impl RailArgs {
    pub(crate) fn apply(&self, config: &mut SessionConfig) {
        config.fabric = self.fabric;
        config.deadline = self.deadline;
        config.nics.clone_from(&self.nic);
        config.rail_bytes_per_second = self.nic_gbps.map(|gbps| ((gbps * 1e9 / 8.0) as u64).max(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn counts_are_whole() {
        for (text, value) in [("1", 1), ("18446744073709551615", u64::MAX), ("156e9", 156_000_000_000)] {
            assert_eq!(count(text), Ok(value));
        }
        assert_eq!(count("364.6e6"), Ok(364_600_000));
        for wrong in ["0", "-1", "0.5", "1e-3", "1e30", "nan", "inf", "18446744073709551616", "many"] {
            assert!(count(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn seconds_are_bounded() {
        assert_eq!(seconds("1.5"), Ok(Duration::from_millis(1500)));
        for wrong in ["0", "1e-9", "-1", "nan", "inf", "1e9", "soon"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
        assert_eq!(seconds_or_none("0"), Ok(Duration::ZERO));
    }
}
