//! Memory that somebody else has allocated: which allocations lie behind a pointer.
//!
//! Frameworks carve tensors out of segments of their own. A NIC is told of whole segments, once each: one registration
//! for hundreds of tensors. A segment is one `cuMemAlloc`, or one mapped chunk where addresses were reserved
//! (`expandable_segments`). Nothing is kept here by address alone: a segment carries the driver's own name for the
//! allocation, which no later one at the same address has.

use std::collections::BTreeMap;
use std::ops::Range;

use cudarc::driver::sys;
use cudarc::driver::sys::CUpointer_attribute as Attribute;

use crate::call::cu;
use crate::device::Device;
use crate::error::{CallError, Error};
use crate::memory::HostMemory;

/// What the driver answers where it does not know an address.
const UNKNOWN: i32 = sys::CUresult::CUDA_ERROR_INVALID_VALUE as i32;

/// The driver's names for an allocation: no other has both in the life of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    /// `CU_POINTER_ATTRIBUTE_BUFFER_ID`.
    pub buffer: u64,
    /// `CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID`, which names physical memory; 0 where the driver does not tell.
    pub block: u64,
}

/// One allocation, or one mapped chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Its addresses.
    pub range: Range<u64>,
    /// The allocation's name; `None` where the driver tells none, and then nothing is cached.
    pub identity: Option<Identity>,
    /// Whether it was mapped with `cuMemMap`.
    pub is_mapped: bool,
}

/// Segments in the order of their addresses, disjoint.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Segments(Vec<Segment>);

/// A part of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The segment's place in [`Segments::iter`].
    pub segment: usize,
    /// Bytes from the segment's start.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
}

impl Segments {
    /// The segments behind all these ranges (address and length in bytes), each once.
    pub(crate) fn find(
        ranges: &[(u64, u64)],
        mut segment_at: impl FnMut(u64) -> Result<Segment, Error>,
    ) -> Result<Self, Error> {
        let mut found: BTreeMap<u64, Segment> = BTreeMap::new();
        for &(address, len) in ranges {
            let no_end =
                || Error::Pointer { address, what: format!("the start of {len} bytes without an end") };
            let end = address.checked_add(len).ok_or_else(no_end)?;
            let mut next = address;
            while next < end {
                let before = found.range(..=next).next_back();
                if let Some((_, known)) = before.filter(|(_, segment)| segment.range.contains(&next)) {
                    next = known.range.end;
                    continue;
                }
                let segment = segment_at(next)?;
                if !segment.range.contains(&next) {
                    return Err(Error::Pointer {
                        address: next,
                        what: "not where the driver says it is".into(),
                    });
                }
                next = segment.range.end;
                found.insert(segment.range.start, segment);
            }
        }
        Ok(Self(found.into_values().collect()))
    }

    /// The segments.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Segment> {
        self.0.iter()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Where a range lies, cut at segments' borders.
    ///
    /// # Errors
    ///
    /// [`Error::Pointer`] for the first byte that lies in no segment.
    pub fn locate(&self, address: u64, len_bytes: u64) -> Result<Vec<Piece>, Error> {
        let mut pieces = Vec::new();
        let (mut next, mut left) = (address, len_bytes);
        while left > 0 {
            let index = self.0.partition_point(|segment| segment.range.end <= next);
            let segment = self.0.get(index).filter(|segment| segment.range.contains(&next));
            let Some(Segment { range, .. }) = segment else {
                return Err(Error::Pointer {
                    address: next,
                    what: "in none of the segments that were found".into(),
                });
            };
            let len = left.min(range.end - next);
            pieces.push(Piece { segment: index, offset: next - range.start, len });
            next += len;
            left -= len;
        }
        Ok(pieces)
    }
}

impl Device {
    /// Finds the segments behind ranges of this device's memory (address and length in bytes), each segment once.
    ///
    /// # Errors
    ///
    /// [`Error::Pointer`] names an address with no memory of this device behind it: host memory, managed memory, another
    /// device's, a hole.
    pub fn segments(&self, ranges: &[(u64, u64)]) -> Result<Segments, Error> {
        Segments::find(ranges, |address| self.segment_at(address))
    }

    /// Checks that the memory behind a segment is still the one that was found.
    ///
    /// # Errors
    ///
    /// [`Error::Freed`] when it is not; [`Error::DeviceLost`].
    pub fn check_segment(&self, segment: &Segment) -> Result<(), Error> {
        match self.segment_at(segment.range.start) {
            Ok(now) if now == *segment => Ok(()),
            Err(lost @ Error::DeviceLost { .. }) => Err(lost),
            _ => {
                let Range { start, end } = segment.range;
                Err(Error::Freed { address: start, len: end - start })
            }
        }
    }

    fn segment_at(&self, address: u64) -> Result<Segment, Error> {
        let refuse = |what: &str| Err(Error::Pointer { address, what: what.to_owned() });
        let kind = match self.pointer_attribute(address, Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE) {
            Ok(kind) => kind,
            Err(lost @ Error::DeviceLost { .. }) => return Err(lost),
            Err(_) => return refuse("not memory that CUDA knows; it was freed, or is plain host memory"),
        };
        // An attribute that this driver does not tell is as good as 0.
        let told = |attribute| self.pointer_attribute(address, attribute).unwrap_or(0);
        if told(Attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED) != 0 {
            return refuse(
                "managed memory, which moves between host and device; allocate it with cudaMalloc",
            );
        }
        if kind != sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u64 {
            return refuse("host memory; register it as such");
        }
        let ordinal = told(Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL);
        if ordinal != u64::from(self.index()) {
            return refuse(&format!("memory of GPU {ordinal}, not of {self}"));
        }
        let allocation = allocation_at(self, address)?;
        let is_mapped = self.is_mapped(address);
        let range = if is_mapped {
            let start = told(Attribute::CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR);
            narrow(allocation, start, told(Attribute::CU_POINTER_ATTRIBUTE_MAPPING_SIZE), address)
        } else {
            allocation
        };
        let identity = Identity {
            buffer: told(Attribute::CU_POINTER_ATTRIBUTE_BUFFER_ID),
            block: told(Attribute::CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID),
        };
        Ok(Segment {
            range,
            // Without a number of the buffer, a later one could not be told from it.
            identity: (identity.buffer != 0).then_some(identity),
            is_mapped,
        })
    }

    /// Whether memory was made with `cuMemCreate`: then the driver finds its handle.
    fn is_mapped(&self, address: u64) -> bool {
        let legacy =
            self.pointer_attribute(address, Attribute::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE);
        if matches!(legacy, Ok(1..)) {
            return false;
        }
        let mut handle = 0;
        let pointer = std::ptr::without_provenance_mut(usize::try_from(address).unwrap_or(0));
        // SAFETY: the driver looks the address up and writes one handle, with a reference of its own.
        let found = self.run(|| unsafe { cu!(cuMemRetainAllocationHandle(&raw mut handle, pointer)) });
        if found.is_ok() {
            // SAFETY: gives back the reference that was taken above.
            self.release("a reference to a chunk", move || unsafe { cu!(cuMemRelease(handle)) });
        }
        found.is_ok()
    }

    /// Whether host memory is page-locked, by CUDA and so for it: copies to and from other memory hold up whoever asks for them.
    /// The first and the last byte stand for all; no bytes are.
    ///
    /// # Errors
    ///
    /// The driver's, but not that it does not know the memory.
    pub fn is_page_locked(&self, memory: &impl HostMemory) -> Result<bool, Error> {
        let is_locked = |byte: &u8| {
            let address = std::ptr::from_ref(byte).addr() as u64;
            match self.pointer_attribute(address, Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE) {
                Ok(kind) => Ok(kind == sys::CUmemorytype::CU_MEMORYTYPE_HOST as u64),
                Err(Error::Call(CallError { code, .. })) if code == UNKNOWN => Ok(false),
                Err(error) => Err(error),
            }
        };
        let bytes = memory.bytes();
        for byte in bytes.first().into_iter().chain(bytes.last()) {
            if !is_locked(byte)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn pointer_attribute(&self, address: u64, attribute: Attribute) -> Result<u64, Error> {
        // Attributes are of 1, 4 or 8 bytes; the rest stays 0.
        let mut value = 0_u64;
        // SAFETY: the driver looks the address up and writes at most 8 bytes.
        self.run(|| unsafe { cu!(cuPointerGetAttribute((&raw mut value).cast(), attribute, address)) })?;
        Ok(value)
    }
}

/// The allocation that an address lies in, by the driver.
pub(crate) fn allocation_at(device: &Device, address: u64) -> Result<Range<u64>, Error> {
    let (mut base, mut len) = (0, 0);
    // SAFETY: the driver looks the address up, and writes an address and a length.
    device.run(|| unsafe { cu!(cuMemGetAddressRange_v2(&raw mut base, &raw mut len, address)) })?;
    let range = base..base.saturating_add(len as u64);
    if !range.contains(&address) {
        return Err(Error::Pointer { address, what: "in no allocation".into() });
    }
    Ok(range)
}

/// The smaller of the allocation and the mapping that an address lies in. Drivers differ in whether the range of mapped
/// memory is that of the chunk or of all reserved addresses; the mapping, where it is told, is the chunk.
fn narrow(allocation: Range<u64>, mapping_start: u64, mapping_len: u64, address: u64) -> Range<u64> {
    let mapping = mapping_start..mapping_start.saturating_add(mapping_len);
    if !mapping.contains(&address) {
        return allocation;
    }
    allocation.start.max(mapping.start)..allocation.end.min(mapping.end)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const SPACE: u64 = 60;

    /// Allocations one behind the other, some of them missing: the owner of every byte.
    fn space() -> impl Strategy<Value = Vec<Option<Range<u64>>>> {
        vec((1..9_u64, any::<bool>()), 1..20).prop_map(|parts| {
            let mut bytes = Vec::new();
            for (len, there) in parts {
                let start = bytes.len() as u64;
                bytes.extend((0..len).map(|_| there.then_some(start..start + len)));
            }
            bytes
        })
    }

    fn at(space: &[Option<Range<u64>>], address: u64) -> Result<Segment, Error> {
        let range = space.get(address as usize).cloned().flatten();
        let range = range.ok_or(Error::Pointer { address, what: "a hole".into() })?;
        Ok(Segment { range, identity: None, is_mapped: false })
    }

    proptest! {
        #[test]
        fn segments_are_those_of_the_bytes(space in space(), ranges in vec((0..SPACE, 0..20_u64), 0..8)) {
            let bytes = || ranges.iter().flat_map(|(start, len)| *start..start + len);
            let hole = bytes().find(|byte| space.get(*byte as usize).cloned().flatten().is_none());
            let mut asked = Vec::new();
            let found = Segments::find(&ranges, |address| { asked.push(address); at(&space, address) });
            match found {
                Err(Error::Pointer { address, .. }) => prop_assert_eq!(Some(address), hole),
                Err(other) => prop_assert!(false, "{}", other),
                Ok(segments) => {
                    prop_assert_eq!(hole, None);
                    let expected: BTreeMap<u64, Range<u64>> =
                        bytes().filter_map(|byte| space[byte as usize].clone()).map(|range| (range.start, range)).collect();
                    let ranges_found: Vec<_> = segments.iter().map(|segment| segment.range.clone()).collect();
                    prop_assert_eq!(ranges_found, expected.into_values().collect::<Vec<_>>());
                    prop_assert_eq!(asked.len(), segments.len(), "the driver is asked once for each");
                    for &(start, len) in &ranges {
                        let pieces = segments.locate(start, len).unwrap();
                        let starts: Vec<u64> = segments.iter().map(|segment| segment.range.start).collect();
                        let located: Vec<u64> = pieces.iter()
                            .flat_map(|piece| { let first = starts[piece.segment] + piece.offset; first..first + piece.len }).collect();
                        prop_assert_eq!(located, (start..start + len).collect::<Vec<_>>());
                    }
                }
            }
        }

        #[test]
        fn a_byte_outside_is_located_nowhere(space in space(), start in 0..SPACE, len in 1..20_u64) {
            let one = Segments::find(&[(0, 1)], |address| at(&space, address)).unwrap_or_default();
            let inside = |byte: u64| one.iter().any(|segment| segment.range.contains(&byte));
            let outside = (start..start + len).find(|byte| !inside(*byte));
            match one.locate(start, len) {
                Ok(_) => prop_assert_eq!(outside, None),
                Err(Error::Pointer { address, .. }) => prop_assert_eq!(Some(address), outside),
                Err(other) => prop_assert!(false, "{}", other),
            }
        }

        #[test]
        fn a_mapping_narrows_and_never_widens(a in 0..50_u64, la in 1..50_u64, m in 0..50_u64, lm in 0..50_u64, at in 0..50_u64) {
            let allocation = a..a + la;
            prop_assume!(allocation.contains(&at));
            let narrowed = narrow(allocation.clone(), m, lm, at);
            for byte in 0..100 {
                let expected = allocation.contains(&byte) && (!(m..m + lm).contains(&at) || (m..m + lm).contains(&byte));
                prop_assert_eq!(narrowed.contains(&byte), expected);
            }
        }
    }

    #[test]
    fn a_range_without_an_end_and_a_driver_that_errs_are_refused() {
        let wrong = |_| Ok(Segment { range: 5..6, identity: None, is_mapped: false });
        assert!(Segments::find(&[(u64::MAX, 2)], wrong).is_err());
        assert!(Segments::find(&[(0, 1)], wrong).is_err(), "a walk that could not end");
    }
}
