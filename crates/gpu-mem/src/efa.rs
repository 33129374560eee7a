//! Where this crate's memory meets `efa-core`'s: rails register device memory and page-locked buffers, copies take leases.
//!
//! Nothing is decided here: each type answers the other crate's questions about itself.

use std::ptr::NonNull;

use efa_core::{DmaBufRange, Interface, Lease, LeaseMut};

use crate::buffer::PinnedBuffer;
use crate::dmabuf::{NicAccess, NicMemory};
use crate::memory::{HostMemory, HostMemoryMut, Registrable};

// SAFETY: the owner keeps the memory allocated until the drop, CUDA gives its addresses to nothing else, and the dma-buf
// was exported for this range.
unsafe impl<M: Registrable + Sync> efa_core::DeviceMemory for NicMemory<M> {
    fn interface(&self) -> Interface {
        Interface::Cuda { device: self.device().ordinal() }
    }

    fn address(&self) -> usize {
        // An address of this process fits.
        usize::try_from(NicMemory::address(self)).unwrap_or(usize::MAX)
    }

    fn len(&self) -> usize {
        usize::try_from(NicMemory::len(self)).unwrap_or(0)
    }

    fn dma_buf(&self) -> Option<DmaBufRange<'_>> {
        match self.access() {
            NicAccess::DmaBuf(dma_buf) => Some(DmaBufRange { fd: dma_buf.fd(), offset: dma_buf.offset() }),
            NicAccess::Address(_) => None,
        }
    }
}

// SAFETY: allocated by CUDA until the drop, page-locked and so never moved; the buffer goes into its lease by value, so
// nobody has another way to its bytes.
unsafe impl efa_core::Memory for PinnedBuffer {
    fn base(&self) -> NonNull<u8> {
        self.base()
    }

    fn len(&self) -> usize {
        self.bytes().len()
    }
}

// SAFETY: a lease's bytes are mapped and stay where they are while it lives, and nobody writes them.
unsafe impl HostMemory for Lease {
    fn bytes(&self) -> &[u8] {
        self.bytes()
    }
}

// SAFETY: as above; it is the only handle on them.
unsafe impl HostMemory for LeaseMut {
    fn bytes(&self) -> &[u8] {
        self.bytes()
    }
}

// SAFETY: as above.
unsafe impl HostMemoryMut for LeaseMut {
    fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes_mut()
    }
}
