//! Element types, named as safetensors names them.
//!
//! The planner moves bytes and never looks inside an element: it needs the width, and it needs both sides to
//! agree.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::LayoutError;

macro_rules! dtypes {
    ($($variant:ident $name:literal $bytes:literal $doc:literal,)*) => {
        /// The type of a tensor's elements.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum DType {
            $(#[doc = $doc] #[serde(rename = $name)] $variant,)*
        }

        impl DType {
            /// All element types, narrow ones first.
            pub const ALL: &[DType] = &[$(DType::$variant,)*];

            /// Width of one element in bytes, 1 to 8.
            pub const fn bytes(self) -> u64 {
                match self { $(DType::$variant => $bytes,)* }
            }

            /// The name in a safetensors header.
            pub const fn name(self) -> &'static str {
                match self { $(DType::$variant => $name,)* }
            }
        }
    };
}

// The order is part of the binary format: append, never insert.
dtypes! {
    Bool "BOOL" 1 "One byte, 0 or 1.",
    U8 "U8" 1 "Unsigned, 8 bits.",
    I8 "I8" 1 "Signed, 8 bits.",
    F8E4M3 "F8_E4M3" 1 "Float, 4 bits of exponent, 3 of mantissa.",
    F8E5M2 "F8_E5M2" 1 "Float, 5 bits of exponent, 2 of mantissa.",
    I16 "I16" 2 "Signed, 16 bits.",
    U16 "U16" 2 "Unsigned, 16 bits.",
    F16 "F16" 2 "IEEE half precision.",
    BF16 "BF16" 2 "The upper half of an IEEE single.",
    I32 "I32" 4 "Signed, 32 bits.",
    U32 "U32" 4 "Unsigned, 32 bits.",
    F32 "F32" 4 "IEEE single precision.",
    I64 "I64" 8 "Signed, 64 bits.",
    U64 "U64" 8 "Unsigned, 64 bits.",
    F64 "F64" 8 "IEEE double precision.",
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for DType {
    type Err = LayoutError;

    fn from_str(name: &str) -> Result<DType, LayoutError> {
        DType::ALL
            .iter()
            .copied()
            .find(|dtype| dtype.name() == name)
            .ok_or_else(|| LayoutError::UnknownDType { name: crate::error::shorten(name) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_serde_agree() {
        for dtype in DType::ALL {
            assert_eq!(dtype.name().parse::<DType>().unwrap(), *dtype);
            assert_eq!(serde_json::to_string(dtype).unwrap(), format!("\"{dtype}\""));
        }
        assert_eq!(DType::ALL.len(), 15);
        let error = "F4".parse::<DType>().unwrap_err();
        assert!(error.to_string().contains("`F4`"), "{error}");
    }
}
