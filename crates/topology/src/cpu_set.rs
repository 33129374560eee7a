//! Sets of logical CPUs, in the kernel's list form `0-47,96-143` and as the masks of topology dumps.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Serialize, Serializer};

/// The highest CPU index that is believed; Linux is built for at most 8192 CPUs.
pub const CPU_INDEX_MAX: u32 = 8191;

/// Logical CPUs, as ascending ranges that do not touch.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CpuSet(Vec<RangeInclusive<u32>>);

impl CpuSet {
    /// How many CPUs.
    pub fn count(&self) -> usize {
        self.iter().count()
    }

    /// No CPU at all, as in a NUMA node of memory alone.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `cpu` is in the set.
    pub fn contains(&self, cpu: u32) -> bool {
        let at = self.0.partition_point(|range| *range.end() < cpu);
        self.0.get(at).is_some_and(|range| range.contains(&cpu))
    }

    /// The lowest CPU.
    pub fn first(&self) -> Option<u32> {
        self.0.first().map(|range| *range.start())
    }

    /// Every CPU, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        self.0.iter().cloned().flatten()
    }

    /// The set of these CPUs, in any order. They come from other sets, so that they are at most [`CPU_INDEX_MAX`].
    pub(crate) fn of(cpus: impl IntoIterator<Item = u32>) -> Self {
        Self::of_ascending(cpus.into_iter().collect::<BTreeSet<u32>>())
    }

    fn of_ascending(cpus: impl IntoIterator<Item = u32>) -> Self {
        let mut ranges: Vec<RangeInclusive<u32>> = Vec::new();
        for cpu in cpus {
            match ranges.last_mut() {
                Some(last) if last.end() + 1 == cpu => *last = *last.start()..=cpu,
                _ => ranges.push(cpu..=cpu),
            }
        }
        Self(ranges)
    }

    /// Hexadecimal words of 32 bits between commas, the highest first: `0x0000ffff,0xffffffff` as hwloc writes it,
    /// which leaves words of zeros empty, or `000000ff,ffff0000` as NCCL does.
    pub(crate) fn from_mask(text: &str) -> Result<Self, NotACpuMask> {
        const WORDS_MAX: usize = (CPU_INDEX_MAX as usize + 1) / 32;
        let mut cpus = Vec::new();
        for (index, word) in text.trim().rsplit(',').enumerate() {
            let digits = word.strip_prefix("0x").unwrap_or(word);
            if index >= WORDS_MAX || digits.len() > 8 || !digits.bytes().all(|c| c.is_ascii_hexdigit()) {
                return Err(NotACpuMask);
            }
            let bits = if digits.is_empty() { 0 } else { u32::from_str_radix(digits, 16).unwrap_or(0) };
            cpus.extend((0..32).filter(|bit| bits >> bit & 1 == 1).map(|bit| index as u32 * 32 + bit));
        }
        Ok(Self::of_ascending(cpus))
    }
}

/// The text is not a mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a mask such as 0x0000ffff,0xffffffff, of at most {} CPUs", CPU_INDEX_MAX + 1)]
pub(crate) struct NotACpuMask;

/// The text is not a list of ascending CPU ranges.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a list of CPUs such as 0-47,96-143, ascending and at most {CPU_INDEX_MAX}")]
pub struct NotACpuSet;

impl FromStr for CpuSet {
    type Err = NotACpuSet;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut ranges: Vec<RangeInclusive<u32>> = Vec::new();
        for item in text.split(',').filter(|_| !text.is_empty()) {
            let (first, last) = item.split_once('-').unwrap_or((item, item));
            let (first, last) = (index(first)?, index(last)?);
            match ranges.last_mut() {
                Some(before) if first <= *before.end() => return Err(NotACpuSet),
                _ if last < first => return Err(NotACpuSet),
                Some(before) if first == before.end() + 1 => *before = *before.start()..=last,
                _ => ranges.push(first..=last),
            }
        }
        Ok(Self(ranges))
    }
}

fn index(text: &str) -> Result<u32, NotACpuSet> {
    match text.parse() {
        Ok(cpu) if cpu <= CPU_INDEX_MAX && !text.starts_with('+') => Ok(cpu),
        _ => Err(NotACpuSet),
    }
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, range) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{}", range.start())?;
            if range.end() > range.start() {
                write!(f, "-{}", range.end())?;
            }
        }
        Ok(())
    }
}

impl Serialize for CpuSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn masks_of_both_dumps() {
        for (text, list) in [
            ("0x0000ffff,0xffffffff", "0-47"),
            ("0xffffffff,0xffff0000,0x0", "48-95"),
            ("0x1,,0x3", "0-1,64"),
            ("000000ff,ffff0000,00ffffff", "0-23,48-71"),
            ("0x0", ""),
            ("", ""),
        ] {
            assert_eq!(CpuSet::from_mask(text), Ok(list.parse().unwrap()), "{text:?}");
        }
        let too_many = ",".repeat((CPU_INDEX_MAX as usize + 1) / 32);
        for text in ["0xf...f", "0x123456789", "g", "+1", "0x0x1", &too_many] {
            assert_eq!(CpuSet::from_mask(text), Err(NotACpuMask), "{text:?}");
        }
    }

    #[test]
    fn odd_lists_are_refused() {
        for text in
            [",", "1,", "3-1", "1,1", "2-4,3", "5,4", "a", "-1", "+1", "1--2", "8192", "0-99999999999", "0 1"]
        {
            assert_eq!(text.parse::<CpuSet>(), Err(NotACpuSet), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_plain_set(cpus in proptest::collection::btree_set(0..=CPU_INDEX_MAX, 0..64)) {
            // The plain form, one item per CPU, parses to the same set as the kernel's ranges.
            let items: Vec<String> = cpus.iter().map(u32::to_string).collect();
            let set: CpuSet = items.join(",").parse().unwrap();
            prop_assert_eq!(set.iter().collect::<BTreeSet<_>>(), cpus.clone());
            prop_assert_eq!(set.count(), cpus.len());
            prop_assert_eq!(set.is_empty(), cpus.is_empty());
            prop_assert_eq!(set.first(), cpus.first().copied());
            prop_assert_eq!(CpuSet::of(cpus.iter().rev().copied()), set.clone());
            prop_assert!((0..=CPU_INDEX_MAX).all(|cpu| set.contains(cpu) == cpus.contains(&cpu)));
            prop_assert_eq!(set.to_string().parse(), Ok(set));
        }
    }
}
