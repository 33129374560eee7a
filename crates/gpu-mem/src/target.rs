//! Host memory that a network writes, made known to CUDA, to be copied to a device.
//!
//! There are no references to its bytes: a copy takes an address and a length. What it takes while the network writes may be a mix of
//! old and new.

use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use cudarc::driver::sys;
use efa_core::Target;

use crate::call::{Failure, cu};
use crate::copy::{Posted, Span, address, check, extent};
use crate::device::Device;
use crate::error::Failed;
use crate::memory::DeviceMemory;
use crate::stream::Stream;

/// A target whose pages are locked and known to CUDA, for all devices.
pub struct LockedTarget {
    device: Device,
    /// Taken out when it was unlocked; left where that failed, because its pages may still be in use.
    target: ManuallyDrop<Target>,
}

impl Device {
    /// Locks the target's pages and makes them known to CUDA. Each page may be registered once at a time.
    ///
    /// # Errors
    ///
    /// [`Failed`] with the target, most often for a limit on locked memory or because it is registered already.
    #[allow(clippy::result_large_err)] // it carries the target back
    pub fn lock_target(&self, target: Target) -> Result<LockedTarget, Failed<Target>> {
        let (base, len) = (target.as_ptr(), target.len());
        // CUDA refuses an empty range; it has no pages to lock.
        if len > 0 {
            // SAFETY: the memory stays mapped while the registration has the target.
            let lock =
                || unsafe { cu!(cuMemHostRegister_v2(base.cast(), len, sys::CU_MEMHOSTREGISTER_PORTABLE)) };
            if let Err(error) = self.run(lock) {
                let error = self.out_of_memory(error, "page-locked host memory", len as u64);
                return Err(Failed::with(error, target));
            }
        }
        Ok(LockedTarget { device: self.clone(), target: ManuallyDrop::new(target) })
    }
}

impl LockedTarget {
    /// The target.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Copies to the stream's device.
    ///
    /// # Errors
    ///
    /// As [`Stream::copy_to_device`].
    #[allow(clippy::result_large_err)] // it carries the target back
    pub fn upload<D: DeviceMemory>(
        self: &Arc<Self>,
        stream: &Stream,
        to: D,
        spans: &[Span],
    ) -> Posted<(Arc<Self>, D)> {
        let base = self.target.as_ptr().cast_const();
        let source = (base.addr() as u64, self.target.len() as u64);
        let checked = stream.owns(&to).and_then(|()| check(spans, source, extent(&to)));
        stream.post((Arc::clone(self), to), checked, |span| {
            let from = base.with_addr(address(span.from));
            // SAFETY: both ranges lie inside their memory, which is held until the copy is done. No reference to the source
            // exists; the network may write it meanwhile, and nothing is concluded from what was copied then.
            unsafe { cu!(cuMemcpyHtoDAsync_v2(span.to, from.cast(), span.len, stream.raw())) }
        })
    }

    /// Gives the target back, unlocked. CUDA may wait for the device first.
    ///
    /// # Errors
    ///
    /// [`Failed`] without the target when the driver does not let go of it: it is leaked, because a device may still
    /// reach its pages.
    #[allow(clippy::result_large_err)] // it carries the target back
    pub fn unlock(self) -> Result<Target, Failed<Target>> {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is not dropped, so the device is taken once.
        let device = unsafe { std::ptr::read(&raw const this.device) };
        match device.run(|| unlock(&this.target)) {
            // SAFETY: `this` is not dropped, so the target is taken once.
            Ok(()) => Ok(unsafe { ManuallyDrop::take(&mut this.target) }),
            Err(error) => Err(Failed { error, returned: None }),
        }
    }
}

/// Unlocks a target that no copy reads any more.
fn unlock(target: &Target) -> Result<(), Failure> {
    match target.is_empty() {
        true => Ok(()),
        // SAFETY: registered from this address on; no copy is in flight, because each holds what it uses.
        false => unsafe { cu!(cuMemHostUnregister(target.as_ptr().cast())) },
    }
}

impl fmt::Debug for LockedTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LockedTarget({:?}, {})", self.target, self.device)
    }
}

impl Drop for LockedTarget {
    fn drop(&mut self) {
        // SAFETY: the value is being dropped, so the target is taken once.
        let target = unsafe { ManuallyDrop::take(&mut self.target) };
        if target.is_empty() {
            return;
        }
        // The target goes along: it is dropped when its pages are unlocked, and leaked while they are not.
        self.device.release_later("the registration of a target", move || unlock(&target));
    }
}
