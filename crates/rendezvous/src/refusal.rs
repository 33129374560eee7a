//! Why a connection was not let in, as a class: what is counted and watched over.
//!
//! The reason in words is told beside it; a class never says more than that.

use std::fmt;

#[cfg(feature = "net")]
use crate::error::RendezvousError;

/// Why a connection was not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Refusal {
    /// It does not know the job's secret.
    Secret,
    /// Its side of TLS did not come about: no certificate, or not one of the job's authority.
    Certificate,
    /// It does not speak the protocol, or another version of it, or what it says does not decode.
    Protocol,
    /// It claims more than is allowed: a longer frame, one observer more.
    Bound,
    /// It did not say what was waited for in time.
    Timeout,
    /// It proved itself, but cannot be the rank that it says, or not now.
    Join,
    /// Its socket failed, or it went in the middle.
    Connection,
}

impl Refusal {
    /// All of them.
    pub const ALL: [Refusal; 7] = [
        Self::Secret,
        Self::Certificate,
        Self::Protocol,
        Self::Bound,
        Self::Timeout,
        Self::Join,
        Self::Connection,
    ];

    /// The class of an error between accepting a connection and its first message.
    #[cfg(feature = "net")]
    pub(crate) fn of(error: &RendezvousError) -> Self {
        match error {
            RendezvousError::Secret { .. } => Self::Secret,
            #[cfg(feature = "tls")]
            RendezvousError::Tls { .. } => Self::Certificate,
            RendezvousError::NotWeightsync { .. }
            | RendezvousError::ProtocolVersion { .. }
            | RendezvousError::Malformed { .. }
            | RendezvousError::Unexpected { .. } => Self::Protocol,
            RendezvousError::FrameTooLong { .. } => Self::Bound,
            RendezvousError::Deadline { .. } => Self::Timeout,
            RendezvousError::Refused { .. } => Self::Join,
            _ => Self::Connection,
        }
    }

    /// One word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Secret => "secret",
            Self::Certificate => "certificate",
            Self::Protocol => "protocol",
            Self::Bound => "bound",
            Self::Timeout => "timeout",
            Self::Join => "join",
            Self::Connection => "connection",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
