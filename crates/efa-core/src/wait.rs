//! Blocking until the completion queue may have something, or somebody calls.
//!
//! Waiting never reads the queue, and it may return early: the caller polls and waits again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use libfabric_sys as sys;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use smallvec::SmallVec;

use crate::error::RailError;
use crate::object::{Object, call_error};

/// How long to sleep between polls where the provider has no wait object (EFA, shm): well below the time of one large
/// write, and long enough to leave the core to others.
const BLIND_SLEEP: Duration = Duration::from_micros(50);

/// Ends a wait from any thread. Clones end the same wait.
#[derive(Debug, Clone)]
pub struct Waker(Arc<OwnedFd>);

impl Waker {
    /// A waker of its own, for [`wait_any`].
    ///
    /// # Errors
    ///
    /// When this process has no descriptor left.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?)))
    }

    /// Makes the wait that is going on return, or else the next one.
    pub fn wake(&self) {
        // Fails only when the counter is full, and then the rail has been called already.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    fn hush(&self) {
        // Fails only when nobody has called.
        let _ = rustix::io::read(&self.0, &mut [0_u8; 8]);
    }
}

/// The descriptor that becomes readable when the queue may have something. It belongs to the queue.
pub(crate) fn queue_descriptor(
    library: &sys::Library,
    cq: &Object<sys::fid_cq>,
    on: &str,
) -> Result<RawFd, RailError> {
    let mut descriptor: RawFd = -1;
    // SAFETY: the queue is open with FI_WAIT_FD, for which this command stores an int.
    let code = unsafe { sys::fi_control(cq.as_fid(), sys::FI_GETWAIT, (&raw mut descriptor).cast()) };
    crate::object::check(library, "fi_control(FI_GETWAIT)", on, code)?;
    if descriptor < 0 {
        return Err(call_error(library, "fi_control(FI_GETWAIT)", on, sys::FI_EOTHER).into());
    }
    Ok(descriptor)
}

/// What a rail has to be waited for, as [`crate::Rail::arm`] answers.
#[derive(Debug)]
pub enum Armed<'a> {
    /// Nothing: poll it now.
    Ready,
    /// Until this is readable.
    On(BorrowedFd<'a>),
    /// It cannot say: poll it every now and then.
    Blind,
}

/// Blocks until one of the rails may have something, somebody calls the waker, or the time is up; `false` when it is known
/// that nothing has happened. May return early: poll, then wait again.
///
/// # Errors
///
/// When the system refuses to wait.
pub fn wait_any<'a>(
    rails: impl IntoIterator<Item = Armed<'a>>,
    waker: Option<&'a Waker>,
    timeout: Duration,
) -> std::io::Result<bool> {
    let mut entries: SmallVec<[PollFd<'a>; 8]> = SmallVec::new();
    entries.extend(waker.map(|waker| PollFd::from_borrowed_fd(waker.0.as_fd(), PollFlags::IN)));
    let mut blind = false;
    for rail in rails {
        match rail {
            Armed::Ready => return Ok(true),
            Armed::On(queue) => entries.push(PollFd::from_borrowed_fd(queue, PollFlags::IN)),
            Armed::Blind => blind = true,
        }
    }
    let timeout = if blind { timeout.min(BLIND_SLEEP) } else { timeout };
    // Beyond what the system can express the wait is cut short, which a wait may always be.
    let timeout = Timespec::try_from(timeout).unwrap_or(Timespec { tv_sec: i64::from(i32::MAX), tv_nsec: 0 });
    let polled = poll(&mut entries, Some(&timeout));
    if let Some((waker, entry)) = waker.zip(entries.first())
        && entry.revents().contains(PollFlags::IN)
    {
        waker.hush();
    }
    match polled {
        Ok(ready) => Ok(ready > 0 || blind),
        Err(rustix::io::Errno::INTR) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}
