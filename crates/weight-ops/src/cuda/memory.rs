//! Device memory as operations take it: ranges that keep their memory allocated, and matrices in them.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use gpu_mem::{Device, DeviceMemory};

use crate::cuda::error::{Error, check_alignment};
use crate::dtype::Dtype;
use crate::error::Error as ShapeError;
use crate::matrix::Layout;

/// Some bytes of device memory, themselves [`DeviceMemory`]. Clones share the memory; it is freed after the last of them, and of the operations on it.
#[derive(Clone)]
pub struct DeviceRange {
    memory: Arc<dyn DeviceMemory + Sync>,
    start: u64,
    len: u64,
}

impl DeviceRange {
    /// The bytes of `range`.
    ///
    /// # Errors
    /// When they are not inside the memory.
    pub fn new<M: DeviceMemory + Sync>(memory: &Arc<M>, range: Range<u64>) -> Result<Self, Error> {
        Self::whole(memory).part(range)
    }

    /// All bytes.
    pub fn whole<M: DeviceMemory + Sync>(memory: &Arc<M>) -> Self {
        let len = M::len(memory);
        let memory: Arc<dyn DeviceMemory + Sync> = Arc::<M>::clone(memory);
        Self { memory, start: 0, len }
    }

    /// The bytes of `range`, counted from the first byte of this one.
    ///
    /// # Errors
    /// When they are not inside this range.
    pub fn part(&self, range: Range<u64>) -> Result<Self, Error> {
        if range.start > range.end || range.end > self.len {
            let len = range.end.saturating_sub(range.start);
            return Err(gpu_mem::Error::Range { offset: range.start, len, available: self.len }.into());
        }
        let memory = Arc::clone(&self.memory);
        Ok(Self { memory, start: self.start + range.start, len: range.end - range.start })
    }

    /// All bytes of the memory that this is a part of.
    pub(crate) fn memory(&self) -> Self {
        Self { memory: Arc::clone(&self.memory), start: 0, len: self.memory.len() }
    }

    /// Whether both are parts of one memory, so that each keeps it allocated.
    pub(crate) fn is_of_memory(&self, other: &Self) -> bool {
        std::ptr::addr_eq(Arc::as_ptr(&self.memory), Arc::as_ptr(&other.memory))
    }
}

// SAFETY: the memory stays allocated while this holds it, and its answers never change; the bytes were checked to be inside.
#[allow(unsafe_code)]
unsafe impl DeviceMemory for DeviceRange {
    fn device(&self) -> &Device {
        self.memory.device()
    }

    fn address(&self) -> u64 {
        self.memory.address().wrapping_add(self.start) // wraps for no memory at all, of which nothing is touched
    }

    fn len(&self) -> u64 {
        self.len
    }
}

impl fmt::Debug for DeviceRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceRange({:#x}, {} bytes, {})", self.address(), self.len, self.device())
    }
}

/// A row-major matrix on a device. Its rows begin `stride` elements apart.
#[derive(Clone, Debug)]
pub struct DeviceMatrix {
    range: DeviceRange,
    dtype: Dtype,
    layout: Layout,
}

impl DeviceMatrix {
    /// `shape` is rows by columns, `stride` is in elements; it is the number of columns where rows follow each other.
    ///
    /// # Errors
    /// When `stride` is less than a row, the range ends before the last row does or inside an element, or it is not aligned to
    /// its elements.
    pub fn new(range: &DeviceRange, dtype: Dtype, shape: [usize; 2], stride: usize) -> Result<Self, Error> {
        let elements = elements(range, dtype)?;
        let layout = Layout::new(shape, stride, elements)?;
        check_alignment("a matrix", range.address(), dtype.bytes())?;
        Ok(Self { range: range.clone(), dtype, layout })
    }

    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        self.layout.shape
    }

    /// The type of the elements.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The memory from the first element on.
    pub fn range(&self) -> &DeviceRange {
        &self.range
    }

    pub(crate) fn stride(&self) -> usize {
        self.layout.stride
    }
}

/// How many elements a range holds.
pub(crate) fn elements(range: &DeviceRange, dtype: Dtype) -> Result<usize, Error> {
    let bytes = usize::try_from(range.len()).unwrap_or(usize::MAX);
    if bytes.is_multiple_of(dtype.bytes()) {
        Ok(bytes / dtype.bytes())
    } else {
        Err(ShapeError::PartialElement { dtype, bytes }.into())
    }
}
