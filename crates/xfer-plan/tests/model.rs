//! Known models under random layouts of both sides, compared element by element with how DTensor cuts tensors and how
//! vLLM loads them; job files; and whatever must be refused.

#[path = "model/array.rs"]
mod array;
#[path = "model/small.rs"]
mod small;

use std::collections::{BTreeMap, BTreeSet};

use array::{Array, PAD, QUANTISED, SCALE, evaluate};
use proptest::prelude::*;
use serde_json::{Value, json};
use small::{Family, Place, Small, small};
use xfer_plan::model::{
    Each, End, ExpertForm, InferLayout, JobSpec, Machine, MapJob, MeshJob, ModelError, ModelJob, ModelSpec,
    ParamJob, ReceiversJob, TensorCut, TensorJob, TrainLayout, TrainersJob,
};
use xfer_plan::{
    BlockQuant, DType, DeviceMesh, Manifest, Placement, PlanOptions, ScaleFormat, TrainerManifest, plan,
    shard_box,
};

fn config() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(64);
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

fn spec(small: &Small, stacked: bool) -> ModelSpec {
    let model = ModelSpec::from_config(&small.config()).unwrap();
    if stacked { model.with_experts(ExpertForm::Stacked).unwrap() } else { model }
}

#[test]
fn presets_have_the_published_sizes() {
    let published = [
        ("kimi-k2", 61, 7168, 1026.0, 1e9),
        ("deepseek-v3", 61, 7168, 671.0, 1e9),
        ("qwen3-235b-a22b", 94, 4096, 235.0, 1e9),
        ("llama-3-70b", 80, 8192, 70.6, 1e9),
        ("qwen3-0.6b", 28, 1024, 0.6, 1e9),
    ];
    assert!(ModelSpec::preset_names().eq(published.iter().map(|preset| preset.0)));
    for (name, layers, hidden, total, unit) in published {
        let model = ModelSpec::preset(name).unwrap();
        assert_eq!((model.name(), model.layers(), model.hidden()), (name, layers, hidden));
        // Within half of the last digit that is printed.
        let digit = if total < 100.0 { 0.1 } else { 1.0 };
        let found = model.parameters() as f64 / unit;
        assert!((found - total).abs() <= digit / 2.0, "{name}: {found}");
        let elements: u64 = model.tensors().iter().map(|tensor| tensor.shape.iter().product::<u64>()).sum();
        assert_eq!(elements, model.parameters());
    }
    let error = ModelSpec::preset("gpt-2").unwrap_err().to_string();
    assert!(error.contains("`gpt-2`") && error.contains("kimi-k2"), "{error}");
}

#[test]
fn kimi_k2_is_cut_without_loss() {
    let model = ModelSpec::preset("kimi-k2").unwrap();
    let layout: TrainLayout = "fsdp=16,pp=2,ep=8".parse().unwrap();
    layout.expect_gpus(256).unwrap();
    let trainers = layout.trainers(&model, &Machine::default()).unwrap();
    let held = |trainer: &TrainerManifest| -> u64 {
        trainer.pieces.iter().map(|piece| piece.bounds.volume().unwrap()).sum()
    };
    assert_eq!(trainers.iter().map(held).sum::<u64>(), model.parameters());
    // Dense tensors are cut in 128 per stage, experts in 16 per `ep` rank.
    let bounds = |rank: usize, tensor: &str| {
        let piece = trainers[rank].pieces.iter().find(|piece| piece.tensor == tensor);
        piece.map(|piece| piece.bounds.to_string())
    };
    let o_proj = "model.layers.0.self_attn.o_proj.weight";
    assert_eq!(bounds(1, o_proj).unwrap(), "[56..112, 0..8192]");
    assert_eq!(bounds(127, o_proj).unwrap(), "[7112..7168, 0..8192]");
    assert_eq!(bounds(128, o_proj), None);
    let expert = "model.layers.31.mlp.experts.48.down_proj.weight";
    assert_eq!(bounds(128 + 17, expert).unwrap(), "[448..896, 0..2048]");
    assert_eq!(bounds(128 + 15, expert), None);
    assert_eq!((trainers[7].host.as_str(), trainers[8].host.as_str()), ("train0", "train1"));

    let layout: InferLayout = "ep=32,replicas=4".parse().unwrap();
    layout.expect_gpus(128).unwrap();
    let receivers = layout.with_fp8(BlockQuant::default()).receivers(&model, &Machine::default()).unwrap();
    let wanted: u64 = receivers[127].params.iter().map(|param| param.bytes().unwrap()).sum();
    // 31.7 GB of routed experts, 4.7 GB of vocabulary and output projection, 9.2 GB of other linear layers, 0.3 GB of
    // routers, and one four-byte scale for each of 16 384 weights.
    assert_eq!(wanted, 45_956_179_808);
    Manifest { trainers, receivers, ..Manifest::default() }.validate().unwrap();
}

// ---------------------------------------------------------------- training

#[derive(Clone, Copy, Debug)]
struct Train {
    pp: usize,
    replicas: usize,
    ep: usize,
    fsdp: usize,
    tp: usize,
}

fn train() -> impl Strategy<Value = Train> {
    let ep = prop_oneof![Just(1usize), Just(2), Just(4)];
    (1usize..4, 1usize..3, ep, 1usize..5, 1usize..4).prop_map(|(pp, replicas, ep, fsdp, tp)| Train {
        pp,
        replicas,
        ep,
        fsdp,
        tp,
    })
}

fn dtype() -> impl Strategy<Value = Option<DType>> {
    prop_oneof![Just(None), Just(Some(DType::F32)), Just(Some(DType::F16))]
}

/// The elements of a tensor that a rank holds, found one by one.
fn held(small: &Small, train: Train, rank: usize, name: &str, array: &Array) -> Vec<u64> {
    let Train { pp, ep, fsdp, tp, .. } = train;
    let (tp_rank, rest) = (rank % tp, rank / tp);
    let (fsdp_rank, rest) = (rest % fsdp, rest / fsdp);
    let (ep_rank, rest) = (rest % ep, rest / ep);
    let stage = rest / train.replicas;

    let numbers: Vec<usize> = name.split('.').filter_map(|part| part.parse().ok()).collect();
    let stage_layers: Vec<usize> =
        (0..pp).map(|stage| small.layers / pp + usize::from(stage < small.layers % pp)).collect();
    let wanted_stage = match numbers.first() {
        Some(&layer) => (0..pp).find(|&s| stage_layers[..=s].iter().sum::<usize>() > layer).unwrap(),
        None if name.starts_with("model.embed") => 0,
        None => pp - 1,
    };
    let stacked = name.ends_with("experts.gate_up_proj") || name.ends_with("experts.down_proj");
    let expert = numbers.get(1).copied();
    let each = small.experts / ep;
    if stage != wanted_stage || expert.is_some_and(|expert| expert / each != ep_rank) {
        return Vec::new();
    }
    let ends = |names: &[&str]| names.iter().any(|end| name.contains(&format!("{end}.weight")));
    let by_row = [
        "q_proj",
        "k_proj",
        "v_proj",
        "q_b_proj",
        "kv_b_proj",
        "gate_proj",
        "up_proj",
        "embed_tokens",
        "lm_head",
    ];
    let dim = if name.ends_with("experts.gate_up_proj") {
        Some(1)
    } else if name.ends_with("experts.down_proj") {
        Some(2)
    } else if ends(&["o_proj", "down_proj"]) {
        Some(1)
    } else if ends(&by_row) {
        Some(0)
    } else {
        None
    };
    let of_tp = |index: &[usize]| {
        let Some(dim) = dim else { return true };
        let halves = if name.ends_with("experts.gate_up_proj") { 2 } else { 1 };
        let half = array.shape[dim] / halves;
        index[dim] % half / half.div_ceil(tp) == tp_rank
    };
    // What this rank would hold without FSDP, then its share of the rows of that.
    let mut before = Vec::new();
    for (flat, &element) in array.data.iter().enumerate() {
        let mut index = vec![0; array.shape.len()];
        let mut rest = flat;
        for dim in (0..index.len()).rev() {
            index[dim] = rest % array.shape[dim];
            rest /= array.shape[dim];
        }
        if of_tp(&index) && !(stacked && index[0] / each != ep_rank) {
            before.push((index[0], element));
        }
    }
    let rows: BTreeSet<usize> = before.iter().map(|&(row, _)| row).collect();
    let (shards, shard) =
        if stacked || expert.is_some() { (fsdp, fsdp_rank) } else { (fsdp * ep, ep_rank * fsdp + fsdp_rank) };
    let share = rows.len().div_ceil(shards).max(1);
    let own: BTreeSet<usize> = rows.into_iter().skip(share * shard).take(share).collect();
    before.into_iter().filter(|(row, _)| own.contains(row)).map(|(_, element)| element).collect()
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn trainers_hold_what_dtensor_gives_them(small in small(), train in train(), stacked in any::<bool>(), dtype in dtype()) {
        let Train { pp, replicas, ep, fsdp, tp } = train;
        let model = spec(&small, stacked);
        let layout: TrainLayout = format!("tp={tp},fsdp={fsdp},ep={ep},dp={replicas},pp={pp}").parse().unwrap();
        let layout = TrainLayout { dtype, ..layout };
        let has_experts = (0..small.layers).any(|layer| small.is_sparse(layer));
        let fits = pp <= small.layers && (ep == 1 || has_experts && small.experts.is_multiple_of(ep));
        let trainers = match layout.trainers(&model, &Machine::default()) {
            Ok(trainers) => trainers,
            Err(error) => {
                prop_assert!(!fits, "{}", error);
                return Ok(());
            }
        };
        prop_assert!(fits);
        prop_assert_eq!(trainers.len(), pp * replicas * ep * fsdp * tp);
        let source = small.tensors(stacked);
        prop_assert!(model.tensors().iter().map(|tensor| tensor.name.as_str()).collect::<BTreeSet<_>>()
            == source.keys().map(String::as_str).collect());
        for (rank, trainer) in trainers.iter().enumerate() {
            let mut found: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
            let mut end = 0;
            for piece in &trainer.pieces {
                prop_assert!(!piece.bounds.is_empty());
                prop_assert!(piece.offset >= end && piece.offset.is_multiple_of(256));
                end = piece.offset + piece.bytes().unwrap();
                let bias = piece.tensor.ends_with("e_score_correction_bias");
                prop_assert_eq!(piece.dtype, if bias { DType::F32 } else { dtype.unwrap_or(DType::BF16) });
                let mut part = source[&piece.tensor].clone();
                prop_assert_eq!(part.shape.iter().map(|&len| len as u64).collect::<Vec<_>>(), piece.shape.clone());
                for dim in 0..piece.shape.len() {
                    let (start, len) = piece.bounds.extent(dim).unwrap();
                    part = part.narrow(dim, start as usize, len as usize);
                }
                found.entry(&piece.tensor).or_default().extend(part.data);
            }
            prop_assert_eq!(&trainer.regions, &[end]);
            for (name, array) in &source {
                let mut found = found.remove(name.as_str()).unwrap_or_default();
                found.sort_unstable();
                prop_assert_eq!(found, held(&small, train, rank, name, array), "rank {} {}", rank, name);
            }
        }
        Manifest { trainers, ..Manifest::default() }.validate().unwrap();
    }
}

#[test]
fn tensor_parallel_fsdp_is_a_strided_shard() {
    let model = ModelSpec::preset("qwen3-0.6b").unwrap();
    let layout: TrainLayout = "fsdp=3,tp=2".parse().unwrap();
    let trainers = layout.trainers(&model, &Machine::default()).unwrap();
    let mesh = DeviceMesh::new(&[3, 2]).unwrap();
    for (name, placements) in [
        (
            "model.layers.0.self_attn.q_proj.weight",
            [Placement::StridedShard { dim: 0, split: 2 }, Placement::Shard(0)],
        ),
        ("model.layers.0.mlp.down_proj.weight", [Placement::Shard(0), Placement::Shard(1)]),
        ("model.norm.weight", [Placement::Shard(0), Placement::Replicate]),
    ] {
        for (rank, trainer) in (0..).zip(&trainers) {
            let piece = trainer.pieces.iter().find(|piece| piece.tensor == name).unwrap();
            assert_eq!(piece.bounds, shard_box(&piece.shape, &mesh, &placements, rank).unwrap());
        }
    }
}

// ---------------------------------------------------------------- inference

#[derive(Clone, Debug)]
struct Infer {
    tp: usize,
    ep: usize,
    replicas: usize,
    block: Option<[usize; 2]>,
    /// Extra experts per rank, and how far the placement is rotated.
    placed: Option<(usize, usize)>,
}

fn infer() -> impl Strategy<Value = Infer> {
    let side = || prop_oneof![Just(2usize), Just(4), Just(8)];
    let any = prop_oneof![Just(1usize), Just(2), Just(3), Just(4), Just(8)];
    let factors = prop_oneof![
        3 => prop_oneof![2 => Just(1usize), 2 => Just(2), 2 => Just(4), 1 => Just(8)].prop_map(|tp| (tp, 1)),
        3 => prop_oneof![Just((1usize, 2usize)), Just((1, 4)), Just((2, 2)), Just((2, 4)), Just((4, 4)), Just((2, 8))],
        1 => (any.clone(), any),
    ];
    let block = proptest::option::of((side(), side()).prop_map(|(high, wide)| [high, wide]));
    let placed = proptest::option::weighted(0.3, (0usize..3, 0usize..9));
    let placed = (factors, placed).prop_map(|((tp, ep), placed)| {
        // Without expert parallelism it is refused: seldom is enough.
        (tp, ep, placed.filter(|&(_, turn)| ep > 1 || turn == 0))
    });
    (placed, 1usize..3, block).prop_map(|((tp, ep, placed), replicas, block)| Infer {
        tp,
        ep,
        replicas,
        block,
        placed,
    })
}

impl Infer {
    /// The experts of each `ep` rank.
    fn experts(&self, experts: usize) -> Vec<Vec<usize>> {
        let each = experts.div_ceil(self.ep);
        let (extra, turn) = self.placed.unwrap_or((0, 0));
        (0..self.ep)
            .map(|rank| {
                (0..each + extra).map(|n| (rank * each + n * (1 + turn % 2) + turn) % experts).collect()
            })
            .collect()
    }
}

/// Compares a quantised parameter and its scales: each element must lie in the block whose scale it was divided by.
fn scales_belong(
    values: &Array,
    scales: &Array,
    quant: BlockQuant,
    source: &BTreeMap<u64, (Array, u64)>,
) -> Result<(), TestCaseError> {
    let [high, wide] = quant.block.map(|side| side as usize);
    let ((rows, columns), (scale_rows, scale_columns)) = (values.matrix(), scales.matrix());
    prop_assert_eq!((rows.div_ceil(high), columns.div_ceil(wide)), (scale_rows, scale_columns));
    prop_assert_eq!(&values.shape[..values.shape.len() - 2], &scales.shape[..scales.shape.len() - 2]);
    for (flat, &value) in values.data.iter().enumerate() {
        let (matrix, row, column) = (flat / (rows * columns), flat / columns % rows, flat % columns);
        let scale = scales.data[(matrix * scale_rows + row / high) * scale_columns + column / wide];
        let element = value & !QUANTISED;
        let (_, (tensor, first)) = source.range(..=element).next_back().unwrap();
        let (tensor_rows, tensor_columns) = tensor.matrix();
        let at = (element - first) as usize;
        let (matrix, row, column) =
            (at / (tensor_rows * tensor_columns), at / tensor_columns % tensor_rows, at % tensor_columns);
        let block = (matrix * tensor_rows + row / high * high) * tensor_columns + column / wide * wide;
        prop_assert_eq!(scale, SCALE | (first + block as u64));
    }
    Ok(())
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn receivers_get_what_vllm_loads(small in small(), infer in infer(), stacked in any::<bool>()) {
        let Infer { tp, ep, replicas, block, placed } = infer;
        let model = spec(&small, stacked);
        let mut layout: InferLayout = format!("tp={tp},ep={ep},replicas={replicas}").parse().unwrap();
        let quant = block.map(|block| BlockQuant { block: block.map(|side| side as u32), scales: ScaleFormat::F32 });
        layout.fp8 = quant;
        let has_experts = (0..small.layers).any(|layer| small.is_sparse(layer));
        let experts = infer.experts(small.experts);
        if placed.is_some() {
            let list = |list: &Vec<usize>| list.iter().map(|&expert| expert as u32).collect();
            layout.experts = Some(experts.iter().map(list).collect());
        }
        let everywhere: BTreeSet<usize> = experts.iter().flatten().copied().collect();
        let expert_tp = if ep > 1 { 1 } else { tp };
        let fits = small.divides(tp, expert_tp)
            && (ep == 1 || has_experts && ep.is_multiple_of(tp))
            && (placed.is_none() && (ep == 1 || small.experts.is_multiple_of(ep))
                || placed.is_some() && ep > 1 && everywhere.len() == small.experts);
        let whole = block.is_none_or(|block| small.blocks_stay_whole(tp, expert_tp, block));
        let receivers = match layout.receivers(&model, &Machine::default()) {
            Ok(receivers) => receivers,
            Err(error) => {
                let blocks = matches!(error, ModelError::Blocks { .. });
                prop_assert!(if blocks { !whole } else { !fits }, "{}", error);
                return Ok(());
            }
        };
        prop_assert!(fits && whole);
        let ranks = if ep > 1 { ep } else { tp };
        prop_assert_eq!(receivers.len(), ranks * replicas);
        let source = small.tensors(stacked);
        let by_element = source.values().map(|array| (array.data[0], (array.clone(), array.data[0]))).collect();
        for (rank, receiver) in receivers.iter().enumerate() {
            let rank = rank % ranks;
            let place = Place {
                tp,
                tp_rank: rank % tp,
                experts: if ep > 1 { experts[rank].clone() } else { (0..small.experts).collect() },
                expert_tp: if ep > 1 { (1, 0) } else { (tp, rank) },
            };
            let mut params = BTreeMap::new();
            for param in &receiver.params {
                let made = evaluate(&param.map, &source);
                prop_assert!(made.shape.iter().map(|&len| len as u64).eq(param.shape.iter().copied()));
                prop_assert!(param.offset.is_multiple_of(256));
                let layer = param.name.split('.').find_map(|part| part.parse::<u32>().ok());
                let after = if param.name.starts_with("model.embed") { 0 } else { model.layers() + 1 };
                prop_assert_eq!(param.priority, layer.map_or(after, |layer| layer + 1));
                params.insert(param.name.clone(), (made, param.dtype));
            }
            for (name, (mut wanted, linear)) in small.loaded(&source, &place) {
                let Some((made, dtype)) = params.remove(&name) else {
                    return Err(TestCaseError::fail(format!("{name} is missing")));
                };
                let bias = name.ends_with("e_score_correction_bias");
                match quant.filter(|_| linear) {
                    None => prop_assert_eq!(dtype, if bias { DType::F32 } else { DType::BF16 }),
                    Some(quant) => {
                        prop_assert_eq!(dtype, DType::F8E4M3);
                        let Some((scales, dtype)) = params.remove(&format!("{name}_scale_inv")) else {
                            return Err(TestCaseError::fail(format!("{name} has no scales")));
                        };
                        prop_assert_eq!(dtype, DType::F32);
                        scales_belong(&made, &scales, quant, &by_element)?;
                        wanted.data.iter_mut().for_each(|element| *element |= QUANTISED);
                    }
                }
                prop_assert_eq!(made, wanted, "rank {} {}", rank, name);
            }
            prop_assert!(params.is_empty(), "too many: {:?}", params.keys());
        }
        Manifest { receivers, ..Manifest::default() }.validate().unwrap();
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn what_fits_is_planned(small in small(), train in train(), infer in infer(), dtype in dtype(), stacked in any::<bool>()) {
        let Train { pp, replicas, ep, fsdp, tp } = train;
        let layout = TrainLayout { dtype: dtype.filter(|&dtype| dtype != DType::F16), ..TrainLayout::default() };
        let [pp, replicas, ep, fsdp, tp] = [pp, replicas, ep, fsdp, tp].map(|factor| factor as u32);
        let layout = TrainLayout { pp, replicas, ep, fsdp, tp, ..layout };
        let quant = infer.block.map(|block| BlockQuant { block: block.map(|side| side as u32), ..BlockQuant::default() });
        let receiving = format!("tp={},ep={},replicas={}", infer.tp, infer.ep, infer.replicas);
        let receiving = InferLayout { fp8: quant, ..receiving.parse().unwrap() };
        let model = spec(&small, stacked);
        let sides = (layout.trainers(&model, &Machine::default()), receiving.receivers(&model, &Machine::default()));
        let (Ok(trainers), Ok(receivers)) = sides else { return Ok(()) };
        let manifest = Manifest { trainers, receivers, ..Manifest::default() };
        let plan = plan(&manifest).unwrap();
        prop_assert_eq!(plan.check(&manifest), Ok(()));
    }
}

/// The random layouts are worth something only while they reach what can go wrong.
#[test]
fn random_layouts_reach_every_case() {
    use proptest::strategy::ValueTree;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let mut reached: BTreeMap<&str, u32> = BTreeMap::new();
    for _ in 0..600 {
        let small = small().new_tree(&mut runner).unwrap().current();
        let infer = infer().new_tree(&mut runner).unwrap().current();
        let mut layout: InferLayout = format!("tp={},ep={}", infer.tp, infer.ep).parse().unwrap();
        layout.fp8 = infer
            .block
            .map(|block| BlockQuant { block: block.map(|side| side as u32), ..BlockQuant::default() });
        if infer.placed.is_some() {
            let lists = infer.experts(small.experts);
            layout.experts =
                Some(lists.iter().map(|list| list.iter().map(|&e| e as u32).collect()).collect());
        }
        let mut count = |case, yes: bool| *reached.entry(case).or_default() += u32::from(yes);
        match layout.receivers(&spec(&small, false), &Machine::default()) {
            Ok(receivers) => {
                let maps = format!("{:?}", receivers.iter().map(|r| &r.params).collect::<Vec<_>>());
                count("padded", maps.contains("Pad {"));
                count("quantised", infer.block.is_some());
                count("repeated heads", small.family != Family::DeepseekV3 && infer.tp > small.kv_heads);
                count("expert parallel", infer.ep > 1);
                count("both", infer.ep > 1 && infer.tp > 1);
                count("placed", infer.placed.is_some());
                count("latent attention", small.family == Family::DeepseekV3);
                count("cut experts", infer.ep == 1 && infer.tp > 1 && small.family == Family::Qwen3Moe);
            }
            Err(ModelError::Blocks { .. }) => count("cut blocks", true),
            Err(_) => count("refused", true),
        }
    }
    assert_eq!(reached.len(), 10, "{reached:?}");
    assert!(reached.values().all(|&count| count >= 20), "{reached:?}");
}

// ---------------------------------------------------------------- job files

const DOCS: &str = include_str!("../../../docs/job-spec.md");
const SCHEMA: &str = include_str!("../../../docs/job-spec.schema.json");

fn examples() -> Vec<&'static str> {
    DOCS.split("```json").skip(1).map(|block| block.split("```").next().unwrap()).collect()
}

#[test]
fn documented_jobs_make_manifests() {
    let jobs: Vec<JobSpec> = examples().iter().map(|text| JobSpec::from_json(text).unwrap()).collect();
    let counts: Vec<(usize, usize)> = jobs
        .iter()
        .map(|job| job.manifest().unwrap())
        .map(|manifest| (manifest.trainers.len(), manifest.receivers.len()))
        .collect();
    assert_eq!(counts, [(256, 128), (8, 8), (8, 2)]);

    // The second one, on rank 1 of the second copy.
    let manifest = jobs[1].manifest().unwrap();
    let receiver = &manifest.receivers[5];
    let param = |name: &str| receiver.params.iter().find(|param| param.name == name).unwrap();
    assert_eq!(param("embed").shape, [256, 64]);
    assert_eq!(param("layers.3.qk").shape, [20, 64]);
    assert_eq!((param("layers.3.qk").priority, param("norm").priority, param("embed").priority), (4, 5, 0));
    assert_eq!(
        param("layers.1.w13").map.tensors().unwrap(),
        [2, 3].map(|e| ["gate", "up"].map(|what| format!("layers.1.experts.{e}.{what}.weight"))).concat()
    );
    assert_eq!(
        (param("layers.1.w13").shape.as_slice(), param("layers.1.w13_scale").shape.as_slice()),
        (&[2, 64, 64][..], &[2, 2, 2][..])
    );
}

#[test]
fn a_job_in_full_says_what_a_layout_says() {
    let small = Small {
        family: Family::Qwen3Moe,
        layers: 3,
        hidden: 16,
        vocabulary: 100,
        tied: false,
        heads: 4,
        kv_heads: 2,
        head_dim: 4,
        q_lora: None,
        inner: 8,
        experts: 4,
        expert_inner: 8,
        shared: 0,
        first_dense: 0,
    };
    let model = spec(&small, false);
    let layout =
        |text: &str| text.parse::<TrainLayout>().unwrap().trainers(&model, &Machine::default()).unwrap();
    let tensor = |name: &str, shape: &[u64], cut: &str| {
        let mut ranges = json!({});
        for (variable, end) in [("layer", 3), ("expert", 4)] {
            if name.contains(&format!("{{{variable}}}")) {
                ranges[variable] = json!([0, end]);
            }
        }
        let end = if name.starts_with("model.embed") { "first" } else { "last" };
        json!({"name": name, "ranges": ranges, "dtype": "BF16", "shape": shape, "cut": cut, "end": end})
    };
    let layer = |name: &str| format!("model.layers.{{layer}}.{name}.weight");
    let tensors = json!([
        tensor("model.embed_tokens.weight", &[100, 16], "vocabulary"),
        tensor(&layer("input_layernorm"), &[16], "replicated"),
        tensor(&layer("self_attn.q_proj"), &[16, 16], "column"),
        tensor(&layer("self_attn.k_proj"), &[8, 16], "column"),
        tensor(&layer("self_attn.v_proj"), &[8, 16], "column"),
        tensor(&layer("self_attn.q_norm"), &[4], "replicated"),
        tensor(&layer("self_attn.k_norm"), &[4], "replicated"),
        tensor(&layer("self_attn.o_proj"), &[16, 16], "row"),
        tensor(&layer("post_attention_layernorm"), &[16], "replicated"),
        tensor(&layer("mlp.gate"), &[4, 16], "replicated"),
        tensor(&layer("mlp.experts.{expert}.gate_proj"), &[8, 16], "column"),
        tensor(&layer("mlp.experts.{expert}.up_proj"), &[8, 16], "column"),
        tensor(&layer("mlp.experts.{expert}.down_proj"), &[16, 8], "row"),
        tensor("model.norm.weight", &[16], "replicated"),
        tensor("lm_head.weight", &[100, 16], "vocabulary"),
    ]);
    let sharded =
        |name: &str, dim: usize| json!({"shard": {"dim": dim, "by": "gpu", "of": {"tensor": layer(name)}}});
    let parameters = json!([
        {"name": layer("self_attn.qkv_proj"), "ranges": {"layer": [0, 3]}, "dtype": "BF16", "map":
            {"concat": {"dim": 0, "parts": [sharded("self_attn.q_proj", 0), sharded("self_attn.k_proj", 0), sharded("self_attn.v_proj", 0)]}}},
        {"name": layer("self_attn.o_proj"), "ranges": {"layer": [0, 3]}, "dtype": "BF16", "map": sharded("self_attn.o_proj", 1)},
        {"name": "lm_head.weight", "end": "last", "dtype": "BF16", "map":
            {"shard": {"dim": 0, "by": "gpu", "of": {"pad": {"dim": 0, "len": 128, "of": {"tensor": "lm_head.weight"}}}}}},
        {"name": "model.layers.{layer}.mlp.experts.w2_weight", "ranges": {"layer": [0, 3]}, "dtype": "BF16", "map":
            {"view": {"shape": [4, 16, 4], "of": {"concat": {"dim": 0, "each": {"variable": "expert", "range": [0, 4]}, "parts": [
                sharded("mlp.experts.{expert}.down_proj", 1)]}}}}},
    ]);
    let job = |trainers: Value| {
        let receivers = json!({"layout": "replicas=1,gpu=2", "gpus": 2, "parameters": parameters});
        let job = json!({"model": {"tensors": tensors}, "trainers": trainers, "receivers": receivers});
        JobSpec::from_json(&job.to_string()).unwrap().manifest().unwrap()
    };
    let by_tensor = |trainer: &TrainerManifest| {
        let pieces = trainer.pieces.iter().map(|piece| (piece.tensor.clone(), piece.bounds.to_string()));
        pieces.collect::<BTreeSet<_>>()
    };
    for text in ["pp=2,ep=2,fsdp=2", "tp=2,fsdp=2,dp=2"] {
        let manifest = job(json!({"layout": text, "gpus": 8}));
        let wanted = layout(text);
        assert!(manifest.trainers.iter().map(by_tensor).eq(wanted.iter().map(by_tensor)));
    }
    let on_meshes = job(json!({"gpus": 6, "meshes": [
        {"tensors": "model.embed_tokens.weight", "mesh": [3], "placements": [{"Shard": 0}]},
        {"tensors": "model.layers.{layer}.*", "ranges": {"layer": [0, 2]}, "mesh": [3], "placements": [{"Shard": 0}]},
        {"tensors": "model.layers.{layer}.*", "ranges": {"layer": [2, 3]}, "mesh": [3], "first_rank": 3, "placements": [{"Shard": 0}]},
        {"tensors": "model.norm.*", "mesh": [3], "first_rank": 3, "placements": [{"Shard": 0}]},
        {"tensors": "lm_head*", "mesh": [3], "first_rank": 3, "placements": [{"Shard": 0}]},
    ]}));
    assert!(on_meshes.trainers.iter().map(by_tensor).eq(layout("pp=2,fsdp=3").iter().map(by_tensor)));

    let known = "tp=2".parse::<InferLayout>().unwrap().receivers(&model, &Machine::default()).unwrap();
    let source = small.tensors(false);
    for (own, known) in on_meshes.receivers.iter().zip(&known) {
        assert_eq!(own.params.len(), 10);
        for param in &own.params {
            let known = known.params.iter().find(|known| known.name == param.name).unwrap();
            assert_eq!((param.priority, &param.shape), (known.priority, &known.shape));
            assert_eq!(evaluate(&param.map, &source), evaluate(&known.map, &source), "{}", param.name);
        }
    }
    let last = evaluate(&on_meshes.receivers[1].params[6].map, &source);
    assert_eq!(last.data.iter().filter(|&&element| element == PAD).count(), 28 * 16);
}

/// A job with every key that there is. It contradicts itself, but that is not checked when it is read.
fn full_job() -> JobSpec {
    let of = || Box::new(MapJob::Tensor("a".into()));
    let quant = BlockQuant::default();
    let each = Some(Each { variable: "expert".into(), range: [0, 2], by: Some("tp".into()) });
    let maps = vec![
        MapJob::Slice { of: of(), start: vec![0], len: vec![1] },
        MapJob::Shard { of: of(), dim: 0, by: "tp".into() },
        MapJob::Pad { of: of(), dim: 0, len: 9 },
        MapJob::View { of: of(), shape: vec![1] },
        MapJob::Cast { of: of(), to: DType::F32 },
        MapJob::Quantize { of: of(), quant },
        MapJob::Scales { of: of(), quant: BlockQuant { scales: ScaleFormat::Ue8m0, ..quant } },
    ];
    let ranges = || BTreeMap::from([("layer".to_owned(), [0, 4])]);
    let machine = Machine { gpus_per_host: 1, rails_per_gpu: 1, bytes_per_second: 1 };
    JobSpec {
        model: ModelJob {
            preset: Some("kimi-k2".into()),
            config: Some(serde_json::Map::new()),
            tensors: Some(vec![TensorJob {
                name: "a".into(),
                ranges: ranges(),
                dtype: DType::BF16,
                shape: vec![8],
                cut: TensorCut::GateUp,
                stacked_experts: true,
                end: End::Last,
            }]),
            expert_form: Some(ExpertForm::Stacked),
        },
        trainers: TrainersJob {
            layout: Some("fsdp=2".into()),
            gpus: Some(2),
            meshes: Some(vec![MeshJob {
                tensors: "a*".into(),
                ranges: ranges(),
                mesh: DeviceMesh::new(&[2]).unwrap(),
                first_rank: 1,
                placements: vec![
                    Placement::Replicate,
                    Placement::Shard(1),
                    Placement::StridedShard { dim: 0, split: 2 },
                ],
            }]),
            dtype: Some(DType::F32),
            machine,
        },
        receivers: ReceiversJob {
            layout: "tp=2".into(),
            gpus: Some(2),
            fp8: Some(quant),
            experts: Some(vec![vec![0, 1]]),
            parameters: Some(vec![ParamJob {
                name: "a.{layer}".into(),
                ranges: ranges(),
                dtype: DType::F16,
                map: MapJob::Concat { dim: 0, parts: maps, each },
                end: End::Last,
            }]),
            machine,
        },
        options: PlanOptions::default(),
    }
}

/// Walks a value along the schema. Notes where in the schema each key is that it meets.
fn walk(value: &Value, at: &str, seen: &mut BTreeSet<String>, schema: &Value) {
    let here = schema.pointer(at).unwrap_or_else(|| panic!("the schema has no {at}"));
    if let Some(target) = here.get("$ref").and_then(Value::as_str) {
        return walk(value, target.trim_start_matches('#'), seen, schema);
    }
    if let Some(choices) = here.get("oneOf").and_then(Value::as_array) {
        let fits = |choice: &Value| match value {
            Value::Object(keys) => keys.keys().all(|key| !choice["properties"][key].is_null()),
            _ => choice["const"] == *value,
        };
        let chosen = choices.iter().position(fits).unwrap_or_else(|| panic!("{at}: {value}"));
        return walk(value, &format!("{at}/oneOf/{chosen}"), seen, schema);
    }
    if let Some(allowed) = here.get("enum").and_then(Value::as_array) {
        assert!(allowed.contains(value), "{at}: {value}");
    }
    match value {
        Value::Object(keys) if here.get("properties").is_some() => {
            let required = here.get("required").and_then(Value::as_array).into_iter().flatten();
            required.for_each(|key| assert!(keys.contains_key(key.as_str().unwrap()), "{at} {key}"));
            for (key, value) in keys {
                let at = format!("{at}/properties/{key}");
                walk(value, &at, seen, schema);
                seen.insert(at);
            }
        }
        Value::Object(keys) => {
            assert_eq!(here["type"], "object", "{at}");
            if !here["additionalProperties"].is_null() {
                keys.values()
                    .for_each(|value| walk(value, &format!("{at}/additionalProperties"), seen, schema));
            }
        }
        Value::Array(values) => {
            assert_eq!(here["type"], "array", "{at}");
            values.iter().for_each(|value| walk(value, &format!("{at}/items"), seen, schema));
        }
        Value::Number(_) => assert_eq!(here["type"], "integer", "{at}"),
        Value::Bool(_) => assert_eq!(here["type"], "boolean", "{at}"),
        _ => assert!(here["type"] == "string" || !here["enum"].is_null() || !here["const"].is_null(), "{at}"),
    }
}

/// Every key of every object that the schema describes.
fn described(schema: &Value, at: &str, keys: &mut BTreeSet<String>) {
    match schema {
        Value::Object(object) => {
            if let Some(properties) = object.get("properties").and_then(Value::as_object) {
                assert_eq!(object["additionalProperties"], false, "{at}");
                keys.extend(properties.keys().map(|key| format!("{at}/properties/{key}")));
            }
            object.iter().for_each(|(key, value)| described(value, &format!("{at}/{key}"), keys));
        }
        Value::Array(values) => {
            values.iter().enumerate().for_each(|(nth, value)| described(value, &format!("{at}/{nth}"), keys));
        }
        _ => {}
    }
}

#[test]
fn the_schema_has_the_keys_that_are_read() {
    let schema: Value = serde_json::from_str(SCHEMA).unwrap();
    let job = serde_json::to_value(full_job()).unwrap();
    assert_eq!(JobSpec::from_json(&job.to_string()).unwrap(), full_job());
    let mut seen = BTreeSet::new();
    walk(&job, "", &mut seen, &schema);
    let mut all = BTreeSet::new();
    described(&schema, "", &mut all);
    assert!(all.len() > 60);
    assert_eq!(seen.symmetric_difference(&all).collect::<Vec<_>>(), [""; 0]);
    for text in examples() {
        walk(&serde_json::from_str(text).unwrap(), "", &mut seen, &schema);
    }
    let presets: Vec<&str> = ModelSpec::preset_names().collect();
    assert_eq!(schema["$defs"]["model"]["properties"]["preset"]["enum"], json!(presets));
    assert_eq!(schema["$defs"]["dtype"]["enum"], serde_json::to_value(DType::ALL).unwrap());
}

#[test]
fn unknown_keys_are_refused_at_every_level() {
    /// Puts a misspelt key into the `nth` object, counted from outside to inside.
    fn misspell(value: &mut Value, nth: &mut isize) {
        match value {
            Value::Object(object) => {
                if *nth == 0 {
                    object.insert("gpu_s".to_owned(), json!(1));
                }
                *nth -= 1;
                // These are maps of the user's own names.
                let own = ["ranges", "config"];
                let inner = object.iter_mut().filter(|(key, _)| !own.contains(&key.as_str()));
                inner.for_each(|(_, value)| misspell(value, nth));
            }
            Value::Array(values) => values.iter_mut().for_each(|value| misspell(value, nth)),
            _ => {}
        }
    }
    let mut tried = 0;
    loop {
        let mut job = serde_json::to_value(full_job()).unwrap();
        let mut nth = tried;
        misspell(&mut job, &mut nth);
        if nth >= 0 {
            break;
        }
        tried += 1;
        assert!(JobSpec::from_json(&job.to_string()).is_err(), "{job}");
    }
    assert!(tried > 20, "{tried}");
}

// ---------------------------------------------------------------- bad input

fn refused(result: Result<impl Sized, ModelError>, names: &[&str]) {
    let Err(error) = result else { panic!("not refused: {names:?}") };
    let error = error.to_string();
    assert!(names.iter().all(|name| error.contains(name)), "{error} does not name {names:?}");
    assert!(error.len() < 600, "{error}");
}

#[test]
fn configs_that_are_not_understood_are_refused() {
    let llama = json!({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 100,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64});
    let deepseek = json!({"model_type": "kimi_k2", "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 100,
        "num_attention_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "intermediate_size": 64, "moe_intermediate_size": 64, "n_routed_experts": 4, "first_k_dense_replace": 1});
    ModelSpec::from_config(&llama.to_string()).unwrap();
    ModelSpec::from_config(&deepseek.to_string()).unwrap();
    let with = |base: &Value, field: &str, value: Value| {
        let mut base = base.clone();
        base[field] = value;
        ModelSpec::from_config(&base.to_string())
    };
    refused(
        with(&llama, "architectures", json!(["GPT2LMHeadModel"])),
        &["`GPT2LMHeadModel`", "LlamaForCausalLM"],
    );
    refused(with(&llama, "architectures", json!(["LlamaForCausalLM", "Other"])), &["architectures"]);
    refused(with(&llama, "architectures", Value::Null), &["`architectures` is missing"]);
    refused(with(&llama, "model_type", json!("qwen3")), &["model_type", "architectures"]);
    refused(with(&deepseek, "model_type", json!("kimi_k3")), &["`kimi_k3`"]);
    refused(with(&deepseek, "topk_method", json!("greedy")), &["topk_method", "greedy"]);
    for (field, value) in [
        ("num_hidden_layers", json!(1u64 << 40)),
        ("num_hidden_layers", json!(0)),
        ("num_hidden_layers", json!(-1)),
        ("num_hidden_layers", json!(1.5)),
        ("num_hidden_layers", json!("2")),
        ("hidden_size", json!(u64::MAX)),
        ("hidden_size", json!(63)),
        ("vocab_size", json!([1])),
        ("num_key_value_heads", json!(3)),
        ("num_attention_heads", Value::Null),
        ("intermediate_size", Value::Null),
        ("attention_bias", json!(true)),
        ("mlp_bias", json!("yes")),
        ("torch_dtype", json!("float8")),
        ("tie_word_embeddings", json!(1)),
    ] {
        refused(with(&llama, field, value), &[field]);
    }
    let expert_model = |layers: u64, experts: u64, size: u64| {
        let mut config = deepseek.clone();
        config["num_hidden_layers"] = json!(layers);
        config["n_routed_experts"] = json!(experts);
        for field in ["hidden_size", "moe_intermediate_size", "intermediate_size", "vocab_size"] {
            config[field] = json!(size);
        }
        ModelSpec::from_config(&config.to_string())
    };
    refused(expert_model(4096, 1 << 24, 64), &["tensors", "layers"]);
    refused(expert_model(2, 1 << 15, 1 << 24), &["parameters"]);
    refused(ModelSpec::from_config("{"), &["config.json", "line 1"]);
    refused(ModelSpec::from_config("[]"), &["config.json"]);
    refused(ModelSpec::from_config(&"[".repeat(100_000)), &["config.json"]);
    refused(ModelSpec::from_config(&" ".repeat(2 << 20)), &["config.json", "bytes"]);
}

#[test]
fn layouts_that_are_not_understood_are_refused() {
    let train = |text: &str| text.parse::<TrainLayout>();
    refused(train(""), &["name=number"]);
    refused(train("fsdp"), &["`fsdp`"]);
    refused(train("fsdp=0"), &["fsdp"]);
    refused(train("fsdp=1048576"), &["fsdp", "65536"]);
    refused(train("fsdp=99999999999999999999"), &["fsdp"]);
    refused(train("fsdp=1024,tp=1024"), &["65536"]);
    refused(train("fsdp=2,fsdp=2"), &["twice"]);
    refused(train("zero=2"), &["zero", "fsdp"]);
    refused(train("dp=2,hsdp=2"), &["hsdp and dp"]);
    refused("pp=2".parse::<InferLayout>(), &["pp", "replicas"]);
    let error = train("fsdp=16,pp=2").unwrap().expect_gpus(256);
    refused(error, &["32 GPU(s)", "256"]);
    refused("tp=8".parse::<InferLayout>().unwrap().expect_gpus(16), &["8 GPU(s)", "16"]);

    let preset = |name: &str| ModelSpec::preset(name).unwrap();
    let machine = Machine::default();
    let trainers = |text: &str, name: &str| train(text).unwrap().trainers(&preset(name), &machine);
    refused(trainers("pp=64", "qwen3-0.6b"), &["pp=64", "28"]);
    refused(trainers("ep=8", "llama-3-70b"), &["ep=8", "experts"]);
    refused(trainers("ep=5", "kimi-k2"), &["384 experts", "ep=5"]);
    refused(trainers("dp=65536", "kimi-k2"), &["pieces"]);
    let zero = TrainLayout { tp: 0, ..TrainLayout::default() };
    refused(zero.trainers(&preset("kimi-k2"), &machine), &["tp=0"]);

    let receivers =
        |text: &str, name: &str| text.parse::<InferLayout>().unwrap().receivers(&preset(name), &machine);
    refused(receivers("tp=6", "llama-3-70b"), &["qkv_proj", "64 attention heads", "tp=6"]);
    refused(receivers("tp=6", "qwen3-0.6b"), &["embed_tokens", "vocabulary", "tp=6"]);
    refused(receivers("ep=5", "kimi-k2"), &["experts", "384", "ep=5"]);
    refused(receivers("ep=8", "llama-3-70b"), &["ep=8", "experts"]);
    refused(receivers("tp=8,ep=4", "kimi-k2"), &["ep=4", "tp=8"]);
    refused(receivers("replicas=65536", "kimi-k2"), &["parts"]);
    let quantised = |text: &str, name: &str| {
        let layout: InferLayout = text.parse().unwrap();
        layout.with_fp8(BlockQuant::default()).receivers(&preset(name), &machine)
    };
    refused(quantised("tp=16", "qwen3-235b-a22b"), &["w13_weight", "gate_proj", "[0..96, 0..4096]"]);
    let none = InferLayout {
        fp8: Some(BlockQuant { block: [0, 1], ..BlockQuant::default() }),
        ..InferLayout::default()
    };
    refused(none.receivers(&preset("qwen3-0.6b"), &machine), &["block"]);
    for zero in [
        InferLayout { replicas: 0, ..InferLayout::default() },
        InferLayout { ep: 0, ..InferLayout::default() },
    ] {
        refused(zero.receivers(&preset("kimi-k2"), &machine), &["at least 1"]);
    }
    let many = InferLayout { tp: u32::MAX, replicas: u32::MAX, ..InferLayout::default() };
    refused(many.receivers(&preset("kimi-k2"), &machine), &["ranks"]);

    let placed = |ep: u32, lists: Vec<Vec<u32>>| {
        InferLayout { ep, ..InferLayout::default() }
            .with_experts(lists)
            .receivers(&preset("qwen3-235b-a22b"), &machine)
    };
    let half = |from: u32| (from..from + 64).collect::<Vec<_>>();
    placed(2, vec![half(64), half(0)]).unwrap();
    refused(placed(2, vec![half(0), half(0)]), &["expert 64"]);
    refused(placed(2, vec![half(0), half(65)]), &["expert 128"]);
    refused(placed(2, vec![half(0)]), &["ep=2"]);
    refused(placed(2, vec![half(0), vec![1]]), &["rank 1"]);
    refused(placed(1, vec![half(0)]), &["ep"]);

    for machine in [
        Machine { gpus_per_host: 0, ..machine },
        Machine { rails_per_gpu: 0, ..machine },
        Machine { rails_per_gpu: 1000, ..machine },
    ] {
        refused(train("tp=1").unwrap().trainers(&preset("qwen3-0.6b"), &machine), &["_per_"]);
    }
}

#[test]
fn jobs_that_contradict_themselves_are_refused() {
    let good: Value = serde_json::from_str(examples()[1]).unwrap();
    // Replaces what is at a pointer.
    let with = |at: &str, value: Value| {
        let mut job = good.clone();
        let (parent, key) = at.rsplit_once('/').unwrap();
        match job.pointer_mut(parent).unwrap() {
            Value::Array(list) => list[key.parse::<usize>().unwrap()] = value,
            object => object[key] = value,
        }
        JobSpec::from_json(&job.to_string()).and_then(|job| job.manifest())
    };
    with("/receivers/gpus", json!(8)).unwrap();
    refused(with("/receivers/gpus", json!(9)), &["8 GPU(s)", "9"]);
    refused(with("/receivers/layout", json!("copy=2")), &["`gpu`", "copy", "parameters[1]"]);
    refused(with("/receivers/layout", json!("copy=2,gpu=3")), &["expert", "gpu=3"]);
    refused(with("/receivers/fp8", json!({"block": [1, 1], "scales": "f32"})), &["fp8"]);
    refused(with("/receivers/parameters", Value::Null), &["copy", "replicas"]);
    refused(
        with("/receivers/parameters/1/map", json!({"tensor": "nothing"})),
        &["parameters[1]", "`nothing`"],
    );
    refused(
        with("/receivers/parameters/1/map", json!({"tensor": "layers.{l}.q.weight"})),
        &["parameters[1]", "{l}"],
    );
    refused(
        with("/receivers/parameters/1/map", json!({"concat": {"dim": 0, "parts": []}})),
        &["concatenates nothing"],
    );
    let endless = json!({"concat": {"dim": 0, "each": {"variable": "x", "range": [0, 4_294_967_295u32]}, "parts": [{"tensor": "norm.weight"}]}});
    refused(with("/receivers/parameters/1/map", endless), &["nodes"]);
    let each = json!({"variable": "expert", "range": [0, 1]});
    let expert = json!({"tensor": "layers.0.experts.{expert}.up.weight"});
    let inside = json!({"concat": {"dim": 0, "each": each, "parts": [expert]}});
    let outside = json!({"concat": {"dim": 0, "parts": [inside, expert]}});
    refused(with("/receivers/parameters/1/map", outside), &["parameters[1]", "{expert}"]);
    let mut deep = json!({"tensor": "norm.weight"});
    for _ in 0..20 {
        deep = json!({"cast": {"of": deep, "to": "F32"}});
    }
    refused(with("/receivers/parameters/1/map", deep), &["deeper"]);
    refused(with("/receivers/parameters/1/ranges", json!({"layer": [0, 4], "x": [0, 1]})), &["`x`"]);
    refused(with("/receivers/parameters/1/ranges", json!({"layer": [0, 4_000_000_000u32]})), &["more than"]);
    refused(with("/receivers/parameters/1/ranges", json!({"layer": [4, 4]})), &["empty"]);
    refused(with("/receivers/parameters/1/name", json!("embed")), &["`layer`"]);
    refused(with("/receivers/parameters/4/name", json!("embed")), &["embed", "twice"]);
    refused(with("/model/preset", json!("kimi-k2")), &["exactly one"]);
    refused(with("/model/expert_form", json!("stacked")), &["expert_form"]);
    refused(with("/model/tensors/5/name", json!("embed.weight")), &["embed.weight", "twice"]);
    refused(with("/model/tensors/5/shape", json!([1u64 << 63, 4])), &["parameters"]);
    refused(
        with("/model/tensors/1/ranges", json!({"layer": [4_000_000_000u32, 4_000_000_001u32]})),
        &["layers"],
    );
    refused(with("/trainers/gpus", json!(4)), &["8 GPU(s)", "4"]);
    refused(with("/trainers/layout", Value::Null), &["exactly one", "meshes"]);
    let mesh = |mesh: Value| {
        let mut job = good.clone();
        job["trainers"] = json!({"gpus": 4, "meshes": [mesh]});
        JobSpec::from_json(&job.to_string()).and_then(|job| job.manifest())
    };
    mesh(json!({"tensors": "*", "mesh": [4], "placements": ["Replicate"]})).unwrap();
    refused(
        mesh(json!({"tensors": "layers*", "mesh": [4], "placements": ["Replicate"]})),
        &["`embed.weight`"],
    );
    refused(
        mesh(json!({"tensors": "*", "mesh": [8], "placements": ["Replicate"]})),
        &["meshes[0]", "8 rank(s)"],
    );
    refused(
        mesh(json!({"tensors": "*", "mesh": [4], "first_rank": u64::MAX, "placements": ["Replicate"]})),
        &["meshes[0]"],
    );
    refused(mesh(json!({"tensors": "*", "mesh": [0], "placements": ["Replicate"]})), &["mesh"]);
    refused(mesh(json!({"tensors": "*", "mesh": [4], "placements": []})), &["embed.weight", "dimension"]);
    refused(
        mesh(json!({"tensors": "*", "mesh": [4], "placements": [{"Shard": 1}]})),
        &["norm.weight", "dimension 1"],
    );
    refused(mesh(json!({"tensors": "{x", "mesh": [4], "placements": ["Replicate"]})), &["closed"]);
    refused(JobSpec::from_json(&"[".repeat(1_000_000)), &["job file"]);
    refused(JobSpec::from_json("{}"), &["`model`"]);
}
