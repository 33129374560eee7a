//! Bindings to the part of libfabric that weightsync uses, written by hand from the 2.1 headers.
//!
//! libfabric is opened at run time ([`Library::open`]), so a program built with this crate starts on a machine that
//! has no libfabric, and one build runs with every version from 1.17 on. Nothing is needed at build time.
//!
//! The crate keeps C's names and C's contracts: every call is `unsafe` and nothing is owned. It must never read a field
//! that an older library does not have, nor call an entry that an older library's operation table lacks: each wrapper
//! in this crate checks the table's `size` first, and answers `-FI_ENOSYS`.

mod calls;
mod constants;
mod library;
mod types;

pub use calls::*;
pub use constants::*;
pub use library::{Library, OpenError, SEARCH_PATHS, Tried, Version};
pub use types::*;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
