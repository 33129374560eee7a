//! What slots are filled with, made on a GPU: rows that are gathered, elements that are cast or quantised, and scales.
//!
//! An operation is one kernel for its rows and, where elements change their type, another for these; or one for each
//! rectangle that is quantised. All of it is on one stream, in the order in which it was asked for, and an event behind each
//! operation says when its bytes are there.

use std::num::NonZeroU32;
use std::sync::Arc;

use gpu_mem::{Event, Pending, Stream};
use weight_ops::Dtype;
use weight_ops::cuda::{BoxCopy, CopyBatch, DeviceRange, Kernels, Operation, PendingBatch, Place};
use xfer_plan::{Op, RegionIndex, Transform};

use super::CudaError;
use super::scales::{DeviceScales, Resident, Sources};
use crate::program::Program;
use crate::quant::kernel_dtype;

/// See the module.
pub(super) struct Filler {
    kernels: Kernels,
    multiprocessors: NonZeroU32,
    regions: Vec<DeviceRange>,
    /// Where rows lie between their gather and their cast: one for all, because the stream does one after the other.
    between: DeviceRange,
    idle: Vec<CopyBatch>,
    scales: DeviceScales,
    uploads: Stream,
    stream: Stream,
}

/// An operation that the stream works on.
pub(super) struct Fill {
    rows: Option<PendingBatch>,
    /// What transforms; behind it all is over.
    end: Pending<Vec<Operation>>,
}

impl Fill {
    /// The point behind which its bytes are there.
    pub(super) fn event(&self) -> &Event {
        self.end.event()
    }

    /// Whether they are.
    pub(super) fn is_done(&self) -> Result<bool, gpu_mem::Error> {
        self.end.is_done()
    }
}

impl Filler {
    /// For the operations of a program; gathers keep at most so many multiprocessors busy.
    ///
    /// # Errors
    ///
    /// [`CudaError::Transform`] for a program that wants more than casts and quantises floats, or quantises what
    /// [`Program::with_quantization`] has not told of; the driver's, where there is no room.
    pub(super) fn new(
        kernels: &Kernels,
        program: &Program,
        multiprocessors: NonZeroU32,
    ) -> Result<Self, CudaError> {
        let device = kernels.device();
        let mut between = 0;
        for op in program.ops() {
            if let Some(cast) = Cast::of(op)?
                && !is_contiguous(op)
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
        Ok(Self {
            kernels: kernels.clone(),
            multiprocessors,
            regions: Vec::new(),
            between: DeviceRange::whole(&Arc::new(device.alloc(between)?)),
            idle: Vec::new(),
            scales: DeviceScales::new(kernels, program.quantization())?,
            uploads: device.stream()?,
            stream: device.stream()?,
        })
    }

    /// The magnitudes that this rank reports of these regions.
    pub(super) fn magnitudes(&mut self, regions: &[DeviceRange]) -> Result<Vec<f32>, CudaError> {
        self.scales.magnitudes(regions, &self.stream)
    }

    /// Takes the regions of a push, and what was told of their magnitudes.
    pub(super) fn begin(&mut self, regions: Vec<DeviceRange>, told: &[f32]) -> Result<(), CudaError> {
        self.regions = regions;
        self.scales.begin(told, &self.stream)
    }

    /// Gives them back. What the stream still reads of them it holds.
    pub(super) fn end(&mut self) -> Vec<DeviceRange> {
        std::mem::take(&mut self.regions)
    }

    /// A region of the push.
    pub(super) fn region(&self, region: RegionIndex) -> Result<&DeviceRange, CudaError> {
        self.regions.get(region.index()).ok_or(CudaError::Region { region: region.0 })
    }

    /// On which all is made.
    pub(super) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Nothing that is asked for from now on begins before this point of another stream.
    pub(super) fn wait_for(&self, event: &Event) -> Result<(), CudaError> {
        Ok(self.stream.wait_for(event)?)
    }

    /// Puts on the stream what makes the bytes of an operation, one row after another from the start of `into`.
    pub(super) fn fill(&mut self, op: &Op, into: &DeviceRange) -> Result<Fill, CudaError> {
        let regions = std::mem::take(&mut self.regions);
        let fill = self.fill_from(op, &mut Resident::new(&regions), into);
        self.regions = regions;
        fill
    }

    /// The same of weights that lie elsewhere.
    pub(super) fn fill_from(
        &mut self,
        op: &Op,
        sources: &mut impl Sources,
        into: &DeviceRange,
    ) -> Result<Fill, CudaError> {
        let rows = match op.transform {
            Transform::Quantize { .. } => {
                self.scales.quantize(op, sources, into)?;
                None
            }
            Transform::Scales { .. } => Some(self.store(op, sources, into)?),
            Transform::Copy | Transform::Cast { .. } => self.cast(op, sources, into)?,
        };
        let end = Operation::enqueue_all(sources.rest(), &self.stream).map_err(gpu_mem::Error::from)?;
        Ok(Fill { rows, end })
    }

    /// Takes in an operation that is over, or waits for it.
    pub(super) fn finish(&mut self, fill: Fill) -> Result<(), CudaError> {
        fill.end.wait().map_err(gpu_mem::Error::from)?;
        if let Some(rows) = fill.rows {
            self.idle.push(rows.wait()?);
        }
        Ok(())
    }

    /// Copies scales, one after another.
    fn store(
        &mut self,
        op: &Op,
        sources: &mut impl Sources,
        into: &DeviceRange,
    ) -> Result<PendingBatch, CudaError> {
        let (table, spans) = self.scales.store(op, sources)?;
        // Dropped, it stays parked at the stream for as long as it is used; what it touches is this memory's own.
        drop(Operation::enqueue_all(sources.rest(), &self.stream).map_err(gpu_mem::Error::from)?);
        let mut batch = self.idle.pop().unwrap_or_else(|| self.kernels.batch());
        let regions = [table, into.clone()];
        spans.iter().try_for_each(|span| batch.span(&regions, span))?;
        Ok(batch.enqueue(&self.uploads, &self.stream, self.multiprocessors.get())?)
    }

    /// Copies rows, and casts them where that is wanted: gives what copies.
    fn cast(
        &mut self,
        op: &Op,
        sources: &mut impl Sources,
        into: &DeviceRange,
    ) -> Result<Option<PendingBatch>, CudaError> {
        let (op, source) = sources.rows(op)?;
        let Some(cast) = Cast::of(&op)? else {
            return Ok(Some(self.gather(&op, &source, into)?));
        };
        // Rows without gaps are cast from where they are.
        let (rows, gathered) = match is_contiguous(&op) {
            true => (None, source.part(0..cast.source_bytes(&op))?),
            false => {
                let between = self.between.part(0..cast.source_bytes(&op))?;
                (Some(self.gather(&op, &source, &between)?), between)
            }
        };
        sources.work(self.kernels.cast(cast.from, &gathered, cast.to, into)?);
        Ok(rows)
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
        Ok(batch.enqueue(&self.uploads, &self.stream, self.multiprocessors.get())?)
    }
}

/// Whether the rows of an operation are one behind the other where they are read.
pub(super) fn is_contiguous(op: &Op) -> bool {
    op.rows == 1 || op.source.stride == op.transform.source_bytes(u64::from(op.row_bytes))
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

    fn source_bytes(self, op: &Op) -> u64 {
        op.transform.source_bytes(op.bytes())
    }
}
