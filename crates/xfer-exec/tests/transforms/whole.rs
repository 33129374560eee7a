//! FSDP to TP in blocks of 128 x 128 that four trainers cut, beside the kernels over the whole tensor.

use half::bf16;
use weight_ops::{BlockGrid, F8E4M3, MatrixMut, MatrixRef, quantize, ue8m0_byte};
use xfer_plan::{
    BlockQuant, DType, DestinationParam, DeviceMesh, Manifest, ParamMap, Placement, PlanOptions, RailDecl,
    ReceiverManifest, RegionIndex, ScaleFormat, SourcePiece, TensorBox, TrainerManifest, shard_box,
};

const SHAPES: [[u64; 2]; 2] = [[300, 520], [260, 400]];
const TRAINERS: u64 = 4;
const RECEIVERS: u64 = 2;

/// A tensor's elements: magnitudes of many sizes, so that a wrong scale shows.
fn elements(number: usize) -> Vec<bf16> {
    let [rows, columns] = SHAPES[number];
    let value = |at: u64| {
        let mixed = (at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ number as u64) >> 40;
        let scale = 2_f32.powi((at / 1000 % 20) as i32 - 10);
        bf16::from_f32((mixed as f32 / 8_388_608.0 - 1.0) * scale)
    };
    (0..rows * columns).map(value).collect()
}

/// Each trainer has a quarter of the rows of both tensors, or of the columns, which are no multiples of 128.
pub(crate) fn cut_by_four() -> (Manifest, Vec<Vec<Vec<u8>>>) {
    make(Placement::Shard(0), ScaleFormat::F32)
}

fn make(placement: Placement, scales: ScaleFormat) -> (Manifest, Vec<Vec<Vec<u8>>>) {
    let mesh = DeviceMesh::new(&[TRAINERS]).unwrap();
    let rails = vec![RailDecl { bytes_per_second: 1 }];
    let (mut trainers, mut sources) = (Vec::new(), Vec::new());
    for rank in 0..TRAINERS {
        let (mut pieces, mut region) = (Vec::new(), Vec::new());
        for (number, shape) in SHAPES.iter().enumerate() {
            let bounds = shard_box(shape, &mesh, &[placement], rank).unwrap();
            let offset = region.len() as u64;
            let all = elements(number);
            let [(row, rows), (column, columns)] = [0, 1].map(|dim| bounds.extent(dim).unwrap());
            for row in row..row + rows {
                let row = &all[(row * shape[1] + column) as usize..][..columns as usize];
                region.extend(row.iter().flat_map(|element| element.to_ne_bytes()));
            }
            let (tensor, dtype) = (format!("w{number}"), DType::BF16);
            pieces.push(SourcePiece {
                tensor,
                dtype,
                shape: shape.to_vec(),
                bounds,
                region: RegionIndex(0),
                offset,
            });
        }
        let regions = vec![region.len() as u64];
        trainers.push(TrainerManifest { host: format!("t{rank}"), regions, rails: rails.clone(), pieces });
        sources.push(vec![region]);
    }
    let quant = BlockQuant { scales, ..BlockQuant::default() };
    // Half of the rows each, and all scales.
    let receivers = (0..RECEIVERS).map(|rank| {
        let (mut params, mut end) = (Vec::new(), 0);
        for (number, shape) in SHAPES.iter().enumerate() {
            let rows = shape[0] / RECEIVERS;
            let half = TensorBox::new(&[rank * rows, 0], &[rows, shape[1]]).unwrap();
            let tensor = ParamMap::tensor(format!("w{number}"));
            let codes = (tensor.clone().quantize(quant).slice(half), DType::F8E4M3, vec![rows, shape[1]]);
            let scales = (tensor.scales(quant), scales.dtype(), quant.scales_shape(shape).unwrap());
            for (kind, (map, dtype, shape)) in [("codes", codes), ("scales", scales)] {
                let bytes = shape.iter().product::<u64>() * dtype.bytes();
                let (name, region) = (format!("{kind}{number}"), RegionIndex(0));
                params.push(DestinationParam {
                    name,
                    dtype,
                    shape,
                    region,
                    offset: end,
                    map: map.into(),
                    priority: 0,
                });
                end += bytes;
            }
        }
        ReceiverManifest { host: format!("r{rank}"), regions: vec![end], rails: rails.clone(), params }
    });
    // Rows of blocks are cut between operations too.
    let options = PlanOptions { gather_chunk_bytes_max: 24 << 10, ..PlanOptions::default() };
    (Manifest { trainers, receivers: receivers.collect(), options }, sources)
}

/// What the kernels make of the whole tensors.
fn expected(scales: ScaleFormat) -> Vec<Vec<Vec<u8>>> {
    let mut regions = vec![Vec::new(); RECEIVERS as usize];
    for (number, shape) in SHAPES.iter().enumerate() {
        let size = shape.map(|len| len as usize);
        let grid = BlockGrid::new(size, [128, 128]).unwrap();
        let (source, mut codes) = (elements(number), vec![F8E4M3::default(); size[0] * size[1]]);
        let mut table = vec![0.0_f32; grid.table_len()];
        let format = match scales {
            ScaleFormat::F32 => weight_ops::ScaleFormat::F32,
            ScaleFormat::Ue8m0 => weight_ops::ScaleFormat::Ue8m0,
        };
        let source = MatrixRef::new(&source, size, size[1]).unwrap();
        let destination = MatrixMut::new(&mut codes, size, size[1]).unwrap();
        quantize(&grid, source, format, destination, &mut table).unwrap();
        for (rank, region) in regions.iter_mut().enumerate() {
            let half = codes.len() / RECEIVERS as usize;
            region.extend(codes[rank * half..][..half].iter().map(|code| code.to_bits()));
            match scales {
                ScaleFormat::F32 => region.extend(table.iter().flat_map(|scale| scale.to_ne_bytes())),
                ScaleFormat::Ue8m0 => region.extend(table.iter().map(|scale| ue8m0_byte(*scale))),
            }
        }
    }
    regions.into_iter().map(|region| vec![region]).collect()
}

/// Pushes these weights of these trainers; what has arrived.
pub(crate) type Push<'a> = dyn Fn(&Manifest, &[Vec<Vec<u8>>]) -> Vec<Vec<Vec<u8>>> + 'a;

/// Compares what arrives with what the kernels make of the whole tensors, for blocks that are cut between rows, between columns,
/// and not at all.
pub(crate) fn check(push: &Push<'_>) {
    for placement in [Placement::Shard(0), Placement::Shard(1), Placement::Replicate] {
        for scales in [ScaleFormat::F32, ScaleFormat::Ue8m0] {
            let (manifest, sources) = make(placement, scales);
            let found = push(&manifest, &sources);
            for (region, expected) in found.iter().flatten().zip(expected(scales).iter().flatten()) {
                // A region may be longer than what is in it.
                assert!(region[..expected.len()] == expected[..], "{placement:?}, {scales:?}");
            }
        }
    }
}
