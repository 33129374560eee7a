//! Registrations of foreign memory, found again by what was allocated and not by where it lies.
//!
//! An allocator gives addresses out again. A registration that was found by its address would then send a NIC to pages
//! that are somebody else's. So an entry counts only for a segment with the same name and the same range, and what a
//! new segment overlaps is given back to be closed.

use std::collections::BTreeMap;

use crate::segment::{Identity, Segment};

/// How many registrations are kept. A framework has some hundred segments.
pub const CACHE_ENTRIES_MAX: usize = 65_536;

/// Registrations by segment.
#[derive(Debug)]
pub struct RegistrationCache<R> {
    /// By the segment's start. Disjoint.
    entries: BTreeMap<u64, Entry<R>>,
}

#[derive(Debug)]
struct Entry<R> {
    end: u64,
    identity: Identity,
    registration: R,
}

/// What a segment's registration is, and which others are of no use any more.
#[derive(Debug, PartialEq, Eq)]
pub struct Found<'a, R> {
    /// The segment's own.
    pub registration: Cached<'a, R>,
    /// Of memory that is gone: to be closed.
    pub stale: Vec<R>,
}

/// A registration, and who keeps it.
#[derive(Debug, PartialEq, Eq)]
pub enum Cached<'a, R> {
    /// The cache keeps it.
    Kept(&'a R),
    /// The driver gives the segment no name, or the cache is full: it is the caller's, to be closed after use.
    Unkept(R),
}

impl<R> Cached<'_, R> {
    /// The registration.
    pub fn get(&self) -> &R {
        match self {
            Self::Kept(registration) => registration,
            Self::Unkept(registration) => registration,
        }
    }
}

impl<R> Default for RegistrationCache<R> {
    fn default() -> Self {
        Self { entries: BTreeMap::new() }
    }
}

impl<R> RegistrationCache<R> {
    /// The registration of a segment, made with `register` if there is none of this very allocation.
    ///
    /// # Errors
    ///
    /// What `register` fails with, and the stale registrations that were found: they are to be closed all the same.
    pub fn find<E>(
        &mut self,
        segment: &Segment,
        register: impl FnOnce(&Segment) -> Result<R, E>,
    ) -> Result<Found<'_, R>, (E, Vec<R>)> {
        let stale = self.remove_overlapping(segment);
        let start = segment.range.start;
        let may_keep = self.entries.len() < CACHE_ENTRIES_MAX;
        let known = self.entries.contains_key(&start);
        match segment.identity {
            Some(identity) if known || may_keep => {
                let entry = match self.entries.entry(start) {
                    std::collections::btree_map::Entry::Occupied(occupied) => occupied.into_mut(),
                    std::collections::btree_map::Entry::Vacant(vacant) => match register(segment) {
                        Ok(registration) => {
                            vacant.insert(Entry { end: segment.range.end, identity, registration })
                        }
                        Err(error) => return Err((error, stale)),
                    },
                };
                Ok(Found { registration: Cached::Kept(&entry.registration), stale })
            }
            _ => match register(segment) {
                Ok(registration) => Ok(Found { registration: Cached::Unkept(registration), stale }),
                Err(error) => Err((error, stale)),
            },
        }
    }

    /// Takes out every registration, to be closed.
    pub fn drain(&mut self) -> Vec<R> {
        std::mem::take(&mut self.entries).into_values().map(|entry| entry.registration).collect()
    }

    /// How many are kept.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Takes out what overlaps the segment and is not its own.
    fn remove_overlapping(&mut self, segment: &Segment) -> Vec<R> {
        let overlapping = self.entries.range(..segment.range.end).rev();
        // Entries are disjoint: going down, the first that ends before the segment is the last to look at.
        let stale: Vec<u64> = overlapping
            .take_while(|(_, entry)| entry.end > segment.range.start)
            .filter(|(start, entry)| {
                **start != segment.range.start
                    || entry.end != segment.range.end
                    || Some(entry.identity) != segment.identity
            })
            .map(|(start, _)| *start)
            .collect();
        stale.iter().filter_map(|start| self.entries.remove(start)).map(|entry| entry.registration).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// One step of an allocator that gives addresses out again.
    #[derive(Debug, Clone)]
    enum Step {
        /// Allocates here, unless something is in the way.
        Allocate { start: u64, len: u64, named: bool },
        /// Frees the allocation of this number, if it is there.
        Free(usize),
        /// Asks for the registration of the allocation of this number.
        Use { index: usize, fails: bool },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..30_u64, 1..8_u64, prop::bool::weighted(0.9)).prop_map(|(start, len, named)| Step::Allocate {
                start,
                len,
                named
            }),
            (0..8_usize).prop_map(Step::Free),
            (0..8_usize, prop::bool::weighted(0.2)).prop_map(|(index, fails)| Step::Use { index, fails }),
            (0..8_usize).prop_map(|index| Step::Use { index, fails: false }),
        ]
    }

    proptest! {
        /// A registration is written as the number of the allocation that it was made for.
        #[test]
        fn no_registration_outlives_its_allocation(steps in vec(step(), 0..60)) {
            let mut cache = RegistrationCache::<u64>::default();
            let mut live: Vec<(u64, Segment)> = Vec::new();
            let (mut open, mut next) = (Vec::<u64>::new(), 1_u64);
            for step in steps {
                match step {
                    Step::Allocate { start, len, named } => {
                        let range: Range<u64> = start..start + len;
                        let free = live.iter().all(|(_, other)| other.range.end <= range.start || range.end <= other.range.start);
                        if free {
                            let identity = named.then_some(Identity { buffer: next, block: 0 });
                            live.push((next, Segment { range, identity, is_mapped: false }));
                            next += 1;
                        }
                    }
                    Step::Free(index) => if index < live.len() { live.remove(index); },
                    Step::Use { index, fails } => {
                        let Some((name, segment)) = live.get(index).cloned() else { continue };
                        let known = open.contains(&name);
                        let mut made = false;
                        let found = cache.find(&segment, |_| { made = true; if fails { Err(()) } else { Ok(name) } });
                        let stale = match found {
                            Ok(Found { registration, stale }) => {
                                prop_assert_eq!(*registration.get(), name);
                                prop_assert_eq!(matches!(registration, Cached::Kept(_)), segment.identity.is_some());
                                prop_assert_eq!(made, !known, "registered once");
                                if made && segment.identity.is_some() { open.push(name); }
                                stale
                            }
                            Err(((), stale)) => { prop_assert!(fails && !known); stale }
                        };
                        for stale in stale {
                            prop_assert!(live.iter().all(|(name, _)| *name != stale), "memory in use was taken for gone");
                            let at = open.iter().position(|open| *open == stale);
                            prop_assert!(at.is_some(), "given back twice");
                            open.remove(at.unwrap());
                        }
                    }
                }
                prop_assert_eq!(cache.len(), open.len());
            }
            let mut rest = cache.drain();
            rest.sort_unstable();
            open.sort_unstable();
            prop_assert_eq!(rest, open, "every registration is given back once");
            prop_assert!(cache.is_empty());
        }
    }
}
