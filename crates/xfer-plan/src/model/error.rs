//! What can be wrong with a model, a layout or a job.
//!
//! Whatever was read from a file or a command line is shortened before it is put into a message.

use thiserror::Error;

use crate::error::{LayoutError, ManifestError};
use crate::tensor_box::TensorBox;

/// Characters of a parser's message: it may quote a key of any length.
pub(crate) const SYNTAX_CHARS_MAX: usize = 400;

/// A model, a layout or a job that makes no sense, or that this crate does not know.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the messages say it
pub enum ModelError {
    #[error("no preset `{name}`: there are {known}")]
    UnknownPreset { name: String, known: String },
    #[error("{what} is not readable: {detail}")]
    Syntax { what: &'static str, detail: String },
    #[error("{what} of {bytes} bytes: at most {max} are read")]
    TooLong { what: &'static str, bytes: usize, max: usize },
    #[error(
        "architecture `{name}` is not known: known are {known}; describe any other model tensor by tensor in a job file"
    )]
    UnknownArchitecture { name: String, known: String },
    #[error("config field `{field}` is missing: give the whole config.json")]
    MissingField { field: &'static str },
    #[error("config field `{field}` is {value}: {expected}")]
    BadField { field: &'static str, value: String, expected: String },
    #[error("model `{name}` has more than {max} tensors: check its numbers of layers and experts")]
    TooManyTensors { name: String, max: usize },
    #[error("model `{name}` has more parameters than 64 bits can count: check its sizes")]
    TooManyParameters { name: String },
    #[error("layout `{text}`: {detail}")]
    LayoutText { text: String, detail: String },
    #[error(
        "layout `{layout}` is for {ranks} GPU(s), but there are {gpus}: the product of its factors must be the number of GPUs"
    )]
    WrongGpus { layout: String, ranks: u64, gpus: u64 },
    #[error(
        "`{name}`: {count} {what} cannot be divided evenly by {factor}={by}: choose a {factor} that divides them"
    )]
    Indivisible { name: String, what: &'static str, count: u64, factor: &'static str, by: u64 },
    #[error("expert placement: {detail}")]
    Experts { detail: String },
    #[error(
        "parameter `{param}`: part {bounds} of `{tensor}` does not start and end on borders of {block:?} blocks: choose a tp that keeps blocks whole, or do not quantise"
    )]
    Blocks { param: String, tensor: String, bounds: Box<TensorBox>, block: [u32; 2] },
    #[error("this job has more than {max} {what}: describe fewer ranks")]
    TooManyPieces { what: &'static str, max: usize },
    #[error("`{name}`: {source}")]
    Layout { name: String, source: LayoutError },
    #[error("{at}: {detail}")]
    Job { at: String, detail: String },
    #[error(transparent)]
    Manifest(#[from] ManifestError),
}
