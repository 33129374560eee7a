//! Parameter maps: how a destination parameter is made of source tensors.
//!
//! A map is a tree, but it travels as a list of its nodes in postfix order (children first), so that reading
//! one from a peer never recurses: a hostile depth is an error and not a stack overflow. Every walk here is
//! bounded by
//! [`MAP_DEPTH_MAX`].

use std::fmt;

use serde::de::{Error as _, SeqAccess, Visitor};
use serde::ser::{Error as _, SerializeSeq};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::dtype::DType;
use crate::error::{LayoutError, shorten};
use crate::limits::{MAP_DEPTH_MAX, MAP_NODES_MAX};
use crate::mesh::chunk;
use crate::tensor_box::{TensorBox, volume};
use crate::transform::{BlockQuant, Transform};

/// How a destination parameter is made of source tensors.
///
/// ```
/// use xfer_plan::{ParamMap, TensorBox};
/// // Rank 1 of 2: the lower halves of q and k, one above the other.
/// let half = TensorBox::new(&[4, 0], &[4, 16])?;
/// let fused = ParamMap::concat(
///     0,
///     [ParamMap::tensor("q").slice(half), ParamMap::tensor("k").shard(&[8, 16], 0, 2, 1)?],
/// );
/// assert_eq!(fused.shape(|_| Some(vec![8, 16]))?, [8, 16]);
/// # Ok::<(), xfer_plan::LayoutError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ParamMap {
    /// The whole of one source tensor.
    Tensor(String),
    /// Another map's result, if it has this shape. A slice fits in any shape that is large enough; this is how a map says
    /// which one it was made for, so that another model of the same names is an error and not another layout.
    Shaped {
        /// Whose result.
        of: Box<ParamMap>,
        /// The shape that it must have.
        shape: Vec<u64>,
    },
    /// The part `bounds` of another map's result.
    Slice {
        /// What is sliced.
        of: Box<ParamMap>,
        /// The part of it, in its own indices.
        bounds: TensorBox,
    },
    /// Several results side by side along one dimension.
    Concat {
        /// The dimension along which lengths add up.
        dim: usize,
        /// At least one part; their other dimensions are equal.
        parts: Vec<ParamMap>,
    },
    /// Another map's result, longer along one dimension. What is added is never written: it stays what the receiver
    /// made it, zeros as a rule.
    Pad {
        /// What is padded.
        of: Box<ParamMap>,
        /// The dimension that grows at its end.
        dim: usize,
        /// Its length afterwards.
        len: u64,
    },
    /// Another map's result under another shape of as many elements, in row-major order: a stack of matrices is a view of
    /// them one above the other. Only outermost.
    View {
        /// What is viewed.
        of: Box<ParamMap>,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// Another map's result in another element type.
    Cast {
        /// What is converted.
        of: Box<ParamMap>,
        /// Into what.
        to: DType,
    },
    /// A whole tensor, quantised.
    Quantize {
        /// The tensor.
        of: Box<ParamMap>,
        /// How.
        quant: BlockQuant,
    },
    /// The scales of a whole tensor's blocks.
    Scales {
        /// The tensor.
        of: Box<ParamMap>,
        /// How it is quantised.
        quant: BlockQuant,
    },
}

/// One source rectangle of a parameter: `bounds` of `tensor` lands at `result` of the parameter. Same shape,
/// never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Leaf<T> {
    pub(crate) tensor: T,
    /// In the tensor's indices; for scales, in those of its table of scales.
    pub(crate) bounds: TensorBox,
    pub(crate) result: TensorBox,
    pub(crate) via: Via,
}

/// A transform as a map asks for it: the source's element type is not known yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum Via {
    #[default]
    Copy,
    Cast(DType),
    Quantize(BlockQuant),
    Scales(BlockQuant),
}

impl Via {
    /// The transform of elements of type `from`.
    pub(crate) fn of(self, from: DType) -> Transform {
        match self {
            Via::Copy => Transform::Copy,
            Via::Cast(to) if to == from => Transform::Copy,
            Via::Cast(to) => Transform::Cast { from, to },
            Via::Quantize(quant) => Transform::Quantize { from, quant },
            Via::Scales(quant) => Transform::Scales { from, quant },
        }
    }
}

/// A map's result: its shape, and the rectangles that it is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Resolved<T> {
    /// The shape in whose indices the rectangles are. A view of it has the same bytes.
    pub(crate) shape: Vec<u64>,
    /// The shape that it is viewed as, if it is.
    pub(crate) view: Option<Vec<u64>>,
    pub(crate) leaves: Vec<Leaf<T>>,
    /// What is never written.
    pub(crate) pads: Vec<TensorBox>,
}

impl<T> Resolved<T> {
    /// The shape of the result as its user sees it.
    pub(crate) fn outer_shape(&self) -> &[u64] {
        self.view.as_deref().unwrap_or(&self.shape)
    }
}

impl ParamMap {
    /// The whole tensor `name`.
    pub fn tensor(name: impl Into<String>) -> ParamMap {
        ParamMap::Tensor(name.into())
    }

    /// The same, refused where its shape is another.
    #[must_use]
    pub fn shaped(self, shape: &[u64]) -> ParamMap {
        ParamMap::Shaped { of: Box::new(self), shape: shape.to_vec() }
    }

    /// The part `bounds` of this map's result.
    #[must_use]
    pub fn slice(self, bounds: TensorBox) -> ParamMap {
        ParamMap::Slice { of: Box::new(self), bounds }
    }

    /// `parts` side by side along dimension `dim`.
    pub fn concat(dim: usize, parts: impl IntoIterator<Item = ParamMap>) -> ParamMap {
        ParamMap::Concat { dim, parts: parts.into_iter().collect() }
    }

    /// This map's result, grown at the end of dimension `dim` to `len`.
    #[must_use]
    pub fn pad(self, dim: usize, len: u64) -> ParamMap {
        ParamMap::Pad { of: Box::new(self), dim, len }
    }

    /// The same elements under another shape.
    #[must_use]
    pub fn view(self, shape: &[u64]) -> ParamMap {
        ParamMap::View { of: Box::new(self), shape: shape.to_vec() }
    }

    /// The same in another element type. From the type that it has already, nothing is done.
    #[must_use]
    pub fn cast(self, to: DType) -> ParamMap {
        ParamMap::Cast { of: Box::new(self), to }
    }

    /// This tensor, quantised: [`DType::F8E4M3`].
    #[must_use]
    pub fn quantize(self, quant: BlockQuant) -> ParamMap {
        ParamMap::Quantize { of: Box::new(self), quant }
    }

    /// The scales of this tensor's blocks, of [`BlockQuant::scales_shape`].
    #[must_use]
    pub fn scales(self, quant: BlockQuant) -> ParamMap {
        ParamMap::Scales { of: Box::new(self), quant }
    }

    /// Shard `index` of `shards` along dimension `dim`, with `torch.chunk`'s sizes. `shape` is this map's own
    /// shape; where it turns out to be another, the map is refused.
    ///
    /// # Errors
    /// When there is no such dimension or no such shard.
    pub fn shard(self, shape: &[u64], dim: usize, shards: u64, index: u64) -> Result<ParamMap, LayoutError> {
        if index >= shards {
            return Err(LayoutError::NoSuchShard { index, shards });
        }
        let whole = TensorBox::whole(shape)?;
        let &len = shape.get(dim).ok_or(LayoutError::NoSuchDim { dim, rank: shape.len() })?;
        let (start, len) = chunk(len, shards, index);
        Ok(self.shaped(shape).slice(whole.with_dim(dim, start, len)?))
    }

    /// The shape of the result, given the shapes of the source tensors.
    ///
    /// # Errors
    /// When the map is too large or too deep, or refers to something that does not exist or does not fit.
    pub fn shape(&self, shape_of: impl Fn(&str) -> Option<Vec<u64>>) -> Result<Vec<u64>, LayoutError> {
        let resolved = self.resolve(&mut |name| shape_of(name).map(|shape| ((), shape)))?;
        Ok(resolved.outer_shape().to_vec())
    }

    /// The names of the source tensors, in the order of the result, with repetitions.
    ///
    /// # Errors
    /// When the map is too large or too deep.
    pub fn tensors(&self) -> Result<Vec<&str>, LayoutError> {
        let mut names = Vec::new();
        self.visit(&mut |node| {
            if let ParamMap::Tensor(name) = node {
                names.push(name.as_str());
            }
            Ok(())
        })?;
        Ok(names)
    }

    /// Calls `f` on every node, children first, and counts them.
    fn visit<'m>(
        &'m self,
        f: &mut dyn FnMut(&'m ParamMap) -> Result<(), LayoutError>,
    ) -> Result<usize, LayoutError> {
        fn walk<'m>(
            map: &'m ParamMap,
            depth: usize,
            nodes: &mut usize,
            f: &mut dyn FnMut(&'m ParamMap) -> Result<(), LayoutError>,
        ) -> Result<(), LayoutError> {
            if depth > MAP_DEPTH_MAX {
                return Err(LayoutError::MapTooDeep { max: MAP_DEPTH_MAX });
            }
            match map {
                ParamMap::Tensor(_) => {}
                ParamMap::Slice { of, .. }
                | ParamMap::Shaped { of, .. }
                | ParamMap::Pad { of, .. }
                | ParamMap::View { of, .. }
                | ParamMap::Cast { of, .. }
                | ParamMap::Quantize { of, .. }
                | ParamMap::Scales { of, .. } => walk(of, depth + 1, nodes, f)?,
                ParamMap::Concat { parts, .. } => {
                    for part in parts {
                        walk(part, depth + 1, nodes, f)?;
                    }
                }
            }
            *nodes += 1;
            if *nodes > MAP_NODES_MAX {
                return Err(LayoutError::MapTooLarge { max: MAP_NODES_MAX });
            }
            f(map)
        }
        let mut nodes = 0;
        walk(self, 1, &mut nodes, f)?;
        Ok(nodes)
    }

    /// Evaluates the map on layouts: its shape, and which rectangle of which tensor lands where. `lookup`
    /// gives a tensor's handle and shape.
    pub(crate) fn resolve<T: Copy, S: AsRef<[u64]>>(
        &self,
        lookup: &mut dyn FnMut(&str) -> Option<(T, S)>,
    ) -> Result<Resolved<T>, LayoutError> {
        let mut done: Vec<Resolved<T>> = Vec::new();
        self.visit(&mut |node| {
            let resolved = match node {
                ParamMap::Tensor(name) => resolve_tensor(name, lookup)?,
                ParamMap::Concat { dim, parts } => {
                    let first = done.len().saturating_sub(parts.len());
                    resolve_concat(*dim, done.drain(first..))?
                }
                ParamMap::Shaped { shape, .. } => operand(&mut done)?.expect_shape(shape)?,
                ParamMap::Slice { bounds, .. } => resolve_slice(operand(&mut done)?, bounds)?,
                ParamMap::Pad { dim, len, .. } => operand(&mut done)?.pad(*dim, *len)?,
                ParamMap::View { shape, .. } => operand(&mut done)?.view(shape)?,
                ParamMap::Cast { to, .. } => operand(&mut done)?.via("cast", Via::Cast(*to))?,
                ParamMap::Quantize { quant, .. } => {
                    let of = operand(&mut done)?.whole("quantize")?;
                    quant.scales_shape(&of.shape)?;
                    of.via("quantize", Via::Quantize(*quant))?
                }
                ParamMap::Scales { quant, .. } => operand(&mut done)?.whole("scale")?.scales(*quant)?,
            };
            done.push(resolved);
            Ok(())
        })?;
        done.pop().ok_or(LayoutError::MapMalformed { detail: "it is empty" })
    }
}

/// The result that a node works on.
fn operand<T>(done: &mut Vec<Resolved<T>>) -> Result<Resolved<T>, LayoutError> {
    let of = done.pop().ok_or(LayoutError::MapMalformed { detail: "an operation on nothing" })?;
    if of.view.is_some() { Err(LayoutError::ViewInside) } else { Ok(of) }
}

impl<T> Resolved<T> {
    fn expect_shape(self, shape: &[u64]) -> Result<Self, LayoutError> {
        if self.shape == shape {
            return Ok(self);
        }
        Err(LayoutError::OtherShape { expected: shape.to_vec(), found: self.shape })
    }

    fn pad(mut self, dim: usize, len: u64) -> Result<Self, LayoutError> {
        let rank = self.shape.len();
        let Some(along) = self.shape.get_mut(dim) else { return Err(LayoutError::NoSuchDim { dim, rank }) };
        let Some(added) = len.checked_sub(*along) else {
            return Err(LayoutError::PadShorter { dim, len, shape: self.shape });
        };
        let start = std::mem::replace(along, len);
        let added = TensorBox::whole(&self.shape)?.with_dim(dim, start, added)?;
        if !added.is_empty() {
            self.pads.push(added);
        }
        Ok(self)
    }

    fn view(mut self, shape: &[u64]) -> Result<Self, LayoutError> {
        let elements = |shape: &[u64]| volume(shape.iter().copied());
        TensorBox::whole(shape)?;
        match (elements(&self.shape), elements(shape)) {
            (Some(from), Some(to)) if from == to => {
                self.view = Some(shape.to_vec());
                Ok(self)
            }
            _ => Err(LayoutError::ViewMismatch { from: self.shape, to: shape.to_vec() }),
        }
    }

    /// Refuses anything but one whole tensor (or an empty one).
    fn whole(self, what: &'static str) -> Result<Self, LayoutError> {
        let all = TensorBox::whole(&self.shape)?;
        let whole = match self.leaves.as_slice() {
            [leaf] => leaf.result == all && leaf.bounds == all,
            leaves => leaves.is_empty() && all.is_empty(),
        };
        if whole && self.pads.is_empty() { Ok(self) } else { Err(LayoutError::NotWhole { what }) }
    }

    fn via(mut self, what: &'static str, via: Via) -> Result<Self, LayoutError> {
        for leaf in &mut self.leaves {
            if std::mem::replace(&mut leaf.via, via) != Via::Copy {
                return Err(LayoutError::NotWhole { what });
            }
        }
        Ok(self)
    }

    fn scales(mut self, quant: BlockQuant) -> Result<Self, LayoutError> {
        self.shape = quant.scales_shape(&self.shape)?;
        let all = TensorBox::whole(&self.shape)?;
        for leaf in &mut self.leaves {
            (leaf.bounds, leaf.result) = (all.clone(), all.clone());
        }
        self.via("scale", Via::Scales(quant))
    }
}

fn resolve_tensor<T: Copy, S: AsRef<[u64]>>(
    name: &str,
    lookup: &mut dyn FnMut(&str) -> Option<(T, S)>,
) -> Result<Resolved<T>, LayoutError> {
    let (tensor, shape) = lookup(name).ok_or_else(|| LayoutError::UnknownTensor { tensor: shorten(name) })?;
    let bounds = TensorBox::whole(shape.as_ref())?;
    let result = bounds.clone();
    let leaf = Leaf { tensor, bounds, result, via: Via::Copy };
    let leaves = if leaf.bounds.is_empty() { Vec::new() } else { vec![leaf] };
    Ok(Resolved { shape: shape.as_ref().to_vec(), view: None, leaves, pads: Vec::new() })
}

fn resolve_slice<T>(of: Resolved<T>, window: &TensorBox) -> Result<Resolved<T>, LayoutError> {
    let Resolved { shape, leaves: of, pads, .. } = of;
    let outside = || LayoutError::SliceOutside { bounds: Box::new(window.clone()), shape: shape.clone() };
    if !window.fits(&shape) {
        return Err(outside());
    }
    let origin = TensorBox::whole(&window.shape())?;
    let mut leaves = Vec::with_capacity(of.len());
    for leaf in of {
        if let Some(kept) = leaf.result.intersect(window) {
            // Cannot fail: `kept` lies in both boxes.
            let bounds = kept.moved(&leaf.result, &leaf.bounds);
            let result = kept.moved(window, &origin);
            let (Some(bounds), Some(result)) = (bounds, result) else {
                return Err(outside());
            };
            leaves.push(Leaf { bounds, result, ..leaf });
        }
    }
    let kept = pads.iter().filter_map(|pad| pad.intersect(window)?.moved(window, &origin));
    Ok(Resolved { shape: window.shape().to_vec(), view: None, leaves, pads: kept.collect() })
}

fn resolve_concat<T>(
    dim: usize,
    mut parts: impl Iterator<Item = Resolved<T>>,
) -> Result<Resolved<T>, LayoutError> {
    let mut whole = parts.next().ok_or(LayoutError::EmptyConcat)?;
    let rank = whole.shape.len();
    let mut along = *whole.shape.get(dim).ok_or(LayoutError::NoSuchDim { dim, rank })?;
    if whole.view.is_some() {
        return Err(LayoutError::ViewInside);
    }
    for part in parts {
        if part.view.is_some() {
            return Err(LayoutError::ViewInside);
        }
        let agree = part.shape.len() == rank
            && whole.shape.iter().zip(&part.shape).enumerate().all(|(d, (a, b))| d == dim || a == b);
        let (true, Some(&len)) = (agree, part.shape.get(dim)) else {
            return Err(LayoutError::ConcatMismatch { dim, expected: whole.shape, found: part.shape });
        };
        let moved = |bounds: &TensorBox| {
            let (start, len) = bounds.extent(dim).unwrap_or_default(); // `dim` exists: the shapes agree
            let start = start.checked_add(along).ok_or(LayoutError::BoxOverflow { start: along, len })?;
            bounds.with_dim(dim, start, len)
        };
        for leaf in part.leaves {
            let result = moved(&leaf.result)?;
            whole.leaves.push(Leaf { result, ..leaf });
        }
        for pad in &part.pads {
            whole.pads.push(moved(pad)?);
        }
        along = along.checked_add(len).ok_or(LayoutError::BoxOverflow { start: along, len })?;
    }
    if let Some(len) = whole.shape.get_mut(dim) {
        *len = along;
    }
    Ok(whole)
}

/// A node on the wire. Postfix: a concatenation takes the last `parts` results, any other node the last one.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum StepRef<'a> {
    Tensor(&'a str),
    Slice(&'a TensorBox),
    Shaped(&'a [u64]),
    Concat { dim: usize, parts: usize },
    Pad { dim: usize, len: u64 },
    View(&'a [u64]),
    Cast(DType),
    Quantize(BlockQuant),
    Scales(BlockQuant),
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Step {
    Tensor(String),
    Slice(TensorBox),
    Shaped(Vec<u64>),
    Concat { dim: usize, parts: usize },
    Pad { dim: usize, len: u64 },
    View(Vec<u64>),
    Cast(DType),
    Quantize(BlockQuant),
    Scales(BlockQuant),
}

impl Serialize for ParamMap {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut steps = Vec::new();
        self.visit(&mut |node| {
            steps.push(match node {
                ParamMap::Tensor(name) => StepRef::Tensor(name),
                ParamMap::Slice { bounds, .. } => StepRef::Slice(bounds),
                ParamMap::Shaped { shape, .. } => StepRef::Shaped(shape),
                ParamMap::Concat { dim, parts } => StepRef::Concat { dim: *dim, parts: parts.len() },
                ParamMap::Pad { dim, len, .. } => StepRef::Pad { dim: *dim, len: *len },
                ParamMap::View { shape, .. } => StepRef::View(shape),
                ParamMap::Cast { to, .. } => StepRef::Cast(*to),
                ParamMap::Quantize { quant, .. } => StepRef::Quantize(*quant),
                ParamMap::Scales { quant, .. } => StepRef::Scales(*quant),
            });
            Ok(())
        })
        .map_err(S::Error::custom)?;
        let mut list = serializer.serialize_seq(Some(steps.len()))?;
        for step in &steps {
            list.serialize_element(step)?;
        }
        list.end()
    }
}

impl<'de> Deserialize<'de> for ParamMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ParamMap, D::Error> {
        deserializer.deserialize_seq(MapVisitor)
    }
}

/// Builds the tree on an explicit stack, with the depth of every subtree beside it.
struct MapVisitor;

impl MapVisitor {
    fn apply(done: &mut Vec<(ParamMap, usize)>, step: Step) -> Result<(), LayoutError> {
        let mut of = || done.pop().ok_or(LayoutError::MapMalformed { detail: "an operation on nothing" });
        let mut unary = |make: &dyn Fn(ParamMap) -> ParamMap| of().map(|(of, depth)| (make(of), depth + 1));
        let (map, depth) = match step {
            Step::Tensor(name) => (ParamMap::Tensor(name), 1),
            Step::Slice(bounds) => unary(&|of| of.slice(bounds.clone()))?,
            Step::Shaped(shape) => unary(&|of| of.shaped(&shape))?,
            Step::Pad { dim, len } => unary(&|of| of.pad(dim, len))?,
            Step::View(shape) => unary(&|of| of.view(&shape))?,
            Step::Cast(to) => unary(&|of| of.cast(to))?,
            Step::Quantize(quant) => unary(&|of| of.quantize(quant))?,
            Step::Scales(quant) => unary(&|of| of.scales(quant))?,
            Step::Concat { parts, .. } if parts > done.len() => {
                return Err(LayoutError::MapMalformed { detail: "concatenation of missing parts" });
            }
            Step::Concat { dim, parts } => {
                let (mut maps, mut depth) = (Vec::with_capacity(parts), 0);
                for (map, below) in done.drain(done.len() - parts..) {
                    maps.push(map);
                    depth = depth.max(below);
                }
                (ParamMap::concat(dim, maps), depth + 1)
            }
        };
        if depth > MAP_DEPTH_MAX {
            return Err(LayoutError::MapTooDeep { max: MAP_DEPTH_MAX });
        }
        done.push((map, depth));
        Ok(())
    }
}

impl<'de> Visitor<'de> for MapVisitor {
    type Value = ParamMap;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a parameter map: its nodes, children first")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut steps: A) -> Result<ParamMap, A::Error> {
        let mut done = Vec::new();
        let mut nodes = 0;
        while let Some(step) = steps.next_element()? {
            nodes += 1;
            if nodes > MAP_NODES_MAX {
                return Err(A::Error::custom(LayoutError::MapTooLarge { max: MAP_NODES_MAX }));
            }
            MapVisitor::apply(&mut done, step).map_err(A::Error::custom)?;
        }
        match (done.pop(), done.is_empty()) {
            (Some((map, _)), true) => Ok(map),
            _ => {
                let detail = "it must leave exactly one result";
                Err(A::Error::custom(LayoutError::MapMalformed { detail }))
            }
        }
    }
}
