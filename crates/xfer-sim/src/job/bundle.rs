//! Operations in bundles: for large jobs, many short operations of one rank to one receiver are simulated as one.
//!
//! A model's plan has tens of WRITEs for each megabyte: scales, norms, slices. What they cost is kept exactly: time to post, room on
//! the wire, bytes of kernels. What is lost is how finely they interleave. Operations that somebody passes on stay as they are.

use std::collections::BTreeMap;

use xfer_plan::{BlockQuant, DType, NO_TAG, Op, RankPlan, ReceiverRank, RegionIndex, Strided, Transform};

use crate::cluster::Nic;

/// What an operation of a bundled program costs, besides its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cost {
    /// WRITEs that it stands for.
    pub(super) writes: u32,
    /// What it takes of a NIC's wire.
    pub(super) wire_bytes: u64,
    /// What its kernel moves in the GPU's memory.
    pub(super) kernel_bytes: u64,
}

impl Cost {
    fn of(op: &Op, nic: &Nic) -> Cost {
        let writes = op.writes().max(1);
        let wire_bytes = nic.wire_bytes(op.bytes() / writes).saturating_mul(writes);
        Cost { writes: writes as u32, wire_bytes, kernel_bytes: super::kernel_bytes(op) }
    }

    fn add(&mut self, other: Cost) {
        self.writes = self.writes.saturating_add(other.writes);
        self.wire_bytes = self.wire_bytes.saturating_add(other.wire_bytes);
        self.kernel_bytes = self.kernel_bytes.saturating_add(other.kernel_bytes);
    }
}

/// Operations go together that go to the same receiver over the same rail, and are staged or not alike.
type Key = (ReceiverRank, u8, bool);

/// The plan in bundles of up to `bytes_max`, and what each costs. A bundle stands where its first operation stood.
pub(super) fn bundle(plan: RankPlan, bytes_max: u64, nic: &Nic) -> (RankPlan, Vec<Cost>) {
    let RankPlan { ops, bytes, tags, .. } = plan;
    let mut open: BTreeMap<Key, usize> = BTreeMap::new();
    let mut bundled: Vec<Op> = Vec::new();
    let mut bundled_tags = Vec::new();
    let mut costs: Vec<Cost> = Vec::new();
    for (at, op) in ops.iter().enumerate() {
        let tag = tags.get(at).copied().unwrap_or(NO_TAG);
        let cost = Cost::of(op, nic);
        let key = (op.to, op.rail, op.staged_bytes() > 0);
        if tag == NO_TAG
            && let Some(&place) = open.get(&key)
            && let Some(known) = bundled.get_mut(place)
            && known.bytes() + op.bytes() <= bytes_max
        {
            known.row_bytes += op.bytes() as u32;
            if let Some(sum) = costs.get_mut(place) {
                sum.add(cost);
            }
            continue;
        }
        if tag == NO_TAG {
            open.insert(key, bundled.len());
        }
        bundled.push(if tag == NO_TAG { as_one(op) } else { *op });
        bundled_tags.push(tag);
        costs.push(cost);
    }
    bundled.shrink_to_fit();
    let writes = bundled.iter().map(Op::writes).sum();
    if tags.is_empty() {
        bundled_tags.clear();
    }
    (RankPlan { ops: bundled, bytes, writes, tags: bundled_tags }, costs)
}

/// An operation of so many bytes, staged or not, and without a place: nothing looks at what is written.
fn as_one(op: &Op) -> Op {
    let place = Strided { region: RegionIndex(0), offset: 0, stride: op.bytes() };
    // Any transform that is staged as it is long: what the kernel moves is known.
    let staged = Transform::Quantize { from: DType::BF16, quant: BlockQuant::default() };
    let transform = if op.staged_bytes() > 0 { staged } else { Transform::Copy };
    let (source, destination) = (place, place);
    Op { row_bytes: op.bytes() as u32, rows: 1, source, destination, gather: false, transform, ..*op }
}
