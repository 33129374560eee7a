//! Block quantisation on a device.

use gpu_mem::{DeviceMemory, Function};

use crate::cuda::Kernels;
use crate::cuda::cast::kernel_name;
use crate::cuda::error::{Error, check_alignment};
use crate::cuda::memory::{DeviceMatrix, DeviceRange};
use crate::cuda::operation::{Argument, Operation};
use crate::dtype::Dtype;
use crate::error::Error as ShapeError;
use crate::grid::BlockGrid;
use crate::scale::ScaleFormat;

/// As in quantize.cu.
const THREADS: u32 = 256;
const TILE: u64 = 128;

/// `Args` of quantize.cu, which says what they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct TileArgs {
    source: u64,
    source_stride: u64,
    destination: u64,
    destination_stride: u64,
    table: u64,
    table_columns: u64,
    origin: [u64; 2],
    shape: [u64; 2],
    block: [u64; 2],
    first_block: [u64; 2],
    block_tiles: [u64; 2],
    tile_columns: u64,
    ue8m0: u64,
}

impl TileArgs {
    /// A rectangle of a grid's matrix, without its memory, and how many tiles it has. Tiles may be empty.
    fn new(grid: &BlockGrid, origin: [usize; 2], shape: [usize; 2]) -> (Self, u64) {
        // A block that is larger than the matrix ends with it.
        let block = [0, 1].map(|dim| grid.block()[dim].min(grid.shape()[dim]).max(1) as u64);
        let (origin, shape) = (origin.map(|index| index as u64), shape.map(|len| len as u64));
        let block_tiles = block.map(|len| len.div_ceil(TILE));
        let first_block = [0, 1].map(|dim| origin[dim] / block[dim]);
        let tiles = [0, 1].map(|dim| {
            let blocks = (origin[dim] + shape[dim]).div_ceil(block[dim]) - first_block[dim];
            blocks.saturating_mul(block_tiles[dim])
        });
        let args = Self {
            source: 0,
            source_stride: 0,
            destination: 0,
            destination_stride: 0,
            table: 0,
            table_columns: grid.blocks()[1] as u64,
            origin,
            shape,
            block,
            first_block,
            block_tiles,
            tile_columns: tiles[1],
            ue8m0: 0,
        };
        (args, tiles[0].saturating_mul(tiles[1]))
    }
}

/// What one kernel works on.
struct Tiles<'a> {
    grid: &'a BlockGrid,
    origin: [usize; 2],
    source: &'a DeviceMatrix,
    destination: Option<&'a DeviceMatrix>,
    table: &'a DeviceRange,
    format: ScaleFormat,
}

impl Kernels {
    /// As [`block_amax`](crate::block_amax): `amax` is a table of the grid in f32, 0 before the first part, never negative.
    ///
    /// # Errors
    /// Those of [`block_amax`](crate::block_amax), and when `source` does not hold floats or the table is not aligned.
    pub fn block_amax(
        &self,
        grid: &BlockGrid,
        source: &DeviceMatrix,
        origin: [usize; 2],
        amax: &DeviceRange,
    ) -> Result<Operation, Error> {
        let function = self.float_kernel("block_amax", source, "the source")?;
        let format = ScaleFormat::F32;
        self.tiles(function, &Tiles { grid, origin, source, destination: None, table: amax, format })
    }

    /// [`scale_of`](crate::scale_of) for each entry of a table of amaxes; `scales` may be the same table.
    ///
    /// # Errors
    /// When the tables are not of one length, of whole f32 entries, and aligned.
    pub fn scales(
        &self,
        amax: &DeviceRange,
        format: ScaleFormat,
        scales: &DeviceRange,
    ) -> Result<Operation, Error> {
        let expected = amax.len().next_multiple_of(4);
        for (what, table) in [("the table of amaxes", amax), ("the table of scales", scales)] {
            if table.len() != expected {
                return Err(Error::WrongLength { what, bytes: table.len(), expected });
            }
            check_alignment(what, table.address(), 4)?;
        }
        let count = amax.len() / 4;
        let arguments = vec![
            Argument::U64(amax.address()),
            Argument::U64(scales.address()),
            Argument::U64(count),
            Argument::U64(u64::from(format == ScaleFormat::Ue8m0)),
        ];
        let blocks = count.div_ceil(u64::from(THREADS));
        let function = self.quantize.function("scales")?;
        self.operation(function, blocks, THREADS, arguments, vec![amax.clone(), scales.clone()])
    }

    /// [`ue8m0_byte`](crate::ue8m0_byte) for each entry of a table of scales that are powers of two.
    ///
    /// # Errors
    /// When there is not one byte for each entry, or the table is not aligned.
    pub fn scale_bytes(&self, scales: &DeviceRange, bytes: &DeviceRange) -> Result<Operation, Error> {
        let count = scales.len() / 4;
        if !scales.len().is_multiple_of(4) || bytes.len() != count {
            let (what, expected) = ("the bytes of scales", count);
            return Err(Error::WrongLength { what, bytes: bytes.len(), expected });
        }
        check_alignment("the table of scales", scales.address(), 4)?;
        let arguments =
            vec![Argument::U64(scales.address()), Argument::U64(bytes.address()), Argument::U64(count)];
        let function = self.quantize.function("scale_bytes")?;
        let blocks = count.div_ceil(u64::from(THREADS));
        self.operation(function, blocks, THREADS, arguments, vec![scales.clone(), bytes.clone()])
    }

    /// As [`quantize_rect`](crate::quantize_rect): `scales` is a table of the grid in f32.
    ///
    /// # Errors
    /// Those of [`quantize_rect`](crate::quantize_rect), and when a matrix holds other types or the table is not aligned.
    pub fn quantize_rect(
        &self,
        grid: &BlockGrid,
        source: &DeviceMatrix,
        origin: [usize; 2],
        scales: &DeviceRange,
        destination: &DeviceMatrix,
    ) -> Result<Operation, Error> {
        check_codes("the destination", destination)?;
        let function = self.float_kernel("quantize_rect", source, "the source")?;
        let (format, destination) = (ScaleFormat::F32, Some(destination));
        self.tiles(function, &Tiles { grid, origin, source, destination, table: scales, format })
    }

    /// As [`dequantize_rect`](crate::dequantize_rect).
    ///
    /// # Errors
    /// Those of [`dequantize_rect`](crate::dequantize_rect), and when a matrix holds other types or the table is not
    /// aligned.
    pub fn dequantize_rect(
        &self,
        grid: &BlockGrid,
        source: &DeviceMatrix,
        origin: [usize; 2],
        scales: &DeviceRange,
        destination: &DeviceMatrix,
    ) -> Result<Operation, Error> {
        check_codes("the source", source)?;
        let function = self.float_kernel("dequantize", destination, "the destination")?;
        let (format, destination) = (ScaleFormat::F32, Some(destination));
        self.tiles(function, &Tiles { grid, origin, source, destination, table: scales, format })
    }

    /// As [`quantize`](crate::quantize), in one pass over memory: what is fast is blocks of 128 columns in matrices whose
    /// rows begin at multiples of 16 bytes, 8 for the codes.
    ///
    /// # Errors
    /// Those of [`quantize`](crate::quantize), when a matrix holds other types or the table is not aligned, and when blocks
    /// are larger than 128 x 128.
    pub fn quantize(
        &self,
        grid: &BlockGrid,
        source: &DeviceMatrix,
        format: ScaleFormat,
        destination: &DeviceMatrix,
        scales: &DeviceRange,
    ) -> Result<Operation, Error> {
        if source.shape() != grid.shape() {
            let destination_shape = grid.shape();
            return Err(ShapeError::ShapeMismatch { source_shape: source.shape(), destination_shape }.into());
        }
        check_codes("the destination", destination)?;
        let (args, _) = TileArgs::new(grid, [0, 0], grid.shape());
        if args.block_tiles != [1, 1] {
            return Err(Error::BlockTooLarge { block: grid.block() });
        }
        let function = self.float_kernel("quantize", source, "the source")?;
        let destination = Some(destination);
        self.tiles(function, &Tiles { grid, origin: [0, 0], source, destination, table: scales, format })
    }

    fn tiles(&self, function: Function, tiles: &Tiles<'_>) -> Result<Operation, Error> {
        let &Tiles { grid, origin, source, destination, table, format } = tiles;
        let shape = source.shape();
        grid.check_rectangle(origin, shape)?;
        let expected = grid.table_len() as u64 * 4; // `BlockGrid::new` has checked it
        if table.len() != expected {
            return Err(Error::WrongLength { what: "a table of the grid", bytes: table.len(), expected });
        }
        check_alignment("a table of the grid", table.address(), 4)?;
        let mut holds = vec![source.range().clone(), table.clone()];
        let (mut args, count) = TileArgs::new(grid, origin, shape);
        if let Some(destination) = destination {
            if destination.shape() != shape {
                let destination_shape = destination.shape();
                return Err(ShapeError::ShapeMismatch { source_shape: shape, destination_shape }.into());
            }
            args.destination = destination.range().address();
            args.destination_stride = destination.stride() as u64;
            holds.push(destination.range().clone());
        }
        args.source = source.range().address();
        args.source_stride = source.stride() as u64;
        args.table = table.address();
        args.ue8m0 = u64::from(format == ScaleFormat::Ue8m0);
        self.operation(function, count, THREADS, vec![Argument::Tiles(args)], holds)
    }

    /// The kernel of this name for the floats of a matrix.
    fn float_kernel(&self, name: &str, matrix: &DeviceMatrix, what: &'static str) -> Result<Function, Error> {
        if matrix.dtype() == Dtype::F8E4M3 {
            return Err(Error::WrongDtype { what, found: matrix.dtype(), expected: "BF16, F16 or F32" });
        }
        Ok(self.quantize.function(&format!("{name}_{}", kernel_name(matrix.dtype())))?)
    }
}

fn check_codes(what: &'static str, matrix: &DeviceMatrix) -> Result<(), Error> {
    if matrix.dtype() == Dtype::F8E4M3 {
        Ok(())
    } else {
        Err(Error::WrongDtype { what, found: matrix.dtype(), expected: "F8_E4M3" })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `tile_part` of quantize.cu: first index in the rectangle, length, block.
    fn tile_part(args: &TileArgs, dim: usize, tile: u64) -> (u64, u64, u64) {
        let (first, end) = (args.origin[dim], args.origin[dim] + args.shape[dim]);
        let block = args.first_block[dim] + tile / args.block_tiles[dim];
        let start = block * args.block[dim] + tile % args.block_tiles[dim] * TILE;
        let tile_end = (start + TILE).min((block + 1) * args.block[dim]).min(end);
        let from = start.max(first);
        (from - first, tile_end.saturating_sub(from), block)
    }

    proptest! {
        #[test]
        fn tiles_have_every_element_of_a_rectangle_once(
            shape in [0..400_usize, 0..400_usize],
            block in (1..300_u32, prop_oneof![1..300_u32, Just(u32::MAX)]),
            parts: [usize; 4],
        ) {
            let block = <[u32; 2]>::from(block);
            let grid = BlockGrid::new(shape, block).unwrap();
            let origin = [parts[0] % (shape[0] + 1), parts[1] % (shape[1] + 1)];
            let part = [parts[2] % (shape[0] - origin[0] + 1), parts[3] % (shape[1] - origin[1] + 1)];
            let (args, count) = TileArgs::new(&grid, origin, part);
            let mut entries = vec![None; part[0] * part[1]];
            for tile in 0..count {
                let (row, rows, block_row) = tile_part(&args, 0, tile / args.tile_columns);
                let (column, columns, block_column) = tile_part(&args, 1, tile % args.tile_columns);
                prop_assert!(rows <= TILE && columns <= TILE);
                for row in row..row + rows {
                    for column in column..column + columns {
                        let entry = &mut entries[row as usize * part[1] + column as usize];
                        prop_assert_eq!(entry.replace(block_row * args.table_columns + block_column), None);
                    }
                }
            }
            for (index, entry) in entries.into_iter().enumerate() {
                let row = (origin[0] + index / part[1]) / block[0] as usize;
                let column = (origin[1] + index % part[1]) / block[1] as usize;
                prop_assert_eq!(entry, Some((row * grid.blocks()[1] + column) as u64));
            }
        }
    }
}
