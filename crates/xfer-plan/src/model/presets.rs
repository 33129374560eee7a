//! Built-in models: the fields of public `config.json` files that decide shapes, read like any other config.

use super::architecture::Architecture;
use super::config;
use super::error::ModelError;
use crate::error::shorten;

pub(crate) struct Preset {
    pub(crate) name: &'static str,
    config: &'static str,
}

pub(crate) const PRESETS: &[Preset] = &[
    Preset {
        name: "kimi-k2",
        config: r#"{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "torch_dtype": "bfloat16",
            "num_hidden_layers": 61, "hidden_size": 7168, "vocab_size": 163840, "num_attention_heads": 64,
            "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 384,
            "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1, "topk_method": "noaux_tc"}"#,
    },
    Preset {
        name: "deepseek-v3",
        config: r#"{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
            "num_hidden_layers": 61, "hidden_size": 7168, "vocab_size": 129280, "num_attention_heads": 128,
            "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
            "n_shared_experts": 1, "first_k_dense_replace": 3, "moe_layer_freq": 1, "topk_method": "noaux_tc",
            "num_nextn_predict_layers": 1}"#,
    },
    Preset {
        name: "qwen3-235b-a22b",
        config: r#"{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16",
            "num_hidden_layers": 94, "hidden_size": 4096, "vocab_size": 151936, "num_attention_heads": 64,
            "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 12288, "moe_intermediate_size": 1536,
            "num_experts": 128, "decoder_sparse_step": 1, "mlp_only_layers": []}"#,
    },
    Preset {
        name: "llama-3-70b",
        config: r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
            "num_hidden_layers": 80, "hidden_size": 8192, "vocab_size": 128256, "num_attention_heads": 64,
            "num_key_value_heads": 8, "intermediate_size": 28672}"#,
    },
    Preset {
        name: "qwen3-0.6b",
        config: r#"{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16",
            "num_hidden_layers": 28, "hidden_size": 1024, "vocab_size": 151936, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "tie_word_embeddings": true}"#,
    },
];

pub(crate) fn architecture(name: &str) -> Result<Architecture, ModelError> {
    let preset = PRESETS.iter().find(|preset| preset.name == name).ok_or_else(|| {
        let known: Vec<&str> = PRESETS.iter().map(|preset| preset.name).collect();
        ModelError::UnknownPreset { name: shorten(name), known: known.join(", ") }
    })?;
    Ok(Architecture { name: name.to_owned(), ..config::architecture(preset.config)? })
}
