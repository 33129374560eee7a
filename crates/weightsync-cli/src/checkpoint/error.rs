//! Why a checkpoint cannot be opened or read. Every message names the file, and the tensor where there is one.

use std::io;
use std::path::PathBuf;

use xfer_plan::DType;

use super::{FILES_MAX, HEADS_MAX, INDEX_FILE, MODEL_FILE};

/// Why a checkpoint cannot be opened or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// What was opened or read.
        path: PathBuf,
        /// Its reason.
        source: io::Error,
    },
    /// A folder without a checkpoint.
    #[error("{}: no {MODEL_FILE}, no {INDEX_FILE} and no other .safetensors file in this folder", path.display())]
    NotFound {
        /// The folder.
        path: PathBuf,
    },
    /// A folder with several files and nothing that says which belong together.
    #[error("{}: {files} .safetensors files but no {INDEX_FILE}; name one of the files, or add the index", path.display())]
    Ambiguous {
        /// The folder.
        path: PathBuf,
        /// How many there are.
        files: usize,
    },
    /// The file ends before its header does.
    #[error("{}: not a safetensors file, or cut short: {file_bytes} bytes do not hold its header", path.display())]
    NoHeader {
        /// The file.
        path: PathBuf,
        /// Its length.
        file_bytes: u64,
    },
    /// The header is longer than any real one.
    #[error("{}: not a safetensors file: its first 8 bytes announce a header of {header_bytes} bytes, more than {max}", path.display())]
    HeaderTooLong {
        /// The file.
        path: PathBuf,
        /// What it announces.
        header_bytes: u64,
        /// The limit.
        max: u64,
    },
    /// The header is not what the format asks for.
    #[error("{}: bad safetensors header: {source}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// Where and why; names the tensor.
        source: serde_json::Error,
    },
    /// A dtype that safetensors knows and weightsync does not.
    #[error("{}: tensor `{tensor}` has dtype {dtype}, which cannot be transferred", path.display())]
    UnsupportedDtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: safetensors::Dtype,
    },
    /// Shape, dtype and offsets disagree.
    #[error("{}: tensor `{tensor}`: bytes {first}..{last} do not hold {dtype} of shape {shape:?}", path.display())]
    WrongSize {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: DType,
        /// Its shape.
        shape: Vec<u64>,
        /// Its first byte in the data part of the file.
        first: u64,
        /// The end of its bytes.
        last: u64,
    },
    /// Two tensors claim the same bytes.
    #[error("{}: tensor `{tensor}` overlaps tensor `{previous}`", path.display())]
    Overlap {
        /// The file.
        path: PathBuf,
        /// The second one.
        tensor: String,
        /// The first one.
        previous: String,
    },
    /// Bytes that belong to no tensor.
    #[error("{}: {hole_bytes} bytes before tensor `{tensor}` belong to no tensor", path.display())]
    Hole {
        /// The file.
        path: PathBuf,
        /// The tensor after the hole.
        tensor: String,
        /// Its length.
        hole_bytes: u64,
    },
    /// The file ends before its tensors do.
    #[error("{}: cut short: tensor `{tensor}` needs {needs} bytes of file, there are {file_bytes}; copy it again", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The first tensor that is not whole.
        tensor: String,
        /// Where it would end, from the start of the file.
        needs: u64,
        /// The length of the file.
        file_bytes: u64,
    },
    /// The file goes on after its tensors.
    #[error("{}: {extra_bytes} bytes after the last tensor belong to no tensor", path.display())]
    Trailing {
        /// The file.
        path: PathBuf,
        /// How many.
        extra_bytes: u64,
    },
    /// An index or a config that cannot be read.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// An index or a config longer than any real one.
    #[error("{}: {file_bytes} bytes, more than the {max} that are read", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length.
        file_bytes: u64,
        /// The limit.
        max: u64,
    },
    /// The index names something that is not a plain file name.
    #[error("{}: tensor `{tensor}` is in `{file}`, which is not a plain file name", index.display())]
    IndexFileName {
        /// The index.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// What it gives as the file.
        file: String,
    },
    /// The index names more files than are opened.
    #[error("{}: {files} files, more than the {FILES_MAX} that are opened", index.display())]
    TooManyFiles {
        /// The index.
        index: PathBuf,
        /// How many it names.
        files: usize,
    },
    /// The index names a file that cannot be opened.
    #[error("{}: tensor `{tensor}` should be in `{file}`: {source}", index.display())]
    IndexMissingFile {
        /// The index.
        index: PathBuf,
        /// The first of its tensors.
        tensor: String,
        /// The file.
        file: String,
        /// Why not.
        source: io::Error,
    },
    /// The index puts a tensor in a file that lacks it.
    #[error("{}: tensor `{tensor}` should be in `{file}` and is not", index.display())]
    IndexMissingTensor {
        /// The index.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// The file.
        file: String,
    },
    /// A file holds a tensor that the index does not put there.
    #[error("{}: `{file}` holds tensor `{tensor}`, which the index does not list", index.display())]
    Unlisted {
        /// The index.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// The file.
        file: String,
    },
    /// Two files hold the same tensor.
    #[error("{}: tensor `{tensor}` is in `{first}` and in `{second}`", index.display())]
    Duplicate {
        /// The index.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// One file.
        first: String,
        /// The other file.
        second: String,
    },
    /// Head counts that cannot be.
    #[error("{}: {query} attention heads with {key_value} key/value heads: must be multiples, from 1 to {HEADS_MAX}", path.display())]
    Heads {
        /// The config.
        path: PathBuf,
        /// Query heads.
        query: u64,
        /// Key/value heads.
        key_value: u64,
    },
    /// A name that the checkpoint lacks.
    #[error("{}: no tensor `{tensor}` in this checkpoint", path.display())]
    NoTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The name.
        tensor: String,
    },
    /// A part that the tensor lacks, or a buffer of another length.
    #[error("{}: cannot read {part} of tensor `{tensor}` (shape {shape:?}) into {buffer_bytes} bytes", path.display())]
    NoPart {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// What was asked for.
        part: String,
        /// Length of the buffer.
        buffer_bytes: u64,
    },
}
