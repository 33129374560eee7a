//! What is committed, who has it, and where it lies: the words for that in messages.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What the bytes of a rank are when it joins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Holds {
    /// Nothing that was pushed: it has just started, or is a trainer.
    #[default]
    Nothing,
    /// This committed version, whole.
    Version(Commit),
    /// It was prepared for a push and has not heard how that ended.
    Undecided {
        /// The version and the attempt.
        attempt: Commit,
        /// What it serves meanwhile, whole: a rank that stages versions.
        serves: Option<Commit>,
    },
    /// A push began that was not committed.
    Torn,
}

impl Holds {
    /// The commit that brought the bytes that it serves.
    pub fn served(self) -> Option<Commit> {
        match self {
            Self::Version(commit) => Some(commit),
            Self::Undecided { serves, .. } => serves,
            Self::Nothing | Self::Torn => None,
        }
    }

    /// Whether it was prepared for the attempt that became this commit, and has not heard so.
    pub fn missed(self, committed: Option<Commit>) -> bool {
        matches!(self, Self::Undecided { attempt, .. } if Some(attempt) == committed)
    }
}

/// A version and the attempt that brought it: what the controller records when it decides to commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// The version.
    pub version: u64,
    /// The attempt.
    pub push: PushId,
}

/// 128 random bits that name one attempt to push one version, so that nothing of an aborted attempt counts for the
/// next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PushId(pub [u8; 16]);

impl fmt::Display for PushId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Which arena of an inference rank that stages versions is written to, 0 or 1, as the endpoint that it joined with numbers
/// them: 0 is the one that it did not serve. Every commit since all have joined turns it over, and so does one that the rank
/// had missed ([`Peer::bank`](crate::Peer::bank)). Ranks with one arena take no notice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Bank(bool);

impl Bank {
    /// The other one.
    #[must_use]
    pub fn turned(self) -> Self {
        Self(!self.0)
    }

    /// 0 or 1.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}
