//! Staging slots in device memory, as parts of one allocation, which NICs register once.
//!
//! A slot is never given away while anybody holds a part of it: a rail, or a stream that still fills it for a push that has ended.

use std::sync::Arc;

use gpu_mem::Device;
use weight_ops::cuda::DeviceRange;

use super::CudaError;
use crate::engine::Slot;

/// Staging slots at most, as of host memory.
const SLOTS_MAX: u64 = 1024;

/// Where allocations of CUDA begin, too.
const SLOT_ALIGN_BYTES: u64 = 256;

/// See the module.
pub(super) struct DeviceSlots {
    /// All slots, one behind the other.
    all: DeviceRange,
    slots: Vec<Arc<DeviceRange>>,
}

impl DeviceSlots {
    /// As many slots of `slot_bytes` as go into `staging_bytes`.
    pub(super) fn new(device: &Device, staging_bytes: u64, slot_bytes: u64) -> Result<Self, CudaError> {
        // Slots begin where kernels read and write fastest.
        let apart = slot_bytes.next_multiple_of(SLOT_ALIGN_BYTES);
        let slots = staging_bytes.checked_div(apart).unwrap_or(0).min(SLOTS_MAX);
        let slots = slots.max(u64::from(slot_bytes > 0 && staging_bytes >= slot_bytes));
        let all = DeviceRange::whole(&Arc::new(device.alloc(slots * apart)?));
        let slot = |slot| Ok(Arc::new(all.part(slot * apart..slot * apart + slot_bytes)?));
        Ok(Self { slots: (0..slots).map(slot).collect::<Result<_, CudaError>>()?, all })
    }

    /// How many there are.
    pub(super) fn len(&self) -> u32 {
        self.slots.len() as u32
    }

    /// The memory of all; empty where there is none.
    pub(super) fn memory(&self) -> &DeviceRange {
        &self.all
    }

    /// The first bytes of a slot, to be filled.
    pub(super) fn take(&self, slot: Slot, bytes: u64) -> Result<DeviceRange, CudaError> {
        let memory = self.slots.get(slot.0 as usize).filter(|slot| Arc::strong_count(slot) == 1);
        Ok(DeviceRange::new(memory.ok_or(CudaError::Slot { slot: slot.0 })?, 0..bytes)?)
    }

    /// A part of a slot; `None` where there is none.
    pub(super) fn slice(&self, slot: Slot, offset: u64, bytes: u64) -> Option<DeviceRange> {
        DeviceRange::new(self.slots.get(slot.0 as usize)?, offset..offset.checked_add(bytes)?).ok()
    }
}
