//! What can be wrong with a layout, a manifest, or a plan.
//!
//! One enum per family of operations. A message names the tensor, the rank and the box, and says what to do.
//! Names that came from a peer are shortened before they are put into a message.

use std::fmt;

use thiserror::Error;

use crate::digest::Digest;
use crate::dtype::DType;
use crate::ids::{GroupIndex, Rank, ReceiverRank, RegionIndex, TrainerRank};
use crate::tensor_box::TensorBox;

/// A box, a mesh or a parameter map that makes no sense by itself.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the messages say it
pub enum LayoutError {
    #[error("unknown element type `{name}`: use a safetensors name such as BF16")]
    UnknownDType { name: String },
    #[error("more than {max} dimensions: merge some, row-major bytes do not change")]
    TooManyDims { max: usize },
    #[error("expected {expected} dimension(s) but found {found}: give one entry per dimension")]
    RankMismatch { expected: usize, found: usize },
    #[error("index range from {start} of length {len} overflows 64 bits")]
    BoxOverflow { start: u64, len: u64 },
    #[error("no dimension {dim}: there are {rank}, counted from 0")]
    NoSuchDim { dim: usize, rank: usize },
    #[error(
        "device mesh of shape {shape:?}: every dimension must be at least 1, and the product at most 65536"
    )]
    BadMesh { shape: Vec<u64> },
    #[error("no rank {rank_in_mesh} in a mesh of {ranks} rank(s)")]
    NotInMesh { rank_in_mesh: u64, ranks: u64 },
    #[error(
        "strided shard of dimension {dim} with split {split}: the later mesh dimensions cut it into {made}, and the split must say so"
    )]
    BadSplit { dim: usize, split: u64, made: u64 },
    #[error("no shard {index} of {shards}: the index must be below the number of shards")]
    NoSuchShard { index: u64, shards: u64 },
    #[error("map refers to tensor `{tensor}`, which no one declares")]
    UnknownTensor { tensor: String },
    #[error("map slices {bounds} out of something of shape {shape:?}: the box must lie inside it")]
    SliceOutside { bounds: Box<TensorBox>, shape: Vec<u64> },
    #[error("map concatenates nothing: give at least one part")]
    EmptyConcat,
    #[error(
        "map concatenates {found:?} to {expected:?} on dimension {dim}: all other dimensions must be equal"
    )]
    ConcatMismatch { dim: usize, expected: Vec<u64>, found: Vec<u64> },
    #[error(
        "map is made for a shape of {expected:?}, but what it is given has {found:?}: do both sides load the same model?"
    )]
    OtherShape { expected: Vec<u64>, found: Vec<u64> },
    #[error(
        "blocks of {block:?} do not cut a tensor of {shape:?}: it needs two dimensions, and blocks at least one row and column"
    )]
    NotBlocks { block: [u32; 2], shape: Vec<u64> },
    #[error(
        "part {bounds} of `{tensor}` does not start and end on borders of {block:?} blocks: cut where blocks end, or do not quantise"
    )]
    CutBlocks { tensor: String, bounds: Box<TensorBox>, block: [u32; 2] },
    #[error("shard borders cut the blocks of a tensor into more than {max} ranges: align its shards")]
    TooManyBlockRanges { max: usize },
    #[error("map {what}s what is not a whole tensor: {what} first, then slice and concatenate")]
    NotWhole { what: &'static str },
    #[error("map pads dimension {dim} of {shape:?} to {len}: that is shorter")]
    PadShorter { dim: usize, len: u64, shape: Vec<u64> },
    #[error("map views {from:?} as {to:?}: the number of elements must be the same")]
    ViewMismatch { from: Vec<u64>, to: Vec<u64> },
    #[error("map goes on after a view: a view must be outermost")]
    ViewInside,
    #[error("map is nested deeper than {max} levels: flatten its slices and concatenations")]
    MapTooDeep { max: usize },
    #[error("map has more than {max} nodes: split the parameter")]
    MapTooLarge { max: usize },
    #[error("map is not one complete expression: {detail}")]
    MapMalformed { detail: &'static str },
}

/// A manifest in which one rank contradicts itself or exceeds a limit.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the messages say it
pub enum ManifestError {
    #[error("{found} {side} ranks: at most {max} are supported")]
    TooManyRanks { side: &'static str, found: usize, max: usize },
    #[error("option {option} is {value} bytes: use a multiple of {step} from {min} to {max}")]
    BadChunk { option: &'static str, value: u64, step: u64, min: u64, max: u64 },
    #[error(
        "a watermark of {watermark} bytes has no room for a gather of {chunk}: raise it or lower gather_chunk_bytes_max"
    )]
    WatermarkTooLow { watermark: u64, chunk: u64 },
    #[error("{rank} declares {found} {what}: at most {max} are supported")]
    TooMany { rank: Rank, what: &'static str, found: usize, max: usize },
    #[error("{rank} declares no rail: give it at least one, with its bytes a second")]
    NoRail { rank: Rank },
    #[error(
        "{rank}, rail {rail}: {bytes_per_second} bytes a second is not a bandwidth; state what the NIC moves"
    )]
    BadBandwidth { rank: Rank, rail: usize, bytes_per_second: u64 },
    #[error("{rank} declares more than {max} bytes of registered memory: check its region lengths")]
    TooMuchMemory { rank: Rank, max: u64 },
    #[error("{rank}: a {what} name of {bytes} bytes, `{name}`: names have 1 to {max}")]
    BadName { rank: Rank, what: &'static str, name: String, bytes: usize, max: usize },
    #[error("{rank}, `{name}`: {source}")]
    Layout { rank: Rank, name: String, source: LayoutError },
    #[error("{rank}, `{name}`: shape {shape:?} of {dtype} has more bytes than 64 bits can count")]
    TooLarge { rank: Rank, name: String, dtype: DType, shape: Vec<u64> },
    #[error("{rank}, tensor `{name}`: box {bounds} is not inside its shape {shape:?}")]
    BoxOutside { rank: Rank, name: String, bounds: Box<TensorBox>, shape: Vec<u64> },
    #[error("{rank}, `{name}`: there is no {region}, only {regions} region(s) are declared")]
    NoSuchRegion { rank: Rank, name: String, region: RegionIndex, regions: usize },
    #[error(
        "{rank}, `{name}`: {bytes} bytes at offset {offset} do not fit into {region} of {region_bytes} bytes"
    )]
    RegionTooShort {
        rank: Rank,
        name: String,
        region: RegionIndex,
        offset: u64,
        bytes: u64,
        region_bytes: u64,
    },
    #[error("{rank} declares parameter `{name}` twice: names must be unique on a rank")]
    DuplicateParam { rank: Rank, name: String },
    #[error("{rank}: parameters `{first}` and `{second}` overlap in {region}: declare shared memory once")]
    OverlappingParams { rank: Rank, first: String, second: String, region: RegionIndex },
}

/// Two sides that do not fit together, or a plan that would be too large.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the messages say it
pub enum PlanError {
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error(
        "tensor `{tensor}` is {dtype} {shape:?} on {rank} but {other_dtype} {other_shape:?} on {other_rank}: \
         all trainers must declare the same global tensor"
    )]
    TensorsDiffer {
        tensor: String,
        rank: TrainerRank,
        dtype: DType,
        shape: Vec<u64>,
        other_rank: TrainerRank,
        other_dtype: DType,
        other_shape: Vec<u64>,
    },
    #[error(
        "{receiver}, parameter `{param}` needs tensor `{tensor}`, which no trainer declares: check the name"
    )]
    MissingTensor { receiver: ReceiverRank, param: String, tensor: String },
    #[error("{receiver}, parameter `{param}`: {source}")]
    Map { receiver: ReceiverRank, param: String, source: LayoutError },
    #[error(
        "{receiver}, parameter `{param}` is declared as {declared:?} but its map makes {made:?}: \
         the shapes must be equal"
    )]
    ShapesDiffer { receiver: ReceiverRank, param: String, declared: Vec<u64>, made: Vec<u64> },
    #[error(
        "{receiver}, parameter `{param}`: its map makes {to} of tensor `{tensor}` in no known way: \
         that is {from}; cast or quantise it in the map, or declare the parameter as {from}"
    )]
    NoConversion { receiver: ReceiverRank, param: String, tensor: String, from: DType, to: DType },
    #[error(
        "{receiver}, parameter `{param}` needs {bounds} of tensor `{tensor}`, which no trainer holds: \
         check that every shard is declared"
    )]
    Uncovered { receiver: ReceiverRank, param: String, tensor: String, bounds: Box<TensorBox> },
    #[error("the trainers' boxes cut each other into more than {max} cells: align their shards")]
    TooManyCells { max: usize },
    #[error("a trainer has more than {max} operations: raise chunk_bytes_max, or make rows longer")]
    TooManyOps { max: usize },
    #[error("the plan has more than {max} transfers: declare larger pieces, or make rows longer")]
    TooManyTransfers { max: usize },
    #[error("defect of the planner, please report it with the manifest: {detail}")]
    Defect { detail: &'static str },
    #[error("cannot encode for the digest: {detail}")]
    Encode { detail: String },
}

/// Where in a plan a transfer stands.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names say it
pub struct TransferPlace {
    pub trainer: TrainerRank,
    pub index: usize,
    pub to: GroupIndex,
    pub param: String,
}

impl fmt::Display for TransferPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, transfer {} (to {}, parameter `{}`)", self.trainer, self.index, self.to, self.param)
    }
}

/// A plan that does not do what its manifest asks. Such a plan must not be executed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the messages say it
pub enum CheckError {
    #[error("the manifest itself is invalid: {0}")]
    Manifest(#[from] PlanError),
    #[error("planned from manifest {planned}, checked against {given}: plan again from this manifest")]
    OtherManifest { planned: Digest, given: Digest },
    #[error("the plan says its digest is {stated} but it is {found}: it was changed after planning")]
    Digest { stated: Digest, found: Digest },
    #[error("the plan is for {planned} {side} ranks, the manifest has {given}")]
    RankCount { side: &'static str, planned: usize, given: usize },
    #[error("{place}: {detail}")]
    Malformed { place: TransferPlace, detail: &'static str },
    #[error("{place}: leaves {region} of {rank}")]
    OutsideRegion { place: TransferPlace, rank: Rank, region: RegionIndex },
    #[error("{place}: writes outside the parameter that it names")]
    OutsideParam { place: TransferPlace },
    #[error("{place}: row {row} does not read what the parameter's map asks for")]
    WrongSource { place: TransferPlace, row: u64 },
    #[error("{receiver}, parameter `{param}`: bytes {start}..{end} are never written")]
    NotWritten { receiver: ReceiverRank, param: String, start: u64, end: u64 },
    #[error("{receiver}, parameter `{param}`: bytes {start}..{end} are written twice")]
    WrittenTwice { receiver: ReceiverRank, param: String, start: u64, end: u64 },
    #[error("{rank}: {what} are stated as {stated} but the transfers add up to {found}")]
    Total { rank: Rank, what: &'static str, stated: u64, found: u64 },
    #[error("{receiver}: the arrivals by rank do not match the transfers")]
    Arrivals { receiver: ReceiverRank },
    #[error("the lower bound or the prediction does not match the transfers")]
    Bound,
    #[error("fill {fill}: its transfers are not in the order of their trainers")]
    Unsorted { fill: usize },
    #[error("fill {fill}: there is no such group")]
    NoGroup { fill: usize },
    #[error("{place}: its fill does not name the table of a quantised tensor")]
    NoTable { place: TransferPlace },
    #[error("{group}: {detail}")]
    Group { group: GroupIndex, detail: &'static str },
    #[error("scales of `{tensor}`: {detail}")]
    Table { tensor: String, detail: &'static str },
    #[error("{trainer}: an operation on rail {rail}, which it does not have")]
    NoRail { trainer: TrainerRank, rail: u8 },
    #[error("{trainer}, wave {wave}: stages {bytes} bytes where the watermark allows {bytes_max}")]
    Watermark { trainer: TrainerRank, wave: u32, bytes: u64, bytes_max: u64 },
    #[error("{trainer}: an operation of {bytes} bytes")]
    Chunk { trainer: TrainerRank, bytes: u64 },
}

/// At most 80 characters of a name that a peer chose.
pub(crate) fn shorten(name: &str) -> String {
    shorten_to(name, 80)
}

/// At most so many characters of a text that may quote what somebody else chose.
pub(crate) fn shorten_to(name: &str, shown_chars_max: usize) -> String {
    match name.char_indices().nth(shown_chars_max) {
        None => name.to_owned(),
        Some((at, _)) => format!("{}...", name.get(..at).unwrap_or_default()),
    }
}
