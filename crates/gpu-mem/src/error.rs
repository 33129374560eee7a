//! What can go wrong with CUDA, with the call, CUDA's name for it, its words, and what to do.
//!
//! An error that leaves the context unusable is [`Error::DeviceLost`]: nothing of that device works in this process
//! any more, and what was in flight has an unknown end.

use std::ffi::c_int;
use std::fmt;

use cudarc::driver::sys::CUresult;

use crate::call::{Failure, describe, number};
use crate::driver::Version;

/// A call of CUDA's driver failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallError {
    /// The C function.
    pub call: &'static str,
    /// The device it was made on, or "the driver".
    pub on: String,
    /// CUDA's number.
    pub code: i32,
    /// CUDA's name for the number; empty where this driver has none.
    pub name: String,
    /// CUDA's words.
    pub text: String,
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = if self.name.is_empty() { "an unknown error" } else { &self.name };
        write!(f, "{} failed on {}: {name} ({}", self.call, self.on, self.code)?;
        if !self.text.is_empty() {
            write!(f, ", {}", self.text)?;
        }
        f.write_str(")")?;
        match advice(self.code) {
            "" => Ok(()),
            advice => write!(f, "; {advice}"),
        }
    }
}

impl std::error::Error for CallError {}

/// Why CUDA did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no driver to open.
    #[error("no CUDA driver: {tried}; install NVIDIA's driver, or in a container mount it (--gpus all)")]
    NoDriver {
        /// The dynamic linker's words for each path.
        tried: String,
    },
    /// The driver is older than what this crate was tried with.
    #[error("the CUDA driver serves CUDA {found}, older than {needed}; update NVIDIA's driver")]
    DriverTooOld {
        /// The CUDA version of the driver.
        found: Version,
        /// The oldest that serves.
        needed: Version,
    },
    /// The driver lacks one function.
    #[error("the CUDA driver has no {call}; update NVIDIA's driver")]
    MissingCall {
        /// The C function.
        call: &'static str,
    },
    /// There is no device of this number.
    #[error("there is no GPU {index}: the driver shows {count}; CUDA_VISIBLE_DEVICES chooses which")]
    NoDevice {
        /// What was asked for.
        index: u32,
        /// How many there are.
        count: u32,
    },
    /// There is too little memory; what was allocated before is untouched, and smaller requests may succeed.
    #[error("{bytes} bytes of {kind} cannot be had on {on}{left}; free some, or ask for fewer")]
    OutOfMemory {
        /// Which memory.
        kind: &'static str,
        /// The device.
        on: String,
        /// How many bytes were asked for.
        bytes: u64,
        /// What is left, in words, where CUDA tells.
        left: String,
    },
    /// Nothing on this device works in this process any more.
    #[error(
        "{on} is lost to this process: {source}; restart the process, and look for Xid messages in the kernel's log"
    )]
    DeviceLost {
        /// The device.
        on: String,
        /// The first call that told.
        source: CallError,
    },
    /// The device, its driver or the kernel cannot do this.
    #[error("{on} cannot {what}: {why}")]
    Unsupported {
        /// The device.
        on: String,
        /// What was asked for.
        what: &'static str,
        /// What is missing.
        why: String,
    },
    /// A range does not lie inside what it was taken from.
    #[error("{len} bytes from offset {offset} on do not lie inside {available} bytes")]
    Range {
        /// Where the range starts.
        offset: u64,
        /// How long it is.
        len: u64,
        /// How many bytes there are.
        available: u64,
    },
    /// Two things of different devices were used together.
    #[error("{what} belongs to {found}, not to {expected}")]
    WrongDevice {
        /// Which thing.
        what: String,
        /// Its device.
        found: String,
        /// The device it must belong to.
        expected: String,
    },
    /// A pointer that does not lead to memory of a GPU that can be registered.
    #[error("{address:#x} cannot be registered: it is {what}")]
    Pointer {
        /// The address.
        address: u64,
        /// What is there, and what to do.
        what: String,
    },
    /// Memory that was found or registered before is not there any more.
    #[error(
        "the memory at {address:#x} ({len} bytes) was freed or replaced since it was registered; register it again, and keep it until its region is closed"
    )]
    Freed {
        /// Where it was.
        address: u64,
        /// How long it was.
        len: u64,
    },
    /// What a peer sent cannot be used.
    #[error("a peer's handle cannot be used: {why}")]
    BadHandle {
        /// What is wrong with it.
        why: String,
    },
    /// There is no NVRTC to open.
    #[error(
        "no NVRTC: {tried}; install it (pip's nvidia-cuda-nvrtc or the CUDA toolkit), or set NVRTC_SO to the path of libnvrtc.so"
    )]
    NoNvrtc {
        /// The dynamic linker's words for each path.
        tried: String,
    },
    /// NVRTC did not compile a source.
    #[error("NVRTC {version} does not compile {name} with {options:?}: {why}\n{log}")]
    Compile {
        /// The source's name.
        name: String,
        /// NVRTC's version.
        version: Version,
        /// The options.
        options: Vec<String>,
        /// NVRTC's words.
        why: String,
        /// Its log.
        log: String,
    },
    /// The driver does not load what a newer NVRTC made.
    #[error(
        "NVRTC {nvrtc} is newer than the driver, which serves CUDA {driver}: {source}; install the NVRTC of CUDA {driver}, or update the driver"
    )]
    NvrtcTooNew {
        /// NVRTC's version.
        nvrtc: Version,
        /// The driver's.
        driver: Version,
        /// What the driver said.
        source: CallError,
    },
    /// A kernel is launched with other arguments than it takes.
    #[error("kernel {kernel} takes {takes}, not {given}")]
    Arguments {
        /// The kernel.
        kernel: String,
        /// Its parameters' sizes in bytes.
        takes: String,
        /// The arguments' sizes in bytes.
        given: String,
    },
    /// A name or an option with a zero byte inside.
    #[error("{what} {text:?} has a zero byte inside")]
    ZeroByte {
        /// Which text.
        what: &'static str,
        /// The text.
        text: String,
    },
    /// A call failed otherwise.
    #[error(transparent)]
    Call(#[from] CallError),
}

impl Error {
    /// Names what a failure means, on this device.
    pub(crate) fn new(failure: Failure, on: &str) -> Self {
        match failure {
            Failure::Missing { call } => Self::MissingCall { call },
            Failure::Code { call, code } => {
                let (name, text) = describe(code);
                let source = CallError { call, on: on.to_owned(), code, name, text };
                if is_fatal(code) { Self::lost(source) } else { Self::Call(source) }
            }
        }
    }

    pub(crate) fn lost(source: CallError) -> Self {
        Self::DeviceLost { on: source.on.clone(), source }
    }

    /// Whether nothing on the device works any more in this process.
    pub fn is_device_lost(&self) -> bool {
        matches!(self, Self::DeviceLost { .. })
    }
}

/// An operation failed that had taken something over; here it is back.
pub struct Failed<T> {
    /// Why.
    pub error: Error,
    /// What was handed in. `None` when it is still in use: then its stream has it until it is done. Also when the device
    /// was lost meanwhile: nobody can say when it is last touched, so it is leaked.
    pub returned: Option<T>,
}

impl<T> Failed<T> {
    pub(crate) fn with(error: Error, returned: T) -> Self {
        Self { error, returned: Some(returned) }
    }
}

impl<T> fmt::Display for Failed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl<T> fmt::Debug for Failed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Failed({:?}, returned: {})", self.error, self.returned.is_some())
    }
}

impl<T> std::error::Error for Failed<T> {}

impl<T> From<Failed<T>> for Error {
    fn from(failed: Failed<T>) -> Self {
        failed.error
    }
}

/// Results after which, by CUDA's documentation, every further call answers the same and the process must be
/// restarted; also the driver's going away.
const FATAL: [CUresult; 13] = [
    CUresult::CUDA_ERROR_DEINITIALIZED,
    CUresult::CUDA_ERROR_ECC_UNCORRECTABLE,
    CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE,
    CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
    CUresult::CUDA_ERROR_LAUNCH_TIMEOUT,
    CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED,
    CUresult::CUDA_ERROR_ASSERT,
    CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR,
    CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION,
    CUresult::CUDA_ERROR_MISALIGNED_ADDRESS,
    CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE,
    CUresult::CUDA_ERROR_INVALID_PC,
    CUresult::CUDA_ERROR_LAUNCH_FAILED,
];

/// As above, of drivers that are newer than the bindings: a contained memory error, and leaked tensor memory.
const FATAL_IN_NEWER_DRIVERS: [c_int; 2] = [226, 721];

fn is_fatal(code: c_int) -> bool {
    FATAL.iter().any(|fatal| number(*fatal) == code) || FATAL_IN_NEWER_DRIVERS.contains(&code)
}

/// What to do about a result; empty where CUDA's own words say it.
fn advice(code: c_int) -> &'static str {
    const ADVICE: [(CUresult, &str); 14] = [
        (CUresult::CUDA_ERROR_NO_DEVICE, "no GPU is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES"),
        (
            CUresult::CUDA_ERROR_NOT_INITIALIZED,
            "a process forked after CUDA was opened cannot use it; start a new one instead",
        ),
        (
            CUresult::CUDA_ERROR_STUB_LIBRARY,
            "the toolkit's stub was found in place of the driver; take it off LD_LIBRARY_PATH",
        ),
        (
            CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH,
            "the driver's library and the kernel's module differ; reboot, or reload the module",
        ),
        (
            CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE,
            "another process has the GPU for itself; see nvidia-smi's compute mode",
        ),
        (CUresult::CUDA_ERROR_INVALID_CONTEXT, "legacy CUDA IPC cannot open memory of its own process"),
        (CUresult::CUDA_ERROR_ALREADY_MAPPED, "the memory is open already"),
        (
            CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED,
            "the GPUs cannot reach each other; see nvidia-smi topo -p2p r",
        ),
        (CUresult::CUDA_ERROR_INVALID_HANDLE, "the handle or its process is gone"),
        (CUresult::CUDA_ERROR_SYSTEM_NOT_READY, "start nvidia-fabricmanager"),
        (CUresult::CUDA_ERROR_UNKNOWN, "look for Xid and nvidia-uvm messages in the kernel's log"),
        (CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU, "compile for this GPU's architecture"),
        (
            CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED,
            "some of these pages are registered already; register a range once",
        ),
        (CUresult::CUDA_ERROR_NOT_PERMITTED, "the memory or the process is not allowed to do this"),
    ];
    ADVICE.iter().find(|(result, _)| number(*result) == code).map_or("", |(_, advice)| advice)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_failure_names_the_call_the_device_and_what_to_do() {
        let code = number(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU);
        let error = Error::new(Failure::Code { call: "cuModuleLoadData", code }, "GPU 3").to_string();
        for part in ["cuModuleLoadData", "GPU 3", "209", "architecture"] {
            assert!(error.contains(part), "{error}");
        }
        let lost = Error::new(Failure::Code { call: "cuEventQuery", code: 700 }, "GPU 0");
        assert!(lost.is_device_lost() && lost.to_string().contains("restart the process"), "{lost}");
        let old = Error::new(Failure::Missing { call: "cuMemGetHandleForAddressRange" }, "GPU 0").to_string();
        assert!(old.contains("cuMemGetHandleForAddressRange") && old.contains("update"), "{old}");
    }

    #[test]
    fn out_of_memory_and_bad_values_can_be_survived() {
        let survivable = [
            CUresult::CUDA_ERROR_OUT_OF_MEMORY,
            CUresult::CUDA_ERROR_INVALID_VALUE,
            CUresult::CUDA_ERROR_NOT_READY,
            CUresult::CUDA_ERROR_NOT_SUPPORTED,
        ];
        assert!(survivable.iter().all(|result| !is_fatal(number(*result))));
    }

    proptest! {
        #[test]
        fn a_number_that_no_driver_of_today_gives_is_told_as_it_is(code in 1..=i32::MAX) {
            let error = Error::new(Failure::Code { call: "cuX", code }, "GPU 0");
            prop_assert!(error.to_string().contains(&format!("({code}")), "{}", error);
            prop_assert_eq!(error.is_device_lost(), is_fatal(code));
        }
    }
}
