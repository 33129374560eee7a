//! Streams: queues of copies and kernels that a device works off in order.
//!
//! A stream never waits for the default stream, and the default stream not for it.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::sys;

use crate::call::cu;
use crate::device::Device;
use crate::error::Error;
use crate::event::{Event, poll_until, ready};
use crate::pending::Parked;
use crate::reaper::Handle;

/// A queue of a device's work. Clones are the same queue.
#[derive(Clone)]
pub struct Stream(Arc<Inner>);

struct Inner {
    device: Device,
    handle: sys::CUstream,
    /// What operations still use that nobody waits for any more.
    parked: Parked,
}

// SAFETY: the stream is a handle that the driver looks up, from any thread.
unsafe impl Send for Inner {}
// SAFETY: `&Inner` reaches the handle, for which the driver locks, and a list behind a lock of its own.
unsafe impl Sync for Inner {}

impl Device {
    /// Makes a stream.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when the driver has no room.
    pub fn stream(&self) -> Result<Stream, Error> {
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the driver writes one handle, which the stream destroys.
        self.run(|| unsafe { cu!(cuStreamCreate(&raw mut handle, flags)) })?;
        Ok(Stream(Arc::new(Inner { device: self.clone(), handle, parked: Parked::default() })))
    }
}

impl Stream {
    /// The stream's device.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// CUDA's handle, for other libraries. It is valid while a clone of the stream lives.
    pub fn as_raw(&self) -> *mut std::ffi::c_void {
        self.0.handle.cast()
    }

    /// A point behind all that the stream has been given so far.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when the driver has no room.
    pub fn record(&self) -> Result<Event, Error> {
        let mut event = self.0.device.event()?;
        event.record(self)?;
        Ok(event)
    }

    /// Lets nothing that the stream is given from now on start before `event` is reached. The event may be of another
    /// device.
    ///
    /// # Errors
    ///
    /// [`Error::DeviceLost`] when the event's device is lost.
    pub fn wait_for(&self, event: &Event) -> Result<(), Error> {
        // SAFETY: both handles live as long as their owners; the driver keeps what it needs of the event.
        self.0.device.run(|| unsafe { cu!(cuStreamWaitEvent(self.0.handle, event.raw(), 0)) })
    }

    /// Whether the stream has nothing left to do.
    ///
    /// # Errors
    ///
    /// [`Error::DeviceLost`] when something of it failed.
    pub fn is_idle(&self) -> Result<bool, Error> {
        self.0.is_idle()
    }

    /// Waits, on the calling thread, until the stream has nothing left to do.
    ///
    /// # Errors
    ///
    /// As [`Stream::is_idle`].
    pub fn synchronize(&self) -> Result<(), Error> {
        // SAFETY: the handle lives as long as the stream.
        self.0.device.run(|| unsafe { cu!(cuStreamSynchronize(self.0.handle)) })?;
        self.sweep();
        Ok(())
    }

    /// As [`Stream::synchronize`], until `deadline` at most; says whether the stream has nothing left to do.
    ///
    /// # Errors
    ///
    /// As [`Stream::is_idle`].
    pub fn synchronize_until(&self, deadline: Instant) -> Result<bool, Error> {
        let is_idle = poll_until(deadline, || self.is_idle())?;
        self.sweep();
        Ok(is_idle)
    }

    pub(crate) fn raw(&self) -> sys::CUstream {
        self.0.handle
    }

    pub(crate) fn parked(&self) -> &Parked {
        &self.0.parked
    }

    /// Lets go of what parked operations do not use any more.
    pub(crate) fn sweep(&self) {
        self.0.parked.sweep(|| self.0.is_idle());
    }
}

impl Inner {
    fn is_idle(&self) -> Result<bool, Error> {
        // SAFETY: the handle lives as long as the stream.
        self.device.run(|| ready(unsafe { cu!(cuStreamQuery(self.handle)) }))
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({})", self.0.device)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.parked.sweep(|| self.is_idle());
        let handle = Handle(self.handle);
        // SAFETY: the handle is this stream's own; the driver finishes what it was given, then frees it.
        self.device.release("a stream", move || unsafe { cu!(cuStreamDestroy_v2(handle.get())) });
    }
}
