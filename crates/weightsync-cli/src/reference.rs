//! The independent reference: what every byte of a receiver must be.
//!
//! Everything else in a transfer is planned, cut, ordered and checked by the same code; if that code has the layout
//! wrong, both sides agree on the wrong bytes. So this module has its own small rules by name and its own plain loops
//! over rows. It must never use the planner's maps, boxes or shards, nor the layout of the receivers. It reads the
//! checkpoint by byte ranges, steps them as the stand-in optimiser does, and compares, at most 1 MiB at a time; [`fp8`] reads
//! whole rows of blocks.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::checkpoint::{Checkpoint, CheckpointError, TensorInfo};
use crate::training::step_bytes;

pub mod fp8;

/// Bytes compared at a time, and read from the checkpoint at a time. Small enough to stay in a core's cache.
const BLOCK_BYTES: u64 = 1 << 20;

/// The first difference in a parameter, and how many bytes differ in all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{param}` differs in {count} bytes, first at byte {offset} (from `{tensor}`): expected {expected:#04x}, found {found:#04x}"
)]
pub struct Mismatch {
    /// The receiver's parameter.
    pub param: String,
    /// The checkpoint's tensor that the first wrong byte should come from.
    pub tensor: String,
    /// The first wrong byte, counted from the start of the parameter.
    pub offset: u64,
    /// What it should be.
    pub expected: u8,
    /// What it is.
    pub found: u8,
    /// How many bytes of the parameter differ.
    pub count: u64,
}

/// Why a parameter is not as it should be, or cannot be compared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// It differs.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// No rule gives this parameter from the checkpoint's tensors.
    #[error("`{param}` cannot be made of this checkpoint's tensors: {reason}")]
    NoSource {
        /// The parameter.
        param: String,
        /// What is missing or does not fit.
        reason: String,
    },
}

/// Compares one parameter of rank `rank` of `tp` with what it must be after `step`. `read` fills its slice with the
/// receiver's bytes from the given offset of the parameter on; slices have 1 to 1048576 bytes, in order, without a gap.
/// Returns the parameter's length in bytes, so that the caller can compare it with what the receiver declared.
///
/// # Errors
/// When a byte differs, the checkpoint cannot be read, or the name has no source there.
pub fn verify_param(
    checkpoint: &Checkpoint,
    param: &str,
    (tp, rank): (u32, u32),
    step: u64,
    read: &mut dyn FnMut(u64, &mut [u8]),
) -> Result<u64, VerifyError> {
    let mut comparison = Comparison { param, step, read, offset: 0, found: Vec::new(), mismatch: None };
    for (tensor, columns, range) in sources(checkpoint, param, tp.into(), rank.into())? {
        if columns {
            comparison.columns(checkpoint, tensor, range)?;
        } else {
            comparison.rows(checkpoint, tensor, range)?;
        }
    }
    match comparison.mismatch {
        None => Ok(comparison.offset),
        Some(mismatch) => Err(mismatch.into()),
    }
}

/// The names of all parameters that a receiver must have, sorted.
#[must_use]
pub fn param_names(checkpoint: &Checkpoint) -> Vec<String> {
    let fused = |name: &str| {
        for (layer, fused) in [
            (".self_attn.q_proj.", ".self_attn.qkv_proj."),
            (".self_attn.k_proj.", ".self_attn.qkv_proj."),
            (".self_attn.v_proj.", ".self_attn.qkv_proj."),
            (".attention.self.query.", ".attention.self.qkv_proj."),
            (".attention.self.key.", ".attention.self.qkv_proj."),
            (".attention.self.value.", ".attention.self.qkv_proj."),
            (".mlp.gate_proj.", ".mlp.gate_up_proj."),
            (".mlp.up_proj.", ".mlp.gate_up_proj."),
        ] {
            if name.ends_with(&format!("{layer}weight")) || name.ends_with(&format!("{layer}bias")) {
                return name.replace(layer, fused);
            }
        }
        name.to_owned()
    };
    let names: BTreeSet<String> = checkpoint.tensors().iter().map(|tensor| fused(&tensor.name)).collect();
    names.into_iter().collect()
}

/// What a parameter is made of, top to bottom: a tensor, whether it is cut by columns and not by rows, and which.
type Sources<'a> = Vec<(&'a TensorInfo, bool, Range<u64>)>;

fn sources<'a>(
    checkpoint: &'a Checkpoint,
    param: &str,
    tp: u64,
    rank: u64,
) -> Result<Sources<'a>, VerifyError> {
    let no_source = |reason: String| VerifyError::NoSource { param: param.to_owned(), reason };
    if rank >= tp {
        return Err(no_source(format!("there is no rank {rank} of {tp}")));
    }
    let get =
        |name: String| checkpoint.get(&name).ok_or_else(|| no_source(format!("there is no tensor `{name}`")));
    let size = |tensor: &TensorInfo, dim: usize| {
        let sizes = (tensor.name.clone(), tensor.shape.clone());
        tensor.shape.get(dim).copied().ok_or_else(|| no_source(format!("{sizes:?} lacks dimension {dim}")))
    };
    let (layer, leaf) = param.rsplit_once('.').unwrap_or((param, ""));
    let ends = |end: &str| {
        matches!(leaf, "weight" | "bias") && (layer == end || layer.ends_with(&format!(".{end}")))
    };
    let even = |size: u64| {
        let each = size.div_ceil(tp);
        (rank * each).min(size)..((rank + 1) * each).min(size)
    };

    for (fused, q, k, v) in [
        ("self_attn.qkv_proj", "q_proj", "k_proj", "v_proj"),
        ("attention.self.qkv_proj", "query", "key", "value"),
    ] {
        if ends(fused) && checkpoint.get(param).is_none() {
            let block = layer.strip_suffix("qkv_proj").unwrap_or(layer);
            let (q, k, v) = (
                get(format!("{block}{q}.{leaf}"))?,
                get(format!("{block}{k}.{leaf}"))?,
                get(format!("{block}{v}.{leaf}"))?,
            );
            let (q_rows, k_rows, v_rows) = (size(q, 0)?, size(k, 0)?, size(v, 0)?);
            let Some((q_heads, kv_heads)) = heads(checkpoint, block).filter(|_| tp > 1) else {
                return Ok(vec![
                    (q, false, even(q_rows)),
                    (k, false, even(k_rows)),
                    (v, false, even(v_rows)),
                ]);
            };
            // This rank's query heads, and for each of them the key/value head that it reads.
            let mine = even(q_heads);
            let read: BTreeSet<u64> = mine.clone().map(|head| head * kv_heads / q_heads).collect();
            let kv = read.first().map_or(0..0, |&first| first..first + read.len() as u64);
            let rows =
                |rows: u64, heads: u64, mine: &Range<u64>| rows / heads * mine.start..rows / heads * mine.end;
            return Ok(vec![
                (q, false, rows(q_rows, q_heads, &mine)),
                (k, false, rows(k_rows, kv_heads, &kv)),
                (v, false, rows(v_rows, kv_heads, &kv)),
            ]);
        }
    }
    if ends("mlp.gate_up_proj") && checkpoint.get(param).is_none() {
        let block = layer.strip_suffix("gate_up_proj").unwrap_or(layer);
        let (gate, up) = (get(format!("{block}gate_proj.{leaf}"))?, get(format!("{block}up_proj.{leaf}"))?);
        return Ok(vec![(gate, false, even(size(gate, 0)?)), (up, false, even(size(up, 0)?))]);
    }

    let tensor = get(param.to_owned())?;
    let attention = ends("self_attn.o_proj") || ends("attention.output.dense");
    if leaf == "weight" && (attention || ends("mlp.down_proj") || ends("output.dense")) {
        let columns = size(tensor, 1)?;
        let block = layer.strip_suffix("o_proj").unwrap_or(layer);
        return Ok(match heads(checkpoint, block).filter(|_| attention && tp > 1) {
            Some((q_heads, _)) => {
                let mine = even(q_heads);
                vec![(tensor, true, columns / q_heads * mine.start..columns / q_heads * mine.end)]
            }
            None => vec![(tensor, true, even(columns))],
        });
    }
    let by_rows = ["embed_tokens", "word_embeddings", "lm_head", "intermediate.dense"];
    let first = tensor.shape.first().copied().unwrap_or(1);
    let mine = if by_rows.into_iter().any(ends) { even(first) } else { 0..first };
    Ok(vec![(tensor, false, mine)])
}

/// Query and key/value heads of the attention whose tensors' names start with `block`.
fn heads(checkpoint: &Checkpoint, block: &str) -> Option<(u64, u64)> {
    if let Some(heads) = checkpoint.heads() {
        return Some((heads.query(), heads.key_value()));
    }
    let rows = |layer: &str| checkpoint.get(&format!("{block}{layer}.weight"))?.shape.first().copied();
    let head = rows("q_norm")?;
    if head == 0 || rows("k_norm")? != head || rows("q_proj")? <= head {
        return None;
    }
    Some((rows("q_proj")? / head, rows("k_proj")? / head))
}

struct Comparison<'a> {
    param: &'a str,
    step: u64,
    read: &'a mut dyn FnMut(u64, &mut [u8]),
    /// How much of the parameter is compared.
    offset: u64,
    found: Vec<u8>,
    mismatch: Option<Mismatch>,
}

impl Comparison<'_> {
    /// Whole rows: one run of bytes.
    fn rows(
        &mut self,
        checkpoint: &Checkpoint,
        tensor: &TensorInfo,
        rows: Range<u64>,
    ) -> Result<(), VerifyError> {
        let row_bytes = row_bytes(tensor);
        self.run(checkpoint, tensor, rows.start * row_bytes..rows.end * row_bytes)
    }

    fn run(
        &mut self,
        checkpoint: &Checkpoint,
        tensor: &TensorInfo,
        bytes: Range<u64>,
    ) -> Result<(), VerifyError> {
        let mut expected = vec![0; BLOCK_BYTES.min(bytes.end - bytes.start) as usize];
        let mut first = bytes.start;
        while first < bytes.end {
            let length = BLOCK_BYTES.min(bytes.end - first);
            expected.truncate(length as usize);
            self.load(checkpoint, tensor, first, &mut expected)?;
            self.compare(tensor, &expected);
            first += length;
        }
        Ok(())
    }

    /// The same columns of every row. Rows are read whole where a block holds at least one.
    fn columns(
        &mut self,
        checkpoint: &Checkpoint,
        tensor: &TensorInfo,
        columns: Range<u64>,
    ) -> Result<(), VerifyError> {
        let (rows, row_bytes) = (tensor.shape.first().copied().unwrap_or(1), row_bytes(tensor));
        let column_bytes = match tensor.shape.get(1) {
            Some(&count) if count > 0 && columns.start < columns.end => row_bytes / count,
            _ => return Ok(()),
        };
        let wanted = columns.start * column_bytes..columns.end * column_bytes;
        if row_bytes > BLOCK_BYTES {
            for row in 0..rows {
                self.run(checkpoint, tensor, row * row_bytes + wanted.start..row * row_bytes + wanted.end)?;
            }
            return Ok(());
        }
        let rows_per_block = BLOCK_BYTES / row_bytes;
        let (mut block, mut expected) = (Vec::new(), Vec::new());
        let mut first = 0;
        while first < rows {
            let count = rows_per_block.min(rows - first);
            block.resize((count * row_bytes) as usize, 0);
            self.load(checkpoint, tensor, first * row_bytes, &mut block)?;
            expected.clear();
            for row in block.chunks_exact(row_bytes as usize) {
                expected.extend_from_slice(
                    row.get(wanted.start as usize..wanted.end as usize).unwrap_or_default(),
                );
            }
            self.compare(tensor, &expected);
            first += count;
        }
        Ok(())
    }

    /// The tensor's bytes after the step. `first_byte` is where an element starts.
    fn load(
        &self,
        checkpoint: &Checkpoint,
        tensor: &TensorInfo,
        first_byte: u64,
        bytes: &mut [u8],
    ) -> Result<(), VerifyError> {
        checkpoint.read_range(&tensor.name, first_byte, bytes)?;
        step_bytes(tensor.dtype, &tensor.name, self.step, first_byte / tensor.dtype.bytes(), bytes);
        Ok(())
    }

    fn compare(&mut self, tensor: &TensorInfo, expected: &[u8]) {
        self.found.resize(expected.len(), 0);
        (self.read)(self.offset, &mut self.found);
        if self.found != expected {
            for (offset, (&expected, &found)) in (self.offset..).zip(expected.iter().zip(&self.found)) {
                if expected != found {
                    let mismatch = self.mismatch.get_or_insert_with(|| Mismatch {
                        param: self.param.to_owned(),
                        tensor: tensor.name.clone(),
                        offset,
                        expected,
                        found,
                        count: 0,
                    });
                    mismatch.count += 1;
                }
            }
        }
        self.offset += expected.len() as u64;
    }
}

/// Bytes of one index of the first dimension.
fn row_bytes(tensor: &TensorInfo) -> u64 {
    tensor.shape.iter().skip(1).product::<u64>() * tensor.dtype.bytes()
}
