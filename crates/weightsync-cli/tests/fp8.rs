//! Linear layers in FP8: which they are, and a reference that finds every wrong byte.

mod common;

use common::{blocks, synthetic};
use half::bf16;
use weight_ops::{BlockGrid, ScaleFormat, oracle};
use weightsync_cli::checkpoint::Checkpoint;
use weightsync_cli::reference::VerifyError;
use weightsync_cli::reference::fp8::{fp8_param_names, verify_fp8_param};
use weightsync_cli::synthetic::Shape;
use weightsync_cli::tensor_parallel::{Layout, LocalParam};
use weightsync_cli::training::step_bytes;
use xfer_plan::{BlockQuant, DType};

fn params(checkpoint: &Checkpoint, tp: u32, rank: u32) -> Vec<LocalParam> {
    let layout = Layout::new(checkpoint.tensors(), checkpoint.heads(), tp).unwrap();
    layout.with_fp8(BlockQuant::default()).unwrap().params(rank).unwrap()
}

#[test]
fn layout_and_reference_agree_on_what_is_quantised() {
    // None, some and all linear layers of each.
    let inner_cuts = Shape { inner: 300, ..blocks() };
    let heads_cut = Shape { head_dim: 16, ..blocks() };
    let mut counts = Vec::new();
    for shape in [Shape::tiny(), blocks(), inner_cuts, heads_cut] {
        let folder = synthetic(&shape);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        for tp in [1, 2, 3, 4, 8] {
            let quantised = |rank| params(&checkpoint, tp, rank).into_iter().map(|param| param.name);
            let names = fp8_param_names(&checkpoint, tp).unwrap();
            for rank in 0..tp {
                assert!(quantised(rank).eq(names.iter().cloned()), "{shape:?} on rank {rank} of {tp}");
            }
            counts.push(names.iter().filter(|name| name.ends_with("_scale_inv")).count());
        }
    }
    // Of two layers, four linear parameters each.
    for count in [0, 4, 8] {
        assert!(counts.contains(&count), "{counts:?}");
    }
}

/// All of a tensor after a step, as the plain oracle quantises it: codes and scales, row by row.
fn oracle(checkpoint: &Checkpoint, tensor: &str, step: u64) -> ([usize; 2], Vec<u8>, Vec<f32>) {
    let shape = checkpoint.get(tensor).unwrap().shape.clone();
    let [rows, columns] = [shape[0] as usize, shape[1] as usize];
    let mut bytes = vec![0; rows * columns * 2];
    checkpoint.read_range(tensor, 0, &mut bytes).unwrap();
    step_bytes(DType::BF16, tensor, step, 0, &mut bytes);
    let element = |row: usize, column: usize| {
        let at = (row * columns + column) * 2;
        bf16::from_ne_bytes([bytes[at], bytes[at + 1]]).to_f32()
    };
    let grid = BlockGrid::new([rows, columns], [128, 128]).unwrap();
    let (codes, scales) = oracle::quantize(&grid, ScaleFormat::F32, element);
    ([rows, columns], codes, scales)
}

#[test]
fn the_reference_takes_what_the_oracle_makes_and_nothing_else() {
    let folder = synthetic(&Shape { layers: 1, ..blocks() });
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let (tp, rank, step) = (2, 1, 3);
    // The lower halves of gate and up, and the right half of down.
    let layer = "model.layers.0.mlp";
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for projection in ["gate_proj", "up_proj"] {
        let ([_, columns], all, table) = oracle(&checkpoint, &format!("{layer}.{projection}.weight"), step);
        codes.extend_from_slice(&all[256 * columns..]);
        scales.extend(table[2 * columns.div_ceil(128)..].iter().flat_map(|scale| scale.to_ne_bytes()));
    }
    let ([_, columns], all, table) = oracle(&checkpoint, &format!("{layer}.down_proj.weight"), step);
    let right: Vec<u8> = all.chunks(columns).flat_map(|row| &row[256..]).copied().collect();
    let right_scales = table.chunks(4).flat_map(|row| &row[2..]).flat_map(|scale| scale.to_ne_bytes());
    let expected = [
        (format!("{layer}.gate_up_proj.weight"), codes),
        (format!("{layer}.gate_up_proj.weight_scale_inv"), scales),
        (format!("{layer}.down_proj.weight"), right),
        (format!("{layer}.down_proj.weight_scale_inv"), right_scales.collect()),
    ];
    for (param, mut bytes) in expected {
        let compare = |bytes: &[u8]| {
            let mut read = |offset: u64, into: &mut [u8]| {
                into.copy_from_slice(&bytes[offset as usize..][..into.len()]);
            };
            verify_fp8_param(&checkpoint, &param, (tp, rank), step, &mut read)
        };
        assert_eq!(compare(&bytes).unwrap(), bytes.len() as u64);
        let declared = params(&checkpoint, tp, rank).into_iter().find(|declared| declared.name == param);
        assert_eq!(declared.unwrap().bytes(), bytes.len() as u64);
        let wrong = bytes.len() - 3;
        bytes[wrong] ^= 1;
        let Err(VerifyError::Mismatch(mismatch)) = compare(&bytes) else { panic!("{param}: nothing found") };
        assert_eq!((mismatch.offset, mismatch.count, mismatch.param), (wrong as u64, 1, param.clone()));
    }
}
