//! Boxes: n-d index ranges of a tensor.
//!
//! Every layout question comes down to boxes and their intersections. A box never holds a range whose end
//! overflows and never has more than [`DIMS_MAX`] dimensions, whoever made it: arithmetic elsewhere relies on
//! both.

use std::fmt;

use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use smallvec::SmallVec;

use crate::error::LayoutError;
use crate::limits::DIMS_MAX;

/// Indices, or lengths, one per dimension. Weights have at most four dimensions, which stay inline.
pub type Dims = SmallVec<[u64; 4]>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Extent {
    start: u64,
    len: u64,
}

impl Extent {
    fn end(self) -> u64 {
        self.start + self.len // `TensorBox::push` has checked it
    }
}

/// An n-d index range. A box of no dimensions is a scalar: it holds one element.
///
/// Serialised as a list of `[start, len]` pairs, outermost dimension first.
///
/// ```
/// use xfer_plan::TensorBox;
/// let rows = TensorBox::new(&[4, 0], &[4, 16])?;
/// let columns = TensorBox::new(&[0, 8], &[6, 8])?;
/// assert_eq!(rows.intersect(&columns).unwrap().to_string(), "[4..6, 8..16]");
/// # Ok::<(), xfer_plan::LayoutError>(())
/// ```
#[derive(PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct TensorBox {
    extents: SmallVec<[Extent; 4]>,
}

impl TensorBox {
    /// The box that starts at `start` and has `len[d]` indices in dimension `d`.
    ///
    /// # Errors
    /// When the lengths of the two slices differ, when there are more than [`DIMS_MAX`] of them, or when an
    /// end overflows.
    pub fn new(start: &[u64], len: &[u64]) -> Result<TensorBox, LayoutError> {
        if start.len() != len.len() {
            return Err(LayoutError::RankMismatch { expected: start.len(), found: len.len() });
        }
        let mut bounds = TensorBox::default();
        for (&start, &len) in start.iter().zip(len) {
            bounds.push(start, len)?;
        }
        Ok(bounds)
    }

    /// The box that covers a tensor of `shape`.
    ///
    /// # Errors
    /// When `shape` has more than [`DIMS_MAX`] dimensions.
    pub fn whole(shape: &[u64]) -> Result<TensorBox, LayoutError> {
        let mut bounds = TensorBox::default();
        for &len in shape {
            bounds.push(0, len)?;
        }
        Ok(bounds)
    }

    fn push(&mut self, start: u64, len: u64) -> Result<(), LayoutError> {
        if self.extents.len() == DIMS_MAX {
            return Err(LayoutError::TooManyDims { max: DIMS_MAX });
        }
        if start.checked_add(len).is_none() {
            return Err(LayoutError::BoxOverflow { start, len });
        }
        self.extents.push(Extent { start, len });
        Ok(())
    }

    /// Number of dimensions; 0 for a scalar.
    pub fn rank(&self) -> usize {
        self.extents.len()
    }

    /// First index per dimension.
    pub fn start(&self) -> impl ExactSizeIterator<Item = u64> + DoubleEndedIterator + '_ {
        self.extents.iter().map(|e| e.start)
    }

    /// Number of indices per dimension: the shape of what the box holds.
    pub fn len(&self) -> impl ExactSizeIterator<Item = u64> + DoubleEndedIterator + '_ {
        self.extents.iter().map(|e| e.len)
    }

    /// Index after the last, per dimension.
    pub fn end(&self) -> impl ExactSizeIterator<Item = u64> + DoubleEndedIterator + '_ {
        self.extents.iter().map(|e| e.end())
    }

    /// First index and length of dimension `dim`; `None` when there is no such dimension.
    pub fn extent(&self, dim: usize) -> Option<(u64, u64)> {
        self.extents.get(dim).map(|e| (e.start, e.len))
    }

    /// The lengths as a list: the shape of what the box holds.
    pub fn shape(&self) -> Dims {
        self.len().collect()
    }

    /// Number of elements, `None` when it overflows. A scalar has 1; a box with a zero length has 0.
    pub fn volume(&self) -> Option<u64> {
        volume(self.len())
    }

    /// Whether the box holds no element.
    pub fn is_empty(&self) -> bool {
        self.len().any(|len| len == 0)
    }

    /// What both boxes hold; `None` when that is nothing, or when their ranks differ.
    pub fn intersect(&self, other: &TensorBox) -> Option<TensorBox> {
        if self.rank() != other.rank() {
            return None;
        }
        let mut extents = SmallVec::new();
        for (a, b) in self.extents.iter().zip(&other.extents) {
            let start = a.start.max(b.start);
            let end = a.end().min(b.end());
            if start >= end {
                return None;
            }
            extents.push(Extent { start, len: end - start });
        }
        Some(TensorBox { extents })
    }

    /// Whether the boxes have an element in common.
    pub fn intersects(&self, other: &TensorBox) -> bool {
        self.rank() == other.rank()
            && self
                .extents
                .iter()
                .zip(&other.extents)
                .all(|(a, b)| a.start.max(b.start) < a.end().min(b.end()))
    }

    /// Whether every element of `other` is in this box. An empty box is in every box of its rank.
    pub fn contains(&self, other: &TensorBox) -> bool {
        self.rank() == other.rank()
            && (other.is_empty()
                || self
                    .extents
                    .iter()
                    .zip(&other.extents)
                    .all(|(a, b)| a.start <= b.start && b.end() <= a.end()))
    }

    /// Whether the box lies in a tensor of `shape`. Unlike for [`contains`](Self::contains), an empty box
    /// must too.
    pub fn fits(&self, shape: &[u64]) -> bool {
        self.rank() == shape.len() && self.end().zip(shape).all(|(end, &len)| end <= len)
    }

    /// This box as seen when the start of `from` is moved to the start of `to`. `None` when it starts before
    /// `from`, when an end overflows, or when the ranks differ.
    pub fn moved(&self, from: &TensorBox, to: &TensorBox) -> Option<TensorBox> {
        if self.rank() != from.rank() || self.rank() != to.rank() {
            return None;
        }
        let mut moved = TensorBox::default();
        for (extent, (from, to)) in self.extents.iter().zip(from.extents.iter().zip(&to.extents)) {
            let start = extent.start.checked_sub(from.start)?.checked_add(to.start)?;
            moved.push(start, extent.len).ok()?;
        }
        Some(moved)
    }

    /// The box with dimension `dim` replaced by `start` and `len`.
    ///
    /// # Errors
    /// When there is no such dimension, or the end overflows.
    pub fn with_dim(&self, dim: usize, start: u64, len: u64) -> Result<TensorBox, LayoutError> {
        if start.checked_add(len).is_none() {
            return Err(LayoutError::BoxOverflow { start, len });
        }
        let mut extents = self.extents.clone();
        let rank = extents.len();
        *extents.get_mut(dim).ok_or(LayoutError::NoSuchDim { dim, rank })? = Extent { start, len };
        Ok(TensorBox { extents })
    }

    /// Cuts the box in two before index `at` of dimension `dim`. `None` unless that leaves something on both
    /// sides.
    pub fn split(&self, dim: usize, at: u64) -> Option<(TensorBox, TensorBox)> {
        let extent = *self.extents.get(dim)?;
        if at <= extent.start || at >= extent.end() {
            return None;
        }
        let (mut below, mut above) = (self.clone(), self.clone());
        *below.extents.get_mut(dim)? = Extent { start: extent.start, len: at - extent.start };
        *above.extents.get_mut(dim)? = Extent { start: at, len: extent.end() - at };
        Some((below, above))
    }
}

/// Product of `lens`, `None` when it overflows; a zero anywhere makes it zero.
pub(crate) fn volume(lens: impl Iterator<Item = u64>) -> Option<u64> {
    let mut product = Some(1u64);
    for len in lens {
        if len == 0 {
            return Some(0);
        }
        product = product.and_then(|product| product.checked_mul(len));
    }
    product
}

impl Clone for TensorBox {
    /// As one copy: the derived clone goes element by element, and planning clones millions of boxes.
    fn clone(&self) -> TensorBox {
        TensorBox { extents: SmallVec::from_slice(&self.extents) }
    }
}

impl fmt::Display for TensorBox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (dim, extent) in self.extents.iter().enumerate() {
            let comma = if dim == 0 { "" } else { ", " };
            write!(f, "{comma}{}..{}", extent.start, extent.end())?;
        }
        f.write_str("]")
    }
}

impl fmt::Debug for TensorBox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for TensorBox {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.extents.iter().map(|e| (e.start, e.len)))
    }
}

impl<'de> Deserialize<'de> for TensorBox {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<TensorBox, D::Error> {
        deserializer.deserialize_seq(BoxVisitor)
    }
}

/// Reads pair by pair, so that a claimed length allocates nothing.
struct BoxVisitor;

impl<'de> Visitor<'de> for BoxVisitor {
    type Value = TensorBox;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at most {DIMS_MAX} pairs of start and length")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut pairs: A) -> Result<TensorBox, A::Error> {
        let mut bounds = TensorBox::default();
        while let Some((start, len)) = pairs.next_element()? {
            bounds.push(start, len).map_err(A::Error::custom)?;
        }
        Ok(bounds)
    }
}
