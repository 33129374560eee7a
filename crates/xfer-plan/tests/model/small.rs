//! Small models of every known family, and how vLLM loads them: plain code that shares nothing with the crate.

use std::collections::BTreeMap;

use proptest::prelude::*;

use crate::array::{Array, PAD};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    Llama,
    Qwen3,
    Qwen3Moe,
    DeepseekV3,
}

#[derive(Clone, Debug)]
pub(crate) struct Small {
    pub(crate) family: Family,
    pub(crate) layers: usize,
    pub(crate) hidden: usize,
    pub(crate) vocabulary: usize,
    pub(crate) tied: bool,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) q_lora: Option<usize>,
    pub(crate) inner: usize,
    pub(crate) experts: usize,
    pub(crate) expert_inner: usize,
    pub(crate) shared: usize,
    pub(crate) first_dense: usize,
}

// Of latent attention.
const KV_LORA: usize = 12;
const NOPE: usize = 8;
const ROPE: usize = 4;
const V: usize = 6;

pub(crate) fn small() -> impl Strategy<Value = Small> {
    let family = prop_oneof![
        1 => Just(Family::Llama),
        1 => Just(Family::Qwen3),
        3 => Just(Family::Qwen3Moe),
        3 => Just(Family::DeepseekV3)
    ];
    let widths = (1usize..5, 1usize..5, 1usize..5, prop_oneof![Just(2usize), Just(4), Just(8)]);
    let heads = prop_oneof![4 => Just(4usize), 4 => Just(8), 1 => Just(6)];
    let readers = prop_oneof![Just(1usize), Just(2), Just(4)];
    let experts = prop_oneof![4 => Just(4usize), 4 => Just(8), 1 => Just(6)];
    let rest = (2usize..5, 50usize..200, any::<bool>(), 0usize..3, experts);
    let heads = (heads, readers);
    (family, widths, heads, rest, any::<bool>()).prop_map(|(family, widths, heads, rest, q_lora)| {
        let (hidden, inner, expert_inner, head_dim) = widths;
        let (heads, readers) = heads;
        let (layers, vocabulary, tied, shared, experts) = rest;
        let kv_heads = if heads.is_multiple_of(readers) { heads / readers } else { heads };
        Small {
            family,
            layers,
            hidden: hidden * 8,
            vocabulary,
            tied,
            heads,
            kv_heads,
            head_dim,
            q_lora: q_lora.then_some(16),
            inner: inner * 8,
            experts,
            expert_inner: expert_inner * 8,
            shared,
            first_dense: 1,
        }
    })
}

/// One rank's place in an engine.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) tp: usize,
    pub(crate) tp_rank: usize,
    /// Its experts, in order.
    pub(crate) experts: Vec<usize>,
    /// Ranks among which each expert is cut, and this one's place among them.
    pub(crate) expert_tp: (usize, usize),
}

impl Small {
    pub(crate) fn is_sparse(&self, layer: usize) -> bool {
        match self.family {
            Family::Llama | Family::Qwen3 => false,
            Family::Qwen3Moe => true,
            Family::DeepseekV3 => layer >= self.first_dense,
        }
    }

    pub(crate) fn config(&self) -> String {
        let q_lora = self.q_lora.map_or("null".to_owned(), |rank| rank.to_string());
        let &Small { layers, hidden, vocabulary, tied, heads, kv_heads, head_dim, inner, .. } = self;
        let &Small { experts, expert_inner, shared, first_dense, .. } = self;
        let (class, model_type) = match self.family {
            Family::Llama => ("LlamaForCausalLM", "llama"),
            Family::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
            Family::Qwen3Moe => ("Qwen3MoeForCausalLM", "qwen3_moe"),
            Family::DeepseekV3 => ("DeepseekV3ForCausalLM", "deepseek_v3"),
        };
        let more = match self.family {
            Family::DeepseekV3 => format!(
                r#""q_lora_rank": {q_lora}, "kv_lora_rank": {KV_LORA}, "qk_nope_head_dim": {NOPE}, "v_head_dim": {V},
                "qk_rope_head_dim": {ROPE}, "n_routed_experts": {experts}, "n_shared_experts": {shared},
                "first_k_dense_replace": {first_dense}, "topk_method": "noaux_tc""#
            ),
            _ => format!(
                r#""num_key_value_heads": {kv_heads}, "head_dim": {head_dim}, "num_experts": {experts}, "mlp_bias": false"#
            ),
        };
        format!(
            r#"{{"architectures": ["{class}"], "model_type": "{model_type}", "num_hidden_layers": {layers},
            "hidden_size": {hidden}, "vocab_size": {vocabulary}, "tie_word_embeddings": {tied},
            "num_attention_heads": {heads}, "intermediate_size": {inner}, "moe_intermediate_size": {expert_inner},
            "rope_theta": 1e6, {more}}}"#
        )
    }

    /// Every tensor of the checkpoint. No two elements are alike.
    pub(crate) fn tensors(&self, stacked: bool) -> BTreeMap<String, Array> {
        let mut tensors = BTreeMap::new();
        let mut next = 0u64;
        let mut add = |name: String, shape: &[usize]| {
            let mut array = Array::filled(shape, 0);
            for element in &mut array.data {
                *element = next;
                next += 1;
            }
            assert!(tensors.insert(name, array).is_none());
        };
        let &Small { hidden, heads, kv_heads, head_dim, .. } = self;
        add("model.embed_tokens.weight".into(), &[self.vocabulary, hidden]);
        for layer in 0..self.layers {
            let mut add = |name: &str, shape: &[usize]| add(format!("model.layers.{layer}.{name}"), shape);
            add("input_layernorm.weight", &[hidden]);
            add("post_attention_layernorm.weight", &[hidden]);
            if self.family == Family::DeepseekV3 {
                let q_rows = heads * (NOPE + ROPE);
                if let Some(rank) = self.q_lora {
                    add("self_attn.q_a_proj.weight", &[rank, hidden]);
                    add("self_attn.q_a_layernorm.weight", &[rank]);
                    add("self_attn.q_b_proj.weight", &[q_rows, rank]);
                } else {
                    add("self_attn.q_proj.weight", &[q_rows, hidden]);
                }
                add("self_attn.kv_a_proj_with_mqa.weight", &[KV_LORA + ROPE, hidden]);
                add("self_attn.kv_a_layernorm.weight", &[KV_LORA]);
                add("self_attn.kv_b_proj.weight", &[heads * (NOPE + V), KV_LORA]);
                add("self_attn.o_proj.weight", &[hidden, heads * V]);
            } else {
                add("self_attn.q_proj.weight", &[heads * head_dim, hidden]);
                add("self_attn.k_proj.weight", &[kv_heads * head_dim, hidden]);
                add("self_attn.v_proj.weight", &[kv_heads * head_dim, hidden]);
                add("self_attn.o_proj.weight", &[hidden, heads * head_dim]);
                if self.family != Family::Llama {
                    add("self_attn.q_norm.weight", &[head_dim]);
                    add("self_attn.k_norm.weight", &[head_dim]);
                }
            }
            let mut mlp = |prefix: &str, inner: usize| {
                add(&format!("{prefix}.gate_proj.weight"), &[inner, hidden]);
                add(&format!("{prefix}.up_proj.weight"), &[inner, hidden]);
                add(&format!("{prefix}.down_proj.weight"), &[hidden, inner]);
            };
            if !self.is_sparse(layer) {
                mlp("mlp", self.inner);
                continue;
            }
            let inner = self.expert_inner;
            if !stacked {
                (0..self.experts).for_each(|expert| mlp(&format!("mlp.experts.{expert}"), inner));
            }
            if self.family == Family::DeepseekV3 && self.shared > 0 {
                mlp("mlp.shared_experts", self.shared * inner);
            }
            if stacked {
                add("mlp.experts.gate_up_proj", &[self.experts, 2 * inner, hidden]);
                add("mlp.experts.down_proj", &[self.experts, hidden, inner]);
            }
            add("mlp.gate.weight", &[self.experts, hidden]);
            if self.family == Family::DeepseekV3 {
                add("mlp.gate.e_score_correction_bias", &[self.experts]);
            }
        }
        add("model.norm.weight".into(), &[hidden]);
        if !self.tied {
            add("lm_head.weight".into(), &[self.vocabulary, hidden]);
        }
        tensors
    }

    /// Whether vLLM can serve it at all on so many tensor-parallel ranks.
    pub(crate) fn divides(&self, tp: usize, expert_tp: usize) -> bool {
        let kv = self.kv_heads;
        let attention = self.heads.is_multiple_of(tp)
            && (self.family == Family::DeepseekV3 || kv.is_multiple_of(tp) || tp.is_multiple_of(kv));
        let shared = self.shared * self.expert_inner;
        let dense = (0..self.layers).all(|layer| self.is_sparse(layer)) || self.inner.is_multiple_of(tp);
        let sparse = !(0..self.layers).any(|layer| self.is_sparse(layer))
            || (self.expert_inner.is_multiple_of(expert_tp)
                && (self.family != Family::DeepseekV3 || shared.is_multiple_of(tp)));
        attention && dense && sparse && self.vocabulary.next_multiple_of(64).is_multiple_of(tp)
    }

    /// vLLM's `validate_fp8_block_shape`, layer by layer: what is split or merged must consist of whole blocks.
    pub(crate) fn blocks_stay_whole(&self, tp: usize, expert_tp: usize, [high, wide]: [usize; 2]) -> bool {
        // Outputs of each merged matrix on a rank, inputs on a rank.
        let split = |outputs: &[usize], inputs: usize, tp_rows: bool, tp_columns: bool| {
            let merged = outputs.len() > 1;
            let rows = if tp_rows && tp > 1 {
                outputs.iter().all(|rows| rows.is_multiple_of(high))
            } else {
                !merged || outputs[..outputs.len() - 1].iter().all(|rows| rows.is_multiple_of(high))
            };
            rows && (!tp_columns || tp == 1 || inputs.is_multiple_of(wide))
        };
        let &Small { hidden, heads, kv_heads, head_dim, .. } = self;
        let attention = if self.family == Family::DeepseekV3 {
            let q_rows = heads * (NOPE + ROPE) / tp;
            let q = match self.q_lora {
                Some(rank) => {
                    split(&[rank, KV_LORA + ROPE], hidden, false, false)
                        && split(&[q_rows], rank, true, false)
                }
                None => split(&[q_rows], hidden, true, false),
            };
            q && split(&[heads * (NOPE + V) / tp], KV_LORA, true, false)
                && split(&[hidden], heads * V / tp, false, true)
        } else {
            let kv = (kv_heads / tp).max(1) * head_dim;
            split(&[heads * head_dim / tp, kv, kv], hidden, true, false)
                && split(&[hidden], heads * head_dim / tp, false, true)
        };
        let mlp = |inner: usize| {
            split(&[inner / tp, inner / tp], hidden, true, false) && split(&[hidden], inner / tp, false, true)
        };
        let moe = |inner: usize| {
            let each = inner / expert_tp;
            each.is_multiple_of(high) && (expert_tp == 1 || each.is_multiple_of(wide))
        };
        attention
            && (0..self.layers).all(|layer| {
                if !self.is_sparse(layer) {
                    return mlp(self.inner);
                }
                let shared = self.shared * self.expert_inner;
                moe(self.expert_inner) && (self.family != Family::DeepseekV3 || shared == 0 || mlp(shared))
            })
    }

    /// The parameters of one rank as vLLM's weight loaders fill them, and which of them are linear layers.
    pub(crate) fn loaded(
        &self,
        source: &BTreeMap<String, Array>,
        place: &Place,
    ) -> BTreeMap<String, (Array, bool)> {
        let mut params = BTreeMap::new();
        let &Place { tp, tp_rank, .. } = place;
        let &Small { heads, kv_heads, head_dim, hidden, .. } = self;
        // A weight loader copies one shard into the rank's parameter, which is padding before.
        let words = self.vocabulary.next_multiple_of(64) / tp;
        let vocabulary = |name: &str| {
            let mut param = Array::filled(&[words, hidden], PAD);
            for row in 0..words {
                let word = tp_rank * words + row;
                if word < self.vocabulary {
                    let line = &source[name].data[word * hidden..(word + 1) * hidden];
                    param.data[row * hidden..(row + 1) * hidden].copy_from_slice(line);
                }
            }
            (param, false)
        };
        params.insert("model.embed_tokens.weight".to_owned(), vocabulary("model.embed_tokens.weight"));
        if !self.tied {
            params.insert("lm_head.weight".to_owned(), vocabulary("lm_head.weight"));
        }
        params.insert("model.norm.weight".to_owned(), (source["model.norm.weight"].clone(), false));
        for layer in 0..self.layers {
            let get = |name: &str| source[&format!("model.layers.{layer}.{name}.weight")].clone();
            let column = |name: &str| {
                let whole = get(name);
                let rows = whole.shape[0] / tp;
                whole.narrow(0, tp_rank * rows, rows)
            };
            let row = |name: &str| {
                let whole = get(name);
                let columns = whole.shape[1] / tp;
                whole.narrow(1, tp_rank * columns, columns)
            };
            let mut put = |name: &str, array: Array, linear: bool| {
                params.insert(format!("model.layers.{layer}.{name}"), (array, linear));
            };
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                put(&format!("{norm}.weight"), get(norm), false);
            }
            if self.family == Family::DeepseekV3 {
                let kv_a = get("self_attn.kv_a_proj_with_mqa");
                if self.q_lora.is_some() {
                    let fused = Array::concat(0, &[get("self_attn.q_a_proj"), kv_a]);
                    put("self_attn.fused_qkv_a_proj.weight", fused, true);
                    put("self_attn.q_a_layernorm.weight", get("self_attn.q_a_layernorm"), false);
                    put("self_attn.q_b_proj.weight", column("self_attn.q_b_proj"), true);
                } else {
                    put("self_attn.q_proj.weight", column("self_attn.q_proj"), true);
                    put("self_attn.kv_a_proj_with_mqa.weight", kv_a, true);
                }
                put("self_attn.kv_a_layernorm.weight", get("self_attn.kv_a_layernorm"), false);
                put("self_attn.kv_b_proj.weight", column("self_attn.kv_b_proj"), true);
            } else {
                // Head by head: which head a rank holds is what must not go wrong.
                let head = |name: &str, n: usize| get(name).narrow(0, n * head_dim, head_dim);
                let own = heads / tp;
                let queries = (0..own).map(|n| head("self_attn.q_proj", tp_rank * own + n));
                let kv: Vec<usize> = if tp > kv_heads {
                    vec![tp_rank * kv_heads / tp]
                } else {
                    (0..kv_heads).filter(|n| n / (kv_heads / tp) == tp_rank).collect()
                };
                let keys = kv.iter().map(|&n| head("self_attn.k_proj", n));
                let values = kv.iter().map(|&n| head("self_attn.v_proj", n));
                let fused: Vec<Array> = queries.chain(keys).chain(values).collect();
                put("self_attn.qkv_proj.weight", Array::concat(0, &fused), true);
                if self.family != Family::Llama {
                    put("self_attn.q_norm.weight", get("self_attn.q_norm"), false);
                    put("self_attn.k_norm.weight", get("self_attn.k_norm"), false);
                }
            }
            put("self_attn.o_proj.weight", row("self_attn.o_proj"), true);
            let mut mlp = |prefix: &str| {
                let (gate, up) = (format!("{prefix}.gate_proj"), format!("{prefix}.up_proj"));
                let fused = Array::concat(0, &[column(&gate), column(&up)]);
                put(&format!("{prefix}.gate_up_proj.weight"), fused, true);
                put(&format!("{prefix}.down_proj.weight"), row(&format!("{prefix}.down_proj")), true);
            };
            if !self.is_sparse(layer) {
                mlp("mlp");
                continue;
            }
            if self.family == Family::DeepseekV3 {
                if self.shared > 0 {
                    mlp("mlp.shared_experts");
                }
                let bias = "mlp.gate.e_score_correction_bias";
                put(bias, source[&format!("model.layers.{layer}.{bias}")].clone(), false);
            }
            put("mlp.gate.weight", get("mlp.gate"), false);
            let (parts, part) = place.expert_tp;
            let each = self.expert_inner / parts;
            let expert = |e: usize, projection: &str| {
                let name = format!("model.layers.{layer}.mlp.experts");
                match (source.get(&format!("{name}.{e}.{projection}.weight")), projection) {
                    (Some(tensor), _) => tensor.clone(),
                    (None, "down_proj") => source[&format!("{name}.down_proj")]
                        .narrow(0, e, 1)
                        .reshape(&[hidden, self.expert_inner]),
                    (None, _) => {
                        let first = if projection == "up_proj" { self.expert_inner } else { 0 };
                        let stack = source[&format!("{name}.gate_up_proj")].narrow(0, e, 1);
                        stack.narrow(1, first, self.expert_inner).reshape(&[self.expert_inner, hidden])
                    }
                }
            };
            let mut w13 = Vec::new();
            let mut w2 = Vec::new();
            for &e in &place.experts {
                let gate = expert(e, "gate_proj").narrow(0, part * each, each);
                let up = expert(e, "up_proj").narrow(0, part * each, each);
                w13.push(Array::concat(0, &[gate, up]).reshape(&[1, 2 * each, hidden]));
                let down = expert(e, "down_proj").narrow(1, part * each, each);
                w2.push(down.reshape(&[1, hidden, each]));
            }
            put("mlp.experts.w13_weight", Array::concat(0, &w13), true);
            put("mlp.experts.w2_weight", Array::concat(0, &w2), true);
        }
        params
    }
}
