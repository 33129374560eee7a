//! What a controller counts, from what it reports.

use std::collections::BTreeSet;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use rendezvous::controller::{Cause, Report};
use rendezvous::{Refusal, World};
use xfer_plan::Rank;

use super::Metrics;
use super::families::{Counters, Gauges, OfRank, OfReason, OfSide, histogram, register};

/// Registered with the first controller: a process that runs none tells none of it.
#[derive(Clone)]
pub(super) struct Families {
    ranks: Gauges<OfSide>,
    members: Gauges<OfSide>,
    version: Gauge,
    planned: Gauge,
    commits: Counter,
    aborts: Counters<OfReason>,
    losses: Counters<OfSide>,
    regroups: Counter,
    refused: Counters<OfReason>,
    push_seconds: Histogram,
}

impl Families {
    #[rustfmt::skip] // one metric a line
    pub(super) fn register(registry: &mut Registry) -> Self {
        let r = registry.sub_registry_with_prefix("controller");
        Self {
            ranks: register(r, "ranks", None, "Ranks that the job has", Gauges::default()),
            members: register(r, "members", None, "Ranks that have joined, and have neither left nor been lost", Gauges::default()),
            version: register(r, "version", None, "The last committed version", Gauge::default()),
            planned: register(r, "planned", Some(Unit::Bytes), "Bytes of one push, as planned", Gauge::default()),
            commits: register(r, "commits", None, "Committed versions", Counter::default()),
            aborts: register(r, "aborts", None, "Attempts that were aborted, by cause", Counters::default()),
            losses: register(r, "losses", None, "Ranks that were lost", Counters::default()),
            regroups: register(r, "regroups", None, "Times that everybody joined again", Counter::default()),
            refused: register(r, "refused_connections", None, "Connections that were not let in, by reason", Counters::default()),
            push_seconds: register(r, "push", Some(Unit::Seconds), "Seconds from the moment that all trainers had begun to the commit", histogram()),
        }
    }
}

/// Counts what the controller of a job reports.
pub struct ControllerMetrics {
    families: Families,
    joined: BTreeSet<Rank>,
}

impl Metrics {
    /// The metrics of a controller of this job: give it every [`Report`].
    pub fn controller(&self, world: World) -> ControllerMetrics {
        let families = self.0.controller.get_or_init(|| Families::register(&mut self.registry())).clone();
        for (side, ranks) in [("trainer", world.trainers), ("inference", world.inference)] {
            let of = OfSide { side };
            families.ranks.get_or_create(&of).set(ranks.into());
            drop(families.members.get_or_create_owned(&of));
            drop(families.losses.get_or_create_owned(&of));
        }
        let causes = Cause::ALL.map(Cause::name).map(|reason| OfReason { reason });
        causes.iter().for_each(|cause| drop(families.aborts.get_or_create_owned(cause)));
        let reasons = Refusal::ALL.map(Refusal::name).map(|reason| OfReason { reason });
        reasons.iter().for_each(|reason| drop(families.refused.get_or_create_owned(reason)));
        ControllerMetrics { families, joined: BTreeSet::new() }
    }
}

impl ControllerMetrics {
    /// Counts one report.
    pub fn observe(&mut self, report: &Report) {
        let Self { families, joined } = self;
        match report {
            // What an earlier one has committed.
            Report::InCharge { version } => {
                families.version.set(i64::try_from(version.unwrap_or(0)).unwrap_or(i64::MAX));
            }
            Report::Joined(rank) => {
                joined.insert(*rank);
                self.count_members(*rank);
            }
            Report::Left(rank) => {
                joined.remove(rank);
                self.count_members(*rank);
            }
            Report::Lost { rank, .. } => {
                joined.remove(rank);
                families.losses.get_or_create(&side(*rank)).inc();
                self.count_members(*rank);
            }
            Report::Regrouping { .. } => drop(families.regroups.inc()),
            Report::Refused { refusal, .. } => {
                families.refused.get_or_create(&OfReason { reason: refusal.name() }).inc();
            }
            Report::Planned { bytes, .. } => {
                families.planned.set(i64::try_from(*bytes).unwrap_or(i64::MAX));
            }
            Report::Committed { version, elapsed, .. } => {
                families.version.set(i64::try_from(*version).unwrap_or(i64::MAX));
                families.commits.inc();
                families.push_seconds.observe(elapsed.as_secs_f64());
            }
            Report::Aborted { cause, .. } => {
                families.aborts.get_or_create(&OfReason { reason: cause.name() }).inc();
            }
            Report::StandingBy { .. } | Report::Started | Report::Pushing { .. } | Report::Ended { .. } => {}
        }
    }

    fn count_members(&self, of: Rank) {
        let of = side(of);
        let count = self.joined.iter().filter(|rank| side(**rank) == of).count();
        self.families.members.get_or_create(&of).set(i64::try_from(count).unwrap_or(i64::MAX));
    }
}

fn side(rank: Rank) -> OfSide {
    OfSide { side: OfRank::from(rank).side }
}
