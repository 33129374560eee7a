//! Errors on demand: what hardware in good health does not do, so that tests meet it.
//!
//! An injected error takes the place of one call of this thread, or of a free that this thread has handed to the one that
//! frees; the driver is not asked. This module is compiled for
//! tests alone, and must never be part of a build that people use.

use std::cell::RefCell;
use std::ffi::c_int;
use std::sync::{Arc, Mutex, PoisonError};

/// What is injected into the calls of a thread, and into the frees that it hands to another one.
pub(crate) type Shared = Arc<Mutex<Vec<Injected>>>;

thread_local! {
    static NEXT: RefCell<Shared> = RefCell::default();
}

pub(crate) struct Injected {
    call: &'static str,
    /// Calls of this name to let pass before.
    skip: usize,
    code: c_int,
}

/// The call named `call` of this thread answers `code` instead of being made, once, after `skip` calls of that name.
pub fn fail(call: &'static str, skip: usize, code: i32) {
    with(|next| next.push(Injected { call, skip, code }));
}

/// Forgets what has not happened yet, and says how many that were.
pub fn clear() -> usize {
    with(|next| next.drain(..).count())
}

/// How many of this thread's have not happened yet.
pub fn left() -> usize {
    with(|next| next.len())
}

/// What is injected into this thread's calls.
pub(crate) fn shared() -> Shared {
    NEXT.with_borrow(Arc::clone)
}

/// Has this thread take what is injected into another's calls, and says what it took before.
pub(crate) fn follow(other: Shared) -> Shared {
    NEXT.replace(other)
}

fn with<T>(use_it: impl FnOnce(&mut Vec<Injected>) -> T) -> T {
    use_it(&mut shared().lock().unwrap_or_else(PoisonError::into_inner))
}

/// The answer to give in place of this call.
pub(crate) fn take(call: &str) -> Option<c_int> {
    with(|next| {
        let at = next.iter().position(|injected| injected.call == call)?;
        match next[at].skip.checked_sub(1) {
            Some(left) => {
                next[at].skip = left;
                None
            }
            None => Some(next.remove(at).code),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_takes_the_place_of_one_call_of_its_name() {
        fail("cuA", 2, 700);
        assert_eq!(
            [take("cuA"), take("cuB"), take("cuA"), take("cuA"), take("cuA")],
            [None, None, None, Some(700), None]
        );
        fail("cuA", 0, 2);
        assert_eq!(
            std::thread::spawn(|| take("cuA")).join().unwrap(),
            None,
            "another thread's calls are its own"
        );
        assert_eq!((clear(), take("cuA")), (1, None));
    }
}
