//! The check: proof that a plan does what its manifest asks, without planning again.
//!
//! It follows every operation from the bytes it writes back, through the parameter's map, to the tensor
//! elements that belong there, and compares with the elements that the operation reads. It shares the map's
//! evaluation with the planner, but neither the cutting of boxes nor the arithmetic of strides: the bugs of
//! one should not hide in the other.

use smallvec::SmallVec;

use crate::bound::LowerBound;
use crate::digest::Digest;
use crate::error::{CheckError, OpPlace, shorten};
use crate::ids::{Rank, ReceiverRank, RegionIndex, TrainerRank};
use crate::manifest::{DestinationParam, Manifest, PlanOptions, SourcePiece};
use crate::param_map::Leaf;
use crate::plan::{Arrival, Op, Plan, Strided};
use crate::schedule::{encode, resolve};
use crate::source_index::{SourceIndex, TensorId};
use crate::tensor_box::Dims;

impl Plan {
    /// Proves that this plan moves what `manifest` asks for: that every byte of every parameter is written
    /// exactly once and from the right place, that no operation leaves a region, and that all stated sums and
    /// digests are right.
    ///
    /// # Errors
    /// Names the first thing that is wrong. Such a plan must not be executed.
    pub fn check(&self, manifest: &Manifest) -> Result<(), CheckError> {
        manifest.validate().map_err(|error| CheckError::Manifest(error.into()))?;
        let encode = |error| CheckError::Manifest(encode(error));
        let given = Digest::of(manifest).map_err(encode)?;
        if self.manifest_digest != given {
            return Err(CheckError::OtherManifest { planned: self.manifest_digest, given });
        }
        let sides = [
            ("training", self.trainers.len(), manifest.trainers.len()),
            ("inference", self.receivers.len(), manifest.receivers.len()),
        ];
        for (side, planned, given) in sides {
            if planned != given {
                return Err(CheckError::RankCount { side, planned, given });
            }
        }
        let incoming = self.check_trainers(manifest)?;
        let sources = Sources::new(manifest)?;
        for (receiver, ops) in (0..).map(ReceiverRank).zip(&incoming) {
            self.check_receiver(manifest, &sources, receiver, ops.clone())?;
        }
        self.check_totals(manifest, &incoming)?;
        // Last: it finds any change, but cannot say which.
        let found = self.compute_digest().map_err(encode)?;
        if self.digest == found { Ok(()) } else { Err(CheckError::Digest { stated: self.digest, found }) }
    }

    /// What can be said about each operation alone. Returns the operations by receiver, ascending by trainer.
    fn check_trainers(&self, manifest: &Manifest) -> Result<Vec<Vec<Incoming<'_>>>, CheckError> {
        let mut incoming = vec![Vec::new(); manifest.receivers.len()];
        for ((trainer, part), declared) in (0..).map(TrainerRank).zip(&self.trainers).zip(&manifest.trainers)
        {
            for (index, op) in part.ops.iter().enumerate() {
                let op = Incoming { trainer, index, op };
                let malformed = |detail| CheckError::Malformed { place: self.place(op), detail };
                if let Some(detail) = fault(op.op, &manifest.options) {
                    return Err(malformed(detail));
                }
                let (Some(list), Some(receiver)) =
                    (incoming.get_mut(op.op.to.index()), manifest.receivers.get(op.op.to.index()))
                else {
                    return Err(malformed("there is no such receiver"));
                };
                let sides = [
                    (Rank::Trainer(trainer), &op.op.source, &declared.regions),
                    (Rank::Receiver(op.op.to), &op.op.destination, &receiver.regions),
                ];
                for (rank, side, regions) in sides {
                    let region_bytes = regions.get(side.region.index());
                    let end = end(op.op, side);
                    if end.zip(region_bytes).is_none_or(|(end, &bytes)| end > bytes) {
                        let (place, region) = (self.place(op), side.region);
                        return Err(CheckError::OutsideRegion { place, rank, region });
                    }
                }
                list.push(op);
            }
        }
        Ok(incoming)
    }

    /// That the sums stated by both sides are those of the operations.
    fn check_totals(&self, manifest: &Manifest, incoming: &[Vec<Incoming<'_>>]) -> Result<(), CheckError> {
        let equal = |rank, what, stated, found| {
            if stated == found { Ok(()) } else { Err(CheckError::Total { rank, what, stated, found }) }
        };
        for (rank, part) in (0..).map(|rank| Rank::Trainer(TrainerRank(rank))).zip(&self.trainers) {
            equal(rank, "bytes", part.bytes, part.ops.iter().map(Op::bytes).sum())?;
            equal(rank, "writes", part.writes, part.ops.iter().map(Op::writes).sum())?;
        }
        for ((receiver, part), ops) in (0..).map(ReceiverRank).zip(&self.receivers).zip(incoming) {
            let rank = Rank::Receiver(receiver);
            equal(rank, "bytes", part.bytes, ops.iter().map(|o| o.op.bytes()).sum())?;
            equal(rank, "writes", part.writes, ops.iter().map(|o| o.op.writes()).sum())?;
            let arrivals = ops.chunk_by(|a, b| a.trainer == b.trainer).map(|ops| Arrival {
                from: ops.first().map_or(TrainerRank(0), |o| o.trainer),
                bytes: ops.iter().map(|o| o.op.bytes()).sum(),
                writes: ops.iter().map(|o| o.op.writes()).sum(),
            });
            if !arrivals.eq(part.arrivals.iter().copied()) {
                return Err(CheckError::Arrivals { receiver });
            }
        }
        if self.bound == LowerBound::new(manifest, &self.trainers, &self.receivers) {
            Ok(())
        } else {
            Err(CheckError::Bound)
        }
    }

    /// That the operations fill exactly the parameters of one receiver, with what the maps say.
    fn check_receiver(
        &self,
        manifest: &Manifest,
        sources: &Sources<'_>,
        receiver: ReceiverRank,
        mut ops: Vec<Incoming<'_>>,
    ) -> Result<(), CheckError> {
        let declared = manifest.receivers.get(receiver.index()).map_or(&[][..], |r| &r.params);
        let mut params: Vec<&DestinationParam> = declared.iter().collect();
        params.sort_by_key(|param| (param.region, param.offset));
        ops.sort_by_cached_key(start); // cached: the operations are all over memory
        let mut rest = ops.as_slice();
        for param in params {
            let bytes = param.bytes().unwrap_or(0);
            let end = (param.region, param.offset + bytes); // validated: inside the region
            let (inside, after) = rest.split_at(rest.partition_point(|o| start(o) < end));
            rest = after;
            self.check_param(sources, receiver, param, inside)?;
        }
        match rest.first() {
            Some(stray) => Err(CheckError::OutsideParam { place: self.place(*stray) }),
            None => Ok(()),
        }
    }

    fn check_param(
        &self,
        sources: &Sources<'_>,
        receiver: ReceiverRank,
        param: &DestinationParam,
        ops: &[Incoming<'_>],
    ) -> Result<(), CheckError> {
        let bytes = param.bytes().unwrap_or(0);
        let mut written = Vec::with_capacity(ops.len());
        for o in ops {
            let first = start(o);
            let inside = first >= (param.region, param.offset)
                && end(o.op, &o.op.destination).is_some_and(|end| end <= param.offset + bytes);
            if !inside || self.name(o.op.param) != param.name {
                return Err(CheckError::OutsideParam { place: self.place(*o) });
            }
            // Rows that touch are one run.
            let (runs, run_bytes) = match o.op.destination.stride == u64::from(o.op.row_bytes) {
                true => (1, o.op.bytes()),
                false => (o.op.rows, u64::from(o.op.row_bytes)),
            };
            for run in 0..u64::from(runs) {
                let first = o.op.destination.offset - param.offset + run * o.op.destination.stride;
                written.push((first, first + run_bytes));
            }
        }
        written.sort_unstable();
        let mut done = 0;
        for (start, end) in written.into_iter().chain([(bytes, bytes)]) {
            let name = || shorten(&param.name);
            if start > done {
                return Err(CheckError::NotWritten { receiver, param: name(), start: done, end: start });
            }
            if start < done {
                return Err(CheckError::WrittenTwice { receiver, param: name(), start, end: done.min(end) });
            }
            done = end;
        }
        let leaves = resolve(&sources.index, receiver, param)?;
        let mut trace = Trace { sources, param, leaves: &leaves, last: 0 };
        for o in ops {
            trace.check(o).map_err(|row| CheckError::WrongSource { place: self.place(*o), row })?;
        }
        Ok(())
    }

    fn place(&self, Incoming { trainer, index, op }: Incoming<'_>) -> OpPlace {
        OpPlace { trainer, index, to: op.to, param: shorten(self.name(op.param)) }
    }
}

/// An operation as its receiver sees it.
#[derive(Clone, Copy)]
struct Incoming<'p> {
    trainer: TrainerRank,
    index: usize,
    op: &'p Op,
}

fn start(o: &Incoming<'_>) -> (RegionIndex, u64) {
    (o.op.destination.region, o.op.destination.offset)
}

/// End of the last row, in the region; `None` when it overflows.
fn end(op: &Op, side: &Strided) -> Option<u64> {
    let last = u64::from(op.rows).checked_sub(1)?.checked_mul(side.stride)?;
    side.offset.checked_add(last)?.checked_add(u64::from(op.row_bytes))
}

/// What is wrong with an operation by itself.
fn fault(op: &Op, options: &PlanOptions) -> Option<&'static str> {
    let row_bytes = u64::from(op.row_bytes);
    let strides = [op.source.stride, op.destination.stride];
    if op.rows == 0 || op.row_bytes == 0 {
        Some("it moves nothing")
    } else if op.bytes() > options.chunk_bytes_max {
        Some("it moves more than chunk_bytes_max")
    } else if strides.iter().any(|&stride| stride < row_bytes) {
        Some("its rows overlap")
    } else if op.rows == 1 && strides != [row_bytes; 2] {
        Some("the stride of a single row must be its length")
    } else if !op.gather {
        None
    } else if op.rows == 1 || op.destination.stride != row_bytes {
        Some("it gathers what does not land in one piece")
    } else if op.bytes() > options.gather_chunk_bytes_max || row_bytes >= options.gather_row_bytes_max {
        Some("it gathers more than the options allow")
    } else {
        None
    }
}

/// The source tensors, and where each trainer keeps its pieces of them.
struct Sources<'m> {
    index: SourceIndex<'m>,
    /// Sorted by trainer and tensor.
    pieces: Vec<((TrainerRank, TensorId), &'m SourcePiece)>,
}

impl<'m> Sources<'m> {
    fn new(manifest: &'m Manifest) -> Result<Sources<'m>, CheckError> {
        let index = SourceIndex::new(manifest)?;
        let mut pieces = Vec::new();
        for (trainer, declared) in (0..).map(TrainerRank).zip(&manifest.trainers) {
            for piece in &declared.pieces {
                pieces.extend(index.find(&piece.tensor).map(|(tensor, _)| ((trainer, tensor), piece)));
            }
        }
        pieces.sort_by_key(|&(key, _)| key);
        Ok(Sources { index, pieces })
    }

    fn pieces(&self, trainer: TrainerRank, tensor: TensorId) -> impl Iterator<Item = &'m SourcePiece> {
        let first = self.pieces.partition_point(|&(key, _)| key < (trainer, tensor));
        let rest = self.pieces.get(first..).unwrap_or_default();
        rest.iter().take_while(move |&&(key, _)| key == (trainer, tensor)).map(|&(_, piece)| piece)
    }
}

/// Follows the bytes of one parameter back to their sources.
struct Trace<'a> {
    sources: &'a Sources<'a>,
    param: &'a DestinationParam,
    leaves: &'a [Leaf<TensorId>],
    /// The leaf that was found last: the next byte is most likely in it too.
    last: usize,
}

/// How far the source that was found for one element goes on being right.
struct Reach {
    /// Elements from this one on that follow each other on both sides.
    run: u64,
    /// Per dimension of the parameter: stride in bytes at the destination and at the source, and how many
    /// elements further along it the same piece still feeds the same leaf.
    dims: SmallVec<[(u64, u64, u64); 4]>,
}

impl Trace<'_> {
    /// Compares all rows of an operation with what the map asks for; the error is the first wrong row.
    fn check(&mut self, o: &Incoming<'_>) -> Result<(), u64> {
        let (op, element_bytes) = (o.op, self.param.dtype.bytes());
        let rows = u64::from(op.rows);
        let mut row = 0;
        while row < rows {
            // The row may pass through several leaves or pieces; follow it run by run.
            let (mut at, mut alike) = (0, rows - row);
            while at < u64::from(op.row_bytes) {
                let destination =
                    op.destination.offset - self.param.offset + row * op.destination.stride + at;
                let source = op.source.offset + row * op.source.stride + at;
                let reach = self.reach(o, destination, source).ok_or(row)?;
                let left = u64::from(op.row_bytes) - at;
                let run_bytes = (reach.run * element_bytes).min(left);
                // Rows that step along one dimension, without leaving the leaf or the piece, are right if
                // this one is. The run must not cross that dimension: then it looks the same one step
                // further.
                let steps = reach.dims.iter().filter(|&&(destination_stride, source_stride, _)| {
                    destination_stride == op.destination.stride
                        && source_stride == op.source.stride
                        && destination % destination_stride + run_bytes <= destination_stride
                });
                alike = alike.min(steps.map(|&(_, _, further)| further).max().unwrap_or(0).saturating_add(1));
                at += run_bytes;
            }
            row += alike;
        }
        Ok(())
    }

    /// Looks up the element at byte `destination` of the parameter. `None` unless the operation's trainer
    /// keeps the element that belongs there at byte `source` of the operation's source region.
    fn reach(&mut self, o: &Incoming<'_>, destination: u64, source: u64) -> Option<Reach> {
        let element_bytes = self.param.dtype.bytes();
        if !destination.is_multiple_of(element_bytes) {
            return None;
        }
        let mut element = destination / element_bytes;
        let mut indices: Dims = SmallVec::from_elem(0, self.param.shape.len());
        for (index, &len) in indices.iter_mut().zip(&self.param.shape).rev() {
            *index = element.checked_rem(len)?;
            element /= len;
        }
        let holds = |leaf: &Leaf<TensorId>| {
            indices
                .iter()
                .zip(leaf.result.start().zip(leaf.result.end()))
                .all(|(index, (start, end))| (start..end).contains(index))
        };
        if !self.leaves.get(self.last).is_some_and(holds) {
            self.last = self.leaves.iter().position(holds)?;
        }
        let leaf = self.leaves.get(self.last)?;
        let mut pieces = self.sources.pieces(o.trainer, leaf.tensor);
        pieces.find_map(|piece| self.reach_in(piece, leaf, &indices, o.op.source.region, source))
    }

    fn reach_in(
        &self,
        piece: &SourcePiece,
        leaf: &Leaf<TensorId>,
        indices: &[u64],
        region: RegionIndex,
        source: u64,
    ) -> Option<Reach> {
        let element_bytes = self.param.dtype.bytes();
        let mut reach = Reach { run: 1, dims: SmallVec::new() };
        let mut address = piece.offset;
        let (mut piece_stride, mut param_stride) = (element_bytes, element_bytes);
        // Whether all dimensions further in are covered from end to end by leaf, piece and parameter alike.
        let mut whole = true;
        let mut inside = 0; // elements before this one, in those dimensions
        for (dim, (&index, &param_len)) in indices.iter().zip(&self.param.shape).enumerate().rev() {
            let (leaf_first, leaf_len) = leaf.result.extent(dim)?;
            let (tensor_first, _) = leaf.bounds.extent(dim)?;
            let (piece_first, piece_len) = piece.bounds.extent(dim)?;
            let tensor_index = tensor_first + (index - leaf_first);
            let piece_index = tensor_index.checked_sub(piece_first).filter(|&index| index < piece_len)?;
            let further = (leaf_first + leaf_len - index).min(piece_len - piece_index) - 1;
            address += piece_index * piece_stride;
            if whole {
                let inner = param_stride / element_bytes;
                reach.run = (further + 1) * inner - inside;
                inside += index * inner;
                whole = leaf_len == param_len && (piece_first, piece_len) == (tensor_first, leaf_len);
            }
            reach.dims.push((param_stride, piece_stride, further));
            piece_stride *= piece_len;
            param_stride *= param_len;
        }
        (piece.region == region && address == source).then_some(reach)
    }
}
