//! The control plane: how the processes of one job find each other, agree on one plan, and move from version to version.
//!
//! It carries a few small messages per push and none of the weights. The rules live in [`controller`], a state machine
//! without sockets or clocks; [`server`] and [`client`] are the tokio edge around it. This crate knows manifests and
//! plans, but no fabric: the addresses and keys that ranks tell each other pass through as opaque bytes, and only to
//! members that have proved that they know the job's secret.
//!
//! It must never wait without a deadline, report a version as committed before every trainer has reported every byte
//! landed, or use anything that it read from a peer before bounding it.

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
pub use handshake::{Secret, random_seed};
pub use protocol::{
    ABORT_REASON_BYTES_MAX, ENDPOINT_BYTES_MAX, Join, MemberManifest, PROTOCOL_VERSION, Peer, Planned,
    PlannedPart, PushId, ToController, ToMember, World,
};
pub use server::{Server, ServerConfig, ServerHandle};
