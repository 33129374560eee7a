//! Kernels of `weight-ops` on this machine's memory, each beside a copy of as many bytes by the same threads.
//!
//! Bytes are those that a kernel must read and write, once each. A second read of what is still in a cache, or a line
//! that is fetched only to be overwritten, is its own cost.

use std::hint::black_box;
use std::time::Instant;

use half::{bf16, f16};
use rayon::prelude::*;
use serde::Serialize;
use weight_ops::{BlockGrid, F8E4M3, MatrixMut, MatrixRef, ScaleFormat};

use crate::machine::Machine;

/// The ratio to the copy that is asked of every kernel.
const TARGET: f64 = 0.7;

/// Columns of the matrix: the hidden size of DeepSeek-V3 and Kimi-K2.
const COLUMNS: usize = 7168;

/// Rows and columns of a block.
const BLOCK: u32 = 128;

/// The copy goes in chunks of this size: chunks of 192 and 768 KiB were the fastest here, with 48 to 50 GB/s against 41 with
/// 3 MiB or one chunk per thread.
const COPY_CHUNK_BYTES: usize = 256 << 10;

#[derive(clap::Parser)]
#[command(bin_name = "bench weight-ops", about = "Casts and FP8 quantisation beside a copy of as many bytes")]
pub(crate) struct Options {
    /// Of the matrix as F32
    #[arg(long, default_value_t = 512, value_name = "MIB", value_parser = clap::value_parser!(u64).range(16..=1 << 20))]
    mib: u64,
    /// Rounds that count; one more goes first and does not
    #[arg(long, default_value_t = 9, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Print JSON instead of the table
    #[arg(long)]
    json: bool,
}

impl Options {
    fn bytes(&self) -> usize {
        (self.mib as usize) << 20
    }
}

#[derive(Serialize)]
struct Results {
    benchmark: &'static str,
    machine: Machine,
    instruction_set: &'static str,
    threads: usize,
    rows: usize,
    columns: usize,
    comparisons: Vec<Comparison>,
}

#[derive(Serialize)]
struct Comparison {
    name: &'static str,
    /// Read and written in a round, by the kernel and by the copy.
    bytes: usize,
    target: f64,
    /// Of the medians.
    ratio: f64,
    gb_per_second: f64,
    copy_gb_per_second: f64,
    seconds: Vec<f64>,
    copy_seconds: Vec<f64>,
}

/// A kernel: its name, the bytes that it reads and writes per element, and a call of it.
type Kernel = (&'static str, usize, fn(&mut Memory) -> Result<(), weight_ops::Error>);

const KERNELS: [Kernel; 8] = [
    ("bf16 -> f32", 6, |m| weight_ops::cast(&m.bf16, &mut m.f32)),
    ("f32 -> bf16", 6, |m| weight_ops::cast(&m.f32, &mut m.bf16)),
    ("bf16 -> f16", 4, |m| weight_ops::cast(&m.bf16, &mut m.f16)),
    ("bf16 -> fp8, both phases in one pass", 3, |m| {
        let (source, destination) = (matrix(&m.bf16, &m.grid)?, matrix_mut(&mut m.fp8, &m.grid)?);
        weight_ops::quantize(&m.grid, source, ScaleFormat::F32, destination, &mut m.scales)
    }),
    ("bf16 -> fp8, phase 1: amax", 2, |m| {
        m.amax.fill(0.0);
        weight_ops::block_amax(&m.grid, matrix(&m.bf16, &m.grid)?, [0, 0], &mut m.amax)
    }),
    ("bf16 -> fp8, phase 2: values", 3, |m| {
        let (source, destination) = (matrix(&m.bf16, &m.grid)?, matrix_mut(&mut m.fp8, &m.grid)?);
        weight_ops::quantize_rect(&m.grid, source, [0, 0], &m.scales, destination)
    }),
    ("f32 -> fp8, both phases in one pass", 5, |m| {
        let (source, destination) = (matrix(&m.f32, &m.grid)?, matrix_mut(&mut m.fp8, &m.grid)?);
        weight_ops::quantize(&m.grid, source, ScaleFormat::F32, destination, &mut m.scales)
    }),
    ("fp8 -> bf16, dequantise", 3, |m| {
        let (source, destination) = (matrix(&m.fp8, &m.grid)?, matrix_mut(&mut m.bf16, &m.grid)?);
        weight_ops::dequantize_rect(&m.grid, source, [0, 0], &m.scales, destination)
    }),
];

/// What kernels read and write. All of it is touched before a round is timed.
struct Memory {
    grid: BlockGrid,
    bf16: Vec<bf16>,
    f32: Vec<f32>,
    f16: Vec<f16>,
    fp8: Vec<F8E4M3>,
    amax: Vec<f32>,
    scales: Vec<f32>,
    /// Of the copy.
    from: Vec<u8>,
    to: Vec<u8>,
}

impl Memory {
    fn new(rows: usize) -> anyhow::Result<Self> {
        let grid = BlockGrid::new([rows, COLUMNS], [BLOCK, BLOCK])?;
        let elements = rows * COLUMNS;
        let blocks = grid.table_len();
        // The widest kernel moves 6 bytes per element: the copy reads 3 and writes 3.
        let copied = 3 * elements;
        Ok(Self {
            grid,
            bf16: (0..elements).into_par_iter().map(|index| bf16::from_f32(weight(index))).collect(),
            f32: (0..elements).into_par_iter().map(weight).collect(),
            f16: vec![f16::ONE; elements],
            fp8: vec![F8E4M3::MAX; elements],
            amax: vec![1.0; blocks],
            scales: vec![1.0; blocks],
            from: vec![1; copied],
            to: vec![2; copied],
        })
    }

    /// The reference: `bytes` read and written.
    fn copy(&mut self, bytes: usize) {
        let (from, to) = (&self.from[..bytes / 2], &mut self.to[..bytes / 2]);
        let chunks = to.par_chunks_mut(COPY_CHUNK_BYTES).zip(from.par_chunks(COPY_CHUNK_BYTES));
        chunks.for_each(|(to, from)| to.copy_from_slice(from));
    }
}

fn matrix<'a, T: weight_ops::Element>(
    elements: &'a [T],
    grid: &BlockGrid,
) -> Result<MatrixRef<'a, T>, weight_ops::Error> {
    MatrixRef::new(elements, grid.shape(), COLUMNS)
}

fn matrix_mut<'a, T: weight_ops::Element>(
    elements: &'a mut [T],
    grid: &BlockGrid,
) -> Result<MatrixMut<'a, T>, weight_ops::Error> {
    MatrixMut::new(elements, grid.shape(), COLUMNS)
}

/// Different everywhere, as large as weights are.
fn weight(index: usize) -> f32 {
    let hashed = (index as u32).wrapping_mul(0x9e37_79b9);
    (hashed >> 8) as f32 / (1 << 24) as f32 * 0.1 - 0.05
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let block = BLOCK as usize;
    let rows = (options.bytes() / size_of::<f32>() / COLUMNS / block).max(1) * block;
    let mut memory = Memory::new(rows)?;
    let mut comparisons = Vec::new();
    let mut seconds = vec![(Vec::new(), Vec::new()); KERNELS.len()];
    // The first round is not counted: it touches memory and wakes threads.
    for round in 0..=options.rounds {
        for ((_, bytes, kernel), (ours, copies)) in KERNELS.iter().zip(&mut seconds) {
            let began = Instant::now();
            kernel(black_box(&mut memory))?;
            let kernel_ended = Instant::now();
            black_box(&mut memory).copy(bytes * rows * COLUMNS);
            if round > 0 {
                ours.push((kernel_ended - began).as_secs_f64());
                copies.push(kernel_ended.elapsed().as_secs_f64());
            }
        }
    }
    for ((name, bytes, _), (seconds, copy_seconds)) in KERNELS.into_iter().zip(seconds) {
        let bytes = bytes * rows * COLUMNS;
        let rate = |seconds: &[f64]| bytes as f64 / median(seconds) / 1e9;
        let (gb_per_second, copy_gb_per_second) = (rate(&seconds), rate(&copy_seconds));
        let ratio = gb_per_second / copy_gb_per_second;
        comparisons.push(Comparison {
            name,
            bytes,
            target: TARGET,
            ratio,
            gb_per_second,
            copy_gb_per_second,
            seconds,
            copy_seconds,
        });
    }
    let results = Results {
        benchmark: "weight-ops",
        machine: Machine::read()?,
        instruction_set: weight_ops::instruction_set(),
        threads: rayon::current_num_threads(),
        rows,
        columns: COLUMNS,
        comparisons,
    };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&results)?);
    } else {
        print(&results, options.rounds.into());
    }
    Ok(())
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

fn print(results: &Results, rounds: usize) {
    println!("machine  {}", results.machine);
    println!(
        "kernels  {}, {} threads, {} x {} elements, {BLOCK} x {BLOCK} blocks; bytes read + written, median of {rounds} rounds",
        results.instruction_set, results.threads, results.rows, results.columns
    );
    for comparison in &results.comparisons {
        println!(
            "{:36} {:6.2} GB/s   ratio {:.2} to a copy of as many bytes, {:6.2} GB/s (target {:.2})",
            comparison.name,
            comparison.gb_per_second,
            comparison.ratio,
            comparison.copy_gb_per_second,
            comparison.target,
        );
    }
}
