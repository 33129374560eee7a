//! Device memory as the runner sees it: the regions of the push, and staging slots that a stream of the GPU fills.
//!
//! The stream works in the order in which slots were asked for. A slot is never filled again while anybody holds a part of it.

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use gpu_mem::{Device, Observer};
use weight_ops::cuda::{DeviceRange, Kernels};
use xfer_plan::Op;

use super::CudaError;
use super::fill::{Fill, Filler};
use super::slots::DeviceSlots;
use crate::arrivals::Arrivals;
use crate::driver::{Closed, Closings, Staged, Store};
use crate::engine::{Post, Slot, Source};
use crate::program::Program;
use crate::rail::{Rail, RailIndex};
use crate::runner::Memory;

/// A rail from device memory.
pub type DeviceRail = dyn Rail<Buffer = DeviceRange> + Send;

/// What a rank's device memory is made of.
#[derive(Debug, Clone, Copy)]
pub struct GpuMemoryConfig {
    /// Bytes of all staging slots together.
    pub staging_bytes: u64,
    /// Bytes of a staging slot: the plan's longest gather or transform; 0 where it has none. Where everything is staged, what the
    /// program was bound with.
    pub slot_bytes: u64,
    /// How many of the GPU's multiprocessors may be kept busy by gathers. Casts take as many as there are for a moment.
    pub multiprocessors: NonZeroU32,
    /// How long a rail may take to close.
    pub close_max: Duration,
}

/// See the module.
pub struct GpuMemory {
    device: Device,
    filler: Filler,
    slots: DeviceSlots,
    /// In the order in which they were begun.
    filling: VecDeque<Filling>,
    arrivals: Option<Arrivals>,
    closing: Closings,
}

/// A slot that the stream fills.
struct Filling {
    slot: Slot,
    began: Instant,
    fill: Fill,
}

impl GpuMemory {
    /// Allocates what `program` needs of staging memory. What arrives at a rank that passes on comes from `arrivals`.
    ///
    /// # Errors
    ///
    /// [`CudaError::Transform`] for a program that wants more than casts and quantises floats, or quantises what
    /// [`Program::with_quantization`] has not told of; the driver's, where there is no room.
    pub fn new(
        kernels: &Kernels,
        program: &Program,
        config: GpuMemoryConfig,
        arrivals: Option<Arrivals>,
    ) -> Result<Self, CudaError> {
        let filler = Filler::new(kernels, program, config.multiprocessors)?;
        Ok(Self {
            device: kernels.device().clone(),
            filler,
            slots: DeviceSlots::new(kernels.device(), config.staging_bytes, config.slot_bytes)?,
            filling: VecDeque::new(),
            arrivals,
            closing: Closings::new(config.close_max),
        })
    }

    /// What rails read beside the regions, to be registered with NICs; empty where nothing is staged.
    pub fn staging(&self) -> &DeviceRange {
        self.slots.memory()
    }

    /// Puts on the stream what fills a slot.
    fn fill(&mut self, slot: Slot, op: &Op) -> Result<Filling, CudaError> {
        let began = Instant::now();
        let into = self.slots.take(slot, op.bytes())?;
        Ok(Filling { slot, began, fill: self.filler.fill(op, &into)? })
    }
}

impl Memory for GpuMemory {
    type Rail = DeviceRail;

    fn buffer(&mut self, post: &Post) -> Option<DeviceRange> {
        let bytes = post.rows.extent_bytes()?;
        match post.source {
            Source::Region(region, offset) => {
                self.filler.region(region).ok()?.part(offset..offset.checked_add(bytes)?).ok()
            }
            Source::Slot(slot, offset) => self.slots.slice(slot, offset, bytes),
        }
    }

    fn stage(&mut self, slot: Slot, _index: u32, op: &Op) -> Result<(), String> {
        let filling = self.fill(slot, op).map_err(|error| error.to_string())?;
        self.filling.push_back(filling);
        Ok(())
    }

    fn close(&mut self, number: RailIndex, rail: Box<Self::Rail>) {
        self.closing.begin(number, rail);
    }
}

impl Store for GpuMemory {
    type Region = DeviceRange;

    fn slots(&self) -> u32 {
        self.slots.len()
    }

    fn magnitudes(&mut self, regions: &[DeviceRange]) -> Result<Vec<f32>, String> {
        self.filler.magnitudes(regions).map_err(|error| error.to_string())
    }

    fn begin(&mut self, regions: Vec<DeviceRange>, told: &[f32]) -> Result<(), String> {
        if let Some(arrivals) = &mut self.arrivals {
            arrivals.forget().map_err(|error| error.to_string())?;
        }
        self.filler.begin(regions, told).map_err(|error| error.to_string())
    }

    fn end(&mut self) -> Vec<DeviceRange> {
        self.filler.end()
    }

    fn staged(&mut self) -> Option<Staged> {
        let done = match self.filling.front()?.fill.is_done() {
            Ok(false) => return None,
            Ok(true) => Ok(()),
            Err(error) => Err(CudaError::from(error)),
        };
        let Filling { slot, began, fill } = self.filling.pop_front()?;
        let result = done.and_then(|()| self.filler.finish(fill)).map_err(|error| error.to_string());
        Some(Staged { slot, took: began.elapsed(), result })
    }

    fn closed(&mut self) -> Option<(RailIndex, Closed)> {
        self.closing.over()
    }

    fn arrived(&mut self, tags: &mut Vec<u32>) -> Result<(), String> {
        let Some(arrivals) = &mut self.arrivals else { return Ok(()) };
        let over_nics = arrivals.poll(tags).map_err(|error| error.to_string())?;
        if over_nics {
            let flushed = self.device.flush_rdma_writes(Observer::Owner);
            flushed.map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    fn forget_arrivals(&mut self) {
        // What cannot be read then cannot when the next push begins.
        let _ = self.arrivals.as_mut().map(Arrivals::forget);
    }
}
