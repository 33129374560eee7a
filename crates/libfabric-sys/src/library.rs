//! Finding and opening libfabric at run time.
//!
//! Once opened, the library stays: its providers keep threads and exit handlers whose code must not go away.

use std::ffi::{CStr, OsString, c_char, c_int, c_void};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::types::{fi_fabric_attr, fi_info, fid_fabric};

/// Where libfabric is looked for when the environment variable `LIBFABRIC_SO` names none: the system's own search
/// path, then the folders of the EFA installer.
pub const SEARCH_PATHS: [&str; 3] =
    ["libfabric.so.1", "/opt/amazon/efa/lib/libfabric.so.1", "/opt/amazon/efa/lib64/libfabric.so.1"];

/// The environment variable that names the one library to open.
const LIBRARY_VARIABLE: &str = "LIBFABRIC_SO";

/// A libfabric version, as the library itself states it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// The part before the point.
    pub major: u16,
    /// The part behind the point.
    pub minor: u16,
}

impl Version {
    /// The version of the headers that this crate was written from, and the newest API it asks for.
    pub const BOUND: Self = Self { major: 2, minor: 1 };

    /// The oldest version whose structures are known to fit.
    pub const OLDEST: Self = Self { major: 1, minor: 17 };

    /// Unpacks libfabric's form.
    pub const fn from_packed(packed: u32) -> Self {
        Self { major: (packed >> 16) as u16, minor: (packed & 0xffff) as u16 }
    }

    /// Packs into libfabric's form.
    pub const fn packed(self) -> u32 {
        crate::FI_VERSION(self.major as u32, self.minor as u32)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// One place that was tried, and why it did not serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tried {
    /// What was opened.
    pub path: PathBuf,
    /// The dynamic linker's own words, or the symbol that the file lacks.
    pub why: String,
}

/// No usable libfabric was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub struct OpenError {
    /// Every place that was tried, in order.
    pub tried: Vec<Tried>,
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no usable libfabric; tried")?;
        for (index, tried) in self.tried.iter().enumerate() {
            let separator = if index == 0 { " " } else { "; " };
            write!(f, "{separator}{}: {}", tried.path.display(), tried.why)?;
        }
        write!(
            f,
            ". Install libfabric {} or newer, or set {LIBRARY_VARIABLE} to the path of libfabric.so.1",
            Version::OLDEST
        )
    }
}

/// The functions that libfabric exports. Everything else goes through the tables of its objects.
struct Symbols {
    version: unsafe extern "C" fn() -> u32,
    getinfo: unsafe extern "C" fn(
        u32,
        *const c_char,
        *const c_char,
        u64,
        *const fi_info,
        *mut *mut fi_info,
    ) -> c_int,
    freeinfo: unsafe extern "C" fn(*mut fi_info),
    dupinfo: unsafe extern "C" fn(*const fi_info) -> *mut fi_info,
    fabric: unsafe extern "C" fn(*mut fi_fabric_attr, *mut *mut fid_fabric, *mut c_void) -> c_int,
    strerror: unsafe extern "C" fn(c_int) -> *const c_char,
    tostr: unsafe extern "C" fn(*const c_void, u32) -> *mut c_char,
}

struct Inner {
    symbols: Symbols,
    path: PathBuf,
    version: Version,
}

/// An opened libfabric. Cloning shares it; dropping the last clone leaves the library loaded.
#[derive(Clone)]
pub struct Library(Arc<Inner>);

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Library").field("path", &self.0.path).field("version", &self.0.version).finish()
    }
}

impl Library {
    /// Opens the library that `LIBFABRIC_SO` names, and only that one; without the variable, the first of
    /// [`SEARCH_PATHS`] that opens.
    ///
    /// # Errors
    ///
    /// [`OpenError`] lists every path that was tried and why it did not serve.
    pub fn open() -> Result<Self, OpenError> {
        match std::env::var_os(LIBRARY_VARIABLE).filter(|path| !path.is_empty()) {
            // A person who names a library must not silently get another one.
            Some(named) => Self::open_first([named]),
            None => Self::open_first(SEARCH_PATHS.map(OsString::from)),
        }
    }

    /// Opens exactly this file.
    ///
    /// # Errors
    ///
    /// [`OpenError`] says why it did not serve.
    pub fn open_path(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        Self::open_first([path.as_ref().as_os_str().to_owned()])
    }

    fn open_first(paths: impl IntoIterator<Item = OsString>) -> Result<Self, OpenError> {
        let mut tried = Vec::new();
        for path in paths.into_iter().map(PathBuf::from) {
            match load(&path) {
                Ok(inner) => return Ok(Self(Arc::new(inner))),
                Err(why) => tried.push(Tried { path, why }),
            }
        }
        Err(OpenError { tried })
    }

    /// The version that the library states.
    pub fn version(&self) -> Version {
        self.0.version
    }

    /// The path that was opened, as it was given to the dynamic linker.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The text of an error number, positive or negative.
    pub fn strerror(&self, errno: c_int) -> String {
        // SAFETY: takes a number, returns a text that lives at least until the next call from this thread.
        let text = unsafe { (self.0.symbols.strerror)(errno.saturating_abs()) };
        // SAFETY: null, or that text.
        unsafe { text_of(text) }.unwrap_or_else(|| format!("error {errno}"))
    }

    /// Lists what the providers offer; free the list with [`Self::fi_freeinfo`].
    ///
    /// # Safety
    ///
    /// `hints` must be null or an info that this library allocated and the caller filled; `list` must be writable.
    pub unsafe fn fi_getinfo(&self, api: Version, hints: *const fi_info, list: *mut *mut fi_info) -> c_int {
        // SAFETY: the caller keeps the contract; node and service may be null.
        unsafe { (self.0.symbols.getinfo)(api.packed(), std::ptr::null(), std::ptr::null(), 0, hints, list) }
    }

    /// Frees an info, or a list of them.
    ///
    /// # Safety
    ///
    /// `info` must come from this library and must not be used again.
    pub unsafe fn fi_freeinfo(&self, info: *mut fi_info) {
        // SAFETY: the caller keeps the contract.
        unsafe { (self.0.symbols.freeinfo)(info) }
    }

    /// Copies one info; an empty one for null. Null when memory is short.
    ///
    /// # Safety
    ///
    /// `info` must be null or come from this library.
    pub unsafe fn fi_dupinfo(&self, info: *const fi_info) -> *mut fi_info {
        // SAFETY: the caller keeps the contract.
        unsafe { (self.0.symbols.dupinfo)(info) }
    }

    /// Opens a fabric.
    ///
    /// # Safety
    ///
    /// `attr` must be the fabric attributes of an info of this library; `fabric` must be writable.
    pub unsafe fn fi_fabric(&self, attr: *mut fi_fabric_attr, fabric: *mut *mut fid_fabric) -> c_int {
        // SAFETY: the caller keeps the contract.
        unsafe { (self.0.symbols.fabric)(attr, fabric, std::ptr::null_mut()) }
    }

    /// A printable form of a libfabric structure of the given `FI_TYPE_*`.
    ///
    /// # Safety
    ///
    /// `data` must point to a structure of that type.
    pub unsafe fn fi_tostr(&self, data: *const c_void, datatype: u32) -> String {
        // SAFETY: the caller keeps the contract; the text lives until the next call from this thread.
        let text = unsafe { (self.0.symbols.tostr)(data, datatype) };
        // SAFETY: null, or that text.
        unsafe { text_of(text) }.unwrap_or_default()
    }
}

/// Copies a C text; `None` for null.
///
/// # Safety
///
/// `text` must be null or point to a terminated text.
unsafe fn text_of(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: not null, and the caller vouches for the terminator.
    let text = unsafe { CStr::from_ptr(text) };
    Some(text.to_string_lossy().into_owned())
}

fn load(path: &Path) -> Result<Inner, String> {
    // SAFETY: runs the library's initialisers; that the named file is libfabric is what the caller asks for.
    let library = unsafe { libloading::Library::new(path) }.map_err(|error| {
        let why = error.to_string();
        // The dynamic linker begins with the path, and so does the message that this goes into.
        why.strip_prefix(&format!("{}: ", path.display())).map(str::to_owned).unwrap_or(why)
    })?;
    let symbols = Symbols {
        // SAFETY: the type is that of `fi_version` in every libfabric 1.x and 2.x.
        version: unsafe { symbol(&library, c"fi_version") }?,
        // SAFETY: as in the headers.
        getinfo: unsafe { symbol(&library, c"fi_getinfo") }?,
        // SAFETY: as in the headers.
        freeinfo: unsafe { symbol(&library, c"fi_freeinfo") }?,
        // SAFETY: as in the headers.
        dupinfo: unsafe { symbol(&library, c"fi_dupinfo") }?,
        // SAFETY: as in the headers.
        fabric: unsafe { symbol(&library, c"fi_fabric") }?,
        // SAFETY: as in the headers.
        strerror: unsafe { symbol(&library, c"fi_strerror") }?,
        // SAFETY: as in the headers.
        tostr: unsafe { symbol(&library, c"fi_tostr") }?,
    };
    // SAFETY: takes nothing and returns a number.
    let version = Version::from_packed(unsafe { (symbols.version)() });
    if version < Version::OLDEST {
        return Err(format!("it is libfabric {version}, older than {}", Version::OLDEST));
    }
    // Unloading would pull code from under provider threads and exit handlers, so the handle is never closed.
    std::mem::forget(library);
    Ok(Inner { symbols, path: path.to_owned(), version })
}

/// Looks up one exported function.
///
/// # Safety
///
/// `F` must be a function pointer of the type that the library exports under this name.
unsafe fn symbol<F: Copy>(library: &libloading::Library, name: &CStr) -> Result<F, String> {
    // SAFETY: the caller vouches for the type.
    let found = unsafe { library.get::<F>(name.to_bytes_with_nul()) };
    found.map(|function| *function).map_err(|error| error.to_string())
}
