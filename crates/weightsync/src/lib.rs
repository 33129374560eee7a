#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod arena;
mod config;
mod connect;
mod device;
mod endpoint;
mod error;
mod fabric;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod gpu;
mod hooks;
mod inference;
mod line;
mod memory;
pub mod metrics;
mod pusher;
mod relay;
mod report;
mod trainer;
mod verify;
mod watch;

pub use arena::CommitMode;
pub use config::{SessionConfig, WATERMARK_BYTES_DEFAULT};
pub use device::Device;
pub use efa_core::LeaseMut;
pub use error::Error;
pub use fabric::{Fabric, FabricError};
pub use hooks::{AfterAbort, AfterCommit, BeforeChange, Hooks};
pub use inference::{Inference, InferenceSession, ParamId, Served};
pub use rendezvous::controller::{Cause, ControllerConfig, Report, Stage};
pub use rendezvous::status;
pub use rendezvous::{
    ClientConfig, DEADLINE_DEFAULT, DEADLINE_RANGE, JOB_DEFAULT, Observer, OnLoss, PROTOCOL_VERSION, Record,
    Refusal, RendezvousError, Secret, Server as Controller, ServerConfig, ServerHandle, Transport, Verify,
    World,
};
#[cfg(feature = "tls")]
pub use rendezvous::{Identity, IdentityError};
pub use report::{PushReport, RailReport, RelayReport, Span, VerifyReport, VersionReport};
pub use trainer::{TensorId, TensorSpec, Trainer, TrainerSession};
pub use weight_ops::cuda::DeviceRange;
pub use xfer_plan::{
    BlockQuant, DType, DeviceMesh, ParamMap, Placement, PlanOptions, Rank, Relay, ScaleFormat, TensorBox,
    TensorPart, shard_box,
};

/// Tensors and parameters begin on multiples of this in an arena: what CUDA's allocator and kernels count on.
pub(crate) const ALIGN_BYTES: u64 = 256;

/// The example of the project's own README.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct ProjectReadme;
