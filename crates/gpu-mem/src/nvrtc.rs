//! CUDA C, compiled at run time for the device at hand.
//!
//! NVRTC is opened when the first source is compiled, and what it makes is kept on disk: a second process pays a file
//! read. A cache that cannot be read or written costs time, and must never fail a compilation or change its result.

mod cache;

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::PathBuf;
use std::sync::OnceLock;

use cudarc::nvrtc::sys;
use libloading::Library;

use self::cache::Cache;
use crate::call::{Failure, call, open_first};
use crate::device::Device;
use crate::driver::{Version, driver_version};
use crate::error::Error;
use crate::module::Module;

/// The environment variable that names the one NVRTC to open.
const LIBRARY_VARIABLE: &str = "NVRTC_SO";

/// The major versions of CUDA whose NVRTC is looked for, newest first.
const MAJORS: [u32; 2] = [13, 12];

/// Folders of the toolkit's installers that are often on no search path.
const FOLDERS: [&str; 2] = ["/usr/local/cuda/lib64", "/opt/cuda/lib64"];

/// Environment variables that name a toolkit's folder.
const TOOLKITS: [&str; 2] = ["CUDA_HOME", "CUDA_PATH"];

impl Device {
    /// Compiles CUDA C for this device and loads it. `name` stands in messages. Functions that are to be found by name are
    /// declared `extern "C" __global__`. Options are NVRTC's; without one for the architecture it is this device's.
    ///
    /// The machine code is kept in `$XDG_CACHE_HOME/weightsync` or `~/.cache/weightsync`, under a digest of source,
    /// options and NVRTC's version.
    ///
    /// # Errors
    ///
    /// [`Error::NoNvrtc`]; [`Error::Compile`] with the compiler's log; [`Error::NvrtcTooNew`] or [`Error::Call`] when the
    /// driver does not load what was compiled.
    pub fn compile(&self, name: &str, source: &str, options: &[&str]) -> Result<Module, Error> {
        let (major, minor) = self.capability()?;
        let options = with_architecture(options, major, minor);
        let nvrtc = Nvrtc::open()?;
        let cache = Cache::of_user();
        let key = cache::key(source, &options, nvrtc.version);
        if let Some(cubin) = cache.as_ref().and_then(|cache| cache.read(&key)) {
            match Module::load(self, name, &cubin) {
                Ok(module) => return Ok(module),
                Err(error @ Error::DeviceLost { .. }) => return Err(error),
                Err(error) => {
                    tracing::warn!(name, %error, "kept machine code does not load; compiling again")
                }
            }
        }
        let cubin = nvrtc.compile(name, source, &options)?;
        let module = Module::load(self, name, &cubin)
            .map_err(|error| blame_versions(error, nvrtc.version, driver_version()))?;
        if let Some(cache) = &cache {
            cache.write(&key, &cubin);
        }
        Ok(module)
    }
}

/// Says that NVRTC is too new, where that is why the driver does not load what it made.
fn blame_versions(error: Error, nvrtc: Version, driver: Result<Version, Error>) -> Error {
    match (error, driver) {
        (Error::Call(source), Ok(driver)) if nvrtc > driver => Error::NvrtcTooNew { nvrtc, driver, source },
        (error, _) => error,
    }
}

/// The options, with the device's architecture unless they name one.
fn with_architecture(options: &[&str], major: u32, minor: u32) -> Vec<String> {
    let names_one =
        |option: &&str| ["--gpu-architecture", "-arch"].iter().any(|prefix| option.starts_with(prefix));
    let mut all: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
    if !options.iter().any(names_one) {
        all.push(format!("--gpu-architecture=sm_{major}{minor}"));
    }
    all
}

/// NVRTC's version, for people; it is opened for the question.
///
/// # Errors
///
/// [`Error::NoNvrtc`] when there is none.
pub fn nvrtc_version() -> Result<Version, Error> {
    Nvrtc::open().map(|nvrtc| nvrtc.version)
}

#[derive(Clone, Copy)]
struct Nvrtc {
    library: &'static Library,
    version: Version,
}

impl Nvrtc {
    fn open() -> Result<Self, Error> {
        static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
        let opened = LIBRARY.get_or_init(|| {
            let driver_major = driver_version().ok().map(|version| version.major);
            open_first(paths(|name| std::env::var_os(name).map(PathBuf::from), driver_major))
        });
        let library = opened.as_ref().map_err(|tried| Error::NoNvrtc { tried: tried.clone() })?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: NVRTC writes two integers.
        unsafe { call!(Some(library), sys::nvrtcVersion(&raw mut major, &raw mut minor)) }
            .map_err(|failure| Error::NoNvrtc { tried: format!("{failure:?}") })?;
        let part = |part: c_int| u32::try_from(part).unwrap_or(0);
        Ok(Self { library, version: Version { major: part(major), minor: part(minor) } })
    }

    /// Compiles to the machine code of the architecture that the options name.
    fn compile(self, name: &str, source: &str, options: &[String]) -> Result<Vec<u8>, Error> {
        let c_source = c_string("the source", source)?;
        let c_name = c_string("the source's name", name)?;
        let c_options: Vec<CString> =
            options.iter().map(|option| c_string("the option", option)).collect::<Result<_, _>>()?;
        let pointers: Vec<*const c_char> = c_options.iter().map(|option| option.as_ptr()).collect();
        let failed = |failure, log| Error::Compile {
            name: name.to_owned(),
            version: self.version,
            options: options.to_vec(),
            why: self.words(failure),
            log,
        };
        let program = Program::create(self.library, &c_source, &c_name)
            .map_err(|failure| failed(failure, String::new()))?;
        // More options than an int counts do not fit into memory.
        let count = c_int::try_from(pointers.len()).unwrap_or(c_int::MAX);
        // SAFETY: the program is open; so many pointers to texts that outlive the call.
        unsafe {
            call!(Some(self.library), sys::nvrtcCompileProgram(program.handle, count, pointers.as_ptr()))
        }
        .map_err(|failure| failed(failure, program.log()))?;
        program.cubin().map_err(|failure| failed(failure, program.log()))
    }

    /// NVRTC's words for a failure.
    fn words(self, failure: Failure) -> String {
        /// `nvrtcGetErrorString`, with the number as a number.
        type Words = unsafe extern "C" fn(c_int) -> *const c_char;
        let Failure::Code { call, code } = failure else { return format!("{failure:?}") };
        // SAFETY: the function has this signature in NVRTC's header.
        let Ok(words) = (unsafe { self.library.get::<Words>(b"nvrtcGetErrorString") }) else {
            return format!("{call} answered {code}");
        };
        // SAFETY: any number may be asked about.
        let text = unsafe { words(code) };
        if text.is_null() {
            return format!("{call} answered {code}");
        }
        // SAFETY: NVRTC answers with a constant of its own that ends in zero.
        format!("{call}: {}", unsafe { CStr::from_ptr(text) }.to_string_lossy())
    }
}

/// Where NVRTC is looked for: at the one path that the user names, or on the search path, then in known folders. The
/// driver's own major version comes first: it may not load what a newer one makes.
fn paths(variable: impl Fn(&str) -> Option<PathBuf>, driver_major: Option<u32>) -> Vec<PathBuf> {
    if let Some(named) = variable(LIBRARY_VARIABLE).filter(|path| !path.as_os_str().is_empty()) {
        // A person who names a library must not silently get another one.
        return vec![named];
    }
    let others = MAJORS.into_iter().filter(|major| Some(*major) != driver_major);
    let majors = driver_major.into_iter().chain(others).map(|major| format!("libnvrtc.so.{major}"));
    let names: Vec<String> = majors.chain(["libnvrtc.so".to_owned()]).collect();
    let toolkits = TOOLKITS.iter().filter_map(|name| variable(name)).map(|folder| folder.join("lib64"));
    // An empty folder stands for the search path.
    let folders = [PathBuf::new()].into_iter().chain(toolkits).chain(FOLDERS.map(PathBuf::from));
    folders.flat_map(|folder| names.iter().map(move |name| folder.join(name)).collect::<Vec<_>>()).collect()
}

/// A program that NVRTC has open.
struct Program {
    library: &'static Library,
    handle: sys::nvrtcProgram,
}

impl Program {
    fn create(library: &'static Library, source: &CStr, name: &CStr) -> Result<Self, Failure> {
        let mut handle = std::ptr::null_mut();
        let none = std::ptr::null();
        // SAFETY: both texts end in zero and NVRTC copies them; no headers are given.
        unsafe {
            call!(
                Some(library),
                sys::nvrtcCreateProgram(&raw mut handle, source.as_ptr(), name.as_ptr(), 0, none, none)
            )
        }?;
        Ok(Self { library, handle })
    }

    fn cubin(&self) -> Result<Vec<u8>, Failure> {
        let mut len = 0;
        // SAFETY: the program is open; NVRTC writes one length.
        unsafe { call!(Some(self.library), sys::nvrtcGetCUBINSize(self.handle, &raw mut len)) }?;
        let mut cubin = vec![0; len];
        // SAFETY: as above; NVRTC writes as many bytes as it said.
        unsafe { call!(Some(self.library), sys::nvrtcGetCUBIN(self.handle, cubin.as_mut_ptr().cast())) }?;
        Ok(cubin)
    }

    /// What the compiler had to say; empty where it does not tell.
    fn log(&self) -> String {
        let mut len = 0;
        // SAFETY: the program is open; NVRTC writes one length.
        let asked =
            unsafe { call!(Some(self.library), sys::nvrtcGetProgramLogSize(self.handle, &raw mut len)) };
        if asked.is_err() || len == 0 {
            return String::new();
        }
        let mut log = vec![0_u8; len];
        // SAFETY: as above; NVRTC writes as many bytes as it said.
        let told = unsafe {
            call!(Some(self.library), sys::nvrtcGetProgramLog(self.handle, log.as_mut_ptr().cast()))
        };
        match told {
            Ok(()) => String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n']).to_owned(),
            Err(_) => String::new(),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created by `create`; NVRTC writes null over the handle.
        let destroyed = unsafe { call!(Some(self.library), sys::nvrtcDestroyProgram(&raw mut self.handle)) };
        if let Err(failure) = destroyed {
            tracing::debug!(?failure, "an NVRTC program was not destroyed");
        }
    }
}

/// Text for C.
pub(crate) fn c_string(what: &'static str, text: &str) -> Result<CString, Error> {
    CString::new(text).map_err(|_| Error::ZeroByte { what, text: text.chars().take(80).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::CallError;

    #[test]
    fn the_architecture_is_the_devices_unless_one_is_named() {
        assert_eq!(with_architecture(&["-lineinfo"], 9, 0), ["-lineinfo", "--gpu-architecture=sm_90"]);
        for named in ["--gpu-architecture=sm_90a", "-arch=sm_80"] {
            assert_eq!(with_architecture(&[named], 9, 0), [named]);
        }
    }

    #[test]
    fn an_nvrtc_is_blamed_when_it_is_newer_than_the_driver() {
        let [old, new] = [8, 9].map(|minor| Version { major: 12, minor });
        let source = CallError {
            call: "cuModuleLoadData",
            on: "GPU 0".into(),
            code: 200,
            name: "CUDA_ERROR_INVALID_IMAGE".into(),
            text: String::new(),
        };
        let call = Error::Call(source);
        let told = blame_versions(call.clone(), new, Ok(old)).to_string();
        for part in ["NVRTC 12.9", "CUDA 12.8", "cuModuleLoadData"] {
            assert!(told.contains(part), "{told}");
        }
        assert_eq!(blame_versions(call.clone(), old, Ok(old)), call);
        assert_eq!(blame_versions(call.clone(), new, Err(call.clone())), call);
    }

    #[test]
    fn a_named_library_is_the_only_one() {
        let named = |name: &str| (name == LIBRARY_VARIABLE).then(|| PathBuf::from("/x/libnvrtc.so"));
        assert_eq!(paths(named, Some(12)), [PathBuf::from("/x/libnvrtc.so")]);
    }

    #[test]
    fn the_search_path_and_the_drivers_own_version_come_first() {
        let home = |name: &str| (name == "CUDA_HOME").then(|| PathBuf::from("/toolkit"));
        let paths = paths(home, Some(12));
        let first = ["libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so", "/toolkit/lib64/libnvrtc.so.12"];
        assert_eq!(paths[..4], first.map(PathBuf::from));
        assert_eq!(paths.len(), 3 * (2 + FOLDERS.len()));
        assert_eq!(super::paths(|_| None, Some(14))[0], PathBuf::from("libnvrtc.so.14"));
        assert_eq!(super::paths(|_| None, None)[0], PathBuf::from("libnvrtc.so.13"));
    }

    #[test]
    fn a_zero_byte_is_told() {
        let error = c_string("the option", "a\0b").unwrap_err().to_string();
        assert!(error.contains("the option") && error.contains("zero byte"), "{error}");
    }
}
