//! Weights in GPU memory for rails that read host memory: everything goes through page-locked staging slots.
//!
//! What lies in one piece is copied from the weights into its slot by the GPU's copy engine. What is gathered, cast or quantised is
//! made on the GPU first, in scratch memory. That has two places, so that one operation is made while the one before is copied:
//!
//! ```text
//! weights -> (scratch 0, 1) -> slot -> rail
//!      stream of kernels   stream of copies
//! ```
//!
//! An event behind each copy says when its slot is full; no thread waits for one. Copies go on for as long as slots are free, beside
//! the rails' WRITEs of those that are full, so a push takes as long as the slower of both: one PCIe 5.0 x16 slot copies 55 GB/s,
//! more than any rail that this is for. What goes to several receivers is copied for each.
//!
//! This module must never have the GPU write to a slot of which a rail holds a part.

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use efa_core::{Lease, LeaseMut};
use gpu_mem::{Pending, Span, Stream};
use weight_ops::cuda::{DeviceRange, Kernels};
use xfer_plan::{Op, Transform};

use super::CudaError;
use super::fill::{Fill, Filler, is_contiguous};
use crate::driver::{Closed, Closings, HostSlots, Staged, Store};
use crate::engine::{Post, Slot, Source};
use crate::program::Program;
use crate::rail::{Rail, RailIndex};
use crate::runner::Memory;

/// Places in scratch memory: one is filled while the other is copied.
const SCRATCHES: usize = 2;

/// What a rank's staged memory is made of.
#[derive(Debug, Clone, Copy)]
pub struct StagedMemoryConfig {
    /// Bytes of a staging slot. The program was bound with as many.
    pub slot_bytes: u64,
    /// How many of the GPU's multiprocessors may be kept busy by gathers. Casts take as many as there are for a moment.
    pub multiprocessors: NonZeroU32,
    /// How long a rail may take to close.
    pub close_max: Duration,
}

/// See the module.
pub struct StagedMemory {
    filler: Filler,
    /// Empty where nothing is made on the GPU first.
    scratch: Vec<DeviceRange>,
    /// How many operations were made there.
    made: usize,
    slots: HostSlots,
    /// In the order in which they were begun.
    filling: VecDeque<Filling>,
    closing: Closings,
    copies: Stream,
}

/// A slot that the streams fill.
struct Filling {
    slot: Slot,
    began: Instant,
    made: Option<Made>,
    copy: Pending<(DeviceRange, LeaseMut)>,
}

/// What was made in scratch memory.
struct Made {
    /// Where.
    scratch: usize,
    fill: Fill,
}

impl StagedMemory {
    /// Cuts `staging` into slots; its length is the memory watermark. It is page-locked memory
    /// (`LeaseMut::new(device.pinned(bytes)?)`), for copies into any other hold up the thread of the rails. Rails that register
    /// memory register this, and not the weights.
    ///
    /// # Errors
    ///
    /// [`CudaError::NotStaged`] for a program that was not bound with [`Program::staged`]; [`CudaError::Transform`] for one that
    /// wants more than casts and quantises floats, or quantises what [`Program::with_quantization`] has not told of; the driver's,
    /// where there is no room.
    pub fn new(
        kernels: &Kernels,
        program: &Program,
        staging: LeaseMut,
        config: StagedMemoryConfig,
    ) -> Result<Self, CudaError> {
        if !program.stages_all() {
            return Err(CudaError::NotStaged);
        }
        let device = kernels.device();
        let made = program.ops().iter().filter(|op| !is_copied(op));
        let scratch_bytes = made.map(Op::bytes).max();
        let scratch = |bytes| (0..SCRATCHES).map(move |_| device.alloc(bytes));
        let scratch = scratch_bytes.into_iter().flat_map(scratch);
        Ok(Self {
            filler: Filler::new(kernels, program, config.multiprocessors)?,
            scratch: scratch
                .map(|made| Ok(DeviceRange::whole(&Arc::new(made?))))
                .collect::<Result<_, CudaError>>()?,
            made: 0,
            slots: HostSlots::new(staging, config.slot_bytes),
            filling: VecDeque::new(),
            closing: Closings::new(config.close_max),
            copies: device.stream()?,
        })
    }

    /// Puts on the streams what fills a slot.
    fn fill(&mut self, slot: Slot, op: &Op) -> Result<Filling, CudaError> {
        let began = Instant::now();
        let into = self.slots.take(slot).ok_or(CudaError::Slot { slot: slot.0 })?;
        let (from, made) = match self.source(op) {
            Ok(source) => source,
            Err(error) => {
                self.slots.give_back(slot, into);
                return Err(error);
            }
        };
        match self.copies.copy_to_host(from, into, &[Span::first(op.bytes())]) {
            Ok(copy) => Ok(Filling { slot, began, made, copy }),
            Err(failed) => {
                // Unless the GPU may still write it.
                if let Some((_, into)) = failed.returned {
                    self.slots.give_back(slot, into);
                }
                Err(failed.error.into())
            }
        }
    }

    /// From where the bytes of an operation are copied: what comes next on the stream of copies finds them there.
    fn source(&mut self, op: &Op) -> Result<(DeviceRange, Option<Made>), CudaError> {
        if is_copied(op) {
            let (region, offset) = (self.filler.region(op.source.region)?, op.source.offset);
            return Ok((region.part(offset..offset.saturating_add(op.bytes()))?, None));
        }
        let scratch = self.made.checked_rem(self.scratch.len()).unwrap_or(0);
        let missing = || CudaError::Transform { transform: op.transform };
        let into = self.scratch.get(scratch).ok_or_else(missing)?.part(0..op.bytes())?;
        // What was there before may still be on its way into a slot.
        let is_there = |filling: &&Filling| filling.made.as_ref().is_some_and(|made| made.scratch == scratch);
        if let Some(before) = self.filling.iter().rev().find(is_there) {
            self.filler.wait_for(before.copy.event())?;
        }
        let fill = self.filler.fill(op, &into)?;
        self.copies.wait_for(fill.event())?;
        self.made = self.made.wrapping_add(1);
        Ok((into, Some(Made { scratch, fill })))
    }
}

/// Whether an operation's bytes can be copied from where they are.
fn is_copied(op: &Op) -> bool {
    op.transform == Transform::Copy && is_contiguous(op)
}

impl Memory for StagedMemory {
    type Rail = dyn Rail<Buffer = Lease> + Send;

    fn buffer(&mut self, post: &Post) -> Option<Lease> {
        let bytes = usize::try_from(post.rows.extent_bytes()?).ok()?;
        match post.source {
            Source::Region(..) => None,
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

impl Store for StagedMemory {
    type Region = DeviceRange;

    fn slots(&self) -> u32 {
        self.slots.len()
    }

    fn magnitudes(&mut self, regions: &[DeviceRange]) -> Result<Vec<f32>, String> {
        self.filler.magnitudes(regions).map_err(|error| error.to_string())
    }

    fn begin(&mut self, regions: Vec<DeviceRange>, told: &[f32]) -> Result<(), String> {
        self.filler.begin(regions, told).map_err(|error| error.to_string())
    }

    fn end(&mut self) -> Vec<DeviceRange> {
        self.filler.end()
    }

    fn staged(&mut self) -> Option<Staged> {
        let done = match self.filling.front()?.copy.is_done() {
            Ok(false) => return None,
            Ok(true) => Ok(()),
            Err(error) => Err(CudaError::from(error)),
        };
        let Filling { slot, began, made, copy } = self.filling.pop_front()?;
        let finish = || {
            done?;
            let (_, full) = copy.wait().map_err(gpu_mem::Error::from)?;
            self.slots.give_back(slot, full);
            // The copy waited for it.
            made.map_or(Ok(()), |made| self.filler.finish(made.fill))
        };
        let result = finish().map_err(|error: CudaError| error.to_string());
        Some(Staged { slot, took: began.elapsed(), result })
    }

    fn closed(&mut self) -> Option<(RailIndex, Closed)> {
        self.closing.over()
    }
}
