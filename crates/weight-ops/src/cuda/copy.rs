//! Copies of many spans by one kernel, on a device or between devices.
//!
//! A copy engine takes about a microsecond for each span, so it is slow where they are short. From 8 MiB on it is as fast,
//! and leaves the multiprocessors free: see [`gpu_mem::Stream::copy`].

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use gpu_mem::{DeviceMemory, Stream};

use crate::cuda::Kernels;
use crate::cuda::error::Error;
use crate::cuda::memory::DeviceRange;
use crate::cuda::operation::{Argument, Operation};

/// As in copy.cu: one block on each multiprocessor.
pub(crate) const THREADS: u32 = 512;

/// What a warp copies at once: two rounds of 8 vectors of 16 bytes by each lane. Large enough for a descriptor of 24 bytes
/// not to count, small enough for few spans to reach all warps.
pub(crate) const PIECE_BYTES: u64 = 8 << 10;

/// Pieces of one operation or batch: 256 GiB of long spans, and lists of 768 MiB on the host.
const PIECES_MAX: u64 = 1 << 25;

/// Some bytes of one of the regions that are passed along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which region.
    pub region: usize,
    /// Bytes before, in the region.
    pub offset: u64,
}

/// Contiguous bytes to be copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// From where.
    pub source: Place,
    /// To where.
    pub destination: Place,
    /// How many.
    pub bytes: u64,
}

/// `Piece` of copy.cu.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Piece {
    source: u64,
    destination: u64,
    bytes: u64,
}

impl Kernels {
    /// Copies spans between `regions`, of any length and at any address. The list is brought to the device here, once.
    ///
    /// Regions may be those of peers: their memory is made accessible. Fastest is where a span's source and destination are
    /// equal modulo 16. At most `multiprocessors` are kept busy. What is written must not overlap with what is read or
    /// written by another span.
    ///
    /// # Errors
    /// When a span names no region or does not lie in its own, the list would be too long, or it cannot be brought to the
    /// device.
    pub fn copy_spans(
        &self,
        stream: &Stream,
        regions: &[DeviceRange],
        spans: &[Span],
        multiprocessors: u32,
    ) -> Result<Operation, Error> {
        let mut pieces = Vec::new();
        for (index, span) in spans.iter().enumerate() {
            let source = address_of(regions, span.source, span.bytes, "span", index)?;
            let destination = address_of(regions, span.destination, span.bytes, "span", index)?;
            cut(source, destination, span.bytes, &mut pieces)?;
        }
        let table = self.upload(stream, bytemuck::must_cast_slice(&pieces))?;
        let arguments = vec![Argument::U64(table.address()), Argument::U64(pieces.len() as u64)];
        let holds = [regions, &[table]].concat();
        let blocks = persistent_blocks(pieces.len() as u64, multiprocessors)?;
        self.operation(self.copy_spans.clone(), blocks, THREADS, arguments, holds)
    }

    /// Brings a table to the device, and waits until it is there: any stream may use it then.
    pub(crate) fn upload(&self, stream: &Stream, bytes: &[u8]) -> Result<DeviceRange, Error> {
        let len = bytes.len() as u64;
        let table = self.device().alloc(len)?;
        let all = [gpu_mem::Span::first(len)];
        let (_, table) = stream.copy_to_device(bytes.to_vec(), table, &all)?.wait()?;
        Ok(DeviceRange::whole(&Arc::new(table)))
    }
}

/// Blocks that stay until all pieces are copied: one for a multiprocessor, none that would find nothing to do.
pub(crate) fn persistent_blocks(pieces: u64, multiprocessors: u32) -> Result<u64, Error> {
    if multiprocessors == 0 {
        return Err(Error::NoMultiprocessor);
    }
    Ok(pieces.min(u64::from(multiprocessors)))
}

/// The address of `bytes` bytes of a region; `what` and `index` name who asks.
pub(crate) fn address_of(
    regions: &[DeviceRange],
    place: Place,
    bytes: u64,
    what: &'static str,
    index: usize,
) -> Result<u64, Error> {
    let Place { region, offset } = place;
    let range = regions.get(region).ok_or(Error::NoSuchRegion { region, regions: regions.len() })?;
    match offset.checked_add(bytes) {
        Some(end) if end <= range.len() => Ok(range.address() + offset),
        _ => Err(Error::OutsideRegion { what, index, region_bytes: range.len() }),
    }
}

/// Fails, before anything is allocated, when a list of `len` pieces has no room for `more`.
pub(super) fn check_pieces(len: usize, more: u64) -> Result<(), Error> {
    match more.checked_add(len as u64) {
        Some(count) if count <= PIECES_MAX => Ok(()),
        _ => Err(Error::TooManyPieces { max: PIECES_MAX }),
    }
}

/// Cuts a span into pieces. All but the first are written from a multiple of 16 on. None is added if there are too many.
pub(super) fn cut(
    mut source: u64,
    mut destination: u64,
    mut bytes: u64,
    pieces: &mut Vec<Piece>,
) -> Result<(), Error> {
    check_pieces(pieces.len(), bytes.saturating_add(destination % 16).div_ceil(PIECE_BYTES))?;
    while bytes > 0 {
        let len = bytes.min(PIECE_BYTES - destination % 16);
        pieces.push(Piece { source, destination, bytes: len });
        source += len;
        destination += len;
        bytes -= len;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_are_the_span(source in 1..1_000_000_u64, destination in 1..1_000_000_u64, bytes in 0..100_000_u64) {
            let mut pieces = Vec::new();
            cut(source, destination, bytes, &mut pieces).unwrap();
            let mut done = 0;
            for piece in &pieces {
                prop_assert_eq!((piece.source, piece.destination), (source + done, destination + done));
                prop_assert!(piece.bytes > 0 && piece.bytes <= PIECE_BYTES);
                prop_assert!(done == 0 || piece.destination % 16 == 0);
                done += piece.bytes;
            }
            prop_assert_eq!(done, bytes);
            prop_assert!(pieces.len() as u64 <= bytes.div_ceil(PIECE_BYTES) + 1);
        }
    }

    #[test]
    fn a_list_that_is_too_long_is_refused_before_it_is_made() {
        let mut pieces = Vec::new();
        let longest = PIECES_MAX * PIECE_BYTES;
        assert_eq!(check_pieces(0, longest.div_ceil(PIECE_BYTES)), Ok(()));
        for (destination, bytes) in [(1, longest), (16, longest + 1), (15, u64::MAX)] {
            let refused = cut(1, destination, bytes, &mut pieces);
            assert_eq!(refused, Err(Error::TooManyPieces { max: PIECES_MAX }));
        }
        assert_eq!(pieces.capacity(), 0);
        cut(1, 1, 1, &mut pieces).unwrap();
        assert!(cut(1, 16, longest, &mut pieces).is_err() && pieces.len() == 1);
    }

    #[test]
    fn no_more_blocks_than_pieces_or_multiprocessors() {
        assert_eq!(persistent_blocks(3, 16), Ok(3));
        assert_eq!(persistent_blocks(1 << 40, 16), Ok(16));
        assert_eq!(persistent_blocks(0, 16), Ok(0));
        assert_eq!(persistent_blocks(1, 0), Err(Error::NoMultiprocessor));
    }
}
