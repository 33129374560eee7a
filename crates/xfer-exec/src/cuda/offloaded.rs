//! Weights that are offloaded to page-locked host memory, for rails that read a GPU's: everything goes through staging slots on the
//! GPU.
//!
//! ```text
//! weights -> slot -> rail                      what is copied, in one piece or in rows
//! weights -> (landing 0, 1) -> slot -> rail    what is gathered from short rows, cast or quantised
//!    stream of copies    stream of kernels
//! ```
//!
//! An event behind each operation says when its slot is full; no thread waits for one. Copies from the host go on for as long as slots
//! are free, beside the rails' WRITEs of those that are full: a push takes as long as the slower of both. That is the host's PCIe
//! slot, 55 GB/s for 5.0 x16, unless a NIC is slower. What goes to several receivers is copied for each. How rows and what is quantised
//! come to the GPU stands at the head of `uploads.rs`.
//!
//! This module must never have the GPU write to a slot of which a rail holds a part, nor give weights back that a copy may still
//! read.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use efa_core::Lease;
use weight_ops::cuda::{DeviceRange, Kernels};
use xfer_plan::Op;

use super::fill::{Fill, Filler};
use super::slots::DeviceSlots;
use super::uploads::{Posted, Uploads};
use super::{CudaError, DeviceRail, GpuMemoryConfig};
use crate::driver::{self, Closed, Closings, Staged, Store};
use crate::engine::{Post, Slot, Source};
use crate::program::Program;
use crate::quant::Quantization;
use crate::rail::RailIndex;
use crate::runner::Memory;

/// How long what a failed call has left on a stream may take to end, before the weights go back: copies that run take a thousandth.
const SETTLE_MAX: Duration = Duration::from_secs(1);

/// See the module.
pub struct OffloadedMemory {
    quantization: Arc<Quantization>,
    filler: Filler,
    uploads: Uploads,
    slots: DeviceSlots,
    /// In the order in which they were begun.
    filling: VecDeque<Filling>,
    /// Whether a call has failed in this push, and may have left something on a stream.
    has_failed: bool,
    closing: Closings,
}

/// A slot that the streams fill.
struct Filling {
    slot: Slot,
    began: Instant,
    posted: Posted,
    /// What is made of what has landed; `None` where it is copied straight into the slot.
    made: Option<Fill>,
}

impl OffloadedMemory {
    /// Allocates staging memory on the GPU of these kernels, and landing places for what `program` makes there. The regions of a push
    /// are page-locked: `LeaseMut::new(device.pinned(bytes)?)`, or registered with CUDA.
    ///
    /// # Errors
    ///
    /// [`CudaError::NotStaged`] for a program that was not bound with [`Program::staged`]; [`CudaError::Transform`] for one that
    /// wants more than casts and quantises floats, or quantises what [`Program::with_quantization`] has not told of; the driver's,
    /// where there is no room.
    pub fn new(kernels: &Kernels, program: &Program, config: GpuMemoryConfig) -> Result<Self, CudaError> {
        if !program.stages_all() {
            return Err(CudaError::NotStaged);
        }
        let device = kernels.device();
        let filler = Filler::new(kernels, program, config.multiprocessors)?;
        Ok(Self {
            quantization: Arc::clone(program.quantization()),
            uploads: Uploads::new(device, program, filler.stream())?,
            filler,
            slots: DeviceSlots::new(device, config.staging_bytes, config.slot_bytes)?,
            filling: VecDeque::new(),
            has_failed: false,
            closing: Closings::new(config.close_max),
        })
    }

    /// What rails read, to be registered with NICs.
    pub fn staging(&self) -> &DeviceRange {
        self.slots.memory()
    }

    /// Puts on the streams what fills a slot.
    fn fill(&mut self, slot: Slot, op: &Op) -> Result<Filling, CudaError> {
        let began = Instant::now();
        let into = self.slots.take(slot, op.bytes())?;
        let made = match self.uploads.straight(op, &into)? {
            true => None,
            false => Some(self.filler.fill_from(op, &mut self.uploads, &into)?),
        };
        Ok(Filling { slot, began, posted: self.uploads.posted()?, made })
    }
}

impl Filling {
    fn is_done(&self) -> Result<bool, gpu_mem::Error> {
        // What is made waits for all that was posted.
        self.made.as_ref().map_or_else(|| self.posted.is_done(), Fill::is_done)
    }
}

impl Memory for OffloadedMemory {
    type Rail = DeviceRail;

    fn buffer(&mut self, post: &Post) -> Option<DeviceRange> {
        match post.source {
            Source::Region(..) => None,
            Source::Slot(slot, offset) => self.slots.slice(slot, offset, post.rows.extent_bytes()?),
        }
    }

    fn stage(&mut self, slot: Slot, _index: u32, op: &Op) -> Result<(), String> {
        let filling = self.fill(slot, op).map_err(|error| {
            self.has_failed = true;
            error.to_string()
        })?;
        self.filling.push_back(filling);
        Ok(())
    }

    fn close(&mut self, number: RailIndex, rail: Box<Self::Rail>) {
        self.closing.begin(number, rail);
    }
}

impl Store for OffloadedMemory {
    type Region = Lease;

    fn slots(&self) -> u32 {
        self.slots.len()
    }

    /// By the CPU, which reads these few blocks where they are.
    fn magnitudes(&mut self, regions: &[Lease]) -> Result<Vec<f32>, String> {
        let outside = || "the plan quantises what is not in this rank's memory".to_owned();
        driver::magnitudes(&self.quantization, regions).ok_or_else(outside)
    }

    fn begin(&mut self, regions: Vec<Lease>, told: &[f32]) -> Result<(), String> {
        let begun = self.uploads.begin(regions).and_then(|()| self.filler.begin(Vec::new(), told));
        begun.map_err(|error| error.to_string())
    }

    fn end(&mut self) -> Vec<Lease> {
        if std::mem::take(&mut self.has_failed) {
            self.uploads.settle(Instant::now() + SETTLE_MAX);
        }
        self.uploads.end()
    }

    fn staged(&mut self) -> Option<Staged> {
        let done = match self.filling.front()?.is_done() {
            Ok(false) => return None,
            Ok(true) => Ok(()),
            Err(error) => Err(CudaError::from(error)),
        };
        let Filling { slot, began, posted, made } = self.filling.pop_front()?;
        let finish = || {
            done?;
            posted.finish()?;
            made.map_or(Ok(()), |made| self.filler.finish(made))
        };
        let result: Result<(), CudaError> = finish();
        self.has_failed |= result.is_err();
        Some(Staged { slot, took: began.elapsed(), result: result.map_err(|error| error.to_string()) })
    }

    fn closed(&mut self) -> Option<(RailIndex, Closed)> {
        self.closing.over()
    }
}
