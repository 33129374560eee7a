//! What `Plan::check` says about plans that were damaged on purpose.

use expect_test::{Expect, expect};
use xfer_plan::{
    DType, DestinationParam, Manifest, Op, ParamId, ParamMap, Plan, RailDecl, ReceiverManifest, ReceiverRank,
    RegionIndex, SourcePiece, Strided, TensorBox, TrainerManifest, plan,
};

/// Two trainers hold the rows 0..2 and 2..4 of `w` [4, 100]; two receivers want its left and its right half,
/// and `b`, which trainer 0 holds, above 50 bytes that belong to nobody.
fn manifest() -> Manifest {
    let rails = vec![RailDecl { bytes_per_second: 1000 }];
    let piece = |tensor: &str, shape: &[u64], start: &[u64], len: &[u64], offset| SourcePiece {
        tensor: tensor.into(),
        dtype: DType::U8,
        shape: shape.to_vec(),
        bounds: TensorBox::new(start, len).unwrap(),
        region: RegionIndex(0),
        offset,
    };
    let w = |first: u64| piece("w", &[4, 100], &[first, 0], &[2, 100], 0);
    let trainer =
        |pieces| TrainerManifest { host: "t".into(), regions: vec![300], rails: rails.clone(), pieces };
    let param = |name: &str, shape: &[u64], offset, map| DestinationParam {
        name: name.into(),
        dtype: DType::U8,
        shape: shape.to_vec(),
        region: RegionIndex(0),
        offset,
        map,
    };
    let receiver = |rank| {
        let half = ParamMap::tensor("w").shard(&[4, 100], 1, 2, rank).unwrap();
        let params = vec![param("half", &[4, 50], 0, half), param("b", &[30], 200, ParamMap::tensor("b"))];
        ReceiverManifest { host: "r".into(), regions: vec![280], rails: rails.clone(), params }
    };
    let trainers = vec![trainer(vec![w(0), piece("b", &[30], &[0], &[30], 200)]), trainer(vec![w(2)])];
    Manifest { trainers, receivers: vec![receiver(0), receiver(1)], ..Manifest::default() }
}

fn check(damage: impl FnOnce(&mut Plan), message: Expect) {
    let manifest = manifest();
    let mut plan = plan(&manifest).unwrap();
    plan.check(&manifest).expect("the plan is good before the damage");
    damage(&mut plan);
    message.assert_eq(&plan.check(&manifest).expect_err("the damage must be found").to_string());
}

#[test]
fn operations_that_are_wrong() {
    check(
        |p| _ = p.trainers[0].ops.remove(0),
        expect!["inference 0, parameter `half`: bytes 0..100 are never written"],
    );
    check(
        |p| p.trainers[1].ops.extend_from_within(..1),
        expect!["inference 1, parameter `half`: bytes 100..200 are written twice"],
    );
    // The tail of a row, and the last row.
    check(
        |p| p.trainers[0].ops[2].row_bytes -= 1,
        expect![
            "trainer 0, operation 2 (to inference 0, parameter `b`): the stride of a single row must be its length"
        ],
    );
    check(
        |p| {
            let op = &mut p.trainers[0].ops[2];
            op.row_bytes -= 1;
            op.source.stride -= 1;
            op.destination.stride -= 1;
        },
        expect!["inference 0, parameter `b`: bytes 29..30 are never written"],
    );
    check(
        |p| {
            let op = &mut p.trainers[0].ops[0];
            (op.rows, op.gather) = (1, false);
            (op.source.stride, op.destination.stride) = (50, 50);
        },
        expect!["inference 0, parameter `half`: bytes 50..100 are never written"],
    );
    check(
        |p| p.trainers[0].ops[0].source.offset += 1,
        expect![
            "trainer 0, operation 0 (to inference 0, parameter `half`): row 0 does not read what the parameter's map asks for"
        ],
    );
    check(
        |p| p.trainers[0].ops[0].source.stride += 1,
        expect![
            "trainer 0, operation 0 (to inference 0, parameter `half`): row 1 does not read what the parameter's map asks for"
        ],
    );
    check(
        |p| p.trainers[0].ops[0].destination.offset += 1,
        expect!["inference 0, parameter `half`: bytes 0..1 are never written"],
    );
    check(
        |p| p.trainers[0].ops[2].destination.offset += 1,
        expect![
            "trainer 0, operation 2 (to inference 0, parameter `b`): writes outside the parameter that it names"
        ],
    );
    check(
        |p| p.trainers[0].ops[2].destination.offset = 250,
        expect!["inference 0, parameter `b`: bytes 0..30 are never written"],
    );
    check(
        |p| p.trainers[0].ops[2].destination.offset = 251,
        expect!["trainer 0, operation 2 (to inference 0, parameter `b`): leaves region 0 of inference 0"],
    );
    check(
        |p| p.trainers[0].ops[2].destination.offset = u64::MAX,
        expect!["trainer 0, operation 2 (to inference 0, parameter `b`): leaves region 0 of inference 0"],
    );
    check(
        |p| p.trainers[0].ops[2].source.offset = 271,
        expect!["trainer 0, operation 2 (to inference 0, parameter `b`): leaves region 0 of trainer 0"],
    );
    check(
        |p| p.trainers[0].ops[2].source.region = RegionIndex(7),
        expect!["trainer 0, operation 2 (to inference 0, parameter `b`): leaves region 7 of trainer 0"],
    );
    check(
        |p| p.trainers[0].ops[2].param = ParamId(0),
        expect![
            "trainer 0, operation 2 (to inference 0, parameter `half`): writes outside the parameter that it names"
        ],
    );
    check(
        |p| p.trainers[0].ops[2].param = ParamId(99),
        expect![
            "trainer 0, operation 2 (to inference 0, parameter `?`): writes outside the parameter that it names"
        ],
    );
    check(
        |p| p.trainers[0].ops[2].to = ReceiverRank(9),
        expect!["trainer 0, operation 2 (to inference 9, parameter `b`): there is no such receiver"],
    );
    check(
        |p| p.trainers[0].ops.swap(0, 1),
        expect![
            "the plan says its digest is 8cd0f7e84b09b4fd74a61297a82365598a500e6412a07ca3b81d8c59ba020d7a but it is a0581b8a9e694262bdf3bf000baa41d110b59dcf8b46843becee3080b90eebc5: it was changed after planning"
        ],
    );
}

#[test]
fn operations_that_break_the_rules() {
    check(
        |p| p.trainers[0].ops[0].rows = 0,
        expect!["trainer 0, operation 0 (to inference 0, parameter `half`): it moves nothing"],
    );
    check(
        |p| p.trainers[0].ops[0].row_bytes = 1 << 20,
        expect![
            "trainer 0, operation 0 (to inference 0, parameter `half`): it moves more than chunk_bytes_max"
        ],
    );
    check(
        |p| p.trainers[0].ops[0].destination.stride = 49,
        expect!["trainer 0, operation 0 (to inference 0, parameter `half`): its rows overlap"],
    );
    check(
        |p| p.trainers[0].ops[0].destination.stride = 51,
        expect![
            "trainer 0, operation 0 (to inference 0, parameter `half`): it gathers what does not land in one piece"
        ],
    );
    check(
        |p| p.trainers[0].ops[2].gather = true,
        expect![
            "trainer 0, operation 2 (to inference 0, parameter `b`): it gathers what does not land in one piece"
        ],
    );
}

#[test]
fn sums_that_are_wrong() {
    check(
        |p| p.trainers[1].bytes += 1,
        expect!["trainer 1: bytes are stated as 201 but the operations add up to 200"],
    );
    check(
        |p| p.trainers[1].writes += 1,
        expect!["trainer 1: writes are stated as 3 but the operations add up to 2"],
    );
    check(
        |p| p.receivers[1].bytes -= 1,
        expect!["inference 1: bytes are stated as 229 but the operations add up to 230"],
    );
    check(
        |p| p.receivers[1].writes -= 1,
        expect!["inference 1: writes are stated as 2 but the operations add up to 3"],
    );
    check(
        |p| p.receivers[1].arrivals.reverse(),
        expect!["inference 1: the arrivals by trainer do not match the operations"],
    );
    check(|p| p.bound.bytes -= 1, expect!["the lower bound does not match the operations"]);
    check(|p| drop(p.trainers.pop()), expect!["the plan is for 1 training ranks, the manifest has 2"]);
    check(
        |p| p.receivers.push(p.receivers[0].clone()),
        expect!["the plan is for 3 inference ranks, the manifest has 2"],
    );
    check(
        |p| p.manifest_digest.0 = [0; 32],
        expect![
            "planned from manifest 0000000000000000000000000000000000000000000000000000000000000000, checked against cbf6bb1dddeecdc8f42ebf2ee553591343707b5f0ac3a533514a838c1650cc87: plan again from this manifest"
        ],
    );
    check(
        |p| p.names.push("another".into()),
        expect![
            "the plan says its digest is 8cd0f7e84b09b4fd74a61297a82365598a500e6412a07ca3b81d8c59ba020d7a but it is 5a3281f79a168a7fe9f0fe65d2a2a66f4b4077eff5930efd7e843cccc9c262e2: it was changed after planning"
        ],
    );
}

#[test]
fn another_manifest_is_refused() {
    let plan = plan(&manifest()).unwrap();
    let mut other = manifest();
    other.receivers[0].regions[0] = 1;
    expect!["the manifest itself is invalid: inference 0, `half`: 200 bytes at offset 0 do not fit into region 0 of 1 bytes"].assert_eq(&plan.check(&other).unwrap_err().to_string());
    other = manifest();
    other.options.chunk_bytes_max = 64;
    assert!(plan.check(&other).unwrap_err().to_string().contains("plan again"));
}

/// One receiver wants one parameter of single bytes at offset 0.
fn small(pieces: Vec<Vec<SourcePiece>>, shape: &[u64], map: ParamMap) -> Manifest {
    let rails = vec![RailDecl { bytes_per_second: 1000 }];
    let trainer =
        |pieces| TrainerManifest { host: "t".into(), regions: vec![100], rails: rails.clone(), pieces };
    let (dtype, shape, region, offset) = (DType::U8, shape.to_vec(), RegionIndex(0), 0);
    let params = vec![DestinationParam { name: "p".into(), dtype, shape, region, offset, map }];
    let receiver = ReceiverManifest { host: "r".into(), regions: vec![100], rails: rails.clone(), params };
    Manifest {
        trainers: pieces.into_iter().map(trainer).collect(),
        receivers: vec![receiver],
        ..Manifest::default()
    }
}

fn piece(tensor: &str, shape: &[u64], start: &[u64], len: &[u64], offset: u64) -> SourcePiece {
    SourcePiece {
        tensor: tensor.into(),
        dtype: DType::U8,
        shape: shape.to_vec(),
        bounds: TensorBox::new(start, len).unwrap(),
        region: RegionIndex(0),
        offset,
    }
}

/// An operation of contiguous rows.
fn op(row_bytes: u32, rows: u32, source: u64, destination: u64) -> Op {
    let side = |offset| Strided { region: RegionIndex(0), offset, stride: row_bytes.into() };
    let (source, destination) = (side(source), side(destination));
    Op { to: ReceiverRank(0), param: ParamId(0), row_bytes, rows, source, destination, gather: false }
}

/// Operations that begin right, cover every byte once, and go on too far at the source.
#[test]
fn sources_that_go_on_too_far() {
    let wrong = |manifest: &Manifest, ops: Vec<Vec<Op>>, message: Expect| {
        let mut plan = plan(manifest).unwrap();
        for (part, ops) in plan.trainers.iter_mut().zip(ops) {
            part.ops = ops;
        }
        message.assert_eq(&plan.check(manifest).unwrap_err().to_string());
    };
    let stacked = |rows| {
        let pieces = vec![
            piece("a", &[rows, 4], &[0, 0], &[rows, 4], 0),
            piece("b", &[2, 4], &[0, 0], &[2, 4], 4 * rows + 2),
        ];
        let map = ParamMap::concat(0, [ParamMap::tensor("a"), ParamMap::tensor("b")]);
        small(vec![pieces], &[rows + 2, 4], map)
    };
    // From the middle of `a`, past its end, into the gap before `b`: as one row, and as the last of several.
    wrong(
        &stacked(2),
        vec![vec![op(2, 1, 0, 0), op(8, 1, 2, 2), op(6, 1, 12, 10)]],
        expect![
            "trainer 0, operation 1 (to inference 0, parameter `p`): row 0 does not read what the parameter's map asks for"
        ],
    );
    wrong(
        &stacked(4),
        vec![vec![op(2, 1, 0, 0), op(4, 4, 2, 2), op(6, 1, 20, 18)]],
        expect![
            "trainer 0, operation 1 (to inference 0, parameter `p`): row 3 does not read what the parameter's map asks for"
        ],
    );
    // Columns 2..6 are on trainer 0, columns 0..4 are wanted: as wide, but not the same.
    let pieces =
        vec![vec![piece("w", &[2, 6], &[0, 2], &[2, 4], 0)], vec![piece("w", &[2, 6], &[0, 0], &[2, 2], 0)]];
    let left = ParamMap::tensor("w").slice(TensorBox::new(&[0, 0], &[2, 4]).unwrap());
    let ops = vec![vec![op(4, 1, 0, 2), op(2, 1, 4, 6)], vec![op(2, 1, 0, 0)]];
    wrong(
        &small(pieces, &[2, 4], left),
        ops,
        expect![
            "trainer 0, operation 0 (to inference 0, parameter `p`): row 0 does not read what the parameter's map asks for"
        ],
    );
}
