//! Safe libfabric for one-sided transfers: EFA, verbs, TCP and shared memory behind one set of types.
//!
//! A [`Rail`] is one endpoint with its completion queue, peers, registrations and table of operations in flight. It owns
//! every buffer from post to completion: a lease goes in by value and comes back with its [`Completion`], on success and
//! on failure alike, so memory that a NIC may touch can be neither freed nor aliased. A rail is used by one thread at a
//! time: it can be sent to another, never shared.
//!
//! libfabric is opened at run time ([`Library::open`]); a program that uses this crate starts without it.
//!
//! What is **not** here: threads, retries, deadlines and connection state. The caller polls.
//!
//! ```compile_fail,E0277
//! fn shared<T: Sync>() {}
//! shared::<efa_core::Rail>(); // a rail has one user at a time
//! ```

mod address;
mod completion;
mod device;
mod error;
mod hints;
mod in_flight;
mod info;
mod library;
mod memory;
#[cfg(feature = "test-util")]
mod memory_file;
mod object;
mod peer;
mod post;
mod queue;
mod rail;
mod region;
mod table;
mod wait;

pub use address::{ADDRESS_BYTES_MAX, AddressLengthError, RailAddress};
pub use completion::{Completion, Fault, Held, OpDone, OpKind, Unfinished};
pub use device::{DeviceMemory, DeviceRef, DeviceSlice, DmaBufRange, Interface};
pub use error::{
    CallError, CloseFailed, Errno, InfoError, MemoryError, OpError, PeerError, PostError, RailError,
    RangeError, RegionError,
};
pub use hints::Hints;
pub use in_flight::OpId;
pub use info::{Facts, Info, ParseProviderError, Provider};
pub use libfabric_sys::{OpenError, Tried, Version};
pub use library::Library;
pub use memory::{Lease, LeaseMut, Memory, MemoryRef, Target, available_bytes};
#[cfg(feature = "test-util")]
pub use memory_file::MemoryFile;
pub use peer::{PEERS_MAX, PeerId};
pub use post::{Message, Read, Receive, RejectReason, Rejected, Source, WRITES_PER_DOORBELL_MAX, Write};
pub use queue::COMPLETIONS_PER_POLL_MAX;
pub use rail::{Rail, RailConfig};
pub use region::{Closed, REGIONS_MAX, RegionId, RemoteRegion, RemoteSpan};
pub use wait::{Armed, Waker, wait_any};

/// A rail may be opened in one thread and used by another.
const _: fn() = || {
    fn sendable<T: Send>() {}
    sendable::<Rail>();
    sendable::<Completion>();
};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
