//! What the metrics of ranks and of a controller are made of: kinds of figures, and labels.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Metric, Registry, Unit};
use xfer_plan::Rank;

/// From 1 ms to about two minutes, each twice the one before: shared memory on one host to the slowest link in use.
const BUCKETS: (f64, f64, u16) = (0.001, 2.0, 18);

/// A histogram of seconds for each set of labels.
pub(super) type Seconds<L> = Family<L, Histogram, fn() -> Histogram>;

pub(super) fn histogram() -> Histogram {
    let (start, factor, count) = BUCKETS;
    Histogram::new(exponential_buckets(start, factor, count))
}

pub(super) fn seconds<L: Clone + std::hash::Hash + Eq>() -> Seconds<L> {
    Family::new_with_constructor(histogram)
}

/// Registers a metric; a unit is added to its name, and `_total` to a counter's.
pub(super) fn register<M: Metric + Clone>(
    registry: &mut Registry,
    name: &str,
    unit: Option<Unit>,
    help: &str,
    metric: M,
) -> M {
    match unit {
        Some(unit) => registry.register_with_unit(name, help, unit, metric.clone()),
        None => registry.register(name, help, metric.clone()),
    }
    metric
}

pub(super) type Counters<L> = Family<L, Counter>;
pub(super) type Gauges<L> = Family<L, Gauge>;

/// A rank.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OfRank {
    pub(super) side: &'static str,
    pub(super) rank: u32,
}

impl From<Rank> for OfRank {
    fn from(rank: Rank) -> Self {
        match rank {
            Rank::Trainer(rank) => Self { side: "trainer", rank: rank.0 },
            Rank::Receiver(rank) => Self { side: "inference", rank: rank.0 },
        }
    }
}

/// A rank, and one thing more.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OfStage {
    #[prometheus(flatten)]
    pub(super) of: OfRank,
    pub(super) stage: String,
}

/// See [`OfStage`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OfResult {
    #[prometheus(flatten)]
    pub(super) of: OfRank,
    pub(super) result: &'static str,
}

/// See [`OfStage`]. A rail is known by its number; the name says which NIC it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OfRail {
    #[prometheus(flatten)]
    pub(super) of: OfRank,
    pub(super) rail: u32,
    pub(super) name: String,
}

/// One side of a job.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OfSide {
    pub(super) side: &'static str,
}

/// Why something was refused or aborted.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OfReason {
    pub(super) reason: &'static str,
}
