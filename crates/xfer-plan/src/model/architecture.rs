//! Known architectures, as one table of modules: which checkpoint tensors there are, and which parameter of the
//! inference engine each of them becomes a part of.
//!
//! Both sides of a transfer are derived from this table, so that they cannot disagree. Names on the engine's side are
//! those of vLLM's modules. It must hold nothing about ranks.

use super::spec::{Depth, ExpertForm, Experts, TensorCut, TensorSpec};
use crate::dtype::DType;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Architecture {
    pub(crate) name: String,
    pub(crate) layers: u32,
    pub(crate) hidden: u64,
    pub(crate) vocabulary: u64,
    /// The output projection is the embedding.
    pub(crate) tied: bool,
    pub(crate) dtype: DType,
    pub(crate) attention: Attention,
    /// Of the MLP of layers without routed experts; 0 where there are none.
    pub(crate) inner: u64,
    pub(crate) moe: Option<Moe>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Attention {
    /// Query heads in groups, each of which shares one key/value head.
    Grouped { heads: u64, kv_heads: u64, head_dim: u64, qk_norm: bool },
    /// Multi-head latent attention.
    Latent { heads: u64, q_lora: Option<u64>, kv_lora: u64, nope: u64, rope: u64, v: u64 },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Moe {
    pub(crate) experts: u64,
    pub(crate) inner: u64,
    /// Of the shared experts together; 0 where there are none.
    pub(crate) shared_inner: u64,
    pub(crate) correction_bias: bool,
    /// Per layer, whether it has routed experts.
    pub(crate) sparse: Vec<bool>,
}

/// What a layer, or an end of the model, is made of.
#[derive(Clone, Debug)]
pub(crate) enum Module {
    Param(Param),
    Experts(ExpertModule),
}

/// One parameter of the engine: its parts lie one above the other.
#[derive(Clone, Debug)]
pub(crate) struct Param {
    pub(crate) name: String,
    pub(crate) depth: Depth,
    pub(crate) dtype: DType,
    /// Whether it is a linear layer that FP8 engines quantise.
    pub(crate) linear: bool,
    pub(crate) parts: Vec<Part>,
}

/// A checkpoint tensor, and what a rank of the engine takes of it.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) tensor: String,
    pub(crate) shape: Vec<u64>,
    pub(crate) cut: Cut,
}

/// How a tensor-parallel engine cuts a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    Whole,
    /// Dimension 0 consists of so many units, none of which is ever cut.
    Rows {
        units: u64,
        what: &'static str,
    },
    /// Dimension 1.
    Columns {
        units: u64,
        what: &'static str,
    },
    /// Dimension 0, by key/value heads, which are repeated where there are more ranks than heads.
    KeyValueHeads {
        heads: u64,
    },
    /// Dimension 0, padded.
    Vocabulary,
}

impl Cut {
    /// What training does to the same tensor.
    pub(crate) fn at_source(self) -> TensorCut {
        match self {
            Cut::Whole => TensorCut::Replicated,
            Cut::Rows { .. } | Cut::KeyValueHeads { .. } => TensorCut::Column,
            Cut::Columns { .. } => TensorCut::Row,
            Cut::Vocabulary => TensorCut::Vocabulary,
        }
    }
}

/// The routed experts of one layer.
#[derive(Clone, Debug)]
pub(crate) struct ExpertModule {
    /// `model.layers.N.mlp.experts`
    pub(crate) name: String,
    pub(crate) depth: Depth,
    pub(crate) dtype: DType,
    pub(crate) experts: u64,
    pub(crate) inner: u64,
    pub(crate) hidden: u64,
}

pub(crate) const GATE_UP_STACKED: &str = "gate_up_proj";
pub(crate) const DOWN_STACKED: &str = "down_proj";

impl ExpertModule {
    /// One expert's tensor: `gate_proj`, `up_proj` or `down_proj`.
    pub(crate) fn tensor(&self, expert: u32, projection: &str) -> String {
        format!("{}.{expert}.{projection}.weight", self.name)
    }

    /// All experts' tensor: [`GATE_UP_STACKED`] or [`DOWN_STACKED`].
    pub(crate) fn stacked(&self, projection: &str) -> String {
        format!("{}.{projection}", self.name)
    }

    pub(crate) fn source_tensors(&self, form: ExpertForm, out: &mut Vec<TensorSpec>) {
        let &ExpertModule { depth, dtype, experts: count, inner, hidden, .. } = self;
        let mut add = |name, shape, experts, cut| {
            out.push(TensorSpec { name, dtype, shape, depth, experts, cut });
        };
        match form {
            ExpertForm::Separate => {
                for expert in (0..).zip(0..count).map(|(expert, _)| expert) {
                    let experts = Experts::One(expert);
                    for projection in ["gate_proj", "up_proj"] {
                        let name = self.tensor(expert, projection);
                        add(name, vec![inner, hidden], experts, TensorCut::Column);
                    }
                    add(self.tensor(expert, "down_proj"), vec![hidden, inner], experts, TensorCut::Row);
                }
            }
            ExpertForm::Stacked => {
                let (gate_up, down) = (self.stacked(GATE_UP_STACKED), self.stacked(DOWN_STACKED));
                add(gate_up, vec![count, 2 * inner, hidden], Experts::Stacked, TensorCut::GateUp);
                add(down, vec![count, hidden, inner], Experts::Stacked, TensorCut::Row);
            }
        }
    }
}

const HEADS: &str = "attention heads";
const INNER: &str = "rows of the MLP";

impl Architecture {
    /// All modules, embedding first.
    pub(crate) fn modules(&self) -> Vec<Module> {
        let mut modules = vec![self.vocabulary("model.embed_tokens.weight", Depth::First)];
        for layer in 0..self.layers {
            let prefix = format!("model.layers.{layer}");
            let depth = Depth::Layer(layer);
            modules.push(self.norm(format!("{prefix}.input_layernorm.weight"), depth, self.hidden));
            self.attention(&format!("{prefix}.self_attn"), depth, &mut modules);
            modules.push(self.norm(format!("{prefix}.post_attention_layernorm.weight"), depth, self.hidden));
            match &self.moe {
                Some(moe) if moe.sparse.get(layer as usize) == Some(&true) => {
                    self.experts(moe, &format!("{prefix}.mlp"), depth, &mut modules);
                }
                _ => self.mlp(&format!("{prefix}.mlp"), depth, self.inner, &mut modules),
            }
        }
        modules.push(self.norm("model.norm.weight".into(), Depth::Last, self.hidden));
        if !self.tied {
            modules.push(self.vocabulary("lm_head.weight", Depth::Last));
        }
        modules
    }

    fn vocabulary(&self, name: &str, depth: Depth) -> Module {
        let shape = vec![self.vocabulary, self.hidden];
        self.single(name.into(), depth, shape, Cut::Vocabulary, false)
    }

    fn norm(&self, name: String, depth: Depth, len: u64) -> Module {
        self.single(name, depth, vec![len], Cut::Whole, false)
    }

    /// A parameter of one tensor of the same name.
    fn single(&self, name: String, depth: Depth, shape: Vec<u64>, cut: Cut, linear: bool) -> Module {
        let parts = vec![Part { tensor: name.clone(), shape, cut }];
        Module::Param(Param { name, depth, dtype: self.dtype, linear, parts })
    }

    /// A linear layer fused from several: `(tensor, shape, cut)` each.
    fn fused(&self, prefix: &str, name: &str, depth: Depth, parts: &[(&str, [u64; 2], Cut)]) -> Module {
        let part = |&(tensor, shape, cut): &(&str, [u64; 2], Cut)| Part {
            tensor: format!("{prefix}.{tensor}.weight"),
            shape: shape.to_vec(),
            cut,
        };
        Module::Param(Param {
            name: format!("{prefix}.{name}.weight"),
            depth,
            dtype: self.dtype,
            linear: true,
            parts: parts.iter().map(part).collect(),
        })
    }

    fn linear(&self, prefix: &str, name: &str, depth: Depth, shape: [u64; 2], cut: Cut) -> Module {
        self.fused(prefix, name, depth, &[(name, shape, cut)])
    }

    fn attention(&self, prefix: &str, depth: Depth, modules: &mut Vec<Module>) {
        let hidden = self.hidden;
        match self.attention {
            Attention::Grouped { heads, kv_heads, head_dim, qk_norm } => {
                let by_heads = Cut::Rows { units: heads, what: HEADS };
                let by_kv_heads = Cut::KeyValueHeads { heads: kv_heads };
                let q = ("q_proj", [heads * head_dim, hidden], by_heads);
                let k = ("k_proj", [kv_heads * head_dim, hidden], by_kv_heads);
                let v = ("v_proj", [kv_heads * head_dim, hidden], by_kv_heads);
                modules.push(self.fused(prefix, "qkv_proj", depth, &[q, k, v]));
                if qk_norm {
                    for norm in ["q_norm", "k_norm"] {
                        modules.push(self.norm(format!("{prefix}.{norm}.weight"), depth, head_dim));
                    }
                }
                let cut = Cut::Columns { units: heads, what: HEADS };
                modules.push(self.linear(prefix, "o_proj", depth, [hidden, heads * head_dim], cut));
            }
            Attention::Latent { heads, q_lora, kv_lora, nope, rope, v } => {
                let by_heads = Cut::Rows { units: heads, what: HEADS };
                let q_rows = heads * (nope + rope);
                let kv_a = ("kv_a_proj_with_mqa", [kv_lora + rope, hidden], Cut::Whole);
                if let Some(q_lora) = q_lora {
                    let q_a = ("q_a_proj", [q_lora, hidden], Cut::Whole);
                    modules.push(self.fused(prefix, "fused_qkv_a_proj", depth, &[q_a, kv_a]));
                    modules.push(self.norm(format!("{prefix}.q_a_layernorm.weight"), depth, q_lora));
                    modules.push(self.linear(prefix, "q_b_proj", depth, [q_rows, q_lora], by_heads));
                } else {
                    modules.push(self.linear(prefix, "q_proj", depth, [q_rows, hidden], by_heads));
                    modules.push(self.fused(prefix, "kv_a_proj_with_mqa", depth, &[kv_a]));
                }
                modules.push(self.norm(format!("{prefix}.kv_a_layernorm.weight"), depth, kv_lora));
                modules.push(self.linear(
                    prefix,
                    "kv_b_proj",
                    depth,
                    [heads * (nope + v), kv_lora],
                    by_heads,
                ));
                let cut = Cut::Columns { units: heads, what: HEADS };
                modules.push(self.linear(prefix, "o_proj", depth, [hidden, heads * v], cut));
            }
        }
    }

    fn mlp(&self, prefix: &str, depth: Depth, inner: u64, modules: &mut Vec<Module>) {
        let rows = Cut::Rows { units: inner, what: INNER };
        let (gate, up) = (("gate_proj", [inner, self.hidden], rows), ("up_proj", [inner, self.hidden], rows));
        modules.push(self.fused(prefix, "gate_up_proj", depth, &[gate, up]));
        let columns = Cut::Columns { units: inner, what: INNER };
        modules.push(self.linear(prefix, "down_proj", depth, [self.hidden, inner], columns));
    }

    fn experts(&self, moe: &Moe, prefix: &str, depth: Depth, modules: &mut Vec<Module>) {
        let &Moe { experts, inner, shared_inner, correction_bias, .. } = moe;
        let shape = vec![experts, self.hidden];
        modules.push(self.single(format!("{prefix}.gate.weight"), depth, shape, Cut::Whole, false));
        if correction_bias {
            let tensor = format!("{prefix}.gate.e_score_correction_bias");
            let parts = vec![Part { tensor: tensor.clone(), shape: vec![experts], cut: Cut::Whole }];
            // Routing compares sums of it: checkpoints and engines keep it in single precision.
            let dtype = DType::F32;
            modules.push(Module::Param(Param { name: tensor, depth, dtype, linear: false, parts }));
        }
        let (name, hidden, dtype) = (format!("{prefix}.experts"), self.hidden, self.dtype);
        modules.push(Module::Experts(ExpertModule { name, depth, dtype, experts, inner, hidden }));
        if shared_inner > 0 {
            self.mlp(&format!("{prefix}.shared_experts"), depth, shared_inner, modules);
        }
    }
}
