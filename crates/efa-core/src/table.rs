//! A bounded table whose keys never name a later tenant of the same slot.

/// Names an entry: a slot and how often it has been given out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) index: u32,
    pub(crate) generation: u64,
}

struct Slot<T> {
    generation: u64,
    value: Option<T>,
}

/// Values by [`Key`]. Removing an entry makes its key unknown for ever.
pub(crate) struct Table<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    entries_max: usize,
}

impl<T> Table<T> {
    pub(crate) fn new(entries_max: usize) -> Self {
        Self { slots: Vec::new(), free: Vec::new(), entries_max }
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.len() >= self.entries_max
    }

    /// Stores a value; gives it back when the table is full.
    pub(crate) fn insert(&mut self, value: T) -> Result<Key, T> {
        if let Some(index) = self.free.pop()
            && let Some(slot) = self.slots.get_mut(index as usize)
        {
            slot.value = Some(value);
            return Ok(Key { index, generation: slot.generation });
        }
        match u32::try_from(self.slots.len()) {
            Ok(index) if self.slots.len() < self.entries_max => {
                self.slots.push(Slot { generation: 0, value: Some(value) });
                Ok(Key { index, generation: 0 })
            }
            _ => Err(value),
        }
    }

    pub(crate) fn get(&self, key: Key) -> Option<&T> {
        let slot = self.slots.get(key.index as usize)?;
        slot.value.as_ref().filter(|_| slot.generation == key.generation)
    }

    pub(crate) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let slot = self.slots.get_mut(key.index as usize)?;
        slot.value.as_mut().filter(|_| slot.generation == key.generation)
    }

    pub(crate) fn remove(&mut self, key: Key) -> Option<T> {
        let slot = self.slots.get_mut(key.index as usize).filter(|slot| slot.generation == key.generation)?;
        let value = slot.value.take()?;
        slot.generation += 1;
        self.free.push(key.index);
        Some(value)
    }

    /// Takes every value out, in slot order.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = T> + '_ {
        self.free.clear();
        self.slots.drain(..).filter_map(|slot| slot.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_unknown_after_removal() {
        let mut table = Table::new(2);
        let first = table.insert('a').unwrap();
        assert_eq!(table.remove(first), Some('a'));
        let second = table.insert('b').unwrap();
        assert_eq!(first.index, second.index, "the slot is reused");
        assert_eq!(table.get(first), None);
        assert_eq!(table.remove(first), None);
        assert_eq!(table.get(second), Some(&'b'));
    }

    #[test]
    fn a_full_table_gives_the_value_back() {
        let mut table = Table::new(1);
        assert!(!table.is_full());
        table.insert('a').unwrap();
        assert!(table.is_full());
        assert_eq!(table.insert('b'), Err('b'));
        assert_eq!(table.drain().collect::<String>(), "a");
    }
}
