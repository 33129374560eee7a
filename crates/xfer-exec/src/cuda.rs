//! The rail to GPUs of the same host: a sender writes straight into a receiver's device memory, over NVLink or PCIe.
//!
//! A receiver tells its regions with [`expose`], through the same doorman as shared host memory: a sender presents the key
//! and gets file descriptors of the memory, or a legacy IPC handle. It opens each region once ([`CudaPeer`]), and
//! [`CudaRail`] then copies in batches: spans by one kernel, rows by another, long spans by the copy engine, and one event
//! that says when all of it is over. No CPU touches a byte. Receivers that pass on what they get are told WRITE by WRITE
//! ([`Arrivals`](crate::arrivals::Arrivals)).
//!
//! # When a WRITE is delivered
//!
//! When the event behind its batch has passed on the sender's stream. CUDA's Driver API says of `cuEventQuery` (*Event Management*)
//! that an event is complete when all work before it in its stream is, and a copy or a kernel is complete when its writes have
//! been performed. Memory of a peer GPU is no exception: it is one more place in the unified address space (*CUDA Programming
//! Guide*, "Peer-to-Peer Memory Access"), whose stores are performed in the memory of the GPU that has it. It is what CUDA's own
//! sharing between processes rests on (the same guide, "Interprocess Communication", and its sample `simpleIPC`): the writer
//! waits for its stream, tells the reader by way of the host, and the reader's next kernel finds the bytes. The flush that
//! writes of NICs need (`cuFlushGPUDirectRDMAWrites`) is not for this: it is about writes that CUDA has not ordered itself.
//!
//! # Who may end when
//!
//! Memory shared by descriptors stays for as long as anybody has it open, whoever dies. Memory behind a legacy handle is
//! its exporter's: work that is in flight when the exporter goes fails, and may take the sender's CUDA context with it.
//! So descriptors are the way wherever the memory is ours to allocate.
//!
//! # Where rails cannot reach a GPU
//!
//! Over `tcp`, or to a NIC without peer access to the GPU, bytes go by page-locked host memory at both ends: [`StagedMemory`] copies
//! what it sends into slots that such rails read, and a [`Mirror`] takes in what arrives and uploads it.
//!
//! # Where weights are offloaded
//!
//! What leaves a GPU need not be kept there: [`OffloadedMemory`] brings weights from page-locked host memory to slots on the GPU, for
//! the same rails.
//!
//! This module must never give back a buffer that a stream may still read, and never wait for a GPU except to close a rail.

mod fill;
mod memory;
mod mirror;
mod offloaded;
mod rail;
mod region;
mod scales;
mod slots;
mod staged;
mod uploads;

pub use memory::{DeviceRail, GpuMemory, GpuMemoryConfig};
pub use mirror::{Mirror, Upload};
pub use offloaded::OffloadedMemory;
pub use rail::{CudaRail, CudaRailConfig};
pub use region::{CudaPeer, DeviceRegion, expose};
pub use staged::{StagedMemory, StagedMemoryConfig};

use std::time::Duration;

use crate::local::LocalError;

/// What can go wrong between device memory and its peers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// A GPU, or its driver.
    #[error(transparent)]
    Gpu(#[from] gpu_mem::Error),
    /// The kernels that copy.
    #[error(transparent)]
    Kernels(#[from] weight_ops::cuda::Error),
    /// The way to the peer's process.
    #[error(transparent)]
    Local(#[from] LocalError),
    /// A buffer of more chunks than are passed at a time.
    #[error(
        "device memory of {chunks} chunks cannot be shared, but at most {max}; allocate it in longer chunks"
    )]
    TooManyChunks {
        /// How many it has.
        chunks: usize,
        /// How many are possible.
        max: usize,
    },
    /// What the peer says of a region makes no sense, or is not about device memory.
    #[error("the peer's region {region} is not device memory that can be opened: {reason}")]
    NotDeviceMemory {
        /// The region.
        region: u32,
        /// What is wrong.
        reason: String,
    },
    /// A peer's region is not as long as it said.
    #[error(
        "the peer's region {region} has {found} bytes of device memory where its manifest says {expected}"
    )]
    Length {
        /// The region.
        region: u32,
        /// What the manifest says.
        expected: u64,
        /// What was found.
        found: u64,
    },
    /// A program that wants more than this memory can do.
    #[error(
        "device memory cannot do {transform:?}: it casts between floats, and quantises floats of which it has been told where \
         they lie (Program::with_quantization)"
    )]
    Transform {
        /// What is asked for.
        transform: xfer_plan::Transform,
    },
    /// A push that was told too few magnitudes, or too many.
    #[error("{reason}")]
    Told {
        /// How many, and what to do.
        reason: String,
    },
    /// A program that writes from where its weights are, on rails that cannot read them there.
    #[error(
        "this rank's rails cannot read its weights where they are: bind its plan with Program::staged, which stages everything"
    )]
    NotStaged,
    /// There is no host memory for a mirror.
    #[error("no {bytes} bytes of host memory for the mirror of a GPU's: {reason}")]
    NoMirror {
        /// How many are wanted.
        bytes: u64,
        /// Why not.
        reason: String,
    },
    /// Host memory that takes the place of a mirror's while a GPU still reads that.
    #[error("the mirror is being uploaded: wait for that before its memory is renewed")]
    Uploading,
    /// A mirror whose last renewal has failed.
    #[error("the mirror's pages are not locked, because its last renewal failed: make another")]
    NotLocked,
    /// A GPU that does not end.
    #[error("the GPU has not {what} within {after:?}")]
    Slow {
        /// What it is to do.
        what: &'static str,
        /// How long it had.
        after: Duration,
    },
    /// Blocks of a matrix that there is not.
    #[error("defect: there is no matrix {number} to quantise")]
    Matrix {
        /// Its number.
        number: usize,
    },
    /// A push without a region that its program reads.
    #[error("the push has no region {region}: give all regions of this rank's manifest")]
    Region {
        /// The region.
        region: u32,
    },
    /// Weights in host memory that a GPU does not copy beside the CPU.
    #[error(
        "region {region} of the weights is not page-locked: allocate it with Device::pinned, or register it with \
         Device::register_host"
    )]
    NotPageLocked {
        /// The region.
        region: u32,
    },
    /// A slot that is still read, or that there is not.
    #[error("defect: staging slot {slot} cannot be filled")]
    Slot {
        /// Its number.
        slot: u32,
    },
    /// The GPU does not open the peer's memory.
    #[error(
        "{device} cannot open the peer's region {region}: {source}; both processes must see both GPUs \
         (CUDA_VISIBLE_DEVICES), and these must reach each other (nvidia-smi topo -p2p w)"
    )]
    Unreachable {
        /// The GPU.
        device: String,
        /// The region.
        region: u32,
        /// The driver's reason.
        source: Box<gpu_mem::Error>,
    },
}
