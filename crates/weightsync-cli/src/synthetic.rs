//! Synthetic checkpoints: a real model's names and shapes with made-up weights.
//!
//! The demo and the benchmarks need a model of honest size without a download. The weights are a pure function of a
//! seed, so any part of a file can be made again and compared. A checkpoint must never be found half written: it gets its
//! name only when it is whole and on the disk.

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use safetensors::tensor::{Dtype, Metadata};
use xfer_plan::DType;

use crate::checkpoint::{CONFIG_FILE, Checkpoint, CheckpointError, MODEL_FILE, TensorInfo};
use crate::counter::{Stream, WORD_BYTES};

/// Raise it when the same seed gives other weights or another file: older files in a cache are then left alone.
const FORMAT_VERSION: u32 = 1;

/// Weights lie in plus or minus this (around 1 for norms), like those of a trained model.
const WEIGHT_MAX: f32 = 0.05;

/// Bytes made and written at a time: they stay in the core's cache between the two.
const BLOCK_BYTES: usize = 256 << 10;

/// Bytes compared at both ends of every tensor when a checkpoint is found in the cache.
const SAMPLE_BYTES: u64 = 4 << 10;

/// How long one process waits for another that writes the same checkpoint: over ten times what a slow disk needs.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(600);

/// How often it looks.
const LOCK_POLL: Duration = Duration::from_millis(50);

/// Why a synthetic checkpoint cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SyntheticError {
    /// The operating system refused.
    #[error("{}: {source}; set XDG_CACHE_HOME to a folder with enough space", path.display())]
    Io {
        /// What was read or written.
        path: PathBuf,
        /// Its reason.
        source: io::Error,
    },
    /// Neither `XDG_CACHE_HOME` nor `HOME` is set to an absolute path.
    #[error("no cache folder: set XDG_CACHE_HOME or HOME to an absolute path")]
    NoCacheFolder,
    /// Another process holds the lock.
    #[error("{}: another process has been writing this checkpoint for {} s", lock.display(), waited.as_secs())]
    Locked {
        /// The lock file.
        lock: PathBuf,
        /// How long this process waited.
        waited: Duration,
    },
    /// A shape that cannot be: its header cannot be written.
    #[error("this shape has no header: {0}")]
    Shape(String),
    /// The checkpoint that was just written does not read back.
    #[error("just written, but: {0}")]
    ReadBack(#[from] CheckpointError),
    /// The checkpoint that was just written reads back differently.
    #[error("{}: just written, but tensor `{tensor}` reads back differently; is the disk sound?", path.display())]
    Different {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
}

/// The sizes of a decoder-only transformer with Qwen3's tensor names, all BF16.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// Names the folder in the cache.
    pub name: String,
    /// Layers.
    pub layers: u64,
    /// Width of the residual stream, in elements.
    pub hidden: u64,
    /// Rows of the embedding.
    pub vocab: u64,
    /// Query heads, a multiple of the next.
    pub query_heads: u64,
    /// Key/value heads.
    pub key_value_heads: u64,
    /// Width of one head, in elements.
    pub head_dim: u64,
    /// Width of the MLP, in elements.
    pub inner: u64,
    /// Whether the output uses the embedding too; if not there is an `lm_head.weight`.
    pub tied: bool,
}

impl Shape {
    /// Qwen3-0.6B: 596 M parameters, 1.19 GB.
    #[must_use]
    pub fn qwen3_0_6b() -> Shape {
        Shape {
            name: "qwen3-0.6b".into(),
            layers: 28,
            hidden: 1024,
            vocab: 151_936,
            query_heads: 16,
            key_value_heads: 8,
            head_dim: 128,
            inner: 3072,
            tied: true,
        }
    }

    /// The same names in 0.8 MB, for tests.
    #[must_use]
    pub fn tiny() -> Shape {
        Shape {
            name: "tiny".into(),
            layers: 2,
            hidden: 96,
            vocab: 1000,
            query_heads: 8,
            key_value_heads: 4,
            head_dim: 16,
            inner: 200,
            tied: false,
        }
    }

    /// The tensors, sorted by name, which is also their order in the file.
    #[must_use]
    pub fn tensors(&self) -> Vec<TensorInfo> {
        let query = self.query_heads.saturating_mul(self.head_dim);
        let key_value = self.key_value_heads.saturating_mul(self.head_dim);
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: &[u64]| {
            tensors.push(TensorInfo { name, dtype: DType::BF16, shape: shape.to_vec() });
        };
        add("model.embed_tokens.weight".into(), &[self.vocab, self.hidden]);
        add("model.norm.weight".into(), &[self.hidden]);
        if !self.tied {
            add("lm_head.weight".into(), &[self.vocab, self.hidden]);
        }
        for layer in 0..self.layers {
            let mut add =
                |name: &str, shape: &[u64]| add(format!("model.layers.{layer}.{name}.weight"), shape);
            add("input_layernorm", &[self.hidden]);
            add("self_attn.q_proj", &[query, self.hidden]);
            add("self_attn.k_proj", &[key_value, self.hidden]);
            add("self_attn.v_proj", &[key_value, self.hidden]);
            add("self_attn.q_norm", &[self.head_dim]);
            add("self_attn.k_norm", &[self.head_dim]);
            add("self_attn.o_proj", &[self.hidden, query]);
            add("post_attention_layernorm", &[self.hidden]);
            add("mlp.gate_proj", &[self.inner, self.hidden]);
            add("mlp.up_proj", &[self.inner, self.hidden]);
            add("mlp.down_proj", &[self.hidden, self.inner]);
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        tensors
    }

    /// Bytes of all tensors together.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.tensors().iter().map(TensorInfo::bytes).fold(0, u64::saturating_add)
    }

    fn config(&self) -> String {
        let config = serde_json::json!({
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "vocab_size": self.vocab,
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.inner,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
        });
        format!("{config:#}\n")
    }
}

/// Where synthetic checkpoints are kept: `weightsync` in `$XDG_CACHE_HOME`, or in `~/.cache`.
///
/// # Errors
/// When neither variable is an absolute path.
pub fn cache_folder() -> Result<PathBuf, SyntheticError> {
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    folder("XDG_CACHE_HOME")
        .or_else(|| folder("HOME").map(|home| home.join(".cache")))
        .map(|cache| cache.join("weightsync"))
        .ok_or(SyntheticError::NoCacheFolder)
}

/// The checkpoint of this shape and seed in the cache folder, written now if it is not there yet. See [`ensure`].
///
/// # Errors
/// As [`ensure`], and when there is no cache folder.
pub fn cached(
    shape: &Shape,
    seed: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<PathBuf, SyntheticError> {
    let folder = cache_folder()?.join(format!("{}-seed{seed}-v{FORMAT_VERSION}", shape.name));
    ensure(&folder, shape, seed, progress)?;
    Ok(folder)
}

/// Makes sure that `folder` holds the checkpoint of this shape and seed, with its `config.json`.
///
/// What is there is kept if its header is exactly right and both ends of every tensor hold the right weights; anything
/// else is written again. Processes that want the same checkpoint at once wait for the first one. `progress` is called
/// with the bytes written and the bytes to write; never when nothing is written.
///
/// # Errors
/// When the folder cannot be written, another process holds it too long, or the result does not read back.
pub fn ensure(
    folder: &Path,
    shape: &Shape,
    seed: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), SyntheticError> {
    if matches!(check(folder, shape, seed), Ok(None)) {
        return Ok(());
    }
    at(folder, fs::create_dir_all(folder))?;
    let _lock = lock(&folder.join("lock"))?; // unlocked when the file is closed, also by a crash
    if matches!(check(folder, shape, seed), Ok(None)) {
        return Ok(()); // another process has written it meanwhile
    }
    replace(&folder.join(CONFIG_FILE), |file| file.write_all(shape.config().as_bytes()))?;
    let header = header(shape)?;
    replace(&folder.join(MODEL_FILE), |file| {
        file.write_all(&header)?;
        let (mut written, total) = (0, shape.bytes());
        progress(written, total);
        let mut block = vec![0; BLOCK_BYTES];
        for tensor in shape.tensors() {
            let mut first_byte = 0;
            while first_byte < tensor.bytes() {
                let len = (tensor.bytes() - first_byte).min(BLOCK_BYTES as u64);
                let block = block.get_mut(..len as usize).unwrap_or_default();
                fill(&tensor.name, seed, first_byte / WORD_BYTES as u64, block);
                file.write_all(block)?;
                first_byte += len;
                written += len;
                progress(written, total);
            }
        }
        Ok(())
    })?;
    match check(folder, shape, seed)? {
        None => Ok(()),
        Some(tensor) => Err(SyntheticError::Different { path: folder.join(MODEL_FILE), tensor }),
    }
}

/// `None` when the checkpoint is as it should be, or else a tensor that is not.
fn check(folder: &Path, shape: &Shape, seed: u64) -> Result<Option<String>, CheckpointError> {
    let config_path = folder.join(CONFIG_FILE);
    let config = fs::read_to_string(&config_path)
        .map_err(|source| CheckpointError::Io { path: config_path.clone(), source })?;
    if config != shape.config() {
        return Ok(Some(CONFIG_FILE.into()));
    }
    let checkpoint = Checkpoint::open(&folder.join(MODEL_FILE))?;
    let tensors = shape.tensors();
    if checkpoint.tensors() != tensors {
        let wrong = tensors.into_iter().find(|tensor| checkpoint.get(&tensor.name) != Some(tensor));
        return Ok(Some(wrong.map_or_else(|| "one too many".into(), |tensor| tensor.name)));
    }
    for tensor in tensors {
        // The generator makes whole words, so the sample of the end starts at one.
        let tail = tensor.bytes().saturating_sub(SAMPLE_BYTES) / WORD_BYTES as u64 * WORD_BYTES as u64;
        for (first, end) in [(0, tensor.bytes().min(SAMPLE_BYTES)), (tail, tensor.bytes())] {
            let mut expected = vec![0; (end - first) as usize];
            let mut found = expected.clone();
            fill(&tensor.name, seed, first / WORD_BYTES as u64, &mut expected);
            checkpoint.read_range(&tensor.name, first, &mut found)?;
            if expected != found {
                return Ok(Some(tensor.name));
            }
        }
    }
    Ok(None)
}

/// Writes a file whole or not at all: under another name, to the disk, then renamed. The caller holds the folder's lock,
/// so what a crash has left under the other name is nobody's and is overwritten.
fn replace(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), SyntheticError> {
    let partial = path.with_extension("partial");
    let result = File::create(&partial)
        .and_then(|mut file| {
            write(&mut file)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&partial, path))
        .and_then(|()| path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all()));
    if result.is_err() {
        let _ = fs::remove_file(&partial); // gives the space back; the error that counts is the first
    }
    at(path, result)
}

/// Takes the lock, waiting for another process that has it.
fn lock(path: &Path) -> Result<File, SyntheticError> {
    let file = at(path, File::create(path))?;
    let start = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(source)) => {
                return Err(SyntheticError::Io { path: path.into(), source });
            }
            Err(TryLockError::WouldBlock) if start.elapsed() < LOCK_WAIT_MAX => thread::sleep(LOCK_POLL),
            Err(TryLockError::WouldBlock) => {
                return Err(SyntheticError::Locked { lock: path.into(), waited: start.elapsed() });
            }
        }
    }
}

fn at<T>(path: &Path, result: io::Result<T>) -> Result<T, SyntheticError> {
    result.map_err(|source| SyntheticError::Io { path: path.into(), source })
}

/// The length and the header, padded so that the data starts at a multiple of 8 bytes.
fn header(shape: &Shape) -> Result<Vec<u8>, SyntheticError> {
    let mut end = 0usize;
    let mut infos = Vec::new();
    for tensor in shape.tensors() {
        let sizes = tensor.shape.iter().map(|&size| usize::try_from(size)).collect::<Result<Vec<_>, _>>();
        let next = usize::try_from(tensor.bytes()).ok().and_then(|bytes| end.checked_add(bytes));
        let (Ok(shape), Some(next)) = (sizes, next) else {
            return Err(SyntheticError::Shape(format!("tensor `{}` is too large", tensor.name)));
        };
        let info = safetensors::tensor::TensorInfo { dtype: Dtype::BF16, shape, data_offsets: (end, next) };
        infos.push((tensor.name, info));
        end = next;
    }
    // Readers of the field's own libraries ask for this entry.
    let format = HashMap::from([("format".into(), "pt".into())]);
    let metadata =
        Metadata::new(Some(format), infos).map_err(|error| SyntheticError::Shape(error.to_string()))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|error| SyntheticError::Shape(error.to_string()))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    Ok(header)
}

/// The weights of one tensor from byte `first_word * 8` on.
fn fill(tensor: &str, seed: u64, first_word: u64, bytes: &mut [u8]) {
    let stream = Stream::new("weights", tensor, seed);
    let middle = if tensor.ends_with("norm.weight") { 1.0 } else { 0.0 };
    let (words, tail) = bytes.as_chunks_mut::<WORD_BYTES>();
    let tail_index = first_word.wrapping_add(words.len() as u64);
    for (word, index) in words.iter_mut().zip(first_word..) {
        *word = stream.word(index).to_le_bytes();
    }
    for (byte, random) in tail.iter_mut().zip(stream.word(tail_index).to_le_bytes()) {
        *byte = random;
    }
    // A second pass, so that the compiler can convert several elements at once.
    for element in bytes.as_chunks_mut::<2>().0 {
        let uniform = f32::from(i16::from_le_bytes(*element)) * (WEIGHT_MAX / 32768.0);
        *element = bf16(middle + uniform).to_le_bytes();
    }
}

/// The bits of the BF16 nearest to a finite number, ties to even.
fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16
}
