//! Explanations: who sends which part of a tensor from where to where, and why that rank.
//!
//! Transfers are followed from the bytes that they write back to boxes of source tensors, through the map of the parameter
//! that they fill. Nothing is planned again: what is said holds for this plan and its manifest.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;
use thiserror::Error;

use crate::cut::{Pieces, Rails};
use crate::error::{LayoutError, shorten};
use crate::ids::{GroupIndex, ParamId, ReceiverRank, RegionIndex, TrainerRank};
use crate::manifest::{DestinationParam, Manifest, SourcePiece};
use crate::param_map::Resolved;
use crate::plan::{Bytes, Placed, Plan, Strided, Transfer};
use crate::route::{Group, Route};
use crate::tensor_box::{Dims, TensorBox};
use crate::transform::Transform;

/// Everything that is sent of one tensor, or into one parameter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// The name that was asked for.
    pub name: String,
    /// Whether trainers have a tensor of this name.
    pub is_tensor: bool,
    /// Whether receivers have a parameter of this name.
    pub is_param: bool,
    /// For whom it is explained; `None`: for all receivers.
    pub receiver: Option<ReceiverRank>,
    /// Who gets it.
    pub groups: BTreeMap<GroupIndex, Group>,
    /// By parameter and group, then by trainer.
    pub transfers: Vec<ExplainedTransfer>,
    /// Transfers beyond the first 16384, which are not explained.
    pub left_out: u64,
}

/// One transfer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ExplainedTransfer {
    /// The parameter that it fills.
    pub param: String,
    /// Who sends.
    pub trainer: TrainerRank,
    /// Where that runs.
    pub host: String,
    /// Where the rows are read. For scales, the region is a place in the plan's tables.
    pub source: Strided,
    /// Where they are written, at every member of the group.
    pub destination: Strided,
    /// Number of rows.
    pub rows: u32,
    /// Length of a row at the destination, in bytes.
    pub row_bytes: u64,
    /// What happens to the elements.
    pub transform: Transform,
    /// Who gets it: one of [`Explanation::groups`].
    pub group: GroupIndex,
    /// Which of the lanes of the group's route it takes.
    pub lane: u16,
    /// To whom the trainer writes itself, where that is not everybody.
    pub entries: Vec<ReceiverRank>,
    /// On which of the trainer's rails it leaves for the first whom the trainer writes to.
    pub rails: Vec<u8>,
    /// Operations to each whom the trainer writes to.
    pub operations: u64,
    /// Which elements these are.
    pub boxes: Vec<ExplainedBox>,
    /// Whether it also carries elements of other tensors, which lie beside these on both sides.
    pub carries_more: bool,
}

/// Elements of a transfer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ExplainedBox {
    /// The source tensor.
    pub tensor: String,
    /// Which part of it; for scales, in blocks.
    pub bounds: TensorBox,
    /// Which part of the parameter; of what is viewed, where the parameter is a view.
    pub result: TensorBox,
    /// Where the first element lies in the trainer's region, in bytes; for scales, in the table.
    pub source_offset: u64,
    /// Where it lands in the receivers' region, in bytes.
    pub destination_offset: u64,
    /// Why it is this trainer.
    pub why: Why,
}

/// Why a trainer sends what it sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// Nobody else has all of it.
    SoleHolder,
    /// So many trainers have it, and this one would have been done with it first, after what it had been given before.
    LeastLoaded {
        /// How many have it.
        holders: u32,
    },
    /// It has the whole blocks of these scales, or, of several that have, it is its turn.
    HasBlocks,
    /// Shard borders cut the blocks of these scales. It is the one that is told the largest magnitude of each part.
    OwnsBlocks {
        /// How many trainers report to it, itself included.
        reporters: u32,
    },
}

/// There is nothing to explain.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the messages say it
pub enum ExplainError {
    #[error("no tensor and no parameter is called `{name}`{}", nearest_text(nearest))]
    UnknownName { name: String, nearest: Vec<String> },
    #[error("there is no {receiver}: the plan has {receivers} inference rank(s), counted from 0")]
    UnknownReceiver { receiver: ReceiverRank, receivers: usize },
    #[error("{receiver} gets nothing of `{name}`: ask without a rank who does")]
    NotThere { receiver: ReceiverRank, name: String },
    #[error("{receiver}, parameter `{param}`: {source}")]
    Map { receiver: ReceiverRank, param: String, source: LayoutError },
    #[error(
        "{trainer} sends `{param}` in a way that the manifest does not explain: was the plan made from it? Check it"
    )]
    OtherManifest { trainer: TrainerRank, param: String },
}

fn nearest_text(nearest: &[String]) -> String {
    let quoted: Vec<String> = nearest.iter().map(|name| format!("`{name}`")).collect();
    if quoted.is_empty() { String::new() } else { format!("; near it are {}", quoted.join(", ")) }
}

/// Transfers of an explanation. The experts of one layer of Kimi-K2, fused, are 12 000.
const TRANSFERS_MAX: usize = 1 << 14;

/// Names that an error proposes.
const NEAREST_MAX: usize = 5;

/// Explains how the parts of a source tensor, or of a destination parameter, reach `receiver`, or all receivers.
///
/// # Errors
/// When there is no such name or rank, or the plan was not made from this manifest.
pub fn explain(
    plan: &Plan,
    manifest: &Manifest,
    name: &str,
    receiver: Option<ReceiverRank>,
) -> Result<Explanation, ExplainError> {
    if let Some(receiver) = receiver.filter(|receiver| receiver.index() >= manifest.receivers.len()) {
        return Err(ExplainError::UnknownReceiver { receiver, receivers: manifest.receivers.len() });
    }
    let mut pieces = manifest.trainers.iter().flat_map(|trainer| &trainer.pieces);
    let is_tensor = pieces.any(|piece| piece.tensor == name);
    let is_param = plan.params.iter().any(|param| param.name == name);
    if !is_tensor && !is_param {
        return Err(ExplainError::UnknownName {
            name: shorten(name),
            nearest: nearest(plan, manifest, name),
        });
    }
    let wanted = wanted(plan, manifest, name, is_tensor);
    let found = find(plan, manifest, receiver, &wanted);
    let (fillers, holders) = fillers(plan, manifest, found.keys())?;
    let mut explanation = Explanation {
        name: name.to_owned(),
        is_tensor,
        is_param,
        receiver,
        groups: BTreeMap::new(),
        transfers: Vec::new(),
        left_out: 0,
    };
    for (key, transfers) in found {
        let Some(filler) = fillers.get(&key) else { continue };
        for it in transfers {
            // Beyond the limit they are only counted, with those that carry nothing of the tensor.
            if explanation.transfers.len() >= TRANSFERS_MAX {
                explanation.left_out += 1;
                continue;
            }
            if let Some(explained) = explain_transfer(plan, manifest, filler, &holders, it, name)? {
                let group = plan.group(explained.group).cloned();
                explanation.groups.extend(group.map(|group| (explained.group, group)));
                explanation.transfers.push(explained);
            }
        }
    }
    match receiver {
        Some(receiver) if explanation.transfers.is_empty() => {
            Err(ExplainError::NotThere { receiver, name: shorten(name) })
        }
        _ => Ok(explanation),
    }
}

/// By parameter: those of this name, and those that a tensor of this name is part of.
fn wanted(plan: &Plan, manifest: &Manifest, name: &str, is_tensor: bool) -> Vec<bool> {
    let mut names = BTreeSet::from([name]);
    if is_tensor {
        let params = manifest.receivers.iter().flat_map(|receiver| &receiver.params);
        names.extend(params.filter_map(|param| {
            let of = param.map.tensors().ok()?;
            of.contains(&name).then_some(param.name.as_str())
        }));
    }
    plan.params.iter().map(|param| names.contains(param.name.as_str())).collect()
}

/// A transfer that is asked for, and what is known of it only from those before it.
#[derive(Clone, Copy)]
struct Found<'p> {
    placed: Placed<'p>,
    operations: u64,
    /// Of its operations to the first receiver that the trainer writes to.
    rails: RailSet,
}

/// Rails by number, as bits: there are at most 64.
type RailSet = u64;

type Key = (ParamId, GroupIndex);

/// The transfers of the wanted parameters.
fn find<'p>(
    plan: &'p Plan,
    manifest: &Manifest,
    receiver: Option<ReceiverRank>,
    wanted: &[bool],
) -> BTreeMap<Key, Vec<Found<'p>>> {
    let reaches = |group: &Group| receiver.is_none_or(|receiver| group.members().any(|to| to == receiver));
    let groups: Vec<bool> = plan.groups.iter().map(reaches).collect();
    let is = |of: &[bool], index: usize| of.get(index).copied().unwrap_or(false);
    let mut found: BTreeMap<Key, Vec<Found<'p>>> = BTreeMap::new();
    let ranks = (0..).map(TrainerRank).zip(&manifest.trainers);
    let mut rails: Vec<Rails> = ranks.map(|(rank, has)| Rails::new(rank, has.rails.len())).collect();
    for placed in plan.transfers() {
        let transfer = placed.transfer;
        let Some(rails) = rails.get_mut(transfer.trainer.index()) else { continue };
        let pieces = Pieces::new(transfer, &manifest.options);
        let dealt = rails.deal((placed.to, placed.lane), &pieces);
        let operations = pieces.count;
        if is(wanted, placed.param.index()) && is(&groups, placed.to.index()) {
            let first = 0..operations.min(RailSet::BITS.into());
            let rails =
                first.fold(0, |set: RailSet, op| set | 1 << (u32::from(dealt.rail(0, op)) % RailSet::BITS));
            found.entry((placed.param, placed.to)).or_default().push(Found { placed, operations, rails });
        }
    }
    found.values_mut().for_each(|list| list.sort_by_key(|it| it.placed.transfer.trainer));
    found
}

/// A parameter as one of the group's members declares it; all declare it alike.
struct Filler<'m> {
    param: &'m DestinationParam,
    resolved: Resolved<&'m str>,
}

/// Who has which parts of the tensors that matter here.
struct Holders<'m>(BTreeMap<&'m str, Vec<(TrainerRank, &'m SourcePiece)>>);

fn fillers<'m, 'k>(
    plan: &Plan,
    manifest: &'m Manifest,
    keys: impl Iterator<Item = &'k Key>,
) -> Result<(BTreeMap<Key, Filler<'m>>, Holders<'m>), ExplainError> {
    let mut declared: BTreeMap<Key, (ReceiverRank, &DestinationParam)> = BTreeMap::new();
    let mut holders: BTreeMap<&str, Vec<(TrainerRank, &SourcePiece)>> = BTreeMap::new();
    for &(param, group) in keys {
        let first = plan.group(group).and_then(|group| group.members().next());
        let Some(first) = first else { continue };
        let params = manifest.receivers.get(first.index()).map_or(&[][..], |receiver| &receiver.params);
        let Some(known) = params.iter().find(|known| known.name == plan.name(param)) else { continue };
        for tensor in known.map.tensors().unwrap_or_default() {
            holders.insert(tensor, Vec::new());
        }
        declared.insert((param, group), (first, known));
    }
    for (trainer, has) in (0..).map(TrainerRank).zip(&manifest.trainers) {
        for piece in &has.pieces {
            if let Some(list) = holders.get_mut(piece.tensor.as_str()) {
                list.push((trainer, piece));
            }
        }
    }
    let mut fillers = BTreeMap::new();
    for (key, (receiver, param)) in declared {
        let resolved = param.map.resolve(&mut |name| {
            let (&name, pieces) = holders.get_key_value(name)?;
            Some((name, pieces.first()?.1.shape.as_slice()))
        });
        let resolved =
            resolved.map_err(|source| ExplainError::Map { receiver, param: shorten(&param.name), source })?;
        fillers.insert(key, Filler { param, resolved });
    }
    Ok((fillers, Holders(holders)))
}

impl Holders<'_> {
    /// How many trainers have all of these elements; `None` where `sender` does not.
    fn count(&self, sender: TrainerRank, tensor: &str, bounds: &TensorBox) -> Option<u32> {
        let mut held: BTreeMap<TrainerRank, u64> = BTreeMap::new();
        for (trainer, piece) in self.0.get(tensor).into_iter().flatten() {
            if let Some(part) = piece.bounds.intersect(bounds) {
                let sum = held.entry(*trainer).or_default();
                *sum = sum.saturating_add(part.volume().unwrap_or(u64::MAX));
            }
        }
        let all = bounds.volume().unwrap_or(u64::MAX);
        held.retain(|_, held| *held >= all);
        held.contains_key(&sender).then_some(held.len() as u32) // no more than ranks
    }
}

/// What a transfer carries of the tensor, or into the parameter, that is asked for; `None` where that is nothing.
fn explain_transfer(
    plan: &Plan,
    manifest: &Manifest,
    filler: &Filler<'_>,
    holders: &Holders<'_>,
    found: Found<'_>,
    name: &str,
) -> Result<Option<ExplainedTransfer>, ExplainError> {
    let Found { placed: Placed { fill, to, lane, transfer, .. }, operations, rails } = found;
    let (trainer, transform) = (transfer.trainer, transfer.transform);
    let Filler { param, resolved } = filler;
    let other_manifest = || ExplainError::OtherManifest { trainer, param: shorten(&param.name) };
    let group = plan.group(to).ok_or_else(other_manifest)?;
    let carried = carried(param, resolved, transfer).ok_or_else(other_manifest)?;
    if carried.is_empty() {
        return Err(other_manifest());
    }
    // The plan's number of a table of scales.
    let table = match transform {
        Transform::Scales { .. } => {
            let tables = plan.fills.get(fill).map_or(&[][..], |fill| &fill.tables);
            let table = tables.get(transfer.source.region.index()).ok_or_else(other_manifest)?;
            Some(RegionIndex(*table))
        }
        _ => None,
    };
    let all = carried.len();
    let whole = param.name == name;
    let mut boxes = Vec::new();
    for mut explained in carried.into_iter().filter(|explained| whole || explained.tensor == name) {
        explained.why = why(plan, holders, trainer, table, &explained).ok_or_else(other_manifest)?;
        boxes.push(explained);
    }
    if boxes.is_empty() {
        return Ok(None);
    }
    let host = manifest.trainers.get(trainer.index()).map_or("", |declared| declared.host.as_str());
    Ok(Some(ExplainedTransfer {
        param: param.name.clone(),
        trainer,
        host: host.to_owned(),
        source: Strided { region: table.unwrap_or(transfer.source.region), ..transfer.source },
        destination: transfer.destination,
        rows: transfer.rows,
        row_bytes: transfer.row_bytes,
        transform,
        group: to,
        lane,
        entries: match group.route {
            Route::Direct => Vec::new(),
            Route::PerHost | Route::Chain => group.entries(lane).collect(),
        },
        rails: (0..RailSet::BITS as u8).filter(|rail| rails >> rail & 1 == 1).collect(),
        operations,
        carries_more: boxes.len() < all,
        boxes,
    }))
}

/// The elements of a transfer by source tensor. `None` when its rows do not follow the parameter's dimensions.
fn carried(
    param: &DestinationParam,
    resolved: &Resolved<&str>,
    transfer: &Transfer,
) -> Option<Vec<ExplainedBox>> {
    let Transfer { source, destination, row_bytes, rows, transform, .. } = *transfer;
    let width = param.dtype.bytes();
    let first = destination.offset.checked_sub(param.offset)?;
    let boxes = boxes_of_rows(
        &resolved.shape,
        first / width,
        destination.stride / width,
        row_bytes / width,
        rows.into(),
    )?;
    let mut carried = Vec::new();
    for written in &boxes {
        for leaf in &resolved.leaves {
            let Some(result) = written.intersect(&leaf.result) else { continue };
            let bounds = result.moved(&leaf.result, &leaf.bounds)?;
            let mut element = 0u64;
            for (&len, index) in resolved.shape.iter().zip(result.start()) {
                element = element.checked_mul(len)?.checked_add(index)?;
            }
            let destination_offset = param.offset.checked_add(element.checked_mul(width)?)?;
            let beyond = destination_offset.checked_sub(destination.offset)?;
            let (row, within) =
                (beyond.checked_div(destination.stride)?, beyond.checked_rem(destination.stride)?);
            let source_offset = row
                .checked_mul(source.stride)?
                .checked_add(source.offset)?
                .checked_add(transform.source_bytes(within))?;
            carried.push(ExplainedBox {
                tensor: leaf.tensor.to_owned(),
                bounds,
                result,
                source_offset,
                destination_offset,
                why: Why::SoleHolder,
            });
        }
    }
    Some(carried)
}

/// `None` where the trainer does not have the elements.
fn why(
    plan: &Plan,
    holders: &Holders<'_>,
    trainer: TrainerRank,
    table: Option<RegionIndex>,
    explained: &ExplainedBox,
) -> Option<Why> {
    if let Some(table) = table {
        let table = plan.tables.get(table.index());
        let mut exchanges = table.into_iter().flat_map(|table| &table.exchanges);
        let own = exchanges
            .find(|exchange| exchange.owner == trainer && exchange.blocks.intersects(&explained.bounds));
        return Some(match own {
            Some(exchange) => Why::OwnsBlocks { reporters: exchange.reporters.len() as u32 },
            None => Why::HasBlocks,
        });
    }
    match holders.count(trainer, &explained.tensor, &explained.bounds)? {
        0 | 1 => Some(Why::SoleHolder),
        holders => Some(Why::LeastLoaded { holders }),
    }
}

/// The boxes that rows of elements cover, in something of `shape` that is row-major. `None` when they leave it, or step
/// along none of its dimensions.
fn boxes_of_rows(shape: &[u64], start: u64, stride: u64, len: u64, rows: u64) -> Option<Vec<TensorBox>> {
    let volume = |shape: &[u64]| shape.iter().try_fold(1u64, |product, &len| product.checked_mul(len));
    let end = rows.checked_sub(1)?.checked_mul(stride)?.checked_add(start)?.checked_add(len)?;
    if len == 0 || end > volume(shape)? {
        return None;
    }
    let runs = if rows == 1 {
        runs(shape, start, end - start)
    } else {
        let steps = |dim: &usize| shape.get(*dim..).and_then(volume) == Some(stride);
        let (outer, inner) = shape.split_at((1..=shape.len()).find(steps)?);
        let (row, first) = (start / stride, start % stride);
        if first + len > stride {
            return None;
        }
        let inner = runs(inner, first, len);
        let outer = runs(outer, row, rows);
        let joined =
            |outer: &Extents| inner.iter().map(|inner| [&outer[..], &inner[..]].concat()).collect::<Vec<_>>();
        outer.iter().flat_map(joined).collect()
    };
    let bounds = |run: &Extents| {
        let (start, len): (Dims, Dims) = run.iter().copied().unzip();
        TensorBox::new(&start, &len).ok()
    };
    runs.iter().map(bounds).collect()
}

/// First index and length per dimension.
type Extents = Vec<(u64, u64)>;

/// The boxes that `len` elements from `start` on cover; they lie in the shape, and are at least one.
fn runs(shape: &[u64], start: u64, len: u64) -> Vec<Extents> {
    let Some((_, inner)) = shape.split_first() else { return vec![Extents::new()] };
    let line = inner.iter().product::<u64>().max(1);
    let below = |row: u64, rows: u64, start: u64, len: u64| {
        runs(inner, start, len).into_iter().map(move |mut run| {
            run.insert(0, (row, rows));
            run
        })
    };
    let (row, first) = (start / line, start % line);
    if first + len <= line {
        return below(row, 1, first, len).collect();
    }
    let head = if first > 0 { line - first } else { 0 };
    let (rows, tail) = ((len - head) / line, (len - head) % line);
    let whole = row + u64::from(head > 0);
    let mut boxes = Vec::new();
    if head > 0 {
        boxes.extend(below(row, 1, first, head));
    }
    if rows > 0 {
        boxes.extend(below(whole, rows, 0, line));
    }
    if tail > 0 {
        boxes.extend(below(whole + rows, 1, 0, tail));
    }
    boxes
}

/// The names that have most groups of three letters in common with `name`.
fn nearest(plan: &Plan, manifest: &Manifest, name: &str) -> Vec<String> {
    let letters = |text: &str| -> BTreeSet<[u8; 3]> {
        let windows = text.as_bytes().windows(3);
        windows.filter_map(|three| <[u8; 3]>::try_from(three.to_ascii_lowercase()).ok()).collect()
    };
    let wanted = letters(name);
    let params = plan.params.iter().map(|param| param.name.as_str());
    let pieces = manifest.trainers.iter().flat_map(|trainer| &trainer.pieces);
    let known: BTreeSet<&str> = params.chain(pieces.map(|piece| piece.tensor.as_str())).collect();
    let mut near: Vec<(Reverse<u64>, &str)> = known
        .into_iter()
        .filter_map(|known| {
            let has = letters(known);
            let common = has.intersection(&wanted).count() as u64;
            // Dice's coefficient, in millionths.
            let likeness = 2_000_000 * common / (has.len() + wanted.len()).max(1) as u64;
            (common > 0).then_some((Reverse(likeness), known))
        })
        .collect();
    near.sort_unstable();
    near.into_iter().take(NEAREST_MAX).map(|(_, name)| shorten(name)).collect()
}

/// Transfers that the text lists.
const LISTED_MAX: usize = 32;

/// In lines for a person. Only the first 32 transfers are listed.
impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match (self.is_tensor, self.is_param) {
            (true, true) => "a source tensor, and a parameter",
            (true, false) => "a source tensor",
            _ => "a parameter",
        };
        let count = self.transfers.len() as u64 + self.left_out;
        write!(f, "`{}` is {kind}: {count} transfer(s)", shorten(&self.name))?;
        match self.receiver {
            Some(receiver) => writeln!(f, " bring it to {receiver}")?,
            None => writeln!(f, " bring it to all who want it")?,
        }
        for transfer in self.transfers.iter().take(LISTED_MAX) {
            transfer.write(f, self.groups.get(&transfer.group))?;
        }
        match count.saturating_sub(LISTED_MAX as u64) {
            0 => Ok(()),
            more => writeln!(f, "and {more} more transfer(s)"),
        }
    }
}

impl ExplainedTransfer {
    fn write(&self, f: &mut fmt::Formatter<'_>, group: Option<&Group>) -> fmt::Result {
        let Self { source, destination, rows, row_bytes, operations, .. } = self;
        let payload = Bytes(row_bytes.saturating_mul(u64::from(*rows)));
        writeln!(
            f,
            "{} ({}) sends {payload} of `{}`",
            self.trainer,
            shorten(&self.host),
            shorten(&self.param)
        )?;
        for of in &self.boxes {
            let unit = if matches!(self.transform, Transform::Scales { .. }) { "scales of " } else { "" };
            writeln!(f, "  {unit}{} of `{}` at {}: {}", of.bounds, shorten(&of.tensor), of.result, of.why)?;
        }
        if self.carries_more {
            writeln!(f, "  and elements of other tensors that lie beside them")?;
        }
        let from = if matches!(self.transform, Transform::Scales { .. }) { "table" } else { "region" };
        writeln!(
            f,
            "  {rows} row(s) of {row_bytes} bytes, from {from} {} + {} to region {} + {}: {}",
            source.region.0,
            source.offset,
            destination.region.0,
            destination.offset,
            TransformText(self.transform),
        )?;
        let Some(group) = group else { return Ok(()) };
        let members: Vec<ReceiverRank> = group.members().collect();
        write!(f, "  to {}", Ranks(&members))?;
        match group.route {
            _ if self.entries.is_empty() || self.entries.len() == members.len() => {
                write!(f, ", written to each")?
            }
            Route::Direct | Route::PerHost => {
                write!(f, ", written to {}, passed on within hosts", Ranks(&self.entries))?;
            }
            Route::Chain => {
                write!(f, ", written to {}, passed on within and between hosts", Ranks(&self.entries))?
            }
        }
        let rails: Vec<String> = self.rails.iter().map(u8::to_string).collect();
        let rail = if rails.len() == 1 { "rail" } else { "rails" };
        writeln!(f, "; {operations} operation(s) a copy, the first copy on {rail} {}", rails.join(", "))
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::SoleHolder => f.write_str("nobody else has all of it"),
            Why::LeastLoaded { holders } => {
                write!(f, "one of {holders} that have it, and the one with least to send when it was dealt")
            }
            Why::HasBlocks => f.write_str("it has these blocks whole"),
            Why::OwnsBlocks { reporters } => {
                write!(
                    f,
                    "shard borders cut these blocks between {reporters} trainers, and it collects their largest magnitudes"
                )
            }
        }
    }
}

struct TransformText(Transform);

impl fmt::Display for TransformText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Transform::Copy => f.write_str("as they are"),
            Transform::Cast { from, to } => write!(f, "cast from {from} to {to}"),
            Transform::Quantize { from, quant } => {
                let [rows, columns] = quant.block;
                write!(f, "quantised from {from} in blocks of {rows} x {columns}")
            }
            Transform::Scales { quant, .. } => write!(f, "as {}", quant.scales.dtype()),
        }
    }
}

/// Ranges of ranks that the text lists.
const RANGES_MAX: usize = 6;

/// Ranks, those that follow each other as a range.
struct Ranks<'a>(&'a [ReceiverRank]);

impl fmt::Display for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ranks: Vec<u32> = self.0.iter().map(|rank| rank.0).collect();
        ranks.sort_unstable();
        f.write_str("inference ")?;
        for (number, range) in ranks.chunk_by(|a, b| a + 1 == *b).enumerate() {
            let comma = if number == 0 { "" } else { ", " };
            if number == RANGES_MAX {
                return write!(f, " and more, {} in all", ranks.len());
            }
            match range {
                [first, .., last] => write!(f, "{comma}{first}-{last}")?,
                range => range.iter().try_for_each(|rank| write!(f, "{comma}{rank}"))?,
            }
        }
        Ok(())
    }
}
