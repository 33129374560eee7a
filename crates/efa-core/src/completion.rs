//! What a rail's poll brings back.

use std::fmt;

use crate::device::DeviceSlice;
use crate::error::{Errno, OpError};
use crate::in_flight::OpId;
use crate::memory::{Lease, LeaseMut, Target};
use crate::peer::PeerId;

/// What kind of operation was posted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OpKind {
    /// Our bytes to a peer's region.
    Write,
    /// A peer's bytes to our buffer.
    Read,
    /// A message to a peer.
    Send,
    /// A buffer for a message from any peer.
    Receive,
}

impl fmt::Display for OpKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Write => "write",
            Self::Read => "read",
            Self::Send => "send",
            Self::Receive => "receive",
        })
    }
}

/// The buffer of an operation, as it went in.
#[derive(Debug)]
pub enum Held {
    /// The source of a write or a send.
    Shared(Lease),
    /// The destination of a read or a receive.
    Unique(LeaseMut),
    /// The source of a write, in device memory.
    Device(DeviceSlice),
    /// The source of a write, in memory that others write to.
    Target(Target),
}

impl Held {
    /// The buffer of a write or a send from host memory.
    pub fn shared(self) -> Option<Lease> {
        match self {
            Self::Shared(lease) => Some(lease),
            _ => None,
        }
    }

    /// The buffer of a write from device memory.
    pub fn device(self) -> Option<DeviceSlice> {
        match self {
            Self::Device(slice) => Some(slice),
            _ => None,
        }
    }

    /// The buffer of a write from memory that others write to.
    pub fn target(self) -> Option<Target> {
        match self {
            Self::Target(slice) => Some(slice),
            _ => None,
        }
    }

    /// The buffer of a read or a receive.
    pub fn unique(self) -> Option<LeaseMut> {
        match self {
            Self::Unique(lease) => Some(lease),
            _ => None,
        }
    }
}

impl From<Lease> for Held {
    fn from(lease: Lease) -> Self {
        Self::Shared(lease)
    }
}

impl From<DeviceSlice> for Held {
    fn from(slice: DeviceSlice) -> Self {
        Self::Device(slice)
    }
}

impl From<Target> for Held {
    fn from(slice: Target) -> Self {
        Self::Target(slice)
    }
}

impl From<LeaseMut> for Held {
    fn from(lease: LeaseMut) -> Self {
        Self::Unique(lease)
    }
}

/// An operation that a closed rail had in flight. Whether it took place is unknown.
#[derive(Debug)]
pub struct Unfinished {
    /// The caller's token.
    pub token: u64,
    /// What kind.
    pub kind: OpKind,
    /// Its buffer, which nobody touches any more.
    pub held: Held,
}

/// An operation that ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpDone {
    /// The bytes moved: for a receive the length of the message, else the length of the buffer.
    pub bytes: usize,
}

/// An error that names none of our operations, such as a peer's access that this rail refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The rail.
    pub on: String,
    /// libfabric's error.
    pub errno: Errno,
    /// The provider's own error number.
    pub provider_errno: i32,
    /// The provider's own words.
    pub provider_text: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: a peer's access failed: {}, provider says '{}' ({}); what it was writing must be treated as torn",
            self.on, self.errno, self.provider_text, self.provider_errno
        )
    }
}

impl std::error::Error for Fault {}

/// One entry of the completion queue.
#[derive(Debug)]
#[non_exhaustive]
pub enum Completion {
    /// An operation of ours has ended, and its buffer comes back, on success and on failure alike.
    Op {
        /// Which.
        id: OpId,
        /// The caller's token.
        token: u64,
        /// What kind.
        kind: OpKind,
        /// To or from whom; `None` for a receive.
        peer: Option<PeerId>,
        /// How it ended.
        result: Result<OpDone, Box<OpError>>,
        /// Its buffer.
        lease: Held,
    },
    /// A peer's write has landed here, all of it, and carried this number.
    Immediate {
        /// The number.
        data: u32,
    },
    /// Something failed that was not ours.
    Fault(Box<Fault>),
}
