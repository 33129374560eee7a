//! The rail to the same host: the receiver's memory is a memfd that the sender maps and copies into.
//!
//! A receiver makes its arena with [`SharedFile::create`] and tells it to peers through a [`Doorman`], a socket that
//! hands the file descriptor to whoever knows the key and runs as the same user. A sender attaches the regions
//! ([`LocalPeer`]) and copies; a WRITE is delivered when the copy has returned, and its receiver, if it counts it, has been told.
//! Nothing is left in /dev/shm, whoever dies.
//!
//! This module must never form a reference to bytes that another process may write, and never maps a file that its
//! owner could still shrink.

mod doorman;
mod rail;
#[allow(unsafe_code)]
mod shared;
mod telling;

pub use doorman::{Doorman, DoormanAddress, KEY_BYTES, fetch};
#[cfg(feature = "cuda")]
pub(crate) use doorman::{FILES_MAX, MESSAGE_BYTES_MAX, Offer, Offers, fetch_all, fetch_teller};
pub use rail::{LocalPeer, LocalRail, LocalSource};
pub use shared::{Attached, SharedFile};
#[cfg(any(test, feature = "cuda"))]
pub(crate) use telling::Teller;
#[cfg(feature = "cuda")]
pub(crate) use telling::{Arrived, Untold};

/// What can go wrong with shared memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LocalError {
    /// A system call failed.
    #[error("{call} failed: {source}")]
    Call {
        /// Which.
        call: &'static str,
        /// Why.
        source: rustix::io::Errno,
    },
    /// There is no room for an arena.
    #[error(
        "no room for {bytes} bytes of shared memory: {source}; check the memory and cgroup limits of this process"
    )]
    NoRoom {
        /// Bytes asked for.
        bytes: u64,
        /// The system's reason.
        source: rustix::io::Errno,
    },
    /// A peer's file could change its length under us.
    #[error("the peer's shared memory is not sealed against shrinking; is it a weightsync of this version?")]
    NotSealed,
    /// Memory that is not that of the file.
    #[error("the memory to renew is not the whole arena of this shared file")]
    NotItsArena,
    /// A peer's file is not as long as it said.
    #[error(
        "the peer's region {region} has {found} bytes of shared memory where its manifest says {expected}"
    )]
    Length {
        /// The region.
        region: u32,
        /// What the manifest says.
        expected: u64,
        /// What was found.
        found: u64,
    },
    /// The peer's socket does not answer.
    #[error("cannot fetch shared memory from {address}: {reason}; is the inference rank alive?")]
    Doorman {
        /// Its address.
        address: String,
        /// What happened.
        reason: String,
    },
}

pub(crate) fn call(name: &'static str) -> impl FnOnce(rustix::io::Errno) -> LocalError {
    move |source| LocalError::Call { call: name, source }
}
