//! A rank's GPU: memory for weights, and the copies between it and the host that a session itself makes. What goes from GPU to
//! GPU is the rails'.
//!
//! Nothing here is on the way of a push. Copies go through one page-locked buffer, and whoever asks waits.

use std::sync::{Arc, Mutex, PoisonError};

use gpu_mem::{Cuda, DeviceMemory, PinnedBuffer, Posted, Span, Stream, VmmBuffer};
use weight_ops::cuda::{BoxCopy, DeviceRange, Kernels, Place};

use crate::device::Device;
use crate::error::Error;
use crate::memory::Rows;

/// Of the page-locked buffer: at 50 GB/s a third of a millisecond, long beside what a copy costs to begin.
const LANDING_BYTES: u64 = 16 << 20;

/// Rows that are read at a time have at most so many bytes. A quarter, so that rows of which others have the next three parts are
/// copied with what lies between them: a kernel that brings them together would wait for its turn on a GPU that computes.
pub(crate) const BLOCK_BYTES: u64 = LANDING_BYTES / 4;

/// Files that lead to one memory are passed to peers at once, 64 at most: memory is made of no more pieces than this.
const PIECES_MAX: u64 = 32;

/// Multiprocessors that gather rows for the host: faster than PCIe.
const GATHERING: u32 = 4;

/// See the module.
pub(crate) struct Gpu {
    kernels: Kernels,
    copies: Mutex<Copies>,
}

struct Copies {
    uploads: Stream,
    stream: Stream,
    /// None before the first, and after one that failed.
    landing: Option<PinnedBuffer>,
    /// Where rows are brought together; none before the first.
    together: Option<DeviceRange>,
}

impl Gpu {
    /// Opens the GPU that a rank's weights are on, if they are on one, and compiles its kernels where that was not done before.
    /// Blocks for that: seconds, once on each host.
    pub(crate) fn of(device: Device) -> Result<Option<Arc<Self>>, Error> {
        let Device::Cuda(index) = device else { return Ok(None) };
        let device = Cuda::open()?.device(index)?;
        let kernels = Kernels::new(&device)?;
        let (uploads, stream) = (device.stream()?, device.stream()?);
        let copies = Mutex::new(Copies { uploads, stream, landing: None, together: None });
        Ok(Some(Arc::new(Self { kernels, copies })))
    }

    pub(crate) fn device(&self) -> &gpu_mem::Device {
        self.kernels.device()
    }

    pub(crate) fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// What can leave this GPU for another of its host, by its generation, for plans and lower bounds: NVLink in one direction, as
    /// NVIDIA's data sheets of V100, A100, H100 and B200 have it (half of their totals), and of others PCIe 4.0 with 16 lanes.
    /// Ranks that share one GPU copy within its memory, several times faster.
    pub(crate) fn link_bytes_per_second(&self) -> u64 {
        match self.device().capability() {
            Ok((7, 0)) => 150_000_000_000,
            Ok((8, 0)) => 300_000_000_000,
            Ok((9, _)) => 450_000_000_000,
            Ok((10, _)) => 900_000_000_000,
            _ => 31_500_000_000,
        }
    }

    /// Memory of `bytes` zero bytes that this process alone uses.
    pub(crate) fn zeroed(&self, bytes: u64) -> Result<DeviceRange, Error> {
        let memory = DeviceRange::whole(&Arc::new(self.device().alloc(bytes)?));
        self.clear(memory.clone())?;
        Ok(memory)
    }

    /// As [`Gpu::zeroed`], of memory that other processes can open; of one byte at least.
    pub(crate) fn zeroed_to_share(&self, bytes: u64) -> Result<Arc<VmmBuffer>, Error> {
        let buffer = self.device().alloc_vmm(bytes.max(1), bytes.div_ceil(PIECES_MAX))?;
        let buffer = Arc::new(buffer);
        self.clear(Arc::clone(&buffer))?;
        Ok(buffer)
    }

    /// Page-locked host memory.
    pub(crate) fn pinned(&self, bytes: u64) -> Result<PinnedBuffer, Error> {
        Ok(self.device().pinned(usize::try_from(bytes).unwrap_or(usize::MAX))?)
    }

    fn clear(&self, memory: impl DeviceMemory) -> Result<(), Error> {
        let copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        done(copies.stream.fill(memory, 0))?;
        Ok(())
    }

    /// Copies within this GPU.
    pub(crate) fn copy(&self, from: DeviceRange, to: DeviceRange) -> Result<(), Error> {
        let copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        let all = [Span::first(from.len())];
        done(copies.stream.copy(from, to, &all))?;
        Ok(())
    }

    /// Copies `bytes` to the start of `to`.
    pub(crate) fn write(&self, to: &DeviceRange, bytes: &[u8]) -> Result<(), Error> {
        let mut copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = 0;
        for block in bytes.chunks(LANDING_BYTES as usize) {
            let mut landing = copies.landing(self.device())?;
            landing.bytes_mut().get_mut(..block.len()).unwrap_or_default().copy_from_slice(block);
            let span = Span { from: 0, to: at, len: block.len() as u64 };
            let (landing, _) = done(copies.stream.copy_to_device(landing, to.clone(), &[span]))?;
            copies.landing = Some(landing);
            at += span.len;
        }
        Ok(())
    }

    /// Copies bytes from the start of `from` on out into `into`.
    pub(crate) fn read(&self, from: &DeviceRange, into: &mut [u8]) -> Result<(), Error> {
        let rows = Rows { offset: 0, count: 1, bytes: into.len() as u64, stride: 0 };
        let mut at = 0;
        self.rows(from, rows, &mut |block, _| {
            into.get_mut(at..at + block.len()).unwrap_or_default().copy_from_slice(block);
            at += block.len();
        })
    }

    /// Reads rows one after another, some at a time; all at once where they have at most [`BLOCK_BYTES`] together. `read` sees
    /// bytes from the first of these rows to the last, and which these rows are, from their start on.
    pub(crate) fn rows(
        &self,
        from: &DeviceRange,
        rows: Rows,
        read: &mut dyn FnMut(&[u8], Rows),
    ) -> Result<(), Error> {
        let outside =
            || gpu_mem::Error::Range { offset: rows.offset, len: rows.bytes, available: from.len() };
        let mut copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        for block in rows.blocks(BLOCK_BYTES) {
            let extent = from.part(block.extent().ok_or_else(outside)?)?;
            let mut landed = Rows { offset: 0, ..block };
            let memory = if extent.len() <= LANDING_BYTES {
                extent
            } else {
                landed.stride = block.bytes;
                copies.gather(&self.kernels, &extent, block)?
            };
            let landing = copies.landing(self.device())?;
            let all = [Span::first(memory.len())];
            let (memory, landing) = done(copies.stream.copy_to_host(memory, landing, &all))?;
            read(landing.bytes().get(..memory.len() as usize).unwrap_or_default(), landed);
            copies.landing = Some(landing);
        }
        Ok(())
    }
}

/// Waits for what was put on a stream.
fn done<T: Send + 'static>(posted: Posted<T>) -> Result<T, gpu_mem::Error> {
    Ok(posted?.wait()?)
}

impl Copies {
    fn landing(&mut self, device: &gpu_mem::Device) -> Result<PinnedBuffer, Error> {
        match self.landing.take() {
            Some(landing) => Ok(landing),
            None => Ok(device.pinned(LANDING_BYTES as usize)?),
        }
    }

    /// Begins to bring rows together that lie in `extent`, from its start on.
    fn gather(&mut self, kernels: &Kernels, extent: &DeviceRange, rows: Rows) -> Result<DeviceRange, Error> {
        let together = match &self.together {
            Some(together) => together.clone(),
            None => DeviceRange::whole(&Arc::new(kernels.device().alloc(BLOCK_BYTES)?)),
        };
        self.together = Some(together.clone());
        let into = together.part(0..rows.count * rows.bytes)?;
        let [source, destination] = [0, 1].map(|region| Place { region, offset: 0 });
        let copy = BoxCopy {
            source,
            destination,
            row_bytes: rows.bytes,
            counts: [1, 1, rows.count as u32],
            source_strides: [0, 0, rows.stride],
            destination_strides: [0, 0, rows.bytes],
        };
        let mut batch = kernels.batch();
        batch.rows(&[extent.clone(), into.clone()], &copy)?;
        batch.enqueue(&self.uploads, &self.stream, GATHERING)?.wait()?;
        Ok(into)
    }
}
