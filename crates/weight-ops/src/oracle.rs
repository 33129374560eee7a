//! What the kernels must compute, said one element at a time.
//!
//! Slow and plain, on purpose: tests compare bits with it, here, in callers and for other devices. It shares no
//! arithmetic with the kernels.

use crate::grid::BlockGrid;
use crate::scale::ScaleFormat;

/// The value of an e4m3 code, from the format's definition.
pub fn e4m3_to_f32(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2_f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2_f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The value of an e4m3 code in a block of this scale. There is one NaN, of bits 0x7fc00000.
pub fn dequantize(code: u8, scale: f32) -> f32 {
    let product = e4m3_to_f32(code) * scale;
    if product.is_nan() { f32::from_bits(0x7fc0_0000) } else { product }
}

/// The e4m3 code nearest to `value`, of two equally near ones the even one, found by trying all.
pub fn f32_to_e4m3(value: f32) -> u8 {
    if value.is_nan() {
        return 0x7f;
    }
    // What is beyond the largest value is nearest to it, and in f64 the differences that decide are exact.
    let magnitude = f64::from(value.abs().min(512.0));
    let distance = |code: u8| (f64::from(e4m3_to_f32(code)) - magnitude).abs();
    let nearest = (0..=0x7e)
        .min_by(|&a: &u8, &b: &u8| distance(a).total_cmp(&distance(b)).then_with(|| (a & 1).cmp(&(b & 1))));
    nearest.unwrap_or_default() | if value.is_sign_negative() { 0x80 } else { 0 }
}

/// The scale for a block whose largest finite magnitude is `amax`: see [`scale_of`](crate::scale_of).
pub fn scale(amax: f32, format: ScaleFormat) -> f32 {
    let least_normal = 2_f32.powi(-126);
    match (amax == 0.0, format) {
        (true, _) => 1.0,
        (false, ScaleFormat::F32) => (amax / 448.0).max(least_normal),
        (false, ScaleFormat::Ue8m0) => {
            let mut scale = least_normal;
            while scale < amax / 448.0 {
                scale *= 2.0;
            }
            scale
        }
    }
}

/// Quantises the whole matrix of `grid`, whose elements `element` tells by row and column: e4m3 codes, row-major, and the
/// table of scales.
pub fn quantize(
    grid: &BlockGrid,
    format: ScaleFormat,
    element: impl Fn(usize, usize) -> f32,
) -> (Vec<u8>, Vec<f32>) {
    let [rows, columns] = grid.shape();
    let ([block_rows, block_columns], [table_rows, table_columns]) = (grid.block(), grid.blocks());
    let amax = |block_row, block_column| {
        let mut amax = 0_f32;
        for row in (0..rows).filter(|row| row / block_rows == block_row) {
            for column in (0..columns).filter(|column| column / block_columns == block_column) {
                let element = element(row, column);
                if element.is_finite() {
                    amax = amax.max(element.abs());
                }
            }
        }
        amax
    };
    let scale_at = |row, column| scale(amax(row, column), format);
    let scales: Vec<f32> =
        (0..table_rows).flat_map(|row| (0..table_columns).map(move |column| scale_at(row, column))).collect();
    let code_at = |row, column| {
        let block = row / block_rows * table_columns + column / block_columns;
        f32_to_e4m3(element(row, column) / scales.get(block).copied().unwrap_or(f32::NAN))
    };
    let codes = (0..rows).flat_map(|row| (0..columns).map(move |column| code_at(row, column))).collect();
    (codes, scales)
}
