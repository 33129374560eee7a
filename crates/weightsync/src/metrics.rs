//! What this process counts of its ranks, and of the controller where it runs one, for a monitoring system to read.
//!
//! Counting never fails and never waits for anybody; nothing here decides anything. No weights and no names of tensors go
//! through here, but the page has addresses of NICs: it is for whoever may see those. `docs/observing.md` of the project lists
//! every metric.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

mod controller;
mod endpoint;
mod families;
mod rank;

pub use controller::ControllerMetrics;
pub use endpoint::MetricsEndpoint;
pub(crate) use rank::{Ended, RankMetrics};

/// The metrics of this process. Clones count into the same.
///
/// Every session counts into those of its [`crate::SessionConfig::metrics`]; ranks are told apart by the labels `side`
/// (`trainer` or `inference`) and `rank`.
#[derive(Clone)]
pub struct Metrics(Arc<Inner>);

struct Inner {
    registry: Mutex<Registry>,
    ranks: rank::Families,
    controller: OnceLock<controller::Families>,
}

impl Metrics {
    /// Metrics that nothing has counted into.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("weightsync");
        let ranks = rank::Families::register(&mut registry);
        Self(Arc::new(Inner { registry: Mutex::new(registry), ranks, controller: OnceLock::new() }))
    }

    /// All of them in the text format of OpenMetrics, which Prometheus reads.
    pub fn text(&self) -> String {
        let mut text = String::new();
        match encode(&mut text, &self.registry()) {
            Ok(()) => text,
            // A `String` takes all that is written to it.
            Err(fmt::Error) => String::new(),
        }
    }

    /// What was registered, at worst in part, by a thread that panicked.
    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.0.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn rank(&self, rank: xfer_plan::Rank) -> RankMetrics {
        RankMetrics::new(&self.0.ranks, rank)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics(..)")
    }
}

#[cfg(test)]
mod tests;
