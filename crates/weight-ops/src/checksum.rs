//! Checksums of parameters, for any number of threads, ranks and devices at once.
//!
//! A hash that runs through its input from end to end, as XXH3 does, cannot be computed by a GPU at the speed of its memory,
//! nor by ranks that each have a part. This one is a sum over *leaves*, runs of [`LEAF_BYTES`], that know their place:
//! whoever has some leaves adds them up, and who has the sums adds those. It finds accidents. It must not be used where
//! somebody may choose the bytes: the keys are known.
//!
//! # Definition
//!
//! All numbers are 64-bit and wrap. Bytes make words of 8, little-endian.
//!
//! - A leaf is padded with zeros to stripes of 64 words. Word `j` of each goes to lane `j`, whose state starts as
//!   `seed(j) = (j + 1) * PRIME_3` and takes a word in by the round of XXH64:
//!   `state = rotate_left(state + word * PRIME_2, 31) * PRIME_1`.
//! - A lane ends as `lane = mix(state + seed(j))`, where `mix` is the avalanche of XXH64. The leaf's two numbers are the sum
//!   of `lane` and that of `mix(lane + PRIME_1)` over the lanes.
//! - Leaf number `n` (byte offset / `LEAF_BYTES`) of `len` bytes has the key `k = mix(n << 17 | len)` and contributes
//!   `mix(first + k)` and `mix(second + rotate_left(k, 32))`.
//! - The checksum of `bytes` bytes whose contributions sum up to `(a, b)` is `first = mix(a + mix(bytes))` and
//!   `second = mix(b + first)`.
//!
//! Source of the round, the avalanche and the primes: Yann Collet, "xxHash fast digest algorithm", version 0.1.1, XXH64.
//!
//! # What it finds
//!
//! *Certainly* every change that is confined to one aligned word of 8 bytes, so any flipped bit or byte; and every truncation
//! inside the last leaf. The round is a bijection of the state for any word, and of the word for any state; `mix` is one;
//! and in a sum in which one term differs, the sum differs. So a difference of one word survives to the end.
//!
//! *Otherwise* by chance. Changes of several words in one lane of a leaf are missed like a hash of 64 bits would, with a
//! probability of about 2^-64 each; what differs in several lanes or leaves, such as two leaves that changed places, a
//! leaf that is missing or there twice, has to meet two sums at once, 2^-128.

use std::fmt;
use std::ops::{Add, AddAssign};

use crate::isa::{Isa, Kernel};
use crate::parallel::for_each;

/// Bytes of a leaf; of a parameter only the last may be shorter.
pub const LEAF_BYTES: usize = 64 << 10;

const PRIME_1: u64 = 0x9e37_79b1_85eb_ca87;
const PRIME_2: u64 = 0xc2b2_ae3d_27d4_eb4f;
const PRIME_3: u64 = 0x1656_67b1_9e37_79f9;

const LANES: usize = 64;
const WORD_BYTES: usize = 8;
const STRIPE_BYTES: usize = LANES * WORD_BYTES;

/// The checksum of some bytes: see the [module](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Checksum(u128);

impl Checksum {
    /// The checksum as a number.
    pub fn to_u128(self) -> u128 {
        self.0
    }
}

impl From<u128> for Checksum {
    fn from(number: u128) -> Self {
        Checksum(number)
    }
}

impl fmt::Display for Checksum {
    /// As 32 hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// What some leaves of a parameter add to its checksum.
///
/// The sum of all parts is the same in any order and for any cut between leaves.
///
/// ```
/// use weight_ops::checksum::{LEAF_BYTES, PartialChecksum, checksum};
/// let parameter = vec![7; 3 * LEAF_BYTES + 1000];
/// let (head, tail) = parameter.split_at(2 * LEAF_BYTES);
/// let parts = PartialChecksum::of(2, tail) + PartialChecksum::of(0, head);
/// assert_eq!(parts.finish(), checksum(&parameter));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PartialChecksum {
    sums: [u64; 2],
    bytes: u64,
}

impl PartialChecksum {
    /// Of a run of leaves, of which the first has this number in the parameter. It ends where a leaf or the parameter does.
    /// Works on the threads of the caller's rayon pool if there is enough to do.
    pub fn of(first_leaf: u64, bytes: &[u8]) -> Self {
        Self::of_on(Isa::best(), first_leaf, bytes)
    }

    pub(crate) fn of_on(isa: Isa, first_leaf: u64, bytes: &[u8]) -> Self {
        let mut parts = vec![Self::default(); bytes.len().div_ceil(LEAF_BYTES)];
        let leaves = (first_leaf..).zip(bytes.chunks(LEAF_BYTES)).zip(&mut parts).collect();
        for_each(leaves, bytes.len() / WORD_BYTES, |((number, leaf), part): ((u64, &[u8]), &mut Self)| {
            *part = Self::of_leaf(isa, number, leaf);
        });
        parts.into_iter().fold(Self::default(), Add::add)
    }

    fn of_leaf(isa: Isa, number: u64, leaf: &[u8]) -> Self {
        let mut lanes = seeds();
        isa.run(Absorb { leaf, lanes: &mut lanes });
        let mut numbers = [0_u64; 2];
        for (state, seed) in lanes.into_iter().zip(seeds()) {
            let lane = mix(state.wrapping_add(seed));
            numbers[0] = numbers[0].wrapping_add(lane);
            numbers[1] = numbers[1].wrapping_add(mix(lane.wrapping_add(PRIME_1)));
        }
        let bytes = leaf.len() as u64;
        let key = mix(number << 17 | bytes);
        let [first, second] = numbers;
        let sums = [mix(first.wrapping_add(key)), mix(second.wrapping_add(key.rotate_left(32)))];
        Self { sums, bytes }
    }

    /// The part of these two sums over so many bytes, as another rank or a device has computed it.
    pub fn from_sums(sums: [u64; 2], bytes: u64) -> Self {
        Self { sums, bytes }
    }

    /// The two sums.
    pub fn sums(self) -> [u64; 2] {
        self.sums
    }

    /// The bytes that they stand for.
    pub fn bytes(self) -> u64 {
        self.bytes
    }

    /// The checksum, if this is the sum over all leaves.
    pub fn finish(self) -> Checksum {
        let first = mix(self.sums[0].wrapping_add(mix(self.bytes)));
        let second = mix(self.sums[1].wrapping_add(first));
        Checksum(u128::from(first) | u128::from(second) << 64)
    }
}

impl Add for PartialChecksum {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let sum = |index: usize| self.sums[index].wrapping_add(other.sums[index]);
        Self { sums: [sum(0), sum(1)], bytes: self.bytes.wrapping_add(other.bytes) }
    }
}

impl AddAssign for PartialChecksum {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

/// The checksum of a whole parameter, on the threads of the caller's rayon pool if there is enough to do.
pub fn checksum(bytes: &[u8]) -> Checksum {
    PartialChecksum::of(0, bytes).finish()
}

/// A bijection in which each bit of the argument decides about all bits of the result.
fn mix(value: u64) -> u64 {
    let value = (value ^ value >> 33).wrapping_mul(PRIME_2);
    let value = (value ^ value >> 29).wrapping_mul(PRIME_3);
    value ^ value >> 32
}

fn seeds() -> [u64; LANES] {
    std::array::from_fn(|lane| (lane as u64 + 1).wrapping_mul(PRIME_3))
}

/// Takes the words of a leaf into the states of its lanes.
struct Absorb<'a> {
    leaf: &'a [u8],
    lanes: &'a mut [u64; LANES],
}

impl Kernel for Absorb<'_> {
    #[inline(always)]
    fn run(self) {
        let (stripes, rest) = self.leaf.as_chunks::<STRIPE_BYTES>();
        // A copy, so that the states stay in registers.
        let mut lanes = *self.lanes;
        for stripe in stripes {
            absorb(stripe, &mut lanes);
        }
        if !rest.is_empty() {
            let mut stripe = [0; STRIPE_BYTES];
            stripe.iter_mut().zip(rest).for_each(|(padded, &byte)| *padded = byte);
            absorb(&stripe, &mut lanes);
        }
        *self.lanes = lanes;
    }
}

#[inline(always)]
fn absorb(stripe: &[u8; STRIPE_BYTES], lanes: &mut [u64; LANES]) {
    let (words, _) = stripe.as_chunks::<WORD_BYTES>();
    for (state, word) in lanes.iter_mut().zip(words) {
        let added = state.wrapping_add(u64::from_le_bytes(*word).wrapping_mul(PRIME_2));
        *state = added.rotate_left(31).wrapping_mul(PRIME_1);
    }
}
