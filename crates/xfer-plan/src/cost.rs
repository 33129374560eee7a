//! The cost model: what the hardware does, in named numbers, and how long a plan takes by them.
//!
//! The model is fluid: every resource of every rank works all the time at its rate, and the push is over when the
//! busiest one is done and what it did last has passed the remaining stages. Fair sharing of a non-blocking fabric
//! reaches that. Everything is an integer, so that plans compare and hash the same everywhere.

use serde::{Deserialize, Serialize};

use crate::ids::{Rank, ReceiverRank, TrainerRank};
use crate::manifest::{PlanOptions, RailDecl, Sides, bandwidth};
use crate::route::{Loads, ReceiverLoad, TrainerLoad};

/// What the hardware of a rank does, apart from its NICs, which the manifest states per rail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CostModel {
    /// Time to post one WRITE, of a rank's posting thread, in nanoseconds.
    pub post_nanoseconds: u64,
    /// NVLink of one GPU, each way, in bytes a second.
    pub nvlink_bytes_per_second: u64,
    /// Casting and quantising, in bytes read a second. Kernels are bound by HBM, which they read once for the amax, once
    /// for the values, and write.
    pub transform_bytes_per_second: u64,
    /// Memory of one GPU, reads and writes together, in bytes a second.
    pub hbm_bytes_per_second: u64,
    /// From host memory to a GPU, in bytes a second. Only where `offloaded`.
    pub copy_engine_bytes_per_second: u64,
    /// Whether trainers keep their weights in host memory: then all that they send passes the copy engine once.
    pub offloaded: bool,
    /// From a post to the completion of an empty WRITE, in nanoseconds.
    pub latency_nanoseconds: u64,
}

impl Default for CostModel {
    /// A p5: EFA posts about 2.1 million WRITEs a second per GPU's NICs; an H100's NVLink copies 370 GB/s in one kernel
    /// (measured between two H200); HBM3 moves 3.35 TB/s, of which a two-pass kernel reads 1 TB/s of BF16; PCIe 5 copies
    /// 55 GB/s from pinned memory (measured on an H200); 20 us is an EFA WRITE with its completion.
    fn default() -> CostModel {
        CostModel {
            post_nanoseconds: 476,
            nvlink_bytes_per_second: 370_000_000_000,
            transform_bytes_per_second: 1_000_000_000_000,
            hbm_bytes_per_second: 3_350_000_000_000,
            copy_engine_bytes_per_second: 55_000_000_000,
            offloaded: false,
            latency_nanoseconds: 20_000,
        }
    }
}

/// What a rank spends its time on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)] // the names say it
pub enum Resource {
    NicOut,
    NicIn,
    Posts,
    Transforms,
    NvlinkOut,
    NvlinkIn,
    Hbm,
    CopyEngine,
}

/// A resource, how much of it is used (WRITEs for [`Resource::Posts`], else bytes), and the time for that in nanoseconds.
pub(crate) type Use = (Resource, u64, u64);

/// What a trainer spends its time on.
pub(crate) fn trainer_uses(load: &TrainerLoad, rails: &[RailDecl], cost: &CostModel) -> [Use; 5] {
    let TrainerLoad { nic_out_bytes, writes, transform_bytes, source_bytes, .. } = *load;
    let moved = |resource, bytes, rate| (resource, bytes, time(bytes, rate));
    // Transforms read twice: for the magnitudes and for the values.
    let hbm_bytes = nic_out_bytes.saturating_add(transform_bytes.saturating_mul(2));
    let copied_bytes = if cost.offloaded { source_bytes } else { 0 };
    [
        moved(Resource::NicOut, nic_out_bytes, bandwidth(rails)),
        (Resource::Posts, writes, writes.saturating_mul(cost.post_nanoseconds)),
        moved(Resource::Transforms, transform_bytes, cost.transform_bytes_per_second),
        moved(Resource::Hbm, hbm_bytes, cost.hbm_bytes_per_second),
        moved(Resource::CopyEngine, copied_bytes, cost.copy_engine_bytes_per_second),
    ]
}

/// What a receiver spends its time on.
pub(crate) fn receiver_uses(load: &ReceiverLoad, rails: &[RailDecl], cost: &CostModel) -> [Use; 5] {
    let ReceiverLoad { nic_in_bytes, nic_out_bytes, nvlink_in_bytes, nvlink_out_bytes } = *load;
    let moved = |resource, bytes, rate| (resource, bytes, time(bytes, rate));
    let into_memory = nic_in_bytes.saturating_add(nvlink_in_bytes);
    let hbm_bytes = into_memory.saturating_add(nic_out_bytes).saturating_add(nvlink_out_bytes);
    [
        moved(Resource::NicIn, nic_in_bytes, bandwidth(rails)),
        moved(Resource::NicOut, nic_out_bytes, bandwidth(rails)),
        moved(Resource::NvlinkIn, nvlink_in_bytes, cost.nvlink_bytes_per_second),
        moved(Resource::NvlinkOut, nvlink_out_bytes, cost.nvlink_bytes_per_second),
        moved(Resource::Hbm, hbm_bytes, cost.hbm_bytes_per_second),
    ]
}

impl Resource {
    /// Every resource.
    pub const ALL: [Resource; 8] = [
        Resource::NicOut,
        Resource::NicIn,
        Resource::Posts,
        Resource::Transforms,
        Resource::NvlinkOut,
        Resource::NvlinkIn,
        Resource::Hbm,
        Resource::CopyEngine,
    ];

    /// In words, as in "trainer 3 sends".
    pub fn verb(self) -> &'static str {
        match self {
            Resource::NicOut => "sends",
            Resource::NicIn => "receives",
            Resource::Posts => "posts",
            Resource::Transforms => "transforms",
            Resource::NvlinkOut => "passes on over NVLink",
            Resource::NvlinkIn => "gets over NVLink",
            Resource::Hbm => "reads and writes in its memory",
            Resource::CopyEngine => "copies from host memory",
        }
    }
}

/// How long a plan takes by the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prediction {
    /// The busiest resource's time, and the time that the last chunk takes through the stages after it.
    pub nanoseconds: u64,
    /// The busiest resource alone. `None` when nothing moves.
    pub limited_by: Option<(Rank, Resource)>,
    /// Its time.
    pub busiest_nanoseconds: u64,
}

impl Prediction {
    /// The predicted time in seconds.
    pub fn seconds(&self) -> f64 {
        self.nanoseconds as f64 / 1e9
    }

    pub(crate) fn new((trainers, receivers): Sides<'_>, options: &PlanOptions, loads: &Loads) -> Prediction {
        let cost = &options.cost;
        let mut busiest = Prediction::default();
        let mut look = |rank, uses: [Use; 5]| {
            for (resource, _, nanoseconds) in uses {
                if nanoseconds > busiest.busiest_nanoseconds {
                    busiest.limited_by = Some((rank, resource));
                    busiest.busiest_nanoseconds = nanoseconds;
                }
            }
        };
        let mut nic_least = u64::MAX;
        for ((rank, load), declared) in (0..).zip(&loads.trainers).zip(trainers) {
            look(Rank::Trainer(TrainerRank(rank)), trainer_uses(load, &declared.rails, cost));
            nic_least = nic_least.min(bandwidth(&declared.rails));
        }
        for ((rank, load), declared) in (0..).zip(&loads.receivers).zip(receivers) {
            look(Rank::Receiver(ReceiverRank(rank)), receiver_uses(load, &declared.rails, cost));
            nic_least = nic_least.min(bandwidth(&declared.rails));
        }
        if busiest.limited_by.is_some() {
            // The last chunk: transformed, over the NICs hop by hop, over NVLink.
            let chunk = options.chunk_bytes_max;
            let hop = time(chunk, nic_least).saturating_add(cost.latency_nanoseconds);
            let transforms = loads.trainers.iter().any(|load| load.transform_bytes > 0);
            let nvlink = loads.receivers.iter().any(|load| load.nvlink_in_bytes > 0);
            let transform = if transforms { time(chunk, cost.transform_bytes_per_second) } else { 0 };
            let copied = if cost.offloaded { time(chunk, cost.copy_engine_bytes_per_second) } else { 0 };
            let nvlink = if nvlink { time(chunk, cost.nvlink_bytes_per_second) } else { 0 };
            busiest.nanoseconds = busiest
                .busiest_nanoseconds
                .saturating_add(hop.saturating_mul(loads.nic_hops_max))
                .saturating_add(transform)
                .saturating_add(copied)
                .saturating_add(nvlink);
        }
        busiest
    }
}

/// Nanoseconds that `bytes` take at a rate, rounded up.
pub(crate) fn time(bytes: u64, bytes_per_second: u64) -> u64 {
    let nanoseconds = (u128::from(bytes) * 1_000_000_000).div_ceil(u128::from(bytes_per_second.max(1)));
    u64::try_from(nanoseconds).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn all_are_all_that_ranks_use() {
        let cost = CostModel::default();
        let trainer = trainer_uses(&TrainerLoad::default(), &[], &cost);
        let receiver = receiver_uses(&ReceiverLoad::default(), &[], &cost);
        let used: BTreeSet<Resource> =
            trainer.iter().chain(&receiver).map(|(resource, ..)| *resource).collect();
        assert!(used.into_iter().eq(BTreeSet::from(Resource::ALL)));
    }
}
