//! How fast the rail over CUDA IPC moves WRITEs of one size, from the first GPU to the second (or to itself where there is one):
//! by size, by the number of multiprocessors that it may use, contiguous and in rows. Also the part of the time that the host
//! spends posting.
//!
//! `cargo run --release -p xfer-exec --features cuda --example cuda_rail_speed`

use std::collections::{BTreeMap, VecDeque};
use std::error::Error;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gpu_mem::Cuda;
use weight_ops::cuda::{DeviceRange, Kernels};
use xfer_exec::cuda::{CudaPeer, CudaRail, CudaRailConfig, DeviceRegion, expose};
use xfer_exec::{Rail, RailWrite, Rows, WriteId};
use xfer_plan::{NO_TAG, ReceiverRank, RegionIndex};

/// What a round moves.
const BYTES: u64 = 1 << 30;
const ROUNDS: usize = 7;
const TO: ReceiverRank = ReceiverRank(0);

fn main() -> Result<(), Box<dyn Error>> {
    let devices = Cuda::open()?.devices()?;
    let [sender, ..] = devices.as_slice() else { return Err("no CUDA device".into()) };
    let receiver = devices.get(1).unwrap_or(sender);
    println!("{sender} to {receiver}; median of {ROUNDS} rounds of {} MiB", BYTES >> 20);
    let kernels = Kernels::new(sender)?;
    let buffer = Arc::new(receiver.alloc_vmm(BYTES, BYTES)?);
    let (doorman, _arrivals) = expose(vec![DeviceRegion::mapped(&buffer)?])?;
    // Rows lie apart by as much as they are long.
    let source = DeviceRange::whole(&Arc::new(sender.alloc(2 * BYTES)?));

    for multiprocessors in [8, 16, 32, kernels.multiprocessors()] {
        let multiprocessors = NonZeroU32::new(multiprocessors).unwrap_or(NonZeroU32::MIN);
        let peer = CudaPeer::open(sender, doorman.address(), &[BYTES], Duration::from_secs(10))?;
        let mut rail = Box::new(CudaRail::new(
            &kernels,
            BTreeMap::from([(TO, peer)]),
            CudaRailConfig { multiprocessors },
        )?);
        println!("{multiprocessors} multiprocessors: GB/s (part of the time that is spent posting)");
        for size in [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 8 << 20, 64 << 20] {
            let rows = Rows::one(size);
            println!("  spans of {:>6} KiB: {}", size >> 10, measure(&mut rail, &source, rows)?);
        }
        for row in [256, 2048, 16 << 10] {
            let rows = Rows { count: (1 << 20) / row, bytes: row, stride: 2 * u64::from(row) };
            println!("  1 MiB in rows of {row:>5} bytes: {}", measure(&mut rail, &source, rows)?);
        }
        rail.close(&mut Vec::new())?;
    }
    Ok(())
}

/// Moves everything, in WRITEs of these rows in an order that jumps about.
fn measure(rail: &mut CudaRail, source: &DeviceRange, rows: Rows) -> Result<String, Box<dyn Error>> {
    let count = (BYTES / rows.total_bytes()) as u32;
    let extent = rows.extent_bytes().ok_or("no such rows")?;
    let mut rounds = Vec::with_capacity(ROUNDS);
    for _ in 0..=ROUNDS {
        let mut writes = VecDeque::with_capacity(count as usize);
        for number in 0..count {
            // A multiplication by an odd number visits every place once: the count is a power of two.
            let place = u64::from(number.wrapping_mul(2_654_435_761) % count);
            let from = place * (rows.stride * u64::from(rows.count));
            writes.push_back(RailWrite {
                id: WriteId { op: number, row: 0 },
                from: source.part(from..from + extent)?,
                rows,
                to: TO,
                region: RegionIndex(0),
                offset: u64::from(number) * rows.total_bytes(),
                tag: NO_TAG,
            });
        }
        let (mut done, mut posting) = (Vec::with_capacity(count as usize), Duration::ZERO);
        let began = Instant::now();
        while done.len() < count as usize {
            let posts = Instant::now();
            let before = writes.len();
            rail.post(&mut writes)?;
            if writes.len() < before {
                posting += posts.elapsed();
            }
            rail.poll(&mut done)?;
        }
        let took = began.elapsed();
        if let Some(failed) = done.into_iter().find_map(|done| done.result.err()) {
            return Err(failed.into());
        }
        rounds.push((took, posting));
    }
    // The first makes room for the lists.
    rounds.remove(0);
    rounds.sort_unstable();
    let (took, posting) = rounds.get(ROUNDS / 2).copied().ok_or("no round")?;
    let rate = BYTES as f64 / took.as_secs_f64() / 1e9;
    Ok(format!("{rate:.1} ({:.0} %)", 100.0 * posting.as_secs_f64() / took.as_secs_f64()))
}
