//! Owning handles on libfabric's objects: each is closed exactly once, by whoever holds it last.

use std::ffi::c_int;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;

use libfabric_sys as sys;

use crate::error::{CallError, Errno};

/// A libfabric structure that can be closed.
///
/// # Safety
///
/// The structure must begin with a `fid`.
pub(crate) unsafe trait Fid {
    const NAME: &'static str;
}

// SAFETY: `fid_fabric` begins with a `fid`.
unsafe impl Fid for sys::fid_fabric {
    const NAME: &'static str = "fabric";
}
// SAFETY: `fid_domain` begins with a `fid`.
unsafe impl Fid for sys::fid_domain {
    const NAME: &'static str = "domain";
}
// SAFETY: `fid_av` begins with a `fid`.
unsafe impl Fid for sys::fid_av {
    const NAME: &'static str = "address vector";
}
// SAFETY: `fid_cq` begins with a `fid`.
unsafe impl Fid for sys::fid_cq {
    const NAME: &'static str = "completion queue";
}
// SAFETY: `fid_ep` begins with a `fid`.
unsafe impl Fid for sys::fid_ep {
    const NAME: &'static str = "endpoint";
}
// SAFETY: `fid_mr` begins with a `fid`.
unsafe impl Fid for sys::fid_mr {
    const NAME: &'static str = "memory region";
}

/// An open object. Dropping closes it; an object that does not close is reported and left to the provider.
pub(crate) struct Object<T: Fid> {
    raw: NonNull<T>,
    library: sys::Library,
}

// SAFETY: rails ask for FI_THREAD_DOMAIN, under which libfabric wants the calls on one domain's objects serialised and
// ties none of them to a thread. A rail holds all objects of its domain, moves them together, and is not `Sync`, so
// they are serialised by ownership. (No `Sync` here: `&Object` must stay on one thread.)
unsafe impl<T: Fid> Send for Object<T> {}

impl<T: Fid> Object<T> {
    /// Opens an object by a call that stores it behind a pointer.
    ///
    /// # Errors
    ///
    /// The call's, when it does not answer 0 or stores nothing.
    pub(crate) fn open(
        library: &sys::Library,
        call: &'static str,
        on: &str,
        open: impl FnOnce(*mut *mut T) -> c_int,
    ) -> Result<Self, CallError> {
        let mut raw = std::ptr::null_mut();
        let code = open(&raw mut raw);
        check(library, call, on, code)?;
        match NonNull::new(raw) {
            Some(raw) => Ok(Self { raw, library: library.clone() }),
            None => Err(call_error(library, call, on, sys::FI_EOTHER)),
        }
    }

    pub(crate) fn as_ptr(&self) -> *mut T {
        self.raw.as_ptr()
    }

    pub(crate) fn as_fid(&self) -> *mut sys::fid {
        self.raw.as_ptr().cast()
    }

    /// Closes the object, or gives it back with the reason.
    pub(crate) fn close(self) -> Result<(), (Self, Errno)> {
        let this = ManuallyDrop::new(self);
        match this.close_once() {
            0 => {
                let library = &raw const this.library;
                // SAFETY: `this` is not dropped, so its library handle is taken over exactly once, here.
                drop(unsafe { library.read() });
                Ok(())
            }
            code => {
                let errno = errno(&this.library, code);
                Err((ManuallyDrop::into_inner(this), errno))
            }
        }
    }

    /// Called once where it succeeds: by `close` or by `drop`.
    fn close_once(&self) -> c_int {
        // SAFETY: the object is open until a close succeeds, and its owner is being consumed.
        unsafe { sys::fi_close(self.as_fid()) }
    }
}

impl<T: Fid> Drop for Object<T> {
    fn drop(&mut self) {
        let code = self.close_once();
        if code != 0 {
            let errno = errno(&self.library, code);
            tracing::error!(object = T::NAME, %errno, "fi_close failed; the object is left to the provider");
        }
    }
}

/// An error number with its text. Accepts libfabric's negative return values.
pub(crate) fn errno(library: &sys::Library, code: c_int) -> Errno {
    let code = code.saturating_abs();
    Errno { code, text: library.strerror(code) }
}

pub(crate) fn call_error(library: &sys::Library, call: &'static str, on: &str, code: c_int) -> CallError {
    CallError { call, on: on.to_owned(), errno: errno(library, code) }
}

/// Turns a return value into a result: 0 is success.
pub(crate) fn check(
    library: &sys::Library,
    call: &'static str,
    on: &str,
    code: c_int,
) -> Result<(), CallError> {
    if code == 0 { Ok(()) } else { Err(call_error(library, call, on, code)) }
}
