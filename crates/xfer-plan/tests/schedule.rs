//! What a schedule promises beyond being right: balance, order, cuts, a lower bound, and the same digest
//! everywhere.

use expect_test::expect;
use xfer_plan::{
    DType, DestinationParam, DeviceMesh, Manifest, Op, OpKind, ParamMap, Placement, Plan, PlanOptions,
    RailDecl, Rank, ReceiverManifest, ReceiverRank, RegionIndex, Relay, Resource, SourcePiece,
    TrainerManifest, TrainerRank, plan, shard_box,
};

const RAIL: RailDecl = RailDecl { bytes_per_second: 1_000_000 };

/// `trainers` ranks, each with the part of every tensor that `placements` gives it; `receivers` ranks that
/// want, of every tensor, what `map` says. All elements are single bytes.
fn manifest(
    tensors: &[(&str, &[u64])],
    mesh: &[u64],
    placements: &[Placement],
    receivers: u64,
    map: impl Fn(u64, &str, &[u64]) -> ParamMap,
) -> Manifest {
    let (dtype, region) = (DType::U8, RegionIndex(0));
    let mesh = DeviceMesh::new(mesh).unwrap();
    let trainer = |rank| {
        let mut trainer =
            TrainerManifest { host: "t".into(), rails: vec![RAIL], ..TrainerManifest::default() };
        let mut offset = 0;
        for (tensor, shape) in tensors {
            let bounds = shard_box(shape, &mesh, placements, rank).unwrap();
            let piece = SourcePiece {
                tensor: tensor.to_string(),
                dtype,
                shape: shape.to_vec(),
                bounds,
                region,
                offset,
            };
            offset += piece.bytes().unwrap();
            trainer.pieces.push(piece);
        }
        trainer.regions.push(offset);
        trainer
    };
    let receiver = |rank| {
        let mut receiver =
            ReceiverManifest { host: "r".into(), rails: vec![RAIL], ..ReceiverManifest::default() };
        let mut offset = 0;
        for (tensor, shape) in tensors {
            let map = map(rank, tensor, shape);
            let shape = map.shape(|_| Some(shape.to_vec())).unwrap();
            let (name, priority) = (tensor.to_string(), 0);
            let param = DestinationParam { name, dtype, shape, region, offset, map: map.into(), priority };
            offset += param.bytes().unwrap();
            receiver.params.push(param);
        }
        receiver.regions.push(offset);
        receiver
    };
    Manifest {
        trainers: (0..mesh.ranks()).map(trainer).collect(),
        receivers: (0..receivers).map(receiver).collect(),
        options: PlanOptions { chunk_bytes_max: 1024, ..PlanOptions::default() },
    }
}

fn whole(_: u64, tensor: &str, _: &[u64]) -> ParamMap {
    ParamMap::tensor(tensor)
}

fn checked(manifest: &Manifest) -> Plan {
    let plan = plan(manifest).unwrap();
    plan.check(manifest).unwrap();
    plan
}

/// The operations of one trainer.
fn part(plan: &Plan, manifest: &Manifest, trainer: u32) -> Vec<Op> {
    plan.part(TrainerRank(trainer), manifest).unwrap().ops
}

/// The operations of all trainers.
fn ops(plan: &Plan, manifest: &Manifest) -> Vec<Op> {
    (0..plan.trainers.len() as u32).flat_map(|trainer| part(plan, manifest, trainer)).collect()
}

#[test]
fn the_digest_is_the_same_everywhere() {
    let columns =
        |rank, tensor: &str, shape: &[u64]| ParamMap::tensor(tensor).shard(shape, 1, 2, rank).unwrap();
    let manifest = manifest(
        &[("a", &[7, 6]), ("b", &[4, 4])],
        &[2, 2],
        &[Placement::Replicate, Placement::Shard(0)],
        2,
        columns,
    );
    let plan = checked(&manifest);
    expect![[r#"
        de05a65e1195c8faf4a43b58e560adeba109c4ccf8f78b9cf6a922b370ae4ade
        plan 9696890cf4ace4faf09d617ffbf317ae10a7846d21df30a8f5e998768ad7a25c: 4 trainer(s) to 2 inference rank(s), 2 parameter name(s)
          moves 58 B in 8 transfers to 2 group(s), 8 WRITEs of trainers
          egress  from 13 B to 16 B a rank
          ingress from 29 B to 29 B a rank
          lower bound 0.029 ms: inference 0 receives 29 B at 1.00 MB/s; predicted 1.073 ms"#]].assert_eq(&format!("{}\n{}", plan.manifest_digest, plan));
    // The whole plan, as a person reads it.
    let lines = (0..4).flat_map(|rank| part(&plan, &manifest, rank).into_iter().map(move |op| (rank, op)));
    let lines: Vec<String> = lines
        .map(|(rank, op)| {
            format!(
                "trainer {rank} -> {} {} {:?}: {} x {} B, {}+{} -> {}+{}",
                op.to,
                plan.name(op.param),
                op.kind(),
                op.rows,
                op.row_bytes,
                op.source.offset,
                op.source.stride,
                op.destination.offset,
                op.destination.stride,
            )
        })
        .collect();
    expect![[r#"
        trainer 0 -> inference 0 a Gather: 4 x 3 B, 0+6 -> 0+3
        trainer 0 -> inference 1 b Gather: 2 x 2 B, 26+4 -> 21+2
        trainer 1 -> inference 0 a Gather: 3 x 3 B, 0+6 -> 12+3
        trainer 1 -> inference 1 b Gather: 2 x 2 B, 20+4 -> 25+2
        trainer 2 -> inference 1 a Gather: 4 x 3 B, 3+6 -> 0+3
        trainer 2 -> inference 0 b Gather: 2 x 2 B, 24+4 -> 21+2
        trainer 3 -> inference 1 a Gather: 3 x 3 B, 3+6 -> 12+3
        trainer 3 -> inference 0 b Gather: 2 x 2 B, 18+4 -> 25+2"#]]
    .assert_eq(&lines.join("\n"));
    let text = serde_json::to_string(&manifest).unwrap();
    assert_eq!(checked(&serde_json::from_str(&text).unwrap()), plan);
    let mut other = manifest.clone();
    other.trainers[0].host.push('x');
    assert_ne!(checked(&other).digest, plan.digest, "the digest covers the manifest too");
}

#[test]
fn no_two_trainers_feed_one_receiver() {
    // 4 trainers own a quarter each, 4 receivers want all of it: at every step each receiver has one sender.
    let manifest = manifest(&[("w", &[16, 1024])], &[4], &[Placement::Shard(0)], 4, whole);
    let plan = checked(&manifest);
    let parts: Vec<Vec<Op>> = (0..4).map(|rank| part(&plan, &manifest, rank)).collect();
    assert!(parts.iter().all(|ops| ops.len() == 16));
    for step in 0..16 {
        let mut fed: Vec<ReceiverRank> = parts.iter().map(|ops| ops[step].to).collect();
        fed.sort();
        assert_eq!(fed, [0, 1, 2, 3].map(ReceiverRank), "step {step}");
    }
}

#[test]
fn trainers_start_at_different_receivers() {
    let starts = |trainers: u64, receivers| {
        let manifest = manifest(&[("w", &[64, 8])], &[trainers], &[Placement::Shard(0)], receivers, whole);
        let plan = checked(&manifest);
        (0..trainers as u32).map(|rank| part(&plan, &manifest, rank)[0].to.0).collect::<Vec<_>>()
    };
    assert_eq!(starts(2, 8), [0, 4]);
    assert_eq!(starts(8, 2), [0, 0, 0, 0, 1, 1, 1, 1]);
    assert_eq!(starts(3, 3), [0, 1, 2]);
}

#[test]
fn long_operations_go_first() {
    let manifest = manifest(
        &[("bias", &[1, 8]), ("w", &[3, 1000]), ("norm", &[1, 16])],
        &[1],
        &[Placement::Replicate],
        1,
        whole,
    );
    let sizes: Vec<u64> = part(&checked(&manifest), &manifest, 0).iter().map(Op::bytes).collect();
    assert_eq!(sizes, [1024, 1024, 952, 16, 8]);
}

#[test]
fn replicas_share_the_work() {
    // Everything is on all 4 trainers, in tensors of very different sizes.
    let tensors: &[(&str, &[u64])] =
        &[("huge", &[100, 4096]), ("small", &[3, 100]), ("tall", &[5000, 4]), ("bias", &[64])];
    let manifest = manifest(tensors, &[4], &[Placement::Replicate], 2, whole);
    let plan = checked(&manifest);
    let sent: Vec<u64> = plan.trainers.iter().map(|part| part.bytes).collect();
    let (least, most) = (sent.iter().min().unwrap(), sent.iter().max().unwrap());
    // Blocks have at most 16 chunks.
    assert!(most - least <= 16 * 1024, "{sent:?}");
}

#[test]
fn a_faster_trainer_sends_more() {
    let mut manifest = manifest(&[("w", &[400, 1024])], &[2], &[Placement::Replicate], 1, whole);
    manifest.trainers[1].rails = vec![RAIL; 3];
    let plan = checked(&manifest);
    let sent: Vec<u64> = plan.trainers.iter().map(|part| part.bytes).collect();
    assert!((3 * sent[0]).abs_diff(sent[1]) <= 4 * 16 * 1024, "{sent:?}");
}

#[test]
fn replicas_fill_up_around_what_is_unique() {
    // Trainer 0 alone owns `mine`; both own `shared`, half as large: trainer 1 sends all of that.
    let mut manifest =
        manifest(&[("mine", &[8, 1024]), ("shared", &[4, 1024])], &[2], &[Placement::Replicate], 1, whole);
    manifest.trainers[1].pieces.remove(0);
    let sent: Vec<u64> = checked(&manifest).trainers.iter().map(|part| part.bytes).collect();
    assert_eq!(sent, [8192, 4096]);
}

#[test]
fn tails_are_kept() {
    for len in [1, 1023, 1024, 1025, 16_384, 16_385] {
        let manifest = manifest(&[("w", &[len])], &[1], &[Placement::Replicate], 1, whole);
        let plan = checked(&manifest);
        let ops = ops(&plan, &manifest);
        assert_eq!(ops.iter().map(Op::bytes).sum::<u64>(), len);
        assert_eq!(ops.len() as u64, len.div_ceil(1024));
    }
}

#[test]
fn the_shape_of_an_operation_follows_the_rows() {
    let half =
        |rank: u64, tensor: &str, shape: &[u64]| ParamMap::tensor(tensor).shard(shape, 1, 2, rank).unwrap();
    let kinds = |row: u64, gather_row_bytes_max, gather_chunk_bytes_max| {
        let mut manifest = manifest(&[("w", &[64, 2 * row])], &[1], &[Placement::Replicate], 2, half);
        manifest.options.gather_row_bytes_max = gather_row_bytes_max;
        manifest.options.gather_chunk_bytes_max = gather_chunk_bytes_max;
        let plan = checked(&manifest);
        let kinds: Vec<OpKind> = ops(&plan, &manifest).iter().map(Op::kind).collect();
        assert!(kinds.iter().all(|kind| *kind == kinds[0]));
        (kinds[0], kinds.len(), ops_writes(&plan, &manifest))
    };
    // 2 x 64 rows of 32 bytes; 32 rows fit into a chunk.
    assert_eq!(kinds(32, 33, 1 << 20), (OpKind::Gather, 4, 4));
    assert_eq!(kinds(32, 33, 512), (OpKind::Gather, 8, 8));
    assert_eq!(kinds(32, 32, 1 << 20), (OpKind::Rows, 4, 128));
    assert_eq!(kinds(32, 0, 1 << 20), (OpKind::Rows, 4, 128));
    // Two rows do not fit into staging: nothing is gathered, and nothing is cut for its sake.
    assert_eq!(kinds(600, 1 << 20, 512), (OpKind::Direct, 128, 128));
    // Rows of a chunk and more are written one by one; staging would gain nothing.
    assert_eq!(kinds(1024, 1 << 20, 1 << 20), (OpKind::Direct, 128, 128));
    assert_eq!(kinds(1500, 1 << 20, 1 << 20), (OpKind::Direct, 256, 256));
}

fn ops_writes(plan: &Plan, manifest: &Manifest) -> u64 {
    let writes = ops(plan, manifest).iter().map(Op::writes).sum();
    assert_eq!(plan.trainers.iter().map(|part| part.writes).sum::<u64>(), writes);
    assert_eq!(plan.receivers.iter().map(|part| part.writes).sum::<u64>(), writes);
    writes
}

#[test]
fn neighbours_are_joined_within_a_parameter() {
    // Eight experts, one after the other at the source, stacked at the destination: one run of 800 bytes.
    let names: Vec<String> = (0..8).map(|expert| format!("e{expert}")).collect();
    let tensors: Vec<(&str, &[u64])> = names.iter().map(|name| (name.as_str(), &[10, 10][..])).collect();
    let mut manifest = manifest(&tensors, &[1], &[Placement::Replicate], 1, whole);
    assert_eq!(ops(&checked(&manifest), &manifest).len(), 8, "not across parameters");
    let param = &mut manifest.receivers[0].params;
    param.truncate(1);
    param[0].map = ParamMap::concat(0, names.iter().map(ParamMap::tensor)).into();
    param[0].shape = vec![80, 10];
    assert_eq!(ops(&checked(&manifest), &manifest).len(), 1);
}

#[test]
fn the_bound_names_who_limits() {
    let bound = |trainers: u64, receivers| {
        let manifest = manifest(&[("w", &[100, 10])], &[trainers], &[Placement::Shard(0)], receivers, whole);
        let bound = checked(&manifest).bound;
        (bound.limited_by, bound.bytes, bound.seconds())
    };
    let trainer = (Rank::Trainer(TrainerRank(0)), Resource::NicOut);
    let receiver = |rank| (Rank::Receiver(ReceiverRank(rank)), Resource::NicIn);
    assert_eq!(bound(1, 4), (Some(trainer), 4000, 0.004));
    assert_eq!(bound(4, 1), (Some(receiver(0)), 1000, 0.001));
    let mut slow = manifest(&[("w", &[100, 10])], &[4], &[Placement::Shard(0)], 4, whole);
    slow.receivers[2].rails[0].bytes_per_second = 1000;
    assert_eq!(checked(&slow).bound.limited_by, Some(receiver(2)));
    assert_eq!(checked(&slow).bound.seconds(), 1.0);
}

#[test]
fn nothing_to_move_is_a_plan() {
    for manifest in [
        Manifest::default(),
        manifest(&[], &[3], &[Placement::Replicate], 2, whole),
        manifest(&[("empty", &[0, 5])], &[3], &[Placement::Shard(0)], 2, whole),
        manifest(&[("w", &[4, 5])], &[3], &[Placement::Shard(0)], 0, whole),
    ] {
        let plan = checked(&manifest);
        assert!(ops(&plan, &manifest).is_empty());
        assert_eq!((plan.bound.limited_by, plan.bound.seconds()), (None, 0.0));
        assert!(plan.to_string().ends_with("nothing moves"), "{plan}");
    }
}

/// Tens of thousands of shards of one tensor must not nest as deep.
#[test]
fn many_shards_of_one_tensor() {
    let manifest = manifest(&[("w", &[16_384, 1])], &[16_384], &[Placement::Shard(0)], 1, whole);
    let plan = checked(&manifest);
    assert_eq!(plan.receivers[0].arrivals.len(), 16_384);
}

/// 2 hosts of 4 receivers that all want everything.
fn replicated(relay: Relay) -> (Manifest, Plan) {
    let mut manifest = manifest(&[("w", &[4096, 64])], &[4], &[Placement::Shard(0)], 8, whole);
    for (rank, receiver) in manifest.receivers.iter_mut().enumerate() {
        receiver.host = format!("r{}", rank / 4);
    }
    manifest.options.relay = relay;
    let plan = checked(&manifest);
    (manifest, plan)
}

#[test]
fn relays_send_each_byte_once_per_host_or_once() {
    let bytes = 4096 * 64;
    let sent = |relay| {
        let (manifest, plan) = replicated(relay);
        let loads = plan.loads(&manifest.options);
        let out: u64 = loads.trainers.iter().map(|load| load.nic_out_bytes).sum();
        let onward: u64 = loads.receivers.iter().map(|load| load.nic_out_bytes).sum();
        let nvlink: u64 = loads.receivers.iter().map(|load| load.nvlink_in_bytes).sum();
        // Everybody passes on about as much as everybody else.
        let most = loads.receivers.iter().map(|load| load.nic_in_bytes).max().unwrap();
        assert!(most * 8 <= (out + onward) * 102 / 100, "{loads:?}");
        (out / bytes, onward / bytes, nvlink / bytes)
    };
    assert_eq!(sent(Relay::Never), (8, 0, 0));
    assert_eq!(sent(Relay::PerHost), (2, 0, 6));
    assert_eq!(sent(Relay::Chain), (1, 1, 6));
    // NVLink is faster than four trainers' NICs, and two hosts' NICs than theirs.
    assert_eq!(sent(Relay::Auto), (1, 1, 6));
}

/// Two replicas of two ranks each on one host, and a tensor for each trainer's half: what a rank passes on does not depend on where
/// its tensors stand in the list, nor on how unequal they are.
#[test]
fn replicas_share_tensors_of_any_size() {
    let half =
        |rank, tensor: &str, shape: &[u64]| ParamMap::tensor(tensor).shard(shape, 0, 2, rank % 2).unwrap();
    let names: Vec<String> = (0..12).map(|number| format!("w{number}")).collect();
    let shapes: Vec<[u64; 2]> =
        [1000, 2, 2, 600, 2, 400, 2, 2, 2, 500, 500, 2].map(|rows| [rows, 64]).to_vec();
    let tensors: Vec<(&str, &[u64])> =
        names.iter().map(String::as_str).zip(shapes.iter().map(<[u64; 2]>::as_slice)).collect();
    let mut manifest = manifest(&tensors, &[2], &[Placement::Shard(0)], 4, half);
    for receiver in &mut manifest.receivers {
        receiver.host = "one".into();
    }
    manifest.options.relay = Relay::PerHost;
    let loads = checked(&manifest).loads(&manifest.options).receivers;
    let all: u64 = loads.iter().map(|load| load.nic_in_bytes).sum();
    // Half of the longest tensor is what cannot be divided.
    assert!(loads.iter().all(|load| load.nic_in_bytes.abs_diff(all / 4) <= 500 * 64 / 2), "{loads:?}");
}

#[test]
fn low_priorities_go_first() {
    let mut manifest =
        manifest(&[("last", &[4, 1024]), ("first", &[4, 8])], &[1], &[Placement::Replicate], 2, whole);
    for receiver in &mut manifest.receivers {
        receiver.params[0].priority = 9;
    }
    let plan = checked(&manifest);
    let names: Vec<&str> = part(&plan, &manifest, 0).iter().map(|op| plan.name(op.param)).collect();
    assert_eq!(names[..2], ["first", "first"]);
    assert!(names[2..].iter().all(|name| *name == "last"));
}

#[test]
fn rails_share_what_a_trainer_sends() {
    let mut manifest = manifest(&[("w", &[1000, 1024])], &[2], &[Placement::Shard(0)], 3, whole);
    manifest.trainers[0].rails = vec![RAIL; 4];
    let mut by_rail = [0; 4];
    for op in part(&checked(&manifest), &manifest, 0) {
        by_rail[usize::from(op.rail)] += op.bytes();
    }
    assert_eq!(by_rail.iter().sum::<u64>(), 3 * 500 * 1024);
    assert!(by_rail.iter().all(|&bytes| bytes.abs_diff(by_rail[0]) <= 3 * 1024), "{by_rail:?}");
}

#[test]
fn waves_stay_under_the_watermark() {
    let half = |rank, tensor: &str, shape: &[u64]| ParamMap::tensor(tensor).shard(shape, 1, 2, rank).unwrap();
    let mut manifest = manifest(&[("w", &[512, 64])], &[1], &[Placement::Replicate], 2, half);
    manifest.options.watermark_bytes = 4096;
    let plan = checked(&manifest);
    let ops = part(&plan, &manifest, 0);
    assert_eq!(ops.iter().map(Op::staged_bytes).sum::<u64>(), 512 * 64);
    assert_eq!(ops.last().unwrap().wave, 512 * 64 / 4096 - 1);
}

#[test]
fn offloaded_weights_pass_the_copy_engine_once() {
    // Two receivers want everything: the copy engine loads it once, the NIC sends it twice.
    let mut manifest = manifest(&[("w", &[1000, 1000])], &[1], &[Placement::Replicate], 2, whole);
    manifest.trainers[0].rails[0].bytes_per_second = 1_000_000_000;
    for receiver in &mut manifest.receivers {
        receiver.rails[0].bytes_per_second = 1_000_000_000;
    }
    manifest.options.cost.copy_engine_bytes_per_second = 100_000_000;
    let limit = |manifest: &Manifest| {
        let plan = checked(manifest);
        (plan.predicted.limited_by.unwrap().1, plan.predicted.busiest_nanoseconds)
    };
    assert_eq!(limit(&manifest), (Resource::NicOut, 2_000_000));
    manifest.options.cost.offloaded = true;
    assert_eq!(limit(&manifest), (Resource::CopyEngine, 10_000_000));
    manifest.options.cost.offloaded = false;
    manifest.options.cost.hbm_bytes_per_second = 10_000_000;
    assert_eq!(limit(&manifest), (Resource::Hbm, 200_000_000));
}
