//! Block quantisation to e4m3: amax, scale, values.
//!
//! The passes are separate because a block can be cut between ranks that each hold a part of it. Whatever the cut, the
//! bits are those of quantising the whole: a maximum does not depend on the order, and a value only on its scale.

use std::marker::PhantomData;

use crate::element::{Element, F8E4M3, Float};
use crate::error::Error;
use crate::grid::{BlockGrid, segments};
use crate::isa::Isa;
use crate::kernels::{Divide, Fold, Multiply, QuantizeAndFold, Rescale, RescaleRows};
use crate::matrix::{MatrixMut, MatrixRef};
use crate::parallel::{PORTION_ELEMENTS, for_each};
use crate::scale::{ScaleFormat, scale_of};

/// Rows of blocks that one portion of [`quantize`] has at most: the first of a portion is read with nothing to quantise
/// meanwhile, so a portion should have several, and a thread several portions.
const BANDS_MAX: usize = 8;

/// Raises the amaxes of the blocks that a rectangle touches to the largest finite magnitude of its elements. Infinities
/// and NaN do not count.
///
/// `source` is the rectangle of the grid's matrix that begins at `origin` (row, column). `amax` is a table of the grid;
/// its entries are 0 before the first part. Rows of blocks are worked on in parallel.
///
/// # Errors
/// When the rectangle is not inside the grid's matrix, or the table does not have one entry per block.
pub fn block_amax<T: Float>(
    grid: &BlockGrid,
    source: MatrixRef<'_, T>,
    origin: [usize; 2],
    amax: &mut [f32],
) -> Result<(), Error> {
    block_amax_on(Isa::best(), grid, source, origin, amax)
}

/// Quantises a rectangle with the scales of its blocks: each value is `element / scale`, an f32 division, rounded to e4m3
/// as [`F8E4M3::from_f32`] does. No reciprocal is multiplied with: that gives other bits.
///
/// `source` is the rectangle of the grid's matrix that begins at `origin` (row, column); `destination` has its shape.
/// `scales` is a table of the grid, of which only the entries of touched blocks are read. An element that is infinite
/// becomes 448 with its sign, NaN becomes 0x7f, and zero keeps its sign. What is below 2^-6 after the division is rounded
/// to a multiple of 2^-9. Scales that [`scale_of`] would not give are divided by all the same.
///
/// # Errors
/// When the rectangle is not inside the grid's matrix, the shapes differ, or the table does not have one entry per block.
pub fn quantize_rect<T: Float>(
    grid: &BlockGrid,
    source: MatrixRef<'_, T>,
    origin: [usize; 2],
    scales: &[f32],
    destination: MatrixMut<'_, F8E4M3>,
) -> Result<(), Error> {
    quantize_rect_on(Isa::best(), grid, source, origin, scales, destination)
}

/// The inverse of [`quantize_rect`] as far as there is one: each element is `value * scale` in f32, rounded to `T`. Where
/// that is NaN it is the one of bits 0x7fc00000, whatever the value's sign and the scale's bits.
///
/// # Errors
/// Those of [`quantize_rect`].
pub fn dequantize_rect<T: Float>(
    grid: &BlockGrid,
    source: MatrixRef<'_, F8E4M3>,
    origin: [usize; 2],
    scales: &[f32],
    destination: MatrixMut<'_, T>,
) -> Result<(), Error> {
    dequantize_rect_on(Isa::best(), grid, source, origin, scales, destination)
}

/// Quantises a whole matrix: [`block_amax`], [`scale_of`] and [`quantize_rect`] for one that nobody shares, in one pass
/// over memory. `scales` is written, whatever was in it; rows of blocks are worked on in parallel.
///
/// # Errors
/// When `source` and `destination` do not have the grid's shape, or the table does not have one entry per block.
pub fn quantize<T: Float>(
    grid: &BlockGrid,
    source: MatrixRef<'_, T>,
    format: ScaleFormat,
    destination: MatrixMut<'_, F8E4M3>,
    scales: &mut [f32],
) -> Result<(), Error> {
    quantize_on(Isa::best(), grid, source, format, destination, scales)
}

pub(crate) fn block_amax_on<T: Float>(
    isa: Isa,
    grid: &BlockGrid,
    source: MatrixRef<'_, T>,
    origin: [usize; 2],
    amax: &mut [f32],
) -> Result<(), Error> {
    let [rows, columns] = source.shape();
    grid.check_rectangle(origin, [rows, columns])?;
    grid.check_table(amax)?;
    if rows == 0 || columns == 0 {
        return Ok(());
    }
    let [block_rows, block_columns] = grid.block();
    let table_rows = amax.chunks_mut(grid.blocks()[1]).skip(origin[0] / block_rows);
    let bands = segments(origin[0], rows, block_rows)
        .zip(table_rows)
        .map(|((_, rows), amax)| (source.part(rows, 0..columns), amax))
        .collect();
    for_each(bands, rows * columns, |(source, amax): (MatrixRef<'_, T>, &mut [f32])| {
        let mut largest = vec![T::Key::default(); segments(origin[1], columns, block_columns).count()];
        isa.run(Fold { source, first_column: origin[1], block_columns, largest: &mut largest });
        for (amax, &largest) in amax.iter_mut().skip(origin[1] / block_columns).zip(&largest) {
            *amax = amax.max(T::magnitude(largest));
        }
    });
    Ok(())
}

pub(crate) fn quantize_rect_on<T: Float>(
    isa: Isa,
    grid: &BlockGrid,
    source: MatrixRef<'_, T>,
    origin: [usize; 2],
    scales: &[f32],
    destination: MatrixMut<'_, F8E4M3>,
) -> Result<(), Error> {
    rescale_on::<T, F8E4M3, Divide>(isa, grid, source, origin, scales, destination)
}

pub(crate) fn dequantize_rect_on<T: Float>(
    isa: Isa,
    grid: &BlockGrid,
    source: MatrixRef<'_, F8E4M3>,
    origin: [usize; 2],
    scales: &[f32],
    destination: MatrixMut<'_, T>,
) -> Result<(), Error> {
    rescale_on::<F8E4M3, T, Multiply>(isa, grid, source, origin, scales, destination)
}

fn rescale_on<S: Element, D: Element, R: Rescale>(
    isa: Isa,
    grid: &BlockGrid,
    source: MatrixRef<'_, S>,
    origin: [usize; 2],
    scales: &[f32],
    destination: MatrixMut<'_, D>,
) -> Result<(), Error> {
    let [rows, columns] = source.shape();
    check_same_shape(source.shape(), destination.shape())?;
    grid.check_rectangle(origin, [rows, columns])?;
    grid.check_table(scales)?;
    if rows == 0 || columns == 0 {
        return Ok(());
    }
    let height = (PORTION_ELEMENTS / columns).max(1);
    let bands = (0..rows)
        .step_by(height)
        .zip(destination.bands(std::iter::repeat(height)))
        .map(|(row, destination)| {
            (row, source.part(row..row + destination.shape()[0], 0..columns), destination)
        })
        .collect();
    for_each(bands, rows * columns, |(row, source, destination)| {
        let origin = [origin[0] + row, origin[1]];
        isa.run(RescaleRows::<S, D, R> { grid, source, origin, scales, destination, how: PhantomData });
    });
    Ok(())
}

pub(crate) fn quantize_on<T: Float>(
    isa: Isa,
    grid: &BlockGrid,
    source: MatrixRef<'_, T>,
    format: ScaleFormat,
    destination: MatrixMut<'_, F8E4M3>,
    scales: &mut [f32],
) -> Result<(), Error> {
    let [rows, columns] = grid.shape();
    check_same_shape(source.shape(), destination.shape())?;
    check_same_shape(source.shape(), grid.shape())?;
    grid.check_table(scales)?;
    if rows == 0 || columns == 0 {
        return Ok(());
    }
    let [block_rows, block_columns] = grid.block();
    let bands = (grid.blocks()[0] / (2 * rayon::current_num_threads())).clamp(1, BANDS_MAX);
    let height = bands.saturating_mul(block_rows);
    let portions = segments(0, rows, height)
        .zip(destination.bands(std::iter::repeat(height)))
        .zip(scales.chunks_mut(bands * grid.blocks()[1]))
        .map(|(((_, rows), destination), scales)| (source.part(rows, 0..columns), destination, scales))
        .collect();
    for_each(portions, rows * columns, |(source, destination, scales): Portion<'_, T>| {
        let rows = source.shape()[0];
        let mut largest = vec![T::Key::default(); grid.blocks()[1]];
        let first = source.part(0..block_rows.min(rows), 0..columns);
        isa.run(Fold { source: first, first_column: 0, block_columns, largest: &mut largest });
        let bands = segments(0, rows, block_rows)
            .zip(destination.bands(std::iter::repeat(block_rows)))
            .zip(scales.chunks_mut(grid.blocks()[1]));
        for (((_, band), destination), scales) in bands {
            for (scale, largest) in scales.iter_mut().zip(&mut largest) {
                *scale = scale_of(T::magnitude(std::mem::take(largest)), format);
            }
            let next = source.part(band.end..rows.min(band.end.saturating_add(block_rows)), 0..columns);
            let source = source.part(band, 0..columns);
            let largest = &mut largest;
            isa.run(QuantizeAndFold { source, block_columns, scales, destination, next, largest });
        }
    });
    Ok(())
}

/// Rows of blocks: elements, values and scales.
type Portion<'a, T> = (MatrixRef<'a, T>, MatrixMut<'a, F8E4M3>, &'a mut [f32]);

fn check_same_shape(source_shape: [usize; 2], destination_shape: [usize; 2]) -> Result<(), Error> {
    if source_shape == destination_shape {
        Ok(())
    } else {
        Err(Error::ShapeMismatch { source_shape, destination_shape })
    }
}
