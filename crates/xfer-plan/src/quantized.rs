//! Parameters in FP8: the codes of parts of tensors, one above the other, and beside them the scales of their blocks.
//!
//! Blocks start at a tensor's first element, whatever is taken of it. So that each block of a parameter has one scale, a part
//! has to begin at a border of blocks, and to end at one or with its tensor. Nothing here guesses another layout.

use crate::error::{LayoutError, shorten};
use crate::param_map::ParamMap;
use crate::tensor_box::TensorBox;
use crate::transform::BlockQuant;

/// A part of a source tensor that a parameter takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorPart {
    /// The tensor's name.
    pub tensor: String,
    /// The shape that it must have.
    pub shape: Vec<u64>,
    /// The part of it.
    pub bounds: TensorBox,
}

impl TensorPart {
    /// The whole tensor, refused where it has another shape than the part is made for.
    pub fn whole(&self) -> ParamMap {
        ParamMap::tensor(&self.tensor).shaped(&self.shape)
    }

    /// The part in indices of blocks. `below`: whether something follows below it, which must start at a border.
    ///
    /// # Errors
    /// [`LayoutError::CutBlocks`] when it does not begin and end at borders.
    pub fn blocks(&self, quant: BlockQuant, below: bool) -> Result<TensorBox, LayoutError> {
        let cut = || LayoutError::CutBlocks {
            tensor: shorten(&self.tensor),
            bounds: Box::new(self.bounds.clone()),
            block: quant.block,
        };
        let mut blocks = self.bounds.clone();
        let rows = self.bounds.rank().checked_sub(2).ok_or_else(cut)?;
        for (dim, block) in (rows..).zip(quant.block.map(u64::from)) {
            let (start, len) = self.bounds.extent(dim).ok_or_else(cut)?;
            let end = start + len;
            let may_be_ragged = self.shape.get(dim) == Some(&end) && !(below && dim == rows);
            if block == 0 || !start.is_multiple_of(block) || !(end.is_multiple_of(block) || may_be_ragged) {
                return Err(cut());
            }
            let (first, end) = (start / block, end.div_ceil(block));
            blocks = blocks.with_dim(dim, first, end - first)?;
        }
        Ok(blocks)
    }
}

/// A quantised parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quantized {
    /// Its elements, of [`DType::F8E4M3`](crate::DType).
    pub codes: ParamMap,
    /// Their shape.
    pub shape: Vec<u64>,
    /// One for each of its blocks, of [`ScaleFormat::dtype`](crate::ScaleFormat).
    pub scales: ParamMap,
    /// Their shape.
    pub scales_shape: Vec<u64>,
}

impl Quantized {
    /// These parts one above the other: one projection, or several that are fused.
    ///
    /// # Errors
    /// When there are none, or one cuts blocks.
    pub fn stack(parts: &[TensorPart], quant: BlockQuant) -> Result<Quantized, LayoutError> {
        let (mut codes, mut scales) = (Stack::default(), Stack::default());
        for (nth, part) in parts.iter().enumerate() {
            let blocks = part.blocks(quant, nth + 1 < parts.len())?;
            scales.push(part.whole().scales(quant), &quant.scales_shape(&part.shape)?, blocks);
            codes.push(part.whole().quantize(quant), &part.shape, part.bounds.clone());
        }
        if parts.is_empty() {
            return Err(LayoutError::EmptyConcat);
        }
        let ((codes, shape), (scales, scales_shape)) = (codes.join(), scales.join());
        Ok(Quantized { codes, shape, scales, scales_shape })
    }
}

/// Maps one above the other, and their shape together.
#[derive(Default)]
pub(crate) struct Stack {
    maps: Vec<ParamMap>,
    shape: Vec<u64>,
}

impl Stack {
    /// Puts the part `bounds` of a map of shape `all` below what is there.
    pub(crate) fn push(&mut self, map: ParamMap, all: &[u64], bounds: TensorBox) {
        let part = bounds.shape();
        match self.shape.first_mut().zip(part.first()) {
            Some((rows, more)) => *rows = rows.saturating_add(*more),
            None => self.shape = part.to_vec(),
        }
        self.maps.push(if part.as_slice() == all { map } else { map.slice(bounds) });
    }

    /// The whole, and its shape.
    pub(crate) fn join(mut self) -> (ParamMap, Vec<u64>) {
        let single = if self.maps.len() == 1 { self.maps.pop() } else { None };
        (single.unwrap_or_else(|| ParamMap::concat(0, self.maps)), self.shape)
    }
}
