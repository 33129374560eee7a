//! Host memory that exists already, made known to CUDA.
//!
//! The memory goes in by value and comes back when it is unregistered, so its pages are never freed while CUDA has them
//! locked. Registering costs about as much as touching every page: do it once.

use std::fmt;
use std::mem::ManuallyDrop;

use cudarc::driver::sys;

use crate::call::cu;
use crate::device::Device;
use crate::error::Failed;
use crate::memory::{HostMemory, HostMemoryMut};

/// Host memory that is registered with CUDA, for all devices.
pub struct RegisteredHost<M: HostMemoryMut> {
    device: Device,
    /// Taken out when it was unregistered; left where that failed, because its pages may still be in use.
    memory: ManuallyDrop<M>,
}

impl Device {
    /// Locks the memory's pages and makes them known to CUDA. Each page may be registered once at a time.
    ///
    /// # Errors
    ///
    /// [`Failed`] with the memory, most often for a limit on locked memory or because it is registered already.
    pub fn register_host<M: HostMemoryMut>(&self, mut memory: M) -> Result<RegisteredHost<M>, Failed<M>> {
        let (base, len) = (memory.bytes_mut().as_mut_ptr(), memory.bytes().len());
        // CUDA refuses an empty range; it has no pages to lock.
        if len > 0 {
            // SAFETY: the memory stays mapped while the registration has it.
            let register =
                || unsafe { cu!(cuMemHostRegister_v2(base.cast(), len, sys::CU_MEMHOSTREGISTER_PORTABLE)) };
            if let Err(error) = self.run(register) {
                let error = self.out_of_memory(error, "page-locked host memory", len as u64);
                return Err(Failed::with(error, memory));
            }
        }
        Ok(RegisteredHost { device: self.clone(), memory: ManuallyDrop::new(memory) })
    }
}

impl<M: HostMemoryMut> RegisteredHost<M> {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.memory.bytes()
    }

    /// The bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.memory.bytes_mut()
    }

    /// Gives the memory back, unlocked. CUDA may wait for the device first.
    ///
    /// # Errors
    ///
    /// [`Failed`] without the memory when the driver does not let go of it: it is leaked, because a device may still
    /// reach its pages.
    pub fn unregister(self) -> Result<M, Failed<M>> {
        let mut this = ManuallyDrop::new(self);
        let memory = this.memory.bytes_mut();
        let (base, is_empty) = (memory.as_mut_ptr(), memory.is_empty());
        // SAFETY: `this` is not dropped, so the device is taken once.
        let device = unsafe { std::ptr::read(&raw const this.device) };
        // SAFETY: registered from this address on; no copy is in flight, because each holds what it uses.
        let unregister = || unsafe { cu!(cuMemHostUnregister(base.cast())) };
        let unregistered = if is_empty { Ok(()) } else { device.run(unregister) };
        match unregistered {
            // SAFETY: `this` is not dropped, so the memory is taken once.
            Ok(()) => Ok(unsafe { ManuallyDrop::take(&mut this.memory) }),
            Err(error) => Err(Failed { error, returned: None }),
        }
    }
}

// SAFETY: the memory's own bytes, which stay where they are while it is registered.
unsafe impl<M: HostMemoryMut> HostMemory for RegisteredHost<M> {
    fn bytes(&self) -> &[u8] {
        self.bytes()
    }
}

// SAFETY: as above; the registration owns the memory and cannot be cloned.
unsafe impl<M: HostMemoryMut> HostMemoryMut for RegisteredHost<M> {
    fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes_mut()
    }
}

impl<M: HostMemoryMut> fmt::Debug for RegisteredHost<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RegisteredHost({} bytes, {})", self.bytes().len(), self.device)
    }
}

impl<M: HostMemoryMut> Drop for RegisteredHost<M> {
    fn drop(&mut self) {
        // SAFETY: the value is being dropped, so the memory is taken once.
        let mut memory = unsafe { ManuallyDrop::take(&mut self.memory) };
        if memory.bytes().is_empty() {
            return;
        }
        // The memory goes along: it is dropped when its pages are unlocked, and leaked while they are not.
        self.device.release_later("the registration of host memory", move || {
            let base = memory.bytes_mut().as_mut_ptr();
            // SAFETY: registered from this address on; no copy is in flight, because each holds what it uses.
            unsafe { cu!(cuMemHostUnregister(base.cast())) }
        });
    }
}
