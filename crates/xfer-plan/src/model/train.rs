//! Training layouts: which trainer owns which rows of which tensor.
//!
//! The rules are those of FSDP2, Megatron and DTensor. Sizes that do not divide are cut as `torch.chunk` cuts them:
//! the last ranks get less or nothing.

use std::fmt;
use std::str::FromStr;

use super::axes::{expect_gpus, sizes};
use super::error::ModelError;
use super::machine::{Arena, Machine, PIECES_MAX, REGION};
use super::spec::{Depth, Experts, ModelSpec, TensorCut, TensorSpec};
use crate::dtype::DType;
use crate::error::{LayoutError, shorten};
use crate::manifest::{SourcePiece, TrainerManifest};
use crate::mesh::{DeviceMesh, chunk};
use crate::tensor_box::TensorBox;

/// How a model is spread over training GPUs.
///
/// As text, `fsdp=16,pp=2,ep=8`: factors that are not named are 1. Ranks are numbered with `pp` slowest, then replicas,
/// then `ep`, then `fsdp`, and `tp` fastest.
///
/// - **pp**: layers are dealt to stages evenly, the first stages get one more where that does not divide. The embedding
///   is on the first stage, the last norm and the output projection on the last one.
/// - **replicas** (`hsdp=` or `dp=`): whole copies of a stage.
/// - **ep**: rank `i` owns the `i`-th part of the routed experts of its layers.
/// - **fsdp**: cuts dimension 0. Experts are cut over the `fsdp` ranks of their `ep` rank, everything else over all
///   `ep * fsdp` ranks of the stage.
/// - **tp**: column-parallel tensors and the vocabulary on dimension 0, row-parallel ones on dimension 1. FSDP cuts what
///   is left, as DTensor's `_StridedShard`.
///
/// ```
/// use xfer_plan::model::{Machine, ModelSpec, TrainLayout};
/// let layout: TrainLayout = "fsdp=4,pp=2".parse()?;
/// let trainers = layout.trainers(&ModelSpec::preset("qwen3-0.6b")?, &Machine::default())?;
/// assert_eq!(trainers.len(), 8);
/// assert_eq!(trainers[3].pieces[0].bounds.to_string(), "[113952..151936, 0..1024]");
/// # Ok::<(), xfer_plan::model::ModelError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrainLayout {
    /// Pipeline stages.
    pub pp: u32,
    /// Copies of each stage.
    pub replicas: u32,
    /// Parts of the routed experts.
    pub ep: u32,
    /// FSDP shards, per `ep` rank.
    pub fsdp: u32,
    /// Tensor-parallel parts.
    pub tp: u32,
    /// The element type in which trainers hold what the checkpoint has in the model's own type; `None` is that type.
    /// [`DType::F32`] where master weights are sent.
    pub dtype: Option<DType>,
}

impl Default for TrainLayout {
    /// One GPU.
    fn default() -> TrainLayout {
        TrainLayout { pp: 1, replicas: 1, ep: 1, fsdp: 1, tp: 1, dtype: None }
    }
}

impl FromStr for TrainLayout {
    type Err = ModelError;

    fn from_str(text: &str) -> Result<TrainLayout, ModelError> {
        let [fsdp, hsdp, tp, pp, ep, dp] = sizes(text, ["fsdp", "hsdp", "tp", "pp", "ep", "dp"])?;
        if hsdp > 1 && dp > 1 {
            let detail = "hsdp and dp both mean copies: give one of them".to_owned();
            return Err(ModelError::LayoutText { text: shorten(text), detail });
        }
        Ok(TrainLayout { pp, replicas: hsdp.max(dp), ep, fsdp, tp, dtype: None })
    }
}

impl fmt::Display for TrainLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let TrainLayout { pp, replicas, ep, fsdp, tp, .. } = self;
        write!(f, "pp={pp},dp={replicas},ep={ep},fsdp={fsdp},tp={tp}")
    }
}

/// A rank's place in the layout, and that of its tensors' owners.
struct Place {
    stage: u64,
    ep: u64,
    fsdp: u64,
    tp: u64,
}

impl TrainLayout {
    /// The same with another [`dtype`](TrainLayout::dtype).
    #[must_use]
    pub fn with_dtype(self, dtype: DType) -> TrainLayout {
        TrainLayout { dtype: Some(dtype), ..self }
    }

    fn mesh(&self) -> Result<DeviceMesh, ModelError> {
        let shape = [self.pp, self.replicas, self.ep, self.fsdp, self.tp].map(u64::from);
        DeviceMesh::new(&shape).map_err(|source| ModelError::Layout { name: self.to_string(), source })
    }

    /// Number of GPUs.
    ///
    /// # Errors
    /// When a factor is 0, or there are more than [`RANKS_MAX`](crate::limits::RANKS_MAX) ranks.
    pub fn ranks(&self) -> Result<u64, ModelError> {
        Ok(self.mesh()?.ranks())
    }

    /// Checks that the layout is for so many GPUs.
    ///
    /// # Errors
    /// When it is for another number; the message says for which.
    pub fn expect_gpus(&self, gpus: u64) -> Result<(), ModelError> {
        expect_gpus(self.to_string(), self.ranks()?, gpus)
    }

    /// What each trainer owns: one region, in which its pieces lie one after another, in the order of
    /// [`ModelSpec::tensors`]. A rank lists no empty pieces.
    ///
    /// # Errors
    /// When the model does not fit the layout, or there are too many pieces.
    pub fn trainers(&self, model: &ModelSpec, machine: &Machine) -> Result<Vec<TrainerManifest>, ModelError> {
        let mesh = self.mesh()?;
        let owned = self.by_stage_and_expert(model)?;
        let ranks_per_list = mesh.ranks() / owned.len().max(1) as u64;
        let pieces = owned.iter().map(|list| list.len() as u64 * ranks_per_list).sum::<u64>();
        if pieces > PIECES_MAX as u64 {
            return Err(ModelError::TooManyPieces { what: "pieces of tensors", max: PIECES_MAX });
        }
        let rails = machine.rails()?;
        let mut trainers = Vec::new();
        for rank in 0..mesh.ranks() {
            let Some([stage, _, ep, fsdp, tp]) =
                mesh.coordinates(rank).and_then(|at| <[u64; 5]>::try_from(at.as_slice()).ok())
            else {
                break; // every rank below `mesh.ranks()` has five coordinates
            };
            let place = Place { stage, ep, fsdp, tp };
            let mut arena = Arena::default();
            let mut pieces = Vec::new();
            let list = place.stage * u64::from(self.ep) + place.ep;
            for tensor in usize::try_from(list).ok().and_then(|list| owned.get(list)).into_iter().flatten() {
                for bounds in self.boxes(tensor, &place)? {
                    pieces.push(piece(tensor, self.dtype, bounds, &mut arena)?);
                }
            }
            let host = machine.host("train", rank)?;
            trainers.push(TrainerManifest { host, regions: arena.regions(), rails: rails.clone(), pieces });
        }
        Ok(trainers)
    }

    /// The tensors of each (stage, `ep` rank), stages slowest.
    fn by_stage_and_expert<'m>(&self, model: &'m ModelSpec) -> Result<Vec<Vec<&'m TensorSpec>>, ModelError> {
        let (pp, ep) = (u64::from(self.pp), u64::from(self.ep));
        let layers = u64::from(model.layers());
        if pp > layers.max(1) {
            let detail = format!("model `{}` has only {layers} layer(s) for its stages", model.name());
            return Err(ModelError::LayoutText { text: self.to_string(), detail });
        }
        if ep > 1 && model.experts() == 0 {
            let detail =
                format!("model `{}` has no routed experts: use fsdp or dp instead of ep", model.name());
            return Err(ModelError::LayoutText { text: self.to_string(), detail });
        }
        let mut owned = vec![Vec::new(); usize::try_from(pp * ep).unwrap_or(usize::MAX)]; // at most RANKS_MAX
        for tensor in model.tensors() {
            let stage = match tensor.depth {
                Depth::First => 0,
                Depth::Layer(layer) => stage_of(layer.into(), layers, pp),
                Depth::Last => pp - 1,
            };
            let (experts, owner) = match tensor.experts {
                Experts::None => (0, None),
                Experts::One(expert) => {
                    let experts = u64::from(model.experts());
                    (experts, Some(u64::from(expert) / (experts / ep).max(1)))
                }
                Experts::Stacked => (tensor.shape.first().copied().unwrap_or(0), None),
            };
            if !experts.is_multiple_of(ep) {
                let (name, what, factor) = (shorten(&tensor.name), "experts", "ep");
                return Err(ModelError::Indivisible { name, what, count: experts, factor, by: ep });
            }
            for rank in owner.map_or(0..ep, |owner| owner..owner + 1) {
                let list = usize::try_from(stage * ep + rank).ok().and_then(|list| owned.get_mut(list));
                list.into_iter().for_each(|list| list.push(tensor));
            }
        }
        Ok(owned)
    }

    /// The parts of a tensor that a rank owns, none of them empty: two where tensor parallelism cuts gate and up of a
    /// fused tensor.
    fn boxes(&self, tensor: &TensorSpec, place: &Place) -> Result<Vec<TensorBox>, ModelError> {
        let in_tensor = |source| ModelError::Layout { name: shorten(&tensor.name), source };
        let whole = TensorBox::whole(&tensor.shape).map_err(in_tensor)?;
        let [ep, fsdp, tp] = [self.ep, self.fsdp, self.tp].map(u64::from);
        let stacked = tensor.experts == Experts::Stacked;
        let dim = match tensor.cut {
            TensorCut::Replicated => None,
            TensorCut::Column | TensorCut::Vocabulary | TensorCut::GateUp => Some(usize::from(stacked)),
            TensorCut::Row => Some(1 + usize::from(stacked)),
        };
        let mut boxes = vec![whole.clone()];
        if let Some(dim) = dim.filter(|_| tp > 1) {
            let halves = if tensor.cut == TensorCut::GateUp { 2 } else { 1 };
            let no_dim = LayoutError::NoSuchDim { dim, rank: whole.rank() };
            let (_, len) = whole.extent(dim).ok_or(no_dim).map_err(in_tensor)?;
            if !len.is_multiple_of(halves) {
                let name = shorten(&tensor.name);
                let (what, factor) = ("rows of gate and up", "gate and up");
                return Err(ModelError::Indivisible { name, what, count: len, factor, by: halves });
            }
            let half = len / halves;
            let (start, len) = chunk(half, tp, place.tp);
            let cut = |n| whole.with_dim(dim, n * half + start, len);
            boxes = (0..halves).map(cut).collect::<Result<_, _>>().map_err(in_tensor)?;
        }
        let Some((_, len)) = whole.extent(0) else { return Ok(boxes) }; // a scalar: every rank has it
        let (shards, index) = match tensor.experts {
            Experts::None => (ep * fsdp, place.ep * fsdp + place.fsdp),
            Experts::One(_) | Experts::Stacked => (fsdp, place.fsdp),
        };
        if stacked {
            let (start, len) = chunk(len, ep, place.ep);
            boxes = boxes
                .iter()
                .map(|bounds| bounds.with_dim(0, start, len))
                .collect::<Result<_, _>>()
                .map_err(in_tensor)?;
        }
        fsdp_shard(&boxes, dim == Some(0), shards, index).map_err(in_tensor)
    }
}

/// The part `bounds` of a tensor, next in a trainer's memory. `dtype` as [`TrainLayout::dtype`].
pub(crate) fn piece(
    tensor: &TensorSpec,
    dtype: Option<DType>,
    bounds: TensorBox,
    arena: &mut Arena,
) -> Result<SourcePiece, ModelError> {
    // What a checkpoint keeps in single precision, no trainer rounds.
    let dtype = dtype.filter(|_| tensor.dtype != DType::F32).unwrap_or(tensor.dtype);
    let (name, shape) = (tensor.name.clone(), tensor.shape.clone());
    let mut piece = SourcePiece { tensor: name, dtype, shape, bounds, region: REGION, offset: 0 };
    let bytes = piece.bytes();
    piece.offset = bytes.and_then(|bytes| arena.place(bytes)).ok_or_else(|| {
        let source = LayoutError::BoxOverflow { start: 0, len: bytes.unwrap_or(u64::MAX) };
        ModelError::Layout { name: shorten(&tensor.name), source }
    })?;
    Ok(piece)
}

/// The stage of a layer: the first `layers % stages` stages have one layer more than the others.
fn stage_of(layer: u64, layers: u64, stages: u64) -> u64 {
    let (each, more) = (layers / stages, layers % stages);
    let longer = more * (each + 1);
    if layer < longer { layer / (each + 1) } else { more + (layer - longer) / each.max(1) }
}

/// Shard `index` of the tensor that a rank would hold without FSDP: `boxes`, one above the other when `joined`, side by
/// side otherwise.
fn fsdp_shard(
    boxes: &[TensorBox],
    joined: bool,
    shards: u64,
    index: u64,
) -> Result<Vec<TensorBox>, LayoutError> {
    let rows = |bounds: &TensorBox| bounds.extent(0).unwrap_or_default();
    let all = boxes.iter().map(|bounds| rows(bounds).1);
    let held = if joined { all.sum() } else { all.max().unwrap_or(0) };
    let (first, len) = chunk(held, shards, index);
    let end = first + len;
    let (mut above, mut owned) = (0, Vec::new());
    for bounds in boxes {
        let (start, len) = rows(bounds);
        let (from, to) = (first.clamp(above, above + len), end.clamp(above, above + len));
        let shard = bounds.with_dim(0, start + (from - above), to - from)?;
        if !shard.is_empty() {
            owned.push(shard);
        }
        if joined {
            above += len;
        }
    }
    Ok(owned)
}
