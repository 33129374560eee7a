//! What operations make of elements in host memory: casts, quantised elements, and scales.
//!
//! Scales are found as they are needed, one row of blocks after another, so that the first WRITE does not wait for the last
//! block. A rank's own elements raise what it was told of a block; where others have parts of it, that is as much already.

use std::ops::Range;

use efa_core::Lease;
use half::{bf16, f16};
use weight_ops::{
    BlockGrid, Dtype, F8E4M3, Float, MatrixMut, MatrixRef, ScaleFormat, block_amax, cast_bytes,
    quantize_rect, scale_of, ue8m0_byte,
};
use xfer_plan::{DType, Op, RegionIndex};

use crate::quant::{BlockRect, Elements, Matrix, Quantization, kernel_dtype};

/// Magnitudes and scales of one push, as far as they have been found.
#[derive(Default)]
pub(super) struct Scales {
    magnitudes: Vec<f32>,
    scales: Vec<f32>,
    /// By row of blocks.
    is_known: Vec<bool>,
}

impl Scales {
    /// Before the rank has looked at its own elements. `None` if `told` is not as long as the plan says.
    pub(super) fn new(quantization: &Quantization, told: &[f32]) -> Option<Self> {
        let magnitudes = quantization.begin(told)?;
        let is_known = vec![false; quantization.bands_told().len()];
        Some(Self { scales: vec![1.0; magnitudes.len()], magnitudes, is_known })
    }

    /// Finds the scales of some rows of blocks of a matrix.
    fn find(
        &mut self,
        quantization: &Quantization,
        regions: &[Lease],
        number: usize,
        rows: Range<usize>,
    ) -> Option<()> {
        let matrix = quantization.matrix(number)?;
        let across = matrix.grid.blocks()[1];
        let mut rows = rows;
        while let Some(first) = rows.find(|row| !self.is_known_at(matrix, *row)) {
            // All that follow and are not known either at once: rows of blocks are worked on in parallel.
            let end = rows.find(|row| self.is_known_at(matrix, *row)).unwrap_or(rows.end);
            let bands = matrix.bands(first..end);
            let magnitudes = self.magnitudes.get_mut(matrix.entries())?;
            if !quantization.bands_told().get(bands.clone())?.iter().all(|is_told| *is_told) {
                fold(matrix, &matrix.across(number, first..end), regions, magnitudes)?;
            }
            let entries = first * across..end * across;
            let scales = self.scales.get_mut(matrix.entries())?.get_mut(entries.clone())?;
            for (scale, magnitude) in scales.iter_mut().zip(magnitudes.get(entries)?) {
                *scale = scale_of(*magnitude, matrix.format);
            }
            self.is_known.get_mut(bands)?.fill(true);
        }
        Some(())
    }

    fn is_known_at(&self, matrix: &Matrix, row: usize) -> bool {
        self.is_known.get(matrix.bands(row..row + 1).start).copied().unwrap_or(true)
    }

    /// Quantises what `op` wants, and puts its rows one after another. `None` if something lies outside what there is.
    pub(super) fn quantize(
        &mut self,
        quantization: &Quantization,
        regions: &[Lease],
        op: &Op,
        into: &mut [u8],
    ) -> Option<()> {
        for rect in quantization.rects(op)? {
            let matrix = quantization.matrix(rect.matrix)?;
            self.find(quantization, regions, rect.matrix, matrix.rows_of_blocks(&rect.elements))?;
            let scales = self.scales.get(matrix.entries())?;
            let bytes = bytes_of(regions, &rect.elements, matrix.dtype)?;
            let into = into.get_mut(rect.into..)?;
            let [rows, columns] = rect.elements.shape;
            let len = (rows - 1).checked_mul(rect.into_stride)?.checked_add(columns)?;
            let into = into.get_mut(..len)?;
            let codes = MatrixMut::from_bytes(into, rect.elements.shape, rect.into_stride).ok()?;
            match matrix.dtype {
                Dtype::BF16 => quantize_as::<bf16>(&matrix.grid, bytes, &rect.elements, scales, codes)?,
                Dtype::F16 => quantize_as::<f16>(&matrix.grid, bytes, &rect.elements, scales, codes)?,
                Dtype::F32 => quantize_as::<f32>(&matrix.grid, bytes, &rect.elements, scales, codes)?,
                Dtype::F8E4M3 => return None,
            }
        }
        Some(())
    }

    /// Puts the scales that `op` wants one after another, as they are stored.
    pub(super) fn store(
        &mut self,
        quantization: &Quantization,
        regions: &[Lease],
        op: &Op,
        into: &mut [u8],
    ) -> Option<()> {
        let mut free = into;
        for run in quantization.runs(op)? {
            self.find(quantization, regions, run.matrix, run.band..run.band + 1)?;
            let format = quantization.matrix(run.matrix)?.format;
            for scale in self.scales.get(run.entry..run.entry.checked_add(run.count)?)? {
                free = match format {
                    ScaleFormat::F32 => put(free, &scale.to_ne_bytes())?,
                    ScaleFormat::Ue8m0 => put(free, &[ue8m0_byte(*scale)])?,
                };
            }
        }
        free.is_empty().then_some(())
    }
}

/// Writes bytes to the front; what is behind them.
fn put<'a>(into: &'a mut [u8], bytes: &[u8]) -> Option<&'a mut [u8]> {
    let (to, rest) = into.split_at_mut_checked(bytes.len())?;
    to.copy_from_slice(bytes);
    Some(rest)
}

/// The magnitudes that a rank reports.
pub(crate) fn magnitudes(quantization: &Quantization, regions: &[Lease]) -> Option<Vec<f32>> {
    let mut table = vec![0.0; quantization.blocks()];
    for blocks in quantization.reports() {
        let matrix = quantization.matrix(blocks.matrix)?;
        fold(matrix, blocks, regions, table.get_mut(matrix.entries())?)?;
    }
    Some(quantization.reported(&table))
}

/// Raises the magnitudes of blocks of a matrix to those of what the rank has of them.
fn fold(matrix: &Matrix, blocks: &BlockRect, regions: &[Lease], magnitudes: &mut [f32]) -> Option<()> {
    for elements in matrix.held(blocks) {
        let bytes = bytes_of(regions, &elements, matrix.dtype)?;
        match matrix.dtype {
            Dtype::BF16 => fold_as::<bf16>(&matrix.grid, bytes, &elements, magnitudes)?,
            Dtype::F16 => fold_as::<f16>(&matrix.grid, bytes, &elements, magnitudes)?,
            Dtype::F32 => fold_as::<f32>(&matrix.grid, bytes, &elements, magnitudes)?,
            Dtype::F8E4M3 => return None,
        }
    }
    Some(())
}

fn fold_as<T: Float>(
    grid: &BlockGrid,
    bytes: &[u8],
    elements: &Elements,
    magnitudes: &mut [f32],
) -> Option<()> {
    let source = MatrixRef::<T>::from_bytes(bytes, elements.shape, elements.stride).ok()?;
    block_amax(grid, source, elements.origin, magnitudes).ok()
}

fn quantize_as<T: Float>(
    grid: &BlockGrid,
    bytes: &[u8],
    elements: &Elements,
    scales: &[f32],
    codes: MatrixMut<'_, F8E4M3>,
) -> Option<()> {
    let source = MatrixRef::<T>::from_bytes(bytes, elements.shape, elements.stride).ok()?;
    quantize_rect(grid, source, elements.origin, scales, codes).ok()
}

/// From the first byte of a rectangle to the last.
fn bytes_of<'a>(regions: &'a [Lease], elements: &Elements, dtype: Dtype) -> Option<&'a [u8]> {
    let [rows, columns] = elements.shape;
    let len = rows
        .checked_sub(1)?
        .checked_mul(elements.stride)?
        .checked_add(columns)?
        .checked_mul(dtype.bytes())?;
    bytes_from(regions, elements.region, elements.offset)?.get(..len)
}

/// A region's bytes from an offset on.
pub(super) fn bytes_from(regions: &[Lease], region: RegionIndex, offset: u64) -> Option<&[u8]> {
    regions.get(region.index())?.bytes().get(usize::try_from(offset).ok()?..)
}

/// Casts the rows of `op`, which begin with `source`, one after another.
pub(super) fn cast(op: &Op, (from, to): (DType, DType), source: &[u8], into: &mut [u8]) -> Option<()> {
    let (from, to) = kernel_dtype(from).zip(kernel_dtype(to))?;
    let row_bytes = usize::try_from(op.transform.source_bytes(op.row_bytes.into())).ok()?;
    let mut at = 0_usize;
    for row in into.chunks_exact_mut(op.row_bytes as usize) {
        cast_bytes(from, source.get(at..at.checked_add(row_bytes)?)?, to, row).ok()?;
        at = at.checked_add(usize::try_from(op.source.stride).ok()?)?;
    }
    Some(())
}
