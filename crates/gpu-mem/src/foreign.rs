//! Memory of a framework, for as long as its owner is held.
//!
//! The owner (a tensor, a reference to one) goes in by value: its segments stay allocated while it lives, for an allocator
//! frees a segment only when nothing lies in it. Whether that was kept is checked against the driver's names, so that
//! memory which was freed all the same is told by name instead of being written to.

use std::sync::Arc;

use crate::device::Device;
use crate::error::{Error, Failed};
use crate::memory::{DeviceMemory, Registrable};
use crate::segment::Segments;

/// Ranges of a device's memory, the segments that they lie in, and what keeps them allocated.
#[derive(Debug)]
pub struct Foreign<O> {
    device: Device,
    ranges: Vec<(u64, u64)>,
    segments: Segments,
    owner: O,
}

impl Device {
    /// Takes over the right to use memory that somebody else has allocated (address and length in bytes of each range).
    ///
    /// # Errors
    ///
    /// [`Failed`] with the owner, as [`Device::segments`].
    ///
    /// # Safety
    ///
    /// While `owner` lives, each range stays allocated, and nobody uses its bytes in a way that the copies and NICs that
    /// are given it do not expect. Where a [`ForeignSegment`] is registered, its NIC and the peers that are told of it
    /// can reach every byte of that segment, of other owners too: they must keep to the ranges.
    pub unsafe fn adopt<O: Send + Sync + 'static>(
        &self,
        ranges: Vec<(u64, u64)>,
        owner: O,
    ) -> Result<Foreign<O>, Failed<O>> {
        match self.segments(&ranges) {
            Ok(segments) => Ok(Foreign { device: self.clone(), ranges, segments, owner }),
            Err(error) => Err(Failed::with(error, owner)),
        }
    }
}

impl<O: Send + Sync + 'static> Foreign<O> {
    /// The segments that the ranges lie in.
    pub fn segments(&self) -> &Segments {
        &self.segments
    }

    /// The owner.
    pub fn owner(&self) -> &O {
        &self.owner
    }

    /// Checks that every segment is still the one that was found. To be called before a version is pushed.
    ///
    /// # Errors
    ///
    /// [`Error::Freed`] names the first that is not.
    pub fn check(&self) -> Result<(), Error> {
        self.segments.iter().try_for_each(|segment| self.device.check_segment(segment))
    }

    /// A range that was adopted, by its number: what copies take.
    pub fn range(self: &Arc<Self>, index: usize) -> Option<ForeignRange<O>> {
        let &(address, len) = self.ranges.get(index)?;
        Some(ForeignRange { of: Arc::clone(self), address, len })
    }

    /// A whole segment, by its number: what is registered with a NIC.
    pub fn segment(self: &Arc<Self>, index: usize) -> Option<ForeignSegment<O>> {
        let range = &self.segments.iter().nth(index)?.range;
        Some(ForeignSegment { of: Arc::clone(self), address: range.start, len: range.end - range.start })
    }
}

/// A part of foreign memory, which keeps all of its owner.
#[derive(Debug)]
pub struct ForeignRange<O> {
    of: Arc<Foreign<O>>,
    address: u64,
    len: u64,
}

/// A whole segment that foreign memory lies in, which keeps all of its owner. It is registered with NICs, and never copied:
/// nobody has answered for what lies beside the ranges.
#[derive(Debug)]
pub struct ForeignSegment<O> {
    of: Arc<Foreign<O>>,
    address: u64,
    len: u64,
}

// SAFETY: a segment is allocated as long as any range in it is, for allocators free, and unmap, whole segments; `adopt`'s
// caller answers for the ranges while the owner lives, which this holds.
unsafe impl<O: Send + Sync + 'static> Registrable for ForeignSegment<O> {
    fn device(&self) -> &Device {
        &self.of.device
    }

    fn address(&self) -> u64 {
        self.address
    }

    fn len(&self) -> u64 {
        self.len
    }
}

// SAFETY: `adopt`'s caller answers for the ranges while the owner lives, which this holds.
unsafe impl<O: Send + Sync + 'static> DeviceMemory for ForeignRange<O> {
    fn device(&self) -> &Device {
        &self.of.device
    }

    fn address(&self) -> u64 {
        self.address
    }

    fn len(&self) -> u64 {
        self.len
    }
}
