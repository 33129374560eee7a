//! The kernels of `weight-ops` beside a copy by CUDA on the same GPU. Bytes are those read and written, once each.

use anyhow::ensure;
use half::bf16;
use rayon::prelude::*;
use weight_ops::checksum::PartialChecksum;
use weight_ops::cuda::{BoxCopy, Checksums, DeviceMatrix, DeviceRange, Operation, Place};
use weight_ops::{BlockGrid, Dtype, F8E4M3, Float, MatrixMut, MatrixRef, ScaleFormat};

use crate::data::{LenBytes as _, Shuffled, Source, Weights};
use crate::gpu::{Gpu, POISON};
use crate::measure::{Figures, Target, Work, alone, beside};
use crate::report::Report;

/// Columns of the matrices that are quantised.
pub(crate) const COLUMNS: usize = 8192;

/// Rows and columns of a block.
pub(crate) const BLOCK: usize = 128;

/// What is asked of quantisation: it reads and writes memory once, so little else should cost.
const QUANTIZE_TARGET: Target = Target::Ratio(0.80);

const REFERENCE: &str = "copy on the GPU";

/// Bytes of the spans that are copied in any order on one GPU.
const SPAN_BYTES: [u64; 2] = [4 << 10, 64 << 10];

/// Bytes of the rows that are gathered: shorter than a warp copies at once, and those of Qwen3-0.6B at TP 2.
const ROW_BYTES: [u64; 2] = [256, 2048];

/// One GPU's memory for all kernels.
struct Bench<'a> {
    gpu: &'a Gpu,
    weights: &'a Weights,
    /// Twice as many bytes as the weights have: the kernels write its front, the reference its back.
    out: DeviceRange,
    /// For scales.
    table: DeviceRange,
    bytes: u64,
}

pub(crate) fn measure(report: &mut Report, gpu: &Gpu, weights: &Weights) -> anyhow::Result<()> {
    let bytes = weights.halves.bytes();
    let blocks = bytes / weights.halves.dtype.bytes() as u64 / (BLOCK * BLOCK) as u64;
    let (out, table) = (gpu.memory(2 * bytes)?, gpu.memory(4 * blocks)?);
    let bench = Bench { gpu, weights, out, table, bytes };
    report.add(REFERENCE, bench.reference(report.rounds()));
    bench.casts(report);
    report.part("BF16 to FP8", |report| bench.quantized::<bf16>(report, "BF16", &weights.halves));
    report.part("F32 to FP8", |report| bench.quantized::<f32>(report, "F32", &weights.singles));
    report.add("checksum", bench.checksum(report.rounds()));
    bench.copies(report);
    Ok(())
}

impl Bench<'_> {
    fn copied(&self) -> anyhow::Result<[DeviceRange; 2]> {
        Ok([self.weights.halves.device.clone(), self.out.part(self.bytes..2 * self.bytes)?])
    }

    fn copy(&self) -> anyhow::Result<Work<'_>> {
        let [from, to] = self.copied()?;
        Ok(Work::new(2 * self.bytes, self.gpu.rounds_of_copy(&from, &to)))
    }

    fn reference(&self, rounds: usize) -> anyhow::Result<Figures> {
        let [_, to] = self.copied()?;
        self.gpu.fill(&to, POISON)?;
        let figures = alone(rounds, self.copy()?)?;
        self.gpu.check(&to, self.weights.halves.host.bytes())?;
        Ok(figures)
    }

    /// An operation that was checked, beside the copy.
    fn beside(&self, rounds: usize, moved: u64, operation: Operation) -> anyhow::Result<Figures> {
        beside(rounds, Work::new(moved, self.gpu.rounds_of(operation)), REFERENCE, self.copy()?)
    }

    fn casts(&self, report: &mut Report) {
        let Weights { halves, singles } = self.weights;
        let casts =
            [(halves, Dtype::F32), (halves, Dtype::F16), (halves, Dtype::F8E4M3), (singles, Dtype::BF16)];
        for (source, to) in casts {
            let figures = self.cast(report.rounds(), source, to);
            report.add(&format!("cast {} to {to}", source.dtype), figures);
        }
    }

    fn cast(&self, rounds: usize, source: &Source, to: Dtype) -> anyhow::Result<Figures> {
        let written = source.bytes() / source.dtype.bytes() as u64 * to.bytes() as u64;
        let out = self.out.part(0..written)?;
        let mut expected = vec![0; usize::try_from(written)?];
        weight_ops::cast_bytes(source.dtype, source.host.bytes(), to, &mut expected)?;
        let cast = self.gpu.kernels.cast(source.dtype, &source.device, to, &out)?;
        let cast = self.gpu.checked(cast, POISON, &[(&out, &expected)])?;
        self.beside(rounds, source.bytes() + written, cast)
    }

    /// Quantisation in one step and in its parts, and the way back.
    fn quantized<T: Float>(&self, report: &mut Report, name: &str, source: &Source) -> anyhow::Result<()> {
        let Gpu { kernels, .. } = self.gpu;
        let count = source.bytes() / source.dtype.bytes() as u64;
        let shape = [usize::try_from(count)? / COLUMNS, COLUMNS];
        let grid = BlockGrid::new(shape, [BLOCK as u32; 2])?;
        let matrix = DeviceMatrix::new(&source.device, source.dtype, shape, COLUMNS)?;
        let (code_bytes, back_bytes) = (self.out.part(0..count)?, self.out.part(self.bytes..2 * self.bytes)?);
        let codes = DeviceMatrix::new(&code_bytes, Dtype::F8E4M3, shape, COLUMNS)?;
        let back = DeviceMatrix::new(&back_bytes, source.dtype, shape, COLUMNS)?;
        let scales = self.table.part(0..4 * grid.table_len() as u64)?;

        let host = || MatrixRef::<T>::from_bytes(source.host.bytes(), shape, COLUMNS);
        let mut host_codes = vec![0; usize::try_from(count)?];
        let mut host_scales = vec![0.0; grid.table_len()];
        let destination = MatrixMut::<F8E4M3>::from_bytes(&mut host_codes, shape, COLUMNS)?;
        weight_ops::quantize(&grid, host()?, ScaleFormat::F32, destination, &mut host_scales)?;
        let scale_bytes = bytes_of(&host_scales);

        let rounds = report.rounds();
        let one_step = || {
            let work = kernels.quantize(&grid, &matrix, ScaleFormat::F32, &codes, &scales)?;
            let written = [(&code_bytes, &host_codes[..]), (&scales, &scale_bytes)];
            self.beside(rounds, source.bytes() + count, self.gpu.checked(work, POISON, &written)?)
        };
        let target = (source.dtype == Dtype::BF16).then_some(QUANTIZE_TARGET);
        report.add(
            &format!("{name} to FP8 in blocks of 128 x 128, with scales"),
            one_step().map(|figures| figures.with_target(target)),
        );
        // The scales are on the GPU now.
        let values = || {
            let work = kernels.quantize_rect(&grid, &matrix, [0, 0], &scales, &codes)?;
            let work = self.gpu.checked(work, POISON, &[(&code_bytes, &host_codes)])?;
            self.beside(rounds, source.bytes() + count, work)
        };
        report.add(&format!("{name} to FP8 by known scales"), values());
        let dequantized = || {
            let mut expected = vec![0; usize::try_from(source.bytes())?];
            let codes_there = MatrixRef::<F8E4M3>::from_bytes(&host_codes, shape, COLUMNS)?;
            let destination = MatrixMut::<T>::from_bytes(&mut expected, shape, COLUMNS)?;
            weight_ops::dequantize_rect(&grid, codes_there, [0, 0], &host_scales, destination)?;
            let work = kernels.dequantize_rect(&grid, &codes, [0, 0], &scales, &back)?;
            let work = self.gpu.checked(work, POISON, &[(&back_bytes, &expected)])?;
            self.beside(rounds, source.bytes() + count, work)
        };
        report.add(&format!("FP8 to {name}"), dequantized());
        let amax = || {
            let mut expected = vec![0.0; grid.table_len()];
            weight_ops::block_amax(&grid, host()?, [0, 0], &mut expected)?;
            let work = kernels.block_amax(&grid, &matrix, [0, 0], &scales)?;
            // A table of amaxes starts with zeros.
            let work = self.gpu.checked(work, 0, &[(&scales, &bytes_of(&expected))])?;
            self.beside(rounds, source.bytes(), work)
        };
        report.add(&format!("{name}: amax of blocks, read only"), amax());
        Ok(())
    }

    fn checksum(&self, rounds: usize) -> anyhow::Result<Figures> {
        let Source { host, device, .. } = &self.weights.halves;
        let sums = self.gpu.kernels.checksums(&self.gpu.stream, &[(0, device.clone())])?;
        let (sums, found) = sums.enqueue(&self.gpu.stream)?.wait()?;
        ensure!(found == [PartialChecksum::of(0, host.bytes())], "the checksum is not that of the CPU");
        let mut ready = Some(sums);
        let round = || {
            let sums: Checksums = ready.take().ok_or_else(|| anyhow::anyhow!("the round before failed"))?;
            let start = |stream: &gpu_mem::Stream| Ok(sums.enqueue(stream)?);
            let (sums, took) = self.gpu.timed(start, |pending| Ok(pending.wait()?.0))?;
            ready = Some(sums);
            Ok(took)
        };
        beside(rounds, Work::new(self.bytes, round), REFERENCE, self.copy()?)
    }

    /// Spans in any order, and strided rows.
    fn copies(&self, report: &mut Report) {
        for span_bytes in SPAN_BYTES {
            let figures = self.spans(report.rounds(), span_bytes);
            report.add(&format!("shuffled spans of {} KiB", span_bytes >> 10), figures);
        }
        for row_bytes in ROW_BYTES {
            let figures = self.gather(report.rounds(), row_bytes);
            report.add(&format!("gather of rows of {row_bytes} bytes"), figures);
        }
    }

    fn spans(&self, rounds: usize, span_bytes: u64) -> anyhow::Result<Figures> {
        let Source { host, device, .. } = &self.weights.halves;
        let shuffled = Shuffled::new(self.bytes, span_bytes, 0);
        let regions = [device.clone(), self.out.part(0..self.bytes)?];
        let kernels = &self.gpu.kernels;
        let copy =
            kernels.copy_spans(&self.gpu.stream, &regions, &shuffled.spans(), kernels.multiprocessors())?;
        let copy = self.gpu.checked(copy, POISON, &[(&regions[1], &shuffled.expected(host.bytes()))])?;
        self.beside(rounds, 2 * self.bytes, copy)
    }

    /// Every second row of that length, to rows that follow each other.
    fn gather(&self, rounds: usize, row_bytes: u64) -> anyhow::Result<Figures> {
        let Source { host, device, .. } = &self.weights.halves;
        let regions = [device.clone(), self.out.part(0..self.bytes / 2)?];
        let place = |region| Place { region, offset: 0 };
        let rows = BoxCopy {
            source: place(0),
            destination: place(1),
            row_bytes,
            counts: [1, 1, u32::try_from(self.bytes / row_bytes / 2)?],
            source_strides: [0, 0, 2 * row_bytes],
            destination_strides: [0, 0, row_bytes],
        };
        let len = usize::try_from(row_bytes)?;
        let mut expected = vec![0; usize::try_from(regions[1].len_bytes())?];
        let pairs = expected.par_chunks_mut(len).zip(host.bytes().par_chunks(2 * len));
        pairs.for_each(|(to, from)| to.copy_from_slice(&from[..len]));
        let kernels = &self.gpu.kernels;
        let copy = kernels.copy_boxes(&self.gpu.stream, &regions, &[rows], kernels.multiprocessors())?;
        let copy = self.gpu.checked(copy, POISON, &[(&regions[1], &expected)])?;
        self.beside(rounds, self.bytes, copy)
    }
}

pub(crate) fn bytes_of(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
}
