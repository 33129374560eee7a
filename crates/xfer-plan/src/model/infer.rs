//! Inference layouts: which receiver has which parameters, and where.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use super::architecture::Module;
use super::axes::{expect_gpus, sizes};
use super::error::ModelError;
use super::kernel::{KernelFormat, KernelParam, in_param};
use super::machine::{Arena, Machine, PIECES_MAX, REGION};
use super::spec::{Depth, ModelSpec};
use crate::error::LayoutError;
use crate::limits::RANKS_MAX;
use crate::manifest::{DestinationParam, ReceiverManifest};
use crate::tensor_box::volume;
use crate::transform::BlockQuant;

/// How a model is spread over inference GPUs.
///
/// As text, `tp=8`, `ep=32,replicas=4` or `tp=4,ep=8`: factors that are not named are 1. Ranks are numbered with
/// replicas slowest, then data-parallel groups, and `tp` fastest.
///
/// - **tp**: attention, MLPs and the vocabulary are cut; without `ep`, so is each routed expert.
/// - **ep**: a replica has `ep` GPUs, each with an equal share of the routed experts, whole. They form `ep / tp`
///   data-parallel groups, each of which holds everything else, cut by `tp`: with `ep` alone, every GPU has all of it.
/// - **replicas**: whole copies.
///
/// ```
/// use xfer_plan::model::{InferLayout, Machine, ModelSpec};
/// let layout: InferLayout = "tp=2,replicas=2".parse()?;
/// let receivers = layout.receivers(&ModelSpec::preset("qwen3-0.6b")?, &Machine::default())?;
/// let qkv = receivers[1].params.iter().find(|param| param.name.contains("qkv_proj"));
/// assert_eq!(qkv.map(|param| param.shape.as_slice()), Some(&[2048, 1024][..]));
/// # Ok::<(), xfer_plan::model::ModelError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InferLayout {
    /// Tensor-parallel parts.
    pub tp: u32,
    /// Expert-parallel ranks, a multiple of `tp`; 1 is none.
    pub ep: u32,
    /// Copies of the whole.
    pub replicas: u32,
    /// How linear layers of attention, MLPs and experts are quantised, if they are. Embeddings, norms, routers and the
    /// output projection stay as they are. Each quantised parameter has another one of the same name and `_scale_inv`.
    pub fp8: Option<BlockQuant>,
    /// The experts of each `ep` rank, in the order of its memory. All ranks have equally many; an expert may be on
    /// several ranks, and must be on one. `None`: each rank has the next `experts / ep`.
    pub experts: Option<Vec<Vec<u32>>>,
}

impl Default for InferLayout {
    /// One GPU.
    fn default() -> InferLayout {
        InferLayout { tp: 1, ep: 1, replicas: 1, fp8: None, experts: None }
    }
}

impl FromStr for InferLayout {
    type Err = ModelError;

    fn from_str(text: &str) -> Result<InferLayout, ModelError> {
        let [tp, ep, replicas] = sizes(text, ["tp", "ep", "replicas"])?;
        Ok(InferLayout { tp, ep, replicas, ..InferLayout::default() })
    }
}

impl fmt::Display for InferLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let InferLayout { tp, ep, replicas, .. } = self;
        write!(f, "replicas={replicas},ep={ep},tp={tp}")
    }
}

impl InferLayout {
    /// The same with quantised linear layers.
    #[must_use]
    pub fn with_fp8(self, quant: BlockQuant) -> InferLayout {
        InferLayout { fp8: Some(quant), ..self }
    }

    /// The same with these [`experts`](InferLayout::experts) per `ep` rank.
    #[must_use]
    pub fn with_experts(self, experts: Vec<Vec<u32>>) -> InferLayout {
        InferLayout { experts: Some(experts), ..self }
    }

    /// Ranks of one copy.
    fn ranks_per_replica(&self) -> Result<u64, ModelError> {
        let wrong = |detail: String| ModelError::LayoutText { text: self.to_string(), detail };
        let [tp, ep] = [self.tp, self.ep].map(u64::from);
        if tp == 0 || ep == 0 || self.replicas == 0 {
            return Err(wrong("every factor must be at least 1".to_owned()));
        }
        if ep == 1 {
            return Ok(tp);
        }
        if !ep.is_multiple_of(tp) {
            return Err(wrong(format!(
                "ep={ep} must be a multiple of tp={tp}: it counts all GPUs of a copy"
            )));
        }
        Ok(ep)
    }

    /// Number of GPUs.
    ///
    /// # Errors
    /// When a factor is 0, `ep` is not a multiple of `tp`, or there are more than
    /// [`RANKS_MAX`] ranks.
    pub fn ranks(&self) -> Result<u64, ModelError> {
        let ranks = self.ranks_per_replica()? * u64::from(self.replicas); // each below 2^32
        if ranks > RANKS_MAX as u64 {
            let detail = format!("{ranks} ranks: at most {RANKS_MAX} are supported");
            return Err(ModelError::LayoutText { text: self.to_string(), detail });
        }
        Ok(ranks)
    }

    /// Checks that the layout is for so many GPUs.
    ///
    /// # Errors
    /// When it is for another number; the message says for which.
    pub fn expect_gpus(&self, gpus: u64) -> Result<(), ModelError> {
        expect_gpus(self.to_string(), self.ranks()?, gpus)
    }

    /// What each receiver wants: one region, in which its parameters lie one after another. A parameter of a layer has
    /// a smaller [`priority`](DestinationParam::priority) than those of later layers.
    ///
    /// # Errors
    /// When the model's architecture is not known, or it cannot be cut this way.
    pub fn receivers(
        &self,
        model: &ModelSpec,
        machine: &Machine,
    ) -> Result<Vec<ReceiverManifest>, ModelError> {
        let (architecture, form) = model.known_architecture()?;
        let (ranks, ranks_per_replica) = (self.ranks()?, self.ranks_per_replica()?);
        let modules = architecture.modules();
        let experts = self.experts_per_rank(model.experts())?;
        self.expect_few(&modules, &experts, ranks)?;
        let (fp8, cut_experts) = (self.fp8, self.ep == 1);
        let format = |index| KernelFormat { tp: self.tp.into(), index, fp8, form, cut_experts };
        // What is not a routed expert, per tensor-parallel rank and module: data-parallel groups share it.
        let dense = (0..self.tp).map(|index| {
            let of = |module: &Module| match module {
                Module::Param(param) => format(index.into()).param(param),
                Module::Experts(_) => Ok(Vec::new()),
            };
            modules.iter().map(of).collect()
        });
        let dense: Vec<Vec<Vec<KernelParam>>> = dense.collect::<Result<_, ModelError>>()?;
        let rails = machine.rails()?;
        let mut replica = Vec::new();
        for (rank, dense) in (0..ranks_per_replica).zip(dense.iter().cycle()) {
            let own = experts.get(usize::try_from(rank).unwrap_or(usize::MAX)).or(experts.first());
            let mut memory = Memory { layers: architecture.layers, ..Memory::default() };
            for (module, dense) in modules.iter().zip(dense) {
                dense.iter().try_for_each(|param| memory.place(param.clone()))?;
                if let (Module::Experts(module), Some(own)) = (module, own) {
                    let params = format(rank % u64::from(self.tp)).experts(module, own)?;
                    params.into_iter().try_for_each(|param| memory.place(param))?;
                }
            }
            let Memory { arena, params, .. } = memory;
            let (host, rails) = (String::new(), rails.clone());
            replica.push(ReceiverManifest { host, regions: arena.regions(), rails, params });
        }
        let copies = (0..self.replicas).flat_map(|_| &replica).zip(0..);
        copies
            .map(|(receiver, rank)| {
                Ok(ReceiverManifest { host: machine.host("infer", rank)?, ..receiver.clone() })
            })
            .collect()
    }

    /// The experts of each rank of a copy: one list for all where there is no expert parallelism.
    fn experts_per_rank(&self, experts: u32) -> Result<Vec<Vec<u32>>, ModelError> {
        let wrong = |detail: String| Err(ModelError::Experts { detail });
        let ep = self.ep;
        if ep > 1 && experts == 0 {
            let detail = "the model has no routed experts: leave ep out".to_owned();
            return Err(ModelError::LayoutText { text: self.to_string(), detail });
        }
        let Some(lists) = &self.experts else {
            if !experts.is_multiple_of(ep) {
                let (name, what, factor) = ("mlp.experts".to_owned(), "experts", "ep");
                return Err(ModelError::Indivisible {
                    name,
                    what,
                    count: experts.into(),
                    factor,
                    by: ep.into(),
                });
            }
            let each = experts / ep;
            return Ok((0..ep).map(|rank| (rank * each..(rank + 1) * each).collect()).collect());
        };
        if ep == 1 {
            return wrong("it needs expert parallelism: give an ep above 1".to_owned());
        }
        if lists.len() != ep as usize {
            return wrong(format!("{} lists for ep={ep}: give one per rank", lists.len()));
        }
        let each = lists.first().map_or(0, Vec::len);
        let mut missing: BTreeSet<u32> = (0..experts).collect();
        for (rank, list) in lists.iter().enumerate() {
            if list.len() != each {
                let found = list.len();
                return wrong(format!(
                    "rank {rank} has {found} experts but rank 0 has {each}: make them equal"
                ));
            }
            for &expert in list {
                if expert >= experts {
                    return wrong(format!("rank {rank} has expert {expert} of {experts}, counted from 0"));
                }
                missing.remove(&expert);
            }
        }
        match missing.first() {
            Some(expert) => wrong(format!("expert {expert} is on no rank: put each on at least one")),
            None => Ok(lists.clone()),
        }
    }

    /// Refuses what would take too much memory, before it takes any.
    fn expect_few(&self, modules: &[Module], experts: &[Vec<u32>], ranks: u64) -> Result<(), ModelError> {
        let own = experts.first().map_or(0, Vec::len) as u64;
        let parts = modules.iter().map(|module| match module {
            Module::Param(param) => param.parts.len() as u64,
            Module::Experts(_) => own.saturating_mul(3),
        });
        let parts = parts.fold(0u64, u64::saturating_add);
        if parts.saturating_mul(ranks) > PIECES_MAX as u64 {
            return Err(ModelError::TooManyPieces { what: "parts of parameters", max: PIECES_MAX });
        }
        Ok(())
    }
}

/// The memory of one receiver.
#[derive(Default)]
struct Memory {
    layers: u32,
    arena: Arena,
    params: Vec<DestinationParam>,
}

impl Memory {
    /// The one place where a parameter gets its address and its priority.
    fn place(&mut self, param: KernelParam) -> Result<(), ModelError> {
        let KernelParam { name, depth, dtype, shape, map } = param;
        let bytes = volume(shape.iter().copied()).and_then(|elements| elements.checked_mul(dtype.bytes()));
        let Some(offset) = bytes.and_then(|bytes| self.arena.place(bytes)) else {
            let source = LayoutError::BoxOverflow { start: 0, len: bytes.unwrap_or(u64::MAX) };
            return Err(in_param(&name)(source));
        };
        let priority = priority(depth, self.layers);
        self.params.push(DestinationParam { name, dtype, shape, region: REGION, offset, map, priority });
        Ok(())
    }
}

/// The place of a parameter in the order of sending: the embedding is 0, then come the layers.
pub(crate) fn priority(depth: Depth, layers: u32) -> u32 {
    match depth {
        Depth::First => 0,
        Depth::Layer(layer) => layer.saturating_add(1),
        Depth::Last => layers.saturating_add(1),
    }
}
