//! Quantising on a GPU: the flat tables of magnitudes and scales, and the kernels that fill and use them, all on one stream.
//!
//! The scales of a matrix are found when the first operation needs one of them: by a kernel or two in front of those that
//! quantise, so that no WRITE waits for the magnitudes of all weights. A rank's own elements raise what it was told.
//!
//! Where the elements are is the matter of [`Sources`]: on the GPU, or in host memory, from where they come in parts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use gpu_mem::{DeviceMemory, Pending, PinnedBuffer, Stream};
use weight_ops::cuda::{DeviceMatrix, DeviceRange, Kernels, Operation, Place, Span};
use weight_ops::{Dtype, ScaleFormat};
use xfer_plan::{Op, Transform};

use super::CudaError;
use crate::quant::{BlockRect, Elements, Matrix, Quantization};

/// Bytes of an entry of a table.
const ENTRY: u64 = size_of::<f32>() as u64;

/// How long finding magnitudes may take: a GPU reads all of its memory in a tenth of a second.
const MEASURE_MAX: Duration = Duration::from_secs(10);

/// Where the weights are that operations are made of, and the work on them, which goes on one stream in the order in which it is
/// asked for.
pub(super) trait Sources {
    /// Where the rows of an operation that copies or casts can be read from now on: the operation as it is there, and memory from its
    /// first byte on.
    fn rows(&mut self, op: &Op) -> Result<(Op, DeviceRange), CudaError>;

    /// Work on elements, all at once or one part after another: `make` is told which, and where they are.
    fn work_on(
        &mut self,
        elements: &Elements,
        dtype: Dtype,
        make: &mut dyn FnMut(&Elements, &DeviceMatrix) -> Result<Operation, CudaError>,
    ) -> Result<(), CudaError>;

    /// Work on tables.
    fn work(&mut self, operation: Operation);

    /// What of the work is still to be put on the stream, behind what is there.
    fn rest(&mut self) -> Vec<Operation>;
}

/// Weights on the GPU.
pub(super) struct Resident<'a> {
    regions: &'a [DeviceRange],
    work: Vec<Operation>,
}

impl<'a> Resident<'a> {
    pub(super) fn new(regions: &'a [DeviceRange]) -> Self {
        Self { regions, work: Vec::new() }
    }
}

impl Sources for Resident<'_> {
    fn rows(&mut self, op: &Op) -> Result<(Op, DeviceRange), CudaError> {
        let region = op.source.region;
        let memory = self.regions.get(region.index()).ok_or(CudaError::Region { region: region.0 })?;
        Ok((*op, memory.part(op.source.offset..memory.len())?))
    }

    fn work_on(
        &mut self,
        elements: &Elements,
        dtype: Dtype,
        make: &mut dyn FnMut(&Elements, &DeviceMatrix) -> Result<Operation, CudaError>,
    ) -> Result<(), CudaError> {
        self.work.push(make(elements, &source_of(self.regions, elements, dtype)?)?);
        Ok(())
    }

    fn work(&mut self, operation: Operation) {
        self.work.push(operation);
    }

    fn rest(&mut self) -> Vec<Operation> {
        std::mem::take(&mut self.work)
    }
}

/// See the module.
pub(super) struct DeviceScales {
    kernels: Kernels,
    quantization: Arc<Quantization>,
    magnitudes: DeviceRange,
    scales: DeviceRange,
    /// The same as they are stored where a byte is enough.
    bytes: DeviceRange,
    /// By matrix, whether its scales are on the stream.
    is_found: Vec<bool>,
    /// The magnitudes at the start of this push, on their way.
    upload: Option<Pending<(PinnedBuffer, DeviceRange)>>,
}

impl DeviceScales {
    pub(super) fn new(kernels: &Kernels, quantization: &Arc<Quantization>) -> Result<Self, CudaError> {
        let device = kernels.device();
        let entries = quantization.blocks() as u64;
        let table = |bytes| Ok::<_, CudaError>(DeviceRange::whole(&Arc::new(device.alloc(bytes)?)));
        Ok(Self {
            kernels: kernels.clone(),
            quantization: Arc::clone(quantization),
            magnitudes: table(entries * ENTRY)?,
            scales: table(entries * ENTRY)?,
            bytes: table(entries)?,
            is_found: vec![false; quantization.matrices()],
            upload: None,
        })
    }

    /// Begins a push: magnitudes are what was told, and 0 elsewhere.
    pub(super) fn begin(&mut self, told: &[f32], stream: &Stream) -> Result<(), CudaError> {
        let table = self.quantization.begin(told);
        let table = table.ok_or_else(|| CudaError::Told { reason: self.quantization.told_wrongly(told) })?;
        self.is_found.fill(false);
        self.set(&table, stream)
    }

    /// The magnitudes that this rank reports.
    pub(super) fn magnitudes(
        &mut self,
        regions: &[DeviceRange],
        stream: &Stream,
    ) -> Result<Vec<f32>, CudaError> {
        let quantization = Arc::clone(&self.quantization);
        if quantization.reports().is_empty() {
            return Ok(Vec::new());
        }
        let mut table = vec![0.0; quantization.blocks()];
        self.set(&table, stream)?;
        let mut sources = Resident::new(regions);
        for blocks in quantization.reports() {
            let matrix = matrix_of(&quantization, blocks.matrix)?;
            self.fold(matrix, blocks, &mut sources)?;
        }
        let work = Operation::enqueue_all(sources.rest(), stream).map_err(gpu_mem::Error::from)?;
        let host = self.kernels.device().pinned(table.len() * ENTRY as usize)?;
        let all = [gpu_mem::Span::first(table.len() as u64 * ENTRY)];
        let read = stream.copy_to_host(self.magnitudes.clone(), host, &all).map_err(gpu_mem::Error::from)?;
        let read = read.wait_until(Instant::now() + MEASURE_MAX).map_err(gpu_mem::Error::from)?;
        let Ok((_, host)) = read else {
            return Err(CudaError::Slow { what: "found the magnitudes of its weights", after: MEASURE_MAX });
        };
        drop(work);
        let (entries, _) = host.bytes().as_chunks::<{ ENTRY as usize }>();
        table.iter_mut().zip(entries).for_each(|(magnitude, bytes)| *magnitude = f32::from_ne_bytes(*bytes));
        Ok(quantization.reported(&table))
    }

    /// Writes the table of magnitudes, behind what the stream has to do already.
    fn set(&mut self, table: &[f32], stream: &Stream) -> Result<(), CudaError> {
        if table.is_empty() {
            return Ok(());
        }
        // That of the push before, unless the GPU has still not read it: then it is parked at the stream until it has.
        let before = self.upload.take().filter(|upload| matches!(upload.is_done(), Ok(true)));
        let mut host = match before.map(Pending::wait).transpose().map_err(gpu_mem::Error::from)? {
            Some((host, _)) => host,
            None => self.kernels.device().pinned(table.len() * ENTRY as usize)?,
        };
        let (entries, _) = host.bytes_mut().as_chunks_mut::<{ ENTRY as usize }>();
        entries.iter_mut().zip(table).for_each(|(bytes, magnitude)| *bytes = magnitude.to_ne_bytes());
        let all = [gpu_mem::Span::first(table.len() as u64 * ENTRY)];
        let upload = stream.copy_to_device(host, self.magnitudes.clone(), &all);
        self.upload = Some(upload.map_err(gpu_mem::Error::from)?);
        Ok(())
    }

    /// Raises the magnitudes of blocks of a matrix to those of what this rank has of them.
    fn fold(&self, matrix: &Matrix, blocks: &BlockRect, sources: &mut impl Sources) -> Result<(), CudaError> {
        let table = self.table(&self.magnitudes, matrix)?;
        for elements in matrix.held(blocks) {
            sources.work_on(&elements, matrix.dtype, &mut |part, source| {
                Ok(self.kernels.block_amax(&matrix.grid, source, part.origin, &table)?)
            })?;
        }
        Ok(())
    }

    /// Finds the scales of a matrix, unless that is on the stream already.
    fn find(&mut self, number: usize, sources: &mut impl Sources) -> Result<(), CudaError> {
        let quantization = Arc::clone(&self.quantization);
        let matrix = matrix_of(&quantization, number)?;
        match self.is_found.get_mut(number) {
            Some(is_found) if !*is_found => *is_found = true,
            _ => return Ok(()),
        }
        let bands = 0..matrix.grid.blocks()[0];
        let told = quantization.bands_told().get(matrix.bands(bands.clone())).unwrap_or_default();
        if !told.iter().all(|is_told| *is_told) {
            self.fold(matrix, &matrix.across(number, bands), sources)?;
        }
        let scales = self.table(&self.scales, matrix)?;
        let magnitudes = self.table(&self.magnitudes, matrix)?;
        sources.work(self.kernels.scales(&magnitudes, matrix.format, &scales)?);
        if matrix.format == ScaleFormat::Ue8m0 {
            let entries = matrix.entries();
            let bytes = self.bytes.part(entries.start as u64..entries.end as u64)?;
            sources.work(self.kernels.scale_bytes(&scales, &bytes)?);
        }
        Ok(())
    }

    /// Quantises the elements that `op` wants, one row after another.
    pub(super) fn quantize(
        &mut self,
        op: &Op,
        sources: &mut impl Sources,
        into: &DeviceRange,
    ) -> Result<(), CudaError> {
        let quantization = Arc::clone(&self.quantization);
        for rect in quantization.rects(op).ok_or(CudaError::Transform { transform: op.transform })? {
            self.find(rect.matrix, sources)?;
            let matrix = matrix_of(&quantization, rect.matrix)?;
            let scales = self.table(&self.scales, matrix)?;
            let first = rect.elements.origin;
            sources.work_on(&rect.elements, matrix.dtype, &mut |part, source| {
                let [down, along] = [0, 1].map(|dim| part.origin[dim] - first[dim]);
                let start = (rect.into + down * rect.into_stride + along) as u64;
                let [rows, columns] = part.shape;
                let len = ((rows - 1) * rect.into_stride + columns) as u64;
                let codes = into.part(start..start + len)?;
                let codes = DeviceMatrix::new(&codes, Dtype::F8E4M3, part.shape, rect.into_stride)?;
                Ok(self.kernels.quantize_rect(&matrix.grid, source, part.origin, &scales, &codes)?)
            })?;
        }
        Ok(())
    }

    /// Finds the scales that `op` sends: the table that will have them, and from where to where they are to be copied.
    pub(super) fn store(
        &mut self,
        op: &Op,
        sources: &mut impl Sources,
    ) -> Result<(DeviceRange, Vec<Span>), CudaError> {
        let quantization = Arc::clone(&self.quantization);
        let (table, width) = match op.transform {
            Transform::Scales { quant, .. } if quant.scales == xfer_plan::ScaleFormat::Ue8m0 => {
                (&self.bytes, 1)
            }
            _ => (&self.scales, ENTRY),
        };
        let table = table.clone();
        let (mut spans, mut end) = (Vec::new(), 0);
        for run in quantization.runs(op).ok_or(CudaError::Transform { transform: op.transform })? {
            self.find(run.matrix, sources)?;
            let bytes = run.count as u64 * width;
            let [source, destination] =
                [(0, run.entry as u64 * width), (1, end)].map(|(region, offset)| Place { region, offset });
            spans.push(Span { source, destination, bytes });
            end += bytes;
        }
        Ok((table, spans))
    }

    /// A matrix's share of a flat table.
    fn table(&self, of: &DeviceRange, matrix: &Matrix) -> Result<DeviceRange, CudaError> {
        let entries = matrix.entries();
        Ok(of.part(entries.start as u64 * ENTRY..entries.end as u64 * ENTRY)?)
    }
}

fn matrix_of(quantization: &Quantization, number: usize) -> Result<&Matrix, CudaError> {
    quantization.matrix(number).ok_or(CudaError::Matrix { number })
}

/// The elements of a rectangle in device memory.
fn source_of(regions: &[DeviceRange], elements: &Elements, dtype: Dtype) -> Result<DeviceMatrix, CudaError> {
    let region = elements.region;
    let memory = regions.get(region.index()).ok_or(CudaError::Region { region: region.0 })?;
    let [rows, columns] = elements.shape;
    let len = (rows.saturating_sub(1) * elements.stride + columns) as u64 * dtype.bytes() as u64;
    let range = memory.part(elements.offset..elements.offset.saturating_add(len))?;
    Ok(DeviceMatrix::new(&range, dtype, elements.shape, elements.stride)?)
}
