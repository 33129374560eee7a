//! What will happen, in the order in which it will: a queue of events that can be moved and cancelled.
//!
//! Events of one moment come in the order in which they were put in or last moved, never in an order that depends on
//! addresses or hashes: a simulation replays from its input. Every operation is O(log n).

use crate::time::Time;

/// Children of a node of the heap: four to a node halve its height, and share cache lines.
const ARITY: usize = 4;

/// Names an event for as long as it waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EventId {
    slot: u32,
    generation: u32,
}

/// Sorts events: the earlier first, and at one moment the one that was put in first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    time: Time,
    sequence: u64,
}

struct Slot<E> {
    /// Counts the events that this slot has held, so that an old name finds nothing.
    generation: u32,
    /// Where in the heap.
    position: u32,
    event: Option<E>,
}

/// See the module. Holds up to 2^32 events at a time.
pub struct EventQueue<E> {
    /// Each node is no later than its children.
    heap: Vec<(Key, u32)>,
    slots: Vec<Slot<E>>,
    vacant: Vec<u32>,
    sequence: u64,
}

impl<E> Default for EventQueue<E> {
    fn default() -> Self {
        Self { heap: Vec::new(), slots: Vec::new(), vacant: Vec::new(), sequence: 0 }
    }
}

impl<E> EventQueue<E> {
    /// Nothing will happen.
    pub fn new() -> Self {
        Self::default()
    }

    /// Events that wait.
    pub fn len(&self) -> usize {
        self.heap.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.heap.is_empty()
    }

    /// When the next event happens.
    pub fn next_time(&self) -> Option<Time> {
        self.heap.first().map(|(key, _)| key.time)
    }

    /// `event` will happen at `time`. The queue has no clock: a time before that of events already taken is the caller's
    /// to avoid.
    pub fn push(&mut self, time: Time, event: E) -> EventId {
        let slot = self.vacant.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, position: 0, event: None });
            self.slots.len() as u32 - 1
        });
        let entry = &mut self.slots[slot as usize];
        entry.event = Some(event);
        let id = EventId { slot, generation: entry.generation };
        let key = self.key(time);
        self.heap.push((key, slot));
        self.rise(self.heap.len() - 1);
        id
    }

    /// Takes the next event.
    pub fn pop(&mut self) -> Option<(Time, E)> {
        let &(key, slot) = self.heap.first()?;
        self.take(slot).map(|event| (key.time, event))
    }

    /// The event will not happen; `None` if it already has, or was cancelled before.
    pub fn cancel(&mut self, id: EventId) -> Option<E> {
        self.waits(id).then(|| self.take(id.slot))?
    }

    /// The event happens at another time, after what is there at that time already. Whether it still waited.
    pub fn move_to(&mut self, id: EventId, time: Time) -> bool {
        if !self.waits(id) {
            return false;
        }
        let key = self.key(time);
        let position = self.slots[id.slot as usize].position as usize;
        self.heap[position].0 = key;
        self.settle(position);
        true
    }

    fn key(&mut self, time: Time) -> Key {
        self.sequence += 1;
        Key { time, sequence: self.sequence }
    }

    fn waits(&self, id: EventId) -> bool {
        let slot = self.slots.get(id.slot as usize);
        slot.is_some_and(|slot| slot.generation == id.generation && slot.event.is_some())
    }

    /// Out of the heap and out of its slot.
    fn take(&mut self, slot: u32) -> Option<E> {
        let entry = &mut self.slots[slot as usize];
        let (position, event) = (entry.position as usize, entry.event.take());
        entry.generation = entry.generation.wrapping_add(1);
        self.vacant.push(slot);
        self.heap.swap_remove(position);
        if position < self.heap.len() {
            self.settle(position);
        }
        event
    }

    /// Where its key belongs, be it up or down.
    fn settle(&mut self, position: usize) {
        let position = self.rise(position);
        self.sink(position);
    }

    fn rise(&mut self, mut position: usize) -> usize {
        while position > 0 && self.heap[position].0 < self.heap[(position - 1) / ARITY].0 {
            let parent = (position - 1) / ARITY;
            self.heap.swap(position, parent);
            self.stand(position);
            position = parent;
        }
        self.stand(position);
        position
    }

    fn sink(&mut self, mut position: usize) {
        loop {
            let first = position * ARITY + 1;
            let children = first..self.heap.len().min(first + ARITY);
            let least = children.min_by_key(|&child| self.heap[child].0);
            let Some(child) = least.filter(|&child| self.heap[child].0 < self.heap[position].0) else {
                break;
            };
            self.heap.swap(position, child);
            self.stand(position);
            position = child;
        }
        self.stand(position);
    }

    fn stand(&mut self, position: usize) {
        self.slots[self.heap[position].1 as usize].position = position as u32;
    }
}
