//! Sets of logical CPUs in the kernel's list form, `0-47,96-143`.

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
        self.0.iter().any(|range| range.contains(&cpu))
    }

    /// Every CPU, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        self.0.iter().cloned().flatten()
    }
}

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
    use std::collections::BTreeSet;

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
            prop_assert!(cpus.iter().all(|&cpu| set.contains(cpu)));
            prop_assert_eq!(set.to_string().parse(), Ok(set));
        }
    }
}
