//! Templates: how one declared parameter is filled, whoever declares it.
//!
//! A template depends on the trainers and on the declaration alone. So it is made once, however many receivers declare the
//! parameter alike, and stays valid when receivers come and go.

use std::sync::Arc;

use crate::digest::Digest;
use crate::error::{LayoutError, PlanError, shorten};
use crate::ids::{ReceiverRank, RegionIndex, TrainerRank};
use crate::intersect::{Place, Segment, segments};
use crate::limits::TRANSFERS_MAX;
use crate::manifest::{DestinationParam, TrainerManifest};
use crate::param_map::{Leaf, Resolved, Via};
use crate::plan::Transfer;
use crate::quant::Blocks;
use crate::source_index::{Holder, SourceIndex, TensorId};
use crate::tensor_box::TensorBox;
use crate::transform::{BlockQuant, Transform};

/// A part that several trainers hold: each of them could send it.
#[derive(Clone, Debug)]
pub(crate) struct Dealt {
    pub(crate) leaf: usize,
    pub(crate) bounds: TensorBox,
    pub(crate) holders: Vec<Holder>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Template {
    /// Where what is dealt belongs; nothing where nothing is.
    pub(crate) resolved: Option<Resolved<TensorId>>,
    /// What only one trainer has, by trainer and then by destination.
    pub(crate) unique: Arc<[Transfer]>,
    /// Of `unique`.
    pub(crate) digest: Digest,
    /// What several trainers have.
    pub(crate) dealt: Vec<Dealt>,
    /// The tables of the quantised tensors that it needs.
    pub(crate) quantised: Vec<RegionIndex>,
    /// Bytes of the parameter that are written, padding left out.
    pub(crate) bytes: u64,
    /// What it took of the transfers that a plan may have.
    pub(crate) room: usize,
}

/// What the trainers hold.
#[derive(Clone, Copy)]
pub(crate) struct Sources<'a> {
    pub(crate) index: &'a SourceIndex,
    /// Of which the index was made.
    pub(crate) trainers: &'a [TrainerManifest],
}

/// A declared parameter, and who declares it first: for messages.
#[derive(Clone, Copy)]
pub(crate) struct Declared<'a> {
    pub(crate) receiver: ReceiverRank,
    pub(crate) param: &'a DestinationParam,
}

/// Makes a quantised tensor known: its number among the tables, and its blocks if they are asked for.
pub(crate) type BlocksOf<'b> =
    dyn FnMut(TensorId, BlockQuant, bool) -> Result<(RegionIndex, Option<Blocks>), PlanError> + 'b;

impl Declared<'_> {
    fn name(&self) -> String {
        shorten(&self.param.name)
    }

    fn layout(&self, source: LayoutError) -> PlanError {
        PlanError::Map { receiver: self.receiver, param: self.name(), source }
    }

    /// The rectangles that the parameter is made of, after checking that the two sides fit.
    pub(crate) fn resolve(&self, index: &SourceIndex) -> Result<Resolved<TensorId>, PlanError> {
        let (receiver, param) = (self.receiver, self.param);
        let resolved = param.map.resolve(&mut |name| {
            let (id, tensor) = index.find(name)?;
            Some((id, tensor.shape.as_slice()))
        });
        let resolved = match resolved {
            Err(LayoutError::UnknownTensor { tensor }) => {
                return Err(PlanError::MissingTensor { receiver, param: self.name(), tensor });
            }
            resolved => resolved.map_err(|source| self.layout(source))?,
        };
        if resolved.outer_shape() != param.shape {
            let (declared, made) = (param.shape.clone(), resolved.outer_shape().to_vec());
            return Err(PlanError::ShapesDiffer { receiver, param: self.name(), declared, made });
        }
        for leaf in &resolved.leaves {
            let from = index.dtype(leaf.tensor).unwrap_or(param.dtype);
            let transform = leaf.via.of(from);
            if transform.destination(from) != param.dtype || !transform.is_possible() {
                let (tensor, to) = (shorten(index.name(leaf.tensor)), param.dtype);
                return Err(PlanError::NoConversion { receiver, param: self.name(), tensor, from, to });
            }
        }
        Ok(resolved)
    }

    pub(crate) fn place<'p>(&self, whole: &'p TensorBox) -> Place<'p> {
        let DestinationParam { region, offset, dtype, .. } = *self.param;
        Place { region, offset, element_bytes: dtype.bytes(), bounds: whole }
    }
}

impl Template {
    pub(crate) fn new(
        sources: Sources<'_>,
        declared: Declared<'_>,
        blocks_of: &mut BlocksOf<'_>,
        room: &mut usize,
    ) -> Result<Template, PlanError> {
        let (index, room_before) = (sources.index, *room);
        let resolved = declared.resolve(index)?;
        let whole = TensorBox::whole(&resolved.shape).map_err(|source| declared.layout(source))?;
        let to = declared.place(&whole);
        let mut maker = Maker { sources, declared, to, room, unique: Vec::new(), dealt: Vec::new() };
        let mut quantised: Vec<RegionIndex> = Vec::new();
        for (number, leaf) in resolved.leaves.iter().enumerate() {
            if let Via::Quantize(quant) | Via::Scales(quant) = leaf.via {
                let scales = matches!(leaf.via, Via::Scales(_));
                let (table, blocks) = blocks_of(leaf.tensor, quant, scales)?;
                let place = quantised.iter().position(|known| *known == table).unwrap_or_else(|| {
                    quantised.push(table);
                    quantised.len() - 1
                });
                if let Some(blocks) = blocks {
                    maker.scales(leaf, RegionIndex(place as u32), &blocks)?;
                    continue;
                }
            }
            maker.elements(number, leaf)?;
        }
        let Maker { mut unique, dealt, .. } = maker;
        coalesce(&mut unique);
        let unique: Arc<[Transfer]> = unique.into();
        let digest = Digest::of(&unique).map_err(|error| PlanError::Encode { detail: error.to_string() })?;
        let elements: u64 = resolved.leaves.iter().filter_map(|leaf| leaf.result.volume()).sum();
        let bytes = elements * declared.param.dtype.bytes(); // validated: at most the parameter's bytes
        let resolved = Some(resolved).filter(|_| !dealt.is_empty());
        Ok(Template { resolved, unique, digest, dealt, quantised, bytes, room: room_before - *room })
    }
}

impl Template {
    /// How much it keeps: one for itself, and one for each transfer, and for each part that is dealt.
    pub(crate) fn size(&self) -> usize {
        1 + self.unique.len() + self.dealt.len()
    }
}

struct Maker<'a> {
    sources: Sources<'a>,
    declared: Declared<'a>,
    to: Place<'a>,
    room: &'a mut usize,
    unique: Vec<Transfer>,
    dealt: Vec<Dealt>,
}

impl Maker<'_> {
    fn elements(&mut self, number: usize, leaf: &Leaf<TensorId>) -> Result<(), PlanError> {
        let Maker { sources: Sources { index, trainers }, declared, to, room, unique, dealt } = self;
        index.cells(leaf.tensor, &leaf.bounds, &mut |bounds, holders| match holders {
            [] => Err(PlanError::Uncovered {
                receiver: declared.receiver,
                param: declared.name(),
                tensor: shorten(index.name(leaf.tensor)),
                bounds: Box::new(bounds.clone()),
            }),
            [holder] => send((trainers, *holder), leaf, bounds, to, room, unique),
            _ => {
                dealt.push(Dealt { leaf: number, bounds: bounds.clone(), holders: holders.to_vec() });
                Ok(())
            }
        })
    }

    fn scales(
        &mut self,
        leaf: &Leaf<TensorId>,
        table: RegionIndex,
        blocks: &Blocks,
    ) -> Result<(), PlanError> {
        let Via::Scales(quant) = leaf.via else { return Ok(()) };
        let from = self.sources.index.dtype(leaf.tensor).unwrap_or(self.declared.param.dtype);
        let transform = Transform::Scales { from, quant };
        let all = TensorBox::whole(&blocks.shape).map_err(|source| self.declared.layout(source))?;
        let place =
            Place { region: table, offset: 0, element_bytes: quant.scales.dtype().bytes(), bounds: &all };
        for range in &blocks.ranges {
            let Some(part) = range.blocks.intersect(&leaf.bounds) else { continue };
            let result = part.moved(&leaf.bounds, &leaf.result).ok_or(OUTSIDE)?;
            segments(&place, &part, &self.to, &result, &mut |segment| {
                push(self.room, &mut self.unique, (range.owner, transform), segment)
            })?;
        }
        Ok(())
    }
}

const OUTSIDE: PlanError = PlanError::Defect { detail: "a cell lies outside what was looked up" };

/// Lets `holder` send `bounds`, a part of `leaf`.
pub(crate) fn send(
    (trainers, holder): (&[TrainerManifest], Holder),
    leaf: &Leaf<TensorId>,
    bounds: &TensorBox,
    to: &Place<'_>,
    room: &mut usize,
    sent: &mut Vec<Transfer>,
) -> Result<(), PlanError> {
    let trainer = holder.trainer;
    let piece = holder.piece(trainers).ok_or(PlanError::Defect { detail: "a holder without its piece" })?;
    let result = bounds.moved(&leaf.bounds, &leaf.result).ok_or(OUTSIDE)?;
    let transform = leaf.via.of(piece.dtype);
    let (region, offset, element_bytes) = (piece.region, piece.offset, piece.dtype.bytes());
    let from = Place { region, offset, element_bytes, bounds: &piece.bounds };
    segments(&from, bounds, to, &result, &mut |segment| push(room, sent, (trainer, transform), segment))
}

/// Appends a segment, in parts if it has more rows than a transfer can count.
fn push(
    room: &mut usize,
    sent: &mut Vec<Transfer>,
    (trainer, transform): (TrainerRank, Transform),
    mut part: Segment,
) -> Result<(), PlanError> {
    let mut left = part.rows;
    while left > 0 {
        *room = room.checked_sub(1).ok_or(PlanError::TooManyTransfers { max: TRANSFERS_MAX })?;
        let rows = u32::try_from(left).unwrap_or(u32::MAX);
        let Segment { row_bytes, source, destination, .. } = part;
        sent.push(Transfer { trainer, rows, row_bytes, transform, source, destination });
        left -= u64::from(rows);
        part.source.offset += u64::from(rows) * source.stride;
        part.destination.offset += u64::from(rows) * destination.stride;
    }
    Ok(())
}

/// Sorts by trainer and by where it lands, and joins what follows each other on both sides.
pub(crate) fn coalesce(sent: &mut Vec<Transfer>) {
    sent.sort_by_key(|sent| (sent.trainer, sent.destination.region, sent.destination.offset));
    sent.dedup_by(|next, joined| {
        let follows = (next.trainer, next.transform) == (joined.trainer, joined.transform)
            && (joined.rows, next.rows) == (1, 1)
            && joined.source.region == next.source.region
            && joined.source.offset + joined.source.stride == next.source.offset
            && joined.destination.region == next.destination.region
            && joined.destination.offset + joined.destination.stride == next.destination.offset;
        if follows {
            joined.row_bytes += next.row_bytes;
            joined.source.stride += next.source.stride;
            joined.destination.stride = joined.row_bytes;
        }
        follows
    });
}
