//! The table of operations in flight. It owns their buffers and lends the provider its scratch space.
//!
//! A slot is taken before the post and given back when the completion has been read, or when the endpoint has closed.
//! The provider keeps a pointer to the slot's context meanwhile, so contexts never move and are reached by raw pointer
//! only. An operation's id is never issued again.

use std::ffi::c_void;
use std::ptr::NonNull;

use libfabric_sys as sys;

use crate::completion::{Held, OpKind, Unfinished};
use crate::peer::PeerId;
use crate::region::RegionId;

/// Names an operation on one rail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OpId {
    slot: u32,
    generation: u64,
}

/// An operation in flight, and the buffer that it may touch.
pub(crate) struct Op {
    pub(crate) held: Held,
    pub(crate) kind: OpKind,
    pub(crate) peer: Option<PeerId>,
    pub(crate) region: RegionId,
    pub(crate) token: u64,
    pub(crate) bytes: usize,
}

/// Provider scratch, one per slot.
struct Contexts {
    base: NonNull<sys::fi_context2>,
    len: usize,
}

// SAFETY: owns its allocation. The provider's pointers into it are used only inside calls on the rail's endpoint and
// completion queue, which move to the other thread together with it.
unsafe impl Send for Contexts {}

impl Contexts {
    fn new(len: usize) -> Self {
        const EMPTY: sys::fi_context2 = sys::fi_context2 { internal: [std::ptr::null_mut(); 8] };
        let slots: Box<[sys::fi_context2]> = (0..len).map(|_| EMPTY).collect();
        // A box is never null.
        let base = NonNull::from(Box::leak(slots)).cast();
        Self { base, len }
    }

    fn at(&self, slot: u32) -> *mut c_void {
        debug_assert!((slot as usize) < self.len);
        self.base.as_ptr().wrapping_add(slot as usize).cast()
    }

    /// The slot of a context that the provider returned; `None` when it is not one of ours.
    fn slot_of(&self, context: *mut c_void) -> Option<u32> {
        let offset = context.addr().checked_sub(self.base.as_ptr().addr())?;
        let slot = offset / size_of::<sys::fi_context2>();
        let exact = offset % size_of::<sys::fi_context2>() == 0;
        u32::try_from(slot).ok().filter(|_| exact && slot < self.len)
    }
}

impl Drop for Contexts {
    fn drop(&mut self) {
        let slots = std::ptr::slice_from_raw_parts_mut(self.base.as_ptr(), self.len);
        // SAFETY: `new` leaked exactly this box, and the rail drops the table only after its endpoint has closed.
        drop(unsafe { Box::from_raw(slots) });
    }
}

struct Slot {
    generation: u64,
    op: Option<Op>,
}

/// A slot that has been taken for an operation about to be posted.
pub(crate) struct Vacancy {
    slot: u32,
    side: usize,
}

/// Transmits (writes, reads, sends) and receives have separate depths, as they have in the provider.
pub(crate) struct InFlight {
    contexts: Contexts,
    slots: Box<[Slot]>,
    free: Vec<u32>,
    room: [u32; 2],
}

fn side_of(kind: OpKind) -> usize {
    usize::from(kind == OpKind::Receive)
}

impl InFlight {
    pub(crate) fn new(transmits_max: u32, receives_max: u32) -> Self {
        let depth = transmits_max.saturating_add(receives_max);
        Self {
            contexts: Contexts::new(depth as usize),
            slots: (0..depth).map(|_| Slot { generation: 0, op: None }).collect(),
            free: (0..depth).rev().collect(),
            room: [transmits_max, receives_max],
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// How many more operations of this kind fit.
    pub(crate) fn room(&self, kind: OpKind) -> u32 {
        self.room[side_of(kind)]
    }

    /// Takes a slot; `None` when the depth of this kind is used up.
    pub(crate) fn reserve(&mut self, kind: OpKind) -> Option<Vacancy> {
        let side = side_of(kind);
        let room = self.room[side].checked_sub(1)?;
        let slot = self.free.pop()?;
        self.room[side] = room;
        Some(Vacancy { slot, side })
    }

    /// The provider's scratch for an operation about to be posted.
    pub(crate) fn context(&self, vacancy: &Vacancy) -> *mut c_void {
        self.contexts.at(vacancy.slot)
    }

    /// The post was refused.
    pub(crate) fn release(&mut self, vacancy: Vacancy) {
        self.room[vacancy.side] += 1;
        self.free.push(vacancy.slot);
    }

    /// The post was accepted: from here on the table owns the buffer.
    pub(crate) fn occupy(&mut self, vacancy: Vacancy, op: Op) -> OpId {
        let slot = &mut self.slots[vacancy.slot as usize];
        debug_assert!(slot.op.is_none());
        slot.op = Some(op);
        OpId { slot: vacancy.slot, generation: slot.generation }
    }

    /// The provider has let go of the operation with this context; `None` when there is none.
    pub(crate) fn finish(&mut self, context: *mut c_void) -> Option<(OpId, Op)> {
        let index = self.contexts.slot_of(context)?;
        let slot = self.slots.get_mut(index as usize)?;
        let op = slot.op.take()?;
        let id = OpId { slot: index, generation: slot.generation };
        slot.generation += 1;
        self.room[side_of(op.kind)] += 1;
        self.free.push(index);
        Some((id, op))
    }

    /// Gives back every operation. Only after the endpoint has closed.
    pub(crate) fn drain(&mut self) -> Vec<Unfinished> {
        let ops = self.slots.iter_mut().filter_map(|slot| slot.op.take());
        ops.map(|Op { token, kind, held, .. }| Unfinished { token, kind, held }).collect()
    }
}
