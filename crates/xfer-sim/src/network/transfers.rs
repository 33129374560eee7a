//! Who waits where: the transfers, and for every way in use a *lane*, the line in which its transfers stand.
//!
//! Both live in slabs and are found by index; a lane is given up with its last transfer. So memory follows what is under way,
//! never how many NICs there are.

use core::hash::BuildHasherDefault;
use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;

use super::links::Way;
use super::{EventId, NicId, Time};

/// The end of a line.
const NOBODY: u32 = u32::MAX;

/// Names a transfer for as long as it is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TransferId {
    slot: u32,
    generation: u32,
}

impl TransferId {
    pub(super) fn slot(self) -> u32 {
        self.slot
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct LaneIndex(pub(super) u32);

#[derive(Clone, Copy)]
pub(super) enum Stage {
    /// In the line of its lane; the first one is being served.
    Waiting,
    /// Served; its arrival is this event.
    Arriving(EventId),
}

struct Transfer {
    tag: u64,
    /// Bytes that its links move for it.
    work: u64,
    lane: LaneIndex,
    before: u32,
    behind: u32,
    /// Counts the transfers that this slot has held, so that an old name finds nothing.
    generation: u32,
    /// `None` while the slot is vacant.
    stage: Option<Stage>,
}

/// A way in use.
pub(super) struct Lane {
    pub(super) way: Way,
    first: u32,
    last: u32,
    /// Transfers in line.
    pub(super) waiting: u32,
    /// Transfers in line or arriving.
    under_way: u32,
    /// Of the first one, at `settled`: bytes that are not served yet. Fluid, so not a whole number.
    pub(super) remaining: f64,
    /// Bytes a second, since `settled`.
    pub(super) rate: f64,
    pub(super) settled: Time,
    /// The event of the first one's being served, and when that comes.
    pub(super) event: Option<(EventId, Time)>,
    /// When the one before arrives.
    pub(super) last_arrival: Time,
}

impl Lane {
    fn new(way: Way) -> Lane {
        Lane {
            way,
            first: NOBODY,
            last: NOBODY,
            waiting: 0,
            under_way: 0,
            remaining: 0.0,
            rate: 0.0,
            settled: Time::ZERO,
            event: None,
            last_arrival: Time::ZERO,
        }
    }

    /// Serves what the rate has served until `now`.
    pub(super) fn settle(&mut self, now: Time) {
        self.remaining -= self.rate * now.nanos_since(self.settled) as f64 / 1e9;
        self.settled = now;
    }

    /// When the first transfer is served, as of `settled`: in the nanosecond that its last byte falls in. `None` if that is
    /// never, or in more than three centuries.
    pub(super) fn ends(&self) -> Option<Time> {
        let nanoseconds = (self.remaining.max(0.0) / self.rate * 1e9).ceil();
        (self.rate > 0.0 && nanoseconds < 1e19).then(|| self.settled.plus_nanos(nanoseconds as u64))
    }
}

/// See the module. The hasher has no random key: what a table does must not differ between runs.
#[derive(Default)]
pub(super) struct Transfers {
    slots: Vec<Transfer>,
    vacant: Vec<u32>,
    lanes: Vec<Lane>,
    vacant_lanes: Vec<LaneIndex>,
    by_way: HashMap<Way, LaneIndex, BuildHasherDefault<DefaultHasher>>,
}

impl Transfers {
    pub(super) fn lane(&self, lane: LaneIndex) -> &Lane {
        &self.lanes[lane.0 as usize]
    }

    pub(super) fn lane_mut(&mut self, lane: LaneIndex) -> &mut Lane {
        &mut self.lanes[lane.0 as usize]
    }

    pub(super) fn find(&self, way: Way) -> Option<LaneIndex> {
        self.by_way.get(&way).copied()
    }

    /// Puts a transfer at the end of its lane, which is opened if there is none.
    pub(super) fn push(&mut self, way: Way, work: u64, tag: u64) -> (TransferId, LaneIndex) {
        let Transfers { slots, vacant, lanes, vacant_lanes, by_way } = self;
        let index = *by_way.entry(way).or_insert_with(|| match vacant_lanes.pop() {
            Some(index) => {
                lanes[index.0 as usize] = Lane::new(way);
                index
            }
            None => {
                lanes.push(Lane::new(way));
                LaneIndex(lanes.len() as u32 - 1)
            }
        });
        let lane = &mut lanes[index.0 as usize];
        let slot = vacant.pop().unwrap_or(slots.len() as u32);
        let generation = slots.get(slot as usize).map_or(0, |old| old.generation);
        let (before, behind, stage) = (lane.last, NOBODY, Some(Stage::Waiting));
        let transfer = Transfer { tag, work, lane: index, before, behind, generation, stage };
        match slots.get_mut(slot as usize) {
            Some(old) => *old = transfer,
            None => slots.push(transfer),
        }
        match slots.get_mut(lane.last as usize) {
            Some(last) => last.behind = slot,
            None => lane.first = slot,
        }
        lane.last = slot;
        lane.waiting += 1;
        lane.under_way += 1;
        (TransferId { slot, generation }, index)
    }

    /// Takes the first one out of its line; it stays under way.
    pub(super) fn pop(&mut self, lane: LaneIndex) -> Option<u32> {
        let slot = self.lane(lane).first;
        (slot != NOBODY).then(|| {
            self.unlink(slot);
            slot
        })
    }

    /// Takes a transfer out of its line. Whether it was the first.
    pub(super) fn unlink(&mut self, slot: u32) -> bool {
        let Transfer { lane, before, behind, .. } = self.slots[slot as usize];
        let lane = &mut self.lanes[lane.0 as usize];
        match self.slots.get_mut(before as usize) {
            Some(transfer) => transfer.behind = behind,
            None => lane.first = behind,
        }
        match self.slots.get_mut(behind as usize) {
            Some(transfer) => transfer.before = before,
            None => lane.last = before,
        }
        lane.waiting -= 1;
        before == NOBODY
    }

    /// What the first one of a lane needs.
    pub(super) fn first_work(&self, lane: LaneIndex) -> Option<u64> {
        self.slots.get(self.lane(lane).first as usize).map(|transfer| transfer.work)
    }

    pub(super) fn set_arriving(&mut self, slot: u32, event: EventId) {
        self.slots[slot as usize].stage = Some(Stage::Arriving(event));
    }

    pub(super) fn is_under_way(&self, id: TransferId) -> bool {
        let transfer = self.slots.get(id.slot as usize);
        transfer.is_some_and(|transfer| transfer.generation == id.generation && transfer.stage.is_some())
    }

    pub(super) fn stage(&self, slot: u32) -> Stage {
        self.slots[slot as usize].stage.unwrap_or(Stage::Waiting)
    }

    pub(super) fn lane_of(&self, slot: u32) -> LaneIndex {
        self.slots[slot as usize].lane
    }

    pub(super) fn way(&self, slot: u32) -> Way {
        self.lane(self.lane_of(slot)).way
    }

    /// A transfer that stands in no line is over; its lane with it, if it was the last.
    pub(super) fn remove(&mut self, slot: u32) -> (TransferId, u64) {
        let transfer = &mut self.slots[slot as usize];
        let id = TransferId { slot, generation: transfer.generation };
        transfer.generation = transfer.generation.wrapping_add(1);
        transfer.stage = None;
        let (tag, index) = (transfer.tag, transfer.lane);
        self.vacant.push(slot);
        let lane = &mut self.lanes[index.0 as usize];
        lane.under_way -= 1;
        if lane.under_way == 0 {
            self.by_way.remove(&lane.way);
            self.vacant_lanes.push(index);
        }
        (id, tag)
    }

    /// What fails with a NIC: all in line from it or to it, lane by lane, and what is arriving at it.
    pub(super) fn lost_with(&self, nic: NicId) -> Vec<(u32, TransferId, u64)> {
        let mut slots = Vec::new();
        for lane in &self.lanes {
            if matches!(lane.way, Way::Nic { from, to } if from == nic || to == nic) {
                let in_line =
                    |slot: u32| self.slots.get(slot as usize).map(|transfer| (slot, transfer.behind));
                let line = core::iter::successors(in_line(lane.first), |(_, behind)| in_line(*behind));
                slots.extend(line.map(|(slot, _)| slot));
            }
        }
        for (slot, transfer) in (0..).zip(&self.slots) {
            let arriving = matches!(transfer.stage, Some(Stage::Arriving(_)));
            if arriving && matches!(self.lane(transfer.lane).way, Way::Nic { to, .. } if to == nic) {
                slots.push(slot);
            }
        }
        let named = slots.into_iter().map(|slot| {
            let Transfer { generation, tag, .. } = self.slots[slot as usize];
            (slot, TransferId { slot, generation }, tag)
        });
        named.collect()
    }
}
