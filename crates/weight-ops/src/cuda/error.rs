//! Why an operation cannot be made. Values never are the reason, as on the CPU.

use gpu_mem::Failed;
use thiserror::Error;

use crate::dtype::Dtype;
use crate::error::Error as ShapeError;

/// Memory and shapes that do not fit together, or a GPU that does not do its part. Nothing has been launched then.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the messages say it
pub enum Error {
    #[error(transparent)]
    Shape(#[from] ShapeError),
    #[error(transparent)]
    Gpu(#[from] gpu_mem::Error),
    #[error(
        "{what} at {address:#x} is not aligned to its elements of {element_bytes} bytes: move it, or copy it first"
    )]
    Misaligned { what: &'static str, address: u64, element_bytes: usize },
    #[error("{what} holds {found}, not {expected}: pass a matrix of that type")]
    WrongDtype { what: &'static str, found: Dtype, expected: &'static str },
    #[error("{bytes} bytes for {what}, not {expected}: pass a range of exactly that length")]
    WrongLength { what: &'static str, bytes: u64, expected: u64 },
    #[error(
        "blocks of {} x {} are too large to be quantised in one step, which takes up to 128 x 128: use block_amax, scales \
         and quantize_rect", .block[0], .block[1]
    )]
    BlockTooLarge { block: [usize; 2] },
    #[error("{count} blocks of threads are more than a launch can have: split the work")]
    TooMany { count: u64 },
    #[error("a region of number {region} was named, but there are {regions}")]
    NoSuchRegion { region: usize, regions: usize },
    #[error("{what} {index} does not end inside its region of {region_bytes} bytes")]
    OutsideRegion { what: &'static str, index: usize, region_bytes: u64 },
    #[error(
        "a box of {extent:?} at {origin:?} is not inside a tensor of {shape:?}: all need equally many dimensions"
    )]
    OutsideTensor { extent: Vec<u64>, origin: Vec<u64>, shape: Vec<u64> },
    #[error(
        "a box of {extent:?} needs {needed} strides beside its contiguous rows, but at most 3 are possible: split it"
    )]
    TooManyStrides { extent: Vec<u64>, needed: usize },
    #[error(
        "rows of box {index} may overlap where they are written: make strides reach over what is inside of them"
    )]
    Overlap { index: usize },
    #[error("more than {max} pieces of up to 8 KiB are to be copied at once: split the work")]
    TooManyPieces { max: u64 },
    #[error(
        "{memory} is mapped on another GPU, and nothing says that {on} may touch it: import its chunks on {on} \
         (VmmBuffer::export, Device::import_vmm), or copy it first (Stream::copy)"
    )]
    MappedElsewhere { memory: String, on: String },
    #[error("no multiprocessor may be used: allow at least one")]
    NoMultiprocessor,
}

impl<T> From<Failed<T>> for Error {
    fn from(failed: Failed<T>) -> Self {
        Error::Gpu(failed.error)
    }
}

/// Fails unless an address is a multiple of the element's size.
pub(crate) fn check_alignment(what: &'static str, address: u64, element_bytes: usize) -> Result<(), Error> {
    if address.is_multiple_of(element_bytes as u64) {
        Ok(())
    } else {
        Err(Error::Misaligned { what, address, element_bytes })
    }
}
