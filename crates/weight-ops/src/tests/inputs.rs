//! Elements that are hard to get right.

use crate::element::{Codec, Element};
use crate::oracle;

/// Every sign, exponent and leading seven bits of mantissa, each with what decides about rounding to bf16; and each value of
/// e4m3 and of f16, the middle to the next, and the neighbours of both. NaN with many payloads, infinities, subnormals
/// and both zeros are among them.
pub(super) fn adversarial() -> Vec<f32> {
    let mut values = Vec::new();
    for upper in 0..=u16::MAX {
        for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
            values.push(f32::from_bits(u32::from(upper) << 16 | lower));
        }
    }
    let e4m3: Vec<f32> = (0..0x7f).map(oracle::e4m3_to_f32).collect();
    let f16: Vec<f32> = (0..0x7c00).map(|bits| half::f16::from_bits(bits).to_f32()).collect();
    for pair in e4m3.windows(2).chain(f16.windows(2)) {
        let middle = (pair[0] + pair[1]) / 2.0;
        for value in [pair[0], middle] {
            let near = [value.next_down(), value, value.next_up()];
            values.extend(near.iter().chain(&near.map(|value| -value)));
        }
    }
    values
}

/// The bytes of `count` elements: most of them as large as weights are, one in eight any bits at all. `seed` decides.
pub(super) fn weights<T: Element>(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed;
    let mut random = || {
        // Sebastiano Vigna's SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    };
    let mut bytes = Vec::new();
    for _ in 0..count {
        let bits = random();
        if bits.is_multiple_of(8) {
            bytes.extend(&random().to_ne_bytes()[..size_of::<T::Bytes>()]);
        } else {
            let value = (bits as i64 as f64 / i64::MAX as f64) as f32 * 0.1;
            bytes.extend(bytemuck::bytes_of(&T::encode(value)));
        }
    }
    bytes
}

/// Bytes as a list of elements, each as f32.
pub(super) fn decoded<T: Codec>(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks(size_of::<T::Bytes>()).map(|bytes| T::decode(bytemuck::pod_read_unaligned(bytes))).collect()
}
