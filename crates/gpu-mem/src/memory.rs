//! What copies and kernels may touch: the traits that every kind of memory here meets.
//!
//! Device memory has no references in Rust: it is an address and a length, and what is in it is known by copying it out.
//! Host memory that a device writes goes in by value, so nobody reads it meanwhile.

use std::sync::Arc;

use crate::device::Device;
use crate::error::Error;

/// Memory of a device, or memory that is mapped for it.
///
/// # Safety
///
/// `address()..address() + len()` can be read and written by work of `device()` until the value is dropped, and all
/// three methods always answer the same.
pub unsafe trait DeviceMemory: Send + 'static {
    /// The device that it is mapped for.
    fn device(&self) -> &Device;

    /// The address of the first byte on that device; 0 where `len()` is 0.
    fn address(&self) -> u64;

    /// The number of bytes.
    fn len(&self) -> u64;

    /// Whether there is no byte.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Device memory that can be registered with a NIC; not all of it may be copied, too.
///
/// # Safety
///
/// `address()..address() + len()` is memory of `device()` and stays allocated until the value is dropped, and all three
/// methods always answer the same.
#[expect(clippy::len_without_is_empty, reason = "what is empty is refused")]
pub unsafe trait Registrable: Send + 'static {
    /// The device that has it.
    fn device(&self) -> &Device;

    /// The address of the first byte on that device.
    fn address(&self) -> u64;

    /// The number of bytes.
    fn len(&self) -> u64;
}

// SAFETY: what can be read and written until the drop is allocated until then.
unsafe impl<M: DeviceMemory> Registrable for M {
    fn device(&self) -> &Device {
        DeviceMemory::device(self)
    }

    fn address(&self) -> u64 {
        DeviceMemory::address(self)
    }

    fn len(&self) -> u64 {
        DeviceMemory::len(self)
    }
}

/// Host memory with an owner.
///
/// # Safety
///
/// `bytes()` always answers with the same bytes, which never move and stay mapped until the value is dropped.
pub unsafe trait HostMemory: Send + 'static {
    /// The bytes.
    fn bytes(&self) -> &[u8];
}

/// Host memory with one owner, which a device may write while nobody else holds the value.
///
/// # Safety
///
/// As [`HostMemory`]; `bytes_mut()` answers with the same bytes as `bytes()`, and nobody can reach them but through
/// this value.
pub unsafe trait HostMemoryMut: HostMemory {
    /// The bytes, to write.
    fn bytes_mut(&mut self) -> &mut [u8];
}

// SAFETY: the memory lives as long as the last clone; device memory may be shared, for nobody has references to it.
unsafe impl<M: DeviceMemory + Sync> DeviceMemory for Arc<M> {
    fn device(&self) -> &Device {
        M::device(self)
    }

    fn address(&self) -> u64 {
        M::address(self)
    }

    fn len(&self) -> u64 {
        M::len(self)
    }
}

// SAFETY: the memory lives as long as the last clone. Who shares it only reads: a shared value is not `HostMemoryMut`.
unsafe impl<M: HostMemory + Sync> HostMemory for Arc<M> {
    fn bytes(&self) -> &[u8] {
        M::bytes(self)
    }
}

// SAFETY: a vector's bytes are on the heap, and stay where they are while nobody changes its length, which nobody can who
// was given the vector as this trait.
unsafe impl HostMemory for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

// SAFETY: as above; a vector owns its bytes.
unsafe impl HostMemoryMut for Vec<u8> {
    fn bytes_mut(&mut self) -> &mut [u8] {
        self
    }
}

/// The address of a range's start, if the range lies inside memory of this base and length.
pub(crate) fn inside(base: u64, available: u64, offset: u64, len: u64) -> Result<u64, Error> {
    let end = offset.checked_add(len).filter(|end| *end <= available);
    let address = end.and_then(|_| base.checked_add(offset));
    address.ok_or(Error::Range { offset, len, available })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_range_is_inside_when_each_end_of_it_is(base in 1..1000_u64, available in 0..40_u64, offset in 0..50_u64, len in 0..50_u64) {
            let ends: Vec<u64> = (0..=available).collect();
            let expected = ends.contains(&offset) && ends.contains(&(offset + len));
            prop_assert_eq!(inside(base, available, offset, len).ok(), expected.then_some(base + offset));
        }

        #[test]
        fn what_has_no_address_is_outside(offset in 1..u64::MAX) {
            prop_assert!(inside(u64::MAX, u64::MAX, offset, 0).is_err());
            prop_assert!(inside(0, u64::MAX, offset, u64::MAX - offset + 1).is_err());
        }
    }
}
