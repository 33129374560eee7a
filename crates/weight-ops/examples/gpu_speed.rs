//! How fast the kernels are on this GPU, beside copies by CUDA of the same run; with a second GPU also from one to the other.
//!
//! `cargo run --release -p weight-ops --features cuda --example gpu_speed -- [MIB] [ROUNDS]`: so many MiB of source for each
//! kernel, 1024 if not said, and 21 rounds. Every figure is the median of its rounds, in GB/s by events. In each round the
//! copy comes first, then the kernel, so that both meet the same state of the machine. Bytes read and written are counted
//! on one device, bytes moved between two.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use gpu_mem::{Cuda, Device, DeviceMemory, Span as Bytes, Stream};
use weight_ops::cuda::{BoxCopy, DeviceMatrix, DeviceRange, Kernels, Operation, Place, Span};
use weight_ops::{BlockGrid, Dtype, ScaleFormat};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const WARM_UP_ROUNDS: usize = 3;
const SPAN_BYTES: [u64; 6] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 8 << 20];

/// A stream, the copy that everything is compared with, and how it is measured.
struct Bench {
    device: Device,
    stream: Stream,
    rounds: usize,
    /// Source, destination.
    copied: [DeviceRange; 2],
}

/// Something that a stream can be given again and again.
trait Work: Sized {
    fn run(self, bench: &Bench) -> Result<(Self, Duration)>;
}

/// Times what `start` gives the stream, and waits for it.
fn timed<P, T>(
    bench: &Bench,
    start: impl FnOnce(&Stream) -> Result<P>,
    wait: impl FnOnce(P) -> Result<T>,
) -> Result<(T, Duration)> {
    let (before, after) = (bench.device.timing_event()?, bench.device.timing_event()?);
    before.record(&bench.stream)?;
    let pending = start(&bench.stream)?;
    after.record(&bench.stream)?;
    let done = wait(pending)?;
    after.wait()?;
    Ok((done, after.since(&before)?))
}

impl Work for Operation {
    fn run(self, bench: &Bench) -> Result<(Self, Duration)> {
        timed(bench, |stream| Ok(self.enqueue(stream)?), |pending| Ok(pending.wait()?))
    }
}

impl Work for weight_ops::cuda::Checksums {
    fn run(self, bench: &Bench) -> Result<(Self, Duration)> {
        timed(bench, |stream| Ok(self.enqueue(stream)?), |pending| Ok(pending.wait()?.0))
    }
}

impl Bench {
    fn copy(&self) -> Result<Duration> {
        let [from, to] = self.copied.clone();
        let all = [Bytes::first(from.len())];
        let copy = |stream: &Stream| Ok(stream.copy(from, to, &all)?);
        Ok(timed(self, copy, |pending| Ok(pending.wait()?))?.1)
    }

    /// Prints the speed of `work`, which moves so many bytes, and that of the copy, which moves `copy_bytes`.
    fn report(&self, name: &str, bytes: u64, copy_bytes: u64, mut work: impl Work) -> Result<()> {
        let (mut ours, mut copies, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..WARM_UP_ROUNDS + self.rounds {
            let copy = copy_bytes as f64 / self.copy()?.as_secs_f64() / 1e9;
            let (again, took) = work.run(self)?;
            work = again;
            if round >= WARM_UP_ROUNDS {
                let our = bytes as f64 / took.as_secs_f64() / 1e9;
                ours.push(our);
                copies.push(copy);
                ratios.push(our / copy);
            }
        }
        println!("{name:<44} {:>7.0} {:>7.0} {:>6.3}", median(ours), median(copies), median(ratios));
        Ok(())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Sebastiano Vigna's SplitMix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// Device memory full of weights: random, for zeros may be faster than what is real.
fn weights(bench_device: &Device, stream: &Stream, dtype: Dtype, bytes: u64) -> Result<DeviceRange> {
    const PATTERN_BYTES: u64 = 1 << 20;
    let mut state = 1;
    let singles: Vec<u8> = (0..PATTERN_BYTES / dtype.bytes() as u64)
        .flat_map(|_| (random(&mut state) as i64 as f32 / i64::MAX as f32 * 0.1).to_ne_bytes())
        .collect();
    let mut pattern = bench_device.pinned(PATTERN_BYTES as usize)?;
    weight_ops::cast_bytes(Dtype::F32, &singles, dtype, pattern.bytes_mut())?;
    let copies: Vec<Bytes> = (0..bytes.div_ceil(PATTERN_BYTES))
        .map(|index| index * PATTERN_BYTES)
        .map(|to| Bytes { from: 0, to, len: PATTERN_BYTES.min(bytes - to) })
        .collect();
    let memory = bench_device.alloc(bytes)?;
    let (_, memory) = stream.copy_to_device(pattern, memory, &copies)?.wait()?;
    Ok(DeviceRange::whole(&Arc::new(memory)))
}

fn memory(device: &Device, bytes: u64) -> Result<DeviceRange> {
    Ok(DeviceRange::whole(&Arc::new(device.alloc(bytes)?)))
}

fn on_one(device: &Device, bytes: u64, rounds: usize) -> Result<()> {
    let kernels = Kernels::new(device)?;
    let stream = device.stream()?;
    let halves = weights(device, &stream, Dtype::BF16, bytes)?;
    let singles = weights(device, &stream, Dtype::F32, bytes)?;
    let out = memory(device, 2 * bytes)?;
    let copied = [halves.clone(), out.part(0..bytes)?];
    let bench = Bench { device: device.clone(), stream, rounds, copied };
    let report = |name: &str, moved: u64, work: Operation| bench.report(name, moved, 2 * bytes, work);
    println!("{device}: GB/s read and written, those of a copy by CUDA, ratio; {} MiB", bytes >> 20);

    let elements = bytes / 2;
    let to = |bytes: u64| out.part(0..bytes);
    report("cast bf16 to f32", 3 * bytes, kernels.cast(Dtype::BF16, &halves, Dtype::F32, &to(2 * bytes)?)?)?;
    report("cast bf16 to f16", 2 * bytes, kernels.cast(Dtype::BF16, &halves, Dtype::F16, &to(bytes)?)?)?;
    report(
        "cast bf16 to e4m3",
        3 * elements,
        kernels.cast(Dtype::BF16, &halves, Dtype::F8E4M3, &to(elements)?)?,
    )?;
    let narrowed = kernels.cast(Dtype::F32, &singles, Dtype::BF16, &to(bytes / 2)?)?;
    report("cast f32 to bf16", bytes + bytes / 2, narrowed)?;

    let columns = 8192;
    let table = memory(device, elements.div_ceil(128 * 128) * 4)?;
    for (name, dtype, source) in [("bf16", Dtype::BF16, &halves), ("f32", Dtype::F32, &singles)] {
        // Whole rows of blocks.
        let rows = (bytes as usize / dtype.bytes() / columns / 128).max(1) * 128;
        let (shape, count) = ([rows, columns], (rows * columns) as u64);
        let grid = BlockGrid::new(shape, [128, 128])?;
        let source = DeviceMatrix::new(source, dtype, shape, columns)?;
        let codes = DeviceMatrix::new(&out, Dtype::F8E4M3, shape, columns)?;
        let scales = table.part(0..grid.table_len() as u64 * 4)?;
        let (read, written) = (count * dtype.bytes() as u64, count);
        let whole = kernels.quantize(&grid, &source, ScaleFormat::F32, &codes, &scales)?;
        report(&format!("{name} to FP8 with scales"), read + written, whole)?;
        let amax = kernels.block_amax(&grid, &source, [0, 0], &scales)?;
        report(&format!("{name} amax of blocks"), read, amax)?;
        let values = kernels.quantize_rect(&grid, &source, [0, 0], &scales, &codes)?;
        report(&format!("{name} to FP8, values only"), read + written, values)?;
        let back = kernels.dequantize_rect(&grid, &codes, [0, 0], &scales, &source)?;
        report(&format!("FP8 to {name}"), read + written, back)?;
    }

    let sums = kernels.checksums(&bench.stream, &[(0, halves.clone())])?;
    bench.report("checksum, read only", bytes, 2 * bytes, sums)?;
    let all = kernels.multiprocessors();
    let regions = [halves, out];
    for span_bytes in [4 << 10, 64 << 10] {
        let spans = shuffled(bytes, span_bytes);
        let copy = kernels.copy_spans(&bench.stream, &regions, &spans, all)?;
        report(&format!("shuffled spans of {} KiB", span_bytes >> 10), 2 * bytes, copy)?;
    }
    for row_bytes in [256, 2048] {
        // Every second row of that length.
        let place = |region| Place { region, offset: 0 };
        let counts = [1, 1, u32::try_from(bytes / row_bytes / 2)?];
        let [source_strides, destination_strides] = [[0, 0, 2 * row_bytes], [0, 0, row_bytes]];
        let gather = BoxCopy {
            source: place(0),
            destination: place(1),
            row_bytes,
            counts,
            source_strides,
            destination_strides,
        };
        let copy = kernels.copy_boxes(&bench.stream, &regions, &[gather], all)?;
        report(&format!("gather of rows of {row_bytes} bytes"), bytes, copy)?;
    }
    Ok(())
}

/// Spans that fill a region, taken from another in any order.
fn shuffled(bytes: u64, span_bytes: u64) -> Vec<Span> {
    let mut from: Vec<u64> = (0..bytes / span_bytes).map(|index| index * span_bytes).collect();
    let mut state = 7;
    for index in (1..from.len()).rev() {
        from.swap(index, (random(&mut state) % (index as u64 + 1)) as usize);
    }
    let place = |region, offset| Place { region, offset };
    (0_u64..)
        .zip(from)
        .map(|(index, from)| Span {
            source: place(0, from),
            destination: place(1, index * span_bytes),
            bytes: span_bytes,
        })
        .collect()
}

/// From the first to the second, by kernels of either.
fn between(devices: &[Device; 2], bytes: u64, rounds: usize) -> Result<()> {
    let [first, second] = devices;
    let source = weights(first, &first.stream()?, Dtype::BF16, bytes)?;
    let destination = memory(second, bytes)?;
    first.enable_access(second)?;
    second.enable_access(first)?;
    println!("{first} to {second}: GB/s, those of one copy by CUDA, ratio; {} MiB", bytes >> 20);
    for (how, device) in [("pushed", first), ("pulled", second)] {
        let kernels = Kernels::new(device)?;
        let copied = [source.clone(), destination.clone()];
        let bench = Bench { device: device.clone(), stream: device.stream()?, rounds, copied };
        for multiprocessors in [kernels.multiprocessors(), 16] {
            for span_bytes in SPAN_BYTES {
                let spans = shuffled(bytes, span_bytes);
                let copy = kernels.copy_spans(&bench.stream, &bench.copied, &spans, multiprocessors)?;
                let name = format!("{how}, spans of {} KiB, {multiprocessors} SMs", span_bytes >> 10);
                bench.report(&name, bytes, bytes, copy)?;
            }
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let number = |index: usize, default: u64| match std::env::args().nth(index) {
        Some(text) => text.parse().map_err(|_| format!("{text:?} is no number")),
        None => Ok(default),
    };
    let (bytes, rounds) = (number(1, 1024)? << 20, number(2, 21)? as usize);
    let devices = match Cuda::open().and_then(|cuda| cuda.devices()) {
        Ok(devices) if !devices.is_empty() => devices,
        Ok(_) => return Err("no CUDA device".into()),
        Err(error) => return Err(error.into()),
    };
    on_one(&devices[0], bytes, rounds)?;
    match &devices[..] {
        [first, second, ..] => between(&[first.clone(), second.clone()], bytes, rounds)?,
        _ => println!("between GPUs: skipped, there is one"),
    }
    Ok(())
}
