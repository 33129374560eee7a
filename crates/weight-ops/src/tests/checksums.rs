//! The checksum against its definition, and what it must find.

use proptest::prelude::*;

use crate::checksum::{LEAF_BYTES, PartialChecksum, checksum};
use crate::isa::Isa;
use crate::tests::inputs::weights;

/// The definition, one word after the other.
fn by_definition(bytes: &[u8]) -> u128 {
    const PRIMES: [u64; 3] = [11400714785074694791, 14029467366897019727, 1609587929392839161];
    fn mix(mut x: u64) -> u64 {
        x ^= x >> 33;
        x = x.wrapping_mul(PRIMES[1]);
        x ^= x >> 29;
        x = x.wrapping_mul(PRIMES[2]);
        x ^ (x >> 32)
    }
    let (mut a, mut b) = (0_u64, 0_u64);
    for (n, leaf) in bytes.chunks(65536).enumerate() {
        let mut padded = leaf.to_vec();
        padded.resize(leaf.len().div_ceil(512) * 512, 0);
        let (mut first, mut second) = (0_u64, 0_u64);
        for j in 0..64 {
            let seed = (j as u64 + 1).wrapping_mul(PRIMES[2]);
            let mut state = seed;
            for stripe in 0..padded.len() / 512 {
                let at = stripe * 512 + j * 8;
                let word = u64::from_le_bytes(padded[at..at + 8].try_into().unwrap());
                let sum = state.wrapping_add(word.wrapping_mul(PRIMES[1]));
                state = sum.rotate_left(31).wrapping_mul(PRIMES[0]);
            }
            let lane = mix(state.wrapping_add(seed));
            first = first.wrapping_add(lane);
            second = second.wrapping_add(mix(lane.wrapping_add(PRIMES[0])));
        }
        let key = mix((n as u64) * (1 << 17) + leaf.len() as u64);
        a = a.wrapping_add(mix(first.wrapping_add(key)));
        b = b.wrapping_add(mix(second.wrapping_add(key.rotate_left(32))));
    }
    let first = mix(a.wrapping_add(mix(bytes.len() as u64)));
    u128::from(first) + (u128::from(mix(b.wrapping_add(first))) << 64)
}

fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = weights::<f32>(seed, len.div_ceil(4));
    bytes.truncate(len);
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn as_defined_at_any_length_and_address(len in 0..3 * LEAF_BYTES, shift in 0..16_usize, seed: u64) {
        let bytes = bytes(seed, len + shift);
        let expected = by_definition(&bytes[shift..]);
        for isa in Isa::all() {
            prop_assert_eq!(PartialChecksum::of_on(isa, 0, &bytes[shift..]).finish().to_u128(), expected);
        }
    }

    #[test]
    fn any_cut_between_leaves_in_any_order(
        len in 1..6 * LEAF_BYTES,
        cuts in prop::collection::vec(0..7_usize, 0..4),
        seed: u64,
    ) {
        let bytes = bytes(seed, len);
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| (cut * LEAF_BYTES).min(len)).collect();
        // Where the bytes end inside a leaf, no other cut may be there.
        cuts.extend([0, len]);
        cuts.sort_unstable();
        let mut sum = PartialChecksum::default();
        for range in cuts.windows(2).rev() {
            sum += PartialChecksum::of((range[0] / LEAF_BYTES) as u64, &bytes[range[0]..range[1]]);
        }
        prop_assert_eq!(sum.finish(), checksum(&bytes));
    }

    #[test]
    fn a_changed_byte_and_a_missing_end(len in 1..2 * LEAF_BYTES + 99, at: usize, flip in 1..=u8::MAX, seed: u64) {
        // Of zeros, an end is not missed by what it holds.
        for mut bytes in [bytes(seed, len), vec![0; len]] {
            let whole = checksum(&bytes);
            prop_assert_ne!(checksum(&bytes[..at % len]), whole);
            bytes[at % len] ^= flip;
            prop_assert_ne!(checksum(&bytes), whole);
        }
    }
}

#[test]
fn what_changed_places_is_found() {
    let bytes = bytes(1, 4 * LEAF_BYTES);
    let whole = checksum(&bytes);
    // Leaves, stripes, words, bytes.
    for unit in [LEAF_BYTES, 512, 8, 1] {
        for (a, b) in [(0, 1), (1, 2), (0, 3)] {
            let mut swapped = bytes.clone();
            for offset in 0..unit {
                swapped.swap(a * unit + offset, b * unit + offset);
            }
            assert_ne!(swapped, bytes, "else this shows nothing");
            assert_ne!(checksum(&swapped), whole, "{a} and {b} of {unit} bytes");
        }
    }
    let part = PartialChecksum::of(1, &bytes[..LEAF_BYTES]);
    assert_ne!(part, PartialChecksum::of(0, &bytes[..LEAF_BYTES]));
}

#[test]
fn numbers_that_stay() {
    // Peers of different builds compare checksums: the definition must not change.
    let bytes: Vec<u8> = (0..100_000_u32).map(|index| (index * 7 / 8) as u8).collect();
    assert_eq!(checksum(&bytes).to_string(), "386bf48abb4c4735c4d1b626bc77b361");
    assert_eq!(checksum(&[]).to_u128(), 0);
    let again = PartialChecksum::of(0, &bytes);
    assert_eq!(PartialChecksum::from_sums(again.sums(), again.bytes()), again);
}
