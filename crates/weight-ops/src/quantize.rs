//! Block quantisation to e4m3: amax, scale, values.
//!
//! The passes are separate because a block can be cut between ranks that each hold a part of it. Whatever the cut, the
//! bits are those of quantising the whole: a maximum does not depend on the order, and a value only on its scale.

use std::marker::PhantomData;

use crate::element::{Element, F8E4M3, Float};
use crate::error::Error;
use crate::grid::{BlockGrid, segments};
use crate::isa::{Isa, Kernel};
use crate::matrix::{MatrixMut, MatrixRef};
use crate::parallel::{PORTION_ELEMENTS, for_each};
use crate::scale::{ScaleFormat, scale_of};

/// Maxima that are kept per block on the way down its rows: as many u16 as one 512-bit register holds. The largest of them
/// is looked for once at the end.
const LANES: usize = 32;

/// Rows of blocks that one portion of [`quantize`] has at most. The first of a portion is read without anything to
/// compute meanwhile: see [`QuantizeAndFold`].
const BANDS_MAX: usize = 16;

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
    rescale_on::<T, F8E4M3, Quantize>(Isa::best(), grid, source, origin, scales, destination)
}

/// The inverse of [`quantize_rect`] as far as there is one: each element is `value * scale` in f32, rounded to `T`.
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
    rescale_on::<F8E4M3, T, Dequantize>(Isa::best(), grid, source, origin, scales, destination)
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

fn block_amax_on<T: Float>(
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
        let blocks = segments(origin[1], columns, block_columns).map(|(block, _)| block);
        let mut maxima = vec![T::Key::default(); blocks.clone().count()];
        isa.run(Fold { source, first_column: origin[1], block_columns, maxima: &mut maxima });
        for (block, maxima) in blocks.zip(&maxima) {
            if let Some(amax) = amax.get_mut(block) {
                *amax = amax.max(T::magnitude(*maxima));
            }
        }
    });
    Ok(())
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

fn quantize_on<T: Float>(
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
    // At least two portions per thread, so that one which is late does not hold up the others for long.
    let portions_min = 2 * rayon::current_num_threads();
    let bands = (grid.blocks()[0] / portions_min).clamp(1, BANDS_MAX);
    let height = bands.saturating_mul(block_rows);
    let portions = segments(0, rows, height)
        .zip(destination.bands(std::iter::repeat(height)))
        .zip(scales.chunks_mut(bands * grid.blocks()[1]))
        .map(|(((_, rows), destination), scales)| (source.part(rows, 0..columns), destination, scales))
        .collect();
    for_each(portions, rows * columns, |(source, destination, scales): Portion<'_, T>| {
        let rows = source.shape()[0];
        let mut maxima = vec![T::Key::default(); grid.blocks()[1]];
        let first = source.part(0..block_rows.min(rows), 0..columns);
        isa.run(Fold { source: first, first_column: 0, block_columns, maxima: &mut maxima });
        let bands = segments(0, rows, block_rows)
            .zip(destination.bands(std::iter::repeat(block_rows)))
            .zip(scales.chunks_mut(grid.blocks()[1]));
        for (((_, band), destination), scales) in bands {
            for (scale, maxima) in scales.iter_mut().zip(&mut maxima) {
                *scale = scale_of(T::magnitude(*maxima), format);
                *maxima = T::Key::default();
            }
            let next = source.part(band.end..rows.min(band.end + block_rows), 0..columns);
            let source = source.part(band, 0..columns);
            let maxima = &mut maxima;
            isa.run(QuantizeAndFold { source, block_columns, scales, destination, next, maxima });
        }
    });
    Ok(())
}

fn check_same_shape(source_shape: [usize; 2], destination_shape: [usize; 2]) -> Result<(), Error> {
    match source_shape == destination_shape {
        true => Ok(()),
        false => Err(Error::ShapeMismatch { source_shape, destination_shape }),
    }
}

/// Rows of blocks: elements, values and scales.
type Portion<'a, T> = (MatrixRef<'a, T>, MatrixMut<'a, F8E4M3>, &'a mut [f32]);

/// Raises maxima to those of one row of blocks.
struct Fold<'a, T: Float> {
    source: MatrixRef<'a, T>,
    /// Of `source`, in the grid.
    first_column: usize,
    block_columns: usize,
    /// Of each block that `source` touches.
    maxima: &'a mut [T::Key],
}

impl<T: Float> Kernel for Fold<'_, T> {
    #[inline(always)]
    fn run(self) {
        let columns = self.source.shape()[1];
        for row in self.source.rows() {
            let segments = segments(self.first_column, columns, self.block_columns);
            for ((_, segment), maxima) in segments.zip(self.maxima.iter_mut()) {
                fold::<T>(&row[segment], maxima);
            }
        }
    }
}

/// Raises the largest key of a block to those of elements in one of its rows.
#[inline(always)]
fn fold<T: Float>(elements: &[T::Bytes], most: &mut T::Key) {
    let bound = *most;
    let larger = elements.iter().fold(false, |larger, &element| larger | (T::key(element) > bound));
    if larger {
        *most = elements.iter().map(|&element| T::key(element)).max().unwrap_or_default();
    }
}

/// Quantises one row of blocks and meanwhile takes the maxima of the next.
///
/// Taking maxima waits for memory and quantising for the CPU. Done by turns they add up; done together the one hides in the
/// other.
struct QuantizeAndFold<'a, T: Float> {
    source: MatrixRef<'a, T>,
    block_columns: usize,
    /// One for each block.
    scales: &'a [f32],
    destination: MatrixMut<'a, F8E4M3>,
    /// Has no more rows than `source`.
    next: MatrixRef<'a, T>,
    /// Of the blocks of `next`.
    maxima: &'a mut [T::Key],
}

impl<T: Float> Kernel for QuantizeAndFold<'_, T> {
    #[inline(always)]
    fn run(self) {
        let columns = self.source.shape()[1];
        let mut next_rows = self.next.rows();
        for (source, destination) in self.source.rows().zip(self.destination.rows()) {
            let next = next_rows.next().unwrap_or_default();
            let blocks = self.scales.iter().zip(self.maxima.iter_mut());
            for ((_, segment), (&scale, maxima)) in segments(0, columns, self.block_columns).zip(blocks) {
                fold::<T>(next.get(segment.clone()).unwrap_or_default(), maxima);
                rescale::<T, F8E4M3, Quantize>(&source[segment.clone()], scale, &mut destination[segment]);
            }
        }
    }
}

/// What a scale is for.
trait Rescale {
    fn rescale(value: f32, scale: f32) -> f32;
}

enum Quantize {}

enum Dequantize {}

impl Rescale for Quantize {
    #[inline(always)]
    fn rescale(value: f32, scale: f32) -> f32 {
        value / scale
    }
}

impl Rescale for Dequantize {
    #[inline(always)]
    fn rescale(value: f32, scale: f32) -> f32 {
        value * scale
    }
}

/// Rescales and rounds each element.
struct RescaleRows<'a, S: Element, D: Element, R: Rescale> {
    grid: &'a BlockGrid,
    source: MatrixRef<'a, S>,
    /// Of `source`, in the grid of which `scales` is the table.
    origin: [usize; 2],
    scales: &'a [f32],
    destination: MatrixMut<'a, D>,
    how: PhantomData<R>,
}

impl<S: Element, D: Element, R: Rescale> Kernel for RescaleRows<'_, S, D, R> {
    #[inline(always)]
    fn run(self) {
        let [block_rows, block_columns] = self.grid.block();
        let columns = self.source.shape()[1];
        let rows = self.source.rows().zip(self.destination.rows());
        for (row, (source, destination)) in (self.origin[0]..).zip(rows) {
            let scales = &self.scales[row / block_rows * self.grid.blocks()[1]..];
            for (block, segment) in segments(self.origin[1], columns, block_columns) {
                rescale::<S, D, R>(&source[segment.clone()], scales[block], &mut destination[segment]);
            }
        }
    }
}

/// Rescales and rounds each element of one block's row.
#[inline(always)]
fn rescale<S: Element, D: Element, R: Rescale>(
    source: &[S::Bytes],
    scale: f32,
    destination: &mut [D::Bytes],
) {
    for (destination, &source) in destination.iter_mut().zip(source) {
        *destination = D::encode(R::rescale(S::decode(source), scale));
    }
}
