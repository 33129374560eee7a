//! Making large memory known: the host's to CUDA, a GPU's to NICs. It is done once, when a job joins, and must not take
//! seconds.

use std::fs::{self, File};
use std::io::{Seek as _, SeekFrom};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, ensure};
use gpu_mem::{Device, DeviceMemory, HostMemory as _, NicAccess, NicMemory, RegisteredHost};
use rayon::prelude::*;

use crate::data::LenBytes as _;
use crate::gpu::{Gpu, POISON};
use crate::link;
use crate::measure::{Figures, Rounds, Target, alone, beside};
use crate::report::Report;

/// The most host memory that is registered.
const HOST_BYTES_MAX: u64 = 16 << 30;

/// The most GPU memory: about what an 80 GB GPU has for weights.
const DEVICE_BYTES_MAX: u64 = 70_000_000_000;

/// GPU memory that is left alone: contexts and streams of other processes need some.
const DEVICE_BYTES_LEFT: u64 = 2 << 30;

/// Of PyTorch's `expandable_segments`, for large blocks.
const CHUNK_BYTES: u64 = 20 << 20;

/// Registering takes long enough to be measured a few times only.
const ROUNDS: usize = 3;

/// Of the export of all weights of a GPU.
const DEVICE_TARGET: Target = Target::Seconds(1.0);

/// `cuMemHostRegister` of host memory that is in use, and copies from it, of `copied_bytes` each.
pub(crate) fn host(report: &mut Report, gpu: &Gpu, copied_bytes: u64, bytes_max: u64) -> anyhow::Result<()> {
    let bytes = HOST_BYTES_MAX.min(bytes_max).min(available_bytes()? / 4 * 3);
    let mut memory = vec![0; usize::try_from(bytes)?];
    // Pages that were never written would be made by the registration.
    memory
        .par_chunks_mut(1 << 20)
        .enumerate()
        .for_each(|(part, bytes)| bytes.fill(part as u8 ^ part.to_le_bytes()[1]));
    let mut seconds = Vec::new();
    let mut registered = register(&gpu.device, memory, &mut seconds)?;
    for _ in 1..ROUNDS {
        registered = register(&gpu.device, registered.unregister()?, &mut seconds)?;
    }
    let name = format!("registration of {:.1} GiB of host memory", bytes as f64 / (1_u64 << 30) as f64);
    report.add(&name, Ok(Figures::alone(Rounds { bytes, seconds })));

    let copied_bytes = copied_bytes.min(bytes);
    let (registered, device) = (Arc::new(registered), gpu.memory(copied_bytes)?);
    let copied = || {
        gpu.fill(&device, POISON)?;
        alone(1, link::rounds_to_gpu(gpu, &registered, &device))?;
        gpu.check(&device, &registered.bytes()[..usize::try_from(device.len_bytes())?])?;
        let pinned = Arc::new(gpu.device.pinned(usize::try_from(copied_bytes)?)?);
        let reference = link::rounds_to_gpu(gpu, &pinned, &device);
        beside(report.rounds(), link::rounds_to_gpu(gpu, &registered, &device), link::TO_GPU, reference)
    };
    let figures = copied();
    report.add("registered host to GPU", figures);
    Ok(())
}

fn register(
    device: &Device,
    memory: Vec<u8>,
    seconds: &mut Vec<f64>,
) -> anyhow::Result<RegisteredHost<Vec<u8>>> {
    let began = Instant::now();
    let registered = device.register_host(memory)?;
    seconds.push(began.elapsed().as_secs_f64());
    Ok(registered)
}

/// Finding the segments behind a GPU's memory and exporting each as a dma-buf: what a NIC is then told of.
pub(crate) fn device(report: &mut Report, device: &Device, bytes_max: u64) -> anyhow::Result<()> {
    device.reclaim();
    let free = device.memory()?.free.saturating_sub(DEVICE_BYTES_LEFT);
    let bytes = DEVICE_BYTES_MAX.min(bytes_max).min(free);
    if !device.has_dma_buf()? {
        report.skip("dma-bufs of GPU memory", "the driver or the kernel exports none");
        return Ok(());
    }
    let size = format!("{:.1} GB of GPU memory", bytes as f64 / 1e9);
    let plain = || Ok(export_rounds(device, &Arc::new(device.alloc(bytes)?))?.with_target(DEVICE_TARGET));
    report.add(&format!("segments and dma-buf of {size}, one allocation"), plain());
    if device.has_vmm()? && device.has_rdma_with_vmm()? {
        let chunks = || export_rounds(device, &Arc::new(device.alloc_vmm(bytes, CHUNK_BYTES)?));
        report.add(&format!("segments and dma-bufs of {size}, mapped in chunks of 20 MiB"), chunks());
    }
    Ok(())
}

fn export_rounds<M: DeviceMemory + Sync>(device: &Device, memory: &Arc<M>) -> anyhow::Result<Figures> {
    let (address, bytes) = (memory.address(), M::len(memory));
    let mut seconds = Vec::new();
    for _ in 0..ROUNDS {
        let began = Instant::now();
        let segments = device.segments(&[(address, bytes)])?;
        let mut exported = 0;
        for segment in segments.iter() {
            let start = segment.range.start.max(address);
            let len = segment.range.end.min(address + bytes) - start;
            // Let go of at once: a NIC's registration needs the descriptor no longer, and there may be thousands.
            check(&NicMemory::export(Arc::clone(memory), start - address, len)?, len)?;
            exported += len;
        }
        seconds.push(began.elapsed().as_secs_f64());
        ensure!(exported == bytes, "the segments have {exported} of {bytes} bytes");
    }
    Ok(Figures::alone(Rounds { bytes, seconds }))
}

/// The descriptor stands for at least so many bytes.
fn check<M>(memory: &NicMemory<M>, len: u64) -> anyhow::Result<()>
where
    M: DeviceMemory,
{
    match memory.access() {
        NicAccess::DmaBuf(exported) => {
            let size = File::from(exported.fd().try_clone_to_owned()?).seek(SeekFrom::End(0));
            let size = size.context("the size of a dma-buf")?;
            ensure!(size >= exported.offset() + len, "a dma-buf of {size} bytes for {len}");
            Ok(())
        }
        NicAccess::Address(reason) => Err(reason.clone()).context("no dma-buf"),
    }
}

/// Host memory that can be had without swapping.
fn available_bytes() -> anyhow::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    Ok(kib.context("/proc/meminfo has no MemAvailable")? << 10)
}
