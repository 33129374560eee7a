//! What can be wrong with a call. Values never are: every bit pattern of every type has a defined result.

use thiserror::Error;

use crate::dtype::Dtype;

/// Memory, shapes or tables that do not fit together. Nothing has been written then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the messages say it
pub enum Error {
    #[error("{bytes} bytes end inside an element of {dtype}: pass a multiple of {}", .dtype.bytes())]
    PartialElement { dtype: Dtype, bytes: usize },
    #[error("{source_elements} elements do not fill {destination_elements}: pass equally many")]
    LengthMismatch { source_elements: usize, destination_elements: usize },
    #[error("a row of {columns} elements does not fit into a stride of {stride}: rows must not overlap")]
    StrideTooShort { columns: usize, stride: usize },
    #[error(
        "{} x {} elements with a stride of {stride} do not lie in {elements}: pass more memory or a smaller shape",
        .shape[0], .shape[1]
    )]
    MatrixTooShort { shape: [usize; 2], stride: usize, elements: usize },
    #[error("a block of {} x {} holds nothing: it needs a row and a column at least", .block[0], .block[1])]
    EmptyBlock { block: [u32; 2] },
    #[error("a tensor of {} x {} elements has more blocks than memory can hold", .shape[0], .shape[1])]
    TooManyBlocks { shape: [usize; 2] },
    #[error(
        "a rectangle of {} x {} at [{}, {}] is not inside {} x {} elements",
        .shape[0], .shape[1], .origin[0], .origin[1], .outer[0], .outer[1]
    )]
    Outside { origin: [usize; 2], shape: [usize; 2], outer: [usize; 2] },
    #[error("a source of {} x {} and a destination of {} x {}: pass equal shapes",
        .source_shape[0], .source_shape[1], .destination_shape[0], .destination_shape[1]
    )]
    ShapeMismatch { source_shape: [usize; 2], destination_shape: [usize; 2] },
    #[error(
        "a table of {found} entries for {} x {} blocks: it needs one entry for each block of the grid",
        .blocks[0], .blocks[1]
    )]
    TableLength { found: usize, blocks: [usize; 2] },
}
