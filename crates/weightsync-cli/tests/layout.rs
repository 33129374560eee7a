//! The receivers' layout, against literal expectations and against the independent reference.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use common::{bert, write_tensors};
use safetensors::Dtype;
use weightsync_cli::checkpoint::{Checkpoint, HeadCounts, TensorInfo};
use weightsync_cli::reference::{VerifyError, param_names, verify_param};
use weightsync_cli::synthetic::{Shape, ensure};
use weightsync_cli::tensor_parallel::{Layout, LocalParam, receiver_params};
use weightsync_cli::training::step_bytes;
use xfer_plan::{DType, ParamMap};

/// The bytes of a parameter, element by element: which element of which tensor is at each index of the result.
fn evaluate(checkpoint: &Checkpoint, step: u64, param: &LocalParam) -> Vec<u8> {
    fn locate(map: &ParamMap, index: &[u64], shapes: &dyn Fn(&str) -> Vec<u64>) -> (String, Vec<u64>) {
        match map {
            ParamMap::Tensor(name) => (name.clone(), index.to_vec()),
            ParamMap::Shaped { of, .. } => locate(of, index, shapes),
            ParamMap::Slice { of, bounds } => {
                let index: Vec<u64> =
                    index.iter().zip(bounds.start()).map(|(index, start)| index + start).collect();
                locate(of, &index, shapes)
            }
            ParamMap::Concat { dim, parts } => {
                let mut index = index.to_vec();
                for part in parts {
                    let length = part.shape(|name| Some(shapes(name))).unwrap()[*dim];
                    if index[*dim] < length {
                        return locate(part, &index, shapes);
                    }
                    index[*dim] -= length;
                }
                panic!("index past the concatenation");
            }
            other => panic!("the layout makes no {other:?}"),
        }
    }
    let shapes = |name: &str| checkpoint.get(name).unwrap().shape.clone();
    assert_eq!(param.map.shape(|name| Some(shapes(name))).unwrap(), param.shape, "{}", param.name);

    let mut tensors = BTreeMap::new();
    for name in param.map.tensors().unwrap() {
        let mut bytes = checkpoint.read_all(name).unwrap();
        step_bytes(param.dtype, name, step, 0, &mut bytes);
        tensors.insert(name.to_owned(), bytes);
    }
    let size = param.dtype.bytes() as usize;
    let mut result = Vec::new();
    for element in 0..param.shape.iter().product::<u64>() {
        let (mut index, mut rest) = (vec![0; param.shape.len()], element);
        for (index, size) in index.iter_mut().zip(&param.shape).rev() {
            *index = rest % size;
            rest /= size;
        }
        let (name, index) = locate(&param.map, &index, &shapes);
        let at =
            index.iter().zip(&shapes(&name)).fold(0, |at, (index, size)| at * size + index) as usize * size;
        result.extend_from_slice(&tensors[&name][at..at + size]);
    }
    result
}

fn verify(
    checkpoint: &Checkpoint,
    param: &str,
    (tp, rank): (u32, u32),
    step: u64,
    bytes: &[u8],
) -> Result<u64, VerifyError> {
    let mut next = 0;
    verify_param(checkpoint, param, (tp, rank), step, &mut |offset, found| {
        assert_eq!(offset, next, "in order, without a gap");
        assert!((1..=1 << 20).contains(&found.len()));
        next += found.len() as u64;
        found.copy_from_slice(&bytes[offset as usize..offset as usize + found.len()]);
    })
}

/// Every parameter of every rank, evaluated element by element, is what the reference says, and nothing is missing.
fn agrees(folder: &Path, tps: &[u32]) {
    let checkpoint = Checkpoint::open(folder).unwrap();
    for &tp in tps {
        let layout = Layout::new(checkpoint.tensors(), checkpoint.heads(), tp).unwrap();
        for rank in 0..tp {
            let params = layout.params(rank).unwrap();
            assert_eq!(params, receiver_params(checkpoint.tensors(), checkpoint.heads(), tp, rank).unwrap());
            let names: Vec<&str> = params.iter().map(|param| param.name.as_str()).collect();
            assert_eq!(names, param_names(&checkpoint));
            for param in params {
                let step = u64::from(tp + rank) % 3;
                let bytes = evaluate(&checkpoint, step, &param);
                assert_eq!(bytes.len() as u64, param.bytes());
                let verified = verify(&checkpoint, &param.name, (tp, rank), step, &bytes);
                assert_eq!(verified.unwrap(), param.bytes(), "{} on rank {rank} of {tp}", param.name);
            }
        }
    }
}

#[test]
fn layout_and_reference_agree_on_a_qwen() {
    let folder = tempfile::tempdir().unwrap();
    // Small, so that an element by element evaluation takes moments; sizes that divide by little.
    let shape = Shape { hidden: 20, vocab: 101, head_dim: 4, inner: 30, ..Shape::tiny() };
    ensure(folder.path(), &shape, 1, &mut |_, _| {}).unwrap();
    agrees(folder.path(), &[1, 2, 3, 4, 5, 8, 16, 120]);
    // Without a config the head counts come from the norms: 8 and 4 again.
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let with_config = Layout::new(checkpoint.tensors(), checkpoint.heads(), 8).unwrap();
    fs::remove_file(folder.path().join("config.json")).unwrap();
    agrees(folder.path(), &[1, 2, 3, 4, 8]);
    let without = Layout::new(checkpoint.tensors(), None, 8).unwrap();
    assert_eq!(without.params(5).unwrap(), with_config.params(5).unwrap());
    // One rank holds everything, whatever the heads.
    fs::write(folder.path().join("config.json"), r#"{"num_attention_heads": 5}"#).unwrap();
    agrees(folder.path(), &[1]);
}

#[test]
fn layout_and_reference_agree_on_a_bert() {
    let folder = tempfile::tempdir().unwrap();
    write_tensors(&folder.path().join("model.safetensors"), &bert());
    agrees(folder.path(), &[1, 2, 3, 4, 5, 8]); // no config: rows are cut evenly
    fs::write(folder.path().join("config.json"), r#"{"num_attention_heads": 6}"#).unwrap();
    agrees(folder.path(), &[1, 2, 3, 4, 8]);
}

#[test]
fn layout_and_reference_agree_on_biases_and_other_names() {
    let folder = tempfile::tempdir().unwrap();
    let mut tensors = Vec::new();
    for (name, shape) in [
        ("model.layers.0.self_attn.q_proj.weight", vec![14 * 2, 9]),
        ("model.layers.0.self_attn.q_proj.bias", vec![14 * 2]),
        ("model.layers.0.self_attn.k_proj.weight", vec![2 * 2, 9]),
        ("model.layers.0.self_attn.k_proj.bias", vec![2 * 2]),
        ("model.layers.0.self_attn.v_proj.weight", vec![2 * 2, 9]),
        ("model.layers.0.self_attn.v_proj.bias", vec![2 * 2]),
        ("model.layers.0.self_attn.o_proj.weight", vec![9, 14 * 2]),
        ("model.layers.0.self_attn.o_proj.bias", vec![9]),
        ("model.layers.0.mlp.gate_proj.weight_scale_inv", vec![3, 1]),
        ("model.layers.0.mlp.experts.0.gate_proj.weight", vec![5, 9]),
        ("model.layers.0.mlp.down_proj.bias", vec![9]),
        ("lm_head.bias", vec![11]),
        ("lm_head.weight", vec![11, 9]),
        ("conv.weight", vec![3, 2, 2, 2]),
        ("scale", vec![]),
    ] {
        tensors.push((name.to_owned(), Dtype::F16, shape));
    }
    write_tensors(&folder.path().join("model.safetensors"), &tensors);
    fs::write(folder.path().join("config.json"), r#"{"num_attention_heads": 14, "num_key_value_heads": 2}"#)
        .unwrap();
    // 14 query heads over 3 ranks: 5, 5, 4. The second rank's read both key/value heads.
    agrees(folder.path(), &[1, 2, 3, 4, 7, 14, 20]);
}

#[test]
fn a_qwen_is_cut_as_the_engine_expects() {
    let shape = Shape::qwen3_0_6b();
    let heads = HeadCounts::new(16, 8);
    let find = |tp, rank, name: &str| {
        let params = receiver_params(&shape.tensors(), heads, tp, rank).unwrap();
        let param = params.into_iter().find(|param| param.name == name).unwrap();
        (param.shape, describe(&param.map))
    };
    let layer = |name: &str| format!("model.layers.3.{name}");
    for (tp, rank, name, local, map) in [
        (
            2,
            1,
            layer("self_attn.qkv_proj.weight"),
            vec![2048, 1024],
            "q_proj[1024..2048, 0..1024] + k_proj[512..1024, 0..1024] + v_proj[512..1024, 0..1024]",
        ),
        (
            16, // more ranks than key/value heads: pairs of ranks hold the same ones
            5,
            layer("self_attn.qkv_proj.weight"),
            vec![384, 1024],
            "q_proj[640..768, 0..1024] + k_proj[256..384, 0..1024] + v_proj[256..384, 0..1024]",
        ),
        (1, 0, layer("self_attn.qkv_proj.weight"), vec![4096, 1024], "q_proj + k_proj + v_proj"),
        (
            4,
            3,
            layer("mlp.gate_up_proj.weight"),
            vec![1536, 1024],
            "gate_proj[2304..3072, 0..1024] + up_proj[2304..3072, 0..1024]",
        ),
        (4, 3, layer("mlp.down_proj.weight"), vec![1024, 768], "down_proj[0..1024, 2304..3072]"),
        (4, 3, layer("self_attn.o_proj.weight"), vec![1024, 512], "o_proj[0..1024, 1536..2048]"),
        (4, 3, layer("self_attn.q_norm.weight"), vec![128], "q_norm"),
        (4, 1, "model.embed_tokens.weight".into(), vec![37_984, 1024], "embed_tokens[37984..75968, 0..1024]"),
        // 16 heads over 3 ranks: 6, 6, 4.
        (3, 2, layer("self_attn.o_proj.weight"), vec![1024, 512], "o_proj[0..1024, 1536..2048]"),
        (
            32,
            20,
            layer("self_attn.qkv_proj.weight"),
            vec![0, 1024],
            "q_proj[2048..2048, 0..1024] + k_proj[1024..1024, 0..1024] + v_proj[1024..1024, 0..1024]",
        ),
    ] {
        assert_eq!(find(tp, rank, &name), (local, map.to_owned()), "{name} on rank {rank} of {tp}");
    }
}

fn describe(map: &ParamMap) -> String {
    match map {
        ParamMap::Tensor(name) => name.rsplit('.').nth(1).unwrap().to_owned(),
        ParamMap::Shaped { of, .. } => describe(of),
        ParamMap::Slice { of, bounds } => format!("{}{bounds}", describe(of)),
        ParamMap::Concat { parts, .. } => parts.iter().map(describe).collect::<Vec<_>>().join(" + "),
        other => panic!("the layout makes no {other:?}"),
    }
}

#[test]
fn the_layout_says_which_rule_applied() {
    let tensors = |list: Vec<(String, Dtype, Vec<usize>)>| -> Vec<TensorInfo> {
        list.into_iter()
            .map(|(name, dtype, shape)| TensorInfo {
                name,
                dtype: if dtype == Dtype::I64 { DType::I64 } else { DType::F32 },
                shape: shape.into_iter().map(|size| size as u64).collect(),
            })
            .collect()
    };
    let qwen = Layout::new(&Shape::tiny().tensors(), HeadCounts::new(8, 4), 2).unwrap();
    assert_eq!(
        qwen.to_string(),
        "\
tensor parallelism 2; shapes of rank 0
   1 x lm_head.weight BF16 [500, 96]: vocabulary cut on dimension 0, not padded
   1 x model.embed_tokens.weight BF16 [500, 96]: vocabulary cut on dimension 0, not padded
   2 x model.layers.*.input_layernorm.weight BF16 [96]: norm, copied
   2 x model.layers.*.mlp.down_proj.weight BF16 [96, 100]: row parallel: cut on dimension 1
   2 x model.layers.*.mlp.gate_up_proj.weight BF16 [200, 96]: gate, up fused, rows cut evenly
   2 x model.layers.*.post_attention_layernorm.weight BF16 [96]: norm, copied
   2 x model.layers.*.self_attn.k_norm.weight BF16 [16]: norm, copied
   2 x model.layers.*.self_attn.o_proj.weight BF16 [96, 64]: row parallel: cut on dimension 1 by query heads
   2 x model.layers.*.self_attn.q_norm.weight BF16 [16]: norm, copied
   2 x model.layers.*.self_attn.qkv_proj.weight BF16 [128, 96]: q, k, v fused, cut by heads, 8 query and 4 key/value
   1 x model.norm.weight BF16 [96]: norm, copied
"
    );
    let bert = Layout::new(&tensors(bert()), None, 2).unwrap().to_string();
    for line in [
        "   2 x encoder.layer.*.attention.self.qkv_proj.bias F32 [36]: q, k, v fused, rows cut evenly",
        "   2 x encoder.layer.*.output.dense.bias F32 [24]: bias of a row-parallel layer, copied",
        "   2 x encoder.layer.*.intermediate.dense.bias F32 [25]: column parallel: cut on dimension 0",
        "   1 x embeddings.position_ids I64 [1, 16]: no rule for this name, copied",
    ] {
        assert!(bert.contains(line), "{line}\n{bert}");
    }
}

#[test]
fn what_cannot_be_cut_rightly_is_refused() {
    let check =
        |change: &dyn Fn(&mut Vec<TensorInfo>), heads: Option<(u64, u64)>, tp: u32, expected: &str| {
            let mut tensors = Shape::tiny().tensors();
            change(&mut tensors);
            let heads = heads.map(|(query, key_value)| HeadCounts::new(query, key_value).unwrap());
            let error =
                Layout::new(&tensors, heads, tp).err().map_or(String::new(), |error| error.to_string());
            assert!(error.contains(expected), "{expected}: {error}");
            assert_eq!(error.is_empty(), expected.is_empty());
        };
    let edit = |name: &'static str, change: fn(&mut TensorInfo)| {
        move |tensors: &mut Vec<TensorInfo>| {
            change(tensors.iter_mut().find(|t| t.name.contains(name)).unwrap())
        }
    };
    let remove =
        |name: &'static str| move |tensors: &mut Vec<TensorInfo>| tensors.retain(|t| !t.name.contains(name));
    let good = Some((8, 4));

    check(&|_| {}, good, 2, "");
    check(
        &remove("layers.1.self_attn.k_proj"),
        good,
        2,
        "`model.layers.1.self_attn.qkv_proj.weight` is fused from q, k, v",
    );
    check(
        &remove("gate_proj"),
        good,
        1,
        "gate_up_proj.weight` is fused from gate, up; the checkpoint has only [\"model",
    );
    check(
        &edit("v_proj", |t| t.dtype = DType::F32),
        good,
        2,
        "cannot put `model.layers.0.self_attn.v_proj.weight` (F32",
    );
    check(&edit("up_proj", |t| t.shape[1] = 95), good, 2, "other dtype or row shape");
    check(&edit("down_proj", |t| t.shape.truncate(1)), good, 2, "has no dimension 1 to cut");
    check(&edit("embed_tokens", |t| t.shape.clear()), good, 2, "has no dimension 0 to cut");
    check(&|_| {}, Some((12, 4)), 2, "has no 12 heads on dimension 1");
    check(&|_| {}, Some((12, 4)), 1, "");
    // Gated attention has twice the rows: the same names, another meaning.
    check(&|_| {}, Some((4, 4)), 2, "query heads of 32 rows, key heads of 16");
    check(&remove("q_norm"), None, 2, "put the model's config.json beside the checkpoint");
    check(&remove("q_norm"), None, 1, "");
    check(
        &edit("q_proj", |t| t.name = "model.layers.0.self_attn.qkv_proj.weight".into()),
        good,
        2,
        "fused already",
    );
    check(
        &edit("model.norm", |t| t.name = "model.layers.0.self_attn.qkv_proj.weight".into()),
        good,
        1,
        "two parameters",
    );
    check(
        &edit("model.norm", |t| t.shape = vec![1; 9]),
        good,
        2,
        "`model.norm.weight`: more than 8 dimensions",
    );
    let error = |tp, rank| receiver_params(&Shape::tiny().tensors(), None, tp, rank).unwrap_err().to_string();
    assert_eq!(error(2, 2), "no rank 2 in tensor parallelism of 2");
    assert_eq!(error(0, 0), "no rank 0 in tensor parallelism of 0");
    assert!(error(70_000, 0).contains("device mesh"));
}

#[test]
fn every_flipped_bit_is_found() {
    let folder = tempfile::tempdir().unwrap();
    ensure(folder.path(), &Shape::tiny(), 1, &mut |_, _| {}).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let params = receiver_params(checkpoint.tensors(), checkpoint.heads(), 2, 1).unwrap();
    for param in params.iter().filter(|param| param.name.contains("layers.0") || param.name.contains("embed"))
    {
        let good = evaluate(&checkpoint, 4, param);
        for (first, count) in [(0, 1), (good.len() / 2, 3), (good.len() - 1, 1)] {
            let mut bytes = good.clone();
            bytes[first] ^= 0x80;
            if count == 3 {
                bytes[first + 5] ^= 1;
                bytes[good.len() - 1] ^= 1;
            }
            let Err(VerifyError::Mismatch(mismatch)) = verify(&checkpoint, &param.name, (2, 1), 4, &bytes)
            else {
                panic!("{} differs at {first}", param.name);
            };
            assert_eq!(mismatch.param, param.name);
            assert_eq!((mismatch.offset, mismatch.count), (first as u64, count));
            assert_eq!((mismatch.expected, mismatch.found), (good[first], good[first] ^ 0x80));
            let text = mismatch.to_string();
            assert!(
                text.contains(&format!("differs in {count} bytes, first at byte {first} (from `model")),
                "{text}"
            );
        }
    }
    // The fused parameter's error names the tensor that the byte comes from.
    let qkv = params.iter().find(|param| param.name.contains("layers.0.self_attn.qkv_proj")).unwrap();
    let mut bytes = evaluate(&checkpoint, 0, qkv);
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    let error = verify(&checkpoint, &qkv.name, (2, 1), 0, &bytes).unwrap_err().to_string();
    assert!(error.contains("(from `model.layers.0.self_attn.v_proj.weight`)"), "{error}");
}

#[test]
fn another_step_rank_or_name_is_found() {
    let folder = tempfile::tempdir().unwrap();
    ensure(folder.path(), &Shape::tiny(), 1, &mut |_, _| {}).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let name = "model.layers.0.mlp.down_proj.weight";
    let params = receiver_params(checkpoint.tensors(), checkpoint.heads(), 2, 1).unwrap();
    let bytes = evaluate(&checkpoint, 4, params.iter().find(|param| param.name == name).unwrap());
    let outcome = |name: &str, tp, rank, step| verify(&checkpoint, name, (tp, rank), step, &bytes);
    assert!(outcome(name, 2, 1, 4).is_ok());
    for (other, rank, step) in [(name, 1, 3), (name, 0, 4), ("model.layers.1.mlp.down_proj.weight", 1, 4)] {
        assert!(matches!(outcome(other, 2, rank, step), Err(VerifyError::Mismatch(_))));
    }
    for (name, tp, rank) in
        [("model.layers.9.mlp.gate_up_proj.weight", 2, 1), ("nothing", 2, 1), (name, 2, 2)]
    {
        assert!(matches!(outcome(name, tp, rank, 4), Err(VerifyError::NoSource { .. })), "{name}");
    }
}

/// Rows longer than a block, cut by columns: read row by row.
#[test]
fn very_long_rows_are_compared_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let columns = 2_500_001;
    write_tensors(&path, &[("mlp.down_proj.weight".into(), Dtype::U8, vec![3, columns])]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let whole = checkpoint.read_all("mlp.down_proj.weight").unwrap();
    for (rank, range) in [(0, 0..1_250_001), (1, 1_250_001..columns)] {
        let mut bytes: Vec<u8> =
            whole.chunks_exact(columns).flat_map(|row| &row[range.clone()]).copied().collect();
        assert_eq!(
            verify(&checkpoint, "mlp.down_proj.weight", (2, rank), 0, &bytes).unwrap(),
            bytes.len() as u64
        );
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        assert!(verify(&checkpoint, "mlp.down_proj.weight", (2, rank), 0, &bytes).is_err());
    }
}
