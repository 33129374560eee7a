//! One call of a C function of CUDA's driver or of NVRTC: found by name, made with the bindings' own signature, and
//! answered with a number.
//!
//! The bindings are cudarc's, of CUDA 12.8; the libraries are opened here, because a symbol that an older driver lacks must
//! be an error and not a panic, and because a newer driver may answer with a number that the bindings' enums do not
//! know. So this module must never let a result become one of those enums.

#[cfg(feature = "test-util")]
pub mod inject;

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use cudarc::driver::sys;
use libloading::Library;

/// Why a call brought nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The library has no such function: it is older than this program.
    Missing { call: &'static str },
    /// The function answered with this number, which is not 0.
    Code { call: &'static str, code: c_int },
}

/// What is behind a function of the bindings: the same arguments, in C's convention, and a plain number as its answer.
pub(crate) trait Signature {
    type Raw: Copy;
}

macro_rules! signatures {
    ($($($argument:ident)*;)*) => {$(
        impl<$($argument,)* Answer> Signature for unsafe fn($($argument),*) -> Answer {
            type Raw = unsafe extern "C" fn($($argument),*) -> c_int;
        }
    )*};
}

signatures! {
    ;
    A;
    A B;
    A B C;
    A B C D;
    A B C D E;
    A B C D E F;
    A B C D E F G H I J K;
}

/// Remembers where a function is, once it was found.
pub(crate) struct Slot(AtomicPtr<c_void>);

impl Slot {
    pub(crate) const fn new() -> Self {
        Self(AtomicPtr::new(std::ptr::null_mut()))
    }

    /// The function behind `binding` in this library. The one caller is the macro below, which makes `binding` and
    /// `name` of the same identifier.
    pub(crate) fn resolve<F: Signature>(
        &self,
        _binding: F,
        library: Option<&Library>,
        name: &'static CStr,
    ) -> Result<F::Raw, Failure> {
        let call = name.to_str().unwrap_or("a call");
        #[cfg(feature = "test-util")]
        if let Some(code) = inject::take(call) {
            return Err(Failure::Code { call, code });
        }
        let mut address = self.0.load(Ordering::Relaxed);
        if address.is_null() {
            // SAFETY: the pointer is only stored here; what it points to is said below.
            let found =
                library.and_then(|library| unsafe { library.get::<*mut c_void>(name.to_bytes()).ok() });
            address = found.map_or(std::ptr::null_mut(), |symbol| *symbol);
            self.0.store(address, Ordering::Relaxed);
        }
        if address.is_null() {
            return Err(Failure::Missing { call });
        }
        // SAFETY: `Raw` is a function pointer, so of a pointer's size. The function of this name takes the arguments that
        // the bindings made from the C header give it, and answers with a C enum, which is an `int`; the library is
        // never unloaded.
        Ok(unsafe { std::mem::transmute_copy::<*mut c_void, F::Raw>(&address) })
    }
}

/// Turns the number that a call answered with into a result.
pub(crate) fn check(call: &'static str, code: c_int) -> Result<(), Failure> {
    if code == 0 { Ok(()) } else { Err(Failure::Code { call, code }) }
}

/// Any type, for each argument.
macro_rules! any {
    ($argument:expr) => {
        _
    };
}

/// Calls a C function by its name: `call!(driver(), sys::cuInit(0))` in an `unsafe` block. Arguments must be safe
/// expressions.
macro_rules! call {
    ($library:expr, $module:ident::$name:ident($($argument:expr),* $(,)?)) => {{
        static SLOT: $crate::call::Slot = $crate::call::Slot::new();
        const NAME: &std::ffi::CStr = match std::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
            Ok(name) => name,
            Err(_) => c"",
        };
        // A coercion and not a cast: the types come from the bindings, and the arguments must fit them.
        let binding: unsafe fn($($crate::call::any!($argument)),*) -> _ = $module::$name;
        SLOT.resolve(binding, $library, NAME)
            .and_then(|function| $crate::call::check(stringify!($name), function($($argument),*)))
    }};
}

/// Calls a function of CUDA's driver in an `unsafe` block.
macro_rules! cu {
    ($name:ident($($argument:expr),* $(,)?)) => {
        $crate::call::call!($crate::call::driver(), sys::$name($($argument),*))
    };
}

pub(crate) use {any, call, cu};

/// Where CUDA's driver is looked for: it comes with the kernel module, so there is one, in the system's search path.
pub(crate) const DRIVER_PATHS: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// The driver's library, or the linker's words on each path. Opened at the first call and never closed: the driver has threads.
pub(crate) fn opened_driver() -> &'static Result<Library, String> {
    static DRIVER: OnceLock<Result<Library, String>> = OnceLock::new();
    DRIVER.get_or_init(|| open_first(DRIVER_PATHS))
}

/// The driver's library, if there is one.
pub(crate) fn driver() -> Option<&'static Library> {
    opened_driver().as_ref().ok()
}

/// Opens the first of these that opens, or tells what was wrong with each.
pub(crate) fn open_first<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> Result<Library, String> {
    let (mut missing, mut broken) = (Vec::new(), String::new());
    for path in paths {
        let path = path.as_ref();
        // SAFETY: initialisers run as for any program that links this library; a user who points at another file
        // with the environment runs that file's, as with `LD_LIBRARY_PATH`.
        match unsafe { Library::new(path) } {
            Ok(library) => return Ok(library),
            // The linker's words for a file that is not there repeat its path and add nothing.
            Err(error) if error.to_string().contains("No such file") => {
                missing.push(path.display().to_string())
            }
            Err(error) => broken.push_str(&format!("; {error}")),
        }
    }
    Err(format!("not found: {}{broken}", missing.join(", ")))
}

/// CUDA's own name of a result and its words for it; empty where the driver knows neither.
pub(crate) fn describe(code: c_int) -> (String, String) {
    /// `cuGetErrorName` and `cuGetErrorString`, with the number as a number.
    type Describe = unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int;
    let ask = |function: &CStr| {
        let library = driver()?;
        // SAFETY: both functions have this signature in CUDA's headers.
        let describe = unsafe { library.get::<Describe>(function.to_bytes()) }.ok()?;
        let mut text = std::ptr::null();
        // SAFETY: any number may be asked about; for one that is not known the pointer stays null.
        let answer = unsafe { describe(code, &raw mut text) };
        if answer != 0 || text.is_null() {
            return None;
        }
        // SAFETY: the driver answers with a constant of its own that ends in zero.
        Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    };
    (ask(c"cuGetErrorName").unwrap_or_default(), ask(c"cuGetErrorString").unwrap_or_default())
}

/// The bindings' number for a result, for comparisons.
pub(crate) const fn number(result: sys::CUresult) -> c_int {
    result as c_int
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_function_is_an_error_and_not_a_panic() {
        // SAFETY: nothing is called, for there is no library.
        let answer = unsafe { call!(None, sys::cuInit(0)) };
        assert_eq!(answer, Err(Failure::Missing { call: "cuInit" }));
    }

    #[test]
    fn every_path_that_failed_is_told_and_why() {
        let broken = tempfile::NamedTempFile::new().unwrap();
        let missing = ["libno-such-thing.so.1", "/nowhere/libno.so"].map(Path::new);
        let error = open_first([missing[0], broken.path(), missing[1]]).err().unwrap();
        let expected = "not found: libno-such-thing.so.1, /nowhere/libno.so; ";
        assert!(error.starts_with(expected) && error.contains("file too short"), "{error}");
    }
}
