//! Host memory in the place of a GPU's: what rails that cannot reach a GPU write to, and its upload.
//!
//! Its pages are locked, so that the GPU's copy engine reads them beside the CPU. Rails expose it as a [`Target`]; where it is
//! shared, peers of this host map its [`SharedFile`]. When everything has arrived, and not before, [`Mirror::upload`] copies it
//! to the GPU.
//!
//! # What the upload costs
//!
//! It follows the writes. A PCIe 5.0 x16 slot copies 55 GB/s to an H200. Loopback TCP on two cores moves 6 GB/s, and a link of
//! 100 Gb/s 12.5 GB/s at most, so the upload adds a tenth to a quarter to such a push. Beside a NIC of 400 Gb/s it would double it:
//! such NICs are to reach the GPU themselves.
//!
//! Nothing is uploaded earlier, because nobody here knows what has arrived. A sender through shared memory copies without a word.
//! A WRITE of libfabric could carry a number, but its receiver has no list of what is to come, and who counts numbers cannot be
//! written to twice: a rail that breaks would end the push, where now the others take over. And an early upload would need a
//! second arena on the GPU. This one needs none: until the upload the GPU holds the version of before, whole, and a version that is
//! given up has changed nothing there.
//!
//! This module must never form a reference to bytes that the network may be writing, and never puts other memory in the place of
//! pages that the GPU may be reading.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use efa_core::{LeaseMut, Target};
use gpu_mem::{Device, LockedTarget, Pending, Span, Stream};
use weight_ops::cuda::DeviceRange;

use super::CudaError;
use crate::local::SharedFile;

/// Copies that are longer are cut: what others have for the GPU's copy engine goes in between.
const CHUNK_BYTES: u64 = 64 << 20;

/// See the module.
pub struct Mirror {
    target: Target,
    file: Option<SharedFile>,
    /// `None` once the driver has refused to lock the pages of a renewal.
    locked: Option<Arc<LockedTarget>>,
    stream: Stream,
}

/// Copies to the GPU that have been begun. Dropping it does not end them.
#[must_use = "what is served may be torn until it is over"]
pub struct Upload(Pending<(Arc<LockedTarget>, DeviceRange)>);

impl Mirror {
    /// So many zero bytes of this process, to be copied to this GPU.
    ///
    /// # Errors
    ///
    /// [`CudaError::NoMirror`] when there are not so many; the driver's when it does not lock their pages.
    pub fn private(device: &Device, bytes: u64) -> Result<Self, CudaError> {
        let no_room = |reason: String| CudaError::NoMirror { bytes, reason };
        let len = usize::try_from(bytes).map_err(|error| no_room(error.to_string()))?;
        let lease = LeaseMut::committed(len).map_err(|error| no_room(error.to_string()))?;
        Self::over(device, lease.expose(), None)
    }

    /// As [`Mirror::private`], of memory that peers on this host may map.
    ///
    /// # Errors
    ///
    /// [`CudaError::Local`] when there is no room; the driver's when it does not lock the pages.
    pub fn shared(device: &Device, bytes: u64) -> Result<Self, CudaError> {
        let (target, file) = SharedFile::create(bytes)?;
        Self::over(device, target, Some(file))
    }

    fn over(device: &Device, target: Target, file: Option<SharedFile>) -> Result<Self, CudaError> {
        let stream = device.stream()?;
        let locked = Some(Arc::new(lock(device, &target)?));
        Ok(Self { target, file, locked, stream })
    }

    /// What rails expose.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// By what peers on this host reach it, where it is shared. It is renewed with [`Mirror::renew`] alone.
    pub fn file(&self) -> Option<&SharedFile> {
        self.file.as_ref()
    }

    /// Begins to copy these bytes to the same places in memory of the GPU. Nobody writes them any more. Never blocks.
    ///
    /// # Errors
    ///
    /// The driver's, as for a range outside, or memory of another GPU; nothing was copied then, or some of it.
    pub fn upload(&self, to: &DeviceRange, ranges: &[Range<u64>]) -> Result<Upload, CudaError> {
        let locked = self.locked.as_ref().ok_or(CudaError::NotLocked)?;
        let spans: Vec<Span> = ranges.iter().cloned().flat_map(chunks).collect();
        let copy = locked.upload(&self.stream, to.clone(), &spans);
        Ok(Upload(copy.map_err(gpu_mem::Error::from)?))
    }

    /// As [`Mirror::upload`] for all bytes of the mirror.
    ///
    /// # Errors
    ///
    /// As [`Mirror::upload`].
    pub fn upload_all(&self, to: &DeviceRange) -> Result<Upload, CudaError> {
        self.upload(to, std::slice::from_ref(&(0..self.target.len() as u64)))
    }

    /// Puts fresh zero bytes in the place of a shared mirror's, which whoever has mapped the file of before does not reach; see
    /// [`SharedFile::renew`]. A mirror that is not shared stays as it is: to close its rails is enough.
    ///
    /// # Errors
    ///
    /// [`CudaError::Uploading`] while an upload has not been waited for, and [`CudaError::Local`] where there is no room, with
    /// nothing changed. The driver's, when it does not lock the new pages: the mirror is of no use any more.
    pub fn renew(&mut self) -> Result<(), CudaError> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let locked = self.locked.take().ok_or(CudaError::NotLocked)?;
        let locked = Arc::try_unwrap(locked).map_err(|locked| {
            self.locked = Some(locked);
            CudaError::Uploading
        })?;
        // The GPU would go on reading the pages of before.
        locked.unlock().map_err(gpu_mem::Error::from)?;
        let renewed = file.renew(&self.target);
        self.locked = Some(Arc::new(lock(self.stream.device(), &self.target)?));
        Ok(renewed?)
    }
}

impl Upload {
    /// Whether it is over; then [`Upload::wait`] does not wait.
    ///
    /// # Errors
    ///
    /// The driver's, when the GPU is lost.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        Ok(self.0.is_done()?)
    }

    /// Waits until it is over.
    ///
    /// # Errors
    ///
    /// [`CudaError::Slow`] when it takes longer: it goes on nevertheless. The driver's, when the GPU is lost.
    pub fn wait(self, max: Duration) -> Result<(), CudaError> {
        let waited = self.0.wait_until(Instant::now() + max).map_err(gpu_mem::Error::from)?;
        waited.map(drop).map_err(|_| CudaError::Slow { what: "taken in the bytes of its mirror", after: max })
    }
}

fn lock(device: &Device, target: &Target) -> Result<LockedTarget, CudaError> {
    Ok(device.lock_target(target.clone()).map_err(gpu_mem::Error::from)?)
}

/// The bytes of a range, to the same place.
fn chunks(range: Range<u64>) -> impl Iterator<Item = Span> {
    let Range { start, end } = range;
    let mut at = start;
    std::iter::from_fn(move || {
        let len = end.saturating_sub(at).min(CHUNK_BYTES);
        let span = Span { from: at, to: at, len };
        at += len;
        (len > 0).then_some(span)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_the_range() {
        let ends =
            [(0, 0), (5, 3), (7, 8), (3, CHUNK_BYTES + 3), (1, 3 * CHUNK_BYTES), (u64::MAX - 1, u64::MAX)];
        for (start, end) in ends {
            let mut at = start;
            for Span { from, to, len } in chunks(start..end) {
                assert_eq!((from, to), (at, at));
                assert!(len > 0 && len <= CHUNK_BYTES);
                at += len;
            }
            assert_eq!(at, end.max(start));
        }
    }
}
