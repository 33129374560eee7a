//! A job's controller in etcd: where it is, what it has committed, and who is in the job, so that another controller can
//! take over.
//!
//! Under `<prefix>/<job>/` are
//!
//! | key | value | lives |
//! |---|---|---|
//! | `controller` | `host:port` of the controller in charge | as long as its lease |
//! | `committed` | the last commit, as a record file has it | for good |
//! | `members/<rank>` | the address of a member, and the digest of its manifest | as long as the controller's lease |
//! | `ended` | why the job ended; empty where it did in good order | until a controller takes charge again |
//!
//! Whoever creates `controller` is in charge. Every transaction that changes anything compares the revision at which that key was
//! created, so a controller that has lost its lease changes nothing any more, however late its request arrives. Manifests are
//! not there: they can be longer than a value of etcd may be, and a member brings its own to every controller that it joins.
//!
//! Nothing that is read from etcd is believed unread: an answer has a bound, a value a form. What etcd says is who to
//! ask; that it is the job's controller is proved as without etcd.

use std::fmt;

use crate::error::RendezvousError;
use crate::locate::shown;

mod candidate;
mod finder;
mod gateway;
mod keeper;
mod office;
mod place;
mod store;
#[cfg(test)]
mod tests;
#[cfg(feature = "tls")]
mod tls;

/// As the controller and a member read etcd's answers: addresses and records in them.
#[cfg(feature = "fuzzing")]
pub(crate) fn read_answer(status: u16, bytes: Vec<u8>) -> usize {
    let entries = store::values(status, bytes).unwrap_or_default();
    let used = |entry: &&store::Entry| {
        let record = std::str::from_utf8(&entry.value).ok().and_then(crate::record::parse);
        record.is_some() || finder::address(entry, "a key").is_ok()
    };
    entries.iter().filter(used).count()
}

pub(crate) use candidate::{Campaign, Candidate};
pub(crate) use finder::Finder;
pub(crate) use office::Office;

/// Where the user's name is.
const USER_VARIABLE: &str = "WEIGHTSYNC_ETCD_USER";

/// Where the password is. Never in an address: those are shown and logged.
const PASSWORD_VARIABLE: &str = "WEIGHTSYNC_ETCD_PASSWORD";

/// The process's environment.
fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Why etcd did not do what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Failure {
    /// It may do so later: it cannot be reached, or has no leader. Whether it has done it is not known.
    Away(String),
    /// It will not, however often it is asked.
    Refused(String),
}

impl Failure {
    /// At this address.
    fn at(self, url: &str) -> RendezvousError {
        RendezvousError::Etcd { url: shown(url).to_owned(), reason: self.to_string() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Away(reason) | Self::Refused(reason)) = self;
        f.write_str(reason)
    }
}
