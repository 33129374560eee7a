//! One GPU at work: its memory, its kernels, and how long they take by its own clock.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use gpu_mem::{Device, PinnedBuffer, Span, Stream};
use weight_ops::cuda::{DeviceRange, Kernels, Operation};

use crate::data;
use crate::data::LenBytes as _;

/// What memory holds before something writes it that is then looked at.
pub(crate) const POISON: u8 = 0xa5;

pub(crate) struct Gpu {
    pub(crate) device: Device,
    pub(crate) stream: Stream,
    pub(crate) kernels: Kernels,
    /// Where results are brought to be looked at; it grows, and stays, for locking pages takes long.
    landing: Cell<Option<PinnedBuffer>>,
}

impl Gpu {
    pub(crate) fn new(device: &Device) -> anyhow::Result<Self> {
        let kernels = Kernels::new(device)?;
        Ok(Self { device: device.clone(), stream: device.stream()?, kernels, landing: Cell::new(None) })
    }

    pub(crate) fn memory(&self, bytes: u64) -> anyhow::Result<DeviceRange> {
        Ok(DeviceRange::whole(&Arc::new(self.device.alloc(bytes)?)))
    }

    pub(crate) fn upload(&self, host: &Arc<PinnedBuffer>) -> anyhow::Result<DeviceRange> {
        let device = self.memory(host.bytes().len() as u64)?;
        let all = [Span::first(device.len_bytes())];
        self.stream.copy_to_device(Arc::clone(host), device.clone(), &all)?.wait()?;
        Ok(device)
    }

    pub(crate) fn fill(&self, memory: &DeviceRange, value: u8) -> anyhow::Result<()> {
        self.stream.fill(memory.clone(), value)?.wait()?;
        Ok(())
    }

    /// Compares device memory with what it must hold.
    pub(crate) fn check(&self, found: &DeviceRange, expected: &[u8]) -> anyhow::Result<()> {
        let len = usize::try_from(found.len_bytes())?;
        let landing = self.landing.take().filter(|landing| landing.bytes().len() >= len);
        let landing = landing.map_or_else(|| self.device.pinned(len), Ok)?;
        let all = [Span::first(found.len_bytes())];
        let (_, landing) = self.stream.copy_to_host(found.clone(), landing, &all)?.wait()?;
        let checked = data::same(&landing.bytes()[..len], expected);
        self.landing.set(Some(landing));
        checked
    }

    /// Runs an operation once. What it writes held `before` in every byte, and must then be what is expected of it.
    pub(crate) fn checked(
        &self,
        operation: Operation,
        before: u8,
        written: &[(&DeviceRange, &[u8])],
    ) -> anyhow::Result<Operation> {
        written.iter().try_for_each(|(range, _)| self.fill(range, before))?;
        let operation = operation.enqueue(&self.stream)?.wait()?;
        written.iter().try_for_each(|(range, expected)| self.check(range, expected))?;
        Ok(operation)
    }

    /// Times what `start` gives the stream, and waits for it.
    pub(crate) fn timed<P, T>(
        &self,
        start: impl FnOnce(&Stream) -> anyhow::Result<P>,
        wait: impl FnOnce(P) -> anyhow::Result<T>,
    ) -> anyhow::Result<(T, Duration)> {
        let (mut before, mut after) = (self.device.timing_event()?, self.device.timing_event()?);
        before.record(&self.stream)?;
        let pending = start(&self.stream)?;
        after.record(&self.stream)?;
        let done = wait(pending)?;
        after.wait()?;
        Ok((done, after.since(&before)?))
    }

    /// A round of an operation, for as often as it is called.
    pub(crate) fn rounds_of(&self, operation: Operation) -> impl FnMut() -> anyhow::Result<Duration> {
        let mut operation = Some(operation);
        move || {
            let ready = operation.take().context("the round before failed")?;
            let (again, took) =
                self.timed(|stream| Ok(ready.enqueue(stream)?), |pending| Ok(pending.wait()?))?;
            operation = Some(again);
            Ok(took)
        }
    }

    /// A round of CUDA's own copy, on one GPU or between two.
    pub(crate) fn rounds_of_copy<'a>(
        &'a self,
        from: &DeviceRange,
        to: &DeviceRange,
    ) -> impl FnMut() -> anyhow::Result<Duration> + use<'a> {
        let (from, to) = (from.clone(), to.clone());
        let all = [Span::first(from.len_bytes())];
        move || {
            let (from, to) = (from.clone(), to.clone());
            let copy = |stream: &Stream| Ok(stream.copy(from, to, &all)?);
            Ok(self.timed(copy, |pending| Ok(pending.wait()?))?.1)
        }
    }
}
