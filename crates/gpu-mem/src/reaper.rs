//! Frees what owners have dropped, on a thread of its own.
//!
//! CUDA may wait for the whole device before it frees memory. A kernel that is resident there may wait for another
//! process, and that one for whoever drops a buffer here. So one thread for each device frees memory; who enqueues work,
//! drops it or polls a rail must never wait for that thread. [`Device::reclaim`] does, and so does an allocation that would
//! fail otherwise. When the process exits, the thread calls the driver no more: see `gate`.

use std::cell::Cell;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::time::Duration;

use crate::call::Failure;
#[cfg(feature = "test-util")]
use crate::call::inject;
use crate::device::Device;
use crate::error::Error;

mod gate;

/// How often a free is tried before it counts as leaked: what refuses it for a moment is over by then.
const ATTEMPTS_MAX: u32 = 8;

/// The pause before what was refused is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(20);

/// A call that frees something. What it has captured is dropped once it has succeeded, and leaked if it never does.
type Free = Box<dyn FnMut() -> Result<(), Failure> + Send>;

pub(crate) struct Job {
    device: Device,
    what: &'static str,
    /// Taken out when it has succeeded; leaked by whatever else ends the job.
    free: ManuallyDrop<Free>,
    attempts_left: u32,
    /// Errors that the thread which dropped the owner has asked for.
    #[cfg(feature = "test-util")]
    injected: inject::Shared,
}

pub(crate) enum Message {
    Free(Job),
    /// To be answered when all that came before was tried.
    Flush(SyncSender<()>),
}

/// A handle of the driver's, which it looks up from any thread.
pub(crate) struct Handle<T>(pub(crate) *mut T);

// SAFETY: the pointer is never followed here, and the driver may be given it on every thread.
unsafe impl<T> Send for Handle<T> {}

impl<T> Handle<T> {
    /// A method, so that a closure takes the handle and not the pointer in it.
    pub(crate) fn get(&self) -> *mut T {
        self.0
    }
}

thread_local! {
    static IS_REAPER: Cell<bool> = const { Cell::new(false) };
}

/// What a device has to do with the thread that frees its memory.
#[derive(Default)]
pub(crate) struct Reaper {
    /// The way to the thread, which is started at first use and ends with the device; none where the system starts none.
    thread: OnceLock<Option<Sender<Message>>>,
    /// How much was dropped that is not freed yet.
    unfreed: AtomicUsize,
}

impl Reaper {
    fn thread(&self) -> Option<&Sender<Message>> {
        let start = || {
            // The device has its context by now, and the driver its own handlers.
            gate::close_at_exit();
            let (sender, receiver) = channel();
            let started =
                std::thread::Builder::new().name("cuda-frees".into()).spawn(move || work(&receiver));
            let told = |error: &std::io::Error| {
                tracing::warn!(%error, "no thread to free GPU memory; dropping it may wait");
            };
            started.inspect_err(told).ok()?;
            Some(sender)
        };
        self.thread.get_or_init(start).as_ref()
    }

    /// Whether something was dropped that is not freed yet.
    fn is_behind(&self) -> bool {
        self.unfreed.load(Ordering::Acquire) > 0
    }

    /// Waits until the thread has tried all that it was given.
    fn flush(&self) {
        // A user's drop may run on the thread itself, which must not wait for itself.
        if IS_REAPER.get() {
            return;
        }
        let Some(sender) = self.thread() else { return };
        let (done, is_done) = sync_channel(1);
        if sender.send(Message::Flush(done)).is_ok() {
            // An error says that the thread has ended; then nothing is left to wait for.
            let _ = is_done.recv();
        }
    }
}

/// Hands a free to the thread.
fn free_later(device: &Device, what: &'static str, free: Free) {
    device.reaper().unfreed.fetch_add(1, Ordering::AcqRel);
    let job = Job {
        device: device.clone(),
        what,
        free: ManuallyDrop::new(free),
        attempts_left: ATTEMPTS_MAX,
        #[cfg(feature = "test-util")]
        injected: inject::shared(),
    };
    let unsent = match device.reaper().thread() {
        Some(sender) => sender.send(Message::Free(job)).err().map(|unsent| unsent.0),
        None => Some(Message::Free(job)),
    };
    // Nobody else does it, and nobody is there to try again.
    if let Some(Message::Free(job)) = unsent {
        attempt(Job { attempts_left: 1, ..job });
    }
}

fn work(messages: &Receiver<Message>) {
    IS_REAPER.set(true);
    let mut refused: Vec<Job> = Vec::new();
    loop {
        let message = if refused.is_empty() {
            messages.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            messages.recv_timeout(RETRY_AFTER)
        };
        match message {
            Ok(Message::Free(job)) => refused.extend(attempt(job)),
            Ok(Message::Flush(done)) => {
                refused = std::mem::take(&mut refused).into_iter().filter_map(attempt).collect();
                // Who asked may have gone.
                let _ = done.send(());
            }
            Err(RecvTimeoutError::Timeout) => {
                refused = std::mem::take(&mut refused).into_iter().filter_map(attempt).collect();
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// Tries a free; it comes back if it is to be tried again.
fn attempt(mut job: Job) -> Option<Job> {
    // The process exits: what is left goes with it. Whoever waits is still answered.
    let Some(_call) = gate::enter() else {
        // With its device, whose drop calls the driver too.
        std::mem::forget(job);
        return None;
    };
    #[cfg(feature = "test-util")]
    let before = inject::follow(std::sync::Arc::clone(&job.injected));
    let freed = job.device.run(|| (job.free)());
    #[cfg(feature = "test-util")]
    inject::follow(before);
    job.attempts_left = job.attempts_left.saturating_sub(1);
    let Job { device, what, free, .. } = match freed {
        Err(ref error) if !error.is_device_lost() && job.attempts_left > 0 => {
            tracing::debug!(device = %job.device, %error, job.what, "could not be freed yet");
            return Some(job);
        }
        Ok(()) | Err(_) => job,
    };
    match freed {
        // What was captured may be a user's, whose drop must not end this thread.
        Ok(()) => drop(catch_unwind(AssertUnwindSafe(|| drop(ManuallyDrop::into_inner(free))))),
        Err(error) => {
            // The driver frees all that a lost device had when the process ends; it was told once.
            if !error.is_device_lost() {
                tracing::error!(%device, %error, what, "could not be freed and is leaked");
            }
        }
    }
    device.reaper().unfreed.fetch_sub(1, Ordering::AcqRel);
    None
}

impl Device {
    /// Waits until the memory of everything on this device that this thread has dropped is free again. Dropping itself does
    /// not wait: another thread frees, and CUDA may make it wait for all work of the device. So this does not belong
    /// beside kernels that wait for other processes.
    ///
    /// What a dropped [`Pending`](crate::Pending) had is not meant until its stream has let go of it.
    pub fn reclaim(&self) {
        if self.reaper().is_behind() {
            self.reaper().flush();
        }
    }

    /// Makes a call that frees something at once and waits for nothing. When it is refused, it is tried again later.
    pub(crate) fn release(
        &self,
        what: &'static str,
        mut free: impl FnMut() -> Result<(), Failure> + Send + 'static,
    ) {
        match self.run(&mut free) {
            Ok(()) | Err(Error::DeviceLost { .. }) => {}
            Err(error) => {
                tracing::debug!(device = %self, %error, what, "could not be freed yet");
                free_later(self, what, Box::new(free));
            }
        }
    }

    /// Has a call made that frees something and may wait for the device.
    pub(crate) fn release_later(
        &self,
        what: &'static str,
        free: impl FnMut() -> Result<(), Failure> + Send + 'static,
    ) {
        free_later(self, what, Box::new(free));
    }

    /// Makes a call that needs memory; once more where that was short and dropped memory can be had back.
    pub(crate) fn allocate<T>(
        &self,
        kind: &'static str,
        bytes: u64,
        mut allocate: impl FnMut() -> Result<T, Failure>,
    ) -> Result<T, Error> {
        let named = |error| self.out_of_memory(error, kind, bytes);
        // Asked before: what is freed beside the first call may have come too late for it.
        let is_behind = self.reaper().is_behind();
        match self.run(&mut allocate).map_err(named) {
            Err(Error::OutOfMemory { .. }) if is_behind => {
                self.reaper().flush();
                self.run(allocate).map_err(named)
            }
            other => other,
        }
    }
}
