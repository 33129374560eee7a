//! What can go wrong, one type per family of operations.
//!
//! Messages name the thing and say what to do next. Failures of libfabric itself are [`CallError`]s inside them.

use std::fmt;

use crate::completion::OpKind;
use crate::info::Provider;
use crate::peer::PeerId;
use crate::region::RegionId;

/// A libfabric error number and its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Errno {
    /// The positive error number: the system's own below 256, libfabric's from there on.
    pub code: i32,
    /// libfabric's words for it.
    pub text: String,
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.text, self.code)
    }
}

/// A libfabric call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{call} failed on {on}: {errno}")]
pub struct CallError {
    /// The call's C name.
    pub call: &'static str,
    /// The rail, domain or provider it was made on.
    pub on: String,
    /// What libfabric answered.
    pub errno: Errno,
}

/// A range does not lie inside what it was taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes from offset {offset} on do not lie inside {available} bytes")]
pub struct RangeError {
    /// Where the range starts.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
    /// How many bytes there are.
    pub available: u64,
}

/// Memory could not be had.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot map {bytes} bytes: {source}; ask for fewer, or raise the limits on address space and locked memory"
)]
pub struct MemoryError {
    /// How many bytes were asked for.
    pub bytes: usize,
    /// The system's answer.
    pub source: std::io::Error,
}

/// Why [`Library::infos`](crate::Library::infos) found nothing to use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InfoError {
    /// The library offers nothing that fits the hints.
    #[error("libfabric {version} ({path}) offers no '{provider}' that fits{wish}; {advice}")]
    NoProvider {
        /// What was asked for.
        provider: Provider,
        /// The library's version.
        version: libfabric_sys::Version,
        /// The library's path.
        path: String,
        /// The other wishes, in words.
        wish: String,
        /// What to try.
        advice: &'static str,
    },
    /// A hint that this provider cannot use.
    #[error("'{provider}' cannot be asked for {hint}; leave it out")]
    Unusable {
        /// What was asked for.
        provider: Provider,
        /// The hint, in words.
        hint: &'static str,
    },
    /// A name with a zero byte inside.
    #[error("the {what} name {name:?} has a zero byte inside")]
    Name {
        /// Which name.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// libfabric could not allocate.
    #[error("libfabric could not allocate an info: the process is out of memory")]
    OutOfMemory,
    /// `fi_getinfo` failed otherwise.
    #[error(transparent)]
    Call(#[from] CallError),
}

/// A rail could not be opened, or has broken down.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RailError {
    /// The configuration asks for more than the provider has, or for nothing.
    #[error("{what} is {asked}, but {on} allows 1 to {allowed}; start from RailConfig::for_info")]
    Config {
        /// Which setting.
        what: &'static str,
        /// Its value.
        asked: u64,
        /// The largest value allowed.
        allowed: u64,
        /// The provider and domain.
        on: String,
    },
    /// The provider cannot carry what every rail needs.
    #[error("{on} cannot be used: {why}")]
    Unsuitable {
        /// The provider and domain.
        on: String,
        /// What it lacks.
        why: String,
    },
    /// A libfabric call failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The system refused a file descriptor or a wait on one.
    #[error("{on}: {what} failed: {source}")]
    System {
        /// The rail.
        on: String,
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The provider reported the end of an operation that is not in flight. The rail's books no longer agree with the
    /// provider's, so nothing more may be posted.
    #[error(
        "{on}: the provider completed an operation that is not in flight (context {context:#x}); close the rail and \
         report the provider's version"
    )]
    StrayCompletion {
        /// The rail.
        on: String,
        /// The context that the provider named.
        context: usize,
    },
}

/// A peer could not be inserted or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeerError {
    /// Not an address of this rail's kind.
    #[error("{on} cannot reach an address of {address_bytes} bytes: {why}; both ends must use one provider")]
    Address {
        /// The rail.
        on: String,
        /// The length of the address.
        address_bytes: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The address has been inserted before.
    #[error("{on} knows this address as {peer}")]
    Known {
        /// The rail.
        on: String,
        /// The peer that has it.
        peer: PeerId,
    },
    /// The rail knows no such peer, or no longer.
    #[error("{on} knows no {peer}")]
    Unknown {
        /// The rail.
        on: String,
        /// The peer.
        peer: PeerId,
    },
    /// Operations to the peer are in flight.
    #[error("{on}: {peer} has {in_flight} operations in flight; poll until they are done, or close the rail")]
    Busy {
        /// The rail.
        on: String,
        /// The peer.
        peer: PeerId,
        /// How many.
        in_flight: u32,
    },
    /// The table of peers is full.
    #[error("{on} already knows {max} peers")]
    Full {
        /// The rail.
        on: String,
        /// How many it can know.
        max: usize,
    },
    /// A libfabric call failed.
    #[error(transparent)]
    Call(#[from] CallError),
}

/// Memory could not be registered, or a region not be closed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegionError {
    /// Nothing to expose.
    #[error("{on}: an empty range cannot be exposed or shared")]
    Empty {
        /// The rail.
        on: String,
    },
    /// The rail was opened for host memory alone.
    #[error(
        "{on} was not opened for device memory; ask for it with Hints::device_memory, which not every provider grants"
    )]
    NoDeviceMemory {
        /// The rail.
        on: String,
    },
    /// The rail knows no such region, or no longer.
    #[error("{on} knows no {region}")]
    Unknown {
        /// The rail.
        on: String,
        /// The region.
        region: RegionId,
    },
    /// Operations that name the region are in flight.
    #[error(
        "{on}: {region} has {in_flight} operations in flight; poll until they are done, or close the rail"
    )]
    Busy {
        /// The rail.
        on: String,
        /// The region.
        region: RegionId,
        /// How many.
        in_flight: u32,
    },
    /// The table of regions is full.
    #[error("{on} already has {max} regions; register larger ranges")]
    Full {
        /// The rail.
        on: String,
        /// How many it can have.
        max: usize,
    },
    /// No key could be found that the provider does not know yet.
    #[error(
        "{on}: {tries} random keys of {key_bytes} bytes were all taken; close regions that are not needed"
    )]
    NoKey {
        /// The rail.
        on: String,
        /// How many keys were tried.
        tries: u32,
        /// The length of a key.
        key_bytes: usize,
    },
    /// The kernel gave no random bytes for a key.
    #[error("{on}: no random bytes for a region key: {source}")]
    Random {
        /// The rail.
        on: String,
        /// The system's answer.
        source: getrandom::Error,
    },
    /// The provider's key does not fit in 64 bits.
    #[error("{on} has keys of more than 8 bytes, which a RemoteRegion cannot carry")]
    RawKey {
        /// The rail.
        on: String,
    },
    /// A libfabric call failed.
    #[error(transparent)]
    Call(#[from] CallError),
}

/// An operation was refused for good: posting it again as it is will fail again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PostError {
    /// The rail knows no such peer, or no longer.
    #[error("{on} knows no {peer}")]
    UnknownPeer {
        /// The rail.
        on: String,
        /// The peer.
        peer: PeerId,
    },
    /// The rail knows no such region, or no longer.
    #[error("{on} knows no {region}")]
    UnknownRegion {
        /// The rail.
        on: String,
        /// The region.
        region: RegionId,
    },
    /// The buffer is not inside the region it names.
    #[error("{on}: the {len} bytes at {address:#x} do not lie inside {region}; register their memory")]
    OutsideRegion {
        /// The rail.
        on: String,
        /// The region.
        region: RegionId,
        /// Where the buffer starts.
        address: usize,
        /// How long it is.
        len: usize,
    },
    /// The two sides of a transfer differ in length.
    #[error("{on}: a local buffer of {local_bytes} bytes cannot meet a remote span of {remote_bytes}")]
    Length {
        /// The rail.
        on: String,
        /// The local length.
        local_bytes: usize,
        /// The remote length.
        remote_bytes: u64,
    },
    /// The provider cannot carry so much in one operation.
    #[error("{on}: {len} bytes in one operation, but the provider carries at most {max}; cut it into chunks")]
    TooLong {
        /// The rail.
        on: String,
        /// The length asked for.
        len: usize,
        /// The provider's limit.
        max: usize,
    },
    /// The rail has broken down before.
    #[error("{on} has broken down; close it and open another")]
    Broken {
        /// The rail.
        on: String,
    },
    /// A libfabric call failed.
    #[error(transparent)]
    Call(#[from] CallError),
}

/// An operation ended in error. Its buffer came back with the same completion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpError {
    /// The rail.
    pub on: String,
    /// What kind of operation it was.
    pub kind: OpKind,
    /// Whom it was to or from; `None` for a receive.
    pub peer: Option<PeerId>,
    /// The peer's address, in words.
    pub peer_name: String,
    /// The caller's token.
    pub token: u64,
    /// libfabric's error.
    pub errno: Errno,
    /// The provider's own error number.
    pub provider_errno: i32,
    /// The provider's own words.
    pub provider_text: String,
}

impl OpError {
    /// What to do about it.
    pub fn advice(&self) -> &'static str {
        use libfabric_sys as sys;
        match self.errno.code {
            sys::FI_ECANCELED
            | sys::FI_ECONNRESET
            | sys::FI_ECONNABORTED
            | sys::FI_ENOTCONN
            | sys::FI_ESHUTDOWN
            | sys::FI_EIO => {
                "the peer has gone, or refused an earlier operation on the same connection: ask it out of band, and if \
                 it restarted use its new address"
            }
            sys::FI_ECONNREFUSED | sys::FI_EHOSTUNREACH | sys::FI_ENETUNREACH | sys::FI_ETIMEDOUT => {
                "the peer cannot be reached: check that it runs and that the network lets the two rails talk"
            }
            sys::FI_EACCES | sys::FI_EINVAL | sys::FI_ENOKEY | sys::FI_EREMOTEIO => {
                "the peer refused the key or the range: exchange regions again"
            }
            sys::FI_ETRUNC => "the message was longer than the buffer: post larger buffers",
            _ => "the range it was to write must be treated as torn",
        }
    }
}

impl fmt::Display for OpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.on, self.kind)?;
        if self.peer.is_some() {
            write!(f, " with {}", self.peer_name)?;
        }
        write!(f, " (token {:#x}) failed: {}", self.token, self.errno)?;
        write!(f, ", provider says '{}' ({})", self.provider_text, self.provider_errno)?;
        write!(f, "; {}", self.advice())
    }
}

impl std::error::Error for OpError {}

/// The endpoint did not close, so the provider may still use what the rail holds: all of it is leaked.
#[derive(Debug, thiserror::Error)]
#[error(
    "{call}; {operations} operations and {regions} regions are leaked, because the provider may still touch them; restart \
     the process when it can be spared"
)]
pub struct CloseFailed {
    /// What libfabric answered.
    pub call: CallError,
    /// How many operations were in flight.
    pub operations: usize,
    /// How many regions were open.
    pub regions: usize,
}
