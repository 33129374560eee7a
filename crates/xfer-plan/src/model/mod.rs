//! Models and layouts: manifests of known models without naming a single tensor by hand.
//!
//! A [`ModelSpec`] lists the tensors of a checkpoint, from a built-in preset or a Hugging Face `config.json`. A
//! [`TrainLayout`] says which trainer owns which part of them, an [`InferLayout`] what each receiver makes of them. A
//! [`JobSpec`] is all of that as JSON, and describes any other model and layout too. Nothing here reads files or asks
//! frameworks; whatever is not known is refused by name and never guessed.

mod architecture;
mod axes;
mod config;
mod error;
mod infer;
mod job;
mod job_maps;
mod kernel;
mod machine;
mod names;
mod presets;
mod spec;
mod train;

pub use error::ModelError;
pub use infer::InferLayout;
pub use job::{
    Each, End, JobSpec, MapJob, MeshJob, ModelJob, ParamJob, ReceiversJob, TensorJob, TrainersJob,
};
pub use machine::Machine;
pub use spec::{Depth, ExpertForm, Experts, ModelSpec, TensorCut, TensorSpec};
pub use train::TrainLayout;
