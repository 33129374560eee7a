//! Digests: how ranks that computed the same thing apart find out that they did.
//!
//! A digest covers the canonical postcard bytes of a value. They are streamed into the hash; a plan is never
//! held twice.

use std::fmt;

use postcard::ser_flavors::Flavor;
use serde::{Deserialize, Serialize};

/// BLAKE3 over the canonical bytes of a manifest or a plan.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    pub(crate) fn of<T: Serialize + ?Sized>(value: &T) -> Result<Digest, postcard::Error> {
        postcard::serialize_with_flavor(value, Hashing { hasher: blake3::Hasher::new(), buffer: Vec::new() })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The hash as a sink for postcard. Buffered, because postcard writes a number at a time.
struct Hashing {
    hasher: blake3::Hasher,
    buffer: Vec<u8>,
}

/// Enough for the hash to use its widest code path.
const BUFFER_BYTES: usize = 16 * 1024;

impl Flavor for Hashing {
    type Output = Digest;

    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.try_extend(&[byte])
    }

    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= BUFFER_BYTES {
            self.hasher.update(&self.buffer);
            self.buffer.clear();
        }
        Ok(())
    }

    fn finalize(mut self) -> postcard::Result<Digest> {
        self.hasher.update(&self.buffer);
        Ok(Digest(*self.hasher.finalize().as_bytes()))
    }
}
