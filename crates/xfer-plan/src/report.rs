//! Reports: what a plan means for the NICs, the GPUs and the clock, as facts that a person or a program can read.
//!
//! Everything follows from the plan and its manifest; nothing here decides anything. The work grows with transfers and
//! with routes, never with transfers times receivers: a large plan has a million transfers to groups of a hundred.

mod busiest;
mod exchanges;
mod flows;
mod nics;
mod staging;
mod sums;
mod timeline;

use serde::Serialize;

use crate::bound::LowerBound;
use crate::cost::Prediction;
use crate::error::{PlanError, shorten};
use crate::ids::Rank;
use crate::manifest::{Manifest, Relay};
use crate::plan::Plan;
use crate::route::{ReceiverLoad, TrainerLoad};

pub use busiest::Busy;
pub use exchanges::Exchanges;
pub use flows::{Flows, RouteUse};
pub use nics::{Bar, Distribution, Nics};
pub use staging::Staging;
pub use timeline::Step;

/// What a plan means. All times are predicted by the [cost model](crate::CostModel), none is measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlanReport {
    /// The plan's digest, in hexadecimal.
    pub plan_digest: String,
    /// The manifest's, in hexadecimal.
    pub manifest_digest: String,
    /// The trainers.
    pub trainers: TrainerSide,
    /// The receivers.
    pub receivers: ReceiverSide,
    /// What a push moves.
    pub payload: Payload,
    /// How many of what.
    pub counts: Counts,
    /// How receivers that want the same were asked to get it.
    pub relay: Relay,
    /// How they get it, the route with most bytes first.
    pub routes: Vec<RouteUse>,
    /// The time that no schedule over these routes can beat.
    pub bound: LowerBound,
    /// The same in seconds.
    pub bound_seconds: f64,
    /// How long a push takes by the cost model.
    pub predicted: Prediction,
    /// The same in seconds.
    pub predicted_seconds: f64,
    /// The ranks that need longest, the longest first; at most 5.
    pub busiest: Vec<Busy>,
    /// Trainers' memory beside their weights.
    pub staging: Staging,
    /// What trainers tell each other about blocks that their borders cut.
    pub exchanges: Exchanges,
    /// When which parameters have arrived.
    pub timeline: Vec<Step>,
    /// Who sends to whom.
    pub flows: Flows,
}

/// The trainers of a [`PlanReport`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TrainerSide {
    /// Their hosts, in the order of ranks.
    pub hosts: Vec<HostRun>,
    /// What their NICs send.
    pub sends: Nics,
    /// By trainer.
    pub loads: Vec<TrainerLoad>,
}

/// The receivers of a [`PlanReport`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReceiverSide {
    /// Their hosts, in the order of ranks.
    pub hosts: Vec<HostRun>,
    /// What arrives over their NICs.
    pub receives: Nics,
    /// What their NICs pass on to other hosts.
    pub passes_on: Nics,
    /// By receiver.
    pub loads: Vec<ReceiverLoad>,
}

/// Ranks that follow each other on one host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostRun {
    /// The host.
    pub host: String,
    /// Its first rank.
    pub first: u32,
    /// How many there are.
    pub ranks: u32,
}

/// Bytes of a push.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Payload {
    /// What must be in the receivers' memory at the end, every copy counted.
    pub arrives_bytes: u64,
    /// From trainers, over NICs.
    pub trainer_nic_bytes: u64,
    /// From receivers to other hosts, over NICs.
    pub receiver_nic_bytes: u64,
    /// Between GPUs of one host.
    pub nvlink_bytes: u64,
}

/// Numbers of a push.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Parameter names.
    pub params: u64,
    /// Sets of receivers that want the same.
    pub groups: u64,
    /// Rows from one trainer to one group.
    pub transfers: u64,
    /// What they are cut into: operations of trainers, every copy counted.
    pub operations: u64,
    /// WRITEs that trainers post.
    pub trainer_writes: u64,
    /// WRITEs by which receivers pass on.
    pub receiver_writes: u64,
}

impl PlanReport {
    /// Reports on a plan that was made from this manifest. On any other, what it says is worthless.
    ///
    /// # Errors
    /// When one trainer has more than [`OPS_MAX`](crate::limits::OPS_MAX) operations.
    pub fn new(plan: &Plan, manifest: &Manifest) -> Result<PlanReport, PlanError> {
        let loads = plan.loads(&manifest.options);
        let sums = sums::Sums::new(plan, manifest);
        let from_receivers = plan.receivers.iter().flat_map(|part| &part.arrivals);
        let from_receivers = from_receivers.filter(|arrival| matches!(arrival.from, Rank::Receiver(_)));
        let counts = Counts {
            params: plan.params.len() as u64,
            groups: plan.groups.len() as u64,
            transfers: plan.fills.iter().map(|fill| fill.transfers.len() as u64).sum(),
            operations: total(loads.trainers.iter().map(|load| load.ops)),
            trainer_writes: total(loads.trainers.iter().map(|load| load.writes)),
            receiver_writes: total(from_receivers.map(|arrival| arrival.writes)),
        };
        let payload = Payload {
            arrives_bytes: total(plan.receivers.iter().map(|part| part.bytes)),
            trainer_nic_bytes: total(loads.trainers.iter().map(|load| load.nic_out_bytes)),
            receiver_nic_bytes: total(loads.receivers.iter().map(|load| load.nic_out_bytes)),
            nvlink_bytes: total(loads.receivers.iter().map(|load| load.nvlink_in_bytes)),
        };
        let nics = nics::Traffic::new(plan, manifest, &sums);
        Ok(PlanReport {
            plan_digest: plan.digest.to_string(),
            manifest_digest: plan.manifest_digest.to_string(),
            trainers: TrainerSide {
                hosts: runs(manifest.trainers.iter().map(|trainer| trainer.host.as_str())),
                sends: Nics::new(&nics.trainers_out),
                loads: loads.trainers.clone(),
            },
            receivers: ReceiverSide {
                hosts: runs(manifest.receivers.iter().map(|receiver| receiver.host.as_str())),
                receives: Nics::new(&nics.receivers_in),
                passes_on: Nics::new(&nics.receivers_out),
                loads: loads.receivers.clone(),
            },
            payload,
            counts,
            relay: manifest.options.relay,
            routes: flows::routes(plan, &sums),
            bound: plan.bound,
            bound_seconds: plan.bound.seconds(),
            predicted: plan.predicted,
            predicted_seconds: plan.predicted.seconds(),
            busiest: busiest::busiest(manifest, &loads),
            staging: staging::Staging::new(plan, manifest, &sums)?,
            exchanges: exchanges::Exchanges::new(plan),
            timeline: timeline::timeline(plan, manifest),
            flows: Flows::new(plan, &sums),
        })
    }
}

fn total(numbers: impl Iterator<Item = u64>) -> u64 {
    numbers.fold(0, u64::saturating_add)
}

fn runs<'a>(hosts: impl Iterator<Item = &'a str>) -> Vec<HostRun> {
    let mut runs: Vec<(&str, HostRun)> = Vec::new();
    for (rank, host) in (0..).zip(hosts) {
        match runs.last_mut() {
            Some((name, run)) if *name == host => run.ranks += 1,
            _ => runs.push((host, HostRun { host: shorten(host), first: rank, ranks: 1 })),
        }
    }
    runs.into_iter().map(|(_, run)| run).collect()
}
