//! What operations make of elements on the CPU: casts, quantised elements, and scales. Staging slots in host memory are filled so,
//! and whoever verifies makes the same bytes again.
//!
//! Scales are found as they are needed, one row of blocks after another, so that the first WRITE does not wait for the last
//! block. A rank's own elements raise what it was told of a block; where others have parts of it, that is as much already.

use std::ops::Range;
use std::sync::Arc;

use efa_core::Lease;
use half::{bf16, f16};
use weight_ops::{
    BlockGrid, Dtype, F8E4M3, Float, MatrixMut, MatrixRef, ScaleFormat, block_amax, cast_bytes,
    quantize_rect, scale_of, ue8m0_byte,
};
use xfer_plan::{Op, Strided, Transform};

use crate::quant::{BlockRect, Elements, Matrix, Quantization, kernel_dtype, parts};

/// Weights as a CPU reads them, wherever they are.
pub trait ReadRows {
    /// Bytes that are read at once at most; 8 at least, so that every element fits.
    fn bytes_max(&self) -> usize;

    /// Lets `work` see so many rows of so many bytes each, at most [`ReadRows::bytes_max`] together: their bytes from the first to
    /// the last, and from the start of one to that of the next, in bytes. `None` where they are not all there or cannot be read,
    /// and what `work` gives.
    fn read(
        &self,
        at: Strided,
        rows_and_bytes: [usize; 2],
        work: &mut dyn FnMut(&[u8], usize) -> Option<()>,
    ) -> Option<()>;
}

/// Regions in host memory, read where they are.
impl ReadRows for [Lease] {
    fn bytes_max(&self) -> usize {
        usize::MAX
    }

    fn read(
        &self,
        Strided { region, offset, stride }: Strided,
        [rows, row_bytes]: [usize; 2],
        work: &mut dyn FnMut(&[u8], usize) -> Option<()>,
    ) -> Option<()> {
        let (offset, stride) = (usize::try_from(offset).ok()?, usize::try_from(stride).ok()?);
        let extent = rows.checked_sub(1)?.checked_mul(stride)?.checked_add(row_bytes)?;
        work(self.get(region.index())?.bytes().get(offset..)?.get(..extent)?, stride)
    }
}

/// What the operations of one push send: its magnitudes and scales, as far as they have been found.
#[derive(Debug, Default)]
pub struct Transforms {
    quantization: Arc<Quantization>,
    magnitudes: Vec<f32>,
    scales: Vec<f32>,
    /// By row of blocks.
    is_known: Vec<bool>,
}

impl Transforms {
    /// Before the rank has looked at its own elements, with the merged magnitudes of which it is told. `None` if these are not as
    /// many as the plan says.
    pub fn new(quantization: &Arc<Quantization>, told: &[f32]) -> Option<Self> {
        let magnitudes = quantization.begin(told)?;
        let is_known = vec![false; quantization.bands_told().len()];
        let scales = vec![1.0; magnitudes.len()];
        Some(Self { quantization: Arc::clone(quantization), magnitudes, scales, is_known })
    }

    /// Puts the rows of `op` one after another, as they are to be at the receiver. `into` has the operation's bytes. `None` where
    /// the operation reads what is not there; what `into` holds is then of no use.
    pub fn fill(&mut self, op: &Op, source: &(impl ReadRows + ?Sized), into: &mut [u8]) -> Option<()> {
        match op.transform {
            Transform::Copy => convert(op, source, [1, 1], into, |from, to| {
                to.copy_from_slice(from);
                Some(())
            }),
            Transform::Cast { from, to } => {
                let (from, to) = kernel_dtype(from).zip(kernel_dtype(to))?;
                let cast = |source: &[u8], into: &mut [u8]| cast_bytes(from, source, to, into).ok();
                convert(op, source, [from.bytes(), to.bytes()], into, cast)
            }
            Transform::Quantize { .. } => self.quantize(op, source, into),
            Transform::Scales { .. } => self.store(op, source, into),
        }
    }

    /// Finds the scales of some rows of blocks of a matrix.
    fn find(
        &mut self,
        number: usize,
        mut rows: Range<usize>,
        source: &(impl ReadRows + ?Sized),
    ) -> Option<()> {
        let quantization = Arc::clone(&self.quantization);
        let matrix = quantization.matrix(number)?;
        let across = matrix.grid.blocks()[1];
        while let Some(first) = rows.find(|row| !self.is_known_at(matrix, *row)) {
            // All that follow and are not known either at once: rows of blocks are worked on in parallel.
            let end = rows.find(|row| self.is_known_at(matrix, *row)).unwrap_or(rows.end);
            let bands = matrix.bands(first..end);
            let magnitudes = self.magnitudes.get_mut(matrix.entries())?;
            if !quantization.bands_told().get(bands.clone())?.iter().all(|is_told| *is_told) {
                fold(matrix, &matrix.across(number, first..end), source, magnitudes)?;
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

    /// Quantises what `op` wants, and puts its rows one after another.
    fn quantize(&mut self, op: &Op, source: &(impl ReadRows + ?Sized), into: &mut [u8]) -> Option<()> {
        let quantization = Arc::clone(&self.quantization);
        for rect in quantization.rects(op)? {
            let matrix = quantization.matrix(rect.matrix)?;
            self.find(rect.matrix, matrix.rows_of_blocks(&rect.elements), source)?;
            let scales = self.scales.get(matrix.entries())?;
            let first = rect.elements.origin;
            read(source, &rect.elements, matrix.dtype, &mut |part, bytes| {
                let [down, along] = [0, 1].map(|dim| part.origin[dim] - first[dim]);
                let [rows, columns] = part.shape;
                let start = down.checked_mul(rect.into_stride)?.checked_add(along)?.checked_add(rect.into)?;
                let len = (rows - 1).checked_mul(rect.into_stride)?.checked_add(columns)?;
                let codes = into.get_mut(start..)?.get_mut(..len)?;
                let codes = MatrixMut::from_bytes(codes, part.shape, rect.into_stride).ok()?;
                match matrix.dtype {
                    Dtype::BF16 => quantize_as::<bf16>(&matrix.grid, bytes, part, scales, codes),
                    Dtype::F16 => quantize_as::<f16>(&matrix.grid, bytes, part, scales, codes),
                    Dtype::F32 => quantize_as::<f32>(&matrix.grid, bytes, part, scales, codes),
                    Dtype::F8E4M3 => None,
                }
            })?;
        }
        Some(())
    }

    /// Puts the scales that `op` wants one after another, as they are stored.
    fn store(&mut self, op: &Op, source: &(impl ReadRows + ?Sized), into: &mut [u8]) -> Option<()> {
        let quantization = Arc::clone(&self.quantization);
        let mut free = into;
        for run in quantization.runs(op)? {
            self.find(run.matrix, run.band..run.band + 1, source)?;
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

/// Converts the rows of `op` and puts them one after another. An element has so many bytes at the source, and so many afterwards.
fn convert(
    op: &Op,
    source: &(impl ReadRows + ?Sized),
    [from, to]: [usize; 2],
    into: &mut [u8],
    convert: impl Fn(&[u8], &mut [u8]) -> Option<()>,
) -> Option<()> {
    let row_bytes = op.row_bytes as usize;
    if !row_bytes.is_multiple_of(to) {
        return None;
    }
    for ([first, column], [rows, columns]) in
        parts([op.rows as usize, row_bytes / to], source.bytes_max() / from)
    {
        let skipped = (first as u64).checked_mul(op.source.stride)?.checked_add((column * from) as u64)?;
        let at = Strided { offset: op.source.offset.checked_add(skipped)?, ..op.source };
        source.read(at, [rows, columns * from], &mut |bytes, stride| {
            for row in 0..rows {
                let bytes = bytes.get(row.checked_mul(stride)?..)?.get(..columns * from)?;
                let into = into.get_mut((first + row) * row_bytes + column * to..)?;
                convert(bytes, into.get_mut(..columns * to)?)?;
            }
            Some(())
        })?;
    }
    Some(())
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
fn fold(
    matrix: &Matrix,
    blocks: &BlockRect,
    source: &(impl ReadRows + ?Sized),
    magnitudes: &mut [f32],
) -> Option<()> {
    matrix.held(blocks).try_for_each(|elements| {
        read(source, &elements, matrix.dtype, &mut |part, bytes| match matrix.dtype {
            Dtype::BF16 => fold_as::<bf16>(&matrix.grid, bytes, part, magnitudes),
            Dtype::F16 => fold_as::<f16>(&matrix.grid, bytes, part, magnitudes),
            Dtype::F32 => fold_as::<f32>(&matrix.grid, bytes, part, magnitudes),
            Dtype::F8E4M3 => None,
        })
    })
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

/// Reads elements, all at once or one part after another: `work` is told which, with their stride as it is read, and from the first
/// to the last.
fn read(
    source: &(impl ReadRows + ?Sized),
    elements: &Elements,
    dtype: Dtype,
    work: &mut dyn FnMut(&Elements, &[u8]) -> Option<()>,
) -> Option<()> {
    let width = dtype.bytes();
    elements.parts(dtype, source.bytes_max() / width).try_for_each(|part| {
        let Elements { shape: [rows, columns], region, offset, stride, .. } = part;
        let at = Strided { region, offset, stride: stride.checked_mul(width)? as u64 };
        source.read(at, [rows, columns * width], &mut |bytes, stride| {
            work(&Elements { stride: stride / width, ..part }, bytes)
        })
    })
}
