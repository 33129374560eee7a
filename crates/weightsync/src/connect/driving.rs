//! Which driver runs which rails: it follows from where the weights are, and whether the rails read that memory.

use std::sync::Arc;
use std::time::Duration;

use efa_core::LeaseMut;
use gpu_mem::DeviceMemory as _;
use weight_ops::cuda::DeviceRange;
use xfer_exec::cuda::{
    CudaRailConfig, DeviceRail, GpuMemory, GpuMemoryConfig, OffloadedMemory, StagedMemory, StagedMemoryConfig,
};
use xfer_exec::driver::{Driver, DriverConfig, HostRail, Sender, ThreadConfig};
use xfer_exec::ofi::{DeviceOfiRail, for_nics};
use xfer_exec::{Program, RailError};

use crate::error::Error;
use crate::fabric::FabricError;
use crate::gpu::Gpu;
use crate::pusher::Pusher;

/// A rail that holds writes back for this part of the sender's deadline is given up, if other rails reach the receiver.
pub(super) const STALL_DIVISOR: u32 = 5;

/// Rails, and the memory that they read.
pub(super) enum Rails {
    /// Weights and staging memory in the host.
    Host { rails: Vec<HostRail>, staging: LeaseMut },
    /// Weights on a GPU, which the rails read.
    Device { local: Vec<Box<DeviceRail>>, over_nics: Vec<DeviceOfiRail>, gpu: Arc<Gpu> },
    /// Weights in page-locked host memory, and rails that read staging memory on a GPU alone.
    Offloaded { local: Vec<Box<DeviceRail>>, over_nics: Vec<DeviceOfiRail>, gpu: Arc<Gpu> },
    /// Weights on a GPU, and rails that read page-locked staging memory alone.
    Staged { rails: Vec<HostRail>, staging: LeaseMut, gpu: Arc<Gpu> },
}

impl Rails {
    /// Starts their thread. Bytes of all staging slots, and of one; the deadline is the engine's.
    pub(super) fn drive(
        self,
        program: Program,
        (staged_bytes, slot_bytes): (u64, u64),
        deadline: Duration,
        thread: ThreadConfig,
    ) -> Result<Pusher, Error> {
        let stall = deadline / STALL_DIVISOR;
        let multiprocessors = CudaRailConfig::default().multiprocessors;
        let on_gpu = GpuMemoryConfig {
            staging_bytes: staged_bytes,
            // Where there is no staging memory all rails take rows as they lie.
            slot_bytes: if staged_bytes > 0 { slot_bytes } else { 0 },
            multiprocessors,
            close_max: deadline,
        };
        match self {
            Self::Host { rails, staging } => {
                let driver = DriverConfig { program, rails, staging, slot_bytes, deadline, stall };
                Ok(Pusher::Host(Sender::start(driver, thread)?))
            }
            Self::Device { local, over_nics, gpu } => {
                let memory = GpuMemory::new(gpu.kernels(), &program, on_gpu, None)?;
                let rails = registered(local, over_nics, memory.staging())?;
                let driver = Driver::over(memory, program, rails, deadline, stall);
                Ok(Pusher::Device(Sender::drive(driver, thread)?, gpu))
            }
            Self::Offloaded { local, over_nics, gpu } => {
                let memory = OffloadedMemory::new(gpu.kernels(), &program, on_gpu)?;
                let rails = registered(local, over_nics, memory.staging())?;
                let driver = Driver::over(memory, program, rails, deadline, stall);
                Ok(Pusher::Host(Sender::drive(driver, thread)?))
            }
            Self::Staged { rails, staging, gpu } => {
                let config = StagedMemoryConfig { slot_bytes, multiprocessors, close_max: deadline };
                let memory = StagedMemory::new(gpu.kernels(), &program, staging, config)?;
                let driver = Driver::over(memory, program, rails, deadline, stall);
                Ok(Pusher::Device(Sender::drive(driver, thread)?, gpu))
            }
        }
    }
}

/// All rails, of which those over NICs have been told of staging memory, where there is any.
fn registered(
    local: Vec<Box<DeviceRail>>,
    mut over_nics: Vec<DeviceOfiRail>,
    staging: &DeviceRange,
) -> Result<Vec<Box<DeviceRail>>, Error> {
    if staging.len() > 0 && !over_nics.is_empty() {
        let staging = for_nics(staging)?;
        let failed = |error: RailError| FabricError::Rail(error.to_string());
        over_nics.iter_mut().try_for_each(|rail| rail.register(&staging)).map_err(failed)?;
    }
    let over_nics = over_nics.into_iter().map(|rail| Box::new(rail) as Box<DeviceRail>);
    Ok(local.into_iter().chain(over_nics).collect())
}
