//! The reference where linear layers are served in FP8: every tensor is quantised whole, by the kernels of the CPU, and then cut.
//!
//! It knows nothing of shards, of magnitudes that trainers tell each other, or of what an operation quantises. A row of blocks
//! is quantised by itself, which gives the same: no block reaches into another row of them.

use std::collections::BTreeSet;
use std::ops::Range;

use half::bf16;
use weight_ops::{BlockGrid, F8E4M3, Float, MatrixMut, MatrixRef, ScaleFormat, quantize};
use xfer_plan::DType;

use super::{Comparison, Sources, VerifyError, param_names, row_bytes, sources, verify_param};
use crate::checkpoint::{Checkpoint, TensorInfo};

/// Rows and columns of a block, as DeepSeek-V3's.
const BLOCK: u64 = 128;

/// What the parameter of a parameter's scales is named.
const SCALES: &str = "_scale_inv";

/// The layers that are quantised, fused as they are served.
const LINEAR: [&str; 8] = [
    "self_attn.qkv_proj",
    "attention.self.qkv_proj",
    "mlp.gate_up_proj",
    "self_attn.o_proj",
    "attention.output.dense",
    "mlp.down_proj",
    "intermediate.dense",
    "output.dense",
];

/// As [`param_names`], of a receiver of `tp` that holds linear layers in FP8.
///
/// # Errors
/// When a name has no source in the checkpoint.
pub fn fp8_param_names(checkpoint: &Checkpoint, tp: u32) -> Result<Vec<String>, VerifyError> {
    let mut names = BTreeSet::new();
    for name in param_names(checkpoint) {
        if is_quantised(checkpoint, &name, tp)? {
            names.insert(format!("{name}{SCALES}"));
        }
        names.insert(name);
    }
    Ok(names.into_iter().collect())
}

/// As [`verify_param`], of a receiver that holds linear layers in FP8: codes, scales, or what is not quantised. Codes are read a row of
/// blocks at a time.
///
/// # Errors
/// As [`verify_param`].
pub fn verify_fp8_param(
    checkpoint: &Checkpoint,
    param: &str,
    (tp, rank): (u32, u32),
    step: u64,
    read: &mut dyn FnMut(u64, &mut [u8]),
) -> Result<u64, VerifyError> {
    let (layer, scales) = match param.strip_suffix(SCALES) {
        Some(layer) => (layer, true),
        None => (param, false),
    };
    if !is_quantised(checkpoint, layer, tp)? {
        return verify_param(checkpoint, param, (tp, rank), step, read);
    }
    let mut comparison = Comparison { param, step, read, offset: 0, found: Vec::new(), mismatch: None };
    for (tensor, by_columns, range) in sources(checkpoint, layer, tp.into(), rank.into())? {
        let [all_rows, all_columns] = matrix(tensor).unwrap_or_default();
        let (rows, columns) = if by_columns { (0..all_rows, range) } else { (range, 0..all_columns) };
        let mut first = rows.start;
        while first < rows.end {
            let count = BLOCK.min(all_rows - first);
            let mut bytes = vec![0; (count * row_bytes(tensor)) as usize];
            comparison.load(checkpoint, tensor, first * row_bytes(tensor), &mut bytes)?;
            let expected = quantised(tensor, &bytes, [count, all_columns], &columns, scales);
            let unfit = || VerifyError::NoSource { param: param.into(), reason: "it is no matrix".into() };
            comparison.compare(tensor, &expected.ok_or_else(unfit)?);
            first += count;
        }
    }
    match comparison.mismatch {
        None => Ok(comparison.offset),
        Some(mismatch) => Err(mismatch.into()),
    }
}

/// Whether it is a linear layer of which every rank's parts end where blocks do.
fn is_quantised(checkpoint: &Checkpoint, param: &str, tp: u32) -> Result<bool, VerifyError> {
    let Some(layer) = param.strip_suffix(".weight") else { return Ok(false) };
    let ends = |end: &&&str| layer == **end || layer.ends_with(&format!(".{end}"));
    let Some(linear) = LINEAR.iter().find(ends) else { return Ok(false) };
    let fused = linear.ends_with("qkv_proj") || linear.ends_with("gate_up_proj");
    if fused && checkpoint.get(param).is_some() {
        return Ok(false);
    }
    for rank in 0..tp {
        let parts = sources(checkpoint, param, tp.into(), rank.into())?;
        if !(0..parts.len()).all(|place| keeps_blocks(&parts, place)) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether the part at `place` cuts no block. What others follow ends at a border.
fn keeps_blocks(parts: &Sources<'_>, place: usize) -> bool {
    let Some((tensor, by_columns, range)) = parts.get(place) else { return false };
    let Some([rows, columns]) = matrix(tensor) else { return false };
    let len = if *by_columns { columns } else { rows };
    let may_be_ragged = range.end == len && place + 1 == parts.len();
    matches!(tensor.dtype, DType::BF16 | DType::F32)
        && range.start < range.end
        && range.start.is_multiple_of(BLOCK)
        && (range.end.is_multiple_of(BLOCK) || may_be_ragged)
}

fn matrix(tensor: &TensorInfo) -> Option<[u64; 2]> {
    match tensor.shape[..] {
        [rows, columns] => Some([rows, columns]),
        _ => None,
    }
}

/// Codes or scales of some columns of a row of blocks.
fn quantised(
    tensor: &TensorInfo,
    bytes: &[u8],
    shape: [u64; 2],
    columns: &Range<u64>,
    scales: bool,
) -> Option<Vec<u8>> {
    match tensor.dtype {
        DType::BF16 => quantised_as::<bf16>(bytes, shape, columns, scales),
        DType::F32 => quantised_as::<f32>(bytes, shape, columns, scales),
        _ => None,
    }
}

fn quantised_as<T: Float>(
    bytes: &[u8],
    shape: [u64; 2],
    columns: &Range<u64>,
    scales: bool,
) -> Option<Vec<u8>> {
    let size = shape.map(|len| len as usize);
    let grid = BlockGrid::new(size, [BLOCK as u32; 2]).ok()?;
    let mut codes = vec![F8E4M3::default(); size[0] * size[1]];
    let mut table = vec![0.0_f32; grid.table_len()];
    let source = MatrixRef::<T>::from_bytes(bytes, size, size[1]).ok()?;
    let destination = MatrixMut::new(&mut codes, size, size[1]).ok()?;
    quantize(&grid, source, ScaleFormat::F32, destination, &mut table).ok()?;
    if scales {
        let blocks = (columns.start / BLOCK) as usize..columns.end.div_ceil(BLOCK) as usize;
        return Some(table.get(blocks)?.iter().flat_map(|scale| scale.to_ne_bytes()).collect());
    }
    let columns = columns.start as usize..columns.end as usize;
    let mut part = Vec::with_capacity(size[0] * columns.len());
    for row in codes.chunks_exact(size[1].max(1)) {
        part.extend(row.get(columns.clone())?.iter().map(|code| code.to_bits()));
    }
    Some(part)
}
