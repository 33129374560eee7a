//! Staging slots: which are free, which are being filled, and how many WRITEs of the others have not ended.
//!
//! A slot is filled for one operation and leaves as one WRITE or several. It is free again when the last of them has ended,
//! and never before: until then a rail may read it.

use core::time::Duration;

use super::{Action, Actions, Engine, Failure, Phase, Post, Slot, Source};

#[derive(Clone, Copy, PartialEq)]
enum Fill {
    Over,
    Begun,
    /// Its push has ended without it.
    GivenUp,
}

/// What a slot was last used for.
#[derive(Clone, Copy)]
struct SlotUse {
    op: u32,
    fill: Fill,
    /// WRITEs of it that have not ended.
    writes: u32,
}

/// What became of a slot that has been filled.
enum Filled {
    /// For this operation.
    For(u32),
    /// For a push that is over: it is free.
    InVain,
    /// Nobody asked for it.
    Unasked,
}

/// See the module.
pub(super) struct Staging {
    free: Vec<Slot>,
    slots: Vec<SlotUse>,
    /// Slots that are being filled.
    pub(super) filling: u32,
}

impl Staging {
    pub(super) fn new(slots: u32) -> Self {
        Self {
            // Popped from the end: low slots are used first, so memory that is never needed is never touched.
            free: (0..slots).rev().map(Slot).collect(),
            slots: vec![SlotUse { op: 0, fill: Fill::Over, writes: 0 }; slots as usize],
            filling: 0,
        }
    }

    /// Whether there is a slot to be had, now or once a fill that was given up has ended.
    pub(super) fn is_possible(&self) -> bool {
        !self.free.is_empty() || self.slots.iter().any(|slot| slot.fill == Fill::GivenUp)
    }

    /// Takes a free slot to be filled for an operation.
    fn begin(&mut self, op: u32) -> Option<Slot> {
        let slot = self.free.pop()?;
        if let Some(used) = self.slots.get_mut(slot.0 as usize) {
            *used = SlotUse { op, fill: Fill::Begun, writes: 0 };
        }
        self.filling += 1;
        Some(slot)
    }

    fn filled(&mut self, slot: Slot) -> Filled {
        let Some(used) = self.slots.get_mut(slot.0 as usize) else { return Filled::Unasked };
        match std::mem::replace(&mut used.fill, Fill::Over) {
            Fill::Begun => {
                self.filling -= 1;
                Filled::For(used.op)
            }
            Fill::GivenUp => {
                self.free.push(slot);
                Filled::InVain
            }
            Fill::Over => Filled::Unasked,
        }
    }

    /// What is being filled holds its slot for as long as it likes: nobody waits for it any more.
    pub(super) fn give_up_fills(&mut self) {
        self.filling = 0;
        for slot in self.slots.iter_mut().filter(|slot| slot.fill == Fill::Begun) {
            slot.fill = Fill::GivenUp;
        }
    }

    /// Whether WRITEs of an operation in this slot have not ended.
    pub(super) fn holds(&self, slot: Slot, op: u32) -> bool {
        self.slots.get(slot.0 as usize).is_some_and(|used| used.op == op && used.writes > 0)
    }

    /// So many WRITEs of a slot have ended, or never will begin; whether that frees it.
    pub(super) fn release(&mut self, slot: Slot, writes: u32) -> bool {
        let Some(used) = self.slots.get_mut(slot.0 as usize).filter(|used| used.writes > 0) else {
            return false;
        };
        used.writes = used.writes.saturating_sub(writes);
        if used.writes == 0 {
            self.free.push(slot);
        }
        used.writes == 0
    }
}

impl Engine {
    /// Begins to fill slots while there are any, for one receiver after another.
    pub(super) fn begin_staging(&mut self, actions: &mut Actions) {
        let Phase::Writing = self.phase else { return };
        while !self.staging.free.is_empty()
            && let Some(rank) = self.staging_ring.pop_front()
        {
            let peer = &mut self.peers[rank as usize];
            let Some(op) = peer.backlog.take_unstaged() else { continue };
            let Some(slot) = self.staging.begin(op) else { return };
            peer.slots += 1;
            // Who has all that it may have asks again when it gives one back.
            if peer.slots < self.slots_per_peer && peer.backlog.has_unstaged() {
                self.staging_ring.push_back(rank);
            }
            actions.push_back(Action::Stage { slot, op });
        }
    }

    pub(super) fn staged(&mut self, slot: Slot, now: Duration, actions: &mut Actions) {
        let index = match self.staging.filled(slot) {
            Filled::For(op) => op,
            Filled::InVain => return self.begin_staging(actions),
            Filled::Unasked => {
                return self.fail(Failure::Protocol("a slot was filled that nobody asked for".into()), now);
            }
        };
        self.moved_at = now;
        let Some(op) = self.program.ops().get(index as usize) else { return };
        // At most `ROWS_MAX`, as the program was checked.
        let (to, writes) = (op.to.0, op.writes() as u32);
        if let Some(used) = self.staging.slots.get_mut(slot.0 as usize) {
            used.writes = writes;
        }
        match self.phase {
            Phase::Writing => {
                self.peers[to as usize].backlog.make_ready(index, Some(slot), writes);
                self.offer_to_all(to, self.home(index), now, actions);
            }
            _ => drop(self.staging.release(slot, writes)),
        }
    }

    /// Gives up on the staging slot of a WRITE that has ended, if it has one.
    pub(super) fn release(&mut self, post: &Post, actions: &mut Actions) {
        let Source::Slot(slot, _) = post.source else { return };
        if !self.staging.release(slot, 1) {
            return;
        }
        let peer = &mut self.peers[post.to.index()];
        let was_full = peer.slots >= self.slots_per_peer;
        peer.slots = peer.slots.saturating_sub(1);
        if was_full && peer.backlog.has_unstaged() {
            self.staging_ring.push_back(post.to.0);
        }
        self.begin_staging(actions);
    }
}
