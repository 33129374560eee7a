#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod client;
pub mod controller;
mod error;
mod frame;
mod handshake;
mod protocol;
pub mod server;

pub use client::{Client, ClientConfig, GiveUp};
pub use error::RendezvousError;
pub use handshake::Secret;
pub use protocol::{
    ABORT_REASON_BYTES_MAX, DEADLINE_DEFAULT, DEADLINE_RANGE, ENDPOINT_BYTES_MAX, Fence, JOB_DEFAULT, Join,
    MemberManifest, PROTOCOL_VERSION, Peer, Planned, PlannedPart, PushId, ToController, ToMember, World,
};
pub use server::{Server, ServerConfig, ServerHandle};
