//! Loaded machine code, its kernels, and how one is launched.

use std::ffi::{c_int, c_void};
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::sys;
use cudarc::driver::sys::CUfunction_attribute as Attribute;

use crate::call::cu;
use crate::device::Device;
use crate::error::Error;
use crate::nvrtc::c_string;
use crate::reaper::Handle;
use crate::stream::Stream;

/// Kernels have at most 32764 bytes of parameters (CUDA 12.1), so this many is beyond all.
const PARAMETERS_MAX: usize = 4096;

/// Machine code on a device. Clones share it; it is unloaded with the last of them and of its functions.
#[derive(Clone)]
pub struct Module(Arc<Inner>);

struct Inner {
    device: Device,
    name: String,
    handle: sys::CUmodule,
}

// SAFETY: the module is a handle that the driver looks up, from any thread.
unsafe impl Send for Inner {}
// SAFETY: as above; the rest is constant.
unsafe impl Sync for Inner {}

/// A kernel of a module.
#[derive(Clone)]
pub struct Function {
    module: Module,
    name: String,
    handle: sys::CUfunction,
    /// The sizes of its parameters in bytes; `None` where the driver is too old to tell (before 12.4).
    parameters: Option<Vec<usize>>,
}

// SAFETY: as the module's handle, which it keeps alive.
unsafe impl Send for Function {}
// SAFETY: as above; the rest is constant.
unsafe impl Sync for Function {}

/// How many threads run a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks, in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block, in x, y and z.
    pub block: [u32; 3],
    /// Bytes of shared memory of a block, beside what the kernel declares.
    pub shared_bytes: u32,
}

impl Launch {
    /// So many blocks of so many threads, in one dimension.
    pub fn linear(blocks: u32, threads: u32) -> Self {
        Self { grid: [blocks, 1, 1], block: [threads, 1, 1], shared_bytes: 0 }
    }
}

/// One argument of a kernel: a value, which is copied when the kernel is launched. A pointer into device memory is a `u64`.
#[derive(Clone, Copy)]
pub struct Arg<'a> {
    value: *mut c_void,
    bytes: usize,
    lives: PhantomData<&'a ()>,
}

impl<'a> Arg<'a> {
    /// Passes a value as it lies in memory: an integer, a float, or a `#[repr(C)]` struct of them.
    pub fn new<T: Copy>(value: &'a T) -> Self {
        Self { value: std::ptr::from_ref(value).cast_mut().cast(), bytes: size_of::<T>(), lives: PhantomData }
    }
}

impl Module {
    /// Loads machine code (a cubin), or PTX that ends in a zero byte.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when it is not for this device or for a newer driver.
    pub(crate) fn load(device: &Device, name: &str, image: &[u8]) -> Result<Self, Error> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: NVRTC made the image, and it was kept whole; it tells its own length.
        device.run(|| unsafe { cu!(cuModuleLoadData(&raw mut handle, image.as_ptr().cast())) })?;
        Ok(Self(Arc::new(Inner { device: device.clone(), name: name.to_owned(), handle })))
    }

    /// A kernel by the name that it has in C.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when there is none of this name.
    pub fn function(&self, name: &str) -> Result<Function, Error> {
        let c_name = c_string("the kernel's name", name)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the module is loaded; the text ends in zero; the driver writes one handle.
        let found = || unsafe { cu!(cuModuleGetFunction(&raw mut handle, self.0.handle, c_name.as_ptr())) };
        self.0.device.run(found).map_err(|error| match error {
            Error::Call(mut call) => {
                call.on = format!("{} for kernel {name} of {}", call.on, self.0.name);
                Error::Call(call)
            }
            other => other,
        })?;
        let parameters = parameters(&self.0.device, handle)?;
        Ok(Function { module: self.clone(), name: name.to_owned(), handle, parameters })
    }

    /// The device that it is loaded on.
    pub fn device(&self) -> &Device {
        &self.0.device
    }
}

/// The sizes of a kernel's parameters, where the driver tells.
fn parameters(device: &Device, function: sys::CUfunction) -> Result<Option<Vec<usize>>, Error> {
    let mut sizes = Vec::new();
    while sizes.len() < PARAMETERS_MAX {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the function's module is loaded; the driver writes two lengths.
        let told =
            || unsafe { cu!(cuFuncGetParamInfo(function, sizes.len(), &raw mut offset, &raw mut size)) };
        match device.run(told) {
            Ok(()) => sizes.push(size),
            Err(Error::MissingCall { .. }) => return Ok(None),
            Err(lost @ Error::DeviceLost { .. }) => return Err(lost),
            // There are no more: the driver calls the index invalid.
            Err(_) => break,
        }
    }
    Ok(Some(sizes))
}

impl Function {
    /// The name that it has in C.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Registers of a thread, bytes of local memory (spills) of a thread, and bytes of static shared memory of a block.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when the driver does not answer.
    pub fn resources(&self) -> Result<Resources, Error> {
        Ok(Resources {
            registers: self.attribute(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            local_bytes: self.attribute(Attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            shared_bytes: self.attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
        })
    }

    /// Allows launches with up to so many bytes of shared memory beside what the kernel declares; without, 48 KiB in all.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when a block cannot have so many.
    pub fn allow_shared_bytes(&self, bytes: u32) -> Result<(), Error> {
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let value = c_int::try_from(bytes).unwrap_or(c_int::MAX);
        // SAFETY: the function's module is loaded.
        self.device().run(|| unsafe { cu!(cuFuncSetAttribute(self.handle, attribute, value)) })
    }

    /// How many blocks of `threads` threads and `shared_bytes` dynamic shared memory fit on a multiprocessor at a time.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when the driver does not answer.
    pub fn blocks_per_multiprocessor(&self, threads: u32, shared_bytes: u32) -> Result<u32, Error> {
        let mut blocks = 0;
        let threads = c_int::try_from(threads).unwrap_or(c_int::MAX);
        // SAFETY: the function's module is loaded; the driver writes one integer.
        self.device().run(|| unsafe {
            cu!(cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &raw mut blocks,
                self.handle,
                threads,
                shared_bytes as usize
            ))
        })?;
        Ok(u32::try_from(blocks).unwrap_or(0))
    }

    /// Puts the kernel on a stream. The number and sizes of the arguments are checked where the driver tells them;
    /// errors of the kernel itself come with a later call.
    ///
    /// # Errors
    ///
    /// [`Error::Arguments`]; [`Error::WrongDevice`] for a stream of another device; [`Error::Call`] for a shape that the
    /// device does not run.
    ///
    /// # Safety
    ///
    /// The arguments are of the types that the kernel declares. All memory that the kernel reaches through them is
    /// initialised where it reads, stays allocated until the stream has passed this point ([`Stream::hold`] sees to
    /// it), and nobody else uses it meanwhile in a way that the kernel does not expect.
    pub unsafe fn launch(&self, stream: &Stream, launch: Launch, args: &[Arg<'_>]) -> Result<(), Error> {
        if !stream.device().same_as(self.device()) {
            return Err(Error::WrongDevice {
                what: format!("kernel {}", self.name),
                found: self.device().to_string(),
                expected: stream.device().to_string(),
            });
        }
        if let Some(takes) = &self.parameters
            && !takes.iter().copied().eq(args.iter().map(|arg| arg.bytes))
        {
            return Err(Error::Arguments {
                kernel: self.name.clone(),
                takes: format!("{takes:?}"),
                given: format!("{:?}", args.iter().map(|arg| arg.bytes).collect::<Vec<_>>()),
            });
        }
        let mut values: Vec<*mut c_void> = args.iter().map(|arg| arg.value).collect();
        let ([gx, gy, gz], [bx, by, bz], shared) = (launch.grid, launch.block, launch.shared_bytes);
        let (values, none) = (values.as_mut_ptr(), std::ptr::null_mut());
        // SAFETY: the module is loaded; the driver reads each value before it returns; the caller answers for the rest.
        self.device().run(|| unsafe {
            cu!(cuLaunchKernel(self.handle, gx, gy, gz, bx, by, bz, shared, stream.raw(), values, none))
        })
    }

    fn device(&self) -> &Device {
        &self.module.0.device
    }

    fn attribute(&self, attribute: Attribute) -> Result<u32, Error> {
        let mut value = 0;
        // SAFETY: the function's module is loaded; the driver writes one integer.
        self.device().run(|| unsafe { cu!(cuFuncGetAttribute(&raw mut value, attribute, self.handle)) })?;
        Ok(u32::try_from(value).unwrap_or(0))
    }
}

/// What a kernel needs of a multiprocessor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resources {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of local memory of a thread: more than 0 most often means spilled registers.
    pub local_bytes: u32,
    /// Bytes of shared memory of a block, as the kernel declares them.
    pub shared_bytes: u32,
}

impl fmt::Debug for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Module({}, {})", self.0.name, self.0.device)
    }
}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Function({}, {})", self.name, self.device())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let handle = Handle(self.handle);
        // SAFETY: loaded by `load`, and no function of it is left. CUDA waits for its kernels before it unloads.
        self.device.release_later("a module", move || unsafe { cu!(cuModuleUnload(handle.get())) });
    }
}
