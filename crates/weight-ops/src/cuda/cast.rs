//! Casts on a device.

use gpu_mem::DeviceMemory;

use crate::cuda::Kernels;
use crate::cuda::error::{Error, check_alignment};
use crate::cuda::memory::{DeviceRange, elements};
use crate::cuda::operation::{Argument, Operation};
use crate::dtype::Dtype;
use crate::error::Error as ShapeError;

/// As in cast.cu: threads of a block, and elements that one of them converts.
const THREADS: u32 = 256;
const THREAD_ELEMENTS: u64 = 32;

impl Kernels {
    /// As [`cast_bytes`](crate::cast_bytes). It is fast where both ranges begin, or would after the same number of elements,
    /// at a multiple of 16 bytes (8 for [`Dtype::F8E4M3`]). The ranges must not overlap.
    ///
    /// # Errors
    /// When a range ends inside an element or is not aligned to its elements, or the numbers of elements differ.
    pub fn cast(
        &self,
        from: Dtype,
        source: &DeviceRange,
        to: Dtype,
        destination: &DeviceRange,
    ) -> Result<Operation, Error> {
        let (source_elements, destination_elements) = (elements(source, from)?, elements(destination, to)?);
        if source_elements != destination_elements {
            return Err(ShapeError::LengthMismatch { source_elements, destination_elements }.into());
        }
        check_alignment("the source", source.address(), from.bytes())?;
        check_alignment("the destination", destination.address(), to.bytes())?;
        let count = source_elements as u64;
        let function = self.cast.function(&format!("cast_{}_{}", kernel_name(from), kernel_name(to)))?;
        self.operation(
            function,
            count.div_ceil(u64::from(THREADS) * THREAD_ELEMENTS),
            THREADS,
            vec![Argument::U64(source.address()), Argument::U64(destination.address()), Argument::U64(count)],
            vec![source.clone(), destination.clone()],
        )
    }
}

/// How kernels call a type.
pub(crate) fn kernel_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bf16",
        Dtype::F16 => "f16",
        Dtype::F32 => "f32",
        Dtype::F8E4M3 => "e4m3",
    }
}
