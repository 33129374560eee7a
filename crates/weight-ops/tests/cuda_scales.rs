//! Scales on a GPU, and what is divided and multiplied by them, against the CPU, bit by bit.

mod cuda;

use cuda::{FLOATS, Gpu, POISON, Random, adversarial, assert_same, encoded, singles};
use half::{bf16, f16};
use weight_ops::cuda::DeviceMatrix;
use weight_ops::{BlockGrid, Dtype, F8E4M3, Float, MatrixMut, MatrixRef, ScaleFormat};
use weight_ops::{dequantize_rect, oracle, quantize_rect, scale_of, ue8m0_byte};

/// Quantises all of `source` with one scale: on the GPU as one row of whole tiles, on the CPU.
fn check_scale(gpu: &Gpu, dtype: Dtype, source: &[u8], scale: f32) {
    let shape = [1, source.len() / dtype.bytes()];
    let grid = BlockGrid::new(shape, [1, u32::MAX]).unwrap();
    let mut expected = vec![0; shape[1]];
    let destination = MatrixMut::<F8E4M3>::from_bytes(&mut expected, shape, shape[1]).unwrap();
    match dtype {
        Dtype::BF16 => quantize_rect(&grid, of::<bf16>(source, shape), [0, 0], &[scale], destination),
        Dtype::F16 => quantize_rect(&grid, of::<f16>(source, shape), [0, 0], &[scale], destination),
        _ => quantize_rect(&grid, of::<f32>(source, shape), [0, 0], &[scale], destination),
    }
    .unwrap();
    let codes = gpu.guarded(shape[1], 0);
    let table = gpu.upload(&scale.to_ne_bytes(), 0);
    let matrix = |range, dtype| DeviceMatrix::new(range, dtype, shape, shape[1]).unwrap();
    let (source, values) = (gpu.upload(source, 0), matrix(&codes.range, Dtype::F8E4M3));
    gpu.run(gpu.kernels.quantize_rect(&grid, &matrix(&source, dtype), [0, 0], &table, &values).unwrap());
    assert_same(&gpu.read(&codes), &expected, &format!("{dtype}, scale {scale:e}"));
}

fn of<T: Float>(bytes: &[u8], shape: [usize; 2]) -> MatrixRef<'_, T> {
    MatrixRef::from_bytes(bytes, shape, shape[1]).unwrap()
}

#[test]
fn every_value_with_every_kind_of_scale() {
    let Some(gpu) = Gpu::open() else { return };
    let usual = [1.0, 0.05 / 448.0, 0.3 / 448.0, 7.0 / 448.0, 2_f32.powi(-12), 1.0_f32.next_down(), 146.2];
    let ends = [0.0, f32::MAX].map(|amax: f32| scale_of(amax.max(1e-44), ScaleFormat::F32));
    let never_given = [0.0, -0.0, -2.0, 1e-40, f32::MAX, f32::INFINITY, f32::NAN];
    let borders =
        [2_f32.powi(-60), 2_f32.powi(60)].map(|border| [border.next_down(), border, border.next_up()]);
    let scales: Vec<f32> =
        usual.into_iter().chain(ends).chain(never_given).chain(borders.into_iter().flatten()).collect();
    for dtype in FLOATS {
        let mut source = adversarial(dtype);
        source.truncate(source.len() / (128 * dtype.bytes()) * 128 * dtype.bytes());
        for &scale in &scales {
            check_scale(&gpu, dtype, &source, scale);
        }
    }
}

#[test]
fn scales_that_are_powers_of_two_are_stored_as_their_bytes() {
    let Some(gpu) = Gpu::open() else { return };
    let amaxes =
        (0..=254_u32).flat_map(|exponent| [exponent << 23, exponent << 23 | 0x55_5555].map(f32::from_bits));
    let scales: Vec<f32> = amaxes.map(|amax| scale_of(amax, ScaleFormat::Ue8m0)).collect();
    let expected: Vec<u8> = scales.iter().map(|scale| ue8m0_byte(*scale)).collect();
    let table: Vec<u8> = scales.iter().flat_map(|scale| scale.to_ne_bytes()).collect();
    let (table, bytes) = (gpu.upload(&table, 0), gpu.guarded(expected.len(), 0));
    gpu.run(gpu.kernels.scale_bytes(&table, &bytes.range).unwrap());
    assert_same(&gpu.read(&bytes), &expected, "bytes of scales");
    assert!(gpu.kernels.scale_bytes(&table, &table).is_err(), "a byte for each entry");
}

#[test]
fn quotients_at_ties_and_beside_them() {
    let Some(gpu) = Gpu::open() else { return };
    // Values whose quotient is a tie between two codes, as nearly as f32 can say it, and their neighbours.
    let codes: Vec<f32> = (0..0x7f).map(oracle::e4m3_to_f32).collect();
    let ties: Vec<f32> = codes.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
    let mut random = Random(5);
    for case in 0..200 {
        let mantissa = match case {
            0..40 => random.below(64) as u32,              // just above a power of two
            40..80 => 0x7f_ffff - random.below(64) as u32, // just below
            _ => random.below(1 << 23) as u32,
        };
        let exponent = 127 - 58 + random.below(116) as u32;
        let scale = f32::from_bits(exponent << 23 | mantissa);
        let mut values: Vec<f32> = Vec::new();
        for tie in &ties {
            let middle = tie * scale;
            let bits = middle.to_bits();
            values.extend((bits - 3..=bits + 3).map(f32::from_bits));
            values.extend((bits - 3..=bits + 3).map(|bits| -f32::from_bits(bits)));
        }
        values.resize(values.len().next_multiple_of(128), 0.0);
        check_scale(&gpu, Dtype::F32, &encoded(Dtype::F32, &values), scale);
    }
}

#[test]
fn scales_of_every_amax() {
    let Some(gpu) = Gpu::open() else { return };
    let amaxes = adversarial(Dtype::F32);
    for format in [ScaleFormat::F32, ScaleFormat::Ue8m0] {
        let expected: Vec<u8> =
            singles(&amaxes).iter().flat_map(|&amax| scale_of(amax, format).to_ne_bytes()).collect();
        let (source, scales) = (gpu.upload(&amaxes, 0), gpu.guarded(amaxes.len(), 4));
        gpu.run(gpu.kernels.scales(&source, format, &scales.range).unwrap());
        assert_same(&gpu.read(&scales), &expected, "scales");
    }
}

#[test]
fn back_again() {
    let Some(gpu) = Gpu::open() else { return };
    check_back(&gpu, [1.0, 0.3, 1e-3, 7e30, 1e-38, 3e38]);
    // Products that are NaN, of zeros or of scales with bits of their own.
    let nans = [0x7fff_ffff, 0xffc0_0000, 0x7f80_0001, 0xffd5_5555].map(f32::from_bits);
    check_back(&gpu, [nans[0], nans[1], nans[2], nans[3], f32::INFINITY, f32::NEG_INFINITY]);
}

/// Dequantises every code with each of these scales.
fn check_back(gpu: &Gpu, table: [f32; 6]) {
    let codes: Vec<u8> = (0..=u8::MAX).cycle().take(150 * 300).collect();
    let grid = BlockGrid::new([150, 300], [100, 128]).unwrap();
    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_ne_bytes()).collect();
    let (on_device, scales) = (gpu.upload(&codes, 1), gpu.upload(&bytes, 0));
    let (origin, shape) = ([3, 5], [147, 290]);
    let start = 3 * 300 + 5;
    let part = on_device.part(start..150 * 300).unwrap();
    let part = DeviceMatrix::new(&part, Dtype::F8E4M3, shape, 300).unwrap();
    for dtype in FLOATS {
        let mut expected = vec![POISON; 147 * 290 * dtype.bytes()];
        let source = MatrixRef::<F8E4M3>::from_bytes(&codes[start as usize..], shape, 300).unwrap();
        let result = &mut expected;
        match dtype {
            Dtype::BF16 => dequantize_rect(&grid, source, origin, &table, to::<bf16>(result, shape)),
            Dtype::F16 => dequantize_rect(&grid, source, origin, &table, to::<f16>(result, shape)),
            _ => dequantize_rect(&grid, source, origin, &table, to::<f32>(result, shape)),
        }
        .unwrap();
        let destination = gpu.guarded(expected.len(), dtype.bytes());
        let matrix = DeviceMatrix::new(&destination.range, dtype, shape, shape[1]).unwrap();
        gpu.run(gpu.kernels.dequantize_rect(&grid, &part, origin, &scales, &matrix).unwrap());
        assert_same(&gpu.read(&destination), &expected, "values");
    }
}

fn to<T: Float>(bytes: &mut [u8], shape: [usize; 2]) -> MatrixMut<'_, T> {
    MatrixMut::from_bytes(bytes, shape, shape[1]).unwrap()
}
