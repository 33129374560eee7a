//! Where the blocks of quantised tensors lie in a rank's memory, and in which blocks an operation's elements are.
//!
//! A plan's operations name bytes. To quantise them takes the scale of every block that they touch, and a scale takes the
//! largest magnitude of all elements of its block, wherever the rank holds them. This module says which rectangles those are;
//! it reads no element itself. What does, on the CPU or a GPU, keeps two flat tables of one f32 for each block that the rank
//! holds a part of: magnitudes and scales.
//!
//! A tensor of more than two dimensions is a stack of *matrices*. Of each there is here as much as has blocks of the rank.

use std::collections::BTreeMap;
use std::ops::Range;

use weight_ops::{BlockGrid, Dtype};
use xfer_plan::{BlockQuant, DType, HeldTable, Op, QuantPart, RegionIndex, TensorBox, Transform};

mod build;

pub use build::QuantError;
pub(crate) use build::kernel_dtype;

/// Where the blocks of quantised tensors lie in a rank's memory, as its plan says. It has been checked: every rectangle lies in its
/// matrix and in a region of the rank.
#[derive(Debug, Default)]
pub struct Quantization {
    matrices: Vec<Matrix>,
    /// The pieces by what operations say of them, in the order of their addresses.
    pieces: BTreeMap<(DType, BlockQuant), Vec<Piece>>,
    tables: BTreeMap<u32, Table>,
    reports: Vec<BlockRect>,
    told: Vec<BlockRect>,
    blocks: usize,
    /// By row of blocks, whether all its magnitudes are told.
    bands_told: Vec<bool>,
}

/// A matrix of a tensor, from the first to the last block of which the rank holds a part.
#[derive(Debug)]
pub(crate) struct Matrix {
    /// The type of its elements.
    pub(crate) dtype: Dtype,
    /// Its blocks.
    pub(crate) grid: BlockGrid,
    pub(crate) format: weight_ops::ScaleFormat,
    /// The entry of its first block in the flat tables.
    first: usize,
    /// Its first row of blocks among those of all matrices.
    first_band: usize,
    /// Rows and columns of a block.
    block: [usize; 2],
    /// Its first block in the tensor's matrix.
    start: [u64; 2],
    /// What the rank holds of it.
    parts: Vec<Elements>,
}

/// A rectangle of a matrix, and where its elements are in the rank's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Elements {
    /// Its first row and column in the matrix.
    pub(crate) origin: [usize; 2],
    /// Rows and columns.
    pub(crate) shape: [usize; 2],
    pub(crate) region: RegionIndex,
    /// The first element, in bytes.
    pub(crate) offset: u64,
    /// From one row to the next, in elements.
    pub(crate) stride: usize,
}

/// Part of what an operation quantises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rect {
    /// Which matrix.
    pub(crate) matrix: usize,
    pub(crate) elements: Elements,
    /// Where it goes in the slot, and from one row to the next, in bytes.
    pub(crate) into: usize,
    pub(crate) into_stride: usize,
}

/// Scales of neighbouring blocks that an operation sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// Which matrix.
    pub(crate) matrix: usize,
    /// Its row of blocks.
    pub(crate) band: usize,
    /// The first entry in the flat tables.
    pub(crate) entry: usize,
    pub(crate) count: usize,
}

/// Blocks of a matrix: rows and columns of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlockRect {
    pub(crate) matrix: usize,
    pub(crate) rows: Range<usize>,
    pub(crate) columns: Range<usize>,
}

/// Contiguous bytes of a tensor: some whole matrices of `rows` x `columns`, one after another.
#[derive(Debug, PartialEq, Eq)]
struct Piece {
    table: u32,
    region: RegionIndex,
    offset: u64,
    end: u64,
    rows: u64,
    columns: u64,
    /// Which matrices, and where in each the piece begins.
    matrices: Vec<(usize, [usize; 2])>,
}

#[derive(Debug)]
struct Table {
    /// Rows and columns of blocks of a matrix, in the whole tensor.
    blocks: [u64; 2],
    /// By the number of a matrix in the stack.
    matrices: BTreeMap<u64, usize>,
}

impl Matrix {
    /// Its entries in the flat tables.
    pub(crate) fn entries(&self) -> Range<usize> {
        self.first..self.first + self.grid.table_len()
    }

    /// Some of its rows of blocks, among those of all matrices.
    pub(crate) fn bands(&self, rows: Range<usize>) -> Range<usize> {
        self.first_band + rows.start..self.first_band + rows.end
    }

    /// Which rows of blocks some of its rows touch.
    pub(crate) fn rows_of_blocks(&self, elements: &Elements) -> Range<usize> {
        let [first, _] = elements.origin;
        first / self.block[0]..(first + elements.shape[0]).div_ceil(self.block[0])
    }

    /// What the rank holds of some blocks.
    pub(crate) fn held(&self, blocks: &BlockRect) -> impl Iterator<Item = Elements> {
        let [rows, columns] = self.block;
        let width = self.dtype.bytes() as u64;
        let wanted = [
            blocks.rows.start * rows..(blocks.rows.end * rows).min(self.grid.shape()[0]),
            blocks.columns.start * columns..(blocks.columns.end * columns).min(self.grid.shape()[1]),
        ];
        self.parts.iter().filter_map(move |part| {
            let from = [0, 1].map(|dim| part.origin[dim].max(wanted[dim].start));
            let end = [0, 1].map(|dim| (part.origin[dim] + part.shape[dim]).min(wanted[dim].end));
            let shape = [end[0].checked_sub(from[0])?, end[1].checked_sub(from[1])?];
            let skipped = (from[0] - part.origin[0]) * part.stride + from[1] - part.origin[1];
            let offset = part.offset + skipped as u64 * width;
            (!shape.contains(&0)).then_some(Elements { origin: from, shape, offset, ..*part })
        })
    }

    /// All blocks of some rows of them.
    pub(crate) fn across(&self, matrix: usize, rows: Range<usize>) -> BlockRect {
        BlockRect { matrix, rows, columns: 0..self.grid.blocks()[1] }
    }
}

impl Elements {
    /// The rectangles of at most so many elements, or of one, that it is made of.
    pub(crate) fn parts(&self, dtype: Dtype, elements_max: usize) -> impl Iterator<Item = Self> {
        let Self { origin, offset, stride, .. } = *self;
        parts(self.shape, elements_max).map(move |([row, column], shape)| Self {
            origin: [origin[0] + row, origin[1] + column],
            shape,
            offset: offset.saturating_add(((row * stride + column) * dtype.bytes()) as u64),
            ..*self
        })
    }
}

/// The rectangles of at most so many elements, or of one, that a rectangle is made of: their first rows and columns, and their
/// shapes.
pub(crate) fn parts(
    [rows, columns]: [usize; 2],
    elements_max: usize,
) -> impl Iterator<Item = ([usize; 2], [usize; 2])> {
    let across = columns.min(elements_max).max(1);
    let down = (elements_max / across).max(1);
    (0..rows).step_by(down).flat_map(move |row| {
        (0..columns)
            .step_by(across)
            .map(move |column| ([row, column], [down.min(rows - row), across.min(columns - column)]))
    })
}

impl Quantization {
    /// How many matrices there are.
    #[cfg(feature = "cuda")]
    pub(crate) fn matrices(&self) -> usize {
        self.matrices.len()
    }

    pub(crate) fn matrix(&self, number: usize) -> Option<&Matrix> {
        self.matrices.get(number)
    }

    /// Entries of a flat table.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    /// By row of blocks of all matrices, whether its magnitudes are told and need not be found.
    pub(crate) fn bands_told(&self) -> &[bool] {
        &self.bands_told
    }

    /// The blocks whose magnitudes are reported, in the order in which they are.
    pub(crate) fn reports(&self) -> &[BlockRect] {
        &self.reports
    }

    /// How many magnitudes are told.
    pub(crate) fn told(&self) -> usize {
        self.entries_of(&self.told).count()
    }

    /// Why a push cannot begin that was told these magnitudes.
    pub(crate) fn told_wrongly(&self, told: &[f32]) -> String {
        format!(
            "this rank is told {} magnitudes of blocks that it shares with others where the plan has {}: merge what all \
             trainers report, and begin the push with what is told to this one",
            told.len(),
            self.told()
        )
    }

    /// A table of magnitudes before the rank has looked at its own: what was told, and 0 elsewhere. `None` if it is not as
    /// long as the plan says.
    pub(crate) fn begin(&self, told: &[f32]) -> Option<Vec<f32>> {
        let mut table = vec![0.0; self.blocks];
        if told.len() != self.told() {
            return None;
        }
        for (entry, magnitude) in self.entries_of(&self.told).zip(told) {
            *table.get_mut(entry)? = *magnitude;
        }
        Some(table)
    }

    /// The magnitudes to report, out of a table.
    pub(crate) fn reported(&self, table: &[f32]) -> Vec<f32> {
        self.entries_of(&self.reports).filter_map(|entry| table.get(entry).copied()).collect()
    }

    /// The entries of blocks, row by row.
    fn entries_of(&self, blocks: &[BlockRect]) -> impl Iterator<Item = usize> {
        blocks.iter().flat_map(|BlockRect { matrix, rows, columns }| {
            let (first, across) =
                self.matrices.get(*matrix).map_or((0, 0), |matrix| (matrix.first, matrix.grid.blocks()[1]));
            rows.clone().flat_map(move |row| columns.clone().map(move |column| first + row * across + column))
        })
    }

    /// The rectangles that an operation quantises. `None` where it reads what the rank does not hold of a tensor that is
    /// quantised so.
    pub(crate) fn rects(&self, op: &Op) -> Option<Vec<Rect>> {
        let Transform::Quantize { from, quant } = op.transform else { return None };
        let pieces = self.pieces.get(&(from, quant))?;
        let (width, row_elements) = (from.bytes(), u64::from(op.row_bytes));
        let mut rects = Vec::new();
        let mut row = 0;
        while row < u64::from(op.rows) {
            let at = op.source.offset.checked_add(row.checked_mul(op.source.stride)?)?;
            let into = row.checked_mul(row_elements)?;
            let (piece, place) = find(pieces, op.source.region, at, width)?;
            if op.source.stride == piece.columns * width && place.column + row_elements <= piece.columns {
                // Rows below one another.
                let count = (u64::from(op.rows) - row).min(piece.rows - place.row);
                rects.push(piece.rect(&place, at, [count, row_elements], into, row_elements)?);
                row += count;
                continue;
            }
            let mut done = 0;
            while done < row_elements {
                let at = at.checked_add(done * width)?;
                let (piece, place) = find(pieces, op.source.region, at, width)?;
                let left = row_elements - done;
                let shape = match (left / piece.columns).min(piece.rows - place.row) {
                    rows if rows > 0 && place.column == 0 => [rows, piece.columns],
                    _ => [1, left.min(piece.columns - place.column)],
                };
                rects.push(piece.rect(&place, at, shape, into + done, shape[1])?);
                done += shape[0] * shape[1];
            }
            row += 1;
        }
        Some(rects)
    }

    /// The scales that an operation sends, in order. `None` where it sends those of blocks that the rank has nothing of.
    pub(crate) fn runs(&self, op: &Op) -> Option<Vec<Run>> {
        let Transform::Scales { quant, .. } = op.transform else { return None };
        let table = self.tables.get(&op.source.region.0)?;
        let width = quant.scales.dtype().bytes();
        let [rows, columns] = table.blocks;
        let of_matrix = rows.checked_mul(columns)?;
        let mut runs = Vec::new();
        for row in 0..u64::from(op.rows) {
            let at = op.source.offset.checked_add(row.checked_mul(op.source.stride)?)?;
            let mut number = at.checked_div(width)?;
            let end = number.checked_add(u64::from(op.row_bytes) / width)?;
            if !at.is_multiple_of(width) || !u64::from(op.row_bytes).is_multiple_of(width) {
                return None;
            }
            while number < end {
                let (of_stack, in_matrix) = (number.checked_div(of_matrix)?, number.checked_rem(of_matrix)?);
                let (block_row, block_column) = (in_matrix / columns, in_matrix % columns);
                let count = (end - number).min(columns - block_column);
                let matrix = *table.matrices.get(&of_stack)?;
                let held = self.matrices.get(matrix)?;
                let band = usize::try_from(block_row.checked_sub(held.start[0])?).ok()?;
                let column = usize::try_from(block_column.checked_sub(held.start[1])?).ok()?;
                let [bands, across] = held.grid.blocks();
                if band >= bands || column as u64 + count > across as u64 {
                    return None;
                }
                runs.push(Run {
                    matrix,
                    band,
                    entry: held.first + band * across + column,
                    count: count as usize,
                });
                number += count;
            }
        }
        Some(runs)
    }
}

/// A place in a piece.
struct InPiece {
    /// Which of its matrices.
    number: usize,
    row: u64,
    column: u64,
}

/// The piece that has a byte, and which of its elements begins there.
fn find(pieces: &[Piece], region: RegionIndex, at: u64, width: u64) -> Option<(&Piece, InPiece)> {
    let behind = pieces.partition_point(|piece| (piece.region, piece.offset) <= (region, at));
    let piece = pieces.get(behind.checked_sub(1)?)?;
    let bytes = at - piece.offset;
    if piece.region != region || at >= piece.end || !bytes.is_multiple_of(width) {
        return None;
    }
    let (element, matrix) = (bytes / width, piece.rows * piece.columns);
    let (row, column) = (element % matrix / piece.columns, element % piece.columns);
    Some((piece, InPiece { number: (element / matrix) as usize, row, column }))
}

impl Piece {
    fn rect(&self, at: &InPiece, offset: u64, shape: [u64; 2], into: u64, into_stride: u64) -> Option<Rect> {
        let (matrix, start) = *self.matrices.get(at.number)?;
        let origin = [start[0] + at.row as usize, start[1] + at.column as usize];
        let shape = [usize::try_from(shape[0]).ok()?, usize::try_from(shape[1]).ok()?];
        let elements = Elements { origin, shape, region: self.region, offset, stride: self.columns as usize };
        let (into, into_stride) = (usize::try_from(into).ok()?, usize::try_from(into_stride).ok()?);
        Some(Rect { matrix, elements, into, into_stride })
    }
}
