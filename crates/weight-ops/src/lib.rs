#![doc = include_str!("../README.md")]
// Only three may hold `unsafe`: `isa`, which calls code that is compiled for a CPU's optional instructions, and of `cuda`
// `operation`, which launches kernels, and `memory`, which answers for the memory that they reach.
#![deny(unsafe_code, unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

mod cast;
pub mod checksum;
#[cfg(feature = "cuda")]
pub mod cuda;
mod dtype;
mod element;
mod error;
mod grid;
mod isa;
mod kernels;
mod matrix;
pub mod oracle;
mod parallel;
mod quantize;
mod scale;
#[cfg(test)]
mod tests;

pub use cast::{cast, cast_bytes};
pub use dtype::Dtype;
pub use element::{Element, F8E4M3, Float};
pub use error::Error;
pub use grid::BlockGrid;
pub use isa::instruction_set;
pub use matrix::{MatrixMut, MatrixRef};
pub use quantize::{block_amax, dequantize_rect, quantize, quantize_rect};
pub use scale::{ScaleFormat, scale_of, ue8m0_byte};
