//! From the largest magnitude of a block to its scale.

use crate::element::F8E4M3;

/// How a scale is rounded, which decides how it can be stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ScaleFormat {
    /// `amax / 448` in f32, as DeepSeek-V3's `weight_scale_inv`.
    #[default]
    F32,
    /// The least power of two that is not below `amax / 448`. [`ue8m0_byte`] gives its one byte.
    Ue8m0,
}

/// The scale of a block whose largest finite magnitude is `amax`: what a quantised value is multiplied by to get the
/// original back. It is positive, finite and a normal f32 for every argument:
///
/// - `amax / 448` is an f32 division, rounded to nearest even; [`ScaleFormat::Ue8m0`] rounds its result up.
/// - For an amax of 0 the scale is 1. DeepSeek's kernel divides by 0 there; 1 keeps zeros zeros, and the table free of
///   values that a reader would have to treat apart. A negative amax and NaN, which no block has, count as 0.
/// - Below 2^-126 the scale is 2^-126, the least normal f32: GPUs flush what is smaller to 0, and would then divide by
///   it. That concerns blocks whose amax is below 5.3e-36.
/// - An infinite amax, which no block has either, counts as the largest f32.
///
/// ```
/// use weight_ops::{ScaleFormat, scale_of};
/// assert_eq!(scale_of(448.0, ScaleFormat::F32), 1.0);
/// assert_eq!(scale_of(449.0, ScaleFormat::Ue8m0), 2.0);
/// ```
pub fn scale_of(amax: f32, format: ScaleFormat) -> f32 {
    const E4M3_MAX: f32 = 448.0;
    const MANTISSA: u32 = 0x007f_ffff;
    debug_assert_eq!(F8E4M3::MAX.to_f32(), E4M3_MAX);
    let amax = if amax > 0.0 { amax.min(f32::MAX) } else { return 1.0 };
    let scale = (amax / E4M3_MAX).max(f32::MIN_POSITIVE);
    match format {
        ScaleFormat::F32 => scale,
        // Adding all ones carries into the exponent unless the mantissa is 0. Far from overflow: it is below 2^120.
        ScaleFormat::Ue8m0 => f32::from_bits((scale.to_bits() + MANTISSA) & !MANTISSA),
    }
}

/// The UE8M0 byte of the least power of two that is not below `scale`: its exponent plus 127. Exact for what [`scale_of`]
/// gives with [`ScaleFormat::Ue8m0`].
///
/// The format holds 2^-127 to 2^127, no zero and no sign. What is at or below 2^-127 gives 0, also 0 and negative
/// numbers; what is above 2^127 gives 254, also infinity; NaN gives 255, which is the format's NaN.
///
/// Source: Open Compute Project, "OCP Microscaling Formats (MX)", version 1.0, E8M0.
///
/// ```
/// assert_eq!(weight_ops::ue8m0_byte(1.0), 127);
/// assert_eq!(weight_ops::ue8m0_byte(0.3), 126); // 0.5
/// ```
pub fn ue8m0_byte(scale: f32) -> u8 {
    /// 2^-127, a subnormal f32.
    const LEAST: f32 = f32::from_bits(0x0040_0000);
    if scale.is_nan() {
        return 255;
    }
    if scale <= LEAST {
        return 0;
    }
    let field = scale.to_bits() >> 23;
    let up = u32::from(scale.to_bits() & 0x007f_ffff != 0);
    (field + up).min(254) as u8
}
