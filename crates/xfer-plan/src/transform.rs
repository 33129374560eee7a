//! Transforms: what happens to elements between a source tensor and a destination parameter.
//!
//! The planner only says which transform applies where and what it needs; kernels live elsewhere.

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::error::LayoutError;

/// How the scales of quantised blocks are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleFormat {
    /// `amax / 448` as [`DType::F32`].
    #[default]
    F32,
    /// The power of two at or above `amax / 448`, as its biased exponent: one [`DType::U8`] per block. Four along the last
    /// dimension are one packed 32-bit word.
    Ue8m0,
}

impl ScaleFormat {
    /// The element type of a tensor of scales.
    pub fn dtype(self) -> DType {
        match self {
            ScaleFormat::F32 => DType::F32,
            ScaleFormat::Ue8m0 => DType::U8,
        }
    }
}

/// Block quantisation to [`DType::F8E4M3`]: one scale per block of the last two dimensions. Blocks start at the
/// tensor's first element, whatever its shards are; the last ones of a dimension may be shorter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockQuant {
    /// Rows and columns of a block, each at least 1.
    pub block: [u32; 2],
    /// How scales are stored.
    pub scales: ScaleFormat,
}

impl Default for BlockQuant {
    /// 128 x 128 with f32 scales, as DeepSeek-V3's `weight_scale_inv`.
    fn default() -> BlockQuant {
        BlockQuant { block: [128, 128], scales: ScaleFormat::F32 }
    }
}

impl BlockQuant {
    /// The shape of the scales of a tensor of `shape`.
    ///
    /// # Errors
    /// When the tensor has fewer than two dimensions, or a block has no rows or columns.
    pub fn scales_shape(&self, shape: &[u64]) -> Result<Vec<u64>, LayoutError> {
        let [rows, columns] = self.block;
        match shape {
            [outer @ .., n, k] if rows > 0 && columns > 0 => {
                let blocks = [n.div_ceil(rows.into()), k.div_ceil(columns.into())];
                Ok(outer.iter().copied().chain(blocks).collect())
            }
            _ => Err(LayoutError::NotBlocks { block: self.block, shape: shape.to_vec() }),
        }
    }
}

/// What an operation does to elements on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transform {
    /// Nothing: bytes are written as they are.
    #[default]
    Copy,
    /// Each element is converted, rounded to nearest even.
    Cast {
        /// The type at the source.
        from: DType,
        /// The type at the destination.
        to: DType,
    },
    /// Each element is divided by its block's scale and rounded to [`DType::F8E4M3`].
    Quantize {
        /// The type at the source.
        from: DType,
        /// The blocks.
        quant: BlockQuant,
    },
    /// Not elements but the scales of their blocks.
    Scales {
        /// The type at the source.
        from: DType,
        /// The blocks.
        quant: BlockQuant,
    },
}

impl Transform {
    /// Whether bytes go as they are.
    pub fn is_copy(&self) -> bool {
        *self == Transform::Copy
    }

    /// The element type at the destination, for elements of `source` type.
    pub fn destination(&self, source: DType) -> DType {
        match self {
            Transform::Copy => source,
            Transform::Cast { to, .. } => *to,
            Transform::Quantize { .. } => DType::F8E4M3,
            Transform::Scales { quant, .. } => quant.scales.dtype(),
        }
    }

    /// Bytes of an element at the destination; 1 for a copy, of which only bytes are known.
    pub(crate) fn destination_bytes(&self) -> u64 {
        match *self {
            Transform::Copy | Transform::Quantize { .. } => 1,
            Transform::Cast { to, .. } => to.bytes(),
            Transform::Scales { quant, .. } => quant.scales.dtype().bytes(),
        }
    }

    /// Bytes at the source that correspond to `bytes` at the destination.
    pub fn source_bytes(&self, bytes: u64) -> u64 {
        match *self {
            Transform::Copy | Transform::Scales { .. } => bytes,
            Transform::Cast { from, to } => bytes / to.bytes() * from.bytes(),
            Transform::Quantize { from, .. } => bytes * from.bytes(),
        }
    }

    /// Bytes that are read to make `bytes` at the destination: for scales, whole blocks.
    pub fn read_bytes(&self, bytes: u64) -> u64 {
        match *self {
            Transform::Scales { from, quant } => {
                let [rows, columns] = quant.block.map(u64::from);
                let block = rows.saturating_mul(columns).saturating_mul(from.bytes());
                (bytes / quant.scales.dtype().bytes()).saturating_mul(block)
            }
            _ => self.source_bytes(bytes),
        }
    }

    /// Whether there is such a conversion.
    pub(crate) fn is_possible(&self) -> bool {
        use DType::{BF16, F8E4M3, F16, F32};
        match *self {
            Transform::Copy => true,
            Transform::Cast { from, to } => {
                from != to && matches!(from, BF16 | F16 | F32) && matches!(to, BF16 | F16 | F32 | F8E4M3)
            }
            Transform::Quantize { from, .. } | Transform::Scales { from, .. } => matches!(from, BF16 | F32),
        }
    }
}
