//! Memory that is not the process's own, such as a GPU's: how a NIC is told of it.
//!
//! Such memory is an address range and perhaps a dma-buf; this crate never reads or writes it, and must never form a
//! reference into it. Who has allocated it implements [`DeviceMemory`]; this crate knows no GPU library.

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use libfabric_sys as sys;

use crate::error::{RangeError, RegionError};
use crate::rail::{Live, Rail};
use crate::region::{Keep, Place, RegionId, RemoteRegion};

/// The first libfabric that takes dma-bufs.
const DMA_BUF_VERSION: sys::Version = sys::Version { major: 1, minor: 20 };

/// What kind of memory it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Interface {
    /// Host memory that stands behind a dma-buf.
    Host,
    /// Memory of an NVIDIA GPU.
    Cuda {
        /// The GPU's number, as CUDA shows it to this process.
        device: i32,
    },
}

/// A part of what a dma-buf stands for.
#[derive(Debug, Clone, Copy)]
pub struct DmaBufRange<'a> {
    /// The dma-buf.
    pub fd: BorrowedFd<'a>,
    /// Where the memory starts in it, in bytes.
    pub offset: u64,
}

/// Device memory that can be registered.
///
/// # Safety
///
/// `address()..address() + len()` are addresses of this process that a device of `interface()` has memory at; nothing
/// else has them, and the memory is neither freed nor moved, until the value is dropped. The dma-buf, if there is one,
/// stands for this memory. All methods always answer the same.
pub unsafe trait DeviceMemory: Send + Sync + 'static {
    /// What kind of memory it is.
    fn interface(&self) -> Interface;

    /// The address of the first byte.
    fn address(&self) -> usize;

    /// The number of bytes.
    fn len(&self) -> usize;

    /// Whether there is no byte.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The dma-buf, where there is one; without, the provider is given the address and must know what to do with it.
    fn dma_buf(&self) -> Option<DmaBufRange<'_>>;
}

/// Keeps device memory alive, for registrations and operations in flight. Gives no access to its bytes.
#[derive(Clone)]
pub struct DeviceRef(Arc<dyn DeviceMemory>);

impl DeviceRef {
    /// Takes over device memory.
    pub fn new(memory: impl DeviceMemory) -> Self {
        Self(Arc::new(memory))
    }

    /// The address of the first byte.
    pub fn base_address(&self) -> usize {
        self.0.address()
    }

    /// Whether both keep the same memory.
    pub fn ptr_eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The number of bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes to write from.
    ///
    /// # Errors
    ///
    /// [`RangeError`] when they do not lie inside.
    pub fn slice(&self, offset: usize, len_bytes: usize) -> Result<DeviceSlice, RangeError> {
        match offset.checked_add(len_bytes) {
            Some(end) if end <= self.len() => {
                Ok(DeviceSlice { address: self.0.address() + offset, len: len_bytes, memory: self.clone() })
            }
            _ => {
                let [offset, len, available] = [offset, len_bytes, self.len()].map(|bytes| bytes as u64);
                Err(RangeError { offset, len, available })
            }
        }
    }

    /// How the provider is told: by dma-buf, or why not so.
    fn dma_buf_place(&self, version: sys::Version, uses_virtual_addresses: bool) -> Result<Place, String> {
        let dma_buf = self.0.dma_buf().ok_or("there is none")?;
        if version < DMA_BUF_VERSION {
            return Err(format!("libfabric {version} takes none; {DMA_BUF_VERSION} does"));
        }
        if !uses_virtual_addresses {
            // Such providers move bytes in software. What libfabric 2.1 has in common for them reads the base out of
            // the wrong fields, so that every remote write misses the region.
            return Err("the provider counts addresses from the start of a region".into());
        }
        let offset = usize::try_from(dma_buf.offset).ok();
        let start = offset.and_then(|offset| self.0.address().checked_sub(offset));
        let start = start.ok_or("it would start before all addresses")?;
        let range = sys::fi_mr_dmabuf {
            fd: dma_buf.fd.as_raw_fd(),
            offset: dma_buf.offset,
            len: self.len(),
            // Where the dma-buf itself would start: the offset is added to it.
            base_addr: std::ptr::without_provenance_mut(start),
        };
        Ok(Place { dma_buf: Some(range), ..self.address_place() })
    }

    /// How the provider is told without.
    fn address_place(&self) -> Place {
        let base = std::ptr::without_provenance_mut(self.0.address());
        Place { base, len: self.len(), interface: self.0.interface(), dma_buf: None }
    }
}

impl fmt::Debug for DeviceRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceRef({:?}, {:#x}, {} bytes)", self.0.interface(), self.0.address(), self.len())
    }
}

/// A part of device memory, as the source of writes. It keeps all of the memory.
///
/// Whoever writes the memory meanwhile changes what is sent; that is for the owner to know.
#[derive(Debug, Clone)]
pub struct DeviceSlice {
    memory: DeviceRef,
    address: usize,
    len: usize,
}

impl DeviceSlice {
    /// The number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The memory that this is a part of.
    pub fn memory(&self) -> &DeviceRef {
        &self.memory
    }

    pub(crate) fn address(&self) -> usize {
        self.address
    }
}

impl Rail {
    /// Makes device memory usable as the source of our writes. Gives peers no access.
    ///
    /// # Errors
    ///
    /// As [`Rail::expose_device`].
    pub fn register_device(&mut self, memory: &DeviceRef) -> Result<RegionId, RegionError> {
        let access = sys::FI_WRITE | sys::FI_READ | sys::FI_SEND | sys::FI_RECV;
        self.open_device(memory, Keep::LocalDevice(memory.clone()), access).map(|(id, _)| id)
    }

    /// Lets peers write to device memory (and read it), until the region is closed. What they wrote must be flushed by
    /// the device's own library before it is read.
    ///
    /// The memory is registered by its dma-buf. Where there is none, or libfabric or the provider does not take it, the
    /// reason is logged and the provider is given the address, which takes a kernel module for peer memory.
    ///
    /// # Errors
    ///
    /// [`RegionError::NoDeviceMemory`] for a rail that was not opened for it; [`RegionError::Empty`]; otherwise as
    /// [`Rail::register`].
    pub fn expose_device(&mut self, memory: &DeviceRef) -> Result<(RegionId, RemoteRegion), RegionError> {
        let access = sys::FI_REMOTE_WRITE | sys::FI_REMOTE_READ;
        self.open_device(memory, Keep::Device(memory.clone()), access)
    }

    fn open_device(
        &mut self,
        memory: &DeviceRef,
        keep: Keep,
        access: u64,
    ) -> Result<(RegionId, RemoteRegion), RegionError> {
        let live = &mut *self.live;
        let facts = live.info.facts();
        if memory.is_empty() {
            return Err(RegionError::Empty { on: live.name.clone() });
        }
        // A provider that was not asked takes the address for host memory, and ends the process when it copies.
        if memory.0.interface() != Interface::Host && !facts.reaches_device_memory {
            return Err(RegionError::NoDeviceMemory { on: live.name.clone() });
        }
        let place = memory.dma_buf_place(live.library.version(), facts.uses_virtual_addresses);
        live.open_at(memory, place, keep, access)
    }
}

impl Live {
    /// Registers by dma-buf if there is a place for it, else by address.
    fn open_at(
        &mut self,
        memory: &DeviceRef,
        place: Result<Place, String>,
        keep: Keep,
        access: u64,
    ) -> Result<(RegionId, RemoteRegion), RegionError> {
        let reason = match place {
            Ok(place) => match self.open_region(&place, access) {
                Ok(mr) => return self.adopt_remote(mr, keep, &place),
                Err(RegionError::Call(refused)) => refused.to_string(),
                Err(error) => return Err(error),
            },
            Err(reason) => reason,
        };
        tracing::warn!(rail = self.name, ?memory, reason, "no dma-buf; the provider is given the address");
        self.open_remote(keep, &memory.address_place(), access)
    }
}

#[cfg(test)]
mod tests;
