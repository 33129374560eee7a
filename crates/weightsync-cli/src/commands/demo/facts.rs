//! What a demo learns of its ranks, rails and versions, and how it tells it: JSON for a program, tables for a person.
//!
//! Nothing counts as verified that was not: every version, on every rank, all bytes of the plan. A rail that was given up
//! is always told, however well the others did without it.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::bail;
use serde::Serialize;
use weightsync::{Device, PushReport, RailReport, Rank, VerifyReport, VersionReport, World};

use crate::losses::{Loss, Losses};
use crate::say::say;
use crate::table::{Table, bytes_text, seconds_text};

/// What is known of one rank.
#[derive(Default, Serialize)]
pub(super) struct RankFacts {
    pub(super) rank: String,
    /// Where its weights are.
    pub(super) device: String,
    pub(super) weight_bytes: u64,
    pub(super) peak_rss_bytes: Option<u64>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) routes: BTreeMap<String, String>,
    /// NICs that it was given; 1 where it was to take the first that serves.
    nics: usize,
    /// Of a trainer: what each of its rails did, over all versions.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    rails: Vec<RailFacts>,
    /// Of an inference rank that passes on: what each of the rails did over which it does so.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    rails_onward: Vec<RailFacts>,
    #[serde(skip)]
    losses: Losses,
}

#[derive(Serialize)]
struct RailFacts {
    name: String,
    bytes: u64,
    writes: u64,
}

/// A loss, and whose it is.
#[derive(Serialize)]
struct RankLoss<'a> {
    rank: &'a str,
    #[serde(flatten)]
    loss: &'a Loss,
}

/// What is known of one version.
#[derive(Default, Serialize)]
struct VersionFacts {
    version: u64,
    /// Bytes over all trainers.
    bytes: u64,
    writes: u64,
    bytes_gathered: u64,
    /// Of the slowest trainer.
    write_seconds: f64,
    /// Bytes over all inference ranks that they passed on to others.
    bytes_passed_on: u64,
    /// Of the slowest of these ranks, from the moment that it listened.
    passed_on_seconds: f64,
    /// All bytes of the trainers over the slowest one's writes.
    gb_per_second: f64,
    /// From the first call to the last confirmed commit.
    seconds: f64,
    /// How long the inference ranks served nothing.
    pause_seconds: f64,
    bound_seconds: f64,
    bound_fraction: f64,
    verified_bytes: u64,
    verified_ranks: u32,
    /// Where the job verifies in band, by side.
    #[serde(skip_serializing_if = "Option::is_none")]
    checksums: Option<ChecksumFacts>,
}

/// What was hashed to compare a version in band.
#[derive(Default, Serialize)]
struct ChecksumFacts {
    trainers: HashedFacts,
    inference: HashedFacts,
    /// Of what inference ranks passed on.
    #[serde(skip_serializing_if = "Option::is_none")]
    passed_on: Option<HashedFacts>,
}

/// What the ranks of one side hashed.
#[derive(Default, Serialize)]
struct HashedFacts {
    /// Parameters of all ranks.
    params: u64,
    /// Their bytes.
    bytes: u64,
    /// Of the slowest rank.
    seconds: f64,
    /// What of that the push waited for, on the rank that made it wait longest.
    exposed_seconds: f64,
}

impl HashedFacts {
    fn add(&mut self, report: &VerifyReport) {
        self.params += report.params;
        self.bytes += report.bytes;
        self.seconds = self.seconds.max(report.seconds);
        self.exposed_seconds = self.exposed_seconds.max(report.exposed_seconds);
    }
}

#[derive(Serialize)]
pub(super) struct Plan {
    pub(super) digest: String,
    pub(super) bytes: u64,
    pub(super) writes: u64,
    pub(super) bound_seconds: f64,
    pub(super) limited_by: Option<String>,
}

#[derive(Serialize)]
struct Summary<'a> {
    checkpoint: &'a Path,
    trainers: u32,
    inference: u32,
    fabric: &'a str,
    plan: Option<&'a Plan>,
    versions: Vec<&'a VersionFacts>,
    ranks: &'a [RankFacts],
    given_up: Vec<RankLoss<'a>>,
    verified: bool,
}

/// See the module.
pub(super) struct Facts {
    world: World,
    pub(super) ranks: Vec<RankFacts>,
    pub(super) plan: Option<Plan>,
    versions: BTreeMap<u64, VersionFacts>,
}

impl RankFacts {
    pub(super) fn new(rank: Rank, device: Device, nics: usize) -> Self {
        Self { rank: rank.to_string(), device: device.to_string(), nics, ..Self::default() }
    }

    /// Adds what its rails did in a version; which of them, or of their ways, it gave up since the report before.
    fn add(&mut self, version: u64, reports: &[RailReport]) -> &[Loss] {
        add(&mut self.rails, reports);
        self.losses.add(version, reports)
    }

    /// The same of the rails over which it passes on.
    fn add_onward(&mut self, version: u64, reports: &[RailReport]) -> &[Loss] {
        add(&mut self.rails_onward, reports);
        self.losses.add(version, reports)
    }

    fn given_up(&self) -> impl Iterator<Item = RankLoss<'_>> {
        self.losses.iter().map(|loss| RankLoss { rank: &self.rank, loss })
    }

    /// How many rails it has, and had.
    fn rails_text(&self) -> String {
        let to_it = if self.rails.is_empty() { self.nics } else { self.rails.len() };
        let all = to_it + self.rails_onward.len();
        match self.losses.rails() {
            0 => all.to_string(),
            lost => format!("{} of {all}", all.saturating_sub(lost)),
        }
    }
}

fn add(rails: &mut Vec<RailFacts>, reports: &[RailReport]) {
    let fresh = |report: &RailReport| RailFacts { name: report.name.clone(), bytes: 0, writes: 0 };
    rails.extend(reports.iter().skip(rails.len()).map(fresh));
    for (rail, report) in rails.iter_mut().zip(reports) {
        rail.bytes += report.bytes;
        rail.writes += report.writes;
    }
}

impl Facts {
    pub(super) fn new(world: World, ranks: Vec<RankFacts>) -> Self {
        Self { world, ranks, plan: None, versions: BTreeMap::new() }
    }

    fn version(&mut self, version: u64) -> &mut VersionFacts {
        self.versions.entry(version).or_insert_with(|| VersionFacts { version, ..VersionFacts::default() })
    }

    /// Adds a trainer's report; which of its rails were given up since the one before.
    pub(super) fn pushed(&mut self, number: usize, report: &PushReport) -> &[Loss] {
        let facts = self.version(report.version);
        facts.bytes += report.bytes;
        facts.writes += report.writes;
        facts.bytes_gathered += report.bytes_gathered;
        facts.write_seconds = facts.write_seconds.max(report.write_seconds);
        facts.seconds = facts.seconds.max(report.seconds);
        facts.bound_seconds = report.bound_seconds;
        if facts.write_seconds > 0.0 {
            facts.gb_per_second = facts.bytes as f64 / facts.write_seconds / 1e9;
            facts.bound_fraction = facts.bound_seconds / facts.write_seconds;
        }
        if let Some(report) = &report.verified {
            facts.checksums.get_or_insert_default().trainers.add(report);
        }
        let rank = self.ranks.get_mut(number);
        rank.map_or(&[], |rank| rank.add(report.version, &report.rails))
    }

    /// Adds an inference rank's report; which of the rails were given up since the one before over which it passes on.
    pub(super) fn served(&mut self, number: usize, report: &VersionReport) -> &[Loss] {
        let facts = self.version(report.version);
        facts.pause_seconds = facts.pause_seconds.max(report.pause_seconds);
        if let Some(report) = &report.verified {
            facts.checksums.get_or_insert_default().inference.add(report);
        }
        let Some(relayed) = &report.passed_on else { return &[] };
        facts.bytes_passed_on += relayed.bytes;
        facts.passed_on_seconds = facts.passed_on_seconds.max(relayed.seconds);
        if let Some(report) = &relayed.verified {
            facts.checksums.get_or_insert_default().passed_on.get_or_insert_default().add(report);
        }
        let rank = self.ranks.get_mut(number);
        rank.map_or(&[], |rank| rank.add_onward(report.version, &relayed.rails))
    }

    /// Adds what an inference rank has verified; whether it was the last to verify this version.
    pub(super) fn verified(&mut self, version: u64, bytes: u64) -> bool {
        let ranks = self.world.inference;
        let facts = self.version(version);
        facts.verified_bytes += bytes;
        facts.verified_ranks += 1;
        facts.verified_ranks == ranks
    }

    /// Whether `steps` versions are all that they must be.
    pub(super) fn check_complete(&self, steps: u64) -> anyhow::Result<()> {
        let planned = self.plan.as_ref().map_or(0, |plan| plan.bytes);
        let ranks = self.world.inference;
        for version in 1..=steps {
            let Some(facts) = self.versions.get(&version) else {
                bail!("version {version} was never pushed")
            };
            let sent = facts.bytes + facts.bytes_passed_on;
            if facts.verified_ranks != ranks || facts.verified_bytes != planned || sent != planned {
                bail!(
                    "version {version}: {} of {ranks} ranks verified {} of {planned} bytes, {sent} were sent",
                    facts.verified_ranks,
                    facts.verified_bytes,
                );
            }
        }
        Ok(())
    }

    fn given_up(&self) -> impl Iterator<Item = RankLoss<'_>> {
        self.ranks.iter().flat_map(RankFacts::given_up)
    }

    /// The whole run for a program, once it is known to be complete.
    pub(super) fn json(&self, checkpoint: &Path, fabric: &str) -> serde_json::Result<String> {
        serde_json::to_string_pretty(&Summary {
            checkpoint,
            trainers: self.world.trainers,
            inference: self.world.inference,
            fabric,
            plan: self.plan.as_ref(),
            versions: self.versions.values().collect(),
            ranks: &self.ranks,
            given_up: self.given_up().collect(),
            verified: true,
        })
    }

    /// The same for a person.
    pub(super) fn print(&self) {
        if let Some(plan) = &self.plan {
            let limit =
                plan.limited_by.as_ref().map(|rank| format!(", limited by {rank}")).unwrap_or_default();
            say!(
                "plan {}: {} in {} writes, lower bound {}{limit}",
                plan.digest.get(..12).unwrap_or(&plan.digest),
                bytes_text(plan.bytes),
                plan.writes,
                seconds_text(plan.bound_seconds),
            );
        }
        let mut rails: BTreeMap<&str, usize> = BTreeMap::new();
        for rail in self.ranks.iter().flat_map(|rank| rank.routes.values()) {
            // One line for what differs only by address.
            *rails.entry(rail.split("://").next().unwrap_or(rail)).or_default() += 1;
        }
        for (rail, pairs) in rails {
            say!("{pairs} trainer-inference pairs over {rail}");
        }
        say!("\n{}", self.version_table().render());
        say!("\n{}", self.rank_table().render());
        for (number, RankLoss { rank, loss }) in self.given_up().enumerate() {
            let gap = if number == 0 { "\n" } else { "" };
            say!("{gap}rail given up: {rank}: {loss}");
        }
        let checksums =
            self.versions.values().filter_map(|facts| Some((facts.version, facts.checksums.as_ref()?)));
        for (number, (version, ChecksumFacts { trainers, inference, passed_on })) in checksums.enumerate() {
            let gap = if number == 0 { "\n" } else { "" };
            let onward = passed_on.as_ref().map_or_else(String::new, |onward| {
                let (bytes, seconds) = (bytes_text(onward.bytes), seconds_text(onward.seconds));
                format!(", and for {seconds} the {bytes} that they passed on")
            });
            say!(
                "{gap}checksums of version {version}: {} as sent and {} as they arrived; trainers hashed for {}, {} of it \
                 beyond their writes, inference ranks for {}{onward}",
                bytes_text(trainers.bytes),
                bytes_text(inference.bytes),
                seconds_text(trainers.seconds),
                seconds_text(trainers.exposed_seconds),
                seconds_text(inference.seconds),
            );
        }
        let bytes: u64 = self.versions.values().map(|facts| facts.verified_bytes).sum();
        say!(
            "\nverified: {} versions on {} inference ranks, all {} equal the reference",
            self.versions.len(),
            self.world.inference,
            bytes_text(bytes),
        );
    }

    fn version_table(&self) -> Table {
        // Only where there is any.
        let onward = self.versions.values().any(|facts| facts.bytes_passed_on > 0);
        let mut heads =
            vec!["version", "pushed", "gathered", "write", "GB/s", "of bound", "pause", "verified"];
        if onward {
            heads.insert(2, "passed on");
        }
        let mut table = Table::new(&heads);
        for facts in self.versions.values() {
            let mut row = vec![
                facts.version.to_string(),
                bytes_text(facts.bytes),
                bytes_text(facts.bytes_gathered),
                seconds_text(facts.write_seconds),
                format!("{:.2}", facts.gb_per_second),
                format!("{:.2}", facts.bound_fraction),
                seconds_text(facts.pause_seconds),
                format!(
                    "{} x {}",
                    bytes_text(facts.verified_bytes / u64::from(facts.verified_ranks.max(1))),
                    facts.verified_ranks
                ),
            ];
            if onward {
                row.insert(2, bytes_text(facts.bytes_passed_on));
            }
            table.row(row);
        }
        table
    }

    fn rank_table(&self) -> Table {
        let mut table = Table::new(&["rank", "device", "weights", "rails", "peak memory"]);
        for rank in &self.ranks {
            let peak = rank.peak_rss_bytes.map_or_else(|| "?".into(), bytes_text);
            let (rank_name, device) = (rank.rank.clone(), rank.device.clone());
            table.row(vec![rank_name, device, bytes_text(rank.weight_bytes), rank.rails_text(), peak]);
        }
        table
    }
}
