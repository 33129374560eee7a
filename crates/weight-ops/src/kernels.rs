//! The loops of block quantisation. Shapes are checked by who calls them.
//!
//! Blocks are visited row by row, not one after the other: memory is then read in the order in which it lies, which is
//! what a CPU fetches ahead.

use std::marker::PhantomData;

use crate::element::{Element, F8E4M3, F32_NAN, Float};
use crate::grid::{BlockGrid, segments};
use crate::isa::Kernel;
use crate::matrix::{MatrixMut, MatrixRef};

/// Raises the largest keys of one row of blocks to those of their elements.
pub(crate) struct Fold<'a, T: Float> {
    pub(crate) source: MatrixRef<'a, T>,
    /// Of `source`, in the grid.
    pub(crate) first_column: usize,
    pub(crate) block_columns: usize,
    /// One for each block that `source` touches.
    pub(crate) largest: &'a mut [T::Key],
}

impl<T: Float> Kernel for Fold<'_, T> {
    #[inline(always)]
    fn run(self) {
        let columns = self.source.shape()[1];
        for row in self.source.rows() {
            let segments = segments(self.first_column, columns, self.block_columns);
            for ((_, segment), largest) in segments.zip(self.largest.iter_mut()) {
                fold::<T>(&row[segment], largest);
            }
        }
    }
}

/// Quantises one row of blocks, and on the way does for the next what [`Fold`] does.
///
/// Folding waits for memory, quantising for the CPU. By turns their times add up, together the one hides in the other:
/// 17 GB/s instead of 13 on one thread, for bf16 in rows of 7168 on an EPYC of Zen 5.
pub(crate) struct QuantizeAndFold<'a, T: Float> {
    pub(crate) source: MatrixRef<'a, T>,
    pub(crate) block_columns: usize,
    /// One for each block.
    pub(crate) scales: &'a [f32],
    pub(crate) destination: MatrixMut<'a, F8E4M3>,
    /// Has as many columns as `source`, and no more rows.
    pub(crate) next: MatrixRef<'a, T>,
    /// One for each block of `next`.
    pub(crate) largest: &'a mut [T::Key],
}

impl<T: Float> Kernel for QuantizeAndFold<'_, T> {
    #[inline(always)]
    fn run(self) {
        let columns = self.source.shape()[1];
        let mut next_rows = self.next.rows();
        for (source, destination) in self.source.rows().zip(self.destination.rows()) {
            let next = next_rows.next().unwrap_or_default();
            let blocks = self.scales.iter().zip(self.largest.iter_mut());
            for ((_, segment), (&scale, largest)) in segments(0, columns, self.block_columns).zip(blocks) {
                fold::<T>(next.get(segment.clone()).unwrap_or_default(), largest);
                rescale::<T, F8E4M3, Divide>(&source[segment.clone()], scale, &mut destination[segment]);
            }
        }
    }
}

/// Raises the largest key of a block to those of some of its elements.
///
/// First it only looks whether there is a larger one: among the rows of a block there seldom is. That costs no search
/// across a vector and, which is more, no store. With a store for each row, in all forms that were tried, an EPYC of Zen 5
/// read memory at 10 to 24 GB/s on one thread instead of 23 to 27, presumably because later loads wait for it.
#[inline(always)]
fn fold<T: Float>(elements: &[T::Bytes], largest: &mut T::Key) {
    let bound = *largest;
    if elements.iter().fold(false, |found, &element| found | (T::key(element) > bound)) {
        *largest = elements.iter().map(|&element| T::key(element)).max().unwrap_or(bound);
    }
}

/// What is done with an element and its scale, both f32.
pub(crate) trait Rescale {
    fn rescale(value: f32, scale: f32) -> f32;
}

/// Quantises.
pub(crate) enum Divide {}

/// Dequantises.
pub(crate) enum Multiply {}

impl Rescale for Divide {
    #[inline(always)]
    fn rescale(value: f32, scale: f32) -> f32 {
        value / scale
    }
}

impl Rescale for Multiply {
    #[inline(always)]
    fn rescale(value: f32, scale: f32) -> f32 {
        let product = value * scale;
        if product.is_nan() { f32::from_bits(F32_NAN) } else { product }
    }
}

/// Rescales each element with the scale of its block, and rounds it.
pub(crate) struct RescaleRows<'a, S: Element, D: Element, R: Rescale> {
    pub(crate) grid: &'a BlockGrid,
    pub(crate) source: MatrixRef<'a, S>,
    /// Of `source`, in the grid.
    pub(crate) origin: [usize; 2],
    /// The grid's table.
    pub(crate) scales: &'a [f32],
    pub(crate) destination: MatrixMut<'a, D>,
    pub(crate) how: PhantomData<R>,
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
