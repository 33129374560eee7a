//! Jobs in words: a model, its trainers and its receivers as JSON, for whatever the presets do not cover.
//!
//! `docs/job-spec.md` teaches the form, `docs/job-spec.schema.json` is its schema. A key that is not known is refused,
//! at every level: a misspelt option must not pass as its default.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::axes::{axes, expect_gpus};
use super::config;
use super::error::{ModelError, SYNTAX_CHARS_MAX};
use super::infer::InferLayout;
use super::job_maps::{Axis, Maker};
use super::machine::{Arena, Machine, PIECES_MAX};
use super::names::{Pattern, expand, fill};
use super::spec::{Depth, ExpertForm, Experts, ModelSpec, TensorCut, TensorSpec};
use super::train::{TrainLayout, piece};
use crate::dtype::DType;
use crate::error::{shorten, shorten_to};
use crate::limits::{RANKS_MAX, TENSORS_MAX};
use crate::manifest::{Manifest, PlanOptions, ReceiverManifest, TrainerManifest};
use crate::mesh::{DeviceMesh, Placement, shard_box};
use crate::transform::BlockQuant;

/// Bytes of a job file. A tensor-by-tensor description of Kimi-K2 without any range has some 10 MB.
const JOB_BYTES_MAX: usize = 64 << 20;

/// Tensors times meshes that are tried against each other: seconds of work.
const MATCHES_MAX: usize = 1 << 24;

/// A transfer, described.
///
/// ```
/// use xfer_plan::model::JobSpec;
/// let job = JobSpec::from_json(r#"{
///     "model": {"preset": "qwen3-0.6b"},
///     "trainers": {"layout": "fsdp=4", "gpus": 4},
///     "receivers": {"layout": "tp=2", "gpus": 2}
/// }"#)?;
/// assert_eq!(job.manifest()?.trainers.len(), 4);
/// # Ok::<(), xfer_plan::model::ModelError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// What is transferred.
    pub model: ModelJob,
    /// Who has it.
    pub trainers: TrainersJob,
    /// Who wants it.
    pub receivers: ReceiversJob,
    /// How transfers are cut.
    #[serde(default)]
    pub options: PlanOptions,
}

/// A model: exactly one of `preset`, `config` and `tensors`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelJob {
    /// One of [`ModelSpec::preset_names`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// The contents of a Hugging Face `config.json`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config: Option<serde_json::Map<String, serde_json::Value>>,
    /// All source tensors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tensors: Option<Vec<TensorJob>>,
    /// How the source stores routed experts. Only with `preset` and `config`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_form: Option<ExpertForm>,
}

/// Source tensors of one shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorJob {
    /// A name, with variables in braces. `{layer}` and `{expert}` say where the tensor belongs.
    pub name: String,
    /// The values of each variable: from the first number to below the second.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ranges: BTreeMap<String, [u32; 2]>,
    /// Element type.
    pub dtype: DType,
    /// Global shape.
    pub shape: Vec<u64>,
    /// How tensor parallelism cuts it.
    #[serde(default)]
    pub cut: TensorCut,
    /// Whether dimension 0 counts the experts of the layer.
    #[serde(default)]
    pub stacked_experts: bool,
    /// Where it is if it has no `{layer}`.
    #[serde(default)]
    pub end: End,
}

/// An end of the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// Before the layers.
    #[default]
    First,
    /// After the layers.
    Last,
}

/// Trainers: exactly one of `layout` and `meshes`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainersJob {
    /// A [`TrainLayout`] as text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layout: Option<String>,
    /// How many there are. Needed with `meshes`; with `layout` it is checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpus: Option<u64>,
    /// Which ranks hold which tensors. A tensor may be on several meshes, and must be on one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub meshes: Option<Vec<MeshJob>>,
    /// The element type in which trainers hold the model, as [`TrainLayout::dtype`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<DType>,
    /// What they run on.
    pub machine: Machine,
}

/// Tensors on a device mesh.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeshJob {
    /// The names of the tensors: `*` stands for any text, a variable in braces for a number.
    pub tensors: String,
    /// The values of variables; one without a range stands for any number.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ranges: BTreeMap<String, [u32; 2]>,
    /// Ranks per mesh dimension.
    pub mesh: DeviceMesh,
    /// The trainer that is rank 0 of the mesh.
    #[serde(default)]
    pub first_rank: u64,
    /// One per mesh dimension.
    pub placements: Vec<Placement>,
}

/// Receivers: those of a known engine, or any with `parameters`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiversJob {
    /// An [`InferLayout`] as text; with `parameters`, names of your own, the slowest first.
    pub layout: String,
    /// How many there are; checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpus: Option<u64>,
    /// As [`InferLayout::fp8`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fp8: Option<BlockQuant>,
    /// As [`InferLayout::experts`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<Vec<Vec<u32>>>,
    /// All parameters of each receiver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Vec<ParamJob>>,
    /// What they run on.
    #[serde(default)]
    pub machine: Machine,
}

/// Parameters that are made alike.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParamJob {
    /// A name, with variables in braces. `{layer}` decides when it is sent.
    pub name: String,
    /// The values of each variable.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ranges: BTreeMap<String, [u32; 2]>,
    /// Element type, that of the map's result.
    pub dtype: DType,
    /// What it is made of.
    pub map: MapJob,
    /// Where it is if it has no `{layer}`.
    #[serde(default)]
    pub end: End,
}

/// A [`ParamMap`](crate::ParamMap) for every rank at once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum MapJob {
    /// A source tensor; its name may have variables.
    Tensor(String),
    /// A part.
    Slice {
        /// Of what.
        of: Box<MapJob>,
        /// First index per dimension.
        start: Vec<u64>,
        /// Length per dimension.
        len: Vec<u64>,
    },
    /// This rank's part of a dimension, with `torch.chunk`'s sizes.
    Shard {
        /// Of what.
        of: Box<MapJob>,
        /// The dimension.
        dim: usize,
        /// The factor of the layout that cuts it.
        by: String,
    },
    /// Several side by side.
    Concat {
        /// Along which dimension.
        dim: usize,
        /// What, in this order.
        parts: Vec<MapJob>,
        /// Repeats the parts for each value of a variable.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        each: Option<Each>,
    },
    /// Longer at the end of a dimension; what is added is never written.
    Pad {
        /// What.
        of: Box<MapJob>,
        /// The dimension.
        dim: usize,
        /// Its length afterwards.
        len: u64,
    },
    /// The same elements in another shape. Only outermost.
    View {
        /// Of what.
        of: Box<MapJob>,
        /// The shape.
        shape: Vec<u64>,
    },
    /// In another element type.
    Cast {
        /// What.
        of: Box<MapJob>,
        /// Into what.
        to: DType,
    },
    /// A whole tensor, quantised.
    Quantize {
        /// The tensor.
        of: Box<MapJob>,
        /// How.
        quant: BlockQuant,
    },
    /// The scales of a whole tensor.
    Scales {
        /// The tensor.
        of: Box<MapJob>,
        /// How it is quantised.
        quant: BlockQuant,
    },
}

/// A variable, and the values that it takes on a rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Each {
    /// Its name.
    pub variable: String,
    /// From the first number to below the second.
    pub range: [u32; 2],
    /// The factor of the layout among whose ranks the values are divided evenly. Without it, each rank has all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

impl JobSpec {
    /// Reads a job file.
    ///
    /// # Errors
    /// When it is not JSON of this form; the message has line and column.
    pub fn from_json(text: &str) -> Result<JobSpec, ModelError> {
        const WHAT: &str = "the job file";
        if text.len() > JOB_BYTES_MAX {
            return Err(ModelError::TooLong { what: WHAT, bytes: text.len(), max: JOB_BYTES_MAX });
        }
        // serde_json refuses depths above 128, so no recursion here is deeper.
        serde_json::from_str(text).map_err(|error| ModelError::Syntax {
            what: WHAT,
            detail: shorten_to(&error.to_string(), SYNTAX_CHARS_MAX),
        })
    }

    /// The manifest of this transfer, validated.
    ///
    /// # Errors
    /// When something is unknown, contradicts itself or exceeds a limit.
    pub fn manifest(&self) -> Result<Manifest, ModelError> {
        let model = self.model.spec()?;
        let trainers = self.trainers.manifests(&model)?;
        let receivers = self.receivers.manifests(&model)?;
        let manifest = Manifest { trainers, receivers, options: self.options };
        manifest.validate()?;
        Ok(manifest)
    }
}

pub(crate) fn wrong(at: impl Into<String>, detail: impl Into<String>) -> ModelError {
    ModelError::Job { at: at.into(), detail: detail.into() }
}

impl ModelJob {
    /// The model's tensors.
    ///
    /// # Errors
    /// When it is not exactly one of preset, config and tensors, or that one is wrong.
    pub fn spec(&self) -> Result<ModelSpec, ModelError> {
        let known = match (&self.preset, &self.config, &self.tensors) {
            (Some(name), None, None) => ModelSpec::preset(name)?,
            (None, Some(fields), None) => ModelSpec::of(config::from_fields(fields)?, ExpertForm::default())?,
            (None, None, Some(tensors)) => {
                if self.expert_form.is_some() {
                    return Err(wrong(
                        "model",
                        "expert_form goes with preset or config: tensors say it already",
                    ));
                }
                return of_tensors(tensors);
            }
            _ => return Err(wrong("model", "give exactly one of preset, config and tensors")),
        };
        match self.expert_form {
            None | Some(ExpertForm::Separate) => Ok(known),
            Some(form) => known.with_experts(form),
        }
    }
}

fn of_tensors(jobs: &[TensorJob]) -> Result<ModelSpec, ModelError> {
    let mut tensors = Vec::new();
    for (nth, job) in jobs.iter().enumerate() {
        let at = || format!("model.tensors[{nth}] `{}`", shorten(&job.name));
        let max = TENSORS_MAX - tensors.len().min(TENSORS_MAX);
        for values in expand(&job.name, &job.ranges, max).map_err(|detail| wrong(at(), detail))? {
            let value = |name: &str| values.iter().find(|(other, _)| *other == name).map(|&(_, value)| value);
            let experts = match (value("expert"), job.stacked_experts) {
                (None, false) => Experts::None,
                (None, true) => Experts::Stacked,
                (Some(expert), false) => Experts::One(expert),
                (Some(_), true) => return Err(wrong(at(), "a stack of experts has no {expert}")),
            };
            let name = fill(&job.name, &values).map_err(|detail| wrong(at(), detail))?;
            let depth = job.end.depth(value("layer"));
            let (dtype, shape, cut) = (job.dtype, job.shape.clone(), job.cut);
            tensors.push(TensorSpec { name, dtype, shape, depth, experts, cut });
        }
    }
    let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    names.sort_unstable();
    for pair in names.windows(2) {
        if let [first, second] = pair
            && first == second
        {
            return Err(wrong("model.tensors", format!("`{}` is declared twice", shorten(first))));
        }
    }
    ModelSpec::from_tensors("of this job", tensors)
}

impl End {
    pub(crate) fn depth(self, layer: Option<u32>) -> Depth {
        match (layer, self) {
            (Some(layer), _) => Depth::Layer(layer),
            (None, End::First) => Depth::First,
            (None, End::Last) => Depth::Last,
        }
    }
}

impl TrainersJob {
    fn manifests(&self, model: &ModelSpec) -> Result<Vec<TrainerManifest>, ModelError> {
        match (&self.layout, &self.meshes) {
            (Some(layout), None) => {
                let layout = TrainLayout { dtype: self.dtype, ..layout.parse()? };
                if let Some(gpus) = self.gpus {
                    layout.expect_gpus(gpus)?;
                }
                layout.trainers(model, &self.machine)
            }
            (None, Some(meshes)) => self.on_meshes(model, meshes),
            _ => Err(wrong("trainers", "give exactly one of layout and meshes")),
        }
    }

    fn on_meshes(&self, model: &ModelSpec, meshes: &[MeshJob]) -> Result<Vec<TrainerManifest>, ModelError> {
        let Some(gpus @ 1..) = self.gpus.filter(|&gpus| gpus <= RANKS_MAX as u64) else {
            return Err(wrong("trainers", format!("with meshes, give gpus, from 1 to {RANKS_MAX}")));
        };
        if model.tensors().len().saturating_mul(meshes.len()) > MATCHES_MAX {
            return Err(wrong("trainers", "too many meshes for so many tensors: use wider patterns"));
        }
        let mut patterns = Vec::with_capacity(meshes.len());
        for (nth, job) in meshes.iter().enumerate() {
            let at = format!("trainers.meshes[{nth}] `{}`", shorten(&job.tensors));
            if job.first_rank.checked_add(job.mesh.ranks()).is_none_or(|end| end > gpus) {
                let (ranks, first) = (job.mesh.ranks(), job.first_rank);
                return Err(wrong(
                    at,
                    format!("{ranks} rank(s) from {first} on are more than the {gpus} gpus"),
                ));
            }
            patterns.push(Pattern::new(&job.tensors, &job.ranges).map_err(|detail| wrong(at, detail))?);
        }
        let mut ranks: Vec<_> = (0..gpus).map(|_| (Arena::default(), Vec::new())).collect();
        let mut total = 0;
        for tensor in model.tensors() {
            let mut found = false;
            for (job, _) in meshes.iter().zip(&patterns).filter(|(_, pattern)| pattern.matches(&tensor.name))
            {
                found = true;
                total += job.mesh.ranks();
                if total > PIECES_MAX as u64 {
                    return Err(ModelError::TooManyPieces { what: "pieces of tensors", max: PIECES_MAX });
                }
                let first = usize::try_from(job.first_rank).unwrap_or(usize::MAX);
                for (rank_in_mesh, (arena, pieces)) in (0..job.mesh.ranks()).zip(ranks.iter_mut().skip(first))
                {
                    let bounds = shard_box(&tensor.shape, &job.mesh, &job.placements, rank_in_mesh)
                        .map_err(|source| ModelError::Layout { name: shorten(&tensor.name), source })?;
                    if !bounds.is_empty() {
                        pieces.push(piece(tensor, self.dtype, bounds, arena)?);
                    }
                }
            }
            if !found {
                let name = shorten(&tensor.name);
                return Err(wrong(
                    "trainers.meshes",
                    format!("tensor `{name}` is on none of them: add a mesh"),
                ));
            }
        }
        let rails = self.machine.rails()?;
        ranks
            .into_iter()
            .zip(0..)
            .map(|((arena, pieces), rank)| {
                let (host, regions) = (self.machine.host("train", rank)?, arena.regions());
                Ok(TrainerManifest { host, regions, rails: rails.clone(), pieces })
            })
            .collect()
    }
}

impl ReceiversJob {
    fn manifests(&self, model: &ModelSpec) -> Result<Vec<ReceiverManifest>, ModelError> {
        let Some(parameters) = &self.parameters else {
            let (fp8, experts) = (self.fp8, self.experts.clone());
            let layout = InferLayout { fp8, experts, ..self.layout.parse()? };
            if let Some(gpus) = self.gpus {
                layout.expect_gpus(gpus)?;
            }
            return layout.receivers(model, &self.machine);
        };
        if self.fp8.is_some() || self.experts.is_some() {
            return Err(wrong("receivers", "fp8 and experts go without parameters: maps say it already"));
        }
        let axes = axes(&self.layout)?;
        let ranks: u64 = axes.iter().map(|&(_, size)| u64::from(size)).product(); // at most RANKS_MAX
        if let Some(gpus) = self.gpus {
            expect_gpus(self.layout.clone(), ranks, gpus)?;
        }
        let shapes: BTreeMap<&str, &[u64]> =
            model.tensors().iter().map(|tensor| (tensor.name.as_str(), tensor.shape.as_slice())).collect();
        let mut budget = PIECES_MAX;
        (0..ranks)
            .map(|rank| {
                let mut rest = rank;
                let mut place = Vec::with_capacity(axes.len());
                for &(name, size) in axes.iter().rev() {
                    let size = u64::from(size);
                    place.push(Axis { name, size, index: rest % size });
                    rest /= size;
                }
                let mut maker = Maker { place, shapes: &shapes, budget };
                let (mut arena, mut params) = (Arena::default(), Vec::new());
                for (nth, job) in parameters.iter().enumerate() {
                    let at = || format!("receivers.parameters[{nth}] `{}`", shorten(&job.name));
                    let all = expand(&job.name, &job.ranges, TENSORS_MAX);
                    for values in all.map_err(|detail| wrong(at(), detail))? {
                        params.push(job.param(values, &mut maker, &mut arena, model.layers(), &at)?);
                    }
                }
                budget = maker.budget;
                let (host, rails) = (self.machine.host("infer", rank)?, self.machine.rails()?);
                Ok(ReceiverManifest { host, regions: arena.regions(), rails, params })
            })
            .collect()
    }
}
