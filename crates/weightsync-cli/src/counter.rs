//! A counter-based generator: word `i` of a stream is computed, not reached.
//!
//! So any part of a tensor can be made by anybody, in any order, and always comes out the same. These are plausible
//! weights and visible changes, not secrets.

/// An odd number with well mixed bits (2^64 over the golden ratio): neighbouring counters get unrelated words.
const WEYL: u64 = 0x9e37_79b9_7f4a_7c15;

/// Any number with about half of its bits set.
const FOLD: u64 = 0xe703_7ed1_a0b4_28db;

/// Bytes of one word.
pub(crate) const WORD_BYTES: usize = 8;

/// One stream of 64-bit words.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stream(u64);

impl Stream {
    /// The stream of one tensor for one purpose, for example one step of one run.
    pub(crate) fn new(purpose: &str, tensor: &str, number: u64) -> Stream {
        let state = mix(hash(purpose)).wrapping_add(mix(hash(tensor)).rotate_left(1));
        Stream(mix(state.wrapping_add(number.wrapping_mul(WEYL))))
    }

    /// Word `index` of the stream. One wide multiplication whose halves are folded: memory is the limit, not this.
    #[inline]
    pub(crate) fn word(self, index: u64) -> u64 {
        let counter = self.0.wrapping_add(index.wrapping_mul(WEYL));
        let product = u128::from(counter) * u128::from(counter ^ FOLD);
        (product >> 64) as u64 ^ product as u64
    }
}

/// FNV-1a.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// A bijection in which every bit that goes in reaches every bit that comes out: the finaliser of splitmix64.
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}
