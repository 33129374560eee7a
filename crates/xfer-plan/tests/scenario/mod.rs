//! Random transfers, and what they must do, found out element by element.
//!
//! Nothing here uses the planner's boxes, cells, strides or maps' evaluation: an index is followed through
//! the map one step at a time, and memory is plain byte arrays.

use std::collections::BTreeMap;

use xfer_plan::{
    DType, DestinationParam, DeviceMesh, Manifest, Op, ParamMap, Placement, Plan, PlanOptions, RailDecl,
    ReceiverManifest, RegionIndex, SourcePiece, TensorBox, TrainerManifest, shard_box,
};

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

/// Random, valid, and small enough to look at every byte.
pub(crate) fn manifest(choices: &mut Choices) -> Manifest {
    let tensors = tensors(choices);
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
    let receivers = (0..1 + choices.below(4)).map(|rank| {
        let mut receiver = ReceiverManifest {
            host: format!("r{rank}"),
            regions: vec![0; 1 + choices.below(2) as usize],
            rails: rails(choices),
            params: Vec::new(),
        };
        for index in 0..choices.below(5) {
            let dtype = choices.one_of(&tensors).dtype;
            let candidates: Vec<&Tensor> = tensors.iter().filter(|t| t.dtype == dtype).collect();
            let (map, shape) = map(choices, &candidates, 4);
            let bytes = elements(&shape) * dtype.bytes();
            let (region, offset) = place(choices, &mut receiver.regions, bytes);
            receiver.params.push(DestinationParam {
                name: format!("p{index}"),
                dtype,
                shape,
                region,
                offset,
                map,
            });
        }
        receiver
    });
    let receivers = receivers.collect();
    let options = PlanOptions {
        chunk_bytes_max: choices.one_of(&[1 << 20, 64, 72, 128]),
        gather_row_bytes_max: choices.one_of(&[16 << 10, 0, 8, 16]),
        gather_chunk_bytes_max: choices.one_of(&[1 << 20, 64]),
    };
    Manifest { trainers, receivers, options }
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
        let mesh = DeviceMesh::new(&[outer, 1 + choices.below(ranks / outer)]).unwrap();
        let dims = tensor.shape.len();
        let placements: Vec<Placement> = (0..2)
            .map(|_| match choices.below(dims as u64 + 1) as usize {
                dim if dim < dims => Placement::Shard(dim),
                _ => Placement::Replicate,
            })
            .collect();
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
fn map(choices: &mut Choices, tensors: &[&Tensor], depth: u32) -> (ParamMap, Vec<u64>) {
    match choices.below(if depth == 0 { 1 } else { 4 }) {
        1 => {
            let (of, shape) = map(choices, tensors, depth - 1);
            let bounds = sub_box(choices, &shape);
            let shape = bounds.shape().to_vec();
            (of.slice(bounds), shape)
        }
        2 | 3 => {
            let (first, mut shape) = map(choices, tensors, depth - 1);
            if shape.is_empty() {
                return (first, shape);
            }
            let dim = choices.below(shape.len() as u64) as usize;
            let mut parts = vec![first];
            for _ in 0..choices.below(3) {
                let (part, part_shape) = map(choices, tensors, depth - 1);
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
            let tensor = choices.one_of(tensors);
            let map = ParamMap::tensor(&tensor.name);
            let odd = tensor.shape.iter().sum::<u64>() % 2 == 1;
            let map = if odd { map.shaped(&tensor.shape) } else { map };
            (map, tensor.shape.clone())
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

/// Byte `byte` of element number `element` of a tensor: different almost everywhere.
fn content(tensor: &str, element: u64, byte: u64) -> u8 {
    let seed = tensor.bytes().fold(17u64, |a, b| a.wrapping_mul(31).wrapping_add(b.into()));
    let mixed = (seed ^ (element << 3) ^ byte).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 56) as u8
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
                for byte in 0..width {
                    let at = (piece.offset + element * width + byte) as usize;
                    regions[piece.region.index()][at] =
                        content(&piece.tensor, number(&global, &piece.shape), byte);
                }
            }
        }
        regions
    };
    manifest.trainers.iter().map(fill).collect()
}

/// What the receivers' memory must be afterwards; bytes that are not part of a parameter keep `untouched`.
pub(crate) fn expected(manifest: &Manifest, untouched: u8) -> Memory {
    let pieces = manifest.trainers.iter().flat_map(|trainer| &trainer.pieces);
    let shapes: BTreeMap<&str, &[u64]> = pieces.map(|p| (p.tensor.as_str(), p.shape.as_slice())).collect();
    let fill = |receiver: &ReceiverManifest| {
        let mut regions: Vec<Vec<u8>> =
            receiver.regions.iter().map(|&bytes| vec![untouched; bytes as usize]).collect();
        for param in &receiver.params {
            let width = param.dtype.bytes();
            for element in 0..elements(&param.shape) {
                let (tensor, at) = follow(&param.map, indices(element, &param.shape), &shapes);
                for byte in 0..width {
                    let address = (param.offset + element * width + byte) as usize;
                    regions[param.region.index()][address] =
                        content(tensor, number(&at, shapes[tensor]), byte);
                }
            }
        }
        regions
    };
    manifest.receivers.iter().map(fill).collect()
}

/// Where one element of a map's result comes from.
fn follow<'m>(map: &'m ParamMap, mut at: Vec<u64>, shapes: &BTreeMap<&str, &[u64]>) -> (&'m str, Vec<u64>) {
    match map {
        ParamMap::Tensor(name) => (name, at),
        ParamMap::Shaped { of, .. } => follow(of, at, shapes),
        ParamMap::Slice { of, bounds } => {
            let inner = at.iter().zip(bounds.start()).map(|(index, start)| index + start).collect();
            follow(of, inner, shapes)
        }
        ParamMap::Concat { dim, parts } => {
            for part in parts {
                let len = len_along(part, *dim, shapes);
                if at[*dim] < len {
                    return follow(part, at, shapes);
                }
                at[*dim] -= len;
            }
            panic!("index beyond a concatenation")
        }
    }
}

fn len_along(map: &ParamMap, dim: usize, shapes: &BTreeMap<&str, &[u64]>) -> u64 {
    match map {
        ParamMap::Tensor(name) => shapes[name.as_str()][dim],
        ParamMap::Shaped { of, .. } => len_along(of, dim, shapes),
        ParamMap::Slice { bounds, .. } => bounds.shape()[dim],
        ParamMap::Concat { dim: along, parts } if *along == dim => {
            parts.iter().map(|part| len_along(part, dim, shapes)).sum()
        }
        ParamMap::Concat { parts, .. } => len_along(&parts[0], dim, shapes),
    }
}

/// Carries a plan out on byte arrays. `Err` when an operation leaves a region or writes a byte that was
/// written before.
pub(crate) fn execute(plan: &Plan, manifest: &Manifest, untouched: u8) -> Result<Memory, String> {
    let sources = sources(manifest);
    let sized = |fill: u8| -> Memory {
        let of = |receiver: &ReceiverManifest| {
            receiver.regions.iter().map(|&bytes| vec![fill; bytes as usize]).collect()
        };
        manifest.receivers.iter().map(of).collect()
    };
    let (mut memory, mut written) = (sized(untouched), sized(0));
    for (trainer, part) in plan.trainers.iter().enumerate() {
        for op in &part.ops {
            for (from, to) in rows(op) {
                let source =
                    sources[trainer].get(op.source.region.index()).and_then(|region| region.get(from));
                let receiver = op.to.index();
                let target = memory
                    .get_mut(receiver)
                    .and_then(|regions| regions.get_mut(op.destination.region.index()))
                    .and_then(|region| region.get_mut(to.clone()));
                let (Some(source), Some(target)) = (source, target) else {
                    return Err(format!("{op:?} of trainer {trainer} leaves a region"));
                };
                target.copy_from_slice(source);
                for mark in &mut written[receiver][op.destination.region.index()][to] {
                    *mark += 1;
                    if *mark > 1 {
                        return Err(format!("{op:?} of trainer {trainer} writes a byte again"));
                    }
                }
            }
        }
    }
    Ok(memory)
}

type Range = std::ops::Range<usize>;

fn rows(op: &Op) -> impl Iterator<Item = (Range, Range)> {
    let (op, len) = (*op, op.row_bytes as usize);
    (0..u64::from(op.rows)).map(move |row| {
        let from = (op.source.offset + row * op.source.stride) as usize;
        let to = (op.destination.offset + row * op.destination.stride) as usize;
        (from..from + len, to..to + len)
    })
}
