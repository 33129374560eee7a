//! The check: proof that a plan does what its manifest asks, without planning again.
//!
//! It follows every transfer from the bytes it writes back, through the parameter's map, to the tensor
//! elements that belong there, and compares with the elements that the transfer reads. It shares the map's
//! evaluation with the planner, but neither the cutting of boxes nor the arithmetic of strides: the bugs of
//! one should not hide in the other.

use std::collections::{BTreeMap, BTreeSet};

use smallvec::SmallVec;

use crate::bound::LowerBound;
use crate::cost::Prediction;
use crate::error::{CheckError, TransferPlace, shorten};
use crate::ids::{GroupIndex, ParamId, Rank, ReceiverRank, RegionIndex, TrainerRank};
use crate::intersect::{Place, Segment, segments};
use crate::manifest::{DestinationParam, Manifest, SourcePiece};
use crate::param_map::{Leaf, Resolved, Via};
use crate::plan::{Fill, Op, Plan, Strided, Transfer};
use crate::quant::{Blocks, Exchange, block_of, elements_of};
use crate::route::Group;
use crate::schedule::{declarations, encode, manifest_digest};
use crate::source_index::{SourceIndex, TensorId};
use crate::template::Declared;
use crate::tensor_box::{Dims, TensorBox};
use crate::transform::{BlockQuant, Transform};

impl Plan {
    /// Proves that this plan moves what `manifest` asks for: that every byte of every parameter is written
    /// exactly once and from the right place, that no transfer leaves a region, that routes are trees, that staging never
    /// exceeds the watermark, that bytes are conserved per rail, and that all stated sums and digests are right.
    ///
    /// # Errors
    /// Names the first thing that is wrong. Such a plan must not be executed.
    pub fn check(&self, manifest: &Manifest) -> Result<(), CheckError> {
        manifest.validate().map_err(|error| CheckError::Manifest(error.into()))?;
        let given = manifest_digest(manifest)?;
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
        let groups = self.check_groups(manifest)?;
        let incoming = self.check_trainers(manifest)?;
        let sources = Sources::new(self, manifest)?;
        self.check_receivers(manifest, &sources, &groups, incoming)?;
        self.check_totals(manifest)?;
        self.check_parts(manifest)?;
        // Last: it finds any change, but cannot say which.
        let found = self.compute_digest().map_err(|error| CheckError::Manifest(encode(error)))?;
        if self.digest == found { Ok(()) } else { Err(CheckError::Digest { stated: self.digest, found }) }
    }

    /// That groups are sets of receivers, host by host, and that every route reaches each member once, from where the bytes
    /// have arrived already. Returns the groups by their members.
    fn check_groups(
        &self,
        manifest: &Manifest,
    ) -> Result<BTreeMap<Vec<ReceiverRank>, GroupIndex>, CheckError> {
        let mut by_members = BTreeMap::new();
        for (number, group) in (0..).map(GroupIndex).zip(&self.groups) {
            let malformed = |detail| CheckError::Group { group: number, detail };
            let mut hosts = BTreeSet::new();
            let mut members: Vec<ReceiverRank> = group.members().collect();
            for on_host in &group.hosts {
                let host = |member: &ReceiverRank| manifest.receivers.get(member.index()).map(|r| &r.host);
                let first = on_host.first().and_then(host);
                if first.is_none() || on_host.iter().any(|member| host(member) != first) {
                    return Err(malformed("its hosts are not those of the manifest"));
                }
                if !hosts.insert(first) {
                    return Err(malformed("it names a host twice"));
                }
            }
            members.sort_unstable();
            if members.is_empty() || members.windows(2).any(|pair| pair[0] == pair[1]) {
                return Err(malformed("it is empty, or names a receiver twice"));
            }
            for lane in 0..group.lanes() {
                if !reaches_all_once(group, lane, &members) {
                    return Err(malformed("a route does not reach every member exactly once"));
                }
            }
            if by_members.insert(members, number).is_some() {
                return Err(malformed("another group has the same members"));
            }
        }
        Ok(by_members)
    }

    /// What can be said about each transfer alone. Returns the transfers by group and parameter.
    fn check_trainers(&self, manifest: &Manifest) -> Result<Incomings<'_>, CheckError> {
        let mut incoming: Incomings<'_> = BTreeMap::new();
        let mut region_bytes: BTreeMap<(GroupIndex, RegionIndex), Option<u64>> = BTreeMap::new();
        for (number, fill) in self.fills.iter().enumerate() {
            if !fill.transfers.is_sorted_by_key(|transfer| transfer.trainer) {
                return Err(CheckError::Unsorted { fill: number });
            }
            let group = self.group(fill.to).ok_or(CheckError::NoGroup { fill: number })?;
            for (index, transfer) in fill.transfers.iter().enumerate() {
                let it = Incoming { fill, index, transfer };
                let malformed = |detail| CheckError::Malformed { place: self.place(it), detail };
                let declared = manifest.trainers.get(transfer.trainer.index());
                let declared = declared.ok_or_else(|| malformed("there is no such trainer"))?;
                if let Some(detail) = fault(transfer) {
                    return Err(malformed(detail));
                }
                let leaves = |rank, region| CheckError::OutsideRegion { place: self.place(it), rank, region };
                let Strided { region, .. } = transfer.source;
                let source_bytes = match transfer.transform {
                    // Scales do not lie in a region, but in a table; `check_receivers` looks at it.
                    Transform::Scales { .. } => Some(u64::MAX),
                    _ => declared.regions.get(region.index()).copied(),
                };
                let source_row = transfer.transform.source_bytes(transfer.row_bytes);
                let end = transfer.end(&transfer.source, source_row);
                if end.zip(source_bytes).is_none_or(|(end, bytes)| end > bytes) {
                    return Err(leaves(Rank::Trainer(transfer.trainer), region));
                }
                let Strided { region, .. } = transfer.destination;
                let shortest = *region_bytes.entry((fill.to, region)).or_insert_with(|| {
                    let bytes = |member: ReceiverRank| {
                        manifest.receivers.get(member.index())?.regions.get(region.index()).copied()
                    };
                    group.members().map(bytes).min().flatten()
                });
                let end = transfer.end(&transfer.destination, transfer.row_bytes);
                if end.zip(shortest).is_none_or(|(end, bytes)| end > bytes) {
                    let member = group.members().next().unwrap_or(ReceiverRank(0));
                    return Err(leaves(Rank::Receiver(member), region));
                }
                incoming.entry((fill.to, fill.param)).or_default().push(it);
            }
        }
        Ok(incoming)
    }

    /// That the sums stated by both sides are those of the transfers.
    fn check_totals(&self, manifest: &Manifest) -> Result<(), CheckError> {
        let equal = |rank, what, stated, found| {
            if stated == found { Ok(()) } else { Err(CheckError::Total { rank, what, stated, found }) }
        };
        let totals = self.totals(&manifest.options, manifest.receivers.len());
        let trainers = self.trainers.iter().zip(&totals.loads.trainers);
        for (rank, (part, load)) in (0..).map(|rank| Rank::Trainer(TrainerRank(rank))).zip(trainers) {
            equal(rank, "bytes", part.bytes, load.nic_out_bytes)?;
            equal(rank, "writes", part.writes, load.writes)?;
        }
        for ((receiver, part), found) in (0..).map(ReceiverRank).zip(&self.receivers).zip(&totals.receivers) {
            let rank = Rank::Receiver(receiver);
            equal(rank, "bytes", part.bytes, found.bytes)?;
            equal(rank, "writes", part.writes, found.writes)?;
            if part.arrivals != found.arrivals {
                return Err(CheckError::Arrivals { receiver });
            }
        }
        let sides = (manifest.trainers.as_slice(), manifest.receivers.as_slice());
        if self.bound != LowerBound::new(sides, &totals.loads)
            || self.predicted != Prediction::new(sides, &manifest.options, &totals.loads)
        {
            return Err(CheckError::Bound);
        }
        Ok(())
    }

    /// That the operations of every trainer are its transfers: as many bytes, on rails that exist, in waves that fit.
    fn check_parts(&self, manifest: &Manifest) -> Result<(), CheckError> {
        let options = &manifest.options;
        for ((trainer, part), declared) in (0..).map(TrainerRank).zip(&self.trainers).zip(&manifest.trainers)
        {
            let ops = self.part(trainer, manifest).map_err(CheckError::Manifest)?.ops;
            let rank = Rank::Trainer(trainer);
            let mut by_rail = vec![0u64; declared.rails.len()];
            let (mut wave, mut staged) = (0, 0u64);
            for op in &ops {
                let Some(rail) = by_rail.get_mut(usize::from(op.rail)) else {
                    return Err(CheckError::NoRail { trainer, rail: op.rail });
                };
                *rail += op.bytes();
                let next = op.wave == wave + 1;
                if next {
                    (wave, staged) = (op.wave, 0);
                }
                staged += op.staged_bytes();
                if op.wave != wave || staged > options.watermark_bytes {
                    let bytes_max = options.watermark_bytes;
                    return Err(CheckError::Watermark { trainer, wave: op.wave, bytes: staged, bytes_max });
                }
                if op.bytes() > options.chunk_bytes_max || op.bytes() == 0 {
                    return Err(CheckError::Chunk { trainer, bytes: op.bytes() });
                }
            }
            let found = by_rail.iter().sum();
            if found != part.bytes {
                return Err(CheckError::Total { rank, what: "bytes over rails", stated: part.bytes, found });
            }
            let (stated, found) = (part.writes, ops.iter().map(Op::writes).sum());
            if stated != found {
                return Err(CheckError::Total { rank, what: "writes of operations", stated, found });
            }
        }
        Ok(())
    }

    /// That the transfers fill exactly the declared parameters, with what the maps say.
    fn check_receivers(
        &self,
        manifest: &Manifest,
        sources: &Sources<'_>,
        groups: &BTreeMap<Vec<ReceiverRank>, GroupIndex>,
        mut incoming: Incomings<'_>,
    ) -> Result<(), CheckError> {
        let params: BTreeMap<(&str, u32), ParamId> = (0..)
            .map(ParamId)
            .zip(&self.params)
            .map(|(id, param)| ((param.name.as_str(), param.priority), id))
            .collect();
        for (first, members) in declarations(&manifest.receivers) {
            let key =
                groups.get(&members).zip(params.get(&(first.param.name.as_str(), first.param.priority)));
            let transfers = key.and_then(|(&group, &param)| incoming.remove(&(group, param)));
            self.check_param(sources, first, transfers.unwrap_or_default())?;
        }
        match incoming.into_values().flatten().next() {
            Some(stray) => Err(CheckError::OutsideParam { place: self.place(stray) }),
            None => Ok(()),
        }
    }

    fn check_param(
        &self,
        sources: &Sources<'_>,
        declared: Declared<'_>,
        transfers: Vec<Incoming<'_>>,
    ) -> Result<(), CheckError> {
        let Declared { receiver, param } = declared;
        let bytes = param.bytes().unwrap_or(0);
        let resolved = declared.resolve(&sources.index)?;
        let width = param.dtype.bytes();
        let mut written = Vec::with_capacity(transfers.len());
        for it in &transfers {
            let Transfer { destination, row_bytes, rows, .. } = *it.transfer;
            let end = it.transfer.end(&destination, row_bytes);
            let inside = destination.region == param.region
                && destination.offset >= param.offset
                && end.is_some_and(|end| end <= param.offset + bytes);
            if !inside {
                return Err(CheckError::OutsideParam { place: self.place(*it) });
            }
            let first = destination.offset - param.offset;
            runs(first, row_bytes, rows.into(), destination.stride, &mut written);
        }
        // Padding counts as written, so that nothing else may write it.
        let whole = TensorBox::whole(&resolved.shape).unwrap_or_default(); // resolved: not too many dimensions
        let place = Place { region: param.region, offset: 0, element_bytes: width, bounds: &whole };
        for pad in &resolved.pads {
            segments(&place, pad, &place, pad, &mut |Segment { destination, row_bytes, rows, .. }| {
                runs(destination.offset, row_bytes, rows, destination.stride, &mut written);
                Ok::<(), CheckError>(())
            })?;
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
        for leaf in &resolved.leaves {
            // Whoever executes the plan finds the scales by the fill's tables.
            if let Via::Quantize(quant) | Via::Scales(quant) = leaf.via {
                let table = sources.table_of.get(&(leaf.tensor, quant));
                let named = |it: &Incoming<'_>| table.is_some_and(|&t| it.fill.tables.contains(&(t as u32)));
                if let Some(it) = transfers.iter().find(|it| !named(it)) {
                    return Err(CheckError::NoTable { place: self.place(*it) });
                }
            }
        }
        let mut trace = Trace { sources, param, resolved: &resolved, last: 0 };
        for it in &transfers {
            trace.check(it).map_err(|row| CheckError::WrongSource { place: self.place(*it), row })?;
        }
        Ok(())
    }

    fn place(&self, Incoming { fill, index, transfer }: Incoming<'_>) -> TransferPlace {
        TransferPlace { trainer: transfer.trainer, index, to: fill.to, param: shorten(self.name(fill.param)) }
    }
}

/// A transfer, and where in the plan it stands.
#[derive(Clone, Copy)]
struct Incoming<'p> {
    fill: &'p Fill,
    index: usize,
    transfer: &'p Transfer,
}

type Incomings<'p> = BTreeMap<(GroupIndex, ParamId), Vec<Incoming<'p>>>;

impl Transfer {
    /// End of the last row, in the region; `None` when it overflows.
    fn end(&self, side: &Strided, row_bytes: u64) -> Option<u64> {
        let last = u64::from(self.rows).checked_sub(1)?.checked_mul(side.stride)?;
        side.offset.checked_add(last)?.checked_add(row_bytes)
    }
}

/// What is wrong with a transfer by itself.
fn fault(transfer: &Transfer) -> Option<&'static str> {
    let Transfer { row_bytes, rows, source, destination, transform, .. } = *transfer;
    let width = transform.destination_bytes();
    if rows == 0 || row_bytes == 0 {
        return Some("it moves nothing");
    }
    if row_bytes.checked_mul(rows.into()).is_none() || row_bytes >= 1 << 60 {
        return Some("it moves more than there is");
    }
    if !row_bytes.is_multiple_of(width) {
        return Some("its rows end within an element");
    }
    let source_row = transform.source_bytes(row_bytes);
    if source.stride < source_row || destination.stride < row_bytes {
        Some("its rows overlap")
    } else if rows == 1 && (source.stride, destination.stride) != (source_row, row_bytes) {
        Some("the stride of a single row must be its length")
    } else {
        None
    }
}

/// Whether every member is reached exactly once, and only from where the bytes are.
fn reaches_all_once(group: &Group, lane: u16, members: &[ReceiverRank]) -> bool {
    let mut reached = BTreeSet::new();
    let ordered = group.legs(TrainerRank(0), lane).all(|leg| {
        let has_them = match leg.from {
            Rank::Trainer(_) => true,
            Rank::Receiver(from) => reached.contains(&from),
        };
        has_them && reached.insert(leg.to)
    });
    ordered && reached.iter().eq(members)
}

/// Byte ranges that rows cover; rows that touch are one.
fn runs(first: u64, row_bytes: u64, rows: u64, stride: u64, written: &mut Vec<(u64, u64)>) {
    if stride == row_bytes {
        written.push((first, first + rows * row_bytes));
        return;
    }
    written.extend((0..rows).map(|row| {
        let start = first + row * stride;
        (start, start + row_bytes)
    }));
}

/// The source tensors, and where each trainer keeps its pieces of them.
struct Sources<'m> {
    index: SourceIndex,
    /// Sorted by trainer and tensor.
    pieces: Vec<((TrainerRank, TensorId), &'m SourcePiece)>,
    /// The plan's tables, by their number, and their places by tensor.
    tables: Vec<(Blocks, TensorBox)>,
    table_of: BTreeMap<(TensorId, BlockQuant), usize>,
}

impl<'m> Sources<'m> {
    fn new(plan: &Plan, manifest: &'m Manifest) -> Result<Sources<'m>, CheckError> {
        let index = SourceIndex::new(&manifest.trainers)?;
        let mut pieces = Vec::new();
        for (trainer, declared) in (0..).map(TrainerRank).zip(&manifest.trainers) {
            for piece in &declared.pieces {
                pieces.extend(index.find(&piece.tensor).map(|(tensor, _)| ((trainer, tensor), piece)));
            }
        }
        pieces.sort_by_key(|&(key, _)| key);
        let (mut tables, mut table_of) = (Vec::new(), BTreeMap::new());
        for (number, table) in plan.tables.iter().enumerate() {
            let wrong = |detail| CheckError::Table { tensor: shorten(&table.tensor), detail };
            let (tensor, _) =
                index.find(&table.tensor).ok_or_else(|| wrong("no trainer declares such a tensor"))?;
            let blocks = Blocks::new(&index, tensor, table.quant, (ReceiverRank(0), &table.tensor))?;
            if blocks.table != *table {
                return Err(wrong("its blocks are exchanged by other ranks than it says"));
            }
            check_blocks(&index, tensor, &blocks).map_err(wrong)?;
            let whole = TensorBox::whole(&blocks.shape).map_err(|_| wrong("it has no shape"))?;
            tables.push((blocks, whole));
            if table_of.insert((tensor, table.quant), number).is_some() {
                return Err(wrong("it is there twice"));
            }
        }
        Ok(Sources { index, pieces, tables, table_of })
    }

    fn pieces(&self, trainer: TrainerRank, tensor: TensorId) -> impl Iterator<Item = &'m SourcePiece> {
        let first = self.pieces.partition_point(|&(key, _)| key < (trainer, tensor));
        let rest = self.pieces.get(first..).unwrap_or_default();
        rest.iter().take_while(move |&&(key, _)| key == (trainer, tensor)).map(|&(_, piece)| piece)
    }
}

/// That the ranges of a table tile it, and that everybody who holds a part of a block learns its scale: either those who
/// hold any of it hold all of it, or all of it is reported and everybody is told.
fn check_blocks(index: &SourceIndex, tensor: TensorId, blocks: &Blocks) -> Result<(), &'static str> {
    let volume = |bounds: &TensorBox| bounds.volume().unwrap_or(u64::MAX);
    let total: u64 = blocks.ranges.iter().map(|range| volume(&range.blocks)).fold(0, u64::saturating_add);
    if total != blocks.shape.iter().product::<u64>() {
        return Err("its ranges do not add up to the table");
    }
    let block = block_of(blocks.table.quant, blocks.table.shape.len());
    let exchanges: BTreeMap<&TensorBox, &Exchange> =
        blocks.table.exchanges.iter().map(|exchange| (&exchange.blocks, exchange)).collect();
    for range in &blocks.ranges {
        let elements = elements_of(&range.blocks, &block, &blocks.table.shape).map_err(|_| "it overflows")?;
        let exchange = exchanges.get(&range.blocks);
        let mut first: Option<Vec<TrainerRank>> = None;
        index.cells(tensor, &elements, &mut |_, holders| {
            let holders: Vec<TrainerRank> = holders.iter().map(|holder| holder.trainer).collect();
            let fine = match exchange {
                Some(exchange) => {
                    holders.iter().any(|holder| exchange.reporters.contains(holder))
                        && holders.iter().all(|holder| exchange.holders.contains(holder))
                        && exchange.reporters.contains(&exchange.owner)
                        && exchange.owner == range.owner
                }
                None => {
                    let same = first.as_ref().is_none_or(|first| distinct(first) == distinct(&holders));
                    same && holders.contains(&range.owner)
                }
            };
            first.get_or_insert(holders);
            if fine { Ok(()) } else { Err("somebody would quantise a part of a block without its scale") }
        })?;
    }
    Ok(())
}

fn distinct(ranks: &[TrainerRank]) -> BTreeSet<TrainerRank> {
    ranks.iter().copied().collect()
}

/// Follows the bytes of one parameter back to their sources.
struct Trace<'a> {
    sources: &'a Sources<'a>,
    param: &'a DestinationParam,
    resolved: &'a Resolved<TensorId>,
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

/// Memory that may be read: `may` of what lies there row-major as `all`.
struct Readable<'a> {
    region: RegionIndex,
    offset: u64,
    width: u64,
    all: &'a TensorBox,
    may: &'a TensorBox,
}

impl Trace<'_> {
    /// Compares all rows of a transfer with what the map asks for; the error is the first wrong row.
    fn check(&mut self, it: &Incoming<'_>) -> Result<(), u64> {
        let transform = it.transfer.transform;
        let (transfer, element_bytes) = (it.transfer, self.param.dtype.bytes());
        let rows = u64::from(transfer.rows);
        let mut row = 0;
        while row < rows {
            // The row may pass through several leaves or pieces; follow it run by run.
            let (mut at, mut alike) = (0, rows - row);
            while at < transfer.row_bytes {
                let Strided { offset, stride, .. } = transfer.destination;
                let destination = offset - self.param.offset + row * stride + at;
                let Strided { offset, stride: source_stride, .. } = transfer.source;
                let source = offset + row * source_stride + transform.source_bytes(at);
                let reach = self.reach(it, destination, source).ok_or(row)?;
                let run_bytes = (reach.run * element_bytes).min(transfer.row_bytes - at);
                // Rows that step along one dimension, without leaving the leaf or the piece, are right if
                // this one is. The run must not cross that dimension: then it looks the same one step
                // further.
                let steps = reach.dims.iter().filter(|&&(destination_step, source_step, _)| {
                    destination_step == stride
                        && source_step == source_stride
                        && destination % destination_step + run_bytes <= destination_step
                });
                alike = alike.min(steps.map(|&(_, _, further)| further).max().unwrap_or(0).saturating_add(1));
                at += run_bytes;
            }
            row += alike;
        }
        Ok(())
    }

    /// Looks up the element at byte `destination` of the parameter. `None` unless the transfer's trainer
    /// keeps the element that belongs there at byte `source` of the transfer's source region.
    fn reach(&mut self, it: &Incoming<'_>, destination: u64, source: u64) -> Option<Reach> {
        let element_bytes = self.param.dtype.bytes();
        if !destination.is_multiple_of(element_bytes) {
            return None;
        }
        let shape = &self.resolved.shape;
        let mut element = destination / element_bytes;
        let mut indices: Dims = SmallVec::from_elem(0, shape.len());
        for (index, &len) in indices.iter_mut().zip(shape).rev() {
            *index = element.checked_rem(len)?;
            element /= len;
        }
        let holds = |leaf: &Leaf<TensorId>| {
            indices
                .iter()
                .zip(leaf.result.start().zip(leaf.result.end()))
                .all(|(index, (start, end))| (start..end).contains(index))
        };
        let leaves = &self.resolved.leaves;
        if !leaves.get(self.last).is_some_and(holds) {
            self.last = leaves.iter().position(holds)?;
        }
        let leaf = leaves.get(self.last)?;
        let region = it.transfer.source.region;
        let reach_in = |readable: Readable<'_>| {
            (readable.region == region).then(|| self.reach_in(&readable, leaf, &indices, source)).flatten()
        };
        if leaf.via.of(self.sources.index.dtype(leaf.tensor)?) != it.transfer.transform {
            return None;
        }
        if let Via::Scales(quant) = leaf.via {
            let table = *self.sources.table_of.get(&(leaf.tensor, quant))?;
            let (blocks, all) = self.sources.tables.get(table)?;
            let place = it.fill.tables.iter().position(|&of_fill| of_fill as usize == table)?;
            let mut own = blocks.ranges.iter().filter(|range| range.owner == it.transfer.trainer);
            let (region, width) = (RegionIndex(place as u32), quant.scales.dtype().bytes());
            return own
                .find_map(|range| reach_in(Readable { region, offset: 0, width, all, may: &range.blocks }));
        }
        let mut pieces = self.sources.pieces(it.transfer.trainer, leaf.tensor);
        pieces.find_map(|piece| {
            let SourcePiece { region, offset, dtype, bounds, .. } = piece;
            let (region, offset, width) = (*region, *offset, dtype.bytes());
            reach_in(Readable { region, offset, width, all: bounds, may: bounds })
        })
    }

    fn reach_in(
        &self,
        readable: &Readable<'_>,
        leaf: &Leaf<TensorId>,
        indices: &[u64],
        source: u64,
    ) -> Option<Reach> {
        let element_bytes = self.param.dtype.bytes();
        let mut reach = Reach { run: 1, dims: SmallVec::new() };
        let mut address = readable.offset;
        let (mut piece_stride, mut param_stride) = (readable.width, element_bytes);
        // Whether all dimensions further in are covered from end to end by leaf, piece and parameter alike.
        let mut whole = true;
        let mut inside = 0; // elements before this one, in those dimensions
        for (dim, (&index, &param_len)) in indices.iter().zip(&self.resolved.shape).enumerate().rev() {
            let (leaf_first, leaf_len) = leaf.result.extent(dim)?;
            let (tensor_first, _) = leaf.bounds.extent(dim)?;
            let (all_first, all_len) = readable.all.extent(dim)?;
            let (may_first, may_len) = readable.may.extent(dim)?;
            let tensor_index = tensor_first + (index - leaf_first);
            let may_index = tensor_index.checked_sub(may_first).filter(|&index| index < may_len)?;
            let further = (leaf_first + leaf_len - index).min(may_len - may_index) - 1;
            address += (tensor_index - all_first) * piece_stride;
            if whole {
                let inner = param_stride / element_bytes;
                reach.run = (further + 1) * inner - inside;
                inside += index * inner;
                whole = leaf_len == param_len
                    && (all_first, all_len) == (tensor_first, leaf_len)
                    && (may_first, may_len) == (all_first, all_len);
            }
            reach.dims.push((param_stride, piece_stride, further));
            piece_stride *= all_len;
            param_stride *= param_len;
        }
        (address == source).then_some(reach)
    }
}
