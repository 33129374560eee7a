//! Element types: how each becomes an f32, exactly, and how an f32 is rounded to each.
//!
//! Every function here is called once per element inside a vectorised loop. So none branches, calls or looks up a table:
//! choices are selections between two computed values. All arithmetic is on integers or exact, but for one addition
//! in [`round_magnitude`], whose rounding is the point of it.

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};

use crate::dtype::Dtype;

/// A type that tensors are made of: `f32`, [`bf16`], [`f16`](half::f16) or [`F8E4M3`]. No other can be added.
///
/// Conversions round to nearest, ties to even. What cannot be represented:
///
/// | from f32 to | too large | NaN |
/// |---|---|---|
/// | `bf16`, `f16` | infinity of the same sign | quiet NaN, same sign, upper bits of the payload |
/// | `F8E4M3` | 448 of the same sign, infinity too | 0x7f, without the sign |
///
/// To f32 every conversion is exact. A NaN keeps its sign; from `bf16` it keeps all other bits too, from `f16` it
/// becomes quiet and keeps the payload, from `F8E4M3` it becomes the default quiet NaN.
pub trait Element: Codec {}

/// An [`Element`] that can be quantised: `f32`, [`bf16`] or [`f16`](half::f16).
pub trait Float: Element + Magnitude {}

/// An 8-bit float: sign, 4 bits of exponent with bias 7, 3 bits of mantissa.
///
/// This is the variant that is called e4m3fn: the largest magnitude is 448, there are no infinities, and only 0x7f and
/// 0xff are NaN. Magnitudes below 2^-6 are multiples of 2^-9.
///
/// Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, table 1. Conversion saturates, as NVIDIA's
/// `cvt.rn.satfinite.e4m3x2` does; PyTorch's own (`c10`) gives NaN beyond the largest value, and keeps the sign of NaN.
///
/// ```
/// use weight_ops::F8E4M3;
/// assert_eq!(F8E4M3::from_f32(-500.0).to_f32(), -448.0);
/// assert_eq!(F8E4M3::from_f32(1.0625).to_f32(), 1.0); // a tie
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(transparent)]
pub struct F8E4M3(u8);

impl F8E4M3 {
    /// The largest value, 448.
    pub const MAX: F8E4M3 = F8E4M3(0x7e);
    /// The NaN that conversions give.
    pub const NAN: F8E4M3 = F8E4M3(0x7f);

    /// The value with these bits.
    pub const fn from_bits(bits: u8) -> F8E4M3 {
        F8E4M3(bits)
    }

    /// The bits of the value.
    pub const fn to_bits(self) -> u8 {
        self.0
    }

    /// The nearest value, ties to even; beyond 448 it is 448 with the sign of `value`, for NaN it is 0x7f.
    pub fn from_f32(value: f32) -> F8E4M3 {
        F8E4M3(F8E4M3::encode(value))
    }

    /// The value, exactly.
    pub fn to_f32(self) -> f32 {
        F8E4M3::decode(self.0)
    }
}

/// How an element lies in memory and what it means.
pub trait Codec: Pod + Send + Sync {
    /// As many bytes as the element has, in the machine's order, so that they may lie anywhere.
    type Bytes: Pod + Send + Sync;
    /// The type's name.
    const DTYPE: Dtype;
    /// To f32, exactly.
    fn decode(bytes: Self::Bytes) -> f32;
    /// From f32, rounded.
    fn encode(value: f32) -> Self::Bytes;
}

/// An element as an integer that orders finite magnitudes, so that a maximum needs no floats and no choices.
pub trait Magnitude: Codec {
    /// As wide as the element.
    type Key: Copy + Ord + Default;
    /// Larger for larger magnitudes; that of an infinity or NaN is below those of all finite values.
    fn key(bytes: Self::Bytes) -> Self::Key;
    /// The magnitude; 0 for the key of an infinity or NaN and for the default key.
    fn magnitude(key: Self::Key) -> f32;
}

const F32_SIGN: u32 = 0x8000_0000;
const F32_INFINITY: u32 = 0x7f80_0000;
const F32_QUIET: u32 = 0x0040_0000;
/// The NaN that products become: processors make different ones.
pub(crate) const F32_NAN: u32 = F32_INFINITY | F32_QUIET;
const F32_MANTISSA_BITS: u32 = 23;
const F32_BIAS: i32 = 127;

/// Rounds a magnitude to a float of `MANTISSA` bits whose least normal number is 2^`EXPONENT_MIN`: to nearest, ties to
/// even. Takes the bits of the f32; the result is in the low 16 bits, what is above them is noise.
///
/// The caller caps the magnitude where the result's exponent would overflow.
///
/// In its binade, from 2^e to 2^(e+1), the result is a multiple of 2^(e - `MANTISSA`); below the least normal number it is
/// a multiple of the same step as just above. An f32 of exponent e + 23 - `MANTISSA` has that step between its own
/// neighbours. So adding the magnitude to such a number lets the FPU round, and leaves the number of steps in the low
/// bits. The code of the result is that number plus (e - `EXPONENT_MIN`) * 2^`MANTISSA`, also when it rounds up to 2^(e+1).
#[inline(always)]
fn round_magnitude<const MANTISSA: u32, const EXPONENT_MIN: i32>(magnitude: u32) -> u32 {
    let field_min = (EXPONENT_MIN + F32_BIAS) as u32;
    let narrower = F32_MANTISSA_BITS - MANTISSA;
    let binade = magnitude.max(field_min << F32_MANTISSA_BITS) & F32_INFINITY;
    // What the code is short of, where the biased exponent of the f32 is counted, rides on the counter: it is even, so
    // that ties still go to even, and too small to change the counter's exponent.
    let offset = (field_min << MANTISSA).wrapping_neg() & 0xffff;
    let counter = binade + (narrower << F32_MANTISSA_BITS | offset);
    let steps = (f32::from_bits(magnitude) + f32::from_bits(counter)).to_bits();
    steps.wrapping_add(binade >> narrower)
}

/// The value of a magnitude in a float of `MANTISSA` bits whose least normal number is 2^`EXPONENT_MIN`. It must be finite.
#[inline(always)]
fn widen_magnitude<const MANTISSA: u32, const EXPONENT_MIN: i32>(magnitude: u32) -> f32 {
    let field_of = |exponent: i32| ((exponent + F32_BIAS) as u32) << F32_MANTISSA_BITS;
    let normal = (magnitude << (F32_MANTISSA_BITS - MANTISSA)).wrapping_add(field_of(EXPONENT_MIN - 1));
    // Below the least normal number the bits count steps. The product is a normal f32, so it is exact everywhere.
    let subnormal = magnitude as i32 as f32 * f32::from_bits(field_of(EXPONENT_MIN - MANTISSA as i32));
    if magnitude < 1 << MANTISSA { subnormal } else { f32::from_bits(normal) }
}

impl Codec for f32 {
    type Bytes = [u8; 4];
    const DTYPE: Dtype = Dtype::F32;

    #[inline(always)]
    fn decode(bytes: [u8; 4]) -> f32 {
        f32::from_ne_bytes(bytes)
    }

    #[inline(always)]
    fn encode(value: f32) -> [u8; 4] {
        value.to_ne_bytes()
    }
}

impl Codec for bf16 {
    type Bytes = [u8; 2];
    const DTYPE: Dtype = Dtype::BF16;

    #[inline(always)]
    fn decode(bytes: [u8; 2]) -> f32 {
        f32::from_bits(u32::from(u16::from_ne_bytes(bytes)) << 16)
    }

    #[inline(always)]
    fn encode(value: f32) -> [u8; 2] {
        let bits = value.to_bits();
        // Carries run from the mantissa into the exponent, at the end into infinity: all as it should be.
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
        let bits = if bits & !F32_SIGN > F32_INFINITY { bits | F32_QUIET } else { rounded };
        ((bits >> 16) as u16).to_ne_bytes()
    }
}

impl Codec for f16 {
    type Bytes = [u8; 2];
    const DTYPE: Dtype = Dtype::F16;

    #[inline(always)]
    fn decode(bytes: [u8; 2]) -> f32 {
        const INFINITY: u32 = 0x7c00;
        let bits = u32::from(u16::from_ne_bytes(bytes));
        let magnitude = bits & 0x7fff;
        let quiet = if magnitude > INFINITY { F32_QUIET } else { 0 };
        let special = F32_INFINITY | (magnitude << 13 & !F32_INFINITY) | quiet;
        let finite = widen_magnitude::<10, -14>(magnitude).to_bits();
        let value = if magnitude < INFINITY { finite } else { special };
        f32::from_bits(value | (bits & 0x8000) << 16)
    }

    #[inline(always)]
    fn encode(value: f32) -> [u8; 2] {
        // 2^16: rounds to the code after the largest finite one, which is infinity. So does all from 65520 on.
        const CAP: u32 = 65536_f32.to_bits();
        let magnitude = value.to_bits() & !F32_SIGN;
        let rounded = round_magnitude::<10, -14>(magnitude.min(CAP));
        let nan = 0x7e00 | (magnitude >> 13 & 0x03ff);
        let code = if magnitude > F32_INFINITY { nan } else { rounded };
        (code as u16 | (value.to_bits() >> 16) as u16 & 0x8000).to_ne_bytes()
    }
}

impl Codec for F8E4M3 {
    type Bytes = u8;
    const DTYPE: Dtype = Dtype::F8E4M3;

    #[inline(always)]
    fn decode(bits: u8) -> f32 {
        let magnitude = u32::from(bits & 0x7f);
        let finite = widen_magnitude::<3, -6>(magnitude).to_bits();
        let value = if magnitude == 0x7f { F32_INFINITY | F32_QUIET } else { finite };
        f32::from_bits(value | u32::from(bits & 0x80) << 24)
    }

    #[inline(always)]
    fn encode(value: f32) -> u8 {
        const MAX: u32 = 448_f32.to_bits();
        let magnitude = value.to_bits() & !F32_SIGN;
        let rounded = round_magnitude::<3, -6>(magnitude.min(MAX));
        let signed = rounded | (value.to_bits() >> 24 & 0x80);
        (if magnitude > F32_INFINITY { 0x7f } else { signed }) as u8
    }
}

macro_rules! magnitude {
    ($type:ty, $bits:ty, $infinity:expr) => {
        impl Magnitude for $type {
            type Key = $bits;

            // The shift drops the sign. The addition then wraps for infinities and NaN, in whose exponents all bits are
            // set, and for nothing else: they end up below what it adds to zero.
            #[inline(always)]
            fn key(bytes: Self::Bytes) -> $bits {
                (<$bits>::from_ne_bytes(bytes) << 1).wrapping_sub($infinity << 1)
            }

            #[inline(always)]
            fn magnitude(key: $bits) -> f32 {
                let zero: $bits = ($infinity << 1 as $bits).wrapping_neg();
                <$type>::decode((key.saturating_sub(zero) >> 1).to_ne_bytes())
            }
        }
    };
}

magnitude!(f32, u32, F32_INFINITY);
magnitude!(bf16, u16, bf16::INFINITY.to_bits());
magnitude!(f16, u16, f16::INFINITY.to_bits());

impl Element for f32 {}
impl Element for bf16 {}
impl Element for f16 {}
impl Element for F8E4M3 {}

impl Float for f32 {}
impl Float for bf16 {}
impl Float for f16 {}
