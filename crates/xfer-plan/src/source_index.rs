//! The source index: which trainers hold which part of which tensor.
//!
//! Pieces may be disjoint shards, replicas, or boxes that overlap in any way. Each tensor is cut once, along
//! the borders of its pieces, until every part is a *cell*: held as a whole by the same pieces everywhere.
//! The cuts form a tree, so that a lookup touches only what it intersects. Parts that no one holds are cells
//! too, without holders, and so a lookup finds out exactly what is missing.
//!
//! The index names pieces by number and borrows nothing, so that it outlives the manifest that it was made from. Whoever looks a
//! piece up must bring the same trainers again.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::dtype::DType;
use crate::error::{PlanError, shorten};
use crate::ids::TrainerRank;
use crate::limits::INDEX_ENTRIES_MAX;
use crate::manifest::{SourcePiece, TrainerManifest};
use crate::tensor_box::{Dims, TensorBox};

/// A source tensor: its place in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TensorId(u32);

/// A piece that holds a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Holder {
    pub(crate) trainer: TrainerRank,
    piece: u32,
}

impl Holder {
    /// The piece, among the trainers that the index was made of.
    pub(crate) fn piece(self, trainers: &[TrainerManifest]) -> Option<&SourcePiece> {
        trainers.get(self.trainer.index())?.pieces.get(self.piece as usize)
    }
}

/// A tensor as all its pieces declare it.
pub(crate) struct Tensor {
    name: Arc<str>,
    pub(crate) dtype: DType,
    pub(crate) shape: Dims,
    /// For messages when another trainer disagrees.
    declared_by: TrainerRank,
    root: u32,
}

/// Part of a tensor. `Cell` is a range of `holders`, ascending by trainer.
#[derive(Clone, Copy)]
enum Node {
    Cell { first: u32, count: u32 },
    Cut { dim: u8, at: u64, below: u32, above: u32 },
}

/// What a lookup calls for each cell: with what is wanted of it, and its holders.
pub(crate) type Visit<'v, 'i, E> = dyn FnMut(&TensorBox, &'i [Holder]) -> Result<(), E> + 'v;

/// A holder while the index is made, with what it holds.
type Holding<'m> = (Holder, &'m TensorBox);

/// All source tensors of a manifest.
pub(crate) struct SourceIndex {
    ids: BTreeMap<Arc<str>, TensorId>,
    tensors: Vec<Tensor>,
    nodes: Vec<Node>,
    holders: Vec<Holder>,
    entries_max: usize,
}

impl SourceIndex {
    /// Indexes a manifest that has been validated.
    pub(crate) fn new(trainers: &[TrainerManifest]) -> Result<SourceIndex, PlanError> {
        SourceIndex::bounded(trainers, INDEX_ENTRIES_MAX)
    }

    fn bounded(trainers: &[TrainerManifest], entries_max: usize) -> Result<SourceIndex, PlanError> {
        let (ids, tensors, nodes, holders) = (BTreeMap::new(), Vec::new(), Vec::new(), Vec::new());
        let mut index = SourceIndex { ids, tensors, nodes, holders, entries_max };
        let mut holders_of: Vec<Vec<Holding<'_>>> = Vec::new();
        for (rank, trainer) in (0..).zip(trainers) {
            // Trainers of one stage list their pieces in the same order: the next tensor is most likely the one after.
            let mut next = TensorId(0);
            let trainer_rank = TrainerRank(rank);
            for (number, piece) in (0..).zip(&trainer.pieces) {
                let TensorId(tensor) = index.declare(trainer_rank, piece, next)?;
                next = TensorId(tensor + 1);
                holders_of.resize_with(index.tensors.len(), Vec::new);
                if let (Some(list), false) = (holders_of.get_mut(tensor as usize), piece.bounds.is_empty()) {
                    list.push((Holder { trainer: trainer_rank, piece: number }, &piece.bounds));
                }
            }
        }
        for (tensor, holders) in holders_of.into_iter().enumerate() {
            let shape = index.tensors.get(tensor).map_or(&[][..], |tensor| &tensor.shape);
            let whole = TensorBox::whole(shape).unwrap_or_default(); // validated: never too many dimensions
            let root = index.build(&whole, holders)?;
            if let Some(tensor) = index.tensors.get_mut(tensor) {
                tensor.root = root;
            }
        }
        Ok(index)
    }

    /// The tensor of a piece; it must agree with what was declared before.
    fn declare(
        &mut self,
        trainer: TrainerRank,
        piece: &SourcePiece,
        guess: TensorId,
    ) -> Result<TensorId, PlanError> {
        let guessed = self.tensors.get(guess.0 as usize).is_some_and(|tensor| *tensor.name == *piece.tensor);
        let id = if guessed { Some(guess) } else { self.ids.get(piece.tensor.as_str()).copied() };
        let Some((id, known)) = id.and_then(|id| Some((id, self.tensors.get(id.0 as usize)?))) else {
            let id = TensorId(self.tensors.len() as u32); // no memory holds a manifest with 2^32 tensors
            let (name, dtype, shape) = (Arc::<str>::from(piece.tensor.as_str()), piece.dtype, &piece.shape);
            self.ids.insert(name.clone(), id);
            let shape = Dims::from_slice(shape);
            self.tensors.push(Tensor { name, dtype, shape, declared_by: trainer, root: 0 });
            return Ok(id);
        };
        if known.dtype == piece.dtype && *known.shape == *piece.shape {
            return Ok(id);
        }
        Err(PlanError::TensorsDiffer {
            tensor: shorten(&piece.tensor),
            rank: known.declared_by,
            dtype: known.dtype,
            shape: known.shape.to_vec(),
            other_rank: trainer,
            other_dtype: piece.dtype,
            other_shape: piece.shape.clone(),
        })
    }

    /// Cuts `part` until the same of `holders`, all of which intersect it, hold each cell. Returns the node.
    ///
    /// Every level halves the borders of one dimension, so the recursion is at most a few hundred deep,
    /// whatever the pieces are.
    fn build(&mut self, part: &TensorBox, holders: Vec<Holding<'_>>) -> Result<u32, PlanError> {
        let node = match cut(part, &holders) {
            None => {
                let first = self.holders.len() as u32;
                let count = holders.len() as u32;
                self.holders.extend(holders.into_iter().map(|(holder, _)| holder));
                Node::Cell { first, count }
            }
            Some((dim, at, below, above)) => {
                let within = |part: &TensorBox| {
                    holders.iter().copied().filter(|(_, held)| held.intersects(part)).collect::<Vec<_>>()
                };
                let (held_below, held_above) = (within(&below), within(&above));
                drop(holders);
                let below = self.build(&below, held_below)?;
                let above = self.build(&above, held_above)?;
                Node::Cut { dim: dim as u8, at, below, above }
            }
        };
        self.nodes.push(node);
        if self.nodes.len() + self.holders.len() > self.entries_max {
            return Err(PlanError::TooManyCells { max: self.entries_max });
        }
        Ok((self.nodes.len() - 1) as u32)
    }

    pub(crate) fn find(&self, name: &str) -> Option<(TensorId, &Tensor)> {
        let id = *self.ids.get(name)?;
        Some((id, self.tensors.get(id.0 as usize)?))
    }

    pub(crate) fn name(&self, id: TensorId) -> &str {
        self.tensors.get(id.0 as usize).map_or("?", |tensor| &tensor.name)
    }

    pub(crate) fn shape(&self, id: TensorId) -> &[u64] {
        self.tensors.get(id.0 as usize).map_or(&[], |tensor| &tensor.shape)
    }

    pub(crate) fn dtype(&self, id: TensorId) -> Option<DType> {
        Some(self.tensors.get(id.0 as usize)?.dtype)
    }

    /// Calls `visit` for every cell that intersects `wanted`, with the intersection and the cell's holders.
    /// The order depends on the tensor's pieces only.
    pub(crate) fn cells<'i, E>(
        &'i self,
        tensor: TensorId,
        wanted: &TensorBox,
        visit: &mut Visit<'_, 'i, E>,
    ) -> Result<(), E> {
        match self.tensors.get(tensor.0 as usize) {
            Some(tensor) => self.descend(tensor.root, wanted, visit),
            None => Ok(()),
        }
    }

    fn descend<'i, E>(
        &'i self,
        node: u32,
        wanted: &TensorBox,
        visit: &mut Visit<'_, 'i, E>,
    ) -> Result<(), E> {
        match self.nodes.get(node as usize) {
            None => Ok(()),
            Some(&Node::Cell { first, count }) => {
                let (first, count) = (first as usize, count as usize);
                visit(wanted, self.holders.get(first..first + count).unwrap_or_default())
            }
            Some(&Node::Cut { dim, at, below, above }) => match wanted.split(dim.into(), at) {
                Some((low, high)) => {
                    self.descend(below, &low, visit)?;
                    self.descend(above, &high, visit)
                }
                None if wanted.extent(dim.into()).is_some_and(|(start, _)| start < at) => {
                    self.descend(below, wanted, visit)
                }
                None => self.descend(above, wanted, visit),
            },
        }
    }
}

/// Where to cut `part`: the middle one of the holders' borders inside it, in the dimension that has most of
/// them. `None` when no border is inside it.
fn cut(part: &TensorBox, holders: &[Holding<'_>]) -> Option<(usize, u64, TensorBox, TensorBox)> {
    let mut most: Vec<u64> = Vec::new();
    let mut dim_of_most = 0;
    let mut borders = Vec::new();
    for (dim, (start, end)) in part.start().zip(part.end()).enumerate() {
        borders.clear();
        for (_, held) in holders {
            if let Some((first, len)) = held.extent(dim) {
                borders.extend([first, first + len].into_iter().filter(|&at| start < at && at < end));
            }
        }
        borders.sort_unstable();
        borders.dedup();
        if borders.len() > most.len() {
            std::mem::swap(&mut most, &mut borders);
            dim_of_most = dim;
        }
    }
    let at = *most.get(most.len() / 2)?;
    let (below, above) = part.split(dim_of_most, at)?;
    Some((dim_of_most, at, below, above))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RegionIndex;

    fn trainers(boxes: &[(&[u64], &[u64])]) -> Vec<TrainerManifest> {
        let trainer = |(start, len): &(&[u64], &[u64])| TrainerManifest {
            pieces: vec![SourcePiece {
                tensor: "w".into(),
                dtype: DType::U8,
                shape: vec![8, 8],
                bounds: TensorBox::new(start, len).unwrap(),
                region: RegionIndex(0),
                offset: 0,
            }],
            ..TrainerManifest::default()
        };
        boxes.iter().map(trainer).collect()
    }

    fn cells(trainers: &[TrainerManifest], wanted: (&[u64], &[u64])) -> Vec<String> {
        let index = SourceIndex::new(trainers).unwrap();
        let (id, _) = index.find("w").unwrap();
        let mut found = Vec::new();
        let wanted = TensorBox::new(wanted.0, wanted.1).unwrap();
        let visit = &mut |part: &TensorBox, holders: &[Holder]| {
            let holders: Vec<u32> = holders.iter().map(|holder| holder.trainer.0).collect();
            found.push(format!("{part} on {holders:?}"));
            Ok::<(), PlanError>(())
        };
        index.cells(id, &wanted, visit).unwrap();
        found
    }

    #[test]
    fn cells_are_as_few_as_can_be() {
        let all: (&[u64], &[u64]) = (&[0, 0], &[8, 8]);
        let rows: &[(&[u64], &[u64])] = &[(&[0, 0], &[4, 8]), (&[4, 0], &[4, 8]), (&[0, 0], &[8, 8])];
        assert_eq!(cells(&trainers(rows), all), ["[0..4, 0..8] on [0, 2]", "[4..8, 0..8] on [1, 2]"]);
        assert_eq!(cells(&trainers(rows), (&[1, 3], &[2, 2])), ["[1..3, 3..5] on [0, 2]"]);
        let hole: &[(&[u64], &[u64])] = &[(&[0, 0], &[8, 2]), (&[0, 5], &[8, 3])];
        assert_eq!(
            cells(&trainers(hole), all),
            ["[0..8, 0..2] on [0]", "[0..8, 2..5] on []", "[0..8, 5..8] on [1]"]
        );
    }

    #[test]
    fn cells_are_bounded() {
        // 7 steps of a staircase, each over all the smaller ones: the cells alone number 7 x 7 and more.
        let steps: Vec<([u64; 2], [u64; 2])> = (1..8).map(|n| ([0, 0], [n, 8 - n])).collect();
        let steps: Vec<(&[u64], &[u64])> = steps.iter().map(|(start, len)| (&start[..], &len[..])).collect();
        let trainers = trainers(&steps);
        assert!(SourceIndex::bounded(&trainers, 1000).is_ok());
        assert!(matches!(SourceIndex::bounded(&trainers, 30), Err(PlanError::TooManyCells { max: 30 })));
    }
}
