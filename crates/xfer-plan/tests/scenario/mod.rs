//! Random transfers, and what they must do, found out element by element.
//!
//! Nothing here uses the planner's boxes, cells, strides or maps' evaluation: an index is followed through
//! the map one step at a time, and memory is plain byte arrays.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::{ProptestConfig, Strategy, any};
use xfer_plan::{
    BlockQuant, DType, DestinationParam, DeviceMesh, Manifest, NO_TAG, Op, ParamMap, Placement, Plan,
    PlanOptions, QuantPart, RailDecl, ReceiverManifest, ReceiverRank, RegionIndex, Relay, ScaleFormat,
    ScaleTable, SourcePiece, Strided, TensorBox, TrainerManifest, TrainerRank, Transform, shard_box,
};

/// So many cases, or as many as the environment asks for.
pub(crate) fn config(cases: u32) -> ProptestConfig {
    let asked = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    ProptestConfig { cases: asked.unwrap_or(cases), failure_persistence: None, ..ProptestConfig::default() }
}

/// What [`Choices`] are made of.
pub(crate) fn choices() -> impl Strategy<Value = Vec<u32>> {
    proptest::collection::vec(any::<u32>(), 0..600)
}

/// Decisions that a property test makes: shrinking them towards zero and towards fewer makes the transfer
/// simpler.
pub(crate) struct Choices(std::vec::IntoIter<u32>);

impl Choices {
    pub(crate) fn new(choices: Vec<u32>) -> Choices {
        Choices(choices.into_iter())
    }

    /// A number below `n`; 0 once the decisions are used up.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        u64::from(self.0.next().unwrap_or(0)) % n.max(1)
    }

    pub(crate) fn one_of<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize].clone()
    }
}

/// A tensor that the test knows of.
#[derive(Clone, Debug)]
struct Tensor {
    name: String,
    dtype: DType,
    shape: Vec<u64>,
}

/// A map that may be sliced, concatenated and padded, with the shape and type of what it makes.
#[derive(Clone, Debug)]
pub(crate) struct Atom {
    map: ParamMap,
    shape: Vec<u64>,
    dtype: DType,
}

/// Every tensor as it is, converted, and quantised.
fn atoms(tensors: &[Tensor]) -> Vec<Atom> {
    let mut atoms = Vec::new();
    for tensor in tensors {
        let Tensor { name, dtype, shape } = tensor;
        let map = ParamMap::tensor(name);
        let odd = shape.iter().sum::<u64>() % 2 == 1;
        let map = if odd { map.shaped(shape) } else { map };
        let atom = |map, shape: &[u64], dtype| Atom { map, shape: shape.to_vec(), dtype };
        atoms.push(atom(map.clone(), shape, *dtype));
        if matches!(dtype, DType::BF16 | DType::F32) {
            let other = if *dtype == DType::F32 { DType::BF16 } else { DType::F32 };
            atoms.push(atom(map.clone().cast(other), shape, other));
            for (block, scales) in [([2, 3], ScaleFormat::F32), ([4, 2], ScaleFormat::Ue8m0)] {
                let quant = BlockQuant { block, scales };
                if let Ok(blocks) = quant.scales_shape(shape) {
                    atoms.push(atom(map.clone().quantize(quant), shape, DType::F8E4M3));
                    atoms.push(atom(map.clone().scales(quant), &blocks, scales.dtype()));
                }
            }
        }
    }
    atoms
}

/// Random, valid, and small enough to look at every byte.
pub(crate) fn manifest(choices: &mut Choices) -> Manifest {
    let tensors = tensors(choices);
    let atoms = atoms(&tensors);
    let rails = |choices: &mut Choices| {
        (0..=choices.below(2)).map(|_| RailDecl { bytes_per_second: 1 + choices.below(4) }).collect()
    };
    let mut trainers: Vec<TrainerManifest> = (0..1 + choices.below(5))
        .map(|rank| TrainerManifest {
            host: format!("t{rank}"),
            regions: vec![0; 1 + choices.below(2) as usize],
            rails: rails(choices),
            pieces: Vec::new(),
        })
        .collect();
    for tensor in &tensors {
        own(choices, &mut trainers, tensor);
    }
    let mut receivers: Vec<ReceiverManifest> = Vec::new();
    for rank in 0..1 + choices.below(6) {
        let host = format!("r{}", choices.one_of(&[rank, 0, 1]));
        // Replicas: they want just the same.
        if let (Some(last), true) = (receivers.last(), choices.below(3) > 0) {
            receivers.push(ReceiverManifest { host, ..last.clone() });
            continue;
        }
        let rails = rails(choices);
        receivers.push(receiver(choices, host, &atoms, rails));
    }
    let options = PlanOptions {
        chunk_bytes_max: choices.one_of(&[1 << 20, 64, 72, 128]),
        gather_row_bytes_max: choices.one_of(&[16 << 10, 0, 8, 16]),
        gather_chunk_bytes_max: choices.one_of(&[1 << 20, 64]),
        watermark_bytes: choices.one_of(&[1 << 20, 2 << 20]),
        relay: choices.one_of(&[Relay::Never, Relay::PerHost, Relay::Chain, Relay::Auto]),
        ..PlanOptions::default()
    };
    Manifest { trainers, receivers, options }
}

pub(crate) fn receiver(
    choices: &mut Choices,
    host: String,
    atoms: &[Atom],
    rails: Vec<RailDecl>,
) -> ReceiverManifest {
    let regions = vec![0; 1 + choices.below(2) as usize];
    let mut receiver = ReceiverManifest { host, regions, rails, params: Vec::new() };
    for index in 0..choices.below(5) {
        let dtype = choices.one_of(atoms).dtype;
        let candidates: Vec<&Atom> = atoms.iter().filter(|atom| atom.dtype == dtype).collect();
        let (mut map, mut shape) = map(choices, &candidates, 4);
        if choices.below(3) == 2 {
            shape = vec![elements(&shape)];
            map = map.view(&shape);
        }
        let bytes = elements(&shape) * dtype.bytes();
        let (region, offset) = place(choices, &mut receiver.regions, bytes);
        let (name, priority) = (format!("p{index}"), choices.below(3) as u32);
        receiver.params.push(DestinationParam {
            name,
            dtype,
            shape,
            region,
            offset,
            map: map.into(),
            priority,
        });
    }
    receiver
}

fn tensors(choices: &mut Choices) -> Vec<Tensor> {
    (0..1 + choices.below(4))
        .map(|index| Tensor {
            name: format!("w{index}"),
            dtype: choices.one_of(&[DType::BF16, DType::U8, DType::F32, DType::F64]),
            shape: (0..choices.one_of(&[2, 1, 3, 2, 4, 0]))
                .map(|_| choices.one_of(&[1, 2, 3, 4, 5, 7, 9, 0, 6, 8]))
                .collect(),
        })
        .collect()
}

/// Gives every element of `tensor` to at least one trainer: as a mesh would, or in boxes that overlap anyhow.
fn own(choices: &mut Choices, trainers: &mut [TrainerManifest], tensor: &Tensor) {
    let mut owned: Vec<(usize, TensorBox)> = Vec::new();
    if choices.below(3) < 2 {
        let ranks = trainers.len() as u64;
        let outer = 1 + choices.below(ranks);
        let inner = 1 + choices.below(ranks / outer);
        let mesh = DeviceMesh::new(&[outer, inner]).unwrap();
        let dims = tensor.shape.len();
        let mut placements: Vec<Placement> = (0..2)
            .map(|_| match choices.below(dims as u64 + 1) as usize {
                dim if dim < dims => Placement::Shard(dim),
                _ => Placement::Replicate,
            })
            .collect();
        if let [Placement::Shard(dim), Placement::Shard(other)] = placements[..]
            && dim == other
            && choices.below(2) == 1
        {
            placements[0] = Placement::StridedShard { dim, split: inner };
        }
        for rank in 0..mesh.ranks() {
            owned.push((rank as usize, shard_box(&tensor.shape, &mesh, &placements, rank).unwrap()));
        }
    } else {
        // A tiling by random cuts, and random boxes over it.
        let mut tiles = vec![TensorBox::whole(&tensor.shape).unwrap()];
        for _ in 0..choices.below(4) {
            let tile = choices.below(tiles.len() as u64) as usize;
            let dim = choices.below(tensor.shape.len() as u64) as usize;
            if let Some((start, len)) = tiles[tile].extent(dim)
                && let Some((low, high)) = tiles[tile].split(dim, start + choices.below(len))
            {
                tiles[tile] = low;
                tiles.push(high);
            }
        }
        for _ in 0..choices.below(3) {
            tiles.push(sub_box(choices, &tensor.shape));
        }
        owned.extend(tiles.into_iter().map(|tile| (choices.below(trainers.len() as u64) as usize, tile)));
    }
    for (rank, bounds) in owned {
        let bytes = elements(&bounds.shape()) * tensor.dtype.bytes();
        let (region, offset) = place(choices, &mut trainers[rank].regions, bytes);
        let Tensor { name, dtype, shape } = tensor.clone();
        trainers[rank].pieces.push(SourcePiece { tensor: name, dtype, shape, bounds, region, offset });
    }
}

/// Room for `bytes` at the end of one of the regions, sometimes after a gap.
fn place(choices: &mut Choices, regions: &mut [u64], bytes: u64) -> (RegionIndex, u64) {
    let region = choices.below(regions.len() as u64) as usize;
    let offset = regions[region] + choices.one_of(&[0, 0, 3]);
    regions[region] = offset + bytes;
    (RegionIndex(region as u32), offset)
}

/// A map and the shape that it makes.
fn map(choices: &mut Choices, atoms: &[&Atom], depth: u32) -> (ParamMap, Vec<u64>) {
    match choices.below(if depth == 0 { 1 } else { 5 }) {
        4 => {
            let (of, mut shape) = map(choices, atoms, depth - 1);
            if shape.is_empty() {
                return (of, shape);
            }
            let dim = choices.below(shape.len() as u64) as usize;
            shape[dim] += choices.below(3);
            (of.pad(dim, shape[dim]), shape)
        }
        1 => {
            let (of, shape) = map(choices, atoms, depth - 1);
            let bounds = sub_box(choices, &shape);
            let shape = bounds.shape().to_vec();
            (of.slice(bounds), shape)
        }
        2 | 3 => {
            let (first, mut shape) = map(choices, atoms, depth - 1);
            if shape.is_empty() {
                return (first, shape);
            }
            let dim = choices.below(shape.len() as u64) as usize;
            let mut parts = vec![first];
            for _ in 0..choices.below(3) {
                let (part, part_shape) = map(choices, atoms, depth - 1);
                // Cut the part to fit; leave it out when it cannot.
                let fits = part_shape.len() == shape.len()
                    && (0..shape.len()).all(|d| d == dim || part_shape[d] >= shape[d]);
                if fits {
                    let cut: Vec<u64> =
                        (0..shape.len()).map(|d| if d == dim { part_shape[d] } else { shape[d] }).collect();
                    shape[dim] += cut[dim];
                    parts.push(part.slice(TensorBox::whole(&cut).unwrap()));
                }
            }
            (ParamMap::concat(dim, parts), shape)
        }
        _ => {
            let Atom { map, shape, .. } = choices.one_of(atoms).clone();
            (map, shape)
        }
    }
}

/// A box inside `shape`; shrinks towards all of it.
fn sub_box(choices: &mut Choices, shape: &[u64]) -> TensorBox {
    let (mut starts, mut lens) = (Vec::new(), Vec::new());
    for &len in shape {
        let cut = choices.below(2) == 1;
        let start = if cut { choices.below(len + 1) } else { 0 };
        starts.push(start);
        lens.push(len - start - if cut { choices.below(len - start + 1) } else { 0 });
    }
    TensorBox::new(&starts, &lens).unwrap()
}

pub(crate) fn elements(shape: &[u64]) -> u64 {
    shape.iter().product()
}

/// Row-major indices of element number `element`.
fn indices(mut element: u64, shape: &[u64]) -> Vec<u64> {
    let mut indices = vec![0; shape.len()];
    for d in (0..shape.len()).rev() {
        indices[d] = element % shape[d];
        element /= shape[d];
    }
    indices
}

/// Row-major number of an element.
fn number(indices: &[u64], shape: &[u64]) -> u64 {
    indices.iter().zip(shape).fold(0, |number, (index, len)| number * len + index)
}

/// The bytes of element number `element` of a tensor: different almost everywhere; floats are finite and of both signs.
fn content(tensor: &str, element: u64, dtype: DType) -> Vec<u8> {
    let seed = tensor.bytes().fold(17u64, |a, b| a.wrapping_mul(31).wrapping_add(b.into()));
    let mixed = (seed ^ (element << 3)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    match dtype {
        DType::BF16 | DType::F32 => {
            let value = (mixed >> 40) as f32 / 1024.0 - 8192.0;
            encode(dtype, if mixed.is_multiple_of(16) { 0.0 } else { value })
        }
        _ => (0..dtype.bytes()).map(|byte| (mixed >> (56 - 7 * byte)) as u8).collect(),
    }
}

/// Every region of every rank, as bytes.
type Memory = Vec<Vec<Vec<u8>>>;

/// The trainers' memory, filled as their pieces say.
pub(crate) fn sources(manifest: &Manifest) -> Memory {
    let fill = |trainer: &TrainerManifest| {
        let mut regions: Vec<Vec<u8>> =
            trainer.regions.iter().map(|&bytes| vec![0xcc; bytes as usize]).collect();
        for piece in &trainer.pieces {
            let (local, width) = (piece.bounds.shape(), piece.dtype.bytes());
            for element in 0..elements(&local) {
                let global: Vec<u64> = indices(element, &local)
                    .iter()
                    .zip(piece.bounds.start())
                    .map(|(i, start)| i + start)
                    .collect();
                let at = (piece.offset + element * width) as usize;
                let bytes = content(&piece.tensor, number(&global, &piece.shape), piece.dtype);
                regions[piece.region.index()][at..at + bytes.len()].copy_from_slice(&bytes);
            }
        }
        regions
    };
    manifest.trainers.iter().map(fill).collect()
}

/// What the receivers' memory must be afterwards; bytes that are not part of a parameter keep `untouched`.
pub(crate) fn expected(manifest: &Manifest, untouched: u8) -> Memory {
    let pieces = manifest.trainers.iter().flat_map(|trainer| &trainer.pieces);
    let tensors: Tensors = pieces.map(|p| (p.tensor.as_str(), (p.dtype, p.shape.as_slice()))).collect();
    let fill = |receiver: &ReceiverManifest| {
        let mut regions: Vec<Vec<u8>> =
            receiver.regions.iter().map(|&bytes| vec![untouched; bytes as usize]).collect();
        for param in &receiver.params {
            let width = param.dtype.bytes();
            for element in 0..elements(&param.shape) {
                if let Some(bytes) = value(&param.map, indices(element, &param.shape), &tensors) {
                    let at = (param.offset + element * width) as usize;
                    regions[param.region.index()][at..at + bytes.len()].copy_from_slice(&bytes);
                }
            }
        }
        regions
    };
    manifest.receivers.iter().map(fill).collect()
}

/// Type and shape of every source tensor.
type Tensors<'m> = BTreeMap<&'m str, (DType, &'m [u64])>;

/// The bytes of one element of a map's result; `None` for padding.
fn value(map: &ParamMap, mut at: Vec<u64>, tensors: &Tensors<'_>) -> Option<Vec<u8>> {
    match map {
        ParamMap::Tensor(name) => {
            let (dtype, shape) = tensors[name.as_str()];
            Some(content(name, number(&at, shape), dtype))
        }
        ParamMap::Shaped { of, .. } => value(of, at, tensors),
        ParamMap::Slice { of, bounds } => {
            let inner = at.iter().zip(bounds.start()).map(|(index, start)| index + start).collect();
            value(of, inner, tensors)
        }
        ParamMap::Concat { dim, parts } => {
            for part in parts {
                let len = shape_of(part, tensors)[*dim];
                if at[*dim] < len {
                    return value(part, at, tensors);
                }
                at[*dim] -= len;
            }
            panic!("index beyond a concatenation")
        }
        ParamMap::Pad { of, dim, .. } => {
            if at[*dim] >= shape_of(of, tensors)[*dim] {
                None
            } else {
                value(of, at, tensors)
            }
        }
        ParamMap::View { of, shape } => {
            let element = number(&at, shape);
            value(of, indices(element, &shape_of(of, tensors)), tensors)
        }
        ParamMap::Cast { of, to } => {
            let from = value(of, at, tensors)?;
            let (dtype, _) = tensors[of.tensors().unwrap()[0]];
            Some(if dtype == *to { from } else { encode(*to, decode(dtype, &from)) })
        }
        ParamMap::Quantize { of, quant } => {
            let (dtype, _) = tensors[of.tensors().unwrap()[0]];
            let element = decode(dtype, &value(of, at.clone(), tensors)?);
            let rank = at.len();
            at[rank - 2] /= u64::from(quant.block[0]);
            at[rank - 1] /= u64::from(quant.block[1]);
            Some(vec![e4m3(element / scale(of, &at, *quant, tensors))])
        }
        ParamMap::Scales { of, quant } => Some(stored(scale(of, &at, *quant, tensors), quant.scales)),
    }
}

/// The scale of a block, from all of its elements.
fn scale(of: &ParamMap, block: &[u64], quant: BlockQuant, tensors: &Tensors<'_>) -> f32 {
    let shape = shape_of(of, tensors);
    let (dtype, _) = tensors[of.tensors().unwrap()[0]];
    let (rank, [rows, columns]) = (shape.len(), quant.block.map(u64::from));
    let mut amax = 0.0_f32;
    for row in (block[rank - 2] * rows..shape[rank - 2]).take(rows as usize) {
        for column in (block[rank - 1] * columns..shape[rank - 1]).take(columns as usize) {
            let mut at = block.to_vec();
            (at[rank - 2], at[rank - 1]) = (row, column);
            amax = amax.max(decode(dtype, &value(of, at, tensors).unwrap()).abs());
        }
    }
    scale_of(amax, quant.scales)
}

pub(crate) fn scale_of(amax: f32, format: ScaleFormat) -> f32 {
    if amax == 0.0 {
        return 1.0;
    }
    match format {
        ScaleFormat::F32 => amax / 448.0,
        ScaleFormat::Ue8m0 => (-127..128).map(|e| (e as f32).exp2()).find(|s| *s >= amax / 448.0).unwrap(),
    }
}

/// A scale as it is stored.
fn stored(scale: f32, format: ScaleFormat) -> Vec<u8> {
    match format {
        ScaleFormat::F32 => scale.to_le_bytes().to_vec(),
        ScaleFormat::Ue8m0 => vec![(scale.to_bits() >> 23) as u8],
    }
}

fn decode(dtype: DType, bytes: &[u8]) -> f32 {
    match dtype {
        DType::BF16 => f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16),
        DType::F32 => f32::from_le_bytes(bytes.try_into().unwrap()),
        other => panic!("{other} is no float of these tests"),
    }
}

fn encode(dtype: DType, value: f32) -> Vec<u8> {
    match dtype {
        DType::BF16 => {
            let bits = value.to_bits();
            let rounded = bits + 0x7fff + (bits >> 16 & 1);
            ((rounded >> 16) as u16).to_le_bytes().to_vec()
        }
        DType::F32 => value.to_le_bytes().to_vec(),
        other => panic!("{other} is no float of these tests"),
    }
}

/// The nearest of all 8-bit floats, by trying them; of two equally near ones the even.
fn e4m3(value: f32) -> u8 {
    let magnitude = |byte: u8| {
        let (exponent, mantissa) = (i32::from(byte >> 3), f32::from(byte & 7));
        if exponent == 0 { mantissa / 512.0 } else { (1.0 + mantissa / 8.0) * ((exponent - 7) as f32).exp2() }
    };
    let distance = |byte: u8| (magnitude(byte) - value.abs()).abs();
    let nearest = (0..127u8).min_by(|a, b| distance(*a).total_cmp(&distance(*b)).then((a % 2).cmp(&(b % 2))));
    nearest.unwrap() | if value.is_sign_negative() { 0x80 } else { 0 }
}

fn shape_of(map: &ParamMap, tensors: &Tensors<'_>) -> Vec<u64> {
    match map {
        ParamMap::Tensor(name) => tensors[name.as_str()].1.to_vec(),
        ParamMap::Shaped { of, .. } | ParamMap::Cast { of, .. } | ParamMap::Quantize { of, .. } => {
            shape_of(of, tensors)
        }
        ParamMap::Slice { bounds, .. } => bounds.shape().to_vec(),
        ParamMap::Concat { dim, parts } => {
            let mut shape = shape_of(&parts[0], tensors);
            shape[*dim] = parts.iter().map(|part| shape_of(part, tensors)[*dim]).sum();
            shape
        }
        ParamMap::Pad { of, dim, len } => {
            let mut shape = shape_of(of, tensors);
            shape[*dim] = *len;
            shape
        }
        ParamMap::View { shape, .. } => shape.clone(),
        ParamMap::Scales { of, quant } => quant.scales_shape(&shape_of(of, tensors)).unwrap(),
    }
}

/// Scales that each trainer has found out or been told: by trainer, table and block.
type KnownScales = BTreeMap<(TrainerRank, usize, Vec<u64>), f32>;

/// Carries the exchanges out with what each trainer is given of the plan: every one sees its own memory, and what it is told.
fn exchange(plan: &Plan, manifest: &Manifest, sources: &Memory) -> Result<KnownScales, String> {
    let mut magnitudes = plan.magnitudes();
    let ranks = || (0..plan.trainers.len() as u32).map(TrainerRank);
    let parts: Vec<QuantPart> = ranks()
        .map(|rank| plan.quant_part(rank, manifest).map_err(|error| error.to_string()))
        .collect::<Result<_, _>>()?;
    let found: Vec<Found> = parts.iter().zip(sources).map(|(part, memory)| find(part, memory)).collect();
    for ((rank, part), found) in ranks().zip(&parts).zip(&found) {
        let mut reported = Vec::new();
        for table in &part.tables {
            for block in table.reports.iter().flat_map(all_indices) {
                let part = found.get(&(table.table, block));
                reported
                    .push(part.ok_or_else(|| format!("{rank} reports of a block that it has nothing of"))?.0);
            }
        }
        magnitudes.report(rank, &reported).map_err(|error| error.to_string())?;
    }
    let mut known = KnownScales::new();
    for ((rank, part), found) in ranks().zip(&parts).zip(&found) {
        let mut merged = magnitudes.merged(rank).ok_or("not all have reported")?.into_iter();
        for held in &part.tables {
            let (place, table) = (held.table as usize, &plan.tables[held.table as usize]);
            let scale = |amax| scale_of(amax, table.quant.scales);
            let own = found.range((held.table, Vec::new())..(held.table + 1, Vec::new()));
            for ((_, block), (amax, seen)) in own {
                if seen.len() as u64 == elements_in(block, table) {
                    known.insert((rank, place, block.clone()), scale(*amax));
                }
            }
            for block in held.told.iter().flat_map(all_indices) {
                let amax = merged.next().ok_or("somebody is told of too few blocks")?;
                if found.get(&(held.table, block.clone())).is_none_or(|(own, _)| amax < *own) {
                    return Err(format!("{rank} is told less of a block than it has found itself"));
                }
                known.insert((rank, place, block), scale(amax));
            }
        }
        if merged.next().is_some() {
            return Err("somebody is told of too many blocks".into());
        }
    }
    Ok(known)
}

/// What a trainer finds in its own pieces, by table and block: the largest magnitude, and the elements that it has seen.
type Found = BTreeMap<(u32, Vec<u64>), (f32, BTreeSet<u64>)>;

fn find(part: &QuantPart, memory: &[Vec<u8>]) -> Found {
    let mut found = Found::new();
    for held in &part.tables {
        let width = held.dtype.bytes();
        for piece in &held.pieces {
            let local = piece.bounds.shape();
            for element in 0..elements(&local) {
                let at: Vec<u64> =
                    indices(element, &local).iter().zip(piece.bounds.start()).map(|(i, s)| i + s).collect();
                let byte = (piece.offset + element * width) as usize;
                let bytes = &memory[piece.region.index()][byte..byte + width as usize];
                let mut block = at.clone();
                let rank = block.len();
                block[rank - 2] /= u64::from(held.quant.block[0]);
                block[rank - 1] /= u64::from(held.quant.block[1]);
                let seen = found.entry((held.table, block)).or_default();
                seen.0 = seen.0.max(decode(held.dtype, bytes).abs());
                seen.1.insert(number(&at, &held.shape));
            }
        }
    }
    found
}

/// All indices of a box, row-major.
fn all_indices(bounds: &TensorBox) -> impl Iterator<Item = Vec<u64>> {
    (0..elements(&bounds.shape())).map(|element| {
        indices(element, &bounds.shape()).iter().zip(bounds.start()).map(|(i, s)| i + s).collect()
    })
}

fn block_at(at: &[u64], table: &ScaleTable) -> Vec<u64> {
    let mut block = at.to_vec();
    let rank = block.len();
    block[rank - 2] /= u64::from(table.quant.block[0]);
    block[rank - 1] /= u64::from(table.quant.block[1]);
    block
}

/// How many elements a block has; those at the end of a dimension have fewer.
fn elements_in(block: &[u64], table: &ScaleTable) -> u64 {
    let rank = block.len();
    let along = |dim: usize, size: u32| {
        let first = block[dim] * u64::from(size);
        (table.shape[dim] - first).min(size.into())
    };
    along(rank - 2, table.quant.block[0]) * along(rank - 1, table.quant.block[1])
}

/// What an operation leaves in staging memory, or reads: its rows as the receiver gets them.
fn payload(
    op: &Op,
    trainer: TrainerRank,
    plan: &Plan,
    manifest: &Manifest,
    sources: &Memory,
    scales: &KnownScales,
) -> Result<Vec<Vec<u8>>, String> {
    let rank = trainer.index();
    let outside = || format!("{op:?} of {trainer} leaves a region");
    let region = || sources[rank].get(op.source.region.index()).ok_or_else(outside);
    (0..u64::from(op.rows))
        .map(|row| {
            let at = op.source.offset + row * op.source.stride;
            let read = |bytes: u64| {
                region()?.get(at as usize..(at + bytes) as usize).map(<[u8]>::to_vec).ok_or_else(outside)
            };
            let width = |dtype: DType| dtype.bytes() as usize;
            match op.transform {
                Transform::Copy => read(op.row_bytes.into()),
                Transform::Cast { from, to } => {
                    let row = read(u64::from(op.row_bytes) / to.bytes() * from.bytes())?;
                    Ok(row.chunks(width(from)).flat_map(|e| encode(to, decode(from, e))).collect())
                }
                Transform::Quantize { from, quant } => {
                    let row = read(u64::from(op.row_bytes) * from.bytes())?;
                    let pieces = &manifest.trainers[rank].pieces;
                    let elements = row.chunks(width(from)).enumerate().map(|(number, element)| {
                        let byte = at + number as u64 * from.bytes();
                        let piece = pieces.iter().find(|piece| {
                            piece.region == op.source.region
                                && (piece.offset..piece.offset + piece.bytes().unwrap()).contains(&byte)
                        });
                        let piece = piece.ok_or_else(outside)?;
                        let local = indices((byte - piece.offset) / from.bytes(), &piece.bounds.shape());
                        let at: Vec<u64> =
                            local.iter().zip(piece.bounds.start()).map(|(i, s)| i + s).collect();
                        let table = plan
                            .tables
                            .iter()
                            .position(|table| table.tensor == piece.tensor && table.quant == quant)
                            .ok_or("no table")?;
                        let block = block_at(&at, &plan.tables[table]);
                        let scale = scales.get(&(trainer, table, block.clone())).ok_or_else(|| {
                            format!(
                                "{trainer} does not know the scale of block {block:?} of {}",
                                piece.tensor
                            )
                        })?;
                        Ok(e4m3(decode(from, element) / scale))
                    });
                    elements.collect()
                }
                Transform::Scales { quant, .. } => {
                    let table = op.source.region.index();
                    let shape = quant.scales_shape(&plan.tables[table].shape).map_err(|e| e.to_string())?;
                    let width = quant.scales.dtype().bytes();
                    let blocks = (at / width..(at + u64::from(op.row_bytes)) / width).map(|element| {
                        let block = indices(element, &shape);
                        let scale = scales
                            .get(&(trainer, table, block.clone()))
                            .ok_or_else(|| format!("{trainer} does not know the scale of block {block:?}"))?;
                        Ok(stored(*scale, quant.scales))
                    });
                    Ok(blocks.collect::<Result<Vec<_>, String>>()?.concat())
                }
            }
        })
        .collect()
}

/// Carries a plan out on byte arrays. `Err` when an operation leaves a region, writes a byte that was written before, or
/// needs a scale that its trainer does not know.
pub(crate) fn execute(plan: &Plan, manifest: &Manifest, untouched: u8) -> Result<Memory, String> {
    let sources = sources(manifest);
    let scales = exchange(plan, manifest, &sources)?;
    let sized = |fill: u8| -> Memory {
        let of = |receiver: &ReceiverManifest| {
            receiver.regions.iter().map(|&bytes| vec![fill; bytes as usize]).collect()
        };
        manifest.receivers.iter().map(of).collect()
    };
    let (mut memory, mut written) = (sized(untouched), sized(0));
    let mut write = |to: ReceiverRank, region: RegionIndex, at: u64, bytes: &[u8], memory: &mut Memory| {
        let range = at as usize..at as usize + bytes.len();
        let target = memory
            .get_mut(to.index())
            .and_then(|regions| regions.get_mut(region.index()))
            .and_then(|region| region.get_mut(range.clone()));
        let target = target.ok_or_else(|| format!("a write to {to} leaves {region}"))?;
        target.copy_from_slice(bytes);
        for mark in &mut written[to.index()][region.index()][range] {
            *mark += 1;
            if *mark > 1 {
                return Err(format!("a byte of {to} is written again"));
            }
        }
        Ok(())
    };
    let parts = plan.parts(manifest).map_err(|error| error.to_string())?;
    let mut arrived = Vec::new();
    for (trainer, part) in (0..).map(TrainerRank).zip(&parts.trainers) {
        for (number, op) in part.ops.iter().enumerate() {
            let rows = payload(op, trainer, plan, manifest, &sources, &scales)?;
            for (row, bytes) in (0..).zip(&rows) {
                let at = op.destination.offset + row * op.destination.stride;
                write(op.to, op.destination.region, at, bytes, &mut memory)?;
            }
            arrived.extend(part.tags.get(number).map(|tag| (op.to, *tag, op.writes())));
        }
    }
    // Receivers pass on what they got, when all of it is there.
    let mut counts: Vec<Vec<u32>> =
        parts.receivers.iter().map(|relay| vec![0; relay.awaited.len()]).collect();
    while let Some((at, tag, writes)) = arrived.pop() {
        if tag == NO_TAG {
            continue;
        }
        let (relay, tag) = (&parts.receivers[at.index()], tag as usize);
        let count = counts[at.index()].get_mut(tag).ok_or("a tag that its receiver does not know")?;
        *count += writes as u32;
        if *count != relay.awaited[tag] {
            return Err(format!("{count} writes arrive of {} that are awaited", relay.awaited[tag]));
        }
        let released = relay.first[tag] as usize
            ..relay.first.get(tag + 1).map_or(relay.plan.ops.len(), |next| *next as usize);
        for (op, tag) in relay.plan.ops[released.clone()].iter().zip(&relay.plan.tags[released]) {
            for row in 0..u64::from(op.rows) {
                let place = |side: &Strided| side.offset + row * side.stride;
                let from = place(&op.source) as usize;
                let bytes =
                    memory[at.index()][op.source.region.index()][from..from + op.row_bytes as usize].to_vec();
                write(op.to, op.destination.region, place(&op.destination), &bytes, &mut memory)?;
            }
            arrived.push((op.to, *tag, op.writes()));
        }
    }
    if counts.iter().zip(&parts.receivers).any(|(counts, relay)| *counts != relay.awaited) {
        return Err("something is awaited that never arrives".into());
    }
    Ok(memory)
}
