//! What hostile bytes may do to a decoder, and to everything that takes what it made of them: be refused, in bounded
//! time and memory. No panic, no overflow, no hang.
//!
//! Each public function is the body of the fuzz target of its name, and of tests that need no fuzzer.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use xfer_plan::model::{JobSpec, ModelSpec, TensorSpec};
use xfer_plan::{
    CheckError, DType, Manifest, Plan, PlanError, PlanReport, RankPlan, ReceiverManifest, SourcePiece,
    TrainerManifest, Transform, diff, explain,
};

use crate::scenario::{execute, expected};

/// A manifest is planned here if its memory and its pieces have at most so many bytes: the element-by-element oracle
/// looks at each, and a fuzzer should see thousands of manifests a second.
const PLANNED_BYTES_MAX: u64 = 1 << 15;

/// What the plan does not write keeps this value.
const UNTOUCHED: u8 = 0xa5;

/// A manifest, and after it a plan that claims to be for it, in postcard's encoding. Also each message alone.
pub(crate) fn plan(bytes: &[u8]) {
    decode::<TrainerManifest>(bytes);
    decode::<ReceiverManifest>(bytes);
    decode::<RankPlan>(bytes);
    decode::<Plan>(bytes);
    let Some((manifest, rest)) = decode::<Manifest>(bytes) else { return };
    if manifest.validate().is_err() || !is_small(&manifest) {
        return;
    }
    let Some(own) = plan_and_check(&manifest) else { return };
    if let Some((mut plan, _)) = decode::<Plan>(rest) {
        // Whatever a file says can be shown, and compared with another.
        assert!(!plan.to_string().is_empty());
        assert_eq!(diff(&own, &plan).equal, own == plan);
        // No fuzzer guesses a digest: the check is to look further, and what differs in the end is the digest alone.
        plan.manifest_digest = own.manifest_digest;
        if let Ok(()) | Err(CheckError::Digest { .. }) = plan.check(&manifest) {
            carry_out(&plan, &manifest);
        }
    }
}

/// The bytes with another number where postcard reads one at `at`: what a fuzzer that knows nothing of its encoding
/// rarely makes, because numbers differ in length.
pub(crate) fn with_number(bytes: &[u8], at: usize, number: u64) -> Vec<u8> {
    let (before, rest) = bytes.split_at(at.min(bytes.len()));
    let old = rest.iter().position(|byte| *byte < 0x80).map_or(rest.len(), |last| last + 1);
    [before, &postcard::to_allocvec(&number).expect("a number fits"), &rest[old..]].concat()
}

/// Numbers at borders.
pub(crate) const NUMBERS: [u64; 12] =
    [0, 1, 2, 3, 8, 255, 65_535, 0xffff_ffff, 1 << 32, 1 << 44, 1 << 63, u64::MAX];

/// Text as a model's `config.json`, and as a job description.
pub(crate) fn model_spec(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let small = serde_json::from_str(text).is_ok_and(|json| size(&json) <= JOB_SIZE_MAX);
    if small && let Ok(model) = ModelSpec::from_config(text) {
        let elements =
            |tensor: &TensorSpec| tensor.shape.iter().map(|&len| u128::from(len)).product::<u128>();
        let sum: u128 = model.tensors().iter().map(elements).sum();
        assert_eq!(u128::from(model.parameters()), sum);
        assert!(model.layers() > 0 && model.hidden() > 0);
    }
    let Ok(job) = JobSpec::from_json(text) else { return };
    let again = serde_json::to_string(&job).expect("what was read can be written");
    JobSpec::from_json(&again).expect("what was written can be read");
    if !small {
        return;
    }
    if let Ok(manifest) = job.manifest() {
        manifest.validate().expect("a job's manifest is valid");
        if is_small(&manifest) {
            plan_and_check(&manifest);
        }
    }
}

/// Models and jobs above this are refused here and not by the library, whose limits are those of real clusters: 256
/// ranks with 256 tensors each are enough to get everywhere.
const JOB_SIZE_MAX: u64 = 1 << 16;

/// About how many times a job says "and so on": the product of all its layers, experts, ranks and ranges.
fn size(json: &Value) -> u64 {
    let number = |value: &Value| value.as_u64().unwrap_or(1).max(1);
    let all = |values: &mut dyn Iterator<Item = u64>| values.fold(1, u64::saturating_mul);
    match json {
        Value::Object(fields) => all(&mut fields.iter().map(|(key, value)| match (key.as_str(), value) {
            ("num_hidden_layers" | "n_routed_experts" | "num_experts" | "gpus", value) => number(value),
            ("preset", Value::String(preset)) if preset == "qwen3-0.6b" => 28,
            ("preset", _) => u64::MAX,
            ("layout", Value::String(layout)) => {
                all(&mut layout.split(['=', ',']).filter_map(|factor| factor.trim().parse().ok()))
            }
            ("ranges", Value::Object(ranges)) => all(&mut ranges.values().map(span)),
            ("range", range) => span(range),
            (_, value) => size(value),
        })),
        Value::Array(values) => all(&mut values.iter().map(size)),
        _ => 1,
    }
}

/// How many numbers are from the first to below the second.
fn span(range: &Value) -> u64 {
    let end = |place| range.get(place).and_then(Value::as_u64).unwrap_or(0);
    end(1).saturating_sub(end(0)).max(1)
}

/// Plans what is small enough to be looked at byte by byte; `None` where the planner refuses it.
fn plan_and_check(manifest: &Manifest) -> Option<Plan> {
    let plan = match xfer_plan::plan(manifest) {
        Ok(plan) => plan,
        Err(defect @ PlanError::Defect { .. }) => panic!("{defect}"),
        Err(_) => return None,
    };
    plan.check(manifest).expect("the planner's own plan passes the check");
    carry_out(&plan, manifest);
    Some(plan)
}

/// What the check lets pass writes what the manifest asks for, as far as the oracle can tell, and can be looked at in
/// every way.
fn carry_out(plan: &Plan, manifest: &Manifest) {
    let known = |transform| match transform {
        Transform::Cast { from, to } => {
            [from, to].iter().all(|dtype| matches!(dtype, DType::BF16 | DType::F32))
        }
        Transform::Copy | Transform::Quantize { .. } | Transform::Scales { .. } => true,
    };
    if plan.transfers().all(|placed| known(placed.transfer.transform)) && !pieces_overlap(manifest) {
        let found = execute(plan, manifest, UNTOUCHED).expect("no write is stray");
        assert_eq!(found, expected(manifest, UNTOUCHED));
    }
    PlanReport::new(plan, manifest).expect("a small plan has few operations");
    for param in &plan.params {
        explain(plan, manifest, &param.name, None).expect("a checked plan can be explained");
    }
    assert!(diff(plan, plan).equal && !plan.to_string().is_empty());
}

/// Whether a trainer declares two pieces over the same bytes: which of them is there, no oracle knows.
fn pieces_overlap(manifest: &Manifest) -> bool {
    manifest.trainers.iter().any(|trainer| {
        let span =
            |piece: &SourcePiece| (piece.region, piece.offset, piece.offset + piece.bytes().unwrap_or(0));
        let mut spans: Vec<_> =
            trainer.pieces.iter().map(span).filter(|(_, start, end)| start < end).collect();
        spans.sort_unstable();
        spans.windows(2).any(|pair| pair[0].0 == pair[1].0 && pair[0].2 > pair[1].1)
    })
}

/// Reads a value; what can be read can also be written, and is then read as the same. Returns it with the bytes
/// after it.
fn decode<T: Serialize + DeserializeOwned + PartialEq>(bytes: &[u8]) -> Option<(T, &[u8])> {
    let (value, rest) = postcard::take_from_bytes::<T>(bytes).ok()?;
    let again = postcard::to_allocvec(&value).expect("what was read can be written");
    assert!(
        postcard::from_bytes::<T>(&again).is_ok_and(|again| again == value),
        "another value was read back"
    );
    Some((value, rest))
}

/// Whether a manifest is planned here.
pub(crate) fn is_small(manifest: &Manifest) -> bool {
    let regions = manifest.trainers.iter().map(|trainer| &trainer.regions);
    let regions = regions.chain(manifest.receivers.iter().map(|receiver| &receiver.regions));
    let pieces = manifest.trainers.iter().flat_map(|trainer| &trainer.pieces);
    // Pieces may lie over each other: their bytes are no part of those of the regions.
    let bytes = regions.flatten().copied().map(Some).chain(pieces.map(SourcePiece::bytes));
    let sum = bytes.map(|bytes| bytes.unwrap_or(u64::MAX)).fold(0, u64::saturating_add);
    sum <= PLANNED_BYTES_MAX
}

/// Small models and jobs that reach every part of what `model_spec` calls.
pub(crate) const DESCRIPTIONS: [&str; 5] = [
    r#"{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "torch_dtype": "bfloat16",
        "num_hidden_layers": 2, "hidden_size": 16, "vocab_size": 70, "num_attention_heads": 4, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4, "intermediate_size": 16,
        "moe_intermediate_size": 8, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "moe_layer_freq": 1, "topk_method": "noaux_tc", "num_nextn_predict_layers": 1}"#,
    r#"{"model_type": "qwen3_moe", "num_hidden_layers": 2, "hidden_size": 16, "vocab_size": 70,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 16,
        "moe_intermediate_size": 8, "num_experts": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]}"#,
    r#"{"model": {"config": {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 4, "vocab_size": 20,
        "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 6}},
        "trainers": {"layout": "tp=2,pp=2", "gpus": 4, "dtype": "F32"},
        "receivers": {"layout": "tp=2,replicas=2", "gpus": 4, "machine": {"gpus_per_host": 2}},
        "options": {"relay": "auto", "chunk_bytes_max": 64, "gather_chunk_bytes_max": 64}}"#,
    r#"{"model": {"config": {"model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 8,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "moe_intermediate_size": 8,
        "num_experts": 4}, "expert_form": "stacked"}, "trainers": {"layout": "ep=2,fsdp=2"},
        "receivers": {"layout": "ep=2", "fp8": {"block": [4, 4], "scales": "ue8m0"},
        "experts": [[0, 1, 2], [2, 3, 0]]}}"#,
    r#"{"model": {"tensors": [
        {"name": "layers.{layer}.{part}", "ranges": {"layer": [0, 2], "part": [0, 3]}, "dtype": "BF16", "shape": [6, 4]},
        {"name": "experts.{expert}", "ranges": {"expert": [0, 2]}, "dtype": "BF16", "shape": [4, 4], "cut": "column"},
        {"name": "norm", "dtype": "F32", "shape": [4], "end": "last"}]},
        "trainers": {"gpus": 4, "meshes": [
        {"tensors": "layers.{layer}.*", "ranges": {"layer": [0, 2]}, "mesh": [2, 2],
         "placements": [{"StridedShard": {"dim": 0, "split": 2}}, {"Shard": 0}]},
        {"tensors": "experts.{n}", "mesh": [2], "first_rank": 2, "placements": [{"Shard": 1}]},
        {"tensors": "norm", "mesh": [2, 2], "placements": ["Replicate", "Replicate"]}]},
        "receivers": {"layout": "outer=2,inner=2", "parameters": [
        {"name": "fused.{layer}", "ranges": {"layer": [0, 2]}, "dtype": "BF16", "map": {"shard": {"dim": 0,
         "by": "inner", "of": {"concat": {"dim": 0, "each": {"variable": "part", "range": [0, 3]},
         "parts": [{"tensor": "layers.{layer}.{part}"}]}}}}},
        {"name": "experts", "dtype": "BF16", "map": {"view": {"shape": [1, 5, 4], "of": {"pad": {"dim": 0, "len": 5,
         "of": {"concat": {"dim": 0, "each": {"variable": "e", "range": [0, 2], "by": "outer"},
         "parts": [{"tensor": "experts.{e}"}]}}}}}}},
        {"name": "norm", "dtype": "BF16", "end": "last", "map": {"cast": {"to": "BF16", "of": {"slice": {"start": [1],
         "len": [3], "of": {"tensor": "norm"}}}}}},
        {"name": "quantised", "dtype": "F8_E4M3", "map": {"quantize": {"of": {"tensor": "experts.0"},
         "quant": {"block": [2, 3], "scales": "f32"}}}},
        {"name": "scales", "dtype": "F32", "map": {"scales": {"of": {"tensor": "experts.0"},
         "quant": {"block": [2, 3], "scales": "f32"}}}}]}}"#,
];
