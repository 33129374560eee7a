//! Copies of boxes of tensors: gather, scatter, and fuse, which is both at once.
//!
//! A box is rows of equal length, wherever strides put them. Several boxes in one operation fuse several tensors into one.

use bytemuck::{Pod, Zeroable};
use gpu_mem::{DeviceMemory, Stream};

use crate::cuda::Kernels;
use crate::cuda::copy::{PIECE_BYTES, Place, THREADS, address_of, check_pieces, persistent_blocks};
use crate::cuda::error::Error;
use crate::cuda::memory::DeviceRange;
use crate::cuda::operation::{Argument, Operation};

/// Rows of equal length to be copied, from strided places to other strided places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BoxCopy {
    /// The first byte to be read.
    pub source: Place,
    /// The first byte to be written.
    pub destination: Place,
    /// Bytes of a row.
    pub row_bytes: u64,
    /// How many there are in each direction, the outermost first; 1 where there is no direction.
    pub counts: [u32; 3],
    /// Bytes from one row to the next in each direction of the source.
    pub source_strides: [u64; 3],
    /// The same of the destination. Rows must not overlap there: sorted by length, each stride of a direction with more than
    /// one row is as long as what the shorter ones reach over.
    pub destination_strides: [u64; 3],
}

/// Where a box lies in a row-major tensor.
#[derive(Clone, Copy, Debug)]
pub struct TensorBox<'a> {
    /// The tensor's first byte.
    pub tensor: Place,
    /// The tensor's length in each dimension.
    pub shape: &'a [u64],
    /// The box's first index in each dimension.
    pub origin: &'a [u64],
}

/// `Box` of copy.cu.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Descriptor {
    source: u64,
    destination: u64,
    source_strides: [u64; 3],
    destination_strides: [u64; 3],
    counts: [u32; 2],
    width: u32,
    padding: u32,
}

/// `BoxPiece` of copy.cu.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Piece {
    offset: u64,
    index: u32,
    first_row: u32,
    rows: u32,
    bytes: u32,
}

impl BoxCopy {
    /// The copy of a box of `extent` elements from one tensor to another. Dimensions in which both are contiguous become
    /// one.
    ///
    /// ```
    /// # use weight_ops::cuda::{BoxCopy, Place, TensorBox};
    /// // Columns 256 to 511 of 4096 x 1024 elements of 2 bytes, to rows of their own.
    /// let source = TensorBox { tensor: Place { region: 0, offset: 0 }, shape: &[4096, 1024], origin: &[0, 256] };
    /// let destination = TensorBox { tensor: Place { region: 1, offset: 0 }, shape: &[4096, 256], origin: &[0, 0] };
    /// let copy = BoxCopy::new(2, &[4096, 256], source, destination)?;
    /// assert_eq!((copy.row_bytes, copy.counts), (512, [1, 1, 4096]));
    /// # Ok::<(), weight_ops::cuda::Error>(())
    /// ```
    ///
    /// # Errors
    /// When the box is not inside a tensor, or needs more than 3 strides.
    pub fn new(
        element_bytes: u64,
        extent: &[u64],
        source: TensorBox<'_>,
        destination: TensorBox<'_>,
    ) -> Result<Self, Error> {
        let (first_source, source_strides) = source.locate(element_bytes, extent)?;
        let (first_destination, destination_strides) = destination.locate(element_bytes, extent)?;
        let mut row_bytes = element_bytes;
        // Count and strides of each direction, the innermost first.
        let mut directions: Vec<[u64; 3]> = Vec::new();
        let dims = extent.iter().zip(&source_strides).zip(&destination_strides).rev();
        for ((&count, &from), &to) in dims.filter(|((count, _), _)| **count != 1) {
            let follows = |stride: u64, run: u64| run.checked_mul(stride);
            match directions.last_mut() {
                None if from == row_bytes && to == row_bytes => row_bytes = row_bytes.saturating_mul(count),
                Some([len, inner_from, inner_to])
                    if follows(*inner_from, *len) == Some(from) && follows(*inner_to, *len) == Some(to) =>
                {
                    *len = len.saturating_mul(count);
                }
                _ => directions.push([count, from, to]),
            }
        }
        let needed = directions.len();
        let mut copy = Self {
            source: first_source,
            destination: first_destination,
            row_bytes,
            counts: [1; 3],
            source_strides: [0; 3],
            destination_strides: [0; 3],
        };
        let too_many = || Error::TooManyStrides { extent: extent.to_vec(), needed };
        for (index, [count, from, to]) in directions.into_iter().enumerate() {
            let direction = 2_usize.checked_sub(index).ok_or_else(too_many)?;
            copy.counts[direction] = u32::try_from(count).map_err(|_| Error::TooMany { count })?;
            copy.source_strides[direction] = from;
            copy.destination_strides[direction] = to;
        }
        Ok(copy)
    }

    /// How many rows there are, if a u32 counts them.
    pub(super) fn rows(&self) -> Result<u32, Error> {
        let rows = self.counts.iter().try_fold(1_u32, |rows, &count| rows.checked_mul(count));
        rows.ok_or(Error::TooMany { count: u64::from(u32::MAX) + 1 })
    }

    /// From the first byte to the last with these strides.
    fn reach(&self, strides: [u64; 3]) -> Option<u64> {
        self.counts.iter().zip(strides).try_fold(self.row_bytes, |reach, (&count, stride)| {
            reach.checked_add(u64::from(count.saturating_sub(1)).checked_mul(stride)?)
        })
    }

    /// Whether the destination's strides keep rows apart, as the field says.
    fn is_disjoint(&self) -> bool {
        let mut directions =
            [0, 1, 2].map(|direction| (self.destination_strides[direction], self.counts[direction]));
        directions.sort_unstable();
        let mut reach = self.row_bytes;
        directions.into_iter().filter(|(_, count)| *count > 1).all(|(stride, count)| {
            let apart = stride >= reach;
            reach = stride.saturating_mul(u64::from(count - 1)).saturating_add(reach);
            apart
        })
    }

    pub(super) fn describe(&self, regions: &[DeviceRange], index: usize) -> Result<Descriptor, Error> {
        // What overflows is outside of any region.
        let reach = |strides| self.reach(strides).unwrap_or(u64::MAX);
        if !self.is_disjoint() {
            return Err(Error::Overlap { index });
        }
        let source = address_of(regions, self.source, reach(self.source_strides), "box", index)?;
        let destination =
            address_of(regions, self.destination, reach(self.destination_strides), "box", index)?;
        let mut divided = 16 | source | destination | self.row_bytes;
        for (direction, _) in self.counts.iter().enumerate().filter(|(_, count)| **count > 1) {
            divided |= self.source_strides[direction] | self.destination_strides[direction];
        }
        Ok(Descriptor {
            source,
            destination,
            source_strides: self.source_strides,
            destination_strides: self.destination_strides,
            counts: [self.counts[1], self.counts[2]],
            width: 1 << divided.trailing_zeros(),
            padding: 0,
        })
    }
}

impl TensorBox<'_> {
    /// The box's first byte, and the strides of the tensor's dimensions in bytes.
    fn locate(&self, element_bytes: u64, extent: &[u64]) -> Result<(Place, Vec<u64>), Error> {
        let outside = || Error::OutsideTensor {
            extent: extent.to_vec(),
            origin: self.origin.to_vec(),
            shape: self.shape.to_vec(),
        };
        if self.shape.len() != extent.len() || self.origin.len() != extent.len() {
            return Err(outside());
        }
        let (mut stride, mut place) = (element_bytes, self.tensor);
        let mut strides = Vec::with_capacity(extent.len());
        for ((&len, &first), &count) in self.shape.iter().zip(self.origin).zip(extent).rev() {
            if first.checked_add(count).is_none_or(|end| end > len) {
                return Err(outside());
            }
            strides.push(stride);
            let skipped = first.checked_mul(stride).and_then(|bytes| place.offset.checked_add(bytes));
            place.offset = skipped.ok_or_else(outside)?;
            stride = stride.checked_mul(len).ok_or_else(outside)?;
        }
        strides.reverse();
        Ok((place, strides))
    }
}

impl Kernels {
    /// Copies boxes between `regions`. The list is brought to the device here, once.
    ///
    /// Regions may be those of peers. At most `multiprocessors` are kept busy. What is written must not overlap with what is
    /// read or written elsewhere.
    ///
    /// Rows of 512 bytes and more are copied like spans. Shorter ones move in units of the largest power of two, up to 16,
    /// that divides their addresses and lengths.
    ///
    /// # Errors
    /// When a box names no region or does not lie in its own, has more than 2^32 - 1 rows or rows that overlap where they are
    /// written, the list would be too long, or it cannot be brought to the device.
    pub fn copy_boxes(
        &self,
        stream: &Stream,
        regions: &[DeviceRange],
        boxes: &[BoxCopy],
        multiprocessors: u32,
    ) -> Result<Operation, Error> {
        let mut descriptors: Vec<Descriptor> = Vec::new();
        let mut pieces = Vec::new();
        for (index, copy) in boxes.iter().enumerate() {
            let rows = copy.rows()?;
            if rows > 0 && copy.row_bytes > 0 {
                let descriptor = copy.describe(regions, index)?;
                let number =
                    u32::try_from(descriptors.len()).map_err(|_| Error::TooMany { count: index as u64 })?;
                descriptors.push(descriptor);
                cut(number, rows, copy.row_bytes, &mut pieces)?;
            }
        }
        let table = self.upload(stream, bytemuck::must_cast_slice(&descriptors))?;
        let list = self.upload(stream, bytemuck::must_cast_slice(&pieces))?;
        let count = pieces.len() as u64;
        let arguments =
            vec![Argument::U64(table.address()), Argument::U64(list.address()), Argument::U64(count)];
        let holds = [regions, &[table, list]].concat();
        let blocks = persistent_blocks(count, multiprocessors)?;
        self.operation(self.copy_boxes.clone(), blocks, THREADS, arguments, holds)
    }
}

/// Cuts a box into pieces: some whole rows, or a part of one. None is added if there are too many.
pub(super) fn cut(index: u32, rows: u32, row_bytes: u64, pieces: &mut Vec<Piece>) -> Result<(), Error> {
    let piece_rows = u32::try_from(PIECE_BYTES / row_bytes).unwrap_or(u32::MAX).max(1);
    let parts = row_bytes.div_ceil(PIECE_BYTES);
    check_pieces(pieces.len(), u64::from(rows.div_ceil(piece_rows)).saturating_mul(parts))?;
    let mut first_row = 0;
    while first_row < rows {
        let rows = piece_rows.min(rows - first_row);
        let mut offset = 0;
        while offset < row_bytes {
            let bytes = PIECE_BYTES.min(row_bytes - offset) as u32;
            pieces.push(Piece { offset, index, first_row, rows, bytes });
            offset += u64::from(bytes);
        }
        first_row += rows;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The byte offsets that a copy reads and writes, pair by pair.
    fn pairs(copy: &BoxCopy) -> Vec<(u64, u64)> {
        let mut pairs = Vec::new();
        for outer in 0..u64::from(copy.counts[0]) {
            for middle in 0..u64::from(copy.counts[1]) {
                for inner in 0..u64::from(copy.counts[2]) {
                    let at = |place: Place, strides: [u64; 3]| {
                        place.offset + outer * strides[0] + middle * strides[1] + inner * strides[2]
                    };
                    let source = at(copy.source, copy.source_strides);
                    let destination = at(copy.destination, copy.destination_strides);
                    pairs.extend((0..copy.row_bytes).map(|byte| (source + byte, destination + byte)));
                }
            }
        }
        pairs
    }

    /// The same from the indices of each element.
    fn pairs_by_index(
        bytes: u64,
        extent: &[u64],
        source: TensorBox<'_>,
        destination: TensorBox<'_>,
    ) -> Vec<(u64, u64)> {
        let count: u64 = extent.iter().product();
        let mut pairs = Vec::new();
        for element in 0..count {
            let mut rest = element;
            let mut index = vec![0; extent.len()];
            for (at, &len) in index.iter_mut().zip(extent).rev() {
                *at = rest % len;
                rest /= len;
            }
            let offset = |tensor: TensorBox<'_>| {
                let dims = tensor.shape.iter().zip(tensor.origin).zip(&index);
                tensor.tensor.offset + dims.fold(0, |sum, ((len, first), at)| sum * len + first + at) * bytes
            };
            pairs.extend((0..bytes).map(|byte| (offset(source) + byte, offset(destination) + byte)));
        }
        pairs
    }

    proptest! {
        #[test]
        fn every_byte_of_a_box_once(
            dims in prop::collection::vec((1..4_u64, 0..3_u64, 0..3_u64, 0..3_u64, 0..3_u64), 0..5),
            bytes in 1..5_u64,
            offsets: [u8; 2],
        ) {
            let extent: Vec<u64> = dims.iter().map(|dim| dim.0).collect();
            let shapes: [Vec<u64>; 2] =
                [dims.iter().map(|d| d.0 + d.1 + d.2).collect(), dims.iter().map(|d| d.0 + d.3 + d.4).collect()];
            let origins: [Vec<u64>; 2] = [dims.iter().map(|d| d.1).collect(), dims.iter().map(|d| d.3).collect()];
            let tensor = |which: usize| TensorBox {
                tensor: Place { region: which, offset: u64::from(offsets[which]) },
                shape: &shapes[which],
                origin: &origins[which],
            };
            match BoxCopy::new(bytes, &extent, tensor(0), tensor(1)) {
                Ok(copy) => {
                    let (mut ours, mut theirs) = (pairs(&copy), pairs_by_index(bytes, &extent, tensor(0), tensor(1)));
                    ours.sort_unstable();
                    theirs.sort_unstable();
                    prop_assert_eq!(&ours, &theirs);
                    prop_assert!(copy.is_disjoint());
                    let last = |strides| copy.reach(strides).unwrap() - 1;
                    prop_assert_eq!(copy.source.offset + last(copy.source_strides), ours.iter().map(|p| p.0).max().unwrap());
                    prop_assert_eq!(
                        copy.destination.offset + last(copy.destination_strides),
                        ours.iter().map(|p| p.1).max().unwrap()
                    );
                }
                Err(error) => {
                    let many = matches!(error, Error::TooManyStrides { .. });
                    prop_assert!(many && extent.iter().filter(|&&count| count > 1).count() > 3, "{}", error);
                }
            }
        }

        #[test]
        fn rows_that_overlap_are_refused(
            row_bytes in 1..5_u64,
            counts: [u8; 3],
            destination_strides in [0..40_u64, 0..40_u64, 0..40_u64],
        ) {
            let (place, counts) = (Place { region: 0, offset: 0 }, counts.map(|count| u32::from(count % 4)));
            let source_strides = [0; 3];
            let copy = BoxCopy { source: place, destination: place, row_bytes, counts, source_strides, destination_strides };
            let mut written: Vec<u64> = pairs(&copy).into_iter().map(|pair| pair.1).collect();
            let bytes = written.len();
            written.sort_unstable();
            written.dedup();
            prop_assert!(!copy.is_disjoint() || written.len() == bytes);
        }

        #[test]
        fn pieces_are_the_box(rows in 1..300_u32, row_bytes in prop_oneof![1..2000_u64, 2000..60_000_u64]) {
            let mut pieces = Vec::new();
            cut(7, rows, row_bytes, &mut pieces).unwrap();
            let mut done = vec![0_u64; rows as usize];
            for piece in &pieces {
                prop_assert!(piece.index == 7 && piece.bytes > 0 && u64::from(piece.rows * piece.bytes) <= PIECE_BYTES);
                for row in &mut done[piece.first_row as usize..(piece.first_row + piece.rows) as usize] {
                    prop_assert_eq!(*row, piece.offset);
                    *row += u64::from(piece.bytes);
                }
            }
            prop_assert!(done.iter().all(|&bytes| bytes == row_bytes));
        }
    }

    #[test]
    fn a_list_that_is_too_long_is_refused_before_it_is_made() {
        let mut pieces = Vec::new();
        for (rows, row_bytes) in [(u32::MAX, PIECE_BYTES), (u32::MAX, u64::MAX), (1, u64::MAX)] {
            assert!(matches!(cut(0, rows, row_bytes, &mut pieces), Err(Error::TooManyPieces { .. })));
        }
        assert_eq!(pieces.capacity(), 0);
    }

    #[test]
    fn boxes_that_do_not_fit_are_refused() {
        let tensor = |shape, origin| TensorBox { tensor: Place { region: 0, offset: 0 }, shape, origin };
        let whole = || tensor(&[4, 4], &[0, 0]);
        let outside = BoxCopy::new(2, &[4, 4], whole(), tensor(&[4, 4], &[0, 1])).unwrap_err();
        assert_eq!(
            outside,
            Error::OutsideTensor { extent: vec![4, 4], origin: vec![0, 1], shape: vec![4, 4] }
        );
        assert!(BoxCopy::new(2, &[4], whole(), whole()).is_err());
        let huge = tensor(&[u64::MAX, u64::MAX], &[1, 1]);
        assert!(BoxCopy::new(2, &[1, 1], huge, huge).is_err());
        // Nothing is contiguous from one dimension to the next.
        let (wide, narrow) = (tensor(&[9; 5], &[0; 5]), tensor(&[8; 5], &[0; 5]));
        let error = BoxCopy::new(1, &[2; 5], wide, narrow).unwrap_err();
        assert_eq!(error, Error::TooManyStrides { extent: vec![2; 5], needed: 4 });
    }
}
