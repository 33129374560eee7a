//! One module a command, and what several share: `transfer` on the command line, `page` in what they write.

pub(crate) mod controller;
pub(crate) mod demo;
pub(crate) mod info;
mod page;
pub(crate) mod plan;
pub(crate) mod push;
pub(crate) mod serve;
pub(crate) mod simulate;
pub(crate) mod status;
pub(crate) mod topo;
pub(crate) mod traffic;
mod transfer;
