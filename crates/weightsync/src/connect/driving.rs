//! Which driver runs which rails: it follows from where the weights are, and whether the rails read that memory.

use std::sync::Arc;
use std::time::Duration;

use efa_core::LeaseMut;
use xfer_exec::cuda::{
    CudaRailConfig, DeviceRail, GpuMemory, GpuMemoryConfig, StagedMemory, StagedMemoryConfig,
};
use xfer_exec::driver::{Driver, DriverConfig, HostRail, Sender, ThreadConfig};
use xfer_exec::ofi::{DeviceOfiRail, for_nics};
use xfer_exec::{Program, RailError};

use crate::error::Error;
use crate::fabric::FabricError;
use crate::gpu::Gpu;
use crate::pusher::Pusher;

/// A rail that holds writes back for this part of the sender's deadline is given up, if other rails reach the receiver.
const STALL_DIVISOR: u32 = 5;

/// Rails, and the memory that they read.
pub(super) enum Rails {
    /// Weights and staging memory in the host.
    Host { rails: Vec<HostRail>, staging: LeaseMut },
    /// Weights on a GPU, which the rails read.
    Device { local: Vec<Box<DeviceRail>>, over_nics: Vec<DeviceOfiRail>, gpu: Arc<Gpu> },
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
        match self {
            Self::Host { rails, staging } => {
                let driver = DriverConfig { program, rails, staging, slot_bytes, deadline, stall };
                Ok(Pusher::Host(Sender::start(driver, thread)?))
            }
            Self::Device { local, mut over_nics, gpu } => {
                // Where there is no staging memory all rails take rows as they lie.
                let slot_bytes = if staged_bytes > 0 { slot_bytes } else { 0 };
                let config = GpuMemoryConfig {
                    staging_bytes: staged_bytes,
                    slot_bytes,
                    multiprocessors,
                    close_max: deadline,
                };
                let memory = GpuMemory::new(gpu.kernels(), &program, config, None)?;
                if staged_bytes > 0 && !over_nics.is_empty() {
                    let staging = for_nics(memory.staging())?;
                    let failed = |error: RailError| FabricError::Rail(error.to_string());
                    over_nics.iter_mut().try_for_each(|rail| rail.register(&staging)).map_err(failed)?;
                }
                let over_nics = over_nics.into_iter().map(|rail| Box::new(rail) as Box<DeviceRail>);
                let rails = local.into_iter().chain(over_nics).collect();
                let driver = Driver::over(memory, program, rails, deadline, stall);
                Ok(Pusher::Device(Sender::drive(driver, thread)?, gpu))
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
