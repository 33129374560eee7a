//! Device memory as the runner sees it: the regions of the push, and staging slots that a stream of the GPU fills.
//!
//! A slot is filled by one kernel for its rows and, where elements change their type, another for these; or by one for each
//! rectangle that is quantised. The stream works in the
//! order in which slots were asked for, and an event behind each says when it is full. A slot is never filled again while
//! anybody holds a part of it.

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gpu_mem::{DeviceMemory, Pending, Stream};
use weight_ops::Dtype;
use weight_ops::cuda::{BoxCopy, CopyBatch, DeviceRange, Kernels, Operation, PendingBatch, Place};
use xfer_plan::{Op, Transform};

use super::scales::DeviceScales;
use super::{Arrivals, CudaError};
use crate::driver::{Closed, Closings, Staged, Store};
use crate::engine::{Post, Slot, Source};
use crate::program::Program;
use crate::quant::kernel_dtype;
use crate::rail::{Rail, RailIndex};
use crate::runner::Memory;

/// Staging slots at most, as of host memory.
const SLOTS_MAX: u64 = 1024;

/// Where allocations of CUDA begin, too.
const SLOT_ALIGN_BYTES: u64 = 256;

/// A rail from device memory.
pub type DeviceRail = dyn Rail<Buffer = DeviceRange> + Send;

/// What a rank's device memory is made of.
#[derive(Debug, Clone, Copy)]
pub struct GpuMemoryConfig {
    /// Bytes of all staging slots together.
    pub staging_bytes: u64,
    /// Bytes of a staging slot: the plan's longest gather or transform; 0 where it has none.
    pub slot_bytes: u64,
    /// How many of the GPU's multiprocessors may be kept busy by gathers. Casts take as many as there are for a moment.
    pub multiprocessors: NonZeroU32,
    /// How long a rail may take to close.
    pub close_max: Duration,
}

/// See the module.
pub struct GpuMemory {
    kernels: Kernels,
    multiprocessors: NonZeroU32,
    regions: Vec<DeviceRange>,
    /// All slots, one behind the other: one memory to register with a NIC.
    staging: DeviceRange,
    slots: Vec<Arc<DeviceRange>>,
    /// Where rows lie between their gather and their cast: one for all, because the stream does one after the other.
    between: DeviceRange,
    /// In the order in which they were begun.
    filling: VecDeque<Filling>,
    idle: Vec<CopyBatch>,
    scales: DeviceScales,
    arrivals: Option<Arrivals>,
    closing: Closings,
    uploads: Stream,
    fills: Stream,
}

/// A slot that the stream fills.
struct Filling {
    slot: Slot,
    began: Instant,
    rows: Option<PendingBatch>,
    /// What transforms; behind it all is over.
    end: Pending<Vec<Operation>>,
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
        let device = kernels.device();
        let mut between = 0;
        for op in program.ops() {
            if let Some(cast) = Cast::of(op)?
                && !cast.is_contiguous(op)
            {
                between = between.max(cast.source_bytes(op));
            }
            let quantization = program.quantization();
            let is_held = match op.transform {
                Transform::Quantize { .. } => quantization.rects(op).is_some(),
                Transform::Scales { .. } => quantization.runs(op).is_some(),
                Transform::Copy | Transform::Cast { .. } => true,
            };
            if !is_held {
                return Err(CudaError::Transform { transform: op.transform });
            }
        }
        // Slots begin where kernels read and write fastest.
        let apart = config.slot_bytes.next_multiple_of(SLOT_ALIGN_BYTES);
        let slots = config.staging_bytes.checked_div(apart).unwrap_or(0).min(SLOTS_MAX);
        let slots = slots.max(u64::from(config.slot_bytes > 0 && config.staging_bytes >= config.slot_bytes));
        let staging = DeviceRange::whole(&Arc::new(device.alloc(slots * apart)?));
        let slot = |slot| Ok(Arc::new(staging.part(slot * apart..slot * apart + config.slot_bytes)?));
        Ok(Self {
            kernels: kernels.clone(),
            multiprocessors: config.multiprocessors,
            regions: Vec::new(),
            slots: (0..slots).map(slot).collect::<Result<_, CudaError>>()?,
            staging,
            between: DeviceRange::whole(&Arc::new(device.alloc(between)?)),
            filling: VecDeque::new(),
            idle: Vec::new(),
            scales: DeviceScales::new(kernels, program.quantization())?,
            arrivals,
            closing: Closings::new(config.close_max),
            uploads: device.stream()?,
            fills: device.stream()?,
        })
    }

    /// What rails read beside the regions, to be registered with NICs; empty where nothing is staged.
    pub fn staging(&self) -> &DeviceRange {
        &self.staging
    }

    /// Puts on the stream what fills a slot.
    fn fill(&mut self, slot: Slot, op: &Op) -> Result<Filling, CudaError> {
        let began = Instant::now();
        let into = self.slots.get(slot.0 as usize).filter(|slot| Arc::strong_count(slot) == 1);
        let into = into.ok_or(CudaError::Slot { slot: slot.0 })?;
        let into = DeviceRange::new(into, 0..op.bytes())?;
        let (rows, work) = match op.transform {
            Transform::Quantize { .. } => (None, self.scales.quantize(op, &self.regions, &into)?),
            Transform::Scales { .. } => self.store(op, &into)?,
            Transform::Copy | Transform::Cast { .. } => self.cast(op, &into)?,
        };
        let end = Operation::enqueue_all(work, &self.fills).map_err(gpu_mem::Error::from)?;
        Ok(Filling { slot, began, rows, end })
    }

    /// Copies scales, one after another. All is on the stream afterwards.
    fn store(
        &mut self,
        op: &Op,
        into: &DeviceRange,
    ) -> Result<(Option<PendingBatch>, Vec<Operation>), CudaError> {
        let (work, table, spans) = self.scales.store(op, &self.regions)?;
        // Dropped, it stays parked at the stream for as long as it is used; what it touches is this memory's own.
        drop(Operation::enqueue_all(work, &self.fills).map_err(gpu_mem::Error::from)?);
        let mut batch = self.idle.pop().unwrap_or_else(|| self.kernels.batch());
        let regions = [table, into.clone()];
        spans.iter().try_for_each(|span| batch.span(&regions, span))?;
        let rows = batch.enqueue(&self.uploads, &self.fills, self.multiprocessors.get())?;
        Ok((Some(rows), Vec::new()))
    }

    /// Copies rows, and casts them where that is wanted: gives what is on the stream, and what is to be put there.
    fn cast(
        &mut self,
        op: &Op,
        into: &DeviceRange,
    ) -> Result<(Option<PendingBatch>, Vec<Operation>), CudaError> {
        let region = self.regions.get(op.source.region.index());
        let source = region.ok_or(CudaError::Region { region: op.source.region.0 })?;
        let source = source.part(op.source.offset..source.len())?;
        let Some(cast) = Cast::of(op)? else {
            return Ok((Some(self.gather(op, &source, into)?), Vec::new()));
        };
        // Rows without gaps are cast from where they are.
        let (rows, gathered) = match cast.is_contiguous(op) {
            true => (None, source.part(0..cast.source_bytes(op))?),
            false => {
                let between = self.between.part(0..cast.source_bytes(op))?;
                (Some(self.gather(op, &source, &between)?), between)
            }
        };
        let operation = self.kernels.cast(cast.from, &gathered, cast.to, into)?;
        Ok((rows, vec![operation]))
    }

    /// Copies the rows of an operation from the start of `source` on, one after another.
    fn gather(
        &mut self,
        op: &Op,
        source: &DeviceRange,
        into: &DeviceRange,
    ) -> Result<PendingBatch, CudaError> {
        let row_bytes = op.transform.source_bytes(u64::from(op.row_bytes));
        let [from, to] = [0, 1].map(|region| Place { region, offset: 0 });
        let copy = BoxCopy {
            source: from,
            destination: to,
            row_bytes,
            counts: [1, 1, op.rows],
            source_strides: [0, 0, op.source.stride],
            destination_strides: [0, 0, row_bytes],
        };
        let mut batch = self.idle.pop().unwrap_or_else(|| self.kernels.batch());
        batch.rows(&[source.clone(), into.clone()], &copy)?;
        Ok(batch.enqueue(&self.uploads, &self.fills, self.multiprocessors.get())?)
    }
}

/// A change of elements' type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cast {
    from: Dtype,
    to: Dtype,
}

impl Cast {
    /// What an operation wants; `None` where it casts nothing.
    fn of(op: &Op) -> Result<Option<Self>, CudaError> {
        let refused = || CudaError::Transform { transform: op.transform };
        match op.transform {
            Transform::Cast { from, to } => {
                let (from, to) = kernel_dtype(from).zip(kernel_dtype(to)).ok_or_else(refused)?;
                Ok(Some(Self { from, to }))
            }
            Transform::Copy | Transform::Quantize { .. } | Transform::Scales { .. } => Ok(None),
        }
    }

    fn is_contiguous(self, op: &Op) -> bool {
        op.rows == 1 || op.source.stride == op.transform.source_bytes(u64::from(op.row_bytes))
    }

    fn source_bytes(self, op: &Op) -> u64 {
        op.transform.source_bytes(op.bytes())
    }
}

impl Memory for GpuMemory {
    type Rail = DeviceRail;

    fn buffer(&mut self, post: &Post) -> Option<DeviceRange> {
        let bytes = post.rows.extent_bytes()?;
        match post.source {
            Source::Region(region, offset) => {
                self.regions.get(region.index())?.part(offset..offset.checked_add(bytes)?).ok()
            }
            Source::Slot(slot, offset) => {
                DeviceRange::new(self.slots.get(slot.0 as usize)?, offset..offset.checked_add(bytes)?).ok()
            }
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
    fn slots(&self) -> u32 {
        self.slots.len() as u32
    }

    fn magnitudes(&mut self, regions: &[DeviceRange]) -> Result<Vec<f32>, String> {
        self.scales.magnitudes(regions, &self.fills).map_err(|error| error.to_string())
    }

    fn begin(&mut self, regions: Vec<DeviceRange>, told: &[f32]) -> Result<(), String> {
        self.regions = regions;
        // Nobody writes to a rank that passes on before it has begun: what was told by now is of a push that was given up.
        let mut stale = Vec::new();
        if let Err(error) = self.arrived(&mut stale) {
            tracing::warn!(error, "what has arrived before the push");
        }
        self.scales.begin(told, &self.fills).map_err(|error| error.to_string())
    }

    fn end(&mut self) -> Vec<DeviceRange> {
        std::mem::take(&mut self.regions)
    }

    fn staged(&mut self) -> Option<Staged> {
        let done = match self.filling.front()?.end.is_done() {
            Ok(false) => return None,
            Ok(true) => Ok(()),
            Err(error) => Err(error.to_string()),
        };
        let Filling { slot, began, rows, end } = self.filling.pop_front()?;
        let result = done.and_then(|()| {
            end.wait().map_err(|error| error.to_string())?;
            if let Some(rows) = rows {
                self.idle.push(rows.wait().map_err(|error| error.to_string())?);
            }
            Ok(())
        });
        Some(Staged { slot, took: began.elapsed(), result })
    }

    fn closed(&mut self) -> Option<(RailIndex, Closed)> {
        self.closing.over()
    }

    fn arrived(&mut self, tags: &mut Vec<u32>) -> Result<(), String> {
        let Some(arrivals) = &mut self.arrivals else { return Ok(()) };
        arrivals.poll(tags).map_err(|error| error.to_string())
    }
}
