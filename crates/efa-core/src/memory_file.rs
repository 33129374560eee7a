//! A memory file in place of a GPU's memory, for tests: it has a descriptor and addresses, and libfabric's `tcp` copies it like
//! host memory. Not part of any build that people use.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::device::{DeviceMemory, DmaBufRange, Interface};

/// A mapped memory file, of which the memory is all but the first `offset` bytes.
pub struct MemoryFile {
    fd: OwnedFd,
    base: NonNull<u8>,
    offset: usize,
    len: usize,
    interface: Interface,
    has_dma_buf: bool,
}

// SAFETY: an address of this process; nothing is tied to a thread.
unsafe impl Send for MemoryFile {}
// SAFETY: the methods read constants.
unsafe impl Sync for MemoryFile {}

impl MemoryFile {
    /// `len_bytes` zero bytes behind `offset` others, said to be memory of `interface`, with or without a descriptor for NICs.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn new(offset: usize, len_bytes: usize, interface: Interface, has_dma_buf: bool) -> io::Result<Self> {
        let fd = memfd_create("gpu", MemfdFlags::CLOEXEC)?;
        let all = offset + len_bytes;
        ftruncate(&fd, all as u64)?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            mmap(std::ptr::null_mut(), all, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &fd, 0)
        }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { fd, base, offset, len: len_bytes, interface, has_dma_buf })
    }

    /// A second way to the bytes, as a device has one: the file, from its start.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn peek(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }
}

// SAFETY: mapped until the drop, by nobody else.
unsafe impl DeviceMemory for MemoryFile {
    fn interface(&self) -> Interface {
        self.interface
    }

    fn address(&self) -> usize {
        self.base.as_ptr().addr() + self.offset
    }

    fn len(&self) -> usize {
        self.len
    }

    fn dma_buf(&self) -> Option<DmaBufRange<'_>> {
        self.has_dma_buf.then(|| DmaBufRange { fd: self.fd.as_fd(), offset: self.offset as u64 })
    }
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; rails that used it have closed.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len + self.offset) };
    }
}
