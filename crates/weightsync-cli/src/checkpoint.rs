//! Checkpoints: what the trainers start from.
//!
//! A checkpoint is one safetensors file, or several with an index that says which tensor is in which. Opening reads the
//! headers only; weights are read by range, straight into the caller's memory, so that a rank reads just what it owns. A
//! damaged or incomplete checkpoint must never open: it would train and serve as if it were whole.

mod error;
mod header;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use xfer_plan::{DType, TensorBox};

pub use self::error::CheckpointError;
use crate::runs::Runs;

/// The index file of a checkpoint in several files, as the field names it.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// The only file of a checkpoint in one file, as the field names it.
pub const MODEL_FILE: &str = "model.safetensors";

/// The model's description, beside the weights.
pub const CONFIG_FILE: &str = "config.json";

/// Files of one checkpoint: all stay open, and a process usually may open 1024. The largest public ones have 163.
const FILES_MAX: usize = 512;

/// Length of an index: 70 000 tensors need about 8 MB.
const INDEX_BYTES_MAX: u64 = 100_000_000;

/// Length of a `config.json`: real ones have a few kB.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Attention heads: the largest public models have 128. Bounds the arithmetic, not a model.
const HEADS_MAX: u64 = 1 << 16;

/// Runs from this length on are read one by one; shorter ones through a window, to save system calls.
const DIRECT_READ_BYTES_MIN: u64 = 16 << 10;

/// Length of that window.
const WINDOW_BYTES: u64 = 1 << 20;

/// A window may read this many times the bytes that are wanted: a copy runs at about 10 GB/s, a system call takes some
/// 0.5 us, so up to here the window is never much slower and mostly far faster.
const READ_AMPLIFICATION_MAX: u64 = 16;

/// One tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name in the checkpoint.
    pub name: String,
    /// The type of its elements.
    pub dtype: DType,
    /// Its sizes, outermost first; none for a scalar.
    pub shape: Vec<u64>,
}

impl TensorInfo {
    /// How many bytes it has; saturates where the shape is absurd, which in an open checkpoint it never is.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.shape.iter().fold(self.dtype.bytes(), |bytes, &size| bytes.saturating_mul(size))
    }
}

/// How many attention heads a model has. Both counts are at least 1, the first is a multiple of the second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadCounts {
    query: u64,
    key_value: u64,
}

impl HeadCounts {
    /// So many query heads, of which equally many read each key/value head. `None` where that cannot be.
    #[must_use]
    pub fn new(query: u64, key_value: u64) -> Option<HeadCounts> {
        let possible = (1..=HEADS_MAX).contains(&query) && key_value > 0 && query.is_multiple_of(key_value);
        possible.then_some(HeadCounts { query, key_value })
    }

    /// Query heads; `num_attention_heads` in a `config.json`.
    #[must_use]
    pub fn query(self) -> u64 {
        self.query
    }

    /// Key/value heads; `num_key_value_heads`, or as many as query heads where the config does not say.
    #[must_use]
    pub fn key_value(self) -> u64 {
        self.key_value
    }
}

/// An open checkpoint. Reads take `&self` and may come from several threads.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<(PathBuf, File)>,
    /// Sorted by name.
    tensors: Vec<TensorInfo>,
    /// Where each tensor's bytes start: (index in `files`, offset in the file).
    places: Vec<(usize, u64)>,
    heads: Option<HeadCounts>,
    bytes: u64,
}

impl Checkpoint {
    /// Opens a `.safetensors` file, an index (`*.index.json`), or a folder with either, and the `config.json` beside it
    /// if there is one. Reads and checks every header.
    ///
    /// # Errors
    /// When anything is missing, cut short, overlapping, listed twice or not understood.
    pub fn open(path: &Path) -> Result<Checkpoint, CheckpointError> {
        let io = |source| CheckpointError::Io { path: path.into(), source };
        let path =
            &if fs::metadata(path).map_err(io)?.is_dir() { main_file(path)? } else { path.to_path_buf() };
        let folder = path.parent().unwrap_or(Path::new(""));
        let heads = read_heads(&folder.join(CONFIG_FILE))?;

        let (files, found) = if path.to_string_lossy().ends_with(".index.json") {
            open_indexed(path, folder)?
        } else {
            let file =
                File::open(path).map_err(|source| CheckpointError::Io { path: path.clone(), source })?;
            let entries = header::read(&file, path)?;
            let found = entries.into_iter().map(|entry| (entry.name.clone(), (0, entry))).collect();
            (vec![(path.clone(), file)], found)
        };

        let mut tensors = Vec::with_capacity(found.len());
        let mut places = Vec::with_capacity(found.len());
        for (name, (file, entry)) in found {
            tensors.push(TensorInfo { name, dtype: entry.dtype, shape: entry.shape });
            places.push((file, entry.offset));
        }
        let bytes = tensors.iter().map(TensorInfo::bytes).sum(); // no more than the files have
        Ok(Checkpoint { path: path.clone(), files, tensors, places, heads, bytes })
    }

    /// The file or index that was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All tensors, sorted by name.
    #[must_use]
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(self.index_of(name)?)
    }

    /// Bytes of all tensors together.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The head counts of `config.json`, if there is one and it has them.
    #[must_use]
    pub fn heads(&self) -> Option<HeadCounts> {
        self.heads
    }

    /// Reads a whole tensor.
    ///
    /// # Errors
    /// When there is no such tensor, or the file cannot be read.
    pub fn read_all(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
        // The header was checked against the file, so this is no more than the file has.
        let mut bytes = vec![0; self.get(name).map_or(0, TensorInfo::bytes) as usize];
        self.read_range(name, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `bytes` with the tensor's bytes from `first_byte` on.
    ///
    /// # Errors
    /// When there is no such tensor, it is shorter, or the file cannot be read.
    pub fn read_range(&self, name: &str, first_byte: u64, bytes: &mut [u8]) -> Result<(), CheckpointError> {
        let (tensor, source) = self.find(name)?;
        let end = first_byte.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > tensor.bytes()) {
            let part = format!("{} bytes from byte {first_byte}", bytes.len());
            return Err(self.no_part(tensor, part, bytes));
        }
        source.read(first_byte, bytes)
    }

    /// Reads one box of a tensor, row-major and contiguous, into `bytes`. A box of whole rows is one read.
    ///
    /// # Errors
    /// When there is no such tensor, the box leaves it, `bytes` is not as long as the box, or the file cannot be read.
    pub fn read_box(&self, name: &str, bounds: &TensorBox, bytes: &mut [u8]) -> Result<(), CheckpointError> {
        let (tensor, source) = self.find(name)?;
        let size = tensor.dtype.bytes();
        let runs = Runs::new(&tensor.shape, bounds);
        let box_bytes = bounds.volume().and_then(|elements| elements.checked_mul(size));
        let Some(runs) = runs.filter(|_| box_bytes == Some(bytes.len() as u64)) else {
            return Err(self.no_part(tensor, bounds.to_string(), bytes));
        };
        let run_bytes = runs.elements() * size;
        let span_bytes = runs.span_elements() * size;
        // At least 1, so that `chunks_exact_mut` is defined for an empty box too.
        let destinations = bytes.chunks_exact_mut((run_bytes as usize).max(1));
        if run_bytes >= DIRECT_READ_BYTES_MIN
            || span_bytes / READ_AMPLIFICATION_MAX > box_bytes.unwrap_or_default()
        {
            for (first_element, destination) in runs.zip(destinations) {
                source.read(first_element * size, destination)?;
            }
            return Ok(());
        }

        let mut window = Vec::new();
        let mut window_start = 0;
        let mut span_end = None;
        for (first_element, destination) in runs.zip(destinations) {
            let first = first_element * size;
            let end = *span_end.get_or_insert(first + span_bytes);
            if first + run_bytes > window_start + window.len() as u64 {
                window_start = first;
                window.resize((end - first).min(WINDOW_BYTES) as usize, 0);
                source.read(first, &mut window)?;
            }
            let at = (first - window_start) as usize;
            let Some(run) = window.get(at..at + destination.len()) else {
                return Err(self.no_part(tensor, bounds.to_string(), destination)); // a window holds its first run
            };
            destination.copy_from_slice(run);
        }
        Ok(())
    }

    fn index_of(&self, name: &str) -> Option<usize> {
        self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()
    }

    fn find(&self, name: &str) -> Result<(&TensorInfo, Source<'_>), CheckpointError> {
        let find = || {
            let index = self.index_of(name)?;
            let &(file, offset) = self.places.get(index)?;
            let (path, file) = self.files.get(file)?;
            Some((self.tensors.get(index)?, Source { path, file, offset }))
        };
        find().ok_or_else(|| CheckpointError::NoTensor { path: self.path.clone(), tensor: name.into() })
    }

    fn no_part(&self, tensor: &TensorInfo, part: String, buffer: &[u8]) -> CheckpointError {
        CheckpointError::NoPart {
            path: self.path.clone(),
            tensor: tensor.name.clone(),
            shape: tensor.shape.clone(),
            part,
            buffer_bytes: buffer.len() as u64,
        }
    }
}

/// Where one tensor's bytes are.
struct Source<'a> {
    path: &'a Path,
    file: &'a File,
    offset: u64,
}

impl Source<'_> {
    fn read(&self, first_byte: u64, bytes: &mut [u8]) -> Result<(), CheckpointError> {
        self.file
            .read_exact_at(bytes, self.offset + first_byte)
            .map_err(|source| CheckpointError::Io { path: self.path.into(), source })
    }
}

/// The index or only file of a folder.
fn main_file(folder: &Path) -> Result<PathBuf, CheckpointError> {
    for name in [INDEX_FILE, MODEL_FILE] {
        let path = folder.join(name);
        if path.is_file() {
            return Ok(path);
        }
    }
    let io = |source| CheckpointError::Io { path: folder.into(), source };
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            files.push(path);
        }
    }
    match files.len() {
        0 => Err(CheckpointError::NotFound { path: folder.into() }),
        1 => Ok(files.remove(0)),
        files => Err(CheckpointError::Ambiguous { path: folder.into(), files }),
    }
}

type Files = Vec<(PathBuf, File)>;
type Found = BTreeMap<String, (usize, header::Entry)>;

/// Opens the files of an index and checks that they hold what it says, and nothing else.
fn open_indexed(index: &Path, folder: &Path) -> Result<(Files, Found), CheckpointError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let listed = read_json::<Index>(index, INDEX_BYTES_MAX)?.weight_map;
    let path = || index.to_path_buf();

    let mut first_tensors = BTreeMap::new();
    for (tensor, file) in &listed {
        if Path::new(file).file_name().is_none_or(|name| name != file.as_str()) {
            let (tensor, file) = (tensor.clone(), file.clone());
            return Err(CheckpointError::IndexFileName { index: path(), tensor, file });
        }
        first_tensors.entry(file).or_insert(tensor);
    }
    if first_tensors.len() > FILES_MAX {
        return Err(CheckpointError::TooManyFiles { index: path(), files: first_tensors.len() });
    }

    let mut files: Vec<(PathBuf, File)> = Vec::with_capacity(first_tensors.len());
    let mut found: Found = BTreeMap::new();
    for (name, tensor) in first_tensors {
        let file_path = folder.join(name);
        let file = File::open(&file_path).map_err(|source| CheckpointError::IndexMissingFile {
            index: path(),
            tensor: tensor.clone(),
            file: name.clone(),
            source,
        })?;
        for entry in header::read(&file, &file_path)? {
            let (tensor, file) = (entry.name.clone(), name.clone());
            if let Some((first, _)) = found.get(&tensor) {
                let first = files.get(*first).map(|(path, _)| path.display().to_string()).unwrap_or_default();
                return Err(CheckpointError::Duplicate { index: path(), tensor, first, second: file });
            }
            if !listed.contains_key(&tensor) {
                return Err(CheckpointError::Unlisted { index: path(), tensor, file });
            }
            found.insert(tensor, (files.len(), entry));
        }
        files.push((file_path, file));
    }
    for (tensor, file) in listed {
        let holder = found.get(&tensor).and_then(|(holder, _)| files.get(*holder));
        if holder.is_none_or(|(path, _)| *path != folder.join(&file)) {
            return Err(CheckpointError::IndexMissingTensor { index: path(), tensor, file });
        }
    }
    Ok((files, found))
}

/// The head counts of a `config.json`; `None` when there is no such file or it has none.
fn read_heads(path: &Path) -> Result<Option<HeadCounts>, CheckpointError> {
    #[derive(Deserialize)]
    struct Config {
        num_attention_heads: Option<u64>,
        num_key_value_heads: Option<u64>,
    }
    if !path.exists() {
        return Ok(None);
    }
    let config: Config = read_json(path, CONFIG_BYTES_MAX)?;
    let Some(query) = config.num_attention_heads else {
        return Ok(None);
    };
    let key_value = config.num_key_value_heads.unwrap_or(query);
    let heads = HeadCounts::new(query, key_value);
    heads.map(Some).ok_or_else(|| CheckpointError::Heads { path: path.into(), query, key_value })
}

fn read_json<T: DeserializeOwned>(path: &Path, max: u64) -> Result<T, CheckpointError> {
    let io = |source| CheckpointError::Io { path: path.into(), source };
    let file_bytes = fs::metadata(path).map_err(io)?.len();
    if file_bytes > max {
        return Err(CheckpointError::TooLong { path: path.into(), file_bytes, max });
    }
    let json = fs::read(path).map_err(io)?;
    serde_json::from_slice(&json).map_err(|source| CheckpointError::Json { path: path.into(), source })
}
