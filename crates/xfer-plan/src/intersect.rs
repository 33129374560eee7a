//! From boxes to bytes: the strided rows that carry one rectangle of a tensor from a piece into a parameter.
//!
//! Both memories are row-major, each with its own strides. Dimensions over which both sides are contiguous
//! melt into one row; the next dimension repeats the row at a fixed stride; what is left are separate
//! segments.

use smallvec::SmallVec;

use crate::ids::{ParamId, ReceiverRank};
use crate::manifest::{DestinationParam, SourcePiece};
use crate::plan::Strided;
use crate::tensor_box::TensorBox;

/// Rows from one piece to one parameter, of any length: an operation before it is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) to: ReceiverRank,
    pub(crate) param: ParamId,
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

/// Calls `emit` for the segments that copy `bounds`, in the tensor's indices and inside `piece`, to `result`,
/// in the parameter's indices. Both boxes have the same shape and are not empty.
///
/// The manifest has been validated: every product and sum here is at most a region's length.
pub(crate) fn segments<E>(
    piece: &SourcePiece,
    bounds: &TensorBox,
    param: &DestinationParam,
    result: &TensorBox,
    (to, param_id): (ReceiverRank, ParamId),
    emit: &mut dyn FnMut(Segment) -> Result<(), E>,
) -> Result<(), E> {
    let element_bytes = piece.dtype.bytes();
    let mut source = Strided { region: piece.region, offset: piece.offset, stride: element_bytes };
    let mut destination = Strided { region: param.region, offset: param.offset, stride: element_bytes };
    let mut row_bytes = element_bytes;
    let mut loops: SmallVec<[Loop; 4]> = SmallVec::new();
    let dims = bounds.start().zip(bounds.len()).zip(piece.bounds.start().zip(piece.bounds.len()));
    let dims = dims.zip(result.start().zip(&param.shape));
    for (((first, len), (piece_first, piece_len)), (result_first, &param_len)) in dims.rev() {
        source.offset += (first - piece_first) * source.stride;
        destination.offset += result_first * destination.stride;
        match loops.last_mut() {
            _ if len == 1 => {}
            None if source.stride == row_bytes && destination.stride == row_bytes => row_bytes *= len,
            Some(inner)
                if source.stride == inner.source * inner.len
                    && destination.stride == inner.destination * inner.len =>
            {
                inner.len *= len;
            }
            _ => loops.push(Loop { len, source: source.stride, destination: destination.stride }),
        }
        source.stride *= piece_len;
        destination.stride *= param_len;
    }

    let mut loops = loops.into_iter();
    let rows = loops.next().unwrap_or(Loop { len: 1, source: row_bytes, destination: row_bytes });
    source.stride = rows.source;
    destination.stride = rows.destination;
    let outer: SmallVec<[Loop; 4]> = loops.collect();
    let mut step: SmallVec<[u64; 4]> = SmallVec::from_elem(0, outer.len());
    loop {
        emit(Segment { to, param: param_id, row_bytes, rows: rows.len, source, destination })?;
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
