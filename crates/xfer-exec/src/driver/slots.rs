//! Staging slots in host memory, as slices of one allocation, which rails register once.
//!
//! A slot is a lease that is either free, away to be filled, or read by rails. None is given away while a rail still holds a
//! slice of it.

use efa_core::{Lease, LeaseMut};

use crate::engine::Slot;

/// Staging slots at most: far more than any rail has in flight, so that tiny gathers do not turn a large
/// watermark into millions of slots.
const SLOTS_MAX: usize = 1024;

enum SlotMemory {
    Free(LeaseMut),
    Away,
    /// Being written from; rails hold slices of it.
    Filled(Lease),
}

/// See the module.
pub(crate) struct HostSlots(Vec<SlotMemory>);

impl HostSlots {
    /// Cuts `staging` into slots of `slot_bytes`.
    pub(crate) fn new(mut staging: LeaseMut, slot_bytes: u64) -> Self {
        let slot_bytes = usize::try_from(slot_bytes).unwrap_or(usize::MAX);
        let mut slots = Vec::new();
        while slots.len() < SLOTS_MAX
            && let Some(slot) = staging.split_to(slot_bytes).filter(|slot| !slot.is_empty())
        {
            slots.push(SlotMemory::Free(slot));
        }
        Self(slots)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> u32 {
        self.0.len() as u32
    }

    /// The slot's memory, if no rail reads it: it is away afterwards.
    pub(crate) fn take(&mut self, slot: Slot) -> Option<LeaseMut> {
        let memory = self.0.get_mut(slot.0 as usize)?;
        match std::mem::replace(memory, SlotMemory::Away) {
            SlotMemory::Free(lease) => Some(lease),
            SlotMemory::Filled(lease) => match lease.thaw() {
                Ok(lease) => Some(lease),
                Err(lease) => {
                    *memory = SlotMemory::Filled(lease);
                    None
                }
            },
            SlotMemory::Away => None,
        }
    }

    /// The slot's memory is back, to be read by rails.
    pub(crate) fn give_back(&mut self, slot: Slot, lease: LeaseMut) {
        if let Some(memory) = self.0.get_mut(slot.0 as usize) {
            *memory = SlotMemory::Filled(lease.freeze());
        }
    }

    /// A part of a slot that is not away; `None` where there is none.
    pub(crate) fn slice(&self, slot: Slot, offset: u64, bytes: usize) -> Option<Lease> {
        let SlotMemory::Filled(lease) = self.0.get(slot.0 as usize)? else { return None };
        let offset = usize::try_from(offset).ok()?;
        lease.slice(offset..offset.checked_add(bytes)?)
    }
}
