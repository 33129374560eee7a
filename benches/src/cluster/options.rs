//! The command line of `bench cluster`.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};

use super::job::RailOptions;
use super::launcher::Launcher;

/// Measure this cluster: host facts, then pushes from one trainer to one receiver by message size, from all trainers to all
/// receivers, and of a model's own plan.
#[derive(Debug, Parser)]
#[command(
    bin_name = "bench cluster",
    // The last one counts, so that a script's options can be overruled.
    args_override_self = true,
    after_help = "Start one process per rank with srun, mpirun or torchrun --no-python, or let this one start them with --hosts \
                  or --local. The same options for every rank; rank 0's count. See docs/bench-cluster.md."
)]
pub(crate) struct Options {
    /// Start so many trainers and receivers on this host
    #[arg(long, value_name = "TRAINERS:RECEIVERS", conflicts_with_all = ["hosts", "launcher", "trainers"])]
    pub(crate) local: Option<LocalWorld>,
    /// Words before the command of each trainer of --local, such as `ip netns exec a`
    #[arg(long, value_name = "WORDS", requires = "local", default_value = "", hide_default_value = true)]
    pub(crate) launch_trainers: String,
    /// Words before the command of each receiver of --local
    #[arg(long, value_name = "WORDS", requires = "local", default_value = "", hide_default_value = true)]
    pub(crate) launch_receivers: String,
    /// Start ranks over ssh on these hosts: a line each, `host slots=8`
    #[arg(long, value_name = "FILE", conflicts_with = "launcher")]
    pub(crate) hosts: Option<PathBuf>,
    /// This program on the hosts of --hosts [default: the same path as here]
    #[arg(long, value_name = "PATH", requires = "hosts")]
    pub(crate) program: Option<String>,
    /// Whose variables count, if several launchers' are set
    #[arg(long, value_enum)]
    pub(crate) launcher: Option<Launcher>,
    /// The first N ranks are trainers [default: half of them]
    #[arg(long, value_name = "N")]
    pub(crate) trainers: Option<u32>,
    /// Where ranks find rank 0 [default: what the launcher says]
    #[arg(long, value_name = "HOST[:PORT]")]
    pub(crate) address: Option<Address>,
    /// A file with the job's secret; or set WEIGHTSYNC_SECRET. --hosts and --local make their own
    #[arg(long, value_name = "FILE")]
    pub(crate) secret_file: Option<PathBuf>,
    /// Do without a secret: everybody who reaches rank 0 can join
    #[arg(long)]
    pub(crate) insecure: bool,

    /// auto, local, tcp, shm, efa or verbs
    #[arg(long, value_name = "FABRIC", default_value = "auto")]
    pub(crate) fabric: String,
    /// NICs of a rank as libfabric names them; `/` between those of local rank 0, 1, ... [default: RDMA NICs as the PCI tree
    /// pairs them with GPUs, else libfabric's first]
    #[arg(long, value_name = "NIC[,NIC][/NIC...]", default_value = "", hide_default_value = true)]
    pub(crate) nic: String,
    /// What one NIC moves in Gb/s, where it does not say
    #[arg(long, value_name = "GBPS")]
    pub(crate) line_rate: Option<f64>,
    /// Longest wait for anybody without a sign of life, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0)]
    pub(crate) deadline: f64,

    /// What to measure
    #[arg(long, value_enum, value_delimiter = ',', default_value = "pair,all,model")]
    pub(crate) measure: Vec<Measure>,
    /// Counted rounds of each measurement; `bench compare` wants 5 or more
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: u32,
    /// What a rank sends or takes in a round, except for the model
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub(crate) mib: u64,
    /// Lengths of one WRITE from trainer 0 to receiver 0
    #[arg(long, value_name = "KIB", value_delimiter = ',', default_value = "64,256,1024,4096,16384,65536",
          value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub(crate) message_kib: Vec<u64>,
    /// A model that is known by name, such as kimi-k2
    #[arg(long, value_name = "NAME", default_value = "qwen3-0.6b")]
    pub(crate) model: String,
    /// The config.json of a model
    #[arg(long, value_name = "FILE", conflicts_with = "model")]
    pub(crate) config: Option<PathBuf>,
    /// How trainers hold it: factors of fsdp, hsdp, tp, pp, ep and dp [default: fsdp over all]
    #[arg(long, value_name = "LAYOUT")]
    pub(crate) from: Option<String>,
    /// How receivers hold it: factors of tp, ep and replicas [default: tp over all, or ep]
    #[arg(long, value_name = "LAYOUT")]
    pub(crate) to: Option<String>,
    /// Push so many of its layers
    #[arg(long, value_name = "N", conflicts_with = "gib")]
    pub(crate) layers: Option<u32>,
    /// Push as many of its layers as fit into so much memory of each rank [default: what the hosts have]
    #[arg(long, value_name = "GIB")]
    pub(crate) gib: Option<f64>,

    /// Where results.json, results.md and the plots go
    #[arg(long, value_name = "DIR", default_value = "bench-cluster")]
    pub(crate) out: PathBuf,
    /// Print the JSON instead of the Markdown
    #[arg(long)]
    pub(crate) json: bool,
}

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Measure {
    /// Trainer 0 to receiver 0, by message size
    Pair,
    /// All trainers to all receivers
    All,
    /// A model's own plan
    Model,
}

/// `--local 2:2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LocalWorld {
    pub(crate) trainers: u32,
    pub(crate) receivers: u32,
}

/// Processes that one host may be asked to start on a side.
const LOCAL_MAX: u32 = 1024;

impl FromStr for LocalWorld {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse().ok().filter(|number| (1..=LOCAL_MAX).contains(number));
        match text.split_once(':').map(|(trainers, receivers)| (number(trainers), number(receivers))) {
            Some((Some(trainers), Some(receivers))) => Ok(Self { trainers, receivers }),
            _ => Err(format!("two numbers from 1 to {LOCAL_MAX} are expected, such as 2:2")),
        }
    }
}

/// `host`, `host:port` or `[v6]:port`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) host: String,
    pub(crate) port: Option<u16>,
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "HOST or HOST:PORT is expected, an IPv6 address in brackets".to_owned();
        let (host, rest) = match text.strip_prefix('[') {
            Some(v6) => v6.split_once(']').ok_or_else(wrong)?,
            None => text.find(':').map_or((text, ""), |colon| text.split_at(colon)),
        };
        let port = match rest.strip_prefix(':') {
            Some(port) => Some(port.parse().map_err(|_| wrong())?),
            None if rest.is_empty() => None,
            None => return Err(wrong()),
        };
        if host.is_empty() { Err(wrong()) } else { Ok(Self { host: host.to_owned(), port }) }
    }
}

impl Options {
    /// How ranks reach each other.
    pub(crate) fn rails(&self) -> anyhow::Result<RailOptions> {
        // An unknown fabric is refused here and not by every rank.
        self.fabric.parse::<weightsync::Fabric>()?;
        let line_bytes_per_second = match self.line_rate {
            Some(gbps) if !(gbps > 0.0 && gbps < 1e6) => {
                bail!("--line-rate {gbps} is no speed of a NIC in Gb/s")
            }
            line_rate => line_rate.map(|gbps| (gbps * 1e9 / 8.0) as u64),
        };
        let groups = self.nic.split('/').filter(|group| !group.is_empty());
        let nics = groups.map(|group| group.split(',').map(|nic| nic.trim().to_owned()).collect()).collect();
        Ok(RailOptions {
            fabric: self.fabric.clone(),
            nics,
            line_bytes_per_second,
            deadline: self.deadline()?,
        })
    }

    /// The longest silence.
    pub(crate) fn deadline(&self) -> anyhow::Result<Duration> {
        let deadline = Duration::try_from_secs_f64(self.deadline).ok();
        let deadline = deadline.filter(|deadline| weightsync::DEADLINE_RANGE.contains(deadline));
        deadline.with_context(|| format!("--deadline {} is not from 0.1 to 86400 seconds", self.deadline))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory as _;
        Options::command().debug_assert();
    }

    #[test]
    fn addresses() {
        let of = |text: &str| text.parse().map(|Address { host, port }| (host, port));
        assert_eq!(of("a"), Ok(("a".into(), None)));
        assert_eq!(of("a.b:7"), Ok(("a.b".into(), Some(7))));
        assert_eq!(of("[::1]:7"), Ok(("::1".into(), Some(7))));
        for wrong in ["", ":7", "a:", "a:x", "[::1", "[::1]7", "a:70000"] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn nics_by_local_rank() {
        let nics = |words: &[&str]| {
            let options = Options::try_parse_from([&["x"], words].concat()).unwrap();
            options.rails().unwrap().nics
        };
        assert!(nics(&[]).is_empty());
        assert_eq!(nics(&["--nic", "a/b,c"]), [vec!["a"], vec!["b", "c"]]);
    }
}
