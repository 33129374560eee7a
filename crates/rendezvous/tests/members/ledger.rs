//! What was decided, said and confirmed in a run: what members may say is compared with it.

use std::collections::{BTreeMap, BTreeSet};

use rendezvous::{Commit, PushId};
use xfer_plan::Rank;

#[derive(Default)]
pub(crate) struct Ledger {
    committed: BTreeMap<u64, BTreeSet<PushId>>,
    /// Attempts of which somebody was told that they are aborted.
    aborted: BTreeSet<PushId>,
    /// Who was told to prepare for an attempt.
    asked: BTreeMap<PushId, BTreeSet<Rank>>,
    confirmed: BTreeSet<(Rank, PushId)>,
    /// A commit that nobody has recorded may be forgotten.
    pub(crate) forgets: bool,
}

impl Ledger {
    pub(crate) fn commit(&mut self, commit: Commit) {
        assert!(!self.aborted.contains(&commit.push), "committed after somebody was told otherwise");
        self.committed.entry(commit.version).or_default().insert(commit.push);
    }

    pub(crate) fn is_committed(&self, version: u64, push: PushId) -> bool {
        self.committed.get(&version).is_some_and(|pushes| pushes.contains(&push))
    }

    /// Somebody is told that this version is committed.
    pub(crate) fn told_committed(&self, version: u64) {
        assert!(self.committed.contains_key(&version), "version {version} is not committed");
    }

    /// Somebody is told that this attempt is aborted.
    pub(crate) fn told_aborted(&mut self, version: u64, push: PushId) {
        if !self.forgets {
            assert!(!self.is_committed(version, push), "the attempt to push version {version} was committed");
            self.aborted.insert(push);
        }
    }

    pub(crate) fn ask(&mut self, rank: Rank, push: PushId) {
        self.asked.entry(push).or_default().insert(rank);
    }

    pub(crate) fn asked(&self, push: PushId) -> BTreeSet<Rank> {
        self.asked.get(&push).cloned().unwrap_or_default()
    }

    pub(crate) fn confirm(&mut self, rank: Rank, push: PushId) {
        self.confirmed.insert((rank, push));
    }

    /// Trainers are told that the attempt is committed, and who has not confirmed that.
    pub(crate) fn told_done(&self, version: u64, push: PushId, unconfirmed: &[Rank]) {
        assert!(self.is_committed(version, push));
        for rank in self.asked(push) {
            let confirmed = self.confirmed.contains(&(rank, push));
            assert_eq!(confirmed, !unconfirmed.contains(&rank), "{rank} of {unconfirmed:?}");
        }
    }
}
