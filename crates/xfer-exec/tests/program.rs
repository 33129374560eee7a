//! What a program refuses of a plan, by name, and what it accepts.

use std::collections::BTreeMap;

use proptest::prelude::*;
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

const SCALES: Transform = Transform::Scales {
    from: DType::BF16,
    quant: BlockQuant { block: [128, 128], scales: xfer_plan::ScaleFormat::F32 },
};
const QUANTIZE: Transform = Transform::Quantize {
    from: DType::BF16,
    quant: BlockQuant { block: [128, 128], scales: xfer_plan::ScaleFormat::F32 },
};

/// By byte at the destination, the element at the source that it is made of and which byte of the result it is.
fn made_of(ops: &[Op]) -> BTreeMap<u64, (u64, u64)> {
    let mut bytes = BTreeMap::new();
    for op in ops {
        let element = op.transform.destination(DType::U8).bytes();
        for row in 0..u64::from(op.rows) {
            for byte in 0..u64::from(op.row_bytes) {
                let from = op.transform.source_bytes(byte / element * element);
                let from = op.source.offset + row * op.source.stride + from;
                let apart = if op.gather { u64::from(op.row_bytes) } else { op.destination.stride };
                let to = op.destination.offset + row * apart + byte;
                assert_eq!(bytes.insert(to, (from, byte % element)), None, "written twice");
            }
        }
    }
    bytes
}

/// As `check`, where everything is staged.
fn staged(op: Op, tags: Vec<u32>, slot_bytes: u64) -> Result<Program, ProgramError> {
    let plan = RankPlan { bytes: op.bytes(), writes: op.writes(), ops: vec![op], tags };
    let limits = RankLimits { region_bytes: vec![1 << 20], slot_bytes, transforms: true };
    let route = Route { rails: vec![RailIndex(0)], region_bytes: vec![1 << 40] };
    Program::staged(plan, BTreeMap::new(), &limits, [(ReceiverRank(0), route)].into())
}

proptest! {
    #[test]
    fn what_is_cut_to_slots_is_the_same_in_parts_that_fit(
        transform in prop::sample::select(vec![Transform::Copy, CAST, SCALES, QUANTIZE]),
        rows in 1..20_u32,
        elements in 1..40_u32,
        gaps in (0..5_u64, 0..3_u64),
        gather: bool,
        slot_bytes in 0..300_u64,
    ) {
        let element = transform.destination(DType::U8).bytes();
        let row_bytes = elements * element as u32;
        let source_stride = transform.source_bytes(row_bytes.into()) + gaps.0;
        // What is gathered lands in one piece.
        let gather = gather && rows > 1 && transform.is_copy();
        let apart = if gather { 0 } else { gaps.1 };
        let region = RegionIndex(0);
        let source = Strided { region, offset: 64, stride: source_stride };
        let destination = Strided { region, offset: 7, stride: u64::from(row_bytes) + apart };
        let op = Op { rows, row_bytes, source, destination, gather, ..op(transform) };
        let fits_an_element = slot_bytes >= element;
        match staged(op, vec![], slot_bytes) {
            Ok(program) => {
                prop_assert!(fits_an_element);
                prop_assert!(program.ops().iter().all(|part| part.bytes() <= slot_bytes), "longer than a slot");
                prop_assert_eq!(made_of(program.ops()), made_of(&[op]));
                prop_assert_eq!(program.bytes(), op.bytes());
                prop_assert_eq!(program.writes(), program.ops().iter().map(Op::writes).sum::<u64>());
                // The fewest of their kind.
                let per_row = u64::from(row_bytes).div_ceil(slot_bytes / element * element);
                let together = (slot_bytes / u64::from(row_bytes)).max(1);
                prop_assert_eq!(program.ops().len() as u64, u64::from(rows).div_ceil(together) * per_row);
            }
            Err(error) => {
                let is_size = matches!(error, ProgramError::Size { .. });
                prop_assert!(is_size && !fits_an_element, "{}", error);
            }
        }
    }
}

#[test]
fn what_its_receiver_counts_is_not_cut() {
    let silent = staged(op(Transform::Copy), vec![xfer_plan::NO_TAG], 100).unwrap();
    assert_eq!(silent.ops().len(), 4, "three rows a slot");
    assert_eq!(staged(op(Transform::Copy), vec![5], 320).unwrap().ops().len(), 1);
    let error = staged(op(Transform::Copy), vec![5], 319).unwrap_err();
    assert!(matches!(error, ProgramError::Size { bytes: 320, bytes_max: 319, .. }), "{error}");
}

#[test]
fn parts_are_bounded_before_they_are_made() {
    let one = Strided { region: RegionIndex(0), offset: 0, stride: 0 };
    let long = Op { rows: 5, row_bytes: 1 << 20, source: one, destination: one, ..op(Transform::Copy) };
    let error = staged(long, vec![], 1).unwrap_err();
    assert!(matches!(error, ProgramError::TooManyParts { slot_bytes: 1 }), "{error}");
}
