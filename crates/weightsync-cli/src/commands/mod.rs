//! One module a command.

pub(crate) mod controller;
pub(crate) mod demo;
pub(crate) mod info;
pub(crate) mod plan;
pub(crate) mod push;
pub(crate) mod serve;
pub(crate) mod topo;
pub(crate) mod traffic;
