//! From boxes to bytes: the strided rows that carry one rectangle of a tensor from a piece into a parameter.
//!
//! Both memories are row-major, each with its own strides. Dimensions over which both sides are contiguous
//! melt into one row; the next dimension repeats the row at a fixed stride; what is left are separate
//! segments.

use smallvec::SmallVec;

use crate::ids::RegionIndex;
use crate::plan::Strided;
use crate::tensor_box::TensorBox;

/// Rows from one memory to another, of any length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// At the destination.
    pub(crate) row_bytes: u64,
    pub(crate) rows: u64,
    pub(crate) source: Strided,
    pub(crate) destination: Strided,
}

/// A loop over one dimension, or over several that melted: `len` steps of the given strides, in bytes.
struct Loop {
    len: u64,
    source: u64,
    destination: u64,
}

/// Where a row-major box of elements lies.
pub(crate) struct Place<'a> {
    pub(crate) region: RegionIndex,
    pub(crate) offset: u64,
    pub(crate) element_bytes: u64,
    /// What lies there, in the indices of the tensor (or of the parameter).
    pub(crate) bounds: &'a TensorBox,
}

impl Place<'_> {
    fn strided(&self) -> Strided {
        Strided { region: self.region, offset: self.offset, stride: self.element_bytes }
    }
}

/// Calls `emit` for the segments that copy `bounds`, in the indices of `from`, to `result`, in those of `to`. Both boxes
/// have the same shape, lie within their places, and are not empty.
///
/// The manifest has been validated: every product and sum here is at most a region's length.
pub(crate) fn segments<E>(
    from: &Place<'_>,
    bounds: &TensorBox,
    to: &Place<'_>,
    result: &TensorBox,
    emit: &mut dyn FnMut(Segment) -> Result<(), E>,
) -> Result<(), E> {
    let (mut source, mut destination) = (from.strided(), to.strided());
    let mut row = 1; // elements
    let mut loops: SmallVec<[Loop; 4]> = SmallVec::new();
    let outer = |place: &TensorBox, part: &TensorBox| -> SmallVec<[(u64, u64); 4]> {
        let first = part.start().zip(place.start()).map(|(part, place)| part - place);
        first.zip(place.len()).collect()
    };
    let (source_dims, destination_dims) = (outer(from.bounds, bounds), outer(to.bounds, result));
    let dims = bounds.len().zip(source_dims.iter().zip(&destination_dims));
    for (len, (&(source_first, source_len), &(destination_first, destination_len))) in dims.rev() {
        source.offset += source_first * source.stride;
        destination.offset += destination_first * destination.stride;
        let contiguous =
            source.stride == row * from.element_bytes && destination.stride == row * to.element_bytes;
        match loops.last_mut() {
            _ if len == 1 => {}
            None if contiguous => row *= len,
            Some(inner)
                if source.stride == inner.source * inner.len
                    && destination.stride == inner.destination * inner.len =>
            {
                inner.len *= len;
            }
            _ => loops.push(Loop { len, source: source.stride, destination: destination.stride }),
        }
        source.stride *= source_len;
        destination.stride *= destination_len;
    }
    let (source_bytes, row_bytes) = (row * from.element_bytes, row * to.element_bytes);

    let mut loops = loops.into_iter();
    let rows = loops.next().unwrap_or(Loop { len: 1, source: source_bytes, destination: row_bytes });
    source.stride = rows.source;
    destination.stride = rows.destination;
    let outer: SmallVec<[Loop; 4]> = loops.collect();
    let mut step: SmallVec<[u64; 4]> = SmallVec::from_elem(0, outer.len());
    loop {
        emit(Segment { row_bytes, rows: rows.len, source, destination })?;
        // Count up like an odometer: the innermost of the outer loops first.
        let mut carry = true;
        for (step, repeat) in step.iter_mut().zip(&outer) {
            if *step + 1 < repeat.len {
                *step += 1;
                source.offset += repeat.source;
                destination.offset += repeat.destination;
                carry = false;
                break;
            }
            source.offset -= *step * repeat.source;
            destination.offset -= *step * repeat.destination;
            *step = 0;
        }
        if carry {
            return Ok(());
        }
    }
}
