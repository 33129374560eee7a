//! Every way in which a manifest can be wrong, with the message that a person reads.

use expect_test::{Expect, expect};
use xfer_plan::{
    DType, DestinationParam, Manifest, ParamMap, RailDecl, ReceiverManifest, RegionIndex, SourcePiece,
    TensorBox, TrainerManifest, limits, plan,
};

/// Two trainers hold a half each of `w` [4, 8]; one receiver wants all of it.
fn manifest() -> Manifest {
    let half = |rank: u64| TrainerManifest {
        host: format!("t{rank}"),
        regions: vec![32],
        rails: vec![RailDecl { bytes_per_second: 100 }],
        pieces: vec![SourcePiece {
            tensor: "w".into(),
            dtype: DType::BF16,
            shape: vec![4, 8],
            bounds: TensorBox::new(&[2 * rank, 0], &[2, 8]).unwrap(),
            region: RegionIndex(0),
            offset: 0,
        }],
    };
    let receiver = ReceiverManifest {
        host: "r0".into(),
        regions: vec![128],
        rails: vec![RailDecl { bytes_per_second: 100 }],
        params: vec![param("p", ParamMap::tensor("w"))],
    };
    Manifest { trainers: vec![half(0), half(1)], receivers: vec![receiver], ..Manifest::default() }
}

fn param(name: &str, map: ParamMap) -> DestinationParam {
    DestinationParam {
        name: name.into(),
        dtype: DType::BF16,
        shape: vec![4, 8],
        region: RegionIndex(0),
        offset: 0,
        map: map.into(),
        priority: 0,
    }
}

fn check(damage: impl FnOnce(&mut Manifest), message: Expect) {
    let mut manifest = manifest();
    plan(&manifest).expect("the manifest is good before the damage");
    damage(&mut manifest);
    message.assert_eq(&plan(&manifest).expect_err("the damage must be found").to_string());
}

fn piece(manifest: &mut Manifest) -> &mut SourcePiece {
    &mut manifest.trainers[1].pieces[0]
}

fn wanted(manifest: &mut Manifest) -> &mut DestinationParam {
    &mut manifest.receivers[0].params[0]
}

fn slice(start: &[u64], len: &[u64]) -> ParamMap {
    ParamMap::tensor("w").slice(TensorBox::new(start, len).unwrap())
}

#[test]
fn sides_that_do_not_fit() {
    check(
        |m| wanted(m).map = ParamMap::tensor("v").into(),
        expect!["inference 0, parameter `p` needs tensor `v`, which no trainer declares: check the name"],
    );
    check(
        |m| drop(m.trainers.pop()),
        expect![
            "inference 0, parameter `p` needs [2..4, 0..8] of tensor `w`, which no trainer holds: check that every shard is declared"
        ],
    );
    check(
        |m| piece(m).bounds = TensorBox::new(&[2, 1], &[2, 7]).unwrap(),
        expect![
            "inference 0, parameter `p` needs [2..4, 0..1] of tensor `w`, which no trainer holds: check that every shard is declared"
        ],
    );
    check(
        |m| wanted(m).shape = vec![8, 4],
        expect![
            "inference 0, parameter `p` is declared as [8, 4] but its map makes [4, 8]: the shapes must be equal"
        ],
    );
    check(
        |m| wanted(m).dtype = DType::F32,
        expect![
            "inference 0, parameter `p`: its map makes F32 of tensor `w` in no known way: that is BF16; cast or quantise it in the map, or declare the parameter as BF16"
        ],
    );
    check(
        |m| piece(m).dtype = DType::F16,
        expect![
            "tensor `w` is BF16 [4, 8] on trainer 0 but F16 [4, 8] on trainer 1: all trainers must declare the same global tensor"
        ],
    );
    check(
        |m| piece(m).shape = vec![4, 9],
        expect![
            "tensor `w` is BF16 [4, 8] on trainer 0 but BF16 [4, 9] on trainer 1: all trainers must declare the same global tensor"
        ],
    );
}

#[test]
fn maps_that_make_no_sense() {
    check(
        |m| wanted(m).map = slice(&[0, 1], &[4, 8]).into(),
        expect![
            "inference 0, parameter `p`: map slices [0..4, 1..9] out of something of shape [4, 8]: the box must lie inside it"
        ],
    );
    check(
        |m| wanted(m).map = slice(&[0], &[4]).into(),
        expect![
            "inference 0, parameter `p`: map slices [0..4] out of something of shape [4, 8]: the box must lie inside it"
        ],
    );
    check(
        |m| {
            wanted(m).map =
                ParamMap::tensor("w").shaped(&[3, 8]).slice(TensorBox::new(&[0, 0], &[2, 8]).unwrap()).into()
        },
        expect![
            "inference 0, parameter `p`: map is made for a shape of [3, 8], but what it is given has [4, 8]: do both sides load the same model?"
        ],
    );
    check(
        |m| wanted(m).map = ParamMap::concat(0, []).into(),
        expect!["inference 0, parameter `p`: map concatenates nothing: give at least one part"],
    );
    check(
        |m| wanted(m).map = ParamMap::concat(2, [ParamMap::tensor("w")]).into(),
        expect!["inference 0, parameter `p`: no dimension 2: there are 2, counted from 0"],
    );
    check(
        |m| wanted(m).map = ParamMap::concat(0, [ParamMap::tensor("w"), slice(&[0, 0], &[4, 7])]).into(),
        expect![
            "inference 0, parameter `p`: map concatenates [4, 7] to [4, 8] on dimension 0: all other dimensions must be equal"
        ],
    );
    let deep = |levels| (0..levels).fold(ParamMap::tensor("w"), |map, _| ParamMap::concat(0, [map]));
    check(
        |m| wanted(m).map = deep(limits::MAP_DEPTH_MAX).into(),
        expect![
            "inference 0, `p`: map is nested deeper than 16 levels: flatten its slices and concatenations"
        ],
    );
    let wide = ParamMap::concat(0, (0..limits::MAP_NODES_MAX).map(|_| slice(&[0, 0], &[0, 8])));
    check(
        |m| wanted(m).map = wide.into(),
        expect!["inference 0, `p`: map has more than 65536 nodes: split the parameter"],
    );
    let twice = (0..2).map(|_| ParamMap::tensor("far"));
    check(
        |m| {
            let shape = vec![1 << 63];
            let bounds = TensorBox::new(&[0], &[0]).unwrap();
            let tensor = "far".into();
            let far = SourcePiece { tensor, shape, bounds, dtype: DType::U8, ..piece(m).clone() };
            m.trainers[0].pieces.push(far);
            wanted(m).dtype = DType::U8;
            wanted(m).map = ParamMap::concat(0, twice).into();
        },
        expect![
            "inference 0, parameter `p`: index range from 9223372036854775808 of length 9223372036854775808 overflows 64 bits"
        ],
    );
}

#[test]
fn memory_that_does_not_hold_it() {
    check(
        |m| piece(m).region = RegionIndex(1),
        expect!["trainer 1, `w`: there is no region 1, only 1 region(s) are declared"],
    );
    check(
        |m| piece(m).offset = 1,
        expect!["trainer 1, `w`: 32 bytes at offset 1 do not fit into region 0 of 32 bytes"],
    );
    check(
        |m| piece(m).offset = u64::MAX,
        expect![
            "trainer 1, `w`: 32 bytes at offset 18446744073709551615 do not fit into region 0 of 32 bytes"
        ],
    );
    check(
        |m| wanted(m).offset = 65,
        expect!["inference 0, `p`: 64 bytes at offset 65 do not fit into region 0 of 128 bytes"],
    );
    check(
        |m| piece(m).bounds = TensorBox::new(&[3, 0], &[2, 8]).unwrap(),
        expect!["trainer 1, tensor `w`: box [3..5, 0..8] is not inside its shape [4, 8]"],
    );
    check(
        |m| piece(m).bounds = TensorBox::new(&[3], &[1]).unwrap(),
        expect!["trainer 1, tensor `w`: box [3..4] is not inside its shape [4, 8]"],
    );
    check(
        |m| piece(m).shape = vec![1 << 32, 1 << 32],
        expect![
            "trainer 1, `w`: shape [4294967296, 4294967296] of BF16 has more bytes than 64 bits can count"
        ],
    );
    check(
        |m| wanted(m).shape = vec![1 << 32, 1 << 31],
        expect![
            "inference 0, `p`: shape [4294967296, 2147483648] of BF16 has more bytes than 64 bits can count"
        ],
    );
    check(
        |m| m.receivers[0].params.push(param("p", ParamMap::tensor("w"))),
        expect!["inference 0 declares parameter `p` twice: names must be unique on a rank"],
    );
    check(
        |m| m.receivers[0].params.push(DestinationParam { offset: 63, ..param("q", ParamMap::tensor("w")) }),
        expect!["inference 0: parameters `p` and `q` overlap in region 0: declare shared memory once"],
    );
}

#[test]
fn limits_are_kept() {
    check(
        |m| piece(m).tensor = "x".repeat(1025),
        expect![
            "trainer 1: a tensor name of 1025 bytes, `xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...`: names have 1 to 1024"
        ],
    );
    check(
        |m| piece(m).tensor.clear(),
        expect!["trainer 1: a tensor name of 0 bytes, ``: names have 1 to 1024"],
    );
    check(
        |m| wanted(m).name.clear(),
        expect!["inference 0: a parameter name of 0 bytes, ``: names have 1 to 1024"],
    );
    check(
        |m| wanted(m).map = ParamMap::tensor("").into(),
        expect!["inference 0: a tensor name of 0 bytes, ``: names have 1 to 1024"],
    );
    check(
        |m| m.receivers[0].host = "x".repeat(2000),
        expect![
            "inference 0: a host name of 2000 bytes, `xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...`: names have 1 to 1024"
        ],
    );
    check(
        |m| piece(m).shape = vec![1; 9],
        expect!["trainer 1, `w`: more than 8 dimensions: merge some, row-major bytes do not change"],
    );
    check(
        |m| m.trainers[0].rails.clear(),
        expect!["trainer 0 declares no rail: give it at least one, with its bytes a second"],
    );
    check(
        |m| m.trainers[0].rails[0].bytes_per_second = 0,
        expect!["trainer 0, rail 0: 0 bytes a second is not a bandwidth; state what the NIC moves"],
    );
    check(
        |m| m.trainers[0].rails = vec![RailDecl { bytes_per_second: u64::MAX }; 2],
        expect![
            "trainer 0, rail 1: 18446744073709551615 bytes a second is not a bandwidth; state what the NIC moves"
        ],
    );
    check(
        |m| m.trainers[0].rails = vec![RailDecl { bytes_per_second: 1 }; 65],
        expect!["trainer 0 declares 65 rails: at most 64 are supported"],
    );
    check(
        |m| m.trainers[0].regions = vec![1 << 40; 17],
        expect![
            "trainer 0 declares more than 17592186044416 bytes of registered memory: check its region lengths"
        ],
    );
    check(
        |m| m.trainers[0].regions = vec![u64::MAX; 2],
        expect![
            "trainer 0 declares more than 17592186044416 bytes of registered memory: check its region lengths"
        ],
    );
    check(
        |m| m.trainers[0].regions.resize(limits::REGIONS_MAX + 1, 0),
        expect!["trainer 0 declares 65537 regions: at most 65536 are supported"],
    );
    check(
        |m| m.trainers.resize(limits::RANKS_MAX + 1, TrainerManifest::default()),
        expect!["65537 training ranks: at most 65536 are supported"],
    );
    check(
        |m| m.receivers.resize(limits::RANKS_MAX + 1, ReceiverManifest::default()),
        expect!["65537 inference ranks: at most 65536 are supported"],
    );
    check(
        |m| m.options.chunk_bytes_max = 0,
        expect!["option chunk_bytes_max is 0 bytes: use a multiple of 8 from 64 to 1073741824"],
    );
    check(
        |m| m.options.chunk_bytes_max = 1 << 31,
        expect!["option chunk_bytes_max is 2147483648 bytes: use a multiple of 8 from 64 to 1073741824"],
    );
    check(
        |m| m.options.gather_chunk_bytes_max = 100,
        expect!["option gather_chunk_bytes_max is 100 bytes: use a multiple of 8 from 64 to 1073741824"],
    );
}

#[test]
fn plans_that_would_be_too_large() {
    // 2 TiB in rows of one byte.
    check(
        |m| {
            let (rows, bytes) = (1u64 << 41, 1u64 << 42);
            let bounds = TensorBox::whole(&[rows, 2]).unwrap();
            let piece = SourcePiece {
                tensor: "w".into(),
                dtype: DType::U8,
                shape: vec![rows, 2],
                bounds,
                region: RegionIndex(0),
                offset: 0,
            };
            m.trainers.truncate(1);
            m.trainers[0].regions = vec![bytes];
            m.trainers[0].pieces = vec![piece];
            let column = |at| slice(&[0, at], &[rows, 1]);
            m.receivers[0].regions = vec![bytes];
            m.receivers[0].params = vec![DestinationParam {
                dtype: DType::U8,
                shape: vec![rows, 2],
                ..param("p", ParamMap::concat(1, [column(1), column(0)]))
            }];
            m.options.chunk_bytes_max = 64;
        },
        expect!["a trainer has more than 4194304 operations: raise chunk_bytes_max, or make rows longer"],
    );
}

/// A peer's bytes must not crash the decoder, however deep they claim to be nested.
#[test]
fn hostile_encodings_are_refused() {
    let refused = |text: &str, message: Expect| {
        message.assert_eq(&serde_json::from_str::<ParamMap>(text).unwrap_err().to_string());
    };
    let deep = format!(r#"[{{"tensor":"w"}}{}]"#, r#",{"slice":[]}"#.repeat(100_000));
    refused(
        &deep,
        expect![
            "map is nested deeper than 16 levels: flatten its slices and concatenations at line 1 column 224"
        ],
    );
    let wide = format!("[{}]", vec![r#"{"tensor":"w"}"#; 70_000].join(","));
    refused(&wide, expect!["map has more than 65536 nodes: split the parameter at line 1 column 983056"]);
    refused(
        "[]",
        expect!["map is not one complete expression: it must leave exactly one result at line 1 column 2"],
    );
    refused(
        r#"[{"slice":[]}]"#,
        expect!["map is not one complete expression: an operation on nothing at line 1 column 14"],
    );
    refused(
        r#"[{"tensor":"a"},{"tensor":"b"}]"#,
        expect!["map is not one complete expression: it must leave exactly one result at line 1 column 31"],
    );
    refused(
        r#"[{"tensor":"a"},{"concat":{"dim":0,"parts":2}}]"#,
        expect!["map is not one complete expression: concatenation of missing parts at line 1 column 47"],
    );
    refused(
        r#"[{"tensor":"a"},{"slice":[[18446744073709551615,1]]}]"#,
        expect!["index range from 18446744073709551615 of length 1 overflows 64 bits at line 1 column 51"],
    );
    refused(
        r#"[{"tensor":"a"},{"slice":[[0,1],[0,1],[0,1],[0,1],[0,1],[0,1],[0,1],[0,1],[0,1]]}]"#,
        expect!["more than 8 dimensions: merge some, row-major bytes do not change at line 1 column 80"],
    );
    // A length that claims far more than follows.
    let mut bytes = vec![0xff; 9];
    bytes.push(0x01);
    assert!(postcard::from_bytes::<ParamMap>(&bytes).is_err());
    assert!(postcard::from_bytes::<TensorBox>(&bytes).is_err());
    assert!(postcard::from_bytes::<Manifest>(&bytes).is_err());
}

/// The form in which maps are written down: nodes, children first.
#[test]
fn maps_read_well() {
    let map = ParamMap::concat(0, [ParamMap::tensor("q"), slice(&[2, 0], &[2, 8])]);
    expect![[r#"[{"tensor":"q"},{"tensor":"w"},{"slice":[[2,2],[0,8]]},{"concat":{"dim":0,"parts":2}}]"#]]
        .assert_eq(&serde_json::to_string(&map).unwrap());
}
