//! A stand-in for the optimiser step.
//!
//! The weights of step `k` are the checkpoint's bytes XOR a pattern that depends on the tensor's name, on `k` and on the
//! element's index in the whole tensor, and on nothing else. So any rank can step the part it owns, and any reader can
//! say what every byte of step `k` must be. It must never touch a sign, an exponent or more than the low bits: the
//! weights stay plausible. Step 0 is the checkpoint itself.

use xfer_plan::{DType, TensorBox};

use crate::counter::{Stream, WORD_BYTES};
use crate::runs::Runs;

/// Brings bytes of the checkpoint (step 0) to `step`, or from `step` back to the checkpoint: XOR is its own inverse.
///
/// `bytes` holds the elements of `tensor` from `first_element` (row-major index in the whole tensor) on.
pub fn step_bytes(dtype: DType, tensor: &str, step: u64, first_element: u64, bytes: &mut [u8]) {
    advance(dtype, tensor, 0, step, first_element, bytes);
}

/// Brings bytes that hold step `from` to step `to`, in one pass. See [`step_bytes`] for `first_element` and `bytes`.
pub fn advance(dtype: DType, tensor: &str, from: u64, to: u64, first_element: u64, bytes: &mut [u8]) {
    let first_byte = first_element.wrapping_mul(dtype.bytes());
    let mask = low_bits(dtype);
    match (from, to) {
        _ if from == to => {}
        (0, step) | (step, 0) => {
            let pattern = pattern(tensor, step);
            xor_words(bytes, first_byte, |index| pattern.word(index) & mask);
        }
        _ => {
            let (old, new) = (pattern(tensor, from), pattern(tensor, to));
            xor_words(bytes, first_byte, |index| (old.word(index) ^ new.word(index)) & mask);
        }
    }
}

/// Brings one box of a tensor, held contiguously and row-major in `bytes`, from step `from` to step `to`.
///
/// Returns whether it was done: not if the box leaves a tensor of this shape or `bytes` is not as long as the box.
#[must_use = "false means that nothing was stepped"]
pub fn advance_box(
    dtype: DType,
    tensor: &str,
    shape: &[u64],
    bounds: &TensorBox,
    (from, to): (u64, u64),
    bytes: &mut [u8],
) -> bool {
    let Some(runs) = Runs::new(shape, bounds) else {
        return false;
    };
    let box_bytes = bounds.volume().and_then(|elements| elements.checked_mul(dtype.bytes()));
    if box_bytes != Some(bytes.len() as u64) {
        return false;
    }
    // No longer than `bytes`, so it fits; at least 1, so that `chunks_exact_mut` is defined for an empty box too.
    let run_bytes = (runs.elements() * dtype.bytes()).max(1) as usize;
    for (first_element, run) in runs.zip(bytes.chunks_exact_mut(run_bytes)) {
        advance(dtype, tensor, from, to, first_element, run);
    }
    true
}

/// The bits of a little-endian word that a step may change: low mantissa bits, or the lowest bit of an integer.
fn low_bits(dtype: DType) -> u64 {
    match dtype {
        DType::BF16 => 0x007f_007f_007f_007f,
        DType::F16 => 0x03ff_03ff_03ff_03ff,
        DType::F32 => 0x0000_ffff_0000_ffff,
        DType::F64 => 0x0000_0000_ffff_ffff,
        _ => match dtype.bytes() {
            1 => 0x0101_0101_0101_0101,
            2 => 0x0001_0001_0001_0001,
            4 => 0x0000_0001_0000_0001,
            _ => 1,
        },
    }
}

/// The pattern of one tensor at one step. Step 0 has none.
fn pattern(tensor: &str, step: u64) -> Stream {
    Stream::new("training step", tensor, step)
}

/// XORs `word(i)` over the bytes, where `i` counts whole words from the start of the tensor and `bytes` starts
/// `first_byte` bytes into it.
fn xor_words(bytes: &mut [u8], first_byte: u64, word: impl Fn(u64) -> u64) {
    let mut index = first_byte / WORD_BYTES as u64;
    let skip = (first_byte % WORD_BYTES as u64) as usize;
    let head_bytes = if skip == 0 { 0 } else { (WORD_BYTES - skip).min(bytes.len()) };
    let (head, rest) = bytes.split_at_mut(head_bytes);
    if head_bytes > 0 {
        xor_into(head, word(index).to_le_bytes().iter().skip(skip));
        index = index.wrapping_add(1);
    }
    let (words, tail) = rest.as_chunks_mut::<WORD_BYTES>();
    for chunk in words {
        *chunk = (u64::from_le_bytes(*chunk) ^ word(index)).to_le_bytes();
        index = index.wrapping_add(1);
    }
    xor_into(tail, word(index).to_le_bytes().iter());
}

fn xor_into<'a>(bytes: &mut [u8], pattern: impl Iterator<Item = &'a u8>) {
    for (byte, pattern) in bytes.iter_mut().zip(pattern) {
        *byte ^= pattern;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stepped(dtype: DType, step: u64, elements: u64) -> Vec<u8> {
        let mut bytes = vec![0; (elements * dtype.bytes()) as usize];
        step_bytes(dtype, "a.weight", step, 0, &mut bytes);
        bytes
    }

    #[test]
    fn step_zero_changes_nothing() {
        assert!(stepped(DType::BF16, 0, 100).iter().all(|&byte| byte == 0));
    }

    #[test]
    fn only_the_low_bits_change_and_all_of_them_do() {
        for (dtype, bits) in [
            (DType::BF16, 7),
            (DType::F16, 10),
            (DType::F32, 16),
            (DType::F64, 32),
            (DType::I64, 1),
            (DType::U16, 1),
            (DType::F8E4M3, 1),
            (DType::Bool, 1),
        ] {
            let size = dtype.bytes() as usize;
            let mut seen = 0u64;
            for element in stepped(dtype, 3, 1000).chunks_exact(size) {
                let mut word = [0; 8];
                word[..size].copy_from_slice(element);
                seen |= u64::from_le_bytes(word);
            }
            assert_eq!(seen, (1 << bits) - 1, "{dtype}");
        }
    }

    #[test]
    fn any_cut_gives_the_same_bytes() {
        for &dtype in DType::ALL {
            let size = dtype.bytes() as usize;
            let whole = stepped(dtype, 5, 61);
            for cut in 0..=61 {
                let mut parts = vec![0; whole.len()];
                let (left, right) = parts.split_at_mut(cut * size);
                step_bytes(dtype, "a.weight", 5, 0, left);
                step_bytes(dtype, "a.weight", 5, cut as u64, right);
                assert_eq!(parts, whole, "{dtype} cut at {cut}");
            }
        }
    }

    #[test]
    fn advancing_equals_stepping_from_the_checkpoint() {
        for &dtype in DType::ALL {
            for (from, to) in [(0, 4), (4, 0), (3, 4), (4, 3), (7, 7)] {
                let mut bytes = stepped(dtype, from, 33);
                advance(dtype, "a.weight", from, to, 0, &mut bytes);
                assert_eq!(bytes, stepped(dtype, to, 33), "{dtype} {from} -> {to}");
            }
        }
    }

    #[test]
    fn steps_names_and_elements_differ() {
        let base = stepped(DType::F32, 1, 64);
        assert_ne!(base, stepped(DType::F32, 2, 64));
        let mut other = vec![0; base.len()];
        step_bytes(DType::F32, "b.weight", 1, 0, &mut other);
        assert_ne!(base, other);
        let mut shifted = vec![0; base.len()];
        step_bytes(DType::F32, "a.weight", 1, 2, &mut shifted);
        assert_ne!(base, shifted);
    }

    #[test]
    fn a_box_is_stepped_as_its_elements_in_the_whole_tensor() {
        let (shape, dtype) = ([5u64, 7], DType::BF16);
        let whole = stepped(dtype, 9, 35);
        let bounds = TensorBox::new(&[1, 2], &[3, 4]).unwrap();
        let mut bytes = vec![0; 3 * 4 * 2];
        assert!(advance_box(dtype, "a.weight", &shape, &bounds, (0, 9), &mut bytes));
        let expected: Vec<u8> =
            (1..4).flat_map(|row| whole[(row * 7 + 2) * 2..(row * 7 + 6) * 2].to_vec()).collect();
        assert_eq!(bytes, expected);
        assert!(!advance_box(dtype, "a.weight", &shape, &bounds, (0, 9), &mut bytes[1..]));
        assert!(!advance_box(dtype, "a.weight", &[3, 7], &bounds, (0, 9), &mut bytes));
    }
}
