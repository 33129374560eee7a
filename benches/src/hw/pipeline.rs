//! A push's first stages as they overlap: while one chunk of weights is quantised, the next comes from the host.
//!
//! The link is the narrower part, so all of it together should take little longer than the copy alone.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use gpu_mem::{Device, PinnedBuffer, Span, Stream};
use half::bf16;
use weight_ops::cuda::{DeviceMatrix, DeviceRange, Operation};
use weight_ops::{BlockGrid, Dtype, F8E4M3, MatrixMut, MatrixRef, ScaleFormat};

use crate::data::{LenBytes as _, Source};
use crate::gpu::{Gpu, POISON};
use crate::kernels::{BLOCK, COLUMNS, bytes_of};
use crate::link;
use crate::measure::{Figures, Target, Work, beside};
use crate::report::Report;

/// Of the bytes per second of a copy alone.
const TARGET: Target = Target::Ratio(0.95);

/// Into how many chunks the weights are cut: the last is quantised when nothing is copied any more.
const CHUNKS: u64 = 32;

/// Chunks on the GPU at a time: one is quantised, one comes, and one waits, so that neither waits for the other.
const SLOTS: usize = 3;

/// BF16 rows of whole blocks.
const GRAIN_BYTES: u64 = (BLOCK * COLUMNS * 2) as u64;

struct Pipeline {
    device: Device,
    host: Arc<PinnedBuffer>,
    copies: Stream,
    kernels: Stream,
    slots: Vec<DeviceRange>,
    /// How each chunk is quantised, in its slot. Taken out while they run.
    chunks: Vec<Operation>,
}

pub(crate) fn measure(report: &mut Report, gpu: &Gpu, source: &Source) -> anyhow::Result<()> {
    report.add("pinned host to GPU, quantised to FP8 meanwhile", figures(gpu, report.rounds(), source));
    Ok(())
}

fn figures(gpu: &Gpu, rounds: usize, source: &Source) -> anyhow::Result<Figures> {
    let bytes = source.bytes();
    let shape = [usize::try_from(bytes)? / 2 / COLUMNS, COLUMNS];
    let grid = BlockGrid::new(shape, [BLOCK as u32; 2])?;
    let (codes, scales) = (gpu.memory(bytes / 2)?, gpu.memory(4 * grid.table_len() as u64)?);
    let mut pipeline = Pipeline::new(gpu, source, &codes, &scales)?;

    let mut host_codes = vec![0; usize::try_from(bytes)? / 2];
    let mut host_scales = vec![0.0; grid.table_len()];
    let weights = MatrixRef::<bf16>::from_bytes(source.host.bytes(), shape, COLUMNS)?;
    let destination = MatrixMut::<F8E4M3>::from_bytes(&mut host_codes, shape, COLUMNS)?;
    weight_ops::quantize(&grid, weights, ScaleFormat::F32, destination, &mut host_scales)?;
    gpu.fill(&codes, POISON)?;
    gpu.fill(&scales, POISON)?;
    pipeline.run()?;
    gpu.check(&codes, &host_codes)?;
    gpu.check(&scales, &bytes_of(&host_scales))?;

    let device = gpu.memory(bytes)?;
    let copy = link::rounds_to_gpu(gpu, &source.host, &device);
    let figures = beside(rounds, Work::new(bytes, || pipeline.run()), link::TO_GPU, copy)?;
    Ok(figures.with_target(TARGET))
}

impl Pipeline {
    fn new(gpu: &Gpu, source: &Source, codes: &DeviceRange, scales: &DeviceRange) -> anyhow::Result<Self> {
        let bytes = source.bytes();
        let chunk_bytes = bytes.div_ceil(CHUNKS).next_multiple_of(GRAIN_BYTES);
        let slots = (0..SLOTS).map(|_| gpu.memory(chunk_bytes)).collect::<anyhow::Result<Vec<_>>>()?;
        let mut chunks = Vec::new();
        for (slot, first) in slots.iter().cycle().zip((0..bytes).step_by(usize::try_from(chunk_bytes)?)) {
            let len = chunk_bytes.min(bytes - first);
            let shape = [usize::try_from(len)? / 2 / COLUMNS, COLUMNS];
            let grid = BlockGrid::new(shape, [BLOCK as u32; 2])?;
            let weights = DeviceMatrix::new(&slot.part(0..len)?, Dtype::BF16, shape, COLUMNS)?;
            let codes = codes.part(first / 2..(first + len) / 2)?;
            let codes = DeviceMatrix::new(&codes, Dtype::F8E4M3, shape, COLUMNS)?;
            // A scale for each block, in the order of blocks.
            let first_scale = 4 * (first / 2 / (BLOCK * BLOCK) as u64);
            let scales = scales.part(first_scale..first_scale + 4 * grid.table_len() as u64)?;
            chunks.push(gpu.kernels.quantize(&grid, &weights, ScaleFormat::F32, &codes, &scales)?);
        }
        let (device, host) = (gpu.device.clone(), Arc::clone(&source.host));
        Ok(Self { copies: device.stream()?, kernels: device.stream()?, device, host, slots, chunks })
    }

    /// From the first copy's start to the last chunk's end.
    fn run(&mut self) -> anyhow::Result<Duration> {
        let (mut before, mut after) = (self.device.timing_event()?, self.device.timing_event()?);
        let (mut copied, mut quantized) = (Vec::new(), Vec::new());
        let mut from = 0;
        let total = self.host.bytes().len() as u64;
        before.record(&self.copies)?;
        for (number, chunk) in std::mem::take(&mut self.chunks).into_iter().enumerate() {
            let slot = self.slots.get(number % SLOTS).context("there is no slot")?;
            // What was in the slot before has been read.
            if let Some(earlier) = number.checked_sub(SLOTS).and_then(|number| quantized.get(number)) {
                self.copies.wait_for(gpu_mem::Pending::event(earlier))?;
            }
            let len = slot.len_bytes().min(total - from);
            let span = [Span { from, to: 0, len }];
            let copy = self.copies.copy_to_device(Arc::clone(&self.host), slot.clone(), &span)?;
            self.kernels.wait_for(copy.event())?;
            quantized.push(chunk.enqueue(&self.kernels)?);
            copied.push(copy);
            from += len;
        }
        after.record(&self.kernels)?;
        for copy in copied {
            copy.wait()?;
        }
        for chunk in quantized {
            self.chunks.push(chunk.wait()?);
        }
        after.wait()?;
        Ok(after.since(&before)?)
    }
}
