//! Copies between page-locked host memory and one GPU: CUDA's own, which pipelines are held against.

use std::sync::Arc;

use anyhow::Context;
use gpu_mem::{HostMemory, Span, Stream};
use weight_ops::cuda::DeviceRange;

use crate::data;
use crate::data::{LenBytes as _, Source};
use crate::gpu::{Gpu, POISON};
use crate::measure::{Figures, Work, alone};
use crate::report::Report;

pub(crate) const TO_GPU: &str = "pinned host to GPU";

pub(crate) fn measure(report: &mut Report, gpu: &Gpu, source: &Source) -> anyhow::Result<()> {
    let device = gpu.memory(source.bytes())?;
    report.add(TO_GPU, to_gpu(gpu, report.rounds(), source, &device));
    report.add("GPU to pinned host", to_host(gpu, report.rounds(), source));
    Ok(())
}

/// Rounds of one copy of as many bytes as the device memory has, from the start of the host's.
pub(crate) fn rounds_to_gpu<'a, M: HostMemory + Sync>(
    gpu: &'a Gpu,
    host: &Arc<M>,
    device: &DeviceRange,
) -> Work<'a> {
    let (host, device) = (Arc::clone(host), device.clone());
    let all = [Span::first(device.len_bytes())];
    Work::new(device.len_bytes(), move || {
        let (host, device) = (Arc::clone(&host), device.clone());
        let copy = |stream: &Stream| Ok(stream.copy_to_device(host, device, &all)?);
        Ok(gpu.timed(copy, |pending| Ok(pending.wait()?))?.1)
    })
}

fn to_gpu(gpu: &Gpu, rounds: usize, source: &Source, device: &DeviceRange) -> anyhow::Result<Figures> {
    gpu.fill(device, POISON)?;
    let figures = alone(rounds, rounds_to_gpu(gpu, &source.host, device))?;
    gpu.check(device, source.host.bytes())?;
    Ok(figures)
}

fn to_host(gpu: &Gpu, rounds: usize, source: &Source) -> anyhow::Result<Figures> {
    let mut host = gpu.device.pinned(usize::try_from(source.bytes())?)?;
    host.bytes_mut().fill(POISON);
    let mut ready = Some(host);
    let all = [Span::first(source.bytes())];
    let round = || {
        let (host, device) = (ready.take().context("the round before failed")?, source.device.clone());
        let copy = |stream: &Stream| Ok(stream.copy_to_host(device, host, &all)?);
        let ((_, host), took) = gpu.timed(copy, |pending| Ok(pending.wait()?))?;
        ready = Some(host);
        Ok(took)
    };
    let figures = alone(rounds, Work::new(source.bytes(), round))?;
    data::same(ready.context("no round was run")?.bytes(), source.host.bytes())?;
    Ok(figures)
}
