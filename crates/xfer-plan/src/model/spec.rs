//! A model's source tensors: what a training job owns, tensor by tensor, before any layout.
//!
//! Names and shapes are those of Hugging Face checkpoints. Nothing here says which rank holds what.

use serde::{Deserialize, Serialize};

use super::architecture::{Architecture, Module};
use super::config;
use super::error::ModelError;
use super::presets::{self, PRESETS};
use crate::dtype::DType;
use crate::error::shorten;
use crate::limits::TENSORS_MAX;
use crate::tensor_box::volume;

/// Where in the model a tensor is. Pipeline stages are cut by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Depth {
    /// Before the layers: the embedding.
    First,
    /// In this layer, counted from 0.
    Layer(u32),
    /// After the layers: the last norm and the output projection.
    Last,
}

/// Which routed experts a tensor belongs to. Expert parallelism cuts by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Experts {
    /// None: all tokens use it.
    None,
    /// One, counted from 0 in its layer.
    One(u32),
    /// All of its layer, stacked along dimension 0.
    Stacked,
}

/// What tensor parallelism does to a tensor. In a stack of experts, dimensions are those of one expert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TensorCut {
    /// Nothing: each rank holds all of it.
    #[default]
    Replicated,
    /// Dimension 0, the outputs of a linear layer.
    Column,
    /// Dimension 1, its inputs.
    Row,
    /// Dimension 0, in words of the vocabulary. Inference engines pad it.
    Vocabulary,
    /// Dimension 0 in two halves, gate above up, each cut by itself.
    GateUp,
}

/// One source tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its element type in the checkpoint.
    pub dtype: DType,
    /// Its global shape.
    pub shape: Vec<u64>,
    /// Where in the model it is.
    pub depth: Depth,
    /// Whose it is.
    pub experts: Experts,
    /// How tensor parallelism cuts it.
    pub cut: TensorCut,
}

/// How the weights of routed experts are stored at the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpertForm {
    /// Three tensors an expert: `experts.E.gate_proj.weight` and `up_proj` `[I, H]`, `down_proj` `[H, I]`.
    #[default]
    Separate,
    /// Two a layer: `experts.gate_up_proj` `[E, 2 I, H]` and `experts.down_proj` `[E, H, I]`.
    Stacked,
}

/// A model: its source tensors, embedding first.
///
/// The multi-token-prediction layers of DeepSeek-V3 (`num_nextn_predict_layers`) are left out: inference engines load
/// them as a model of their own.
///
/// ```
/// use xfer_plan::model::ModelSpec;
/// let model = ModelSpec::preset("qwen3-0.6b")?;
/// assert_eq!((model.layers(), model.hidden(), model.parameters()), (28, 1024, 596_049_920));
/// # Ok::<(), xfer_plan::model::ModelError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelSpec {
    name: String,
    layers: u32,
    hidden: u64,
    experts: u32,
    parameters: u64,
    tensors: Vec<TensorSpec>,
    architecture: Option<(Architecture, ExpertForm)>,
}

impl ModelSpec {
    /// The names of the built-in models.
    pub fn preset_names() -> impl Iterator<Item = &'static str> {
        PRESETS.iter().map(|preset| preset.name)
    }

    /// A built-in model, from the values of its public `config.json`.
    ///
    /// # Errors
    /// When there is no such preset; the message lists all.
    pub fn preset(name: &str) -> Result<ModelSpec, ModelError> {
        ModelSpec::of(presets::architecture(name)?, ExpertForm::Separate)
    }

    /// The model of a Hugging Face `config.json`. Known are Llama, Qwen3, Qwen3-MoE, DeepSeek-V3 and Kimi-K2. A
    /// `quantization_config` is ignored: what is trained is not quantised.
    ///
    /// # Errors
    /// When the architecture is not known, or a field is missing or out of bounds.
    pub fn from_config(config: &str) -> Result<ModelSpec, ModelError> {
        ModelSpec::of(config::architecture(config)?, ExpertForm::Separate)
    }

    /// A model of any tensors. It has no known architecture, so no engine's format can be derived from it.
    ///
    /// # Errors
    /// When there are too many of them, of their elements, or of their layers or experts.
    pub fn from_tensors(name: &str, tensors: Vec<TensorSpec>) -> Result<ModelSpec, ModelError> {
        let name = name.to_owned();
        if tensors.len() > TENSORS_MAX {
            return Err(ModelError::TooManyTensors { name: shorten(&name), max: TENSORS_MAX });
        }
        let mut parameters = 0u64;
        let (mut layers, mut experts) = (0, 0);
        for tensor in &tensors {
            let elements = volume(tensor.shape.iter().copied());
            parameters = elements
                .and_then(|elements| parameters.checked_add(elements))
                .ok_or_else(|| ModelError::TooManyParameters { name: shorten(&name) })?;
            if let Depth::Layer(layer) = tensor.depth {
                layers = layers.max(u64::from(layer) + 1);
            }
            experts = experts.max(match tensor.experts {
                Experts::None => 0,
                Experts::One(expert) => u64::from(expert) + 1,
                Experts::Stacked => tensor.shape.first().copied().unwrap_or(0),
            });
        }
        let count = |count: u64| u32::try_from(count).ok().filter(|&count| count as usize <= TENSORS_MAX);
        let (Some(layers), Some(experts)) = (count(layers), count(experts)) else {
            return Err(ModelError::TooManyTensors { name: shorten(&name), max: TENSORS_MAX });
        };
        Ok(ModelSpec { name, layers, hidden: 0, experts, parameters, tensors, architecture: None })
    }

    pub(super) fn of(architecture: Architecture, form: ExpertForm) -> Result<ModelSpec, ModelError> {
        let mut tensors = Vec::new();
        for module in architecture.modules() {
            match module {
                Module::Param(param) => tensors.extend(param.parts.into_iter().map(|part| TensorSpec {
                    name: part.tensor,
                    dtype: param.dtype,
                    shape: part.shape,
                    depth: param.depth,
                    experts: Experts::None,
                    cut: part.cut.at_source(),
                })),
                Module::Experts(experts) => experts.source_tensors(form, &mut tensors),
            }
        }
        let mut model = ModelSpec::from_tensors(&architecture.name, tensors)?;
        (model.layers, model.hidden) = (architecture.layers, architecture.hidden);
        model.architecture = Some((architecture, form));
        Ok(model)
    }

    /// The same model with its experts stored in this form.
    ///
    /// # Errors
    /// When the model's architecture is not known.
    pub fn with_experts(self, form: ExpertForm) -> Result<ModelSpec, ModelError> {
        ModelSpec::of(self.known_architecture()?.0.clone(), form)
    }

    /// Its name: that of the preset, or the architecture's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of layers.
    pub fn layers(&self) -> u32 {
        self.layers
    }

    /// Hidden size; 0 where the architecture is not known.
    pub fn hidden(&self) -> u64 {
        self.hidden
    }

    /// Routed experts a layer; 0 where there are none.
    pub fn experts(&self) -> u32 {
        self.experts
    }

    /// Number of elements of all tensors together.
    pub fn parameters(&self) -> u64 {
        self.parameters
    }

    /// All source tensors, embedding first.
    pub fn tensors(&self) -> &[TensorSpec] {
        &self.tensors
    }

    pub(crate) fn known_architecture(&self) -> Result<(&Architecture, ExpertForm), ModelError> {
        let known = self.architecture.as_ref().map(|(architecture, form)| (architecture, *form));
        known.ok_or_else(|| ModelError::UnknownArchitecture {
            name: shorten(&self.name),
            known: config::KNOWN.to_owned(),
        })
    }
}
