#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod config;
mod endpoint;
mod error;
mod fabric;
mod inference;
mod report;
mod trainer;

pub use config::{DEADLINE_DEFAULT, SessionConfig, WATERMARK_BYTES_DEFAULT};
pub use efa_core::LeaseMut;
pub use error::Error;
pub use fabric::{Fabric, FabricError};
pub use inference::{Inference, InferenceSession, ParamId, Served};
pub use rendezvous::controller::{ControllerConfig, Report};
pub use rendezvous::{
    PROTOCOL_VERSION, RendezvousError, Secret, Server as Controller, ServerConfig, ServerHandle, World,
};
pub use report::{PushReport, Span, VersionReport};
pub use trainer::{TensorId, TensorSpec, Trainer, TrainerSession};
pub use xfer_plan::{DType, DeviceMesh, ParamMap, Placement, PlanOptions, Rank, TensorBox, shard_box};

/// The name of a job that was given none.
pub const JOB_DEFAULT: &str = "default";

/// Tensors and parameters begin on multiples of this in an arena: what CUDA's allocator and kernels count on.
pub(crate) const ALIGN_BYTES: u64 = 256;

/// The description of a job for a controller of this process: `world` ranks, the default plan options, fresh random push
/// ids.
///
/// # Errors
///
/// When the kernel gives no random bytes.
pub fn controller_config(
    job: &str,
    world: World,
    deadline: std::time::Duration,
) -> Result<ControllerConfig, Error> {
    Ok(ControllerConfig {
        job: job.to_owned(),
        world,
        deadline,
        options: PlanOptions::default(),
        seed: rendezvous::random_seed()?,
    })
}
