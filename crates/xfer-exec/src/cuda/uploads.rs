//! Weights in page-locked host memory, brought to a GPU as operations want them.
//!
//! What lies in one piece, and rows, are copied by the copy engine straight to where they are to be. What kernels work on first lands
//! in memory that has two places: one is read while the next is filled. Nothing waits but streams for one another's events.
//!
//! # Rows
//!
//! The copy engine fetches rows one after another in a single call. Over PCIe a read brings 512 bytes at most on usual hosts, so a row
//! that is shorter is taken to cost as much as one of 512; that has not been measured. Where rows begin no further apart, all from the
//! first to the last is copied in one piece and gathered on the GPU, whose memory is many times faster than PCIe.
//!
//! # Magnitudes
//!
//! The scales of a matrix need all of its elements, those of the rank, before the first can be quantised. They land once for their
//! magnitudes, and what is still there is quantised from there: a landing place has room for a matrix, and operations on a matrix mostly
//! follow one another. What is not there any more, because others were wanted meanwhile, lands a second time. Even then elements come at
//! 27 GB/s, half of what PCIe 5.0 copies, which is as much as one core finds magnitudes at (17 to 27 GB/s), and takes none. What others
//! tell of every block needs no magnitudes.
//!
//! This module must never have the GPU write to a landing place that a kernel may still read.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use efa_core::Lease;
use gpu_mem::{Device, DeviceMemory as _, Pending, Rows, Span, Stream};
use weight_ops::Dtype;
use weight_ops::cuda::{DeviceMatrix, DeviceRange, Operation};
use xfer_plan::{Op, RegionIndex, Strided, Transform};

use super::CudaError;
use super::fill::is_contiguous;
use super::scales::Sources;
use crate::program::Program;
use crate::quant::{Elements, Matrix, Quantization};

/// Places to land in.
const LANDINGS: usize = 2;

/// The longest landing place for elements that are quantised, in bytes. A projection of Qwen3-8B has 96 MiB in BF16; longer ones land in
/// parts.
const MATRIX_BYTES_MAX: u64 = 128 << 20;

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
    /// Elements that are there, one row behind the other, until something else lands.
    holds: Option<(Elements, Dtype)>,
    /// Behind the last kernel that reads it.
    read: Option<Pending<()>>,
}

impl Uploads {
    /// For these operations, whose kernels are on the stream `kernels`.
    pub(super) fn new(device: &Device, program: &Program, kernels: &Stream) -> Result<Self, CudaError> {
        let matrix_bytes = matrix_bytes(program.quantization()).min(MATRIX_BYTES_MAX);
        let landing_bytes = program.ops().iter().map(landing_bytes).chain([matrix_bytes]);
        let landing_bytes = landing_bytes.max().filter(|bytes| *bytes > 0);
        let memory = |bytes| (0..LANDINGS).map(move |_| device.alloc(bytes));
        let landing =
            |memory| Landing { memory: DeviceRange::whole(&Arc::new(memory)), holds: None, read: None };
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
        // They may have changed since.
        self.landings.iter_mut().for_each(|landing| landing.holds = None);
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
        let landing = self.landings.get_mut(place).ok_or(missing)?;
        landing.holds = None;
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

    /// Has elements land, and remembers that they are there.
    fn land_elements(&mut self, elements: &Elements, dtype: Dtype) -> Result<DeviceMatrix, CudaError> {
        let Elements { shape, region, offset, stride, .. } = *elements;
        let [count, bytes, stride] = [shape[0], shape[1] * dtype.bytes(), stride * dtype.bytes()];
        let [count, bytes, stride] = [count, bytes, stride].map(|number| number as u64);
        let landed = self.land(region, joined(Rows { from: offset, to: 0, count, bytes, stride }))?;
        if let Some(landing) = self.landed.and_then(|place| self.landings.get_mut(place)) {
            landing.holds = Some((*elements, dtype));
        }
        Ok(DeviceMatrix::new(&landed, dtype, shape, shape[1])?)
    }

    /// Elements that are there already.
    fn landed(&mut self, elements: &Elements, dtype: Dtype) -> Result<Option<DeviceMatrix>, CudaError> {
        let has = |landing: &Landing| {
            let (held, of) = landing.holds?;
            (of == dtype).then(|| bytes_within(&held, elements, dtype.bytes() as u64))?
        };
        let found = self
            .landings
            .iter()
            .enumerate()
            .find_map(|(place, landing)| Some((place, landing, has(landing)?)));
        let Some((place, landing, (bytes, stride))) = found else { return Ok(None) };
        let matrix = DeviceMatrix::new(&landing.memory.part(bytes)?, dtype, elements.shape, stride)?;
        self.landed = Some(place);
        Ok(Some(matrix))
    }

    /// Whatever reads what landed last is on the stream of kernels.
    fn read(&mut self) -> Result<(), CudaError> {
        if let Some(landing) = self.landed.take().and_then(|place| self.landings.get_mut(place)) {
            landing.read = Some(self.kernels.hold(()).map_err(gpu_mem::Error::from)?);
        }
        Ok(())
    }

    /// Puts on the stream what was asked for so far, of which the last reads what landed last.
    fn put(&mut self, operation: Operation) -> Result<(), CudaError> {
        self.later.push(operation);
        let work = Operation::enqueue_all(self.rest(), &self.kernels);
        self.posted.work.push(work.map_err(gpu_mem::Error::from)?);
        self.read()
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
        if let Some(matrix) = self.landed(elements, dtype)? {
            return self.put(make(elements, &matrix)?);
        }
        let room = self.landings.first().map_or(0, |landing| landing.memory.len());
        let room = usize::try_from(room).unwrap_or(usize::MAX) / dtype.bytes();
        for part in elements.parts(dtype, room) {
            let matrix = self.land_elements(&part, dtype)?;
            self.put(make(&part, &matrix)?)?;
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
        // As long as a matrix: others decide.
        Transform::Quantize { .. } | Transform::Scales { .. } => 0,
        _ if comes_whole(op) => (count - 1).saturating_mul(stride).saturating_add(bytes),
        Transform::Cast { .. } => count.saturating_mul(bytes),
        Transform::Copy => 0,
    }
}

/// The longest part of a matrix that is quantised.
fn matrix_bytes(quantization: &Quantization) -> u64 {
    let matrices =
        (0..quantization.matrices()).filter_map(|number| Some((number, quantization.matrix(number)?)));
    let bytes = |(number, matrix): (usize, &Matrix)| {
        let all = matrix.across(number, 0..matrix.grid.blocks()[0]);
        let elements = matrix.held(&all).map(|held| held.shape[0] as u64 * held.shape[1] as u64).max();
        elements.unwrap_or(0) * matrix.dtype.bytes() as u64
    };
    matrices.map(bytes).max().unwrap_or(0)
}

/// Where elements lie among others that are one row behind the other, in bytes, and from one row to the next in elements; `None` where they
/// are not all among them.
fn bytes_within(held: &Elements, wanted: &Elements, width: u64) -> Option<(Range<u64>, usize)> {
    let [down, along] = [0, 1].map(|dim| wanted.origin[dim].checked_sub(held.origin[dim]));
    let (down, along) = (down?, along?);
    let fits = down + wanted.shape[0] <= held.shape[0] && along + wanted.shape[1] <= held.shape[1];
    // Matrices of a stack have the same rows and columns, and different bytes.
    let is_same = (held.region, held.stride) == (wanted.region, wanted.stride)
        && held.offset.checked_add((down * held.stride + along) as u64 * width)? == wanted.offset;
    let columns = held.shape[1];
    let start = down * columns + along;
    let end = start + wanted.shape[0].checked_sub(1)? * columns + wanted.shape[1];
    (fits && is_same).then_some((start as u64 * width..end as u64 * width, columns))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The addresses of elements in host memory, in their order, of two bytes each.
    fn addresses(of: &Elements) -> Vec<u64> {
        let row = |row: usize| {
            (0..of.shape[1]).map(move |column| (row * of.stride + column) as u64 * 2 + of.offset)
        };
        (0..of.shape[0]).flat_map(row).collect()
    }

    /// Of a matrix of so many columns at byte 40.
    fn elements() -> impl Strategy<Value = Elements> {
        (0..5_usize, 0..5_usize, 1..6_usize, 1..6_usize, 10..12_usize, 0..2_u32, 0..2_u64).prop_map(
            |(row, column, rows, columns, stride, region, number)| Elements {
                origin: [row, column],
                shape: [rows, columns],
                region: RegionIndex(region),
                offset: 40 + number * 1000 + (row * stride + column) as u64 * 2,
                stride,
            },
        )
    }

    proptest! {
        #[test]
        fn elements_are_found_among_those_that_landed(held in elements(), wanted in elements()) {
            let landed = addresses(&held);
            let same = (held.region, held.stride) == (wanted.region, wanted.stride);
            let is_there = addresses(&wanted).iter().all(|address| landed.contains(address));
            match bytes_within(&held, &wanted, 2) {
                None => prop_assert!(!same || !is_there),
                Some((bytes, stride)) => {
                    prop_assert!(same && bytes.end <= landed.len() as u64 * 2);
                    let at = |row: usize, column: usize| landed[bytes.start as usize / 2 + row * stride + column];
                    let found: Vec<u64> = (0..wanted.shape[0]).flat_map(|row| (0..wanted.shape[1]).map(move |column| (row, column)))
                        .map(|(row, column)| at(row, column)).collect();
                    prop_assert_eq!(found, addresses(&wanted));
                }
            }
        }
    }
}
