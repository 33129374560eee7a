//! Memory under work that a device has not finished, and who holds it meanwhile.
//!
//! CUDA does not know who owns what a copy or a kernel touches. So what a stream was given by value stays in a
//! [`Pending`] until its event is reached. Dropping one never waits and never frees too early: what is still in use is
//! parked at its stream, and let go of when a later call finds it done, or leaked.

use std::any::Any;
use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Failed};
use crate::event::{Event, poll_until};
use crate::stream::Stream;

/// How long a call that failed half-way waits for what it has posted: far longer than copies that run, and short beside the
/// deadlines of transfers. A stream may wait for an event of another process's making.
const SETTLE_WITHIN: Duration = Duration::from_secs(1);

/// Work in flight, and what it uses.
#[must_use = "wait for it to have the buffers back"]
pub struct Pending<T: Send + 'static> {
    /// Taken out by [`Pending::wait`], or by the drop.
    held: ManuallyDrop<(T, Event)>,
    stream: Stream,
}

impl Stream {
    /// Keeps `buffers` until the stream has done all that it has been given so far: to be called behind a kernel that
    /// uses them.
    ///
    /// # Errors
    ///
    /// [`Failed`] when the driver has no room for an event; or when the device is lost. The buffers come back when the stream
    /// is done within a second, and stay parked at it otherwise.
    pub fn hold<T: Send + 'static>(&self, buffers: T) -> Result<Pending<T>, Failed<T>> {
        self.hold_posted(ManuallyDrop::new(buffers))
    }

    /// As [`Stream::hold`]. Should anything panic, the buffers are leaked: they are in use.
    pub(crate) fn hold_posted<T: Send + 'static>(
        &self,
        buffers: ManuallyDrop<T>,
    ) -> Result<Pending<T>, Failed<T>> {
        let event = match self.record() {
            Ok(event) => event,
            Err(error) => return Err(self.settle(error, buffers)),
        };
        let held = ManuallyDrop::new((ManuallyDrop::into_inner(buffers), event));
        let pending = Pending { held, stream: self.clone() };
        // Runs drops of users', which may panic: the new buffers are parked then.
        self.sweep();
        Ok(pending)
    }

    /// After a failure: waits a moment until nothing uses the buffers any more, or else parks them, or leaks them.
    pub(crate) fn settle<T: Send + 'static>(&self, error: Error, buffers: ManuallyDrop<T>) -> Failed<T> {
        match poll_until(Instant::now() + SETTLE_WITHIN, || self.is_idle()) {
            Ok(true) => return Failed::with(error, ManuallyDrop::into_inner(buffers)),
            Err(lost @ Error::DeviceLost { .. }) => {
                tracing::error!(device = %self.device(), %lost, "buffers in flight are leaked");
            }
            Ok(false) | Err(_) => {
                tracing::warn!(device = %self.device(), %error, "buffers of a failed call are in use until the stream is idle");
                self.parked().add(Box::new(ManuallyDrop::into_inner(buffers)), None);
            }
        }
        Failed { error, returned: None }
    }
}

impl<T: Send + 'static> Pending<T> {
    /// Whether the work is done; then [`Pending::wait`] does not wait.
    ///
    /// # Errors
    ///
    /// [`Error::DeviceLost`] when it failed.
    pub fn is_done(&self) -> Result<bool, Error> {
        self.held.1.is_reached()
    }

    /// The point at which the work is done, for other streams to wait for.
    pub fn event(&self) -> &Event {
        &self.held.1
    }

    /// Waits until the work is done, and gives back what it used.
    ///
    /// # Errors
    ///
    /// [`Failed`] without the buffers when the device is lost: nobody can tell when they are last touched.
    pub fn wait(self) -> Result<T, Failed<T>> {
        let waited = self.held.1.wait();
        self.finish(waited)
    }

    /// As [`Pending::wait`], until `deadline` at most; then it comes back itself, inside.
    ///
    /// # Errors
    ///
    /// As [`Pending::wait`].
    pub fn wait_until(self, deadline: Instant) -> Result<Result<T, Self>, Failed<T>> {
        match self.held.1.wait_until(deadline) {
            Ok(false) => Ok(Err(self)),
            Ok(true) => self.finish(Ok(())).map(Ok),
            Err(error) => self.finish(Err(error)).map(Ok),
        }
    }

    fn finish(self, waited: Result<(), Error>) -> Result<T, Failed<T>> {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is not dropped, so nobody takes the pair a second time.
        let (buffers, _event) = unsafe { ManuallyDrop::take(&mut this.held) };
        let buffers = ManuallyDrop::new(buffers);
        // SAFETY: as above; the stream is read once and `this` is not used again.
        let stream = unsafe { std::ptr::read(&raw const this.stream) };
        match waited {
            Ok(()) => Ok(ManuallyDrop::into_inner(buffers)),
            Err(error) => Err(stream.settle(error, buffers)),
        }
    }
}

impl<T: Send + 'static> Drop for Pending<T> {
    fn drop(&mut self) {
        // SAFETY: the value is being dropped, and `wait` has not taken the pair, because it does not drop.
        let (buffers, event) = unsafe { ManuallyDrop::take(&mut self.held) };
        self.stream.parked().add(Box::new(buffers), Some(event));
        // A second panic would end the process.
        if !std::thread::panicking() {
            self.stream.sweep();
        }
    }
}

impl<T: Send + 'static> fmt::Debug for Pending<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pending({:?})", self.stream)
    }
}

/// What a stream's abandoned work still uses.
#[derive(Default)]
pub(crate) struct Parked(Mutex<Vec<Entry>>);

struct Entry {
    buffers: Box<dyn Any + Send>,
    /// When they are not in use any more; without an event that is when the stream is idle.
    until: Option<Event>,
}

impl Parked {
    fn add(&self, buffers: Box<dyn Any + Send>, until: Option<Event>) {
        self.lock().push(Entry { buffers, until });
    }

    /// Lets go of what is not in use any more.
    pub(crate) fn sweep(&self, is_idle: impl Fn() -> Result<bool, Error>) {
        let mut left = 0;
        while let Some(done) = self.take_done(&mut left, &is_idle) {
            // One at a time and without the lock: a user's drop may come back here, or panic.
            drop(done);
        }
    }

    /// Takes out the first that is not in use any more, behind the first `left`, which are.
    fn take_done(&self, left: &mut usize, is_idle: impl Fn() -> Result<bool, Error>) -> Option<Entry> {
        let mut parked = self.lock();
        loop {
            let entry = parked.get(*left)?;
            let done = entry.until.as_ref().map_or_else(&is_idle, Event::is_reached);
            if matches!(done, Ok(true)) {
                return Some(parked.swap_remove(*left));
            }
            *left += 1;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        for Entry { buffers, until } in self.lock().drain(..) {
            tracing::error!("a stream was dropped while it worked; its buffers are leaked");
            std::mem::forget((buffers, until));
        }
    }
}
