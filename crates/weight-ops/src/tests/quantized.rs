//! Block quantisation against the oracle, whole and cut.

use half::{bf16, f16};
use proptest::prelude::*;

use crate::element::{Codec, F8E4M3, Float};
use crate::error::Error;
use crate::grid::BlockGrid;
use crate::isa::Isa;
use crate::matrix::{MatrixMut, MatrixRef};
use crate::oracle;
use crate::parallel::PARALLEL_ELEMENTS_MIN;
use crate::quantize::{block_amax_on, dequantize_rect_on, quantize_on, quantize_rect_on};
use crate::scale::{ScaleFormat, scale_of, ue8m0_byte};
use crate::tests::inputs::{decoded, weights};

/// What gaps between rows hold before and after.
const GAP: u8 = 0xa5;

/// A matrix in memory whose rows have a gap between them, and what the oracle makes of it.
struct Case {
    grid: BlockGrid,
    format: ScaleFormat,
    stride: usize,
    bytes: Vec<u8>,
    codes: Vec<u8>,
    scales: Vec<f32>,
}

impl Case {
    fn new<T: Float>(shape: [usize; 2], block: [u32; 2], gap: usize, format: ScaleFormat, seed: u64) -> Self {
        let grid = BlockGrid::new(shape, block).unwrap();
        let stride = shape[1] + gap;
        let bytes = weights::<T>(seed, shape[0] * stride);
        let values = decoded::<T>(&bytes);
        let (quantized, scales) =
            oracle::quantize(&grid, format, |row, column| values[row * stride + column]);
        let mut codes = vec![GAP; shape[0] * stride];
        for (row, quantized) in codes.chunks_mut(stride).zip(quantized.chunks(shape[1])) {
            row[..shape[1]].copy_from_slice(quantized);
        }
        Self { grid, format, stride, bytes, codes, scales }
    }

    fn source<T: Float>(&self) -> MatrixRef<'_, T> {
        MatrixRef::from_bytes(&self.bytes, self.grid.shape(), self.stride).unwrap()
    }

    fn destination<'a>(&self, codes: &'a mut [u8]) -> MatrixMut<'a, F8E4M3> {
        MatrixMut::from_bytes(codes, self.grid.shape(), self.stride).unwrap()
    }

    fn check(&self, isa: Isa, codes: &[u8], scales: &[f32]) {
        let bits = |scales: &[f32]| -> Vec<u32> { scales.iter().map(|scale| scale.to_bits()).collect() };
        assert_eq!(bits(scales), bits(&self.scales), "{isa:?}, {:?}: scales", self.grid);
        let differs = codes.iter().zip(&self.codes).position(|(ours, theirs)| ours != theirs);
        assert_eq!(differs, None, "{isa:?}, {:?}, stride {}: codes", self.grid, self.stride);
    }

    fn check_whole<T: Float>(&self, isa: Isa) {
        let mut codes = vec![GAP; self.codes.len()];
        let mut scales = vec![f32::NAN; self.scales.len()];
        let destination = self.destination(&mut codes);
        quantize_on(isa, &self.grid, self.source::<T>(), self.format, destination, &mut scales).unwrap();
        self.check(isa, &codes, &scales);
    }

    /// As ranks would that hold the rectangles `parts`: amaxes of all, then values of all.
    fn check_cut<T: Float>(&self, isa: Isa, parts: &[[[usize; 2]; 2]]) {
        let source = self.source::<T>();
        let mut table = vec![0.0; self.grid.table_len()];
        for &[origin, shape] in parts {
            let part = source.rectangle(origin, shape).unwrap();
            block_amax_on(isa, &self.grid, part, origin, &mut table).unwrap();
        }
        table.iter_mut().for_each(|entry| *entry = scale_of(*entry, self.format));
        let mut codes = vec![GAP; self.codes.len()];
        let mut destination = self.destination(&mut codes);
        for &[origin, shape] in parts.iter().rev() {
            let part = source.rectangle(origin, shape).unwrap();
            let destination = destination.rectangle(origin, shape).unwrap();
            quantize_rect_on(isa, &self.grid, part, origin, &table, destination).unwrap();
        }
        self.check(isa, &codes, &table);
    }

    fn check_all<T: Float>(&self, parts: &[[[usize; 2]; 2]]) {
        for isa in Isa::all() {
            self.check_whole::<T>(isa);
            self.check_cut::<T>(isa, parts);
        }
    }
}

/// Rectangles (origin, shape) that a matrix falls into when `cuts`, one after the other, each split one of them.
fn cut(shape: [usize; 2], cuts: &[(usize, usize, usize)]) -> Vec<[[usize; 2]; 2]> {
    let mut parts = vec![[[0, 0], shape]];
    for &(which, dim, at) in cuts {
        let index = which % parts.len();
        let [origin, shape] = parts[index];
        let at = at % (shape[dim] + 1);
        let (mut lower, mut upper) = ([origin, shape], [origin, shape]);
        lower[1][dim] = at;
        upper[0][dim] += at;
        upper[1][dim] -= at;
        parts[index] = lower;
        parts.push(upper);
    }
    parts
}

fn formats() -> impl Strategy<Value = ScaleFormat> {
    prop_oneof![Just(ScaleFormat::F32), Just(ScaleFormat::Ue8m0)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_cut_gives_the_bits_of_the_whole(
        shape in [1..40_usize, 1..300_usize],
        block in [1..24_u32, 1..200_u32],
        gap in 0..3_usize,
        format in formats(),
        seed: u64,
        cuts in prop::collection::vec((any::<usize>(), 0..2_usize, any::<usize>()), 0..8),
    ) {
        let parts = cut(shape, &cuts);
        Case::new::<bf16>(shape, block, gap, format, seed).check_all::<bf16>(&parts);
        Case::new::<f32>(shape, block, gap, format, seed).check_all::<f32>(&parts);
        Case::new::<f16>(shape, block, gap, format, seed).check_all::<f16>(&parts);
    }
}

#[test]
fn deepseek_blocks_on_any_number_of_threads() {
    let shape = [1200, 700];
    assert!(shape[0] / 2 * shape[1] > PARALLEL_ELEMENTS_MIN);
    let case = Case::new::<bf16>(shape, [128, 128], 4, ScaleFormat::F32, 3);
    // Borders inside blocks.
    let parts = cut(shape, &[(0, 0, 601), (0, 1, 699), (1, 1, 1)]);
    for threads in [1, 2, 5] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| case.check_all::<bf16>(&parts));
    }
}

#[test]
fn one_scale_for_all_and_one_for_each() {
    for block in [[1, 1], [1, 128], [u32::MAX, u32::MAX]] {
        Case::new::<f32>([9, 260], block, 0, ScaleFormat::Ue8m0, 4).check_all::<f32>(&[[[0, 0], [9, 260]]]);
    }
}

/// Quantises all of `source` with one scale.
fn with_scale<T: Float>(isa: Isa, source: &[u8], scale: f32) -> Vec<u8> {
    let shape = [1, source.len() / size_of::<T>()];
    let grid = BlockGrid::new(shape, [1, u32::MAX]).unwrap();
    let mut codes = vec![0; shape[1]];
    let source = MatrixRef::<T>::from_bytes(source, shape, shape[1]).unwrap();
    let destination = MatrixMut::from_bytes(&mut codes, shape, shape[1]).unwrap();
    quantize_rect_on(isa, &grid, source, [0, 0], &[scale], destination).unwrap();
    codes
}

#[test]
fn every_bf16_with_every_kind_of_scale() {
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_ne_bytes).collect();
    let usual = [1.0, 0.05 / 448.0, 0.3 / 448.0, 7.0 / 448.0, 2_f32.powi(-12), 1.0_f32.next_down()];
    let least_and_largest = [0.0, f32::MAX].map(|amax: f32| scale_of(amax.max(1e-44), ScaleFormat::F32));
    let never_given = [0.0, -0.0, -2.0, 1e-40, f32::MAX, f32::INFINITY, f32::NAN];
    for scale in usual.into_iter().chain(least_and_largest).chain(never_given) {
        let expected: Vec<u8> =
            decoded::<bf16>(&all).iter().map(|value| oracle::f32_to_e4m3(value / scale)).collect();
        for isa in Isa::all() {
            assert!(with_scale::<bf16>(isa, &all, scale) == expected, "{isa:?}, scale {scale:e}");
        }
    }
}

#[test]
fn a_division_is_not_a_product_with_the_reciprocal() {
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_ne_bytes).collect();
    let values = decoded::<bf16>(&all);
    let scale = 0.199_218_75 / 448.0;
    let quotients = values.iter().map(|value| oracle::f32_to_e4m3(value / scale));
    let products = values.iter().map(|value| oracle::f32_to_e4m3(value * (1.0 / scale)));
    assert!(quotients.clone().ne(products), "else this scale shows nothing");
    for isa in Isa::all() {
        assert!(quotients.clone().eq(with_scale::<bf16>(isa, &all, scale)), "{isa:?}");
    }
}

#[test]
fn what_is_not_finite_does_not_touch_its_block() {
    let row = [f32::NAN, f32::INFINITY, -0.25, f32::NEG_INFINITY, -0.0, -f32::NAN].map(bf16::from_f32);
    let grid = BlockGrid::new([1, 6], [128, 128]).unwrap();
    for isa in Isa::all() {
        let (mut codes, mut scales) = ([F8E4M3::default(); 6], [0.0]);
        let destination = MatrixMut::new(&mut codes, [1, 6], 6).unwrap();
        let source = MatrixRef::new(&row, [1, 6], 6).unwrap();
        quantize_on(isa, &grid, source, ScaleFormat::F32, destination, &mut scales).unwrap();
        assert_eq!(scales, [0.25 / 448.0]);
        assert_eq!(codes.map(F8E4M3::to_bits), [0x7f, 0x7e, 0xfe, 0xfe, 0x80, 0x7f]);
        let mut amax = [0.125];
        block_amax_on(isa, &grid, source.rectangle([0, 0], [1, 2]).unwrap(), [0, 0], &mut amax).unwrap();
        assert_eq!(amax, [0.125]);
    }
}

#[test]
fn dequantised_as_the_oracle_does() {
    let codes: Vec<u8> = (0..=u8::MAX).collect();
    let grid = BlockGrid::new([4, 64], [2, 48]).unwrap();
    // The last three give NaN where others do not, or have bits of their own.
    let of_nan = [f32::INFINITY, -f32::NAN, f32::from_bits(0x7f80_0001), f32::from_bits(0xffd5_5555)];
    for (isa, scales) in Isa::all().flat_map(|isa| [(isa, [1.0, 0.3, 1e-3, 7e30]), (isa, of_nan)]) {
        let source = MatrixRef::from_bytes(&codes, [4, 64], 64).unwrap();
        let (mut f32s, mut bf16s) = (vec![0.0; 256], vec![bf16::ZERO; 256]);
        let destination = MatrixMut::new(&mut f32s, [4, 64], 64).unwrap();
        dequantize_rect_on(isa, &grid, source, [0, 0], &scales, destination).unwrap();
        let destination = MatrixMut::new(&mut bf16s, [4, 64], 64).unwrap();
        dequantize_rect_on(isa, &grid, source, [0, 0], &scales, destination).unwrap();
        for (index, &code) in codes.iter().enumerate() {
            let scale = scales[index / 128 * 2 + index % 64 / 48];
            let expected = oracle::dequantize(code, scale);
            let (ours, ours_bf16) = (f32s[index], bf16s[index]);
            assert_eq!(ours.to_bits(), expected.to_bits(), "{isa:?}, {code:#x} x {scale:e}");
            assert_eq!(ours_bf16.to_bits(), bf16::from_f32(expected).to_bits());
        }
    }
}

#[test]
fn there_and_back_is_within_half_a_step() {
    let case = Case::new::<f32>([64, 96], [32, 32], 0, ScaleFormat::F32, 5);
    let source = case.source::<f32>();
    let mut back = vec![0.0; 64 * 96];
    let codes = MatrixRef::from_bytes(&case.codes, [64, 96], 96).unwrap();
    let destination = MatrixMut::new(&mut back, [64, 96], 96).unwrap();
    dequantize_rect_on(Isa::best(), &case.grid, codes, [0, 0], &case.scales, destination).unwrap();
    let originals = source.rows().flatten().map(|&bytes| f32::decode(bytes));
    for (index, (original, back)) in originals.zip(back).enumerate().filter(|(_, pair)| pair.0.is_finite()) {
        let scale = case.scales[index / 96 / 32 * 3 + index % 96 / 32];
        // Half a step is a sixteenth of the value, or 2^-10 scales where values are subnormal.
        let bound = (original.abs() / 16.0).max(scale * 2_f32.powi(-10)) * 1.000_001;
        assert!((original - back).abs() <= bound, "{original:e} came back as {back:e}, scale {scale:e}");
    }
}

#[test]
fn scales_are_what_the_oracle_says_and_always_usable() {
    let amaxes = (0..=u16::MAX).map(|bits| bf16::from_bits(bits).to_f32().abs());
    for amax in amaxes.chain([f32::MAX, f32::from_bits(1), 448.0_f32.next_up(), 448.0_f32.next_down()]) {
        for format in [ScaleFormat::F32, ScaleFormat::Ue8m0] {
            let scale = scale_of(amax, format);
            assert!(scale.is_normal() && scale > 0.0, "{amax:e} gives {scale:e}");
            if amax.is_finite() {
                assert_eq!(scale.to_bits(), oracle::scale(amax, format).to_bits(), "{amax:e}");
                assert!(amax / scale <= 448.0 || format == ScaleFormat::F32, "{amax:e}");
            }
        }
        let power = scale_of(amax, ScaleFormat::Ue8m0);
        assert_eq!(f64::from(power), 2_f64.powi(i32::from(ue8m0_byte(power)) - 127), "{amax:e}");
    }
    assert_eq!(scale_of(-1.0, ScaleFormat::F32), 1.0);
    assert_eq!(scale_of(0.0, ScaleFormat::Ue8m0), 1.0);
}

#[test]
fn ue8m0_rounds_up_and_stops_at_its_ends() {
    for (scale, byte) in [
        (f32::NAN, 255),
        (f32::INFINITY, 254),
        (f32::MAX, 254),
        (2_f32.powi(127), 254),
        (2_f32.powi(127).next_down(), 254),
        (1.0_f32.next_up(), 128),
        (1.0, 127),
        (1.0_f32.next_down(), 127),
        (f32::MIN_POSITIVE, 1),
        (f32::MIN_POSITIVE.next_down(), 1),
        (f32::MIN_POSITIVE / 2.0, 0),
        (f32::from_bits(1), 0),
        (0.0, 0),
        (-8.0, 0),
    ] {
        assert_eq!(ue8m0_byte(scale), byte, "{scale:e}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let grid = BlockGrid::new([4, 6], [2, 4]).unwrap();
    let isa = Isa::best();
    let (row, mut codes) = ([0.0; 24], [F8E4M3::NAN; 24]);
    let source = MatrixRef::new(&row, [4, 6], 6).unwrap();
    let mut destination = MatrixMut::new(&mut codes, [4, 6], 6).unwrap();
    let blocks = [2, 2];

    let mut long = [0.0; 5];
    let error = block_amax_on(isa, &grid, source, [0, 0], &mut long).unwrap_err();
    assert_eq!(error, Error::TableLength { found: 5, blocks });
    let mut table = [9.0; 4];
    let outside = Error::Outside { origin: [1, 0], shape: [4, 6], outer: [4, 6] };
    assert_eq!(block_amax_on(isa, &grid, source, [1, 0], &mut table).unwrap_err(), outside);
    let whole = || [0..4, 0..6];
    let [rows, columns] = whole();
    let all = destination.part(rows, columns);
    assert_eq!(quantize_rect_on(isa, &grid, source, [1, 0], &table, all).unwrap_err(), outside);
    let overflow = block_amax_on(isa, &grid, source, [usize::MAX, 0], &mut table).unwrap_err();
    assert!(matches!(overflow, Error::Outside { .. }));

    let narrow = destination.rectangle([0, 0], [4, 5]).unwrap();
    let differ = Error::ShapeMismatch { source_shape: [4, 6], destination_shape: [4, 5] };
    assert_eq!(quantize_rect_on(isa, &grid, source, [0, 0], &table, narrow).unwrap_err(), differ);
    let narrow = destination.rectangle([0, 0], [4, 5]).unwrap();
    assert_eq!(quantize_on(isa, &grid, source, ScaleFormat::F32, narrow, &mut table).unwrap_err(), differ);
    let part = source.rectangle([0, 0], [4, 5]).unwrap();
    let narrow = destination.rectangle([0, 0], [4, 5]).unwrap();
    let differ = Error::ShapeMismatch { source_shape: [4, 5], destination_shape: [4, 6] };
    assert_eq!(quantize_on(isa, &grid, part, ScaleFormat::F32, narrow, &mut table).unwrap_err(), differ);
    assert_eq!(table, [9.0; 4]);
    assert_eq!(codes, [F8E4M3::NAN; 24]);
}

#[test]
fn nothing_is_quantised_to_nothing() {
    for shape in [[0, 0], [0, 5], [5, 0]] {
        let grid = BlockGrid::new(shape, [2, 2]).unwrap();
        let source = MatrixRef::<f32>::new(&[], shape, 5).unwrap();
        let destination = || MatrixMut::from_bytes(&mut [], shape, 5).unwrap();
        let isa = Isa::best();
        block_amax_on(isa, &grid, source, [0, 0], &mut []).unwrap();
        quantize_on(isa, &grid, source, ScaleFormat::F32, destination(), &mut []).unwrap();
        quantize_rect_on(isa, &grid, source, [0, 0], &[], destination()).unwrap();
    }
    // Nothing of something, and something with nothing behind it.
    let grid = BlockGrid::new([5, 5], [2, 2]).unwrap();
    let source = MatrixRef::<f32>::new(&[], [2, 0], 0).unwrap();
    let mut amax = [3.0; 9];
    block_amax_on(Isa::best(), &grid, source, [3, 5], &mut amax).unwrap();
    assert_eq!(amax, [3.0; 9]);
    let source = MatrixRef::new(&[2.0_f32], [1, 1], usize::MAX).unwrap();
    assert_eq!(source.rectangle([1, 1], [0, 0]).unwrap().shape(), [0, 0]);
    let (mut code, mut scale) = ([F8E4M3::default()], [0.0]);
    let grid = BlockGrid::new([1, 1], [128, 128]).unwrap();
    let destination = MatrixMut::new(&mut code, [1, 1], usize::MAX).unwrap();
    quantize_on(Isa::best(), &grid, source, ScaleFormat::F32, destination, &mut scale).unwrap();
    assert_eq!((code, scale), ([F8E4M3::MAX], [2.0 / 448.0]));
}

#[test]
fn half_precision_reaches_its_ends() {
    // The largest f16 is 65504: its block's scale is 146.2, and it comes out as the largest e4m3.
    let row = [f16::MAX, f16::MIN_POSITIVE_SUBNORMAL, f16::NEG_INFINITY];
    let grid = BlockGrid::new([1, 3], [1, 3]).unwrap();
    for isa in Isa::all() {
        let (mut codes, mut scales) = ([F8E4M3::default(); 3], [0.0]);
        let destination = MatrixMut::new(&mut codes, [1, 3], 3).unwrap();
        let source = MatrixRef::new(&row, [1, 3], 3).unwrap();
        quantize_on(isa, &grid, source, ScaleFormat::F32, destination, &mut scales).unwrap();
        assert_eq!(scales, [65504.0 / 448.0]);
        assert_eq!(codes.map(F8E4M3::to_bits), [0x7e, 0x00, 0xfe]);
    }
}
