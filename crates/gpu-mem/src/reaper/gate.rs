//! Keeps threads that free out of CUDA's driver once the process has begun to exit.
//!
//! The driver takes itself down in handlers of its own when `exit` is called, while other threads still run: a call that
//! meets that may end the process by a signal. Handlers run last in, first out. So one that is registered when the driver and
//! the device's context are there runs before the driver's: it lets no further call begin, and waits for those that have.

use std::ffi::c_int;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long an exit waits for a call. A free may wait for a kernel that waits for another process: an exit does not.
const EXIT_WAIT_MAX: Duration = Duration::from_secs(1);

/// That of this process.
static GATE: Gate = Gate::new();

pub(super) struct Gate {
    state: Mutex<State>,
    ended: Condvar,
}

struct State {
    is_closed: bool,
    /// Calls that have begun and not ended.
    calls: usize,
}

/// A call that was let in.
pub(super) struct Call<'a>(&'a Gate);

impl Gate {
    const fn new() -> Self {
        Self { state: Mutex::new(State { is_closed: false, calls: 0 }), ended: Condvar::new() }
    }

    /// Lets a call in, until the gate is closed.
    fn enter(&self) -> Option<Call<'_>> {
        let mut state = self.lock();
        if state.is_closed {
            return None;
        }
        state.calls += 1;
        Some(Call(self))
    }

    /// Lets no further call in, and waits for those inside, so long at most; whether all have ended.
    fn close(&self, wait_max: Duration) -> bool {
        let mut state = self.lock();
        state.is_closed = true;
        let waited = self.ended.wait_timeout_while(state, wait_max, |state| state.calls > 0);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.0.lock().calls -= 1;
        self.0.ended.notify_all();
    }
}

/// Lets a call of a thread that frees into the driver; `None` when the process exits.
pub(super) fn enter() -> Option<Call<'static>> {
    GATE.enter()
}

/// Has the exit of the process close the gate before whatever was registered up to now. To be called when a device has its
/// context; more than once does no harm.
pub(super) fn close_at_exit() {
    unsafe extern "C" {
        /// POSIX.
        fn atexit(handler: extern "C" fn()) -> c_int;
    }
    extern "C" fn close() {
        // Nothing can be told any more: the log may have ended before.
        GATE.close(EXIT_WAIT_MAX);
    }
    // SAFETY: the handler takes nothing, does not unwind, and lives as long as this library: one that is unloaded runs its
    // handlers first.
    if unsafe { atexit(close) } != 0 {
        tracing::warn!(
            "no room for an exit handler; the process may end by a signal if it exits while GPU memory is freed"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    #[test]
    fn who_closes_waits_for_calls_inside_and_lets_no_other_in() {
        let gate = Gate::new();
        let (told, is_inside) = channel();
        let (end, may_end) = channel::<()>();
        std::thread::scope(|scope| {
            let gate = &gate;
            scope.spawn(move || {
                let call = gate.enter();
                told.send(call.is_some()).unwrap();
                may_end.recv().unwrap();
                drop(call);
            });
            assert!(is_inside.recv_timeout(SOON).unwrap());
            assert!(!gate.close(Duration::from_millis(1)), "one is inside");
            assert!(gate.enter().is_none());
            end.send(()).unwrap();
            assert!(gate.close(SOON));
        });
        assert!(gate.enter().is_none() && gate.close(Duration::ZERO));
    }
}
