//! The conversions of single elements, against other implementations of them.

use half::{bf16, f16};

use crate::element::{Codec, F8E4M3, Magnitude};
use crate::oracle;
use crate::tests::inputs::adversarial;

#[test]
fn to_two_bytes_as_the_half_crate_does() {
    for value in adversarial() {
        let [ours, theirs] = [u16::from_ne_bytes(bf16::encode(value)), bf16::from_f32(value).to_bits()];
        assert_eq!(ours, theirs, "bf16 of {value:e}, bits {:#x}", value.to_bits());
        let [ours, theirs] = [u16::from_ne_bytes(f16::encode(value)), f16::from_f32(value).to_bits()];
        assert_eq!(ours, theirs, "f16 of {value:e}, bits {:#x}", value.to_bits());
    }
}

#[test]
fn from_two_bytes_exactly() {
    for bits in 0..=u16::MAX {
        let ours = bf16::decode(bits.to_ne_bytes()).to_bits();
        assert_eq!(ours, u32::from(bits) << 16, "a bf16 is the upper half of its f32");
        let ours = f16::decode(bits.to_ne_bytes()).to_bits();
        assert_eq!(ours, f16::from_bits(bits).to_f32().to_bits(), "f16 {bits:#x}");
    }
}

#[test]
fn e4m3_is_what_its_definition_says() {
    for code in 0..=u8::MAX {
        let (ours, defined) = (F8E4M3::from_bits(code).to_f32(), oracle::e4m3_to_f32(code));
        assert_eq!(ours.to_bits(), defined.to_bits(), "{code:#x}");
        let back = F8E4M3::from_f32(ours).to_bits();
        assert_eq!(back, if code == 0xff { 0x7f } else { code });
    }
    assert_eq!(F8E4M3::MAX.to_f32(), 448.0);
    assert!(F8E4M3::NAN.to_f32().is_nan());
}

#[test]
fn e4m3_is_the_nearest() {
    for value in adversarial() {
        let ours = F8E4M3::from_f32(value).to_bits();
        assert_eq!(ours, oracle::f32_to_e4m3(value), "{value:e}, bits {:#x}", value.to_bits());
    }
}

#[test]
fn the_oracle_knows_the_landmarks() {
    let known = [
        (0.0, 0x00),
        (-0.0, 0x80),
        (1.0, 0x38),
        (-448.0, 0xfe),
        (464.0, 0x7e),
        (f32::INFINITY, 0x7e),
        (f32::NEG_INFINITY, 0xfe),
        (-f32::NAN, 0x7f),
        // The least subnormal, the middle to zero, and just above it.
        (2_f32.powi(-9), 0x01),
        (2_f32.powi(-10), 0x00),
        (2_f32.powi(-10).next_up(), 0x01),
        // The least normal number, and ties on both sides of it.
        (2_f32.powi(-6), 0x08),
        (2_f32.powi(-6) * 1.0625, 0x08),
        (2_f32.powi(-6) * 0.9375, 0x08),
        (2_f32.powi(-6) * 0.8125, 0x06),
    ];
    for (value, code) in known {
        assert_eq!(oracle::f32_to_e4m3(value), code, "{value:e}");
    }
}

#[test]
fn keys_order_magnitudes() {
    fn check<T: Magnitude>(values: &[f32]) {
        let zero = T::key(T::encode(0.0));
        for pair in values.windows(2) {
            let pair = [pair[0], pair[1]].map(|value| T::encode(value));
            let [(key, magnitude), (other_key, other)] =
                pair.map(|bytes| (T::key(bytes), T::decode(bytes).abs()));
            if magnitude.is_finite() {
                assert!(key >= zero);
                assert_eq!(T::magnitude(key).to_bits(), magnitude.to_bits());
                assert!(!other.is_finite() || key.cmp(&other_key) == magnitude.total_cmp(&other));
            } else {
                assert!(key < zero, "{magnitude} does not count");
                assert_eq!(T::magnitude(key).to_bits(), 0);
            }
        }
        assert_eq!(T::magnitude(T::Key::default()).to_bits(), 0);
    }
    check::<f32>(&adversarial());
    check::<bf16>(&adversarial());
    check::<f16>(&adversarial());
}
