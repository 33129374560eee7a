//! Block quantisation on a GPU against that of the CPU and against the oracle, bit by bit.

mod cuda;

use cuda::{FLOATS, Gpu, POISON, Random, assert_same, encoded, singles};
use half::{bf16, f16};
use weight_ops::cuda::{DeviceMatrix, DeviceRange, Error};
use weight_ops::{BlockGrid, Dtype, Error as ShapeError, Float, MatrixMut, MatrixRef, ScaleFormat};
use weight_ops::{block_amax, oracle, quantize};

type Part = [[usize; 2]; 2];

/// A matrix in memory, rows `stride` elements apart, on the CPU.
struct Case {
    grid: BlockGrid,
    format: ScaleFormat,
    dtype: Dtype,
    stride: usize,
    bytes: Vec<u8>,
}

/// Codes, with poison between rows, and scales.
type Quantized = (Vec<u8>, Vec<f32>);

impl Case {
    fn new(
        shape: [usize; 2],
        block: [u32; 2],
        gap: usize,
        dtype: Dtype,
        format: ScaleFormat,
        seed: u64,
    ) -> Case {
        let grid = BlockGrid::new(shape, block).unwrap();
        let stride = shape[1] + gap;
        let bytes = Random(seed).elements(dtype, shape[0] * stride);
        Case { grid, format, dtype, stride, bytes }
    }

    fn on_cpu(&self) -> Quantized {
        match self.dtype {
            Dtype::BF16 => self.on_cpu_as::<bf16>(),
            Dtype::F16 => self.on_cpu_as::<f16>(),
            _ => self.on_cpu_as::<f32>(),
        }
    }

    fn on_cpu_as<T: Float>(&self) -> Quantized {
        let shape = self.grid.shape();
        let mut codes = vec![POISON; shape[0] * self.stride];
        let mut scales = vec![f32::NAN; self.grid.table_len()];
        let source = MatrixRef::<T>::from_bytes(&self.bytes, shape, self.stride).unwrap();
        let destination = MatrixMut::from_bytes(&mut codes, shape, self.stride).unwrap();
        quantize(&self.grid, source, self.format, destination, &mut scales).unwrap();
        (codes, scales)
    }

    /// In one step on the GPU, from and to memory that is so many elements off.
    fn check_whole(&self, gpu: &Gpu, shifts: [usize; 2]) {
        let (codes, scales) = self.on_cpu();
        let source = self.upload(gpu, shifts[0]);
        let destination = gpu.guarded(codes.len(), shifts[1]);
        let table = gpu.guarded(scales.len() * 4, 0);
        let matrix = self.matrix(&destination.range);
        gpu.run(gpu.kernels.quantize(&self.grid, &source, self.format, &matrix, &table.range).unwrap());
        self.check(&gpu.read(&table), &scales, &gpu.read(&destination), &codes);
    }

    /// As ranks would that hold the rectangles `parts`.
    fn check_cut(&self, gpu: &Gpu, parts: &[Part]) {
        let (codes, scales) = self.on_cpu();
        let destination = gpu.guarded(codes.len(), 0);
        let table = gpu.guarded(scales.len() * 4, 0);
        let zeros = gpu.stream.fill(table.range.clone(), 0).unwrap().wait().unwrap();
        let source = self.upload(gpu, 0);
        for &[origin, shape] in parts {
            let part = self.part(source.range(), self.dtype, origin, shape);
            gpu.run(gpu.kernels.block_amax(&self.grid, &part, origin, &zeros).unwrap());
        }
        gpu.run(gpu.kernels.scales(&table.range, self.format, &table.range).unwrap());
        for &[origin, shape] in parts.iter().rev() {
            let part = self.part(source.range(), self.dtype, origin, shape);
            let values = self.part(&destination.range, Dtype::F8E4M3, origin, shape);
            gpu.run(gpu.kernels.quantize_rect(&self.grid, &part, origin, &table.range, &values).unwrap());
        }
        self.check(&gpu.read(&table), &scales, &gpu.read(&destination), &codes);
    }

    fn check(&self, table: &[u8], scales: &[f32], ours: &[u8], codes: &[u8]) {
        let what = format!("{:?}, {}, stride {}", self.grid, self.dtype, self.stride);
        let scales: Vec<u8> = scales.iter().flat_map(|scale| scale.to_ne_bytes()).collect();
        assert_same(table, &scales, &format!("{what}: scales"));
        assert_same(ours, codes, &format!("{what}: codes"));
    }

    fn upload(&self, gpu: &Gpu, shift: usize) -> DeviceMatrix {
        let range = gpu.upload(&self.bytes, shift * self.dtype.bytes());
        DeviceMatrix::new(&range, self.dtype, self.grid.shape(), self.stride).unwrap()
    }

    fn matrix(&self, codes: &DeviceRange) -> DeviceMatrix {
        DeviceMatrix::new(codes, Dtype::F8E4M3, self.grid.shape(), self.stride).unwrap()
    }

    fn part(&self, range: &DeviceRange, dtype: Dtype, origin: [usize; 2], shape: [usize; 2]) -> DeviceMatrix {
        let start = (origin[0] * self.stride + origin[1]) * dtype.bytes();
        let len = self.grid.shape()[0] * self.stride * dtype.bytes();
        let range = range.part(start.min(len) as u64..len as u64).unwrap();
        DeviceMatrix::new(&range, dtype, shape, self.stride).unwrap()
    }
}

/// Rectangles (origin, shape) that a matrix falls into when it is split a few times.
fn cut(random: &mut Random, shape: [usize; 2]) -> Vec<Part> {
    let mut parts = vec![[[0, 0], shape]];
    for _ in 0..random.below(6) {
        let index = random.below(parts.len());
        let [origin, shape] = parts[index];
        let dim = random.below(2);
        let at = random.below(shape[dim] + 1);
        let (mut lower, mut upper) = ([origin, shape], [origin, shape]);
        lower[1][dim] = at;
        upper[0][dim] += at;
        upper[1][dim] -= at;
        parts[index] = lower;
        parts.push(upper);
    }
    parts
}

const FORMATS: [ScaleFormat; 2] = [ScaleFormat::F32, ScaleFormat::Ue8m0];

#[test]
fn whole_matrices_of_any_shape() {
    let Some(gpu) = Gpu::open() else { return };
    // Tiles in registers and ragged ones, by columns and by rows; strides and addresses that are aligned and not.
    let shapes = [[128, 128], [256, 384], [300, 256], [576, 512], [130, 700], [1, 128], [129, 1], [64, 127]];
    for (index, shape) in shapes.into_iter().enumerate() {
        for dtype in FLOATS {
            for (gap, shifts) in
                [(0, [0, 0]), (16, [16, 8]), (8, [8, 16]), (1, [0, 0]), (16, [1, 0]), (16, [0, 3])]
            {
                let seed = index as u64 * 100 + gap as u64;
                Case::new(shape, [128, 128], gap, dtype, FORMATS[gap % 2], seed).check_whole(&gpu, shifts);
            }
        }
    }
}

#[test]
fn blocks_of_any_shape_cut_anywhere() {
    let Some(gpu) = Gpu::open() else { return };
    let mut random = Random(2);
    let blocks =
        [[128, 128], [1, 128], [2, 4], [24, 100], [100, 200], [128, 64], [u32::MAX, u32::MAX], [7, 300]];
    for (index, block) in blocks.into_iter().enumerate() {
        for dtype in FLOATS {
            let shape = [1 + random.below(300), 1 + random.below(500)];
            let gap = [0, 3, 8 - shape[1] % 8][random.below(3)];
            let case = Case::new(shape, block, gap, dtype, FORMATS[index % 2], index as u64);
            case.check_cut(&gpu, &cut(&mut random, shape));
            case.check_cut(&gpu, &[[[0, 0], shape]]);
            if block.iter().all(|&len| len <= 128) {
                case.check_whole(&gpu, [0, 0]);
            }
        }
    }
}

#[test]
fn shards_that_begin_at_odd_rows_and_columns() {
    let Some(gpu) = Gpu::open() else { return };
    let shape = [300, 640];
    for dtype in FLOATS {
        let case = Case::new(shape, [128, 128], 0, dtype, ScaleFormat::F32, 9);
        case.check_cut(&gpu, &[[[0, 0], [101, 640]], [[101, 0], [199, 257]], [[101, 257], [199, 383]]]);
        case.check_cut(&gpu, &[[[0, 0], [300, 320]], [[0, 320], [300, 320]]]);
    }
}

#[test]
fn blocks_that_are_special() {
    let Some(gpu) = Gpu::open() else { return };
    let (tile, any) = (128 * 128, 0.01);
    let fill = |value: f32| vec![value; tile];
    let one = |value: f32| {
        let mut block = fill(any);
        block[77 * 128 + 33] = value;
        block
    };
    let tiny = f32::from_bits(1);
    let blocks = [
        fill(0.0),
        fill(-0.0),
        fill(f32::NAN),
        fill(f32::INFINITY),
        one(f32::NAN),
        one(f32::NEG_INFINITY),
        one(f32::MAX),
        one(65504.0),
        fill(f32::MAX),
        fill(f32::MIN),
        fill(tiny),
        one(-0.0),
        fill(f32::MIN_POSITIVE),
        fill(2_f32.powi(-60) * 448.0),
        fill((2_f32.powi(-60) * 448.0).next_down()),
        fill(2_f32.powi(60) * 448.0),
        fill((2_f32.powi(60) * 448.0).next_up()),
        (0..tile).map(|index| tiny * index as f32).collect(),
        (0..tile).map(|index| if index % 2 == 0 { f32::MAX } else { tiny }).collect(),
        (0..tile).map(|index| [f32::NAN, f32::INFINITY, -0.0, 1.0][index % 4]).collect(),
    ];
    for dtype in FLOATS {
        for format in FORMATS {
            // In registers, and with a column more element by element.
            for columns in [128, 129] {
                for (index, block) in blocks.iter().enumerate() {
                    let values: Vec<f32> =
                        block.chunks(128).flat_map(|row| row.iter().copied().chain([any])).collect();
                    let grid = BlockGrid::new([128, columns], [128, 129]).unwrap();
                    let mut case = Case { grid, format, dtype, stride: 129, bytes: encoded(dtype, &values) };
                    if columns == 128 {
                        case.stride = 128;
                        case.bytes = encoded(dtype, block);
                    }
                    println!("block {index} of {columns} columns");
                    match columns {
                        128 => case.check_whole(&gpu, [0, 0]),
                        _ => case.check_cut(&gpu, &[[[0, 0], [128, 129]]]),
                    }
                }
            }
        }
    }
}

#[test]
fn many_blocks_at_once() {
    let Some(gpu) = Gpu::open() else { return };
    for dtype in FLOATS {
        Case::new([1664, 2048], [128, 128], 0, dtype, ScaleFormat::F32, 11).check_whole(&gpu, [0, 0]);
    }
}

#[test]
fn as_the_oracle_says() {
    let Some(gpu) = Gpu::open() else { return };
    let case = Case::new([130, 260], [128, 128], 0, Dtype::F32, ScaleFormat::Ue8m0, 12);
    let values = singles(&case.bytes);
    let (codes, scales) = oracle::quantize(&case.grid, case.format, |row, column| values[row * 260 + column]);
    let destination = gpu.guarded(codes.len(), 0);
    let table = gpu.guarded(scales.len() * 4, 0);
    let source = case.upload(&gpu, 0);
    let matrix = case.matrix(&destination.range);
    gpu.run(gpu.kernels.quantize(&case.grid, &source, case.format, &matrix, &table.range).unwrap());
    case.check(&gpu.read(&table), &scales, &gpu.read(&destination), &codes);
}

#[test]
fn amaxes_are_folded_into_what_the_table_holds() {
    let Some(gpu) = Gpu::open() else { return };
    let case = Case::new([200, 300], [128, 128], 4, Dtype::BF16, ScaleFormat::F32, 13);
    let mut table: Vec<f32> = (0..6).map(|index| index as f32 * 1e37).collect();
    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_ne_bytes()).collect();
    let on_device = gpu.upload(&bytes, 0);
    let part = case.part(case.upload(&gpu, 0).range(), Dtype::BF16, [100, 50], [60, 100]);
    gpu.run(gpu.kernels.block_amax(&case.grid, &part, [100, 50], &on_device).unwrap());
    let whole = MatrixRef::<bf16>::from_bytes(&case.bytes, [200, 300], 304).unwrap();
    let part = whole.rectangle([100, 50], [60, 100]).unwrap();
    block_amax(&case.grid, part, [100, 50], &mut table).unwrap();
    let expected: Vec<u8> = table.iter().flat_map(|entry| entry.to_ne_bytes()).collect();
    assert_same(&gpu.download(&on_device), &expected, "amaxes");
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(gpu) = Gpu::open() else { return };
    let memory = gpu.guarded(4096, 0);
    let part = |start: u64, len: u64| memory.range.part(start..start + len).unwrap();
    let matrix = |start, dtype, shape: [usize; 2]| {
        DeviceMatrix::new(&part(start, 1024), dtype, shape, shape[1]).unwrap()
    };
    let (source, codes) = (matrix(0, Dtype::BF16, [4, 6]), matrix(1024, Dtype::F8E4M3, [4, 6]));
    let grid = BlockGrid::new([4, 6], [2, 4]).unwrap();
    let kernels = &gpu.kernels;
    let format = ScaleFormat::F32;

    let length = kernels.quantize(&grid, &source, format, &codes, &part(2048, 20)).unwrap_err();
    assert!(matches!(length, Error::WrongLength { bytes: 20, expected: 16, .. }), "{length}");
    let odd = kernels.quantize(&grid, &source, format, &codes, &part(2050, 16)).unwrap_err();
    assert!(matches!(odd, Error::Misaligned { element_bytes: 4, .. }), "{odd}");
    let table = part(2048, 16);
    let dtype = kernels.quantize(&grid, &codes, format, &codes, &table).unwrap_err();
    assert!(matches!(dtype, Error::WrongDtype { what: "the source", .. }), "{dtype}");
    let dtype = kernels.quantize_rect(&grid, &source, [0, 0], &table, &source).unwrap_err();
    assert!(matches!(dtype, Error::WrongDtype { what: "the destination", .. }), "{dtype}");
    let outside = kernels.block_amax(&grid, &source, [1, 0], &table).unwrap_err();
    assert!(matches!(outside, Error::Shape(ShapeError::Outside { .. })), "{outside}");
    let narrow = matrix(1024, Dtype::F8E4M3, [4, 5]);
    let shape = kernels.quantize_rect(&grid, &source, [0, 0], &table, &narrow).unwrap_err();
    assert!(matches!(shape, Error::Shape(ShapeError::ShapeMismatch { .. })), "{shape}");
    let shape = kernels.quantize(&grid, &matrix(0, Dtype::BF16, [2, 6]), format, &codes, &table).unwrap_err();
    assert!(matches!(shape, Error::Shape(ShapeError::ShapeMismatch { .. })), "{shape}");
    let large = BlockGrid::new([4, 200], [4, 129]).unwrap();
    let wide = DeviceMatrix::new(&memory.range, Dtype::BF16, [4, 200], 200).unwrap();
    let wide_codes = DeviceMatrix::new(&memory.range, Dtype::F8E4M3, [4, 200], 200).unwrap();
    let block = kernels.quantize(&large, &wide, format, &wide_codes, &part(2048, 8)).unwrap_err();
    assert_eq!(block, Error::BlockTooLarge { block: [4, 129] });
    let uneven = kernels.scales(&part(0, 16), format, &part(16, 12)).unwrap_err();
    assert!(matches!(uneven, Error::WrongLength { .. }), "{uneven}");
    assert!(DeviceMatrix::new(&part(0, 46), Dtype::BF16, [4, 6], 6).is_err());
    assert!(DeviceMatrix::new(&part(1, 48), Dtype::BF16, [4, 6], 6).is_err());

    // Nothing of something.
    let none = DeviceMatrix::new(&part(0, 0), Dtype::BF16, [0, 6], 6).unwrap();
    gpu.run(kernels.block_amax(&grid, &none, [3, 0], &table).unwrap());
    assert_eq!(gpu.read(&memory), vec![POISON; 4096]);
}
