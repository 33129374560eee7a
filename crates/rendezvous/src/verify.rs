//! Verification in band: which parameters are compared before a version is committed, and the form of what is compared.
//!
//! Whoever writes sums what it sends, by receiver and parameter; whoever is written to sums its memory over the same
//! operations. Both choose the parameters by themselves, from the attempt and the name alone. How bytes are hashed is
//! their business: nothing here sees one.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use xfer_plan::{ParamId, ReceiverRank};

use crate::protocol::PushId;

/// Checksums in one message at most. One has 24 bytes at most: 3 of the rank (below 2^16), 5 of the parameter, 16 of the
/// sum. So a message has at most 48 MiB, which a frame of 64 MiB holds: 100 000 parameters take 2.3 MiB for one receiver.
pub(crate) const SUMS_MAX: usize = 2 << 20;

/// Operations that write to one inference rank at most, where it verifies. One has 40 bytes at most in its part of the plan:
/// 5 for each of the parameter, the rows, their length and the region, 10 for the offset and for the stride. So they have at
/// most 40 MiB, beside which a frame of 64 MiB holds 100 000 names of 100 bytes. They are 1 TiB of operations of 1 MiB.
pub(crate) const INBOUND_MAX: usize = 1 << 20;

/// Which parameters are compared before a version is committed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub enum Verify {
    /// None.
    #[default]
    Off,
    /// Each with this probability, above 0 and at most 1; others in every attempt.
    Sampled(f64),
    /// All.
    Full,
}

impl Verify {
    /// Whether anything is compared.
    pub fn is_on(self) -> bool {
        self != Self::Off
    }

    /// Whether the parameter of this name is compared in this attempt; the same wherever it is asked.
    pub fn covers(self, push: PushId, name: &str) -> bool {
        match self {
            Self::Off => false,
            Self::Full => true,
            Self::Sampled(part) => {
                let hash = blake3::Hasher::new().update(&push.0).update(name.as_bytes()).finalize();
                let mut word = [0; 4];
                word.copy_from_slice(hash.as_bytes().first_chunk::<4>().unwrap_or(&[0; 4]));
                // Every 32-bit number is a float of its own, and below 1 after the division.
                f64::from(u32::from_le_bytes(word)) / (f64::from(u32::MAX) + 1.0) < part
            }
        }
    }

    /// Refuses a part that is no probability.
    pub(crate) fn check(self) -> Result<(), String> {
        match self {
            Self::Sampled(part) if !(part > 0.0 && part <= 1.0) => Err(format!(
                "a part of {part} of the parameters cannot be verified: above 0 and at most 1 can"
            )),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Verify {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Sampled(part) => write!(f, "sampled={part}"),
            Self::Full => f.write_str("full"),
        }
    }
}

impl FromStr for Verify {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let verify = match text.split_once('=') {
            None if text == "off" => Self::Off,
            None if text == "full" => Self::Full,
            Some(("sampled", part)) => {
                Self::Sampled(part.parse().map_err(|_| format!("'{part}' is not a number"))?)
            }
            _ => return Err("off, full or sampled=P is expected, such as sampled=0.1".into()),
        };
        verify.check().map(|()| verify)
    }
}

/// 128 bits that stand for bytes and their places: the sum, modulo 2^128, of a hash of each operation. So the order in which
/// operations are counted does not matter, and sums of disjoint operations add up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Checksum(pub [u8; 16]);

impl Checksum {
    /// Counts further operations, by the sum of their hashes.
    pub fn add(&mut self, other: Checksum) {
        let [ours, theirs] = [self.0, other.0].map(u128::from_le_bytes);
        self.0 = ours.wrapping_add(theirs).to_le_bytes();
    }
}

impl From<u128> for Checksum {
    fn from(hash: u128) -> Self {
        Self(hash.to_le_bytes())
    }
}

/// What one rank has sent of one parameter to one receiver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParamSum {
    /// The receiver.
    pub to: ReceiverRank,
    /// The parameter, as the plan numbers them.
    pub param: ParamId,
    /// Of all operations of this rank that write it there.
    pub sum: Checksum,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::ToController;

    #[test]
    fn what_is_said_is_what_is_meant() {
        for verify in [Verify::Off, Verify::Full, Verify::Sampled(0.25), Verify::Sampled(1.0)] {
            assert_eq!(verify.to_string().parse(), Ok(verify));
        }
        for wrong in
            ["", "on", "Full", "sampled", "sampled=", "sampled=0", "sampled=1.5", "sampled=NaN", "full=1"]
        {
            assert!(wrong.parse::<Verify>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn samples_are_of_their_size_and_differ() {
        let names: Vec<String> = (0..2000).map(|layer| format!("layers.{layer}.mlp.up_proj")).collect();
        let sample = |part, push| -> Vec<&String> {
            let push = PushId([push; 16]);
            names.iter().filter(|name| Verify::Sampled(part).covers(push, name)).collect()
        };
        // Six standard deviations.
        assert!((85..=315).contains(&sample(0.1, 1).len()), "{}", sample(0.1, 1).len());
        assert_ne!(sample(0.1, 1), sample(0.1, 2));
        assert_eq!(sample(1.0, 1).len(), names.len());
        assert!(names.iter().all(|name| !Verify::Off.covers(PushId([1; 16]), name)));
        assert!(names.iter().all(|name| Verify::Full.covers(PushId([1; 16]), name)));
    }

    #[test]
    fn the_longest_message_fits_a_frame() {
        let sum = ParamSum { to: ReceiverRank(65_535), param: ParamId(u32::MAX), sum: Checksum([255; 16]) };
        let with = |sums: Vec<ParamSum>| {
            let push = PushId([255; 16]);
            ToController::Written { push, bytes: u64::MAX, writes: u64::MAX, fences: Vec::new(), sums }
                .encoded_bytes()
        };
        let each = with(vec![sum; 2]) - with(vec![sum]);
        assert_eq!(each, 24);
        // Beside them only the ids, two numbers and the fences, which have room that is left.
        assert!(each * SUMS_MAX as u64 <= u64::from(crate::protocol::FRAME_BYTES_MAX) * 3 / 4);
    }
}
