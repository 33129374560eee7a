//! A rail's address: bytes that mean something to its provider only.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The longest address that is sent or accepted, in bytes. EFA's has 32, a socket's at most 28, shared memory's is a
/// name of up to 64 or so.
pub const ADDRESS_BYTES_MAX: usize = 256;

/// What peers insert to reach a rail. Opaque; at most [`ADDRESS_BYTES_MAX`] bytes.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<u8>", into = "Vec<u8>")]
pub struct RailAddress(Vec<u8>);

/// More bytes than any address has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} bytes are not a rail's address: it has 1 to {ADDRESS_BYTES_MAX}")]
pub struct AddressLengthError(usize);

impl RailAddress {
    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl TryFrom<Vec<u8>> for RailAddress {
    type Error = AddressLengthError;

    fn try_from(bytes: Vec<u8>) -> Result<Self, Self::Error> {
        match bytes.len() {
            1..=ADDRESS_BYTES_MAX => Ok(Self(bytes)),
            other => Err(AddressLengthError(other)),
        }
    }
}

impl From<RailAddress> for Vec<u8> {
    fn from(address: RailAddress) -> Self {
        address.0
    }
}

impl fmt::Debug for RailAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RailAddress(")?;
        for byte in &self.0 {
            write!(f, "{byte:02x}")?;
        }
        f.write_str(")")
    }
}
