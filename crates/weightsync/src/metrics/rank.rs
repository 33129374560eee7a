//! What one rank counts.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use xfer_plan::Rank;

use super::families::{Counters, Gauges, OfRail, OfRank, OfResult, OfStage, Seconds, register, seconds};
use crate::report::Span;

pub(super) struct Families {
    pushes: Counters<OfResult>,
    retries: Counters<OfRank>,
    version: Gauges<OfRank>,
    torn: Gauges<OfRank>,
    bytes: Counters<OfRank>,
    refused_writes: Counters<OfRank>,
    deadlines: Counters<OfRank>,
    push_seconds: Seconds<OfRank>,
    stage_seconds: Seconds<OfStage>,
    rail_up: Gauges<OfRail>,
    rail_bytes: Counters<OfRail>,
    rail_writes: Counters<OfRail>,
}

impl Families {
    #[rustfmt::skip] // one metric a line
    pub(super) fn register(registry: &mut Registry) -> Self {
        let r = registry;
        let bytes = || Some(Unit::Bytes);
        let time = || Some(Unit::Seconds);
        Self {
            pushes: register(r, "pushes", None, "Attempts to push a version that this rank took part in, by how they ended", Counters::default()),
            retries: register(r, "retries", None, "Attempts at a version of which an earlier attempt had failed", Counters::default()),
            version: register(r, "version", None, "The last version that this rank knows to be committed", Gauges::default()),
            torn: register(r, "torn", None, "1 while the weights of an inference rank are of no version", Gauges::default()),
            bytes: register(r, "transferred", bytes(), "Bytes of committed versions that a trainer wrote, or that arrived at an inference rank", Counters::default()),
            refused_writes: register(r, "refused_writes", None, "How often a rail had no room for a WRITE (EAGAIN); it was posted again", Counters::default()),
            deadlines: register(r, "deadlines_passed", None, "Waits of this rank that ended at its deadline", Counters::default()),
            push_seconds: register(r, "push", time(), "Seconds of committed pushes, as this rank saw them", seconds()),
            stage_seconds: register(r, "stage", time(), "Seconds of each stage of committed pushes", seconds()),
            rail_up: register(r, "rail_up", None, "1 while the rail is used, 0 once it was given up", Gauges::default()),
            rail_bytes: register(r, "rail", bytes(), "Bytes that the rail delivered, in pushes that failed too", Counters::default()),
            rail_writes: register(r, "rail_writes", None, "WRITEs that the rail delivered, in pushes that failed too", Counters::default()),
        }
    }
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The version is committed.
    Committed,
    /// Something outside of this rank ended it.
    Aborted,
    /// This rank could not go on.
    Failed,
}

impl Ended {
    const ALL: [Ended; 3] = [Self::Committed, Self::Aborted, Self::Failed];

    fn name(self) -> &'static str {
        match self {
            Self::Committed => "committed",
            Self::Aborted => "aborted",
            Self::Failed => "failed",
        }
    }
}

/// The metrics of one rank.
pub(crate) struct RankMetrics {
    of: OfRank,
    pushes: Counters<OfResult>,
    pub(crate) retries: Counter,
    version: Gauge,
    torn: Gauge,
    bytes: Counter,
    pub(crate) refused_writes: Counter,
    pub(crate) deadlines: Counter,
    push_seconds: Histogram,
    stage_seconds: Seconds<OfStage>,
    rail_up: Gauges<OfRail>,
    rail_bytes: Counters<OfRail>,
    rail_writes: Counters<OfRail>,
}

impl RankMetrics {
    pub(super) fn new(families: &Families, rank: Rank) -> Self {
        let of = OfRank::from(rank);
        let metrics = Self {
            pushes: families.pushes.clone(),
            retries: families.retries.get_or_create_owned(&of),
            version: families.version.get_or_create_owned(&of),
            torn: match rank {
                Rank::Receiver(_) => families.torn.get_or_create_owned(&of),
                // A trainer's weights are always its own: not told.
                Rank::Trainer(_) => Gauge::default(),
            },
            bytes: families.bytes.get_or_create_owned(&of),
            refused_writes: families.refused_writes.get_or_create_owned(&of),
            deadlines: families.deadlines.get_or_create_owned(&of),
            push_seconds: families.push_seconds.get_or_create_owned(&of),
            stage_seconds: families.stage_seconds.clone(),
            rail_up: families.rail_up.clone(),
            rail_bytes: families.rail_bytes.clone(),
            rail_writes: families.rail_writes.clone(),
            of,
        };
        // A series that begins at 0 shows its first failure as an increase.
        for ended in Ended::ALL {
            metrics.pushes(ended);
        }
        metrics
    }

    fn pushes(&self, ended: Ended) -> Counter {
        let of = OfResult { of: self.of.clone(), result: ended.name() };
        self.pushes.get_or_create_owned(&of)
    }

    /// The version is committed, as far as this rank knows.
    pub(crate) fn knows(&self, version: u64) {
        self.version.set(i64::try_from(version).unwrap_or(i64::MAX));
    }

    /// An attempt ended, not with a commit that [`RankMetrics::committed`] tells.
    pub(crate) fn ended(&self, ended: Ended) {
        self.pushes(ended).inc();
    }

    /// The weights are of no version.
    pub(crate) fn is_torn(&self) {
        self.torn.set(1);
    }

    /// A version is committed.
    pub(crate) fn committed(&self, version: u64, bytes: u64, seconds: f64, stages: &[Span]) {
        self.pushes(Ended::Committed).inc();
        self.knows(version);
        self.torn.set(0);
        self.bytes.inc_by(bytes);
        self.push_seconds.observe(seconds);
        for stage in stages {
            let of = OfStage { of: self.of.clone(), stage: stage.name.replace(' ', "_") };
            self.stage_seconds.get_or_create(&of).observe(stage.duration_us as f64 / 1e6);
        }
    }

    /// What a rail is and did.
    pub(crate) fn rail(&self, number: usize, name: &str, up: bool, bytes: u64, writes: u64) {
        let rail = u32::try_from(number).unwrap_or(u32::MAX);
        let of = OfRail { of: self.of.clone(), rail, name: name.to_owned() };
        self.rail_up.get_or_create(&of).set(up.into());
        self.rail_bytes.get_or_create(&of).inc_by(bytes);
        self.rail_writes.get_or_create(&of).inc_by(writes);
    }
}
