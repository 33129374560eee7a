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

use crate::error::{LayoutError, shorten};
use crate::limits::{MAP_DEPTH_MAX, MAP_NODES_MAX};
use crate::mesh::chunk;
use crate::tensor_box::TensorBox;

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
}

/// One source rectangle of a parameter: `bounds` of `tensor` lands at `result` of the parameter. Same shape,
/// never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Leaf<T> {
    pub(crate) tensor: T,
    pub(crate) bounds: TensorBox,
    pub(crate) result: TensorBox,
}

/// A map's result: its shape, and the rectangles that it is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Resolved<T> {
    pub(crate) shape: Vec<u64>,
    pub(crate) leaves: Vec<Leaf<T>>,
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
        Ok(self.resolve(&mut |name| shape_of(name).map(|shape| ((), shape)))?.shape)
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
                ParamMap::Slice { of, .. } | ParamMap::Shaped { of, .. } => walk(of, depth + 1, nodes, f)?,
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
                ParamMap::Shaped { shape, .. } => {
                    let of = done.pop().ok_or(LayoutError::MapMalformed { detail: "shape of nothing" })?;
                    if of.shape != *shape {
                        return Err(LayoutError::OtherShape { expected: shape.clone(), found: of.shape });
                    }
                    of
                }
                ParamMap::Slice { bounds, .. } => {
                    let of = done.pop().ok_or(LayoutError::MapMalformed { detail: "slice of nothing" })?;
                    resolve_slice(of, bounds)?
                }
                ParamMap::Concat { dim, parts } => {
                    let first = done.len().saturating_sub(parts.len());
                    resolve_concat(*dim, done.drain(first..))?
                }
            };
            done.push(resolved);
            Ok(())
        })?;
        done.pop().ok_or(LayoutError::MapMalformed { detail: "it is empty" })
    }
}

fn resolve_tensor<T: Copy, S: AsRef<[u64]>>(
    name: &str,
    lookup: &mut dyn FnMut(&str) -> Option<(T, S)>,
) -> Result<Resolved<T>, LayoutError> {
    let (tensor, shape) = lookup(name).ok_or_else(|| LayoutError::UnknownTensor { tensor: shorten(name) })?;
    let bounds = TensorBox::whole(shape.as_ref())?;
    let result = bounds.clone();
    let leaves = if bounds.is_empty() { Vec::new() } else { vec![Leaf { tensor, bounds, result }] };
    Ok(Resolved { shape: shape.as_ref().to_vec(), leaves })
}

fn resolve_slice<T>(of: Resolved<T>, window: &TensorBox) -> Result<Resolved<T>, LayoutError> {
    let Resolved { shape, leaves: of } = of;
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
            leaves.push(Leaf { tensor: leaf.tensor, bounds, result });
        }
    }
    Ok(Resolved { shape: window.shape().to_vec(), leaves })
}

fn resolve_concat<T>(
    dim: usize,
    mut parts: impl Iterator<Item = Resolved<T>>,
) -> Result<Resolved<T>, LayoutError> {
    let mut whole = parts.next().ok_or(LayoutError::EmptyConcat)?;
    let rank = whole.shape.len();
    let mut along = *whole.shape.get(dim).ok_or(LayoutError::NoSuchDim { dim, rank })?;
    for part in parts {
        let agree = part.shape.len() == rank
            && whole.shape.iter().zip(&part.shape).enumerate().all(|(d, (a, b))| d == dim || a == b);
        let (true, Some(&len)) = (agree, part.shape.get(dim)) else {
            return Err(LayoutError::ConcatMismatch { dim, expected: whole.shape, found: part.shape });
        };
        for mut leaf in part.leaves {
            if let Some((start, len)) = leaf.result.extent(dim) {
                let start = start.checked_add(along).ok_or(LayoutError::BoxOverflow { start: along, len })?;
                leaf.result = leaf.result.with_dim(dim, start, len)?;
            }
            whole.leaves.push(leaf);
        }
        along = along.checked_add(len).ok_or(LayoutError::BoxOverflow { start: along, len })?;
    }
    if let Some(len) = whole.shape.get_mut(dim) {
        *len = along;
    }
    Ok(whole)
}

/// A node on the wire. Postfix: a slice or a shape takes the last result, a concatenation the last `parts`.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum StepRef<'a> {
    Tensor(&'a str),
    Slice(&'a TensorBox),
    Shaped(&'a [u64]),
    Concat { dim: usize, parts: usize },
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Step {
    Tensor(String),
    Slice(TensorBox),
    Shaped(Vec<u64>),
    Concat { dim: usize, parts: usize },
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
        let (map, depth) = match step {
            Step::Tensor(name) => (ParamMap::Tensor(name), 1),
            Step::Slice(bounds) => {
                let (of, depth) =
                    done.pop().ok_or(LayoutError::MapMalformed { detail: "slice of nothing" })?;
                (of.slice(bounds), depth + 1)
            }
            Step::Shaped(shape) => {
                let (of, depth) =
                    done.pop().ok_or(LayoutError::MapMalformed { detail: "shape of nothing" })?;
                (of.shaped(&shape), depth + 1)
            }
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
