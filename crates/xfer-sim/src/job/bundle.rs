//! Operations in bundles: for large jobs, many short operations of one rank to one receiver are simulated as one.
//!
//! A model's plan has many WRITEs for each megabyte: scales, norms, slices. What they cost is kept exactly: time to post, room on
//! the wire, bytes of kernels. What is lost is how finely they interleave. Bundles are full: an operation may begin in one and
//! end in the next. A bundle of what a receiver passes on is passed on as a bundle.

use core::hash::BuildHasherDefault;
use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;

use xfer_plan::{
    BlockQuant, DType, Manifest, Op, Parts, Plan, PlanError, ReceiverRank, RegionIndex, Route, Routed,
    Strided, Transform, Way,
};

use crate::cluster::Nic;

/// What an operation of a bundled program costs, besides its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cost {
    /// WRITEs that it stands for: those that begin in it.
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

    /// Of one of its WRITEs.
    fn of_one(self) -> Cost {
        let wire_bytes = self.wire_bytes / u64::from(self.writes.max(1));
        Cost { writes: 1, wire_bytes, ..self }
    }

    /// Takes out what belongs to `part` of `whole` bytes; its WRITEs go with the first part.
    fn take(&mut self, part: u64, whole: u64) -> Cost {
        let share = |of: u64| (u128::from(of) * u128::from(part) / u128::from(whole.max(1))) as u64;
        let taken = Cost {
            writes: std::mem::take(&mut self.writes),
            wire_bytes: share(self.wire_bytes),
            kernel_bytes: share(self.kernel_bytes),
        };
        self.wire_bytes -= taken.wire_bytes;
        self.kernel_bytes -= taken.kernel_bytes;
        taken
    }

    fn add(&mut self, other: Cost) {
        self.writes = self.writes.saturating_add(other.writes);
        self.wire_bytes = self.wire_bytes.saturating_add(other.wire_bytes);
        self.kernel_bytes = self.kernel_bytes.saturating_add(other.kernel_bytes);
    }
}

/// The parts of a plan in bundles, and by trainer and operation what each costs. What is passed on from host to host stays
/// as it is: there each WRITE is posted by a thread again.
pub(super) fn bundled_parts(
    plan: &Plan,
    manifest: &Manifest,
    bytes_max: u64,
    nic: &Nic,
) -> Result<(Parts, Vec<Vec<Cost>>), PlanError> {
    let mut costs = Vec::with_capacity(manifest.trainers.len());
    let route = |way: Way| plan.group(way.0).map_or(Route::Direct, |group| group.route);
    let mut open = Open::default();
    let parts = plan.parts_with(manifest, |_, ops| {
        let (ops, own) = bundle(&ops, bytes_max, nic, route, &mut open);
        costs.push(own);
        ops
    })?;
    Ok((parts, costs))
}

/// Operations that may be bundled: to one receiver, staged or not, and passed on the same way or not at all. A bundle is dealt to
/// the rail of its first one; what is staged takes any rail, and rails that have nothing left take from others.
type Kind = (ReceiverRank, bool, Option<Way>);

/// The bundles that may grow.
type Open = HashMap<Kind, usize, BuildHasherDefault<DefaultHasher>>;

/// Bundles of up to `bytes_max`, where their first operations stood. What `open` holds is not looked at, only its room.
fn bundle(
    ops: &[Routed],
    bytes_max: u64,
    nic: &Nic,
    route: impl Fn(Way) -> Route,
    open: &mut Open,
) -> (Vec<Routed>, Vec<Cost>) {
    open.clear();
    let (mut bundles, mut costs): (Vec<Routed>, Vec<Cost>) = (Vec::new(), Vec::new());
    for Routed { op, way } in ops {
        let mut cost = Cost::of(op, nic);
        let passed_on = match route(*way) {
            Route::Direct => None,
            Route::PerHost => Some(*way),
            Route::Chain => {
                bundles.push(Routed { op: *op, way: *way });
                costs.push(cost.of_one());
                continue;
            }
        };
        let kind = (op.to, op.staged_bytes() > 0, passed_on);
        let place = open.entry(kind).or_insert(usize::MAX);
        let mut left = op.bytes();
        while left > 0 {
            let filled = bundles.get(*place).map_or(bytes_max, |bundle| bundle.op.bytes());
            let part = left.min(bytes_max.saturating_sub(filled));
            if part > 0
                && let (Some(bundle), Some(sum)) = (bundles.get_mut(*place), costs.get_mut(*place))
            {
                bundle.op = as_one(&bundle.op, filled + part);
                sum.add(cost.take(part, left));
                left -= part;
                continue;
            }
            let part = left.min(bytes_max);
            *place = bundles.len();
            bundles.push(Routed { op: as_one(op, part), way: *way });
            costs.push(cost.take(part, left));
            left -= part;
        }
    }
    bundles.shrink_to_fit();
    costs.shrink_to_fit();
    (bundles, costs)
}

/// An operation of so many bytes, staged or not, and without a place: nothing looks at what is written.
fn as_one(op: &Op, bytes: u64) -> Op {
    let place = Strided { region: RegionIndex(0), offset: 0, stride: bytes };
    // Any transform that is staged as it is long: what the kernel moves is known.
    let staged = Transform::Quantize { from: DType::BF16, quant: BlockQuant::default() };
    let transform = if op.staged_bytes() > 0 { staged } else { Transform::Copy };
    let (source, destination) = (place, place);
    Op { row_bytes: bytes as u32, rows: 1, source, destination, gather: false, transform, ..*op }
}

#[cfg(test)]
mod tests {
    use xfer_plan::{GroupIndex, ParamId};

    use super::*;
    use crate::cluster::Preset;

    fn routed(to: u32, bytes: u32, group: u32) -> Routed {
        let place = Strided { region: RegionIndex(0), offset: 0, stride: bytes.into() };
        let op = Op {
            to: ReceiverRank(to),
            param: ParamId(0),
            row_bytes: bytes,
            rows: 1,
            source: place,
            destination: place,
            gather: false,
            transform: Transform::Copy,
            rail: 0,
            wave: 0,
        };
        Routed { op, way: (GroupIndex(group), 0) }
    }

    /// The third is not passed on as the others are, the last two go along a chain.
    #[test]
    fn what_goes_the_same_way_is_bundled_and_every_byte_stays() {
        let ops = [(0, 0), (0, 0), (0, 1), (1, 0), (0, 0), (0, 0), (0, 2), (0, 3), (0, 7), (0, 7)];
        let ops: Vec<_> = ops.into_iter().map(|(to, group)| routed(to, 10, group)).collect();
        let nic = Preset::P5.cluster(1, 1).nic;
        let route = |way: Way| match way.0.0 {
            0 | 1 => Route::PerHost,
            7 => Route::Chain,
            _ => Route::Direct,
        };
        let (bundles, costs) = bundle(&ops, 25, &nic, route, &mut Open::default());
        let seen = bundles.iter().map(|bundle| (bundle.op.to.0, bundle.way.0.0, bundle.op.bytes()));
        let expected = [(0, 0, 25), (0, 1, 10), (1, 0, 10), (0, 0, 15), (0, 2, 20), (0, 7, 10), (0, 7, 10)];
        assert_eq!(seen.collect::<Vec<_>>(), expected);
        // What goes over the wire is what single operations take.
        assert_eq!(costs.iter().map(|cost| cost.wire_bytes).sum::<u64>(), 10 * nic.wire_bytes(10));
        assert_eq!(costs.iter().map(|cost| cost.writes).collect::<Vec<_>>(), [3, 1, 1, 1, 2, 1, 1]);
    }
}
