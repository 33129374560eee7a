//! Every kernel against the oracle, bit by bit, on every instruction set that this machine has.

mod casts;
mod checksums;
mod elements;
mod inputs;
mod quantized;
mod shapes;
