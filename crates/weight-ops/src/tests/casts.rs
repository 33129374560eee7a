//! `cast` and `cast_bytes`: all pairs of types.

use half::{bf16, f16};
use proptest::prelude::*;

use crate::cast::{cast, cast_bytes_on};
use crate::dtype::Dtype;
use crate::element::{Codec, F8E4M3};
use crate::error::Error;
use crate::isa::Isa;
use crate::oracle;
use crate::parallel::PARALLEL_ELEMENTS_MIN;
use crate::tests::inputs::{adversarial, decoded, weights};

const DTYPES: [Dtype; 4] = [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::F8E4M3];

/// One element after the other, with the conversions of the oracle and the half crate.
fn expected(from: Dtype, source: &[u8], to: Dtype) -> Vec<u8> {
    if from == to {
        return source.to_vec();
    }
    let values = match from {
        Dtype::BF16 => decoded::<bf16>(source),
        Dtype::F16 => decoded::<f16>(source),
        Dtype::F32 => decoded::<f32>(source),
        Dtype::F8E4M3 => source.iter().map(|&code| oracle::e4m3_to_f32(code)).collect(),
    };
    values
        .into_iter()
        .flat_map(|value| match to {
            Dtype::BF16 => bf16::from_f32(value).to_ne_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(value).to_ne_bytes().to_vec(),
            Dtype::F32 => value.to_ne_bytes().to_vec(),
            Dtype::F8E4M3 => vec![oracle::f32_to_e4m3(value)],
        })
        .collect()
}

/// Casts to an address that is `shift` off, and looks that nothing else is written.
fn check(isa: Isa, from: Dtype, source: &[u8], to: Dtype, shift: usize) {
    let expected = expected(from, source, to);
    let mut memory = vec![0xa5; shift + expected.len() + 1];
    cast_bytes_on(isa, from, source, to, &mut memory[shift..shift + expected.len()]).unwrap();
    let differs = memory[shift..].iter().zip(&expected).position(|(ours, theirs)| ours != theirs);
    assert_eq!(differs, None, "{isa:?}, {from} to {to}: byte {differs:?} of {}", expected.len());
    assert!(memory[..shift].iter().chain(memory.last()).all(|&byte| byte == 0xa5));
}

#[test]
fn every_bit_pattern_and_every_tie() {
    let f32s: Vec<u8> = adversarial().into_iter().flat_map(f32::to_ne_bytes).collect();
    let two_bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_ne_bytes).collect();
    let one_byte: Vec<u8> = (0..=u8::MAX).collect();
    for isa in Isa::all() {
        for to in DTYPES {
            check(isa, Dtype::F32, &f32s, to, 0);
            check(isa, Dtype::BF16, &two_bytes, to, 0);
            check(isa, Dtype::F16, &two_bytes, to, 0);
            check(isa, Dtype::F8E4M3, &one_byte, to, 0);
        }
    }
}

#[test]
fn on_many_threads_and_with_a_tail() {
    let count = 2 * PARALLEL_ELEMENTS_MIN + 17;
    check(Isa::best(), Dtype::F32, &weights::<f32>(1, count), Dtype::BF16, 0);
    check(Isa::best(), Dtype::BF16, &weights::<bf16>(2, count), Dtype::F32, 0);
}

proptest! {
    #[test]
    fn any_length_at_any_address(
        from in prop::sample::select(&DTYPES[..]),
        to in prop::sample::select(&DTYPES[..]),
        bytes in prop::collection::vec(any::<u8>(), 0..800),
        skipped in 0..4_usize,
        shift in 0..4_usize,
    ) {
        let source = &bytes[skipped.min(bytes.len())..];
        let source = &source[..source.len() / from.bytes() * from.bytes()];
        for isa in Isa::all() {
            check(isa, from, source, to, shift);
        }
    }
}

#[test]
fn typed_slices() {
    let source = [1.0, -2.5, f32::NAN];
    let mut bf16s = [bf16::ZERO; 3];
    cast(&source, &mut bf16s).unwrap();
    assert_eq!(bf16s[..2], [bf16::from_f32(1.0), bf16::from_f32(-2.5)]);
    let mut codes = [F8E4M3::default(); 3];
    cast(&bf16s, &mut codes).unwrap();
    assert_eq!(codes.map(F8E4M3::to_bits), [0x38, 0xc2, 0x7f]);
    let mut signalling = [0.0];
    cast(&[f32::from_bits(0x7f80_0001)], &mut signalling).unwrap();
    assert_eq!(signalling[0].to_bits(), 0x7f80_0001, "a copy keeps all bits");
}

#[test]
fn wrong_lengths_write_nothing() {
    let mut destination = [7; 4];
    let mut try_cast = |from, bytes: &[u8], to| {
        let error = cast_bytes_on(Isa::best(), from, bytes, to, &mut destination).unwrap_err();
        assert_eq!(destination, [7; 4]);
        error
    };
    let partial = try_cast(Dtype::BF16, &[0; 3], Dtype::BF16);
    assert_eq!(partial, Error::PartialElement { dtype: Dtype::BF16, bytes: 3 });
    assert_eq!(partial.to_string(), "3 bytes end inside an element of BF16: pass a multiple of 2");
    let fewer = try_cast(Dtype::F32, &[0; 4], Dtype::F16);
    assert_eq!(fewer, Error::LengthMismatch { source_elements: 1, destination_elements: 2 });
    let mut odd = [0; 3];
    let partial = cast_bytes_on(Isa::best(), Dtype::F16, &[0; 2], Dtype::F32, &mut odd).unwrap_err();
    assert_eq!(partial, Error::PartialElement { dtype: Dtype::F32, bytes: 3 });
}

#[test]
fn widths_are_those_of_the_elements() {
    fn check<T: Codec>() {
        assert_eq!(T::DTYPE.bytes(), size_of::<T>());
        assert_eq!(T::DTYPE.bytes(), size_of::<T::Bytes>());
        assert_eq!(align_of::<T::Bytes>(), 1, "any address will do");
    }
    check::<f32>();
    check::<bf16>();
    check::<f16>();
    check::<F8E4M3>();
}
