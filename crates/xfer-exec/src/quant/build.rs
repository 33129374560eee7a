//! Checks what a plan says of quantised tensors against the rank's memory, and lays out their blocks.

use super::*;

/// Matrices of a rank at most: more than any stack of experts on one rank has.
const MATRICES_MAX: usize = 1 << 22;

/// Why a rank cannot quantise what its plan wants.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QuantError {
    /// A tensor of a type or shape that is not quantised.
    #[error(
        "the plan quantises table {table} of {dtype} elements and shape {shape:?}, which is not possible"
    )]
    Tensor {
        /// Its place in the plan's tables.
        table: u32,
        /// The type.
        dtype: DType,
        /// The shape.
        shape: Vec<u64>,
    },
    /// A piece outside its tensor or outside this rank's memory.
    #[error(
        "{bounds} of table {table} is not in {region} of this rank; do both sides run the same manifest?"
    )]
    Piece {
        /// Place in the plan's tables.
        table: u32,
        /// The piece.
        bounds: TensorBox,
        /// Where it should be.
        region: RegionIndex,
    },
    /// Bytes that are part of two tensors, which both are quantised.
    #[error(
        "tables {tables:?} share bytes of {region} and are quantised alike: what an operation quantises is not clear; \
         declare one of them as the other"
    )]
    Shared {
        /// Places in the plan's tables.
        tables: [u32; 2],
        /// Where.
        region: RegionIndex,
    },
    /// Blocks to report, or to be told of, of which this rank holds nothing.
    #[error("blocks {blocks} of table {table} are exchanged with this rank, which holds nothing of them")]
    Blocks {
        /// Place in the plan's tables.
        table: u32,
        /// The blocks.
        blocks: TensorBox,
    },
    /// More than there is memory for.
    #[error("this rank would quantise more than {MATRICES_MAX} matrices or 2^32 blocks")]
    TooMany,
    /// An operation whose elements or scales this rank does not hold.
    #[error("operation {op} quantises, or sends scales of, what this rank does not hold; is it the plan's?")]
    Op {
        /// Its number.
        op: usize,
    },
}

/// A piece's share of one matrix.
struct Share {
    /// Which matrix of the stack.
    number: u64,
    piece: usize,
}

impl Quantization {
    /// Lays out what `part` says, for a rank with regions of these lengths, and checks that it is enough for `ops`.
    pub(crate) fn new(part: &QuantPart, region_bytes: &[u64], ops: &[Op]) -> Result<Self, QuantError> {
        let mut this = Self::default();
        for table in &part.tables {
            this.add(table, region_bytes)?;
        }
        for pieces in this.pieces.values_mut() {
            pieces.sort_by_key(|piece| (piece.region, piece.offset));
            for pair in pieces.windows(2) {
                if let [a, b] = pair
                    && a.region == b.region
                    && b.offset < a.end
                    && (a.table != b.table || a != b)
                {
                    return Err(QuantError::Shared { tables: [a.table, b.table], region: a.region });
                }
            }
        }
        this.bands_told = this.find_told_bands();
        for (number, op) in ops.iter().enumerate() {
            let is_held = match op.transform {
                Transform::Quantize { .. } => this.rects(op).is_some(),
                Transform::Scales { .. } => this.runs(op).is_some(),
                Transform::Copy | Transform::Cast { .. } => true,
            };
            if !is_held {
                return Err(QuantError::Op { op: number });
            }
        }
        Ok(this)
    }

    fn add(&mut self, held: &HeldTable, region_bytes: &[u64]) -> Result<(), QuantError> {
        let HeldTable { table, dtype, shape, quant, pieces, reports, told } = held;
        let table = *table;
        let impossible = || QuantError::Tensor { table, dtype: *dtype, shape: shape.clone() };
        let ([.., rows, columns], Ok(blocks)) = (shape.as_slice(), quant.scales_shape(shape)) else {
            return Err(impossible());
        };
        let block = quant.block.map(u64::from);
        let of_kernels = kernel_dtype(*dtype).ok_or_else(impossible)?;
        let (whole, stack) = ([*rows, *columns], shape.get(..shape.len() - 2).unwrap_or_default());
        // The matrices that the pieces have a part of, by number.
        let mut shares = Vec::new();
        for (number, piece) in pieces.iter().enumerate() {
            let outside = || QuantError::Piece { table, bounds: piece.bounds.clone(), region: piece.region };
            let end = piece.bounds.volume().and_then(|elements| elements.checked_mul(dtype.bytes()));
            let end = end.and_then(|bytes| bytes.checked_add(piece.offset));
            let len = region_bytes.get(piece.region.index());
            if piece.bounds.is_empty()
                || !piece.bounds.fits(shape)
                || end.zip(len).is_none_or(|(end, len)| end > *len)
            {
                return Err(outside());
            }
            if self.matrices.len() + shares.len() > MATRICES_MAX {
                return Err(QuantError::TooMany);
            }
            let numbers = numbers(&piece.bounds, stack);
            shares.extend(numbers.take(MATRICES_MAX).map(|of| Share { number: of, piece: number }));
        }
        let mut by_number: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
        for Share { number, piece } in shares {
            by_number.entry(number).or_default().push(piece);
        }
        // From the first to the last block of any piece.
        let mut of_stack = BTreeMap::new();
        let mut in_pieces: Vec<Vec<(usize, [usize; 2])>> = pieces.iter().map(|_| Vec::new()).collect();
        let mut seen: Vec<u64> = vec![0; pieces.len()];
        for (number, held_by) in by_number {
            let bounds_of = |piece: usize, dim: usize| {
                let bounds = pieces.get(piece).map(|piece| &piece.bounds);
                bounds.and_then(|bounds| bounds.extent(bounds.rank() - 2 + dim)).unwrap_or_default()
            };
            let start = [0, 1].map(|dim| {
                held_by.iter().map(|piece| bounds_of(*piece, dim).0 / block[dim]).min().unwrap_or(0)
            });
            let end = [0, 1].map(|dim| {
                let ends = held_by.iter().map(|piece| bounds_of(*piece, dim));
                ends.map(|(first, len)| (first + len).div_ceil(block[dim])).max().unwrap_or(0)
            });
            let from = [0, 1].map(|dim| start[dim] * block[dim]);
            let size = [0, 1].map(|dim| (end[dim].saturating_mul(block[dim])).min(whole[dim]) - from[dim]);
            let matrix = self.matrices.len();
            let mut parts = Vec::with_capacity(held_by.len());
            for &piece in &held_by {
                let [(row, rows), (column, columns)] = [0, 1].map(|dim| bounds_of(piece, dim));
                let origin = [(row - from[0]) as usize, (column - from[1]) as usize];
                let nth = seen.get_mut(piece).map_or(0, |seen| std::mem::replace(seen, *seen + 1));
                let offset = pieces.get(piece).map_or(0, |piece| piece.offset);
                parts.push(Elements {
                    origin,
                    shape: [rows as usize, columns as usize],
                    region: pieces.get(piece).map_or(RegionIndex(0), |piece| piece.region),
                    offset: offset + nth * rows * columns * dtype.bytes(),
                    stride: columns as usize,
                });
                if let Some(in_piece) = in_pieces.get_mut(piece) {
                    in_piece.push((matrix, origin));
                }
            }
            let size = size.map(|len| len as usize);
            let grid = BlockGrid::new(size, quant.block).map_err(|_| impossible())?;
            let (first_band, entry) = (self.bands_told.len(), self.blocks);
            self.blocks = self.blocks.checked_add(grid.table_len()).ok_or(QuantError::TooMany)?;
            if u32::try_from(self.blocks).is_err() {
                return Err(QuantError::TooMany);
            }
            self.bands_told.resize(first_band + grid.blocks()[0], false);
            let format = match quant.scales {
                xfer_plan::ScaleFormat::F32 => weight_ops::ScaleFormat::F32,
                xfer_plan::ScaleFormat::Ue8m0 => weight_ops::ScaleFormat::Ue8m0,
            };
            // A block that is larger than the matrix ends with it.
            let block = [0, 1].map(|dim| block[dim].min(size[dim].max(1) as u64) as usize);
            self.matrices.push(Matrix {
                dtype: of_kernels,
                grid,
                format,
                first: entry,
                first_band,
                block,
                start,
                parts,
            });
            of_stack.insert(number, matrix);
        }
        for (piece, matrices) in pieces.iter().zip(in_pieces) {
            let extent = |dim: usize| piece.bounds.extent(shape.len() - 2 + dim).map_or(0, |(_, len)| len);
            let (rows, columns) = (extent(0), extent(1));
            let end = piece.offset + matrices.len() as u64 * rows * columns * dtype.bytes();
            let (region, offset) = (piece.region, piece.offset);
            let piece = Piece { table, region, offset, end, rows, columns, matrices };
            self.pieces.entry((*dtype, *quant)).or_default().push(piece);
        }
        let (table_rows, table_columns) = match blocks.as_slice() {
            [.., rows, columns] => (*rows, *columns),
            _ => return Err(impossible()),
        };
        self.tables.insert(table, Table { blocks: [table_rows, table_columns], matrices: of_stack });
        for (boxes, is_told) in [(reports, false), (told, true)] {
            for blocks in boxes {
                let rects = self.rects_of(table, blocks, stack);
                let rects = rects.ok_or_else(|| QuantError::Blocks { table, blocks: blocks.clone() })?;
                if is_told { self.told.extend(rects) } else { self.reports.extend(rects) }
            }
        }
        Ok(())
    }

    /// A box of blocks of a table, matrix by matrix.
    fn rects_of(&self, table: u32, blocks: &TensorBox, stack: &[u64]) -> Option<Vec<BlockRect>> {
        let table = self.tables.get(&table)?;
        let dims = blocks.rank().checked_sub(2).filter(|dims| *dims == stack.len())?;
        let rect = |number: u64| {
            let matrix = *table.matrices.get(&number)?;
            let held = self.matrices.get(matrix)?;
            let range = |dim: usize| {
                let (first, len) = blocks.extent(dims + dim)?;
                let first = usize::try_from(first.checked_sub(held.start[dim])?).ok()?;
                let end = first.checked_add(usize::try_from(len).ok()?)?;
                (end <= held.grid.blocks()[dim]).then_some(first..end)
            };
            Some(BlockRect { matrix, rows: range(0)?, columns: range(1)? })
        };
        numbers(blocks, stack).map(rect).collect()
    }

    /// By row of blocks, whether every one of it is told.
    fn find_told_bands(&self) -> Vec<bool> {
        let mut is_told = vec![false; self.blocks];
        for entry in self.entries_of(&self.told) {
            if let Some(is_told) = is_told.get_mut(entry) {
                *is_told = true;
            }
        }
        let bands = self.matrices.iter().flat_map(|matrix| {
            let across = matrix.grid.blocks()[1].max(1);
            is_told.get(matrix.entries()).unwrap_or_default().chunks(across)
        });
        bands.map(|band| band.iter().all(|is_told| *is_told)).collect()
    }
}

/// The row-major numbers of a box's indices in all but the last two dimensions.
fn numbers(bounds: &TensorBox, stack: &[u64]) -> impl Iterator<Item = u64> {
    let extents: Vec<(u64, u64)> = (0..stack.len()).filter_map(|dim| bounds.extent(dim)).collect();
    let count = extents.iter().map(|(_, len)| len).fold(1_u64, |count, len| count.saturating_mul(*len));
    let stack = stack.to_vec();
    (0..count).map(move |mut nth| {
        let (mut number, mut size) = (0_u64, 1_u64);
        for (&(start, len), of) in extents.iter().zip(&stack).rev() {
            number = number.saturating_add((start + nth % len.max(1)).saturating_mul(size));
            nth /= len.max(1);
            size = size.saturating_mul(*of);
        }
        number
    })
}

/// A type that kernels work on; `None` for the others.
pub(crate) fn kernel_dtype(dtype: DType) -> Option<Dtype> {
    match dtype {
        DType::F32 => Some(Dtype::F32),
        DType::BF16 => Some(Dtype::BF16),
        DType::F16 => Some(Dtype::F16),
        DType::F8E4M3 => Some(Dtype::F8E4M3),
        _ => None,
    }
}
