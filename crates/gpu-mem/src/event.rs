//! Events: points in a stream that others wait for.

use std::fmt;
use std::time::{Duration, Instant};

use cudarc::driver::sys;
use cudarc::driver::sys::CUresult;

use crate::call::{Failure, cu, number};
use crate::device::Device;
use crate::error::Error;
use crate::reaper::Handle;
use crate::stream::Stream;

/// A point in a stream's work.
pub struct Event {
    device: Device,
    handle: sys::CUevent,
}

// SAFETY: the event is a handle that the driver looks up, from any thread.
unsafe impl Send for Event {}
// SAFETY: `&Event` reaches the handle and the device; the driver locks for itself.
unsafe impl Sync for Event {}

impl Device {
    /// Makes an event without a time; it counts as reached until it is recorded.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when the driver has no room.
    pub fn event(&self) -> Result<Event, Error> {
        self.new_event(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32)
    }

    /// Makes an event that notes when it was reached; it costs the stream a little.
    ///
    /// # Errors
    ///
    /// As [`Device::event`].
    pub fn timing_event(&self) -> Result<Event, Error> {
        self.new_event(sys::CUevent_flags::CU_EVENT_DEFAULT as u32)
    }

    fn new_event(&self, flags: u32) -> Result<Event, Error> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the driver writes one handle, which the event destroys.
        self.run(|| unsafe { cu!(cuEventCreate(&raw mut handle, flags)) })?;
        Ok(Event { device: self.clone(), handle })
    }
}

impl Event {
    /// Moves the event to the end of what the stream has been given so far. Only its owner may: who was lent it waits for
    /// the point that it marks now.
    ///
    /// # Errors
    ///
    /// [`Error::WrongDevice`] for a stream of another device.
    pub fn record(&mut self, stream: &Stream) -> Result<(), Error> {
        if !self.device.same_as(stream.device()) {
            return Err(Error::WrongDevice {
                what: "the event".into(),
                found: self.device.to_string(),
                expected: stream.device().to_string(),
            });
        }
        // SAFETY: both handles live as long as their owners.
        self.device.run(|| unsafe { cu!(cuEventRecord(self.handle, stream.raw())) })
    }

    /// Whether the stream has come to it.
    ///
    /// # Errors
    ///
    /// [`Error::DeviceLost`] when something before it failed.
    pub fn is_reached(&self) -> Result<bool, Error> {
        self.device.run(|| {
            // SAFETY: the handle lives as long as the event.
            ready(unsafe { cu!(cuEventQuery(self.handle)) })
        })
    }

    /// Waits, on the calling thread, until the stream has come to it.
    ///
    /// # Errors
    ///
    /// As [`Event::is_reached`].
    pub fn wait(&self) -> Result<(), Error> {
        // SAFETY: the handle lives as long as the event.
        self.device.run(|| unsafe { cu!(cuEventSynchronize(self.handle)) })
    }

    /// Waits, on the calling thread and until `deadline` at most; says whether the stream has come to it.
    ///
    /// # Errors
    ///
    /// As [`Event::is_reached`].
    pub fn wait_until(&self, deadline: Instant) -> Result<bool, Error> {
        poll_until(deadline, || self.is_reached())
    }

    /// The time from `start` to this event, to about half a microsecond. Both must note times and have been reached.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when one of them notes no time or was not reached yet.
    pub fn since(&self, start: &Event) -> Result<Duration, Error> {
        let mut milliseconds = 0_f32;
        let (start, end) = (start.handle, self.handle);
        // SAFETY: both handles live as long as their events; the driver writes one number.
        self.device.run(|| unsafe { cu!(cuEventElapsedTime(&raw mut milliseconds, start, end)) })?;
        Ok(Duration::try_from_secs_f32(milliseconds / 1e3).unwrap_or_default())
    }

    pub(crate) fn raw(&self) -> sys::CUevent {
        self.handle
    }
}

/// Asks until it is so, or the time is up: often at first, for most waits are short.
pub(crate) fn poll_until(
    deadline: Instant,
    mut is_so: impl FnMut() -> Result<bool, Error>,
) -> Result<bool, Error> {
    let mut pause = Duration::from_micros(10);
    loop {
        if is_so()? {
            return Ok(true);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        std::thread::sleep(pause.min(left));
        pause = (pause * 2).min(Duration::from_millis(1));
    }
}

/// Whether a query found its work done.
pub(crate) fn ready(answer: Result<(), Failure>) -> Result<bool, Failure> {
    match answer {
        Ok(()) => Ok(true),
        Err(Failure::Code { code, .. }) if code == number(CUresult::CUDA_ERROR_NOT_READY) => Ok(false),
        Err(failure) => Err(failure),
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Event({})", self.device)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let handle = Handle(self.handle);
        // SAFETY: the handle is this event's own; the driver lets a stream pass an event that was destroyed.
        self.device.release("an event", move || unsafe { cu!(cuEventDestroy_v2(handle.get())) });
    }
}
