//! The destination layout: what one rank of a tensor-parallel inference engine holds, in the kernel format of vLLM.
//!
//! The rules go by name. `q`, `k` and `v` become `qkv_proj`, `gate` and `up` become `gate_up_proj`, each the parts of one
//! rank on top of each other; column-parallel layers are cut on dimension 0, row-parallel ones on dimension 1,
//! embeddings on the vocabulary; norms and whatever has no rule are copied to every rank. It must never guess in
//! silence: [`Layout`] says on display which rule each tensor got, and what cannot be cut rightly is an error.
//!
//! Attention is cut by whole heads: a rank gets its share of the query heads and the key/value heads that those read, so
//! key/value heads are repeated where there are more ranks than heads. The head counts come from `config.json`; without
//! one from the lengths of `q_norm` and `k_norm`; without those, rows are cut evenly where queries and keys have equally
//! many, and anything else is refused. Sizes that do not divide are cut like `torch.chunk` does: the last ranks get less
//! or nothing. The vocabulary is not padded.

mod fp8;
mod rules;

use std::collections::BTreeMap;
use std::fmt;

use xfer_plan::{BlockQuant, DType, DeviceMesh, ParamMap, Placement, TensorBox, shard_box};

use self::rules::{Fusion, Role, fusion_of, is_fused, module_of, role_of, sibling};
use crate::checkpoint::{HeadCounts, TensorInfo};

/// Why a model has no layout.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// Not a rank of this engine.
    #[error("no rank {rank} in tensor parallelism of {tp}")]
    NoRank {
        /// The rank.
        rank: u32,
        /// How many ranks there are.
        tp: u32,
    },
    /// Only some of the tensors that are fused to one parameter are there.
    #[error("`{param}` is fused from {parts}; the checkpoint has only {found:?}")]
    Incomplete {
        /// The fused parameter.
        param: String,
        /// What it needs.
        parts: &'static str,
        /// What there is.
        found: Vec<String>,
    },
    /// Tensors that are fused differ in more than their rows.
    #[error("`{param}`: cannot put `{tensor}` ({dtype} {shape:?}) below `{first}`: other dtype or row shape")]
    Unequal {
        /// The fused parameter.
        param: String,
        /// The tensor that does not fit.
        tensor: String,
        /// Its dtype.
        dtype: DType,
        /// Its shape.
        shape: Vec<u64>,
        /// The first tensor of the parameter.
        first: String,
    },
    /// The name asks for more dimensions than the tensor has.
    #[error("`{tensor}` of shape {shape:?} has no dimension {dim} to cut, which its name asks for")]
    NoDim {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// The dimension.
        dim: usize,
    },
    /// The head counts do not fit the tensor.
    #[error(
        "`{tensor}` of shape {shape:?} has no {heads} heads on dimension {dim}; is config.json this model's?"
    )]
    Heads {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// The dimension that has the heads.
        dim: usize,
        /// How many heads it should have.
        heads: u64,
    },
    /// Query heads and key heads have different lengths, so the rows mean something else.
    #[error("`{param}`: query heads of {query} rows, key heads of {key}; this attention is not understood")]
    HeadLengths {
        /// The fused parameter.
        param: String,
        /// Rows of one query head.
        query: u64,
        /// Rows of one key head.
        key: u64,
    },
    /// Grouped-query attention, and nothing tells the size of a head.
    #[error(
        "`{tensor}`: the number of attention heads is unknown; put the model's config.json beside the checkpoint"
    )]
    HeadsUnknown {
        /// The query projection.
        tensor: String,
    },
    /// The checkpoint itself has a fused tensor: its parts cannot be told.
    #[error(
        "`{tensor}` is fused already and its parts are not known: only a tensor parallelism of 1 can take it"
    )]
    AlreadyFused {
        /// The tensor.
        tensor: String,
    },
    /// Two parameters of the same name.
    #[error("two parameters are named `{param}`")]
    Duplicate {
        /// The name.
        param: String,
    },
    /// A box that cannot be.
    #[error("`{tensor}`: {source}")]
    Box {
        /// The tensor.
        tensor: String,
        /// Why.
        source: xfer_plan::LayoutError,
    },
}

/// One parameter of one rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalParam {
    /// Its name in the engine.
    pub name: String,
    /// The type of its elements.
    pub dtype: DType,
    /// Its sizes on this rank; with a 0 where the rank has nothing of it.
    pub shape: Vec<u64>,
    /// How it is made of the checkpoint's tensors.
    pub map: ParamMap,
}

impl LocalParam {
    /// How many bytes it has on this rank.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.shape.iter().fold(self.dtype.bytes(), |bytes, &size| bytes.saturating_mul(size))
    }
}

/// The layout of all ranks. Its display says, line by line, which rule made which parameters.
#[derive(Debug, Clone)]
pub struct Layout {
    tp: u32,
    params: Vec<Param>,
}

#[derive(Debug, Clone)]
struct Param {
    name: String,
    rule: String,
    parts: Vec<Part>,
    /// How it is quantised, if it is.
    quant: Option<BlockQuant>,
}

/// A source tensor and how it is cut.
#[derive(Debug, Clone)]
struct Part {
    tensor: TensorInfo,
    cut: Cut,
}

#[derive(Debug, Clone, Copy)]
enum Cut {
    Whole,
    /// Equal parts of a dimension, as `torch.chunk` cuts.
    Even {
        dim: usize,
    },
    /// A share of the query heads, which lie along the dimension.
    Query {
        dim: usize,
        heads: HeadCounts,
    },
    /// The key/value heads that the rank's query heads read. They lie along dimension 0.
    KeyValue {
        heads: HeadCounts,
    },
}

impl Layout {
    /// Lays out these tensors for `tp` ranks. `heads` as in the model's `config.json`, if there is one.
    ///
    /// # Errors
    /// When a tensor's shape does not fit its name, part of a fused parameter is missing, or attention cannot be cut
    /// rightly.
    pub fn new(tensors: &[TensorInfo], heads: Option<HeadCounts>, tp: u32) -> Result<Layout, LayoutError> {
        let model = Model {
            tensors: tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect(),
            heads,
            tp,
        };
        let mut params: BTreeMap<String, Param> = BTreeMap::new();
        let mut fused: BTreeMap<String, (Fusion, BTreeMap<usize, Part>)> = BTreeMap::new();
        for (&name, &tensor) in &model.tensors {
            if tp > 1 && is_fused(name) {
                return Err(LayoutError::AlreadyFused { tensor: name.into() });
            }
            let role = role_of(name);
            let cut = model.cut(tensor, role)?;
            let part = Part { tensor: tensor.clone(), cut };
            match role.and_then(fusion_of) {
                Some((fusion, position)) => {
                    let into = fused.entry(sibling(name, fusion.layer));
                    into.or_insert_with(|| (fusion, BTreeMap::new())).1.insert(position, part);
                }
                None => {
                    let rule = single_rule(name, role, cut);
                    params.insert(
                        name.into(),
                        Param { name: name.into(), rule, parts: vec![part], quant: None },
                    );
                }
            }
        }
        for (name, (fusion, parts)) in fused {
            let param = fuse(name.clone(), fusion, parts.into_values().collect())?;
            if params.insert(name.clone(), param).is_some() {
                return Err(LayoutError::Duplicate { param: name });
            }
        }
        let layout = Layout { tp, params: params.into_values().collect() };
        layout.params(0)?; // what no rank can hold is an error now, not later
        Ok(layout)
    }

    /// The parameters of one rank, sorted by name.
    ///
    /// # Errors
    /// When there is no such rank.
    pub fn params(&self, rank: u32) -> Result<Vec<LocalParam>, LayoutError> {
        if rank >= self.tp {
            return Err(LayoutError::NoRank { rank, tp: self.tp });
        }
        let mut params = Vec::with_capacity(self.params.len());
        for param in &self.params {
            params.extend(param.local(self.tp, rank)?);
        }
        params.sort_by(|a: &LocalParam, b| a.name.cmp(&b.name));
        Ok(params)
    }
}

/// The parameters of rank `rank` of `tp`: [`Layout::new`] and [`Layout::params`] in one.
///
/// # Errors
/// As those.
pub fn receiver_params(
    tensors: &[TensorInfo],
    heads: Option<HeadCounts>,
    tp: u32,
    rank: u32,
) -> Result<Vec<LocalParam>, LayoutError> {
    Layout::new(tensors, heads, tp)?.params(rank)
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines: BTreeMap<(String, String), usize> = BTreeMap::new();
        for param in &self.params {
            let local = param.local(self.tp, 0).map_err(|_| fmt::Error)?;
            let Some(local) = local.first() else { continue };
            // Layers differ in a number only: one line for all of them.
            let name: Vec<&str> = param
                .name
                .split('.')
                .map(|part| if part.parse::<u64>().is_ok() { "*" } else { part })
                .collect();
            let line = format!("{} {:?}: {}", local.dtype, local.shape, param.rule);
            *lines.entry((name.join("."), line)).or_default() += 1;
        }
        writeln!(f, "tensor parallelism {}; shapes of rank 0", self.tp)?;
        for ((name, line), count) in lines {
            writeln!(f, "{count:>4} x {name} {line}")?;
        }
        Ok(())
    }
}

impl Param {
    /// The parameter, and its scales if it is quantised.
    fn local(&self, tp: u32, rank: u32) -> Result<Vec<LocalParam>, LayoutError> {
        if let Some(quant) = self.quant {
            return self.quantised(quant, tp, rank);
        }
        let mut shape: Option<Vec<u64>> = None;
        let mut dtype = DType::U8;
        let mut maps = Vec::with_capacity(self.parts.len());
        for Part { tensor, cut } in &self.parts {
            let in_tensor = |source| LayoutError::Box { tensor: tensor.name.clone(), source };
            let whole = TensorBox::whole(&tensor.shape).map_err(in_tensor)?;
            let bounds = cut.bounds(&tensor.shape, tp, rank).map_err(in_tensor)?;
            dtype = tensor.dtype;
            match shape.as_mut().and_then(|shape| shape.first_mut()).zip(bounds.len().next()) {
                Some((rows, more)) => *rows = rows.saturating_add(more),
                None => shape = Some(bounds.shape().to_vec()),
            }
            let map = ParamMap::tensor(&tensor.name).shaped(&tensor.shape);
            maps.push(if bounds == whole { map } else { map.slice(bounds) });
        }
        let map = match maps.len() {
            1 => maps.remove(0),
            _ => ParamMap::concat(0, maps),
        };
        Ok(vec![LocalParam { name: self.name.clone(), dtype, shape: shape.unwrap_or_default(), map }])
    }
}

impl Cut {
    fn bounds(self, shape: &[u64], tp: u32, rank: u32) -> Result<TensorBox, xfer_plan::LayoutError> {
        let mesh = DeviceMesh::new(&[u64::from(tp)])?;
        let chunk = |shape: &[u64], dim| shard_box(shape, &mesh, &[Placement::Shard(dim)], u64::from(rank));
        // The heads `first..end` of `heads` that share a dimension; `Model::cut` has checked that they do.
        let along = |dim: usize, heads: u64, first: u64, end: u64| {
            let head_elements = shape.get(dim).map_or(0, |&size| size / heads);
            TensorBox::whole(shape)?.with_dim(dim, first * head_elements, (end - first) * head_elements)
        };
        let query_heads = |heads: HeadCounts| {
            let share = chunk(&[heads.query()], 0)?;
            Ok(share.start().next().zip(share.end().next()).unwrap_or_default())
        };
        match self {
            Cut::Whole => TensorBox::whole(shape),
            Cut::Even { dim } => chunk(shape, dim),
            Cut::Query { dim, heads } => {
                let (first, end) = query_heads(heads)?;
                along(dim, heads.query(), first, end)
            }
            Cut::KeyValue { heads } => {
                let (first, end) = query_heads(heads)?;
                let readers = heads.query() / heads.key_value();
                let (first, end) = match end - first {
                    0 => (heads.key_value(), heads.key_value()),
                    _ => (first / readers, end.div_ceil(readers)),
                };
                along(0, heads.key_value(), first, end)
            }
        }
    }
}

/// The tensors by name, and what cutting them depends on.
struct Model<'a> {
    tensors: BTreeMap<&'a str, &'a TensorInfo>,
    heads: Option<HeadCounts>,
    tp: u32,
}

impl Model<'_> {
    fn cut(&self, tensor: &TensorInfo, role: Option<Role>) -> Result<Cut, LayoutError> {
        let is_bias = tensor.name.ends_with(".bias");
        let dim = match role {
            None => return Ok(Cut::Whole),
            Some(Role::Row | Role::AttentionOutput) if is_bias => return Ok(Cut::Whole),
            Some(Role::Row | Role::AttentionOutput) => 1,
            Some(_) => 0,
        };
        let Some(&size) = tensor.shape.get(dim) else {
            return Err(LayoutError::NoDim { tensor: tensor.name.clone(), shape: tensor.shape.clone(), dim });
        };
        let Some(heads) = self.heads_of(tensor, role)? else {
            return Ok(Cut::Even { dim });
        };
        let (cut, heads) = match role {
            Some(Role::Key | Role::Value) => (Cut::KeyValue { heads }, heads.key_value()),
            _ => (Cut::Query { dim, heads }, heads.query()),
        };
        if !size.is_multiple_of(heads) {
            let (tensor, shape) = (tensor.name.clone(), tensor.shape.clone());
            return Err(LayoutError::Heads { tensor, shape, dim, heads });
        }
        Ok(cut)
    }

    /// The head counts for this tensor of an attention; `None` where rows are cut evenly instead.
    fn heads_of(&self, tensor: &TensorInfo, role: Option<Role>) -> Result<Option<HeadCounts>, LayoutError> {
        let by_heads = matches!(role, Some(Role::Query | Role::Key | Role::Value | Role::AttentionOutput));
        if !by_heads || self.tp == 1 || self.heads.is_some() {
            return Ok(self.heads.filter(|_| by_heads && self.tp > 1));
        }
        let block = module_of(&tensor.name).rsplit_once('.').map_or("", |(block, _)| block);
        let rows = |layer: &str| self.rows(&format!("{block}.{layer}.weight"));
        let head_elements = rows("q_norm").filter(|&norm| norm > 0 && Some(norm) == rows("k_norm"));
        let (query, key) = (rows("q_proj"), rows("k_proj"));
        if let (Some(head_elements), Some(query), Some(key)) = (head_elements, query, key) {
            let heads = HeadCounts::new(query / head_elements, key / head_elements);
            // A norm over all heads together says nothing about one head.
            if let Some(heads) = heads.filter(|heads| heads.query() > 1) {
                return Ok(Some(heads));
            }
        }
        match role {
            Some(Role::Query) if query != key => {
                Err(LayoutError::HeadsUnknown { tensor: tensor.name.clone() })
            }
            _ => Ok(None),
        }
    }

    fn rows(&self, tensor: &str) -> Option<u64> {
        self.tensors.get(tensor)?.shape.first().copied()
    }
}

fn single_rule(name: &str, role: Option<Role>, cut: Cut) -> String {
    let last = module_of(name).rsplit('.').next().unwrap_or_default().to_ascii_lowercase();
    match (role, cut) {
        (Some(Role::Vocabulary), _) => "vocabulary cut on dimension 0, not padded".into(),
        (Some(_), Cut::Whole) => "bias of a row-parallel layer, copied".into(),
        (Some(Role::AttentionOutput), Cut::Query { .. }) => {
            "row parallel: cut on dimension 1 by query heads".into()
        }
        (Some(Role::Row | Role::AttentionOutput), _) => "row parallel: cut on dimension 1".into(),
        (Some(_), _) => "column parallel: cut on dimension 0".into(),
        (None, _) if last.ends_with("norm") => "norm, copied".into(),
        (None, _) => "no rule for this name, copied".into(),
    }
}

/// One parameter of several tensors, one below the other.
fn fuse(name: String, fusion: Fusion, parts: Vec<Part>) -> Result<Param, LayoutError> {
    let (Some(first), true) = (parts.first(), parts.len() == fusion.parts_count) else {
        let found = parts.iter().map(|part| part.tensor.name.clone()).collect();
        return Err(LayoutError::Incomplete { param: name, parts: fusion.parts, found });
    };
    for Part { tensor, .. } in parts.iter().skip(1) {
        if tensor.dtype != first.tensor.dtype || tensor.shape.get(1..) != first.tensor.shape.get(1..) {
            return Err(LayoutError::Unequal {
                param: name,
                tensor: tensor.name.clone(),
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                first: first.tensor.name.clone(),
            });
        }
    }
    let how = match first.cut {
        Cut::Query { heads, .. } => {
            let rows =
                |part: Option<&Part>| part.and_then(|part| part.tensor.shape.first()).copied().unwrap_or(0);
            let (query, key) = (rows(Some(first)) / heads.query(), rows(parts.get(1)) / heads.key_value());
            if query != key {
                return Err(LayoutError::HeadLengths { param: name, query, key });
            }
            format!("cut by heads, {} query and {} key/value", heads.query(), heads.key_value())
        }
        _ => "rows cut evenly".into(),
    };
    Ok(Param { name, rule: format!("{} fused, {how}", fusion.parts), parts, quant: None })
}
