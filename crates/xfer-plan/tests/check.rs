//! What `Plan::check` says about plans that were damaged on purpose.

use std::sync::Arc;

use expect_test::{Expect, expect};
use xfer_plan::{
    DType, DestinationParam, GroupIndex, Manifest, ParamId, ParamMap, Plan, PlannedParam, RailDecl,
    ReceiverManifest, ReceiverRank, RegionIndex, SourcePiece, Strided, TensorBox, TrainerManifest,
    TrainerRank, Transfer, Transform, plan,
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
        map: Arc::new(map),
        priority: 0,
    };
    let receiver = |rank| {
        let half = ParamMap::tensor("w").shard(&[4, 100], 1, 2, rank).unwrap();
        let params = vec![param("half", &[4, 50], 0, half), param("b", &[30], 200, ParamMap::tensor("b"))];
        ReceiverManifest { host: "r".into(), regions: vec![280], rails: rails.clone(), params }
    };
    let trainers = vec![trainer(vec![w(0), piece("b", &[30], &[0], &[30], 200)]), trainer(vec![w(2)])];
    Manifest { trainers, receivers: vec![receiver(0), receiver(1)], ..Manifest::default() }
}

/// The transfers of a fill: 0 is `half` for receiver 0, 1 is `b` for both, 2 is `half` for receiver 1.
fn sent(plan: &mut Plan, fill: usize) -> &mut [Transfer] {
    Arc::make_mut(&mut plan.fills[fill].transfers)
}

/// Changes the list of a fill's transfers.
fn change(plan: &mut Plan, fill: usize, by: impl FnOnce(&mut Vec<Transfer>)) {
    let mut transfers = plan.fills[fill].transfers.to_vec();
    by(&mut transfers);
    plan.fills[fill].transfers = transfers.into();
}

fn check(damage: impl FnOnce(&mut Plan), message: Expect) {
    let manifest = manifest();
    let mut plan = plan(&manifest).unwrap();
    plan.check(&manifest).expect("the plan is good before the damage");
    damage(&mut plan);
    message.assert_eq(&plan.check(&manifest).expect_err("the damage must be found").to_string());
}

#[test]
fn transfers_that_are_wrong() {
    check(
        |p| change(p, 0, |sent| _ = sent.remove(0)),
        expect!["inference 0, parameter `half`: bytes 0..100 are never written"],
    );
    check(
        |p| change(p, 2, |sent| sent.push(sent[1])),
        expect!["inference 1, parameter `half`: bytes 100..200 are written twice"],
    );
    // The tail of a row, and the last row.
    check(
        |p| sent(p, 1)[0].row_bytes -= 1,
        expect![
            "trainer 0, transfer 0 (to group 1, parameter `b`): the stride of a single row must be its length"
        ],
    );
    check(
        |p| {
            let op = &mut sent(p, 1)[0];
            op.row_bytes -= 1;
            op.source.stride -= 1;
            op.destination.stride -= 1;
        },
        expect!["inference 0, parameter `b`: bytes 29..30 are never written"],
    );
    check(
        |p| {
            let op = &mut sent(p, 0)[0];
            op.rows = 1;
            (op.source.stride, op.destination.stride) = (50, 50);
        },
        expect!["inference 0, parameter `half`: bytes 50..100 are never written"],
    );
    check(
        |p| sent(p, 0)[0].source.offset += 1,
        expect![
            "trainer 0, transfer 0 (to group 0, parameter `half`): row 0 does not read what the parameter's map asks for"
        ],
    );
    check(
        |p| sent(p, 0)[0].source.stride += 1,
        expect![
            "trainer 0, transfer 0 (to group 0, parameter `half`): row 1 does not read what the parameter's map asks for"
        ],
    );
    check(
        |p| sent(p, 0)[0].destination.offset += 1,
        expect!["inference 0, parameter `half`: bytes 0..1 are never written"],
    );
    check(
        |p| sent(p, 1)[0].destination.offset += 1,
        expect![
            "trainer 0, transfer 0 (to group 1, parameter `b`): writes outside the parameter that it names"
        ],
    );
    check(
        |p| sent(p, 1)[0].destination.offset = 250,
        expect![
            "trainer 0, transfer 0 (to group 1, parameter `b`): writes outside the parameter that it names"
        ],
    );
    check(
        |p| sent(p, 1)[0].destination.offset = 251,
        expect!["trainer 0, transfer 0 (to group 1, parameter `b`): leaves region 0 of inference 0"],
    );
    check(
        |p| sent(p, 1)[0].destination.offset = u64::MAX,
        expect!["trainer 0, transfer 0 (to group 1, parameter `b`): leaves region 0 of inference 0"],
    );
    check(
        |p| sent(p, 1)[0].source.offset = 271,
        expect!["trainer 0, transfer 0 (to group 1, parameter `b`): leaves region 0 of trainer 0"],
    );
    check(
        |p| sent(p, 1)[0].source.region = RegionIndex(7),
        expect!["trainer 0, transfer 0 (to group 1, parameter `b`): leaves region 7 of trainer 0"],
    );
    check(
        |p| p.fills[1].param = ParamId(0),
        expect!["inference 0, parameter `b`: bytes 0..30 are never written"],
    );
    check(
        |p| p.fills[1].param = ParamId(99),
        expect!["inference 0, parameter `b`: bytes 0..30 are never written"],
    );
    check(|p| p.fills[1].to = GroupIndex(9), expect!["fill 1: there is no such group"]);
    check(
        |p| p.fills.swap(0, 1),
        expect![
            "the plan says its digest is f6146dfe53f462f53ba6f54b9a90b4fa48926a262eec0f543a0b7320b58066f6 but it is f947c35f88dacd355bc6f3a048543ebdbda7d12a2e4dacce360b0a2e9f8bac5b: it was changed after planning"
        ],
    );
}

#[test]
fn transfers_that_break_the_rules() {
    check(
        |p| sent(p, 0)[0].rows = 0,
        expect!["trainer 0, transfer 0 (to group 0, parameter `half`): it moves nothing"],
    );
    check(
        |p| sent(p, 0)[0].row_bytes = 1 << 60,
        expect!["trainer 0, transfer 0 (to group 0, parameter `half`): it moves more than there is"],
    );
    check(
        |p| sent(p, 0)[0].destination.stride = 49,
        expect!["trainer 0, transfer 0 (to group 0, parameter `half`): its rows overlap"],
    );
    check(
        |p| sent(p, 0)[0].trainer = TrainerRank(9),
        expect!["fill 0: its transfers are not in the order of their trainers"],
    );
    check(|p| sent(p, 0).reverse(), expect!["fill 0: its transfers are not in the order of their trainers"]);
    check(
        |p| sent(p, 0)[0].transform = Transform::Cast { from: DType::F32, to: DType::BF16 },
        expect![
            "trainer 0, transfer 0 (to group 0, parameter `half`): row 0 does not read what the parameter's map asks for"
        ],
    );
}

#[test]
fn groups_that_are_wrong() {
    check(
        |p| p.groups[1].hosts[0].reverse(),
        expect![
            "the plan says its digest is f6146dfe53f462f53ba6f54b9a90b4fa48926a262eec0f543a0b7320b58066f6 but it is f3008e71059c84614dbc2e3eedeea2b44140246c1891d3db7bfb4eda7aa85d12: it was changed after planning"
        ],
    );
    check(
        |p| p.groups[1].hosts[0].push(ReceiverRank(1)),
        expect!["group 1: it is empty, or names a receiver twice"],
    );
    check(|p| p.groups[1].hosts.push(vec![]), expect!["group 1: its hosts are not those of the manifest"]);
    check(|p| p.groups[1].hosts[0].truncate(1), expect!["group 1: another group has the same members"]);
    check(
        |p| p.groups[1].hosts = vec![vec![ReceiverRank(0)], vec![ReceiverRank(1)]],
        expect!["group 1: it names a host twice"],
    );
    check(
        |p| p.groups[0].hosts[0][0] = ReceiverRank(2),
        expect!["group 0: its hosts are not those of the manifest"],
    );
}

#[test]
fn sums_that_are_wrong() {
    check(
        |p| p.trainers[1].bytes += 1,
        expect!["trainer 1: bytes are stated as 201 but the transfers add up to 200"],
    );
    check(
        |p| p.trainers[1].writes += 1,
        expect!["trainer 1: writes are stated as 3 but the transfers add up to 2"],
    );
    check(
        |p| p.receivers[1].bytes -= 1,
        expect!["inference 1: bytes are stated as 229 but the transfers add up to 230"],
    );
    check(
        |p| p.receivers[1].writes -= 1,
        expect!["inference 1: writes are stated as 2 but the transfers add up to 3"],
    );
    check(
        |p| p.receivers[1].arrivals.reverse(),
        expect!["inference 1: the arrivals by rank do not match the transfers"],
    );
    check(|p| p.bound.bytes -= 1, expect!["the lower bound or the prediction does not match the transfers"]);
    check(|p| p.trainers.truncate(1), expect!["the plan is for 1 training ranks, the manifest has 2"]);
    check(
        |p| p.receivers.push(p.receivers[0].clone()),
        expect!["the plan is for 3 inference ranks, the manifest has 2"],
    );
    check(
        |p| p.manifest_digest.0 = [0; 32],
        expect![
            "planned from manifest 0000000000000000000000000000000000000000000000000000000000000000, checked against 13df65f667f405f4a2900b9b90a32da9437098929c67f696adcc77693aa232a5: plan again from this manifest"
        ],
    );
    check(
        |p| p.params.push(PlannedParam { name: "another".into(), priority: 0 }),
        expect![
            "the plan says its digest is f6146dfe53f462f53ba6f54b9a90b4fa48926a262eec0f543a0b7320b58066f6 but it is f3e13fa44b1a996bd1b631b037b886b043499a678dda887365aa7230443a723a: it was changed after planning"
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
    let params = vec![DestinationParam {
        name: "p".into(),
        dtype,
        shape,
        region,
        offset,
        map: map.into(),
        priority: 0,
    }];
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

/// A transfer of contiguous rows.
fn transfer(trainer: u32, row_bytes: u64, rows: u32, source: u64, destination: u64) -> Transfer {
    let side = |offset| Strided { region: RegionIndex(0), offset, stride: row_bytes };
    let (source, destination, trainer) = (side(source), side(destination), TrainerRank(trainer));
    Transfer { trainer, rows, row_bytes, transform: Transform::Copy, source, destination }
}

/// Transfers that begin right, cover every byte once, and go on too far at the source.
#[test]
fn sources_that_go_on_too_far() {
    let wrong = |manifest: &Manifest, transfers: Vec<Transfer>, message: Expect| {
        let mut plan = plan(manifest).unwrap();
        plan.fills[0].transfers = transfers.into();
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
        vec![transfer(0, 2, 1, 0, 0), transfer(0, 8, 1, 2, 2), transfer(0, 6, 1, 12, 10)],
        expect![
            "trainer 0, transfer 1 (to group 0, parameter `p`): row 0 does not read what the parameter's map asks for"
        ],
    );
    wrong(
        &stacked(4),
        vec![transfer(0, 2, 1, 0, 0), transfer(0, 4, 4, 2, 2), transfer(0, 6, 1, 20, 18)],
        expect![
            "trainer 0, transfer 1 (to group 0, parameter `p`): row 3 does not read what the parameter's map asks for"
        ],
    );
    // Columns 2..6 are on trainer 0, columns 0..4 are wanted: as wide, but not the same.
    let pieces =
        vec![vec![piece("w", &[2, 6], &[0, 2], &[2, 4], 0)], vec![piece("w", &[2, 6], &[0, 0], &[2, 2], 0)]];
    let left = ParamMap::tensor("w").slice(TensorBox::new(&[0, 0], &[2, 4]).unwrap());
    let transfers = vec![transfer(0, 4, 1, 0, 2), transfer(0, 2, 1, 4, 6), transfer(1, 2, 1, 0, 0)];
    wrong(
        &small(pieces, &[2, 4], left),
        transfers,
        expect![
            "trainer 0, transfer 0 (to group 0, parameter `p`): row 0 does not read what the parameter's map asks for"
        ],
    );
}
