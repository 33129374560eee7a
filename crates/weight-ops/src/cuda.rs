//! The kernels on NVIDIA GPUs: the same operations as on the CPU, with the same bits, and copies of spans and boxes.
//!
//! CUDA C in this folder is compiled when [`Kernels`] are made for a device, and kept on disk. [`Kernels`] check shapes and
//! addresses and make an [`Operation`]; a stream runs it, any number of times. An operation holds the memory that it
//! touches, so the device never touches memory that was freed. Nothing orders streams among each other but their events:
//! where two touch the same bytes at a time, the bytes are anything.
//!
//! ```no_run
//! use std::sync::Arc;
//! use gpu_mem::Cuda;
//! use weight_ops::cuda::{DeviceRange, Kernels};
//! use weight_ops::Dtype;
//!
//! let device = Cuda::open()?.device(0)?;
//! let kernels = Kernels::new(&device)?;
//! let stream = device.stream()?;
//! let master = DeviceRange::whole(&Arc::new(device.alloc(4096)?));
//! let weights = DeviceRange::whole(&Arc::new(device.alloc(2048)?));
//! let cast = kernels.cast(Dtype::F32, &master, Dtype::BF16, &weights)?;
//! let pending = cast.enqueue(&stream)?;
//! let cast = pending.wait()?; // to be used again
//! # drop(cast);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod batch;
mod boxes;
mod cast;
mod checksums;
mod copy;
mod error;
mod memory;
mod operation;
mod quantize;

use gpu_mem::{Device, Function, Module};

pub use batch::{CopyBatch, PendingBatch};
pub use boxes::{BoxCopy, TensorBox};
pub use checksums::{Checksums, PendingChecksums};
pub use copy::{Place, Span};
pub use error::Error;
pub use memory::{DeviceMatrix, DeviceRange};
pub use operation::Operation;

/// Products and sums are not contracted, which would round once where the CPU rounds twice.
const OPTIONS: [&str; 2] = ["--std=c++17", "--fmad=false"];

/// The kernels, compiled for one device.
#[derive(Clone, Debug)]
pub struct Kernels {
    device: Device,
    multiprocessors: u32,
    cast: Module,
    quantize: Module,
    copy_spans: Function,
    copy_boxes: Function,
    checksum: Function,
}

impl Kernels {
    /// Compiles the kernels, or takes what was compiled before from the user's cache.
    ///
    /// # Errors
    /// Those of [`Device::compile`], most often that there is no NVRTC.
    pub fn new(device: &Device) -> Result<Self, Error> {
        const ELEMENT: &str = include_str!("cuda/element.cu");
        let compile = |name, source: &str| device.compile(name, source, &OPTIONS);
        let copy = compile("copy.cu", include_str!("cuda/copy.cu"))?;
        Ok(Self {
            device: device.clone(),
            multiprocessors: device.multiprocessors()?,
            cast: compile("cast.cu", &[ELEMENT, include_str!("cuda/cast.cu")].concat())?,
            quantize: compile("quantize.cu", &[ELEMENT, include_str!("cuda/quantize.cu")].concat())?,
            copy_spans: copy.function("copy_spans")?,
            copy_boxes: copy.function("copy_boxes")?,
            checksum: compile("checksum.cu", include_str!("cuda/checksum.cu"))?.function("checksum")?,
        })
    }

    /// The device that they run on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// How many multiprocessors the device has: copies may be limited to fewer.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }
}
