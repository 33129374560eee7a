//! Quantised tensors: who finds out the scale of which block.
//!
//! A block's scale follows from the largest magnitude in it. Where one trainer holds the whole block, it needs nobody.
//! Where shard borders cut the block, every holder of a part reports the largest magnitude of its part to one of
//! them, the owner, which tells the largest of all to everybody who holds a part: a few bytes, and each then quantises
//! its own elements with the scale of the whole block. The result is that of quantising the whole tensor at once.

use serde::{Deserialize, Serialize};

use crate::error::{LayoutError, PlanError, shorten};
use crate::ids::{ReceiverRank, TrainerRank};
use crate::limits::RANK_BYTES_MAX;
use crate::source_index::{Holder, SourceIndex, TensorId};
use crate::tensor_box::{Dims, TensorBox, volume};
use crate::transform::BlockQuant;

/// The scales of one quantised tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScaleTable {
    /// The tensor.
    pub tensor: String,
    /// Its global shape.
    pub shape: Vec<u64>,
    /// How it is quantised. The table has [`BlockQuant::scales_shape`].
    pub quant: BlockQuant,
    /// For the blocks that shard borders cut. No two of them share a block.
    pub exchanges: Vec<Exchange>,
}

/// How the scales of some blocks, all cut alike, are found out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exchange {
    /// The blocks, in the table's indices.
    pub blocks: TensorBox,
    /// Whose parts together are the whole blocks. Each reports the largest magnitude of its part to the owner.
    pub reporters: Vec<TrainerRank>,
    /// Who finds out the largest magnitude of all. One of the reporters.
    pub owner: TrainerRank,
    /// Whom the owner tells: everybody who holds a part and may have to quantise it. Ascending.
    pub holders: Vec<TrainerRank>,
}

/// Blocks of a tensor that are cut alike, or not at all, and who sends their scales.
#[derive(Clone, Debug)]
pub(crate) struct BlockRange {
    pub(crate) blocks: TensorBox,
    pub(crate) owner: TrainerRank,
}

/// What the planner knows about a quantised tensor.
#[derive(Clone, Debug)]
pub(crate) struct Blocks {
    pub(crate) table: ScaleTable,
    pub(crate) shape: Vec<u64>,
    pub(crate) ranges: Vec<BlockRange>,
}

/// Ranges of blocks of one tensor: far more than any aligned sharding makes, few enough to keep a hostile one cheap.
const RANGES_MAX: usize = 1 << 20;

impl Blocks {
    /// Finds out who owns which blocks of `tensor`. `wanted_by` is for messages.
    pub(crate) fn new(
        index: &SourceIndex,
        tensor: TensorId,
        quant: BlockQuant,
        wanted_by: (ReceiverRank, &str),
    ) -> Result<Blocks, PlanError> {
        let (receiver, param) = wanted_by;
        let layout = |source| PlanError::Map { receiver, param: shorten(param), source };
        let shape = index.shape(tensor).to_vec();
        let table_shape = quant.scales_shape(&shape).map_err(layout)?;
        let bytes = volume(table_shape.iter().copied())
            .and_then(|blocks| blocks.checked_mul(quant.scales.dtype().bytes()));
        if bytes.is_none_or(|bytes| bytes > RANK_BYTES_MAX) {
            return Err(layout(LayoutError::TooManyBlockRanges { max: RANGES_MAX }));
        }
        let table = TensorBox::whole(&table_shape).map_err(layout)?;
        let block: Dims = block_of(quant, shape.len());
        let mut cells = Vec::new();
        index.cells(tensor, &TensorBox::whole(&shape).map_err(layout)?, &mut |bounds, holders| {
            cells.push((bounds.clone(), holders));
            Ok::<(), PlanError>(())
        })?;
        let at_borders = |bounds: &TensorBox| {
            let dims = bounds.start().zip(bounds.end()).zip(block.iter().zip(&shape));
            dims.into_iter().all(|((start, end), (&block, &len))| {
                start.is_multiple_of(block) && (end.is_multiple_of(block) || end == len)
            })
        };
        if cells.iter().all(|(bounds, holders)| !holders.is_empty() && at_borders(bounds)) {
            // Nothing cuts a block: every cell's holders find its scales by themselves, and replicas take turns to send them.
            let range = |(turn, (bounds, holders)): (usize, &(TensorBox, &[Holder]))| {
                let owner = holders.get(turn % holders.len().max(1)).map(|holder| holder.trainer);
                let owner = owner.ok_or(PlanError::Defect { detail: "a cell without holders" })?;
                Ok(BlockRange { blocks: blocks_of(bounds, &block).map_err(layout)?, owner })
            };
            let ranges = cells.iter().enumerate().map(range).collect::<Result<_, PlanError>>()?;
            let (tensor, exchanges) = (index.name(tensor).to_owned(), Vec::new());
            let table = ScaleTable { tensor, shape, quant, exchanges };
            return Ok(Blocks { table, shape: table_shape, ranges });
        }
        // Between the borders of the cells, rounded down and up to blocks, all blocks are cut alike.
        let mut ranges = vec![table];
        for (dim, &block) in block.iter().enumerate() {
            let mut borders: Vec<u64> = Vec::new();
            for (bounds, _) in &cells {
                let (start, len) = bounds.extent(dim).unwrap_or_default();
                borders.extend([
                    start / block,
                    start.div_ceil(block),
                    (start + len) / block,
                    (start + len).div_ceil(block),
                ]);
            }
            borders.sort_unstable();
            borders.dedup();
            ranges = ranges.iter().flat_map(|range| cut(range, dim, &borders)).collect();
            if ranges.len() > RANGES_MAX {
                return Err(layout(LayoutError::TooManyBlockRanges { max: RANGES_MAX }));
            }
        }
        let mut exchanges = Vec::new();
        let mut owned = Vec::with_capacity(ranges.len());
        for (turn, blocks) in ranges.into_iter().enumerate() {
            let elements = elements_of(&blocks, &block, &shape).map_err(layout)?;
            let (mut reporters, mut holders) = (Vec::new(), Vec::new());
            index.cells(tensor, &elements, &mut |part, held_by| {
                // Replicas take turns.
                let Some(holder) = held_by.get(turn % held_by.len().max(1)) else {
                    let (tensor, bounds) = (shorten(index.name(tensor)), Box::new(part.clone()));
                    return Err(PlanError::Uncovered { receiver, param: shorten(param), tensor, bounds });
                };
                reporters.push(holder.trainer);
                holders.extend(held_by.iter().map(|holder| holder.trainer));
                Ok(())
            })?;
            reporters.sort_unstable();
            reporters.dedup();
            holders.sort_unstable();
            holders.dedup();
            let owner = *reporters
                .get(turn % reporters.len().max(1))
                .ok_or(PlanError::Defect { detail: "blocks without elements" })?;
            // Several cells, or parts of different pieces of one trainer: it can put those together by itself.
            let alone = reporters.len() == 1 && holders.len() == 1;
            if !alone && !held_whole(index, tensor, &elements) {
                exchanges.push(Exchange { blocks: blocks.clone(), reporters, owner, holders });
            }
            owned.push(BlockRange { blocks, owner });
        }
        let table =
            ScaleTable { tensor: index.name(tensor).to_owned(), shape: shape.clone(), quant, exchanges };
        Ok(Blocks { table, shape: table_shape, ranges: owned })
    }
}

/// Whether everybody who holds a part of `elements` holds all of them: then nobody needs to be told anything.
fn held_whole(index: &SourceIndex, tensor: TensorId, elements: &TensorBox) -> bool {
    let mut cells = 0;
    let counted = index.cells(tensor, elements, &mut |_, _| {
        cells += 1;
        Ok::<(), ()>(())
    });
    counted.is_ok() && cells == 1
}

/// The size of a block in every dimension of the tensor; 1 in all but the last two.
pub(crate) fn block_of(quant: BlockQuant, rank: usize) -> Dims {
    let mut block = Dims::from_elem(1, rank);
    if let [.., rows, columns] = block.as_mut_slice() {
        [*rows, *columns] = quant.block.map(u64::from);
    }
    block
}

/// The elements of a box of blocks.
pub(crate) fn elements_of(
    blocks: &TensorBox,
    block: &[u64],
    shape: &[u64],
) -> Result<TensorBox, LayoutError> {
    let (mut starts, mut lens) = (Dims::new(), Dims::new());
    for (((first, end), &block), &len) in blocks.start().zip(blocks.end()).zip(block).zip(shape) {
        let (start, end) = (first.saturating_mul(block).min(len), end.saturating_mul(block).min(len));
        starts.push(start);
        lens.push(end - start);
    }
    TensorBox::new(&starts, &lens)
}

/// The blocks that a box of elements touches.
fn blocks_of(elements: &TensorBox, block: &[u64]) -> Result<TensorBox, LayoutError> {
    let (mut starts, mut lens) = (Dims::new(), Dims::new());
    for ((start, end), &block) in elements.start().zip(elements.end()).zip(block) {
        starts.push(start / block);
        lens.push(end.div_ceil(block).saturating_sub(start / block));
    }
    TensorBox::new(&starts, &lens)
}

/// Cuts a box along one dimension at all borders inside it.
fn cut(range: &TensorBox, dim: usize, borders: &[u64]) -> Vec<TensorBox> {
    let (mut parts, mut rest) = (Vec::new(), range.clone());
    for &border in borders {
        if let Some((below, above)) = rest.split(dim, border) {
            parts.push(below);
            rest = above;
        }
    }
    parts.push(rest);
    parts.retain(|part| !part.is_empty());
    parts
}
