//! One GPU: its primary context, what it can do, and the place where its calls are made.
//!
//! The primary context is the one that PyTorch and the CUDA runtime use, so memory and streams are shared with them. Every
//! call makes it current on the calling thread and puts back what was current before: any thread may use any device,
//! and a caller's own device is never changed under it.

use std::ffi::{c_char, c_int};
use std::fmt;
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys;
use cudarc::driver::sys::{CUdevice_attribute as Attribute, CUresult};

use crate::call::{Failure, cu, number};
use crate::driver::told;
use crate::error::{CallError, Error};
use crate::reaper::Reaper;

/// A GPU. Clones share it; its context is released with the last of them and of what was made on it.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    ordinal: c_int,
    context: sys::CUcontext,
    name: String,
    uuid: [u8; 16],
    pci_address: String,
    /// The first error that left the context unusable.
    lost: OnceLock<CallError>,
    /// Frees what is dropped.
    reaper: Reaper,
}

// SAFETY: the context is a handle that the driver looks up; CUDA's driver API may be called from any thread.
unsafe impl Send for Inner {}
// SAFETY: as above, and from several threads at a time; the rest is constant or a lock of its own.
unsafe impl Sync for Inner {}

/// How much memory a device has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Bytes that can still be allocated, by all processes together.
    pub free: u64,
    /// Bytes in all.
    pub total: u64,
}

/// What happened when writes of NICs were to be made visible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flushed {
    /// They were flushed.
    Done,
    /// This platform shows them in order to whoever was asked for; there was nothing to do.
    NotNeeded,
}

/// Who must see what NICs have written into a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Observer {
    /// Kernels and copies of the device that owns the memory.
    Owner,
    /// Those of every device.
    AllDevices,
}

impl Device {
    /// Opens a device whose number the driver has confirmed.
    pub(crate) fn open(ordinal: c_int) -> Result<Self, Error> {
        let on = format!("GPU {ordinal}");
        let named = |failure| Error::new(failure, &on);
        let mut device = 0;
        // SAFETY: the driver has started; it writes one integer.
        unsafe { cu!(cuDeviceGet(&raw mut device, ordinal)) }.map_err(named)?;
        let mut name = [0; 128];
        // SAFETY: the driver writes at most 128 characters, the last of them zero.
        unsafe { cu!(cuDeviceGetName(name.as_mut_ptr(), 128, device)) }.map_err(named)?;
        let mut pci_address = [0; 32];
        // SAFETY: as above, of 32 characters.
        unsafe { cu!(cuDeviceGetPCIBusId(pci_address.as_mut_ptr(), 32, device)) }.map_err(named)?;
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: the driver writes 16 bytes.
        unsafe { cu!(cuDeviceGetUuid_v2(&raw mut uuid, device)) }.map_err(named)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: the driver writes one handle, which is released when the last handle on the device goes.
        relaxed(|| unsafe { cu!(cuDevicePrimaryCtxRetain(&raw mut context, device)) }).map_err(named)?;
        Ok(Self(Arc::new(Inner {
            ordinal: device,
            context,
            name: text(&name),
            uuid: uuid.bytes.map(|byte| byte.cast_unsigned()),
            pci_address: text(&pci_address).to_ascii_lowercase(),
            lost: OnceLock::new(),
            reaper: Reaper::default(),
        })))
    }

    /// The device's number, as the driver shows it to this process.
    pub fn index(&self) -> u32 {
        self.0.ordinal.unsigned_abs()
    }

    /// The product's name, such as `NVIDIA H200`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What names this GPU in every process of the host, whatever its number there.
    pub fn uuid(&self) -> [u8; 16] {
        self.0.uuid
    }

    /// Where it sits, in the form of /sys: `0000:53:00.0`.
    pub fn pci_address(&self) -> &str {
        &self.0.pci_address
    }

    /// The compute capability: (9, 0) is Hopper.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when the driver does not answer.
    pub fn capability(&self) -> Result<(u32, u32), Error> {
        let major = self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        Ok((major.unsigned_abs(), minor.unsigned_abs()))
    }

    /// How many multiprocessors run blocks.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when the driver does not answer.
    pub fn multiprocessors(&self) -> Result<u32, Error> {
        Ok(self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.unsigned_abs())
    }

    /// Whether its memory can be exported as a dma-buf.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when the driver does not answer.
    pub fn has_dma_buf(&self) -> Result<bool, Error> {
        Ok(self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED)? != 0)
    }

    /// Whether physical memory can be allocated and mapped separately.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when the driver does not answer.
    pub fn has_vmm(&self) -> Result<bool, Error> {
        Ok(self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED)? != 0)
    }

    /// Whether such memory can be registered with a NIC.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when the driver does not answer.
    pub fn has_rdma_with_vmm(&self) -> Result<bool, Error> {
        Ok(self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED)? != 0)
    }

    /// Whether a NIC can reach the memory at all.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when the driver does not answer.
    pub fn has_rdma(&self) -> Result<bool, Error> {
        Ok(self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED)? != 0)
    }

    /// How much memory there is, and how much of it is free.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when the driver does not answer.
    pub fn memory(&self) -> Result<MemoryInfo, Error> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the driver writes two lengths.
        self.run(|| unsafe { cu!(cuMemGetInfo_v2(&raw mut free, &raw mut total)) })?;
        Ok(MemoryInfo { free: free as u64, total: total as u64 })
    }

    /// Whether this device can read and write the other's memory, over NVLink or PCIe. A device reaches itself.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when the driver does not answer.
    pub fn can_access(&self, peer: &Self) -> Result<bool, Error> {
        if self.same_as(peer) {
            return Ok(true);
        }
        let mut can = 0;
        // SAFETY: the driver writes one integer.
        self.run(|| unsafe { cu!(cuDeviceCanAccessPeer(&raw mut can, self.0.ordinal, peer.0.ordinal)) })?;
        Ok(can != 0)
    }

    /// Lets kernels of this device read and write the other's buffers, and copies go directly. Doing it twice is no
    /// error.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when the devices cannot reach each other.
    pub fn enable_access(&self, peer: &Self) -> Result<(), Error> {
        if self.same_as(peer) {
            return Ok(());
        }
        // SAFETY: the peer's context lives as long as its device.
        let enabled = || unsafe { cu!(cuCtxEnablePeerAccess(peer.0.context, 0)) };
        self.run(|| match enabled() {
            Err(Failure::Code { code, .. })
                if code == number(CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED) =>
            {
                Ok(())
            }
            other => other,
        })
    }

    /// Waits until everything that was started on this device has ended.
    ///
    /// # Errors
    ///
    /// [`Error::DeviceLost`] when something of it failed.
    pub fn synchronize(&self) -> Result<(), Error> {
        // SAFETY: waits, and touches nothing.
        self.run(|| unsafe { cu!(cuCtxSynchronize()) })
    }

    /// Makes what NICs have written into this device's memory, and told as completed, visible. To be called once at
    /// each commit, before the memory is read.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] where a flush is needed and the platform offers none to the host.
    pub fn flush_rdma_writes(&self, for_whom: Observer) -> Result<Flushed, Error> {
        use sys::CUflushGPUDirectRDMAWritesScope as Scope;
        let ordering = self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING)?;
        let (scope, enough) = match for_whom {
            Observer::Owner => (
                Scope::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER,
                sys::CUGPUDirectRDMAWritesOrdering::CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER,
            ),
            Observer::AllDevices => (
                Scope::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_ALL_DEVICES,
                sys::CUGPUDirectRDMAWritesOrdering::CU_GPU_DIRECT_RDMA_WRITES_ORDERING_ALL_DEVICES,
            ),
        };
        if ordering >= enough as c_int {
            return Ok(Flushed::NotNeeded);
        }
        let options = self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS)?;
        let by_host = sys::CUflushGPUDirectRDMAWritesOptions::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST;
        if options & by_host as c_int == 0 {
            return Err(Error::Unsupported {
                on: self.to_string(),
                what: "flush writes of NICs",
                why:
                    "the platform neither orders them nor flushes them for the host; receive into host memory"
                        .into(),
            });
        }
        let here = sys::CUflushGPUDirectRDMAWritesTarget::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX;
        // SAFETY: waits, and touches nothing.
        self.run(|| unsafe { cu!(cuFlushGPUDirectRDMAWrites(here, scope)) })?;
        Ok(Flushed::Done)
    }

    /// Whether both are the same GPU in this process.
    pub fn same_as(&self, other: &Self) -> bool {
        self.0.ordinal == other.0.ordinal
    }

    /// Makes calls with this device's context current, and names their failure. Once the device is lost, nothing is
    /// called any more.
    pub(crate) fn run<T>(&self, calls: impl FnOnce() -> Result<T, Failure>) -> Result<T, Error> {
        if let Some(source) = self.0.lost.get() {
            return Err(Error::DeviceLost { on: self.to_string(), source: source.clone() });
        }
        self.in_context(calls).map_err(|failure| self.error(failure))
    }

    /// Makes calls with this device's context current, and puts back what was current before.
    fn in_context<T>(&self, calls: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
        // SAFETY: the context lives as long as this device.
        unsafe { cu!(cuCtxPushCurrent_v2(self.0.context)) }?;
        let answer = relaxed(calls);
        let mut popped = std::ptr::null_mut();
        // SAFETY: takes off what was pushed above; the driver writes one handle.
        if let Err(failure) = unsafe { cu!(cuCtxPopCurrent_v2(&raw mut popped)) } {
            tracing::warn!(device = %self, error = told(failure), "the thread's CUDA context was not put back");
        }
        answer
    }

    /// Names a failure, and remembers one that leaves the device unusable.
    fn error(&self, failure: Failure) -> Error {
        let error = match Error::new(failure, &self.to_string()) {
            // What a GPU that fell off the bus answers, but not it alone: only one that answers nothing else is lost.
            Error::Call(call) if call.code == number(CUresult::CUDA_ERROR_UNKNOWN) && !self.answers() => {
                Error::lost(call)
            }
            error => error,
        };
        if let Error::DeviceLost { source, .. } = &error
            && self.0.lost.set(source.clone()).is_ok()
        {
            tracing::error!(device = %self, %source, "the GPU is lost to this process");
        }
        error
    }

    fn answers(&self) -> bool {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the driver writes two lengths; it asks the GPU for them, and waits for none of its work.
        self.in_context(|| unsafe { cu!(cuMemGetInfo_v2(&raw mut free, &raw mut total)) }).is_ok()
    }

    pub(crate) fn attribute(&self, attribute: Attribute) -> Result<c_int, Error> {
        let mut value = 0;
        // SAFETY: the driver writes one integer.
        self.run(|| unsafe { cu!(cuDeviceGetAttribute(&raw mut value, attribute, self.0.ordinal)) })?;
        Ok(value)
    }

    pub(crate) fn reaper(&self) -> &Reaper {
        &self.0.reaper
    }

    pub(crate) fn ordinal(&self) -> c_int {
        self.0.ordinal
    }

    pub(crate) fn context(&self) -> sys::CUcontext {
        self.0.context
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GPU {} ({}, {})", self.0.ordinal, self.0.name, self.0.pci_address)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: retained when it was opened, and nothing that was made on it is left.
        if let Err(failure) = unsafe { cu!(cuDevicePrimaryCtxRelease_v2(self.ordinal)) } {
            tracing::debug!(gpu = self.ordinal, error = told(failure), "the context was not released");
        }
    }
}

/// Makes calls that are no matter of a CUDA graph which another thread, a framework's, is capturing. Without it the driver
/// would refuse those that may wait, and break the capture off.
fn relaxed<T>(calls: impl FnOnce() -> T) -> T {
    let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED as u32;
    // SAFETY: the driver swaps the thread's mode with this one, as a C enum, of which every number will do here.
    let exchanged = unsafe { cu!(cuThreadExchangeStreamCaptureMode((&raw mut mode).cast())) };
    let answer = calls();
    if exchanged.is_ok() {
        // SAFETY: as above; this is the mode that the thread had.
        if let Err(failure) = unsafe { cu!(cuThreadExchangeStreamCaptureMode((&raw mut mode).cast())) } {
            tracing::warn!(error = told(failure), "the thread's mode of stream capture was not put back");
        }
    }
    answer
}

/// What the driver wrote, up to the zero.
fn text(characters: &[c_char]) -> String {
    let bytes: Vec<u8> =
        characters.iter().map(|character| character.cast_unsigned()).take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
