//! Device memory as a dma-buf: the kernel's own way to give a NIC the pages of a GPU.
//!
//! Where it cannot be had, the reason is logged and the memory is described by its address alone: libfabric's provider
//! then needs a kernel module for peer memory. The choice is never silent, and never made by anyone else.

use std::ffi::c_int;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use cudarc::driver::sys;
use cudarc::driver::sys::CUpointer_attribute as Pointer;

use crate::call::cu;
use crate::device::Device;
use crate::error::Error;
use crate::memory::{Registrable, inside};

/// A range of device memory that stands behind a descriptor.
#[derive(Debug)]
pub struct DmaBuf {
    fd: OwnedFd,
    offset: u64,
}

impl DmaBuf {
    /// The descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Where the memory starts in what the descriptor stands for: dma-bufs consist of whole pages.
    pub fn offset(&self) -> u64 {
        self.offset
    }
}

/// How a NIC is told of device memory.
#[derive(Debug)]
pub enum NicAccess {
    /// By a dma-buf.
    DmaBuf(DmaBuf),
    /// By its address, because there is no dma-buf for this reason.
    Address(Error),
}

/// One range of device memory that a NIC can be told of, and its owner, which keeps it allocated.
///
/// It must be one allocation, or one chunk of mapped memory.
#[derive(Debug)]
pub struct NicMemory<M> {
    /// Never read: it keeps the memory allocated.
    owner: M,
    device: Device,
    address: u64,
    len: u64,
    access: NicAccess,
}

impl<M: Registrable> NicMemory<M> {
    /// Exports the part of `owner` from `offset` on.
    ///
    /// # Errors
    ///
    /// [`Error::Range`] for a part that does not lie inside or has no byte; [`Error::DeviceLost`].
    pub fn export(owner: M, offset: u64, len_bytes: u64) -> Result<Self, Error> {
        if len_bytes == 0 {
            return Err(Error::Range { offset, len: len_bytes, available: owner.len() });
        }
        let address = inside(owner.address(), owner.len(), offset, len_bytes)?;
        let device = owner.device().clone();
        device.synchronise_copies(address)?;
        let access = match device.export_dma_buf(address, len_bytes) {
            Ok(dma_buf) => NicAccess::DmaBuf(dma_buf),
            Err(lost @ Error::DeviceLost { .. }) => return Err(lost),
            Err(reason) => {
                tracing::warn!(%device, %reason, "no dma-buf; the NIC's provider must reach GPU memory by its address (nvidia-peermem)");
                NicAccess::Address(reason)
            }
        };
        Ok(Self { owner, device, address, len: len_bytes, access })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The address of the first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The number of bytes: at least one.
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// How a NIC is told of it.
    pub fn access(&self) -> &NicAccess {
        &self.access
    }

    /// What keeps it allocated.
    pub fn owner(&self) -> &M {
        &self.owner
    }
}

impl Device {
    /// Has the driver end copies of other code to memory that a NIC reads before their calls return, however the NIC is
    /// told of it; this crate's copies wait for events anyway. It fails only when the device is lost.
    fn synchronise_copies(&self, address: u64) -> Result<(), Error> {
        let yes: u32 = 1;
        // SAFETY: the driver looks the address up and reads one integer.
        let synchronised = self.run(|| unsafe {
            cu!(cuPointerSetAttribute(
                (&raw const yes).cast(),
                Pointer::CU_POINTER_ATTRIBUTE_SYNC_MEMOPS,
                address
            ))
        });
        match synchronised {
            Err(lost @ Error::DeviceLost { .. }) => return Err(lost),
            Err(error) => {
                tracing::warn!(device = %self, %error, "copies of other code to memory that a NIC reads may be late");
            }
            Ok(()) => {}
        }
        Ok(())
    }

    /// Exports a range of this device's memory, rounded to whole pages.
    fn export_dma_buf(&self, address: u64, len: u64) -> Result<DmaBuf, Error> {
        let unsupported =
            |why: String| Error::Unsupported { on: self.to_string(), what: "export a dma-buf", why };
        if !self.has_dma_buf()? {
            return Err(unsupported("it needs Linux 5.12 and NVIDIA's open kernel modules".into()));
        }
        let pages = whole_pages(address, len, rustix::param::page_size() as u64);
        let Some((start, bytes)) = pages else {
            return Err(unsupported(format!("{len} bytes from {address:#x} on have no end")));
        };
        let mut fd: c_int = -1;
        let handle_type = sys::CUmemRangeHandleType::CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD;
        // SAFETY: the driver looks the range up and writes one descriptor.
        self.run(|| unsafe {
            cu!(cuMemGetHandleForAddressRange((&raw mut fd).cast(), start, bytes, handle_type, 0))
        })?;
        if fd < 0 {
            return Err(unsupported(format!("the driver answered with descriptor {fd}")));
        }
        // SAFETY: the driver has made this descriptor for us, and nobody else knows of it.
        Ok(DmaBuf { fd: unsafe { OwnedFd::from_raw_fd(fd) }, offset: address - start })
    }
}

/// The whole pages around a range: their start and their length.
fn whole_pages(address: u64, len: u64, page: u64) -> Option<(u64, usize)> {
    let start = address - address.checked_rem(page)?;
    let end = address.checked_add(len)?.checked_next_multiple_of(page)?;
    Some((start, usize::try_from(end - start).ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_pages_are_the_fewest_around_the_range(address in 0..5000_u64, len in 1..500_u64, shift in 0..8_u32) {
            let page = 1_u64 << shift;
            let (start, bytes) = whole_pages(address, len, page).unwrap();
            let touched: std::collections::BTreeSet<u64> = (address..address + len).map(|byte| byte / page).collect();
            prop_assert_eq!(start, touched.first().unwrap() * page);
            prop_assert_eq!(bytes as u64, touched.len() as u64 * page);
        }

        #[test]
        fn a_range_without_an_end_has_no_pages(len in 1..u64::MAX) {
            prop_assert_eq!(whole_pages(u64::MAX, len, 4096), None);
        }
    }
}
