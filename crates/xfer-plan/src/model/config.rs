//! Reading a Hugging Face `config.json`.
//!
//! Only fields that decide shapes are read. A field whose value means another set of tensors is refused, never
//! ignored: a wrong layout would go unnoticed until the model talks nonsense.

use serde_json::{Map, Value};

use super::architecture::{Architecture, Attention, Moe};
use super::error::{ModelError, SYNTAX_CHARS_MAX};
use crate::dtype::DType;
use crate::error::{shorten, shorten_to};
use crate::limits::TENSORS_MAX;

/// Bytes of a `config.json`. Real ones stay under 10 kB.
const CONFIG_BYTES_MAX: usize = 1 << 20;

/// Layers of a model. The deepest in use have a few hundred.
const LAYERS_MAX: u64 = 1 << 12;

/// Any other size: hidden, inner, vocabulary, heads, experts. The largest in use are vocabularies of some 260 000.
const SIZE_MAX: u64 = 1 << 24;

/// What can be read, for messages.
pub(crate) const KNOWN: &str =
    "LlamaForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM and DeepseekV3ForCausalLM (also as kimi_k2)";

/// Tensors of a layer besides those of its experts, at most.
const LAYER_TENSORS_MAX: u64 = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Llama,
    Qwen3,
    Qwen3Moe,
    DeepseekV3,
}

impl Family {
    fn of_class(name: &str) -> Option<Family> {
        match name {
            "LlamaForCausalLM" => Some(Family::Llama),
            "Qwen3ForCausalLM" => Some(Family::Qwen3),
            "Qwen3MoeForCausalLM" => Some(Family::Qwen3Moe),
            "DeepseekV3ForCausalLM" => Some(Family::DeepseekV3),
            _ => None,
        }
    }

    fn of_model_type(name: &str) -> Option<Family> {
        match name {
            "llama" => Some(Family::Llama),
            "qwen3" => Some(Family::Qwen3),
            "qwen3_moe" => Some(Family::Qwen3Moe),
            "deepseek_v3" | "kimi_k2" => Some(Family::DeepseekV3),
            _ => None,
        }
    }
}

pub(crate) fn architecture(text: &str) -> Result<Architecture, ModelError> {
    const WHAT: &str = "config.json";
    if text.len() > CONFIG_BYTES_MAX {
        return Err(ModelError::TooLong { what: WHAT, bytes: text.len(), max: CONFIG_BYTES_MAX });
    }
    let fields: Map<String, Value> = serde_json::from_str(text).map_err(|error| ModelError::Syntax {
        what: WHAT,
        detail: shorten_to(&error.to_string(), SYNTAX_CHARS_MAX),
    })?;
    from_fields(&fields)
}

pub(crate) fn from_fields(fields: &Map<String, Value>) -> Result<Architecture, ModelError> {
    let config = Config(fields);
    let (name, family) = config.family()?;
    for field in ["attention_bias", "mlp_bias"] {
        if config.flag(field)? {
            return Err(bad(field, &Value::Bool(true), "layers with a bias are not known here"));
        }
    }
    let layers = config.number("num_hidden_layers", LAYERS_MAX)?;
    let attention = if family == Family::DeepseekV3 { config.latent()? } else { config.grouped(family)? };
    let moe = match family {
        Family::Llama | Family::Qwen3 => None,
        Family::Qwen3Moe => Some(config.qwen3_moe(layers)?),
        Family::DeepseekV3 => Some(config.deepseek_moe(layers)?),
    };
    let dense = moe.as_ref().is_none_or(|moe| moe.sparse.contains(&false));
    let architecture = Architecture {
        name,
        layers: u32::try_from(layers).unwrap_or(u32::MAX), // at most LAYERS_MAX
        hidden: config.size("hidden_size")?,
        vocabulary: config.size("vocab_size")?,
        tied: config.flag("tie_word_embeddings")?,
        dtype: config.dtype()?,
        attention,
        inner: if dense { config.size("intermediate_size")? } else { 0 },
        moe,
    };
    let experts = architecture.moe.as_ref().map_or(0, |moe| moe.experts);
    // Both factors are bounded, so this cannot overflow.
    if layers * (experts * 3 + LAYER_TENSORS_MAX) > TENSORS_MAX as u64 {
        return Err(ModelError::TooManyTensors { name: shorten(&architecture.name), max: TENSORS_MAX });
    }
    Ok(architecture)
}

fn bad(field: &'static str, value: &Value, expected: impl Into<String>) -> ModelError {
    ModelError::BadField { field, value: shorten(&value.to_string()), expected: expected.into() }
}

struct Config<'a>(&'a Map<String, Value>);

impl Config<'_> {
    /// `None` where it is absent or null.
    fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn optional_number(&self, field: &'static str, min: u64, max: u64) -> Result<Option<u64>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64() {
            Some(number) if (min..=max).contains(&number) => Ok(Some(number)),
            _ => Err(bad(field, value, format!("it must be a whole number from {min} to {max}"))),
        }
    }

    fn number(&self, field: &'static str, max: u64) -> Result<u64, ModelError> {
        self.optional_number(field, 1, max)?.ok_or(ModelError::MissingField { field })
    }

    fn size(&self, field: &'static str) -> Result<u64, ModelError> {
        self.number(field, SIZE_MAX)
    }

    /// `false` where it is absent, as in all known architectures.
    fn flag(&self, field: &'static str) -> Result<bool, ModelError> {
        let Some(value) = self.get(field) else { return Ok(false) };
        value.as_bool().ok_or_else(|| bad(field, value, "it must be true or false"))
    }

    fn text(&self, field: &'static str) -> Result<Option<&str>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| bad(field, value, "it must be a string"))
    }

    /// By class and by model type, which must agree where both are given.
    fn family(&self) -> Result<(String, Family), ModelError> {
        let class = match self.get("architectures") {
            None => None,
            Some(value) => match value.as_array().map(Vec::as_slice) {
                Some([Value::String(class)]) => Some(class.as_str()),
                _ => return Err(bad("architectures", value, "it must be a list of one class")),
            },
        };
        let model_type = self.text("model_type")?;
        let unknown =
            |name: &str| ModelError::UnknownArchitecture { name: shorten(name), known: KNOWN.to_owned() };
        let by_class =
            class.map(|class| Family::of_class(class).ok_or_else(|| unknown(class))).transpose()?;
        let by_type =
            model_type.map(|name| Family::of_model_type(name).ok_or_else(|| unknown(name))).transpose()?;
        let name = model_type.or(class).ok_or(ModelError::MissingField { field: "architectures" })?;
        match (by_class, by_type) {
            (Some(class), Some(by_type)) if class != by_type => {
                let value = Value::String(name.to_owned());
                Err(bad("model_type", &value, "`architectures` names another model; correct one of them"))
            }
            (Some(family), _) | (None, Some(family)) => Ok((name.to_owned(), family)),
            (None, None) => Err(ModelError::MissingField { field: "architectures" }),
        }
    }

    fn dtype(&self) -> Result<DType, ModelError> {
        for field in ["dtype", "torch_dtype"] {
            if let Some(name) = self.text(field)? {
                return match name {
                    "bfloat16" => Ok(DType::BF16),
                    "float16" => Ok(DType::F16),
                    "float32" => Ok(DType::F32),
                    _ => {
                        let value = Value::String(name.to_owned());
                        Err(bad(field, &value, "it must be bfloat16, float16 or float32"))
                    }
                };
            }
        }
        Ok(DType::BF16)
    }

    fn grouped(&self, family: Family) -> Result<Attention, ModelError> {
        let heads = self.size("num_attention_heads")?;
        let kv_heads = self.optional_number("num_key_value_heads", 1, SIZE_MAX)?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("it must divide the {heads} attention heads");
            return Err(bad("num_key_value_heads", &Value::from(kv_heads), expected));
        }
        let head_dim = match self.optional_number("head_dim", 1, SIZE_MAX)? {
            Some(head_dim) => head_dim,
            None if family == Family::Llama => {
                let hidden = self.size("hidden_size")?;
                if !hidden.is_multiple_of(heads) {
                    let expected = format!("without `head_dim` it must be a multiple of the {heads} heads");
                    return Err(bad("hidden_size", &Value::from(hidden), expected));
                }
                hidden / heads
            }
            None => return Err(ModelError::MissingField { field: "head_dim" }),
        };
        Ok(Attention::Grouped { heads, kv_heads, head_dim, qk_norm: family != Family::Llama })
    }

    fn latent(&self) -> Result<Attention, ModelError> {
        Ok(Attention::Latent {
            heads: self.size("num_attention_heads")?,
            q_lora: self.optional_number("q_lora_rank", 1, SIZE_MAX)?,
            kv_lora: self.size("kv_lora_rank")?,
            nope: self.size("qk_nope_head_dim")?,
            rope: self.size("qk_rope_head_dim")?,
            v: self.size("v_head_dim")?,
        })
    }

    fn qwen3_moe(&self, layers: u64) -> Result<Moe, ModelError> {
        let step = self.optional_number("decoder_sparse_step", 1, LAYERS_MAX)?.unwrap_or(1);
        let dense: Vec<u64> = match self.get("mlp_only_layers") {
            None => Vec::new(),
            Some(value) => value
                .as_array()
                .and_then(|layers| layers.iter().map(Value::as_u64).collect())
                .ok_or_else(|| bad("mlp_only_layers", value, "it must be a list of layers"))?,
        };
        let dense: std::collections::BTreeSet<u64> = dense.into_iter().collect();
        let sparse = |layer: u64| (layer + 1).is_multiple_of(step) && !dense.contains(&layer);
        Ok(Moe {
            experts: self.size("num_experts")?,
            inner: self.size("moe_intermediate_size")?,
            shared_inner: 0,
            correction_bias: false,
            sparse: (0..layers).map(sparse).collect(),
        })
    }

    fn deepseek_moe(&self, layers: u64) -> Result<Moe, ModelError> {
        if let Some(method) = self.text("topk_method")?
            && method != "noaux_tc"
        {
            let value = Value::String(method.to_owned());
            return Err(bad("topk_method", &value, "only noaux_tc is known, which has a correction bias"));
        }
        let first = self.optional_number("first_k_dense_replace", 0, LAYERS_MAX)?.unwrap_or(0);
        let step = self.optional_number("moe_layer_freq", 1, LAYERS_MAX)?.unwrap_or(1);
        let inner = self.size("moe_intermediate_size")?;
        let shared = self.optional_number("n_shared_experts", 0, SIZE_MAX)?.unwrap_or(0);
        let sparse = |layer: u64| layer >= first && layer.is_multiple_of(step);
        Ok(Moe {
            experts: self.size("n_routed_experts")?,
            inner,
            shared_inner: shared * inner, // both at most SIZE_MAX
            correction_bias: true,
            sparse: (0..layers).map(sparse).collect(),
        })
    }
}
