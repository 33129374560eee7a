//! Weights in page-locked host memory, brought to a GPU as operations want them.
//!
//! What lies in one piece, and rows, are copied by the copy engine straight to where they are to be. What kernels work on first lands
//! in memory that has two places: one is read while the next is filled. Nothing waits but streams for one another's events.
//!
//! # Rows
//!
//! The copy engine fetches rows one after another in a single call. It asks the host for at most 512 bytes at a time, so a row that is
//! shorter costs about as much as one of 512. Where rows begin no further apart than that, all from the first to the last is copied
//! in one piece and gathered on the GPU, whose memory is many times faster than PCIe.
//!
//! # Magnitudes
//!
//! The scales of a matrix need all of its elements, those of the rank, before the first can be quantised. They go through the landing
//! places once for their magnitudes and, as operations want them, once more: two copies at 55 GB/s each, so 27 GB/s, which is as much
//! as one core finds magnitudes at (17 to 27 GB/s), and takes none. What others tell of every block spares the first copy.
//!
//! This module must never have the GPU write to a landing place that a kernel may still read.

use std::sync::Arc;
use std::time::Instant;

use efa_core::Lease;
use gpu_mem::{Device, Pending, Rows, Span, Stream};
use weight_ops::Dtype;
use weight_ops::cuda::{DeviceMatrix, DeviceRange, Operation};
use xfer_plan::{Op, RegionIndex, Strided, Transform};

use super::CudaError;
use super::fill::is_contiguous;
use super::scales::Sources;
use crate::quant::Elements;

/// Places to land in.
const LANDINGS: usize = 2;

/// Bytes of a landing place that elements are quantised from: 0.15 ms over PCIe, long beside what a copy and a kernel cost to begin.
const PART_BYTES: u64 = 8 << 20;

/// What a row costs the copy engine at least, in bytes: one request of PCIe.
const ROW_COST_BYTES: u64 = 512;

/// How many times as long as its rows a landing place may have to be.
const GAPS_MAX: u64 = 8;

/// What was put on the streams for an operation, but for what makes its last bytes.
#[derive(Default)]
pub(super) struct Posted {
    /// Copies, which hold weights.
    uploads: Vec<Pending<(Lease, DeviceRange)>>,
    /// Kernels, which may hold the operation's slot.
    work: Vec<Pending<Vec<Operation>>>,
}

impl Posted {
    /// Whether the copies are over.
    pub(super) fn is_done(&self) -> Result<bool, gpu_mem::Error> {
        self.uploads.last().map_or(Ok(true), Pending::is_done)
    }

    /// Lets go of all of it, or waits until that is possible.
    pub(super) fn finish(self) -> Result<(), CudaError> {
        for upload in self.uploads {
            upload.wait().map_err(gpu_mem::Error::from)?;
        }
        for work in self.work {
            work.wait().map_err(gpu_mem::Error::from)?;
        }
        Ok(())
    }
}

/// See the module.
pub(super) struct Uploads {
    regions: Vec<Lease>,
    landings: Vec<Landing>,
    /// The place that was filled last, if a kernel is still to read it.
    landed: Option<usize>,
    count: usize,
    copies: Stream,
    kernels: Stream,
    /// Behind what was posted and before the next kernel.
    later: Vec<Operation>,
    posted: Posted,
}

struct Landing {
    memory: DeviceRange,
    /// Behind the last kernel that reads it.
    read: Option<Pending<()>>,
}

impl Uploads {
    /// For these operations, whose kernels are on the stream `kernels`.
    pub(super) fn new(device: &Device, ops: &[Op], kernels: &Stream) -> Result<Self, CudaError> {
        let landing_bytes = ops.iter().map(landing_bytes).max().filter(|bytes| *bytes > 0);
        let memory = |bytes| (0..LANDINGS).map(move |_| device.alloc(bytes));
        let landing = |memory| Landing { memory: DeviceRange::whole(&Arc::new(memory)), read: None };
        let landings = landing_bytes.into_iter().flat_map(memory);
        Ok(Self {
            regions: Vec::new(),
            landings: landings.map(|memory| Ok(landing(memory?))).collect::<Result<_, CudaError>>()?,
            landed: None,
            count: 0,
            copies: device.stream()?,
            kernels: kernels.clone(),
            later: Vec::new(),
            posted: Posted::default(),
        })
    }

    /// Takes the weights of a push.
    ///
    /// # Errors
    ///
    /// [`CudaError::NotPageLocked`]; they are taken nevertheless.
    pub(super) fn begin(&mut self, regions: Vec<Lease>) -> Result<(), CudaError> {
        self.regions = regions;
        for (number, region) in (0..).zip(&self.regions) {
            if !self.copies.device().is_page_locked(region)? {
                return Err(CudaError::NotPageLocked { region: number });
            }
        }
        Ok(())
    }

    /// Gives them back.
    pub(super) fn end(&mut self) -> Vec<Lease> {
        std::mem::take(&mut self.regions)
    }

    /// Copies an operation's bytes to where rails read them, if nothing is to be made of them; tells whether it has.
    pub(super) fn straight(&mut self, op: &Op, into: &DeviceRange) -> Result<bool, CudaError> {
        let is_straight = op.transform == Transform::Copy && !comes_whole(op);
        if is_straight {
            self.copy(op.source.region, rows_of(op), into.clone())?;
        }
        Ok(is_straight)
    }

    /// All that reads what has landed for an operation is on the stream of kernels: gives what was posted for it.
    pub(super) fn posted(&mut self) -> Result<Posted, CudaError> {
        self.read()?;
        Ok(std::mem::take(&mut self.posted))
    }

    /// Waits until what was left behind by calls that failed holds neither weights nor slots any more; or for so long.
    pub(super) fn settle(&mut self, until: Instant) {
        self.posted = Posted::default();
        self.later.clear();
        for stream in [&self.copies, &self.kernels] {
            match stream.synchronize_until(until) {
                // A call of the stream lets go of what is done.
                Ok(true) => drop(stream.hold(())),
                Ok(false) => tracing::error!("the GPU still works on a push that has failed"),
                Err(error) => tracing::error!(%error, "the GPU of a push that has failed"),
            }
        }
    }

    /// Posts a copy of rows, one after another.
    fn copy(&mut self, region: RegionIndex, rows: Rows, into: DeviceRange) -> Result<(), CudaError> {
        let lease = self.regions.get(region.index()).ok_or(CudaError::Region { region: region.0 })?;
        let lease = lease.clone();
        let posted = match rows.count {
            1 => {
                let span = Span { from: rows.from, to: 0, len: rows.bytes };
                self.copies.copy_to_device(lease, into, &[span])
            }
            _ => self.copies.copy_rows_to_device(lease, into, rows),
        };
        self.posted.uploads.push(posted.map_err(gpu_mem::Error::from)?);
        Ok(())
    }

    /// Has rows land where the next kernel reads them.
    fn land(&mut self, region: RegionIndex, rows: Rows) -> Result<DeviceRange, CudaError> {
        let place = self.count.checked_rem(self.landings.len()).unwrap_or(0);
        let missing = CudaError::NotStaged;
        let landing = self.landings.get(place).ok_or(missing)?;
        let memory = landing.memory.part(0..rows.count.saturating_mul(rows.bytes))?;
        if let Some(read) = &landing.read {
            self.copies.wait_for(read.event())?;
        }
        self.copy(region, rows, memory.clone())?;
        if let Some(posted) = self.posted.uploads.last() {
            self.kernels.wait_for(posted.event())?;
        }
        (self.landed, self.count) = (Some(place), self.count.wrapping_add(1));
        Ok(memory)
    }

    /// Whatever reads what landed last is on the stream of kernels.
    fn read(&mut self) -> Result<(), CudaError> {
        if let Some(landing) = self.landed.take().and_then(|place| self.landings.get_mut(place)) {
            landing.read = Some(self.kernels.hold(()).map_err(gpu_mem::Error::from)?);
        }
        Ok(())
    }
}

impl Sources for Uploads {
    fn rows(&mut self, op: &Op) -> Result<(Op, DeviceRange), CudaError> {
        let rows = rows_of(op);
        let (rows, stride) = match comes_whole(op) {
            true => {
                let bytes = (rows.count - 1).saturating_mul(rows.stride).saturating_add(rows.bytes);
                (Rows { count: 1, bytes, ..rows }, op.source.stride)
            }
            false => (rows, op.transform.source_bytes(op.row_bytes.into())),
        };
        let memory = self.land(op.source.region, rows)?;
        let source = Strided { region: RegionIndex(0), offset: 0, stride };
        Ok((Op { source, ..*op }, memory))
    }

    fn work_on(
        &mut self,
        elements: &Elements,
        dtype: Dtype,
        make: &mut dyn FnMut(&Elements, &DeviceMatrix) -> Result<Operation, CudaError>,
    ) -> Result<(), CudaError> {
        let Elements { origin, shape: [rows, columns], region, offset, stride } = *elements;
        let width = dtype.bytes();
        let room = self.landings.first().map_or(0, |landing| gpu_mem::DeviceMemory::len(&landing.memory));
        let room = (usize::try_from(room).unwrap_or(usize::MAX) / width).max(1);
        let across = columns.clamp(1, room);
        let down = (room / across).max(1);
        for row in (0..rows).step_by(down) {
            for column in (0..columns).step_by(across) {
                let shape = [down.min(rows - row), across.min(columns - column)];
                let start = (row * stride + column) * width;
                let offset = offset.saturating_add(start as u64);
                let [count, bytes, stride] = [shape[0], shape[1] * width, stride * width].map(|n| n as u64);
                let landed = self.land(region, joined(Rows { from: offset, to: 0, count, bytes, stride }))?;
                let part =
                    Elements { origin: [origin[0] + row, origin[1] + column], shape, offset, ..*elements };
                let matrix = DeviceMatrix::new(&landed, dtype, shape, shape[1])?;
                self.later.push(make(&part, &matrix)?);
                let work = Operation::enqueue_all(self.rest(), &self.kernels);
                self.posted.work.push(work.map_err(gpu_mem::Error::from)?);
                self.read()?;
            }
        }
        Ok(())
    }

    fn work(&mut self, operation: Operation) {
        self.later.push(operation);
    }

    fn rest(&mut self) -> Vec<Operation> {
        std::mem::take(&mut self.later)
    }
}

/// The rows that an operation reads; those without gaps are one.
fn rows_of(op: &Op) -> Rows {
    let bytes = op.transform.source_bytes(op.row_bytes.into());
    joined(Rows {
        from: op.source.offset,
        to: 0,
        count: op.rows.into(),
        bytes,
        stride: if is_contiguous(op) { bytes } else { op.source.stride },
    })
}

fn joined(rows: Rows) -> Rows {
    let all = rows.count.saturating_mul(rows.bytes);
    let are_one = rows.count > 1 && rows.stride == rows.bytes;
    if are_one { Rows { count: 1, bytes: all, stride: all, ..rows } } else { rows }
}

/// Whether rows are copied with what is between them.
fn comes_whole(op: &Op) -> bool {
    let Rows { count, bytes, stride, .. } = rows_of(op);
    // Rows that overlap are no rows to the copy engine.
    let is_short = stride <= ROW_COST_BYTES && stride <= bytes.saturating_mul(GAPS_MAX);
    count > 1 && (stride < bytes || is_short)
}

/// What an operation needs of a landing place.
fn landing_bytes(op: &Op) -> u64 {
    let Rows { count, bytes, stride, .. } = rows_of(op);
    match op.transform {
        Transform::Quantize { .. } | Transform::Scales { .. } => PART_BYTES,
        _ if comes_whole(op) => (count - 1).saturating_mul(stride).saturating_add(bytes),
        Transform::Cast { .. } => count.saturating_mul(bytes),
        Transform::Copy => 0,
    }
}
