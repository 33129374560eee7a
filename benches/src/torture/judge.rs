//! Whether what the job says of itself can be true: what is served was committed, and neither goes back.
//!
//! It sees words alone, in the order in which they came: those of different processes may overtake each other.

use std::collections::{BTreeMap, BTreeSet};

/// See the module.
#[derive(Default)]
pub(super) struct Judge {
    /// What controllers reported, or had recorded when they died.
    committed: BTreeSet<u64>,
    /// The last that each inference rank said that it serves, whichever process it was.
    served: BTreeMap<u32, u64>,
    /// Of those, what no controller has told yet.
    unknown: BTreeSet<u64>,
}

impl Judge {
    /// The newest committed version.
    pub(super) fn newest(&self) -> u64 {
        self.committed.last().copied().unwrap_or(0)
    }

    /// What an inference rank serves, by its own word; 0 where it has said nothing.
    pub(super) fn served(&self, inference: u32) -> u64 {
        self.served.get(&inference).copied().unwrap_or(0)
    }

    /// A controller reported a commit, or its record has it. The same again is a push for those who had missed it.
    pub(super) fn commits(&mut self, version: u64) -> Result<(), String> {
        let newest = self.newest();
        if version < newest {
            return Err(format!("version {version} is committed after version {newest}"));
        }
        self.committed.insert(version);
        self.unknown.remove(&version);
        Ok(())
    }

    /// An inference rank serves a version.
    pub(super) fn serves(&mut self, inference: u32, version: u64) -> Result<(), String> {
        let before = self.served.insert(inference, version).unwrap_or(0);
        if version < before {
            return Err(format!("inference {inference} serves version {version} after version {before}"));
        }
        if !self.committed.contains(&version) {
            self.unknown.insert(version);
        }
        Ok(())
    }

    /// At the end of a job, whose record says this, everybody has said everything.
    pub(super) fn end(&self, recorded: u64, inference: impl Iterator<Item = u32>) -> Result<(), String> {
        if !self.unknown.is_empty() {
            return Err(format!("served, but never committed: versions {:?}", self.unknown));
        }
        let newest = self.newest();
        if recorded != newest {
            return Err(format!("the record says version {recorded}, but {newest} was committed"));
        }
        let mut others = inference.filter(|rank| self.served(*rank) != newest);
        match others.next() {
            Some(rank) => {
                Err(format!("inference {rank} ended with version {}, not {newest}", self.served(rank)))
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Versions 1 to 3 are committed, and served by both ranks; the second has missed one.
    fn good() -> Judge {
        let mut judge = Judge::default();
        for version in 1..=3 {
            // A rank may be heard before the controller.
            judge.serves(0, version).unwrap();
            judge.commits(version).unwrap();
            if version != 2 {
                judge.serves(1, version).unwrap();
            }
        }
        judge
    }

    #[test]
    fn a_good_job_is_good() {
        let mut judge = good();
        judge.commits(3).unwrap();
        judge.serves(1, 3).unwrap();
        judge.end(3, 0..2).unwrap();
    }

    #[test]
    fn nothing_goes_back() {
        let mut judge = good();
        assert_eq!(judge.commits(2).unwrap_err(), "version 2 is committed after version 3");
        assert_eq!(judge.serves(1, 2).unwrap_err(), "inference 1 serves version 2 after version 3");
    }

    #[test]
    fn what_is_served_was_committed() {
        let mut judge = good();
        judge.serves(1, 4).unwrap();
        judge.commits(5).unwrap();
        judge.serves(0, 5).unwrap();
        judge.serves(1, 5).unwrap();
        assert_eq!(judge.end(5, 0..2).unwrap_err(), "served, but never committed: versions {4}");
    }

    #[test]
    fn at_the_end_all_agree() {
        assert_eq!(good().end(2, 0..2).unwrap_err(), "the record says version 2, but 3 was committed");
        assert_eq!(good().end(3, 0..3).unwrap_err(), "inference 2 ended with version 0, not 3");
        let mut judge = good();
        judge.commits(4).unwrap();
        judge.serves(0, 4).unwrap();
        assert_eq!(judge.end(4, 0..2).unwrap_err(), "inference 1 ended with version 3, not 4");
    }
}
