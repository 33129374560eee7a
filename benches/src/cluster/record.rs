//! What a run leaves behind: its machine, its settings, and every round of every rank. Medians are made from it and never
//! kept in its place.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use serde::Serialize;
use weightsync::{RailReport, Rank, World};

use super::facts::{HostKind, RankFacts};
use super::job::{Push, Pushed, RailOptions};
use super::launcher::Variables;
use super::options::{Measure, Options};
use super::root::Part;
use crate::series::{Better, Series};

/// Who started the ranks, and how it said so.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Launch {
    pub(crate) launcher: String,
    pub(crate) variables: Variables,
}

/// `results.json`.
#[derive(Serialize)]
pub(crate) struct Record {
    pub(crate) benchmark: &'static str,
    pub(crate) version: String,
    pub(crate) commit: Option<String>,
    pub(crate) launch: Launch,
    /// What decides how fast the cluster is: equal on both sides of a comparison.
    pub(crate) machine: Cluster,
    pub(crate) settings: Settings,
    pub(crate) series: Vec<Series>,
    pub(crate) measurements: Vec<Measurement>,
    /// What differs from host to host of one kind, and all that `topology` read there.
    pub(crate) hosts: Vec<Host>,
}

/// The cluster without the names of its hosts.
#[derive(Serialize)]
pub(crate) struct Cluster {
    pub(crate) trainers: u32,
    pub(crate) receivers: u32,
    pub(crate) kinds: Vec<Kind>,
}

/// Hosts that are alike.
#[derive(Serialize)]
pub(crate) struct Kind {
    pub(crate) hosts: usize,
    #[serde(flatten)]
    pub(crate) kind: HostKind,
}

#[derive(Serialize)]
pub(crate) struct Host {
    pub(crate) name: String,
    pub(crate) ranks: Vec<u32>,
    pub(crate) memory_available_bytes: Option<u64>,
    pub(crate) topology: serde_json::Value,
}

/// What was asked for, as far as it changes a figure.
#[derive(Serialize)]
pub(crate) struct Settings {
    rounds: u32,
    mib: u64,
    /// The model, its layers and layouts.
    model: Option<String>,
    pub(crate) fabric: String,
    nics: Vec<Vec<String>>,
    line_bytes_per_second: Option<u64>,
}

impl Settings {
    pub(crate) fn new(options: &Options, rails: &RailOptions, model: Option<String>) -> Self {
        let RailOptions { fabric, nics, line_bytes_per_second, deadline: _ } = rails.clone();
        Self { rounds: options.rounds, mib: options.mib, model, fabric, nics, line_bytes_per_second }
    }
}

/// One thing that was measured.
#[derive(Serialize)]
pub(crate) struct Measurement {
    pub(crate) name: String,
    #[serde(serialize_with = "name_of")]
    pub(crate) measure: Measure,
    /// The longest WRITE, where that is what is measured.
    pub(crate) message_bytes: Option<u64>,
    /// Of all trainers, in a round.
    pub(crate) bytes: u64,
    pub(crate) writes: u64,
    /// The busiest NIC's bytes over its bandwidth.
    pub(crate) bound_seconds: f64,
    /// The bound is that of NICs whose speed is known; otherwise of what a thread copies, which says nothing of NICs.
    pub(crate) line_rate_known: bool,
    pub(crate) rounds: Vec<Round>,
    pub(crate) trainers: Vec<TrainerUse>,
}

/// A round of all trainers.
#[derive(Serialize)]
pub(crate) struct Round {
    /// Of the slowest trainer's writes.
    pub(crate) write_seconds: f64,
    /// Until every inference rank has confirmed.
    pub(crate) seconds: f64,
    /// All bytes over `write_seconds`, in 10^9 bytes a second.
    pub(crate) gb_per_second: f64,
    /// By trainer.
    pub(crate) pushes: Vec<Push>,
}

/// A trainer's rails, and how its bytes went over time in a round that does not count.
#[derive(Serialize)]
pub(crate) struct TrainerUse {
    pub(crate) trainer: u32,
    /// What each of its rails did in the last counted round.
    pub(crate) rails: Vec<RailReport>,
    /// Seconds since its own call, bytes delivered by then.
    pub(crate) samples: Vec<(f64, u64)>,
}

fn name_of<S: serde::Serializer>(measure: &Measure, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format!("{measure:?}").to_lowercase())
}

impl Record {
    /// An empty record of this cluster. `facts` are those of every rank, by rank.
    pub(crate) fn new(
        launch: Launch,
        world: World,
        facts: &[RankFacts],
        settings: Settings,
    ) -> anyhow::Result<Self> {
        let first = facts.first().context("no rank")?;
        let mut kinds: Vec<Kind> = Vec::new();
        let mut hosts: Vec<Host> = Vec::new();
        for (rank, facts) in (0..).zip(facts) {
            let build = |facts: &RankFacts| (facts.version.clone(), facts.commit.clone());
            if build(facts) != build(first) {
                let (ours, theirs) = (build(first), build(facts));
                bail!(
                    "rank {rank} ({}) runs another build {theirs:?} than rank 0 {ours:?}: copy one program to all hosts",
                    facts.host
                );
            }
            if let Some(host) = hosts.iter_mut().find(|host| host.name == facts.host) {
                host.ranks.push(rank);
                continue;
            }
            hosts.push(Host {
                name: facts.host.clone(),
                ranks: vec![rank],
                memory_available_bytes: facts.memory_available_bytes,
                topology: facts.topology.clone(),
            });
            match kinds.iter_mut().find(|kind| kind.kind == facts.kind) {
                Some(kind) => kind.hosts += 1,
                None => kinds.push(Kind { hosts: 1, kind: facts.kind.clone() }),
            }
        }
        Ok(Self {
            benchmark: "cluster",
            version: first.version.clone(),
            commit: first.commit.clone(),
            launch,
            machine: Cluster { trainers: world.trainers, receivers: world.inference, kinds },
            settings,
            series: Vec::new(),
            measurements: Vec::new(),
            hosts,
        })
    }

    pub(crate) fn add(&mut self, measurement: Measurement) {
        self.series.push(measurement.bandwidth());
        let seconds = measurement.rounds.iter().map(|round| round.seconds).collect();
        let name = format!("{}: until committed", measurement.name);
        self.series.push(Series::new(name, "s", Better::Lower, seconds));
        self.measurements.push(measurement);
    }
}

impl Measurement {
    pub(crate) fn new(
        measure: Measure,
        name: String,
        parts: &[Part],
        mut pushed: BTreeMap<u32, Pushed>,
        line_rate_known: bool,
    ) -> anyhow::Result<Self> {
        let first = pushed.values().next().context("no trainer took part")?;
        let (count, bound_seconds) = (first.rounds.len(), first.bound_seconds);
        if let Some((rank, _)) = pushed.iter().find(|(_, pushed)| pushed.rounds.len() != count) {
            bail!("rank {rank} reports another number of rounds than the others");
        }
        let rounds: Vec<Round> = (0..count)
            .map(|round| {
                Round::of(pushed.values().filter_map(|pushed| pushed.rounds.get(round)).copied().collect())
            })
            .collect();
        let sum = |of: fn(&Push) -> u64| rounds.first().map_or(0, |round| round.pushes.iter().map(of).sum());
        let (bytes, writes) = (sum(|push| push.bytes), sum(|push| push.writes));
        let trainers = parts
            .iter()
            .filter_map(|(rank, member)| match member {
                Rank::Trainer(trainer) => Some((trainer.0, pushed.remove(rank)?)),
                Rank::Receiver(_) => None,
            })
            .map(|(trainer, pushed)| TrainerUse { trainer, rails: pushed.rails, samples: pushed.samples })
            .collect();
        let message_bytes = None;
        Ok(Self {
            name,
            measure,
            message_bytes,
            bytes,
            writes,
            bound_seconds,
            line_rate_known,
            rounds,
            trainers,
        })
    }

    /// All trainers' bytes over the time of the slowest one's writes.
    pub(crate) fn bandwidth(&self) -> Series {
        let rounds = self.rounds.iter().map(|round| round.gb_per_second).collect();
        Series::new(format!("{}: writes", self.name), "GB/s", Better::Higher, rounds)
    }

    /// What the bound allows, in 10^9 bytes a second; `None` where no NIC's speed is known.
    pub(crate) fn line_rate(&self) -> Option<f64> {
        (self.line_rate_known && self.bound_seconds > 0.0)
            .then(|| self.bytes as f64 / self.bound_seconds / 1e9)
    }
}

impl Round {
    fn of(pushes: Vec<Push>) -> Self {
        let most = |of: fn(&Push) -> f64| pushes.iter().map(of).fold(0.0, f64::max);
        let (write_seconds, seconds) = (most(|push| push.write_seconds), most(|push| push.seconds));
        let bytes: u64 = pushes.iter().map(|push| push.bytes).sum();
        Self { write_seconds, seconds, gb_per_second: bytes as f64 / write_seconds / 1e9, pushes }
    }
}
