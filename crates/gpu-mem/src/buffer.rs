//! Buffers: memory of a device, and page-locked memory of the host, each with one owner.
//!
//! A buffer in use by a stream is held by a [`Pending`](crate::Pending). Dropping a buffer never waits: another thread frees
//! it, and [`Device::reclaim`] waits for that. Allocating may wait for the device, by CUDA's rules.

use std::fmt;
use std::ptr::NonNull;

use cudarc::driver::sys;
use cudarc::driver::sys::CUresult;

use crate::call::{cu, number};
use crate::device::Device;
use crate::error::Error;
use crate::memory::{DeviceMemory, HostMemory, HostMemoryMut};
use crate::reaper::Handle;

/// Memory on a device. Fresh memory holds anything.
pub struct DeviceBuffer {
    device: Device,
    address: u64,
    len: u64,
}

/// Host memory that CUDA has allocated and locked, for all devices. Fresh memory is zero.
pub struct PinnedBuffer {
    device: Device,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: one owner of bytes that belong to the process, not to a thread.
unsafe impl Send for PinnedBuffer {}
// SAFETY: `&PinnedBuffer` only reads the bytes, which nobody writes meanwhile: writing takes the buffer, or `&mut`.
unsafe impl Sync for PinnedBuffer {}

impl Device {
    /// Allocates `len_bytes` on the device; zero is allowed.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`] when there are not so many; what was allocated before is untouched.
    pub fn alloc(&self, len_bytes: u64) -> Result<DeviceBuffer, Error> {
        let mut address = 0;
        if len_bytes > 0 {
            let bytes = usize::try_from(len_bytes).unwrap_or(usize::MAX);
            // SAFETY: the driver writes one address, which the buffer frees.
            let allocated = || unsafe { cu!(cuMemAlloc_v2(&raw mut address, bytes)) };
            self.allocate("device memory", len_bytes, allocated)?;
        }
        Ok(DeviceBuffer { device: self.clone(), address, len: len_bytes })
    }

    /// Allocates `len_bytes` of zero, page-locked host memory; zero is allowed.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`] when the system does not lock so many.
    pub fn pinned(&self, len_bytes: usize) -> Result<PinnedBuffer, Error> {
        let mut base: *mut std::ffi::c_void = std::ptr::null_mut();
        if len_bytes > 0 {
            // SAFETY: the driver writes one address, which the buffer frees.
            let allocated =
                || unsafe { cu!(cuMemHostAlloc(&raw mut base, len_bytes, sys::CU_MEMHOSTALLOC_PORTABLE)) };
            self.allocate("page-locked host memory", len_bytes as u64, allocated)?;
        }
        // Null for an empty buffer, which has no address.
        let base = NonNull::new(base.cast()).unwrap_or(NonNull::dangling());
        // SAFETY: so many bytes were allocated, and nobody else knows of them. CUDA does not promise what they hold.
        unsafe { base.write_bytes(0, len_bytes) };
        Ok(PinnedBuffer { device: self.clone(), base, len: len_bytes })
    }

    /// Says more about a lack of memory than the driver does.
    pub(crate) fn out_of_memory(&self, error: Error, kind: &'static str, bytes: u64) -> Error {
        match error {
            Error::Call(call) if call.code == number(CUresult::CUDA_ERROR_OUT_OF_MEMORY) => {
                let left = match self.memory() {
                    Ok(memory) if kind == "device memory" => {
                        format!(", which has {} of {} bytes free", memory.free, memory.total)
                    }
                    _ => String::new(),
                };
                Error::OutOfMemory { kind, on: self.to_string(), bytes, left }
            }
            other => other,
        }
    }
}

impl DeviceBuffer {
    /// The buffer's device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The address of the first byte, as kernels take it; 0 for an empty buffer.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The number of bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl PinnedBuffer {
    #[cfg(feature = "efa")]
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: so many bytes were allocated and set to zero, and nobody writes them while the buffer is borrowed.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }

    /// The bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the buffer is borrowed uniquely.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }
}

// SAFETY: allocated until the drop, and nothing of a buffer changes.
unsafe impl DeviceMemory for DeviceBuffer {
    fn device(&self) -> &Device {
        &self.device
    }

    fn address(&self) -> u64 {
        self.address
    }

    fn len(&self) -> u64 {
        self.len
    }
}

// SAFETY: allocated and zeroed until the drop.
unsafe impl HostMemory for PinnedBuffer {
    fn bytes(&self) -> &[u8] {
        self.bytes()
    }
}

// SAFETY: as above, and a pinned buffer cannot be cloned.
unsafe impl HostMemoryMut for PinnedBuffer {
    fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes_mut()
    }
}

impl fmt::Debug for DeviceBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceBuffer({:#x}, {} bytes, {})", self.address, self.len, self.device)
    }
}

impl fmt::Debug for PinnedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedBuffer({:p}, {} bytes)", self.base, self.len)
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.len > 0 {
            let address = self.address;
            // SAFETY: allocated by `alloc`, and nobody else frees it.
            self.device.release_later("device memory", move || unsafe { cu!(cuMemFree_v2(address)) });
        }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        if self.len > 0 {
            let base = Handle(self.base.as_ptr().cast());
            // SAFETY: allocated by `pinned`, and nobody else frees it.
            self.device
                .release_later("page-locked memory", move || unsafe { cu!(cuMemFreeHost(base.get())) });
        }
    }
}
