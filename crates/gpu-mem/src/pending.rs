//! Memory under work that a device has not finished, and who holds it meanwhile.
//!
//! CUDA does not know who owns what a copy or a kernel touches. So what a stream was given by value stays in a
//! [`Pending`] until its event is reached. Dropping one never waits and never frees too early: what is still in use is
//! parked at its stream, and freed when a later call finds it done, or leaked.

use std::any::Any;
use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Failed};
use crate::event::Event;
use crate::stream::Stream;

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
    /// [`Failed`] when the driver has no room for an event, after it has waited for the stream; or when the device is lost.
    pub fn hold<T: Send + 'static>(&self, buffers: T) -> Result<Pending<T>, Failed<T>> {
        self.parked().sweep();
        match self.record() {
            Ok(event) => Ok(Pending { held: ManuallyDrop::new((buffers, event)), stream: self.clone() }),
            Err(error) => Err(self.settle(error, buffers)),
        }
    }

    /// After a failure: waits until nothing uses the buffers any more, or leaks them.
    pub(crate) fn settle<T>(&self, error: Error, buffers: T) -> Failed<T> {
        match self.synchronize() {
            Ok(()) => Failed::with(error, buffers),
            Err(lost) => {
                tracing::error!(device = %self.device(), %lost, "buffers in flight are leaked");
                std::mem::forget(buffers);
                Failed { error, returned: None }
            }
        }
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
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is not dropped, so nobody takes the pair a second time.
        let (buffers, event) = unsafe { ManuallyDrop::take(&mut this.held) };
        // SAFETY: as above; the stream is read once and `this` is not used again.
        let stream = unsafe { std::ptr::read(&raw const this.stream) };
        match event.wait() {
            Ok(()) => Ok(buffers),
            Err(error) => Err(stream.settle(error, buffers)),
        }
    }
}

impl<T: Send + 'static> Drop for Pending<T> {
    fn drop(&mut self) {
        // SAFETY: the value is being dropped, and `wait` has not taken the pair, because it does not drop.
        let (buffers, event) = unsafe { ManuallyDrop::take(&mut self.held) };
        self.stream.parked().add(Box::new(buffers), event);
    }
}

impl<T: Send + 'static> fmt::Debug for Pending<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pending({:?})", self.stream)
    }
}

/// What a stream's abandoned work still uses.
#[derive(Default)]
pub(crate) struct Parked(Mutex<Vec<(Box<dyn Any + Send>, Event)>>);

impl Parked {
    fn add(&self, buffers: Box<dyn Any + Send>, event: Event) {
        self.lock().push((buffers, event));
        self.sweep();
    }

    /// Frees what is not in use any more.
    pub(crate) fn sweep(&self) {
        let done = {
            let mut parked = self.lock();
            let (done, left) =
                parked.drain(..).partition(|(_, event): &(_, Event)| matches!(event.is_reached(), Ok(true)));
            *parked = left;
            done
        };
        // Freed without the lock: a buffer's drop may come back here.
        drop::<Vec<_>>(done);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(Box<dyn Any + Send>, Event)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        self.sweep();
        for (buffers, event) in self.lock().drain(..) {
            tracing::error!("a stream was dropped while it worked; its buffers are leaked");
            std::mem::forget((buffers, event));
        }
    }
}
