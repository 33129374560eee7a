//! CUDA memory, streams and kernels with owners: what a transfer needs of a GPU, and nothing else.
//!
//! CUDA's driver and NVRTC are opened at run time ([`Cuda::open`]): a program that uses this crate starts without them.
//! What a device works on is held until it is done ([`Pending`]); what is exported to NICs or to other processes keeps
//! its owner; an error ends a call and never the process.
//!
//! | to | see |
//! |---|---|
//! | allocate | [`Device::alloc`], [`Device::pinned`], [`Device::alloc_vmm`], [`Device::register_host`] |
//! | copy | [`Stream::copy_to_device`], [`Stream::copy_rows_to_device`], [`Stream::copy_to_host`], [`Stream::copy`] |
//! | compile and launch | [`Device::compile`], [`Function::launch`] |
//! | give memory to a NIC | [`NicMemory`], [`Device::flush_rdma_writes`] |
//! | use a framework's memory | [`Device::adopt`], [`RegistrationCache`] |
//! | share with other processes | [`VmmBuffer::export`], [`DeviceBuffer::ipc_handle`] |
//!
//! What is **not** here: memory pools, graphs, the default stream, managed memory, and any policy of what to copy when.
//!
//! ```compile_fail,E0382
//! fn both(stream: &gpu_mem::Stream, from: gpu_mem::DeviceBuffer, mut to: gpu_mem::PinnedBuffer) {
//!     let pending = stream.copy_to_host(from, to, &[]);
//!     to.bytes_mut(); // the device may be writing it
//! }
//! ```
//!
//! ```compile_fail,E0596
//! fn early(idle: &gpu_mem::Stream, pending: gpu_mem::Pending<gpu_mem::DeviceBuffer>) {
//!     pending.event().record(idle); // it would be reached before the work is done
//! }
//! ```
//!
//! ```compile_fail,E0277
//! fn copy_all<O: Send + Sync>(stream: &gpu_mem::Stream, from: gpu_mem::ForeignSegment<O>, to: gpu_mem::PinnedBuffer) {
//!     stream.copy_to_host(from, to, &[]); // nobody answers for what lies beside the tensors
//! }
//! ```

mod buffer;
mod cache;
mod call;
mod copy;
mod device;
mod dmabuf;
mod driver;
#[cfg(feature = "efa")]
mod efa;
mod error;
mod event;
mod foreign;
mod host;
mod ipc;
mod memory;
mod module;
mod nvrtc;
mod pending;
mod reaper;
mod segment;
mod stream;
#[cfg(feature = "efa")]
mod target;
mod vmm;

pub use buffer::{DeviceBuffer, PinnedBuffer};
pub use cache::{CACHE_ENTRIES_MAX, Cached, Found, RegistrationCache};
#[cfg(feature = "test-util")]
pub use call::inject;
pub use copy::{Posted, Rows, Span};
pub use device::{Device, Flushed, MemoryInfo, Observer};
pub use dmabuf::{DmaBuf, NicAccess, NicMemory};
pub use driver::{Cuda, Version};
pub use error::{CallError, Error, Failed};
pub use event::Event;
pub use foreign::{Foreign, ForeignRange, ForeignSegment};
pub use host::RegisteredHost;
pub use ipc::{IpcHandle, IpcMemory};
pub use memory::{DeviceMemory, HostMemory, HostMemoryMut, Registrable};
pub use module::{Arg, Function, Launch, Module, Resources};
pub use nvrtc::nvrtc_version;
pub use pending::Pending;
pub use segment::{Identity, Piece, Segment, Segments};
pub use stream::Stream;
#[cfg(feature = "efa")]
pub use target::LockedTarget;
pub use vmm::{CHUNKS_MAX, SharedChunk, VmmBuffer};

/// Whatever is made on a device may be used and dropped by another thread.
const _: fn() = || {
    fn shareable<T: Send + Sync>() {}
    shareable::<Device>();
    shareable::<Stream>();
    shareable::<Event>();
    shareable::<DeviceBuffer>();
    shareable::<PinnedBuffer>();
    shareable::<Function>();
    shareable::<VmmBuffer>();
    shareable::<IpcMemory>();
    shareable::<Pending<DeviceBuffer>>();
};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
