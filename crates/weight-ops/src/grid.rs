//! Where blocks lie in a tensor, and where a block's entry lies in a table.
//!
//! Blocks start at the tensor's first element, whatever its shards are.

use std::ops::Range;

use crate::error::Error;

/// A matrix cut into blocks of equal shape; the last of a row or column of blocks may be cut short.
///
/// A table of amaxes or scales has one f32 per block, row-major. It belongs to the grid's matrix as a whole. That need
/// not be the whole tensor: any part of it that begins at a block's first row and column will do.
///
/// ```
/// use weight_ops::BlockGrid;
/// let grid = BlockGrid::new([300, 256], [128, 128])?;
/// assert_eq!(grid.blocks(), [3, 2]);
/// # Ok::<(), weight_ops::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockGrid {
    shape: [usize; 2],
    block: [usize; 2],
    blocks: [usize; 2],
}

impl BlockGrid {
    /// A matrix of `shape` elements, rows by columns, in blocks of `block` elements. DeepSeek-V3 has blocks of
    /// `[128, 128]`; a block may be as large as the matrix, which gives one scale for all of it.
    ///
    /// # Errors
    /// When a block has no rows or no columns, or when no memory could hold a table.
    pub fn new(shape: [usize; 2], block: [u32; 2]) -> Result<BlockGrid, Error> {
        let [block_rows, block_columns] = block.map(|len| len as usize);
        if block_rows == 0 || block_columns == 0 {
            return Err(Error::EmptyBlock { block });
        }
        let blocks = [shape[0].div_ceil(block_rows), shape[1].div_ceil(block_columns)];
        // Bytes and not entries: both are computed with elsewhere.
        match blocks[0].checked_mul(blocks[1]).and_then(|len| len.checked_mul(size_of::<f32>())) {
            Some(_) => Ok(BlockGrid { shape, block: [block_rows, block_columns], blocks }),
            None => Err(Error::TooManyBlocks { shape }),
        }
    }

    /// Rows and columns of elements.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Rows and columns of blocks: the shape of a table.
    pub fn blocks(&self) -> [usize; 2] {
        self.blocks
    }

    /// Entries of a table.
    pub fn table_len(&self) -> usize {
        self.blocks[0] * self.blocks[1] // `new` has checked it
    }

    /// Rows and columns of a block that is not cut short.
    pub(crate) fn block(&self) -> [usize; 2] {
        self.block
    }

    /// Fails unless a rectangle of `shape` at `origin` lies in the matrix.
    pub(crate) fn check_rectangle(&self, origin: [usize; 2], shape: [usize; 2]) -> Result<(), Error> {
        check_inside(origin, shape, self.shape)
    }

    /// Fails unless a table has one entry for each block.
    pub(crate) fn check_table(&self, table: &[f32]) -> Result<(), Error> {
        if table.len() == self.table_len() {
            Ok(())
        } else {
            Err(Error::TableLength { found: table.len(), blocks: self.blocks })
        }
    }
}

/// Fails unless a rectangle of `shape` at `origin` lies in a matrix of shape `outer`.
pub(crate) fn check_inside(origin: [usize; 2], shape: [usize; 2], outer: [usize; 2]) -> Result<(), Error> {
    let fits = |dim: usize| origin[dim].checked_add(shape[dim]).is_some_and(|end| end <= outer[dim]);
    if fits(0) && fits(1) { Ok(()) } else { Err(Error::Outside { origin, shape, outer }) }
}

/// The blocks that `len` indices from `first` on touch in one dimension, in order: the index of each, and which of the
/// indices, counted from 0, are in it.
#[inline(always)]
pub(crate) fn segments(
    first: usize,
    len: usize,
    block: usize,
) -> impl Iterator<Item = (usize, Range<usize>)> {
    let end = first + len;
    (first / block..end.div_ceil(block)).map(move |index| {
        let start = index * block;
        (index, start.max(first) - first..start.saturating_add(block).min(end) - first)
    })
}
