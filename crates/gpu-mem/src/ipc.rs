//! Memory of another process on the same host, by CUDA's legacy IPC handles.
//!
//! A handle is bytes that can be sent anywhere; who opens it maps the exporter's memory. The driver does not count who has
//! it open: the exporter must keep the memory until its peers have closed it. So what is exported without a promise is kept
//! for ever. Where that cannot be had, [`VmmBuffer`](crate::VmmBuffer)s are shared by descriptors, which keep their memory
//! alive. A handle from a peer is checked against what it opens before anything uses it.

use std::ffi::c_char;
use std::fmt;
use std::sync::Arc;

use cudarc::driver::sys;
use serde::{Deserialize, Serialize};

use crate::buffer::DeviceBuffer;
use crate::call::cu;
use crate::device::Device;
use crate::error::Error;
use crate::memory::DeviceMemory;
use crate::segment::allocation_at;

/// What another process of this host needs to open memory of ours. It comes from a peer: nothing of it is believed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpcHandle {
    /// CUDA's 64 bytes, in halves.
    bytes: [[u8; 32]; 2],
    /// The GPU that has the memory.
    uuid: [u8; 16],
    /// Where the memory starts in the allocation that CUDA opens.
    offset: u64,
    /// Its length in bytes.
    len: u64,
}

impl IpcHandle {
    /// The length of the memory in bytes, as its exporter tells it.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The GPU that has the memory, by [`Device::uuid`].
    pub fn uuid(&self) -> [u8; 16] {
        self.uuid
    }
}

impl DeviceBuffer {
    /// A handle by which other processes can open the buffer, which is then kept for as long as this process lives: freeing
    /// it under a process that has it open is undefined behaviour, by CUDA's rules, and nobody is told who has. Who knows
    /// from a protocol uses [`Device::ipc_handle`] and keeps the buffer until then; what is freed on its own account is a
    /// [`VmmBuffer`](crate::VmmBuffer). CUDA shares whole blocks: a buffer below 2 MiB shares its neighbours' bytes too.
    ///
    /// # Errors
    ///
    /// [`Error::BadHandle`] for an empty buffer; [`Error::Call`] where the system does not allow IPC.
    pub fn ipc_handle(self: &Arc<Self>) -> Result<IpcHandle, Error> {
        // SAFETY: the buffer is this process's own, of this length, and never freed, because one owner is forgotten below.
        let handle = unsafe { self.device().ipc_handle(self.address(), self.len()) }?;
        std::mem::forget(Arc::clone(self));
        Ok(handle)
    }
}

impl Device {
    /// A handle by which other processes can open memory that somebody else has allocated, in whole allocations.
    ///
    /// # Errors
    ///
    /// As [`DeviceBuffer::ipc_handle`]; also for memory of `cuMemCreate`, managed memory, or memory of a pool, which
    /// legacy handles do not serve.
    ///
    /// # Safety
    ///
    /// The memory stays allocated until every process that opens the handle has closed it: until it has dropped its
    /// [`IpcMemory`], and [`Device::reclaim`] has returned there after that.
    pub unsafe fn ipc_handle(&self, address: u64, len_bytes: u64) -> Result<IpcHandle, Error> {
        if len_bytes == 0 {
            return Err(Error::BadHandle { why: "it is for no byte".into() });
        }
        let allocation = allocation_at(self, address)?;
        let offset = address - allocation.start;
        if len_bytes > allocation.end - address {
            return Err(Error::Range {
                offset,
                len: len_bytes,
                available: allocation.end - allocation.start,
            });
        }
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: the driver looks the address up, and writes 64 bytes.
        self.run(|| unsafe { cu!(cuIpcGetMemHandle(&raw mut handle, allocation.start)) })?;
        let mut bytes = [[0; 32]; 2];
        for (to, from) in bytes.as_flattened_mut().iter_mut().zip(handle.reserved) {
            *to = from.cast_unsigned();
        }
        Ok(IpcHandle { bytes, uuid: self.uuid(), offset, len: len_bytes })
    }

    /// Opens memory of another process of this host for work of this device. The memory may be another GPU's, if this
    /// one can reach it.
    ///
    /// # Errors
    ///
    /// [`Error::BadHandle`] when the handle claims more than it opens; [`Error::Call`] when it is of this process, or its
    /// owner is gone, or the GPU cannot be reached.
    pub fn open_ipc(&self, handle: &IpcHandle) -> Result<IpcMemory, Error> {
        let mut raw = sys::CUipcMemHandle { reserved: [0; 64] };
        for (to, from) in raw.reserved.iter_mut().zip(handle.bytes.as_flattened()) {
            *to = from.cast_signed() as c_char;
        }
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut base = 0;
        // SAFETY: the driver checks the handle and writes one address, which is closed on drop.
        self.run(|| unsafe { cu!(cuIpcOpenMemHandle_v2(&raw mut base, raw, flags)) })?;
        let mut memory = IpcMemory { device: self.clone(), base, address: base, len: 0 };
        let opened = allocation_at(self, base)?;
        let available = opened.end - base;
        let start = handle.offset.checked_add(handle.len).filter(|end| handle.len > 0 && *end <= available);
        if start.is_none() {
            let why = format!(
                "it claims {} bytes from {} on, of {available} that it opens",
                handle.len, handle.offset
            );
            return Err(Error::BadHandle { why });
        }
        memory.address = base + handle.offset;
        memory.len = handle.len;
        Ok(memory)
    }
}

/// Memory of another process, opened for a device. Dropping it has it closed; [`Device::reclaim`] waits for that.
pub struct IpcMemory {
    device: Device,
    /// What CUDA opened, and closes.
    base: u64,
    address: u64,
    len: u64,
}

// SAFETY: mapped until the drop, in a range that was checked against what CUDA opened; nothing of it changes. Its owner keeps
// it so long: it never frees it, or has promised so to the unsafe function that makes handles.
unsafe impl DeviceMemory for IpcMemory {
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

impl fmt::Debug for IpcMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IpcMemory({:#x}, {} bytes, {})", self.address, self.len, self.device)
    }
}

impl Drop for IpcMemory {
    fn drop(&mut self) {
        let base = self.base;
        // SAFETY: opened by `open_ipc`; work in flight holds what it uses.
        self.device.release_later("a peer's memory", move || unsafe { cu!(cuIpcCloseMemHandle(base)) });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_handle_survives_the_wire(bytes in any::<[[u8; 32]; 2]>(), uuid in any::<[u8; 16]>(), offset: u64, len: u64) {
            let handle = IpcHandle { bytes, uuid, offset, len };
            let wire = postcard::to_allocvec(&handle).unwrap();
            prop_assert_eq!(postcard::from_bytes::<IpcHandle>(&wire).unwrap(), handle);
            prop_assert!(postcard::from_bytes::<IpcHandle>(&wire[..wire.len() - 1]).is_err());
        }
    }
}
