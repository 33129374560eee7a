//! Element types that can be converted, for callers that have bytes and learn the type at run time.
//!
//! This is not the planner's list, which also holds types that are only ever moved.

use std::fmt;

/// The type of the elements in a run of bytes. Elements are in the machine's byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// The upper half of an IEEE single.
    BF16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
    /// 4 bits of exponent, 3 of mantissa: see [`F8E4M3`](crate::F8E4M3).
    F8E4M3,
}

impl Dtype {
    /// Width of one element in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            Dtype::BF16 | Dtype::F16 => 2,
            Dtype::F32 => 4,
            Dtype::F8E4M3 => 1,
        }
    }
}

impl fmt::Display for Dtype {
    /// As safetensors spells it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Dtype::BF16 => "BF16",
            Dtype::F16 => "F16",
            Dtype::F32 => "F32",
            Dtype::F8E4M3 => "F8_E4M3",
        })
    }
}
