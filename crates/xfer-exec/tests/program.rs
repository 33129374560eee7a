//! What a program refuses of a plan, by name, and what it accepts.

use std::collections::BTreeMap;

use xfer_exec::program::Route;
use xfer_exec::{Program, ProgramError, RailIndex, RankLimits};
use xfer_plan::{BlockQuant, DType, Op, ParamId, RankPlan, ReceiverRank, RegionIndex, Strided, Transform};

/// The bytes of a region, at either end.
const BYTES: u64 = 4096;

/// Ten rows of 32 bytes to places 64 bytes apart.
fn op(transform: Transform) -> Op {
    let place = Strided { region: RegionIndex(0), offset: 0, stride: 64 };
    Op {
        to: ReceiverRank(0),
        param: ParamId(0),
        row_bytes: 32,
        rows: 10,
        source: place,
        destination: place,
        gather: false,
        transform,
        rail: 0,
        wave: 0,
    }
}

fn check(op: Op, limits: RankLimits) -> Result<Program, ProgramError> {
    let plan = RankPlan { bytes: op.bytes(), writes: op.writes(), ops: vec![op], tags: Vec::new() };
    let names = BTreeMap::from([(ParamId(0), "weight".to_owned())]);
    let route = Route { rails: vec![RailIndex(0)], region_bytes: vec![1 << 40] };
    Program::new(plan, names, &limits, [(ReceiverRank(0), route)].into())
}

fn limits() -> RankLimits {
    RankLimits { region_bytes: vec![BYTES], slot_bytes: BYTES, transforms: true }
}

const CAST: Transform = Transform::Cast { from: DType::F32, to: DType::BF16 };

#[test]
fn a_transform_is_for_ranks_that_can() {
    assert!(check(op(CAST), limits()).is_ok());
    let error = check(op(CAST), RankLimits { transforms: false, ..limits() }).unwrap_err();
    assert!(matches!(&error, ProgramError::Transform { param, .. } if param == "weight"), "{error}");
    assert!(check(op(Transform::Copy), RankLimits { transforms: false, ..limits() }).is_ok());
}

#[test]
fn what_is_transformed_fits_a_slot() {
    assert!(check(op(CAST), RankLimits { slot_bytes: 320, ..limits() }).is_ok());
    let error = check(op(CAST), RankLimits { slot_bytes: 319, ..limits() }).unwrap_err();
    assert!(matches!(error, ProgramError::Size { bytes: 320, bytes_max: 319, .. }), "{error}");
}

#[test]
fn a_source_is_as_long_as_what_is_read_of_it() {
    // The last row starts at 576: of floats it is 64 bytes, and 32 as it is.
    for (transform, bytes) in [(CAST, 640), (Transform::Copy, 608)] {
        let with = |bytes| RankLimits { region_bytes: vec![bytes], ..limits() };
        assert!(check(op(transform), with(bytes)).is_ok());
        let error = check(op(transform), with(bytes - 1)).unwrap_err();
        assert!(matches!(&error, ProgramError::Source { param, .. } if param == "weight"), "{error}");
    }
    // A table is no region.
    let scales = Transform::Scales { from: DType::F32, quant: BlockQuant::default() };
    let source = Strided { region: RegionIndex(99), offset: 1 << 50, stride: 1 << 50 };
    assert!(check(Op { source, ..op(scales) }, limits()).is_ok());
}

#[test]
fn rows_that_no_write_can_name_are_refused() {
    let one = Strided { region: RegionIndex(0), offset: 0, stride: 0 };
    let rows =
        |rows| Op { rows, row_bytes: 2, source: one, destination: Strided { stride: 4, ..one }, ..op(CAST) };
    let limits = RankLimits { slot_bytes: 1 << 30, ..limits() };
    assert!(check(rows(1 << 20), limits.clone()).is_ok());
    let error = check(rows((1 << 20) + 1), limits.clone()).unwrap_err();
    assert!(matches!(&error, ProgramError::Rows { param, .. } if param == "weight"), "{error}");
    // In one piece it is one WRITE.
    let joined = Op { destination: Strided { stride: 2, ..one }, ..rows((1 << 20) + 1) };
    assert!(check(joined, limits).is_ok());
}

#[test]
fn tags_are_for_every_operation_or_none() {
    let plan = RankPlan { ops: vec![op(Transform::Copy); 2], bytes: 640, writes: 20, tags: vec![3] };
    let error = Program::new(plan, BTreeMap::new(), &limits(), BTreeMap::new()).unwrap_err();
    assert!(matches!(error, ProgramError::Tags { tags: 1, ops: 2 }), "{error}");
}

#[test]
fn a_gather_of_more_than_one_write_is_refused() {
    let place = Strided { region: RegionIndex(0), offset: 0, stride: 1 << 31 };
    let op = Op {
        rows: 3,
        row_bytes: 1 << 31,
        source: place,
        destination: place,
        gather: true,
        ..op(Transform::Copy)
    };
    let limits = RankLimits { region_bytes: vec![1 << 33], slot_bytes: 1 << 33, transforms: false };
    let error = check(op, limits).unwrap_err();
    assert!(matches!(error, ProgramError::Size { .. }), "{error}");
}
