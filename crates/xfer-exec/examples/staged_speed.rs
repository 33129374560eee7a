//! How fast bytes leave a GPU by staging slots, and how fast a mirror's arrive on it: a whole driver on a rail that takes
//! everything at once, beside one large copy from or to page-locked memory.
//!
//! `cargo run --release -p xfer-exec --features cuda --example staged_speed`

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use efa_core::LeaseMut;
use gpu_mem::{Cuda, Device, Span};
use weight_ops::cuda::{DeviceRange, Kernels};
use xfer_exec::cuda::{CudaRailConfig, Mirror, StagedMemory, StagedMemoryConfig};
use xfer_exec::driver::{Driver, HostRail, Step};
use xfer_exec::null::NullRail;
use xfer_exec::program::Route;
use xfer_exec::{Program, RailIndex, RailLimits, RankLimits};
use xfer_plan::{DType, Op, ParamId, RankPlan, ReceiverRank, RegionIndex, Strided, Transform};

/// What a round moves.
const BYTES: u64 = 1 << 30;
const STAGING_BYTES: u64 = 64 << 20;
const ROUNDS: usize = 7;
const TO: ReceiverRank = ReceiverRank(0);
const SOON: Duration = Duration::from_secs(30);

fn main() -> Result<(), Box<dyn Error>> {
    let device = Cuda::open()?.device(0)?;
    println!("{device}; GB/s, median of {ROUNDS} rounds of {} MiB", BYTES >> 20);
    let kernels = Kernels::new(&device)?;
    // Of rows that lie apart every second is sent, and floats become half as long.
    let weights = DeviceRange::whole(&Arc::new(device.alloc(2 * BYTES)?));
    println!(
        "one large copy: from the GPU {:.1}, to the GPU {:.1}",
        large(&device, true)?,
        large(&device, false)?
    );
    let floats = Transform::Cast { from: DType::F32, to: DType::BF16 };
    for (name, row_bytes, transform) in [
        ("in one piece", None, Transform::Copy),
        ("rows of 2 KiB", Some(2 << 10), Transform::Copy),
        ("F32 as BF16", None, floats),
    ] {
        for slot_bytes in [256 << 10, 1 << 20, 4 << 20] {
            let rate = staged(&kernels, &weights, slot_bytes, row_bytes, transform)?;
            println!("staged {name}, slots of {} KiB: {rate:.1}", slot_bytes >> 10);
        }
    }
    let mirror = Mirror::shared(&device, BYTES)?;
    println!("a mirror's upload: {:.1}", median(|| Ok(mirror.upload_all(&weights)?.wait(SOON)?))?);
    Ok(())
}

/// Bytes a second of the median round, in GB; the first round does not count.
fn median(mut round: impl FnMut() -> Result<(), Box<dyn Error>>) -> Result<f64, Box<dyn Error>> {
    let mut rounds = Vec::with_capacity(ROUNDS);
    for _ in 0..=ROUNDS {
        let began = Instant::now();
        round()?;
        rounds.push(began.elapsed());
    }
    rounds.remove(0);
    rounds.sort_unstable();
    let took = rounds.get(ROUNDS / 2).ok_or("no round")?;
    Ok(BYTES as f64 / took.as_secs_f64() / 1e9)
}

fn large(device: &Device, from: bool) -> Result<f64, Box<dyn Error>> {
    let (stream, all) = (device.stream()?, [Span::first(BYTES)]);
    let mut memory = Some((device.alloc(BYTES)?, device.pinned(BYTES as usize)?));
    median(|| {
        let (there, here) = memory.take().ok_or("a round has failed")?;
        memory = Some(match from {
            true => stream.copy_to_host(there, here, &all)?.wait()?,
            false => {
                let (here, there) = stream.copy_to_device(here, there, &all)?.wait()?;
                (there, here)
            }
        });
        Ok(())
    })
}

/// Pushes operations that each fill a slot.
fn staged(
    kernels: &Kernels,
    weights: &DeviceRange,
    slot_bytes: u64,
    row_bytes: Option<u64>,
    transform: Transform,
) -> Result<f64, Box<dyn Error>> {
    let row_bytes = row_bytes.unwrap_or(slot_bytes);
    let rows = slot_bytes / row_bytes;
    let apart = if rows > 1 { 2 * row_bytes } else { transform.source_bytes(row_bytes) };
    let place = |offset, stride| Strided { region: RegionIndex(0), offset, stride };
    let op = |number: u64| Op {
        to: TO,
        param: ParamId(0),
        row_bytes: row_bytes as u32,
        rows: rows as u32,
        source: place(number * rows * apart, apart),
        destination: place(number * slot_bytes, row_bytes),
        gather: rows > 1,
        transform,
        rail: 0,
        wave: 0,
    };
    let ops: Vec<Op> = (0..BYTES / slot_bytes).map(op).collect();
    let plan = RankPlan { bytes: BYTES, writes: ops.len() as u64, ops, tags: Vec::new() };
    let rank = RankLimits { region_bytes: vec![2 * BYTES], slot_bytes, transforms: true };
    let route = Route { rails: vec![RailIndex(0)], region_bytes: vec![BYTES] };
    let program = Program::staged(plan, BTreeMap::new(), &rank, BTreeMap::from([(TO, route)]))?;
    let staging = LeaseMut::new(kernels.device().pinned(STAGING_BYTES as usize)?);
    let multiprocessors = CudaRailConfig::default().multiprocessors;
    let config = StagedMemoryConfig { slot_bytes, multiprocessors, close_max: SOON };
    let memory = StagedMemory::new(kernels, &program, staging, config)?;
    let limits = RailLimits { depth: 256, in_flight_bytes_max: u64::MAX, takes_rows: false };
    let rail: HostRail = Box::new(NullRail::new(limits, 0));
    let mut driver = Driver::over(memory, program, vec![rail], SOON, SOON / 5);
    median(|| {
        driver.begin(vec![weights.clone()]);
        loop {
            if let Step::Over(outcome) = driver.step() {
                outcome.result?;
                return Ok(());
            }
        }
    })
}
