#![cfg_attr(feature = "net", doc = include_str!("../README.md"))]
#![cfg_attr(not(feature = "net"), doc = "The rules of a job, without the sockets: what a simulator runs.")]
#![forbid(unsafe_code)]

#[cfg(feature = "net")]
mod budget;
#[cfg(feature = "net")]
pub mod client;
pub mod controller;
#[cfg(feature = "net")]
mod door;
#[cfg(feature = "net")]
mod error;
#[cfg(feature = "net")]
mod frame;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(feature = "net")]
mod handshake;
pub mod member;
#[cfg(feature = "net")]
mod observer;
mod protocol;
#[cfg(feature = "net")]
mod record;
mod refusal;
#[cfg(feature = "net")]
pub mod server;
pub mod status;
#[cfg(feature = "tls")]
mod tls;
#[cfg(feature = "net")]
mod transport;
mod verify;

#[cfg(feature = "net")]
pub use client::{Client, ClientConfig};
#[cfg(feature = "net")]
pub use error::RendezvousError;
#[cfg(feature = "net")]
pub use handshake::Secret;
#[cfg(feature = "net")]
pub use observer::Observer;
pub use protocol::{
    ABORT_REASON_BYTES_MAX, Bank, Commit, DEADLINE_DEFAULT, DEADLINE_RANGE, ENDPOINT_BYTES_MAX, Fence, Holds,
    JOB_DEFAULT, Join, MemberManifest, OnLoss, PROTOCOL_VERSION, Peer, Planned, PlannedPart, PushId,
    SessionId, ToController, ToMember, World,
};
#[cfg(feature = "net")]
pub use record::RecordFile;
pub use refusal::Refusal;
#[cfg(feature = "net")]
pub use server::{Server, ServerConfig, ServerHandle};
#[cfg(feature = "tls")]
pub use tls::{Identity, IdentityError};
#[cfg(feature = "net")]
pub use transport::Transport;
pub use verify::{Checksum, ParamSum, Verify};
