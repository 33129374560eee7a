//! Physical memory of a device, mapped chunk by chunk into one range of addresses.
//!
//! This is how PyTorch's `expandable_segments` are made, and how memory is shared with other processes by file
//! descriptors: the kernel counts who has it open, so an owner that dies frees nothing under its peers. Descriptors and
//! lengths that come from a peer are checked by the driver, which maps only what the descriptor stands for.

use std::ffi::{c_int, c_void};
use std::fmt;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use cudarc::driver::sys;
use cudarc::driver::sys::CUdevice_attribute as Attribute;

use crate::call::cu;
use crate::device::Device;
use crate::error::Error;
use crate::memory::DeviceMemory;

/// How many chunks a buffer may have: 128 GiB of PyTorch's 2 MiB.
pub const CHUNKS_MAX: usize = 65_536;

const HANDLE_TYPE: sys::CUmemAllocationHandleType =
    sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

/// A range of addresses with physical memory behind all of it.
pub struct VmmBuffer {
    device: Device,
    address: u64,
    /// Reserved addresses; all of them are mapped once the buffer is made.
    reserved: u64,
    chunks: Vec<Chunk>,
    /// How many bytes were asked for: at most `reserved`.
    len: u64,
}

/// Physical memory that is mapped.
struct Chunk {
    handle: u64,
    len: u64,
}

/// One chunk of a buffer, as another process gets it: a descriptor to pass over a Unix socket, and a length.
#[derive(Debug)]
pub struct SharedChunk {
    /// What stands for the memory. It keeps the memory alive.
    pub fd: OwnedFd,
    /// The chunk's length in bytes.
    pub len: u64,
}

impl Device {
    /// Allocates `len_bytes` of physical memory in chunks of `chunk_bytes` and maps them one behind the other. Both are
    /// rounded up to the device's granularity, 2 MiB today. The memory can be exported, and a NIC can reach it where
    /// the device allows that.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`]; [`Error::Unsupported`] where the device cannot map memory, or for no byte or more than
    /// [`CHUNKS_MAX`] chunks.
    pub fn alloc_vmm(&self, len_bytes: u64, chunk_bytes: u64) -> Result<VmmBuffer, Error> {
        if !self.has_vmm()?
            || self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED)?
                == 0
        {
            return Err(self.cannot_map("the device does not map memory separately".into()));
        }
        let properties = self.vmm_properties()?;
        let granularity = self.granularity(&properties)?;
        let lens = chunk_lens(len_bytes, chunk_bytes, granularity).map_err(|why| self.cannot_map(why))?;
        let mut buffer = self.reserve(lens.iter().sum(), len_bytes)?;
        buffer.fill(&lens)?;
        Ok(buffer)
    }

    /// Maps memory that another process, or this one, has exported, for this device to use. The memory itself may be
    /// another device's.
    ///
    /// # Errors
    ///
    /// [`Error::BadHandle`] for lengths that no buffer has; [`Error::Call`] when a descriptor stands for no memory, for
    /// less than it says, or for a device that this process or GPU cannot reach.
    pub fn import_vmm(&self, shared: Vec<SharedChunk>) -> Result<VmmBuffer, Error> {
        let granularity = self.granularity(&self.vmm_properties()?)?;
        let lens: Vec<u64> = shared.iter().map(|chunk| chunk.len).collect();
        let total = imported_bytes(&lens, granularity).map_err(|why| Error::BadHandle { why })?;
        let mut buffer = self.reserve(total, total)?;
        for chunk in shared {
            let mut handle = 0;
            let fd = std::ptr::without_provenance_mut::<c_void>(
                usize::try_from(chunk.fd.as_raw_fd()).unwrap_or(0),
            );
            // SAFETY: the driver takes the descriptor's number in place of a pointer and copies what it stands for.
            self.run(|| unsafe { cu!(cuMemImportFromShareableHandle(&raw mut handle, fd, HANDLE_TYPE)) })?;
            buffer.map(handle, chunk.len)?;
        }
        buffer.allow(self)?;
        Ok(buffer)
    }

    fn reserve(&self, reserved: u64, len: u64) -> Result<VmmBuffer, Error> {
        let mut address = 0;
        let bytes = usize::try_from(reserved).unwrap_or(usize::MAX);
        // SAFETY: the driver writes one address, which the buffer frees.
        self.run(|| unsafe { cu!(cuMemAddressReserve(&raw mut address, bytes, 0, 0, 0)) })?;
        Ok(VmmBuffer { device: self.clone(), address, reserved, chunks: Vec::new(), len })
    }

    fn vmm_properties(&self) -> Result<sys::CUmemAllocationProp, Error> {
        Ok(sys::CUmemAllocationProp {
            type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
            requestedHandleTypes: HANDLE_TYPE,
            location: self.location(),
            win32HandleMetaData: std::ptr::null_mut(),
            allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
                compressionType: 0,
                gpuDirectRDMACapable: u8::from(self.has_rdma_with_vmm()?),
                usage: 0,
                reserved: [0; 4],
            },
        })
    }

    fn location(&self) -> sys::CUmemLocation {
        sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: self.ordinal() }
    }

    fn granularity(&self, properties: &sys::CUmemAllocationProp) -> Result<u64, Error> {
        let mut bytes = 0;
        let minimum = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
        // SAFETY: the driver reads the properties and writes one length.
        self.run(|| unsafe {
            cu!(cuMemGetAllocationGranularity(&raw mut bytes, &raw const *properties, minimum))
        })?;
        Ok((bytes as u64).max(1))
    }

    fn cannot_map(&self, why: String) -> Error {
        Error::Unsupported { on: self.to_string(), what: "map the memory", why }
    }
}

/// How long each chunk is.
fn chunk_lens(len: u64, chunk: u64, granularity: u64) -> Result<Vec<u64>, String> {
    let round = |bytes: u64| {
        bytes.checked_next_multiple_of(granularity).ok_or("it is longer than any address".to_owned())
    };
    let (len, chunk) = (round(len)?, round(chunk.max(1))?);
    let count = len.div_ceil(chunk);
    if len == 0 || count > CHUNKS_MAX as u64 {
        return Err(format!("it would have {count} chunks, and 1 to {CHUNKS_MAX} are allowed"));
    }
    Ok((0..count).map(|index| chunk.min(len - index * chunk)).collect())
}

/// What the lengths that a peer tells add up to.
fn imported_bytes(lens: &[u64], granularity: u64) -> Result<u64, String> {
    if lens.is_empty() || lens.len() > CHUNKS_MAX {
        return Err(format!("it has {} chunks, and 1 to {CHUNKS_MAX} are allowed", lens.len()));
    }
    if let Some(len) = lens.iter().find(|len| **len == 0 || **len % granularity != 0) {
        return Err(format!("a chunk of {len} bytes is no multiple of {granularity}"));
    }
    let total = lens.iter().try_fold(0_u64, |total, len| total.checked_add(*len));
    total.filter(|total| i64::try_from(*total).is_ok()).ok_or("it is longer than any address".to_owned())
}

impl VmmBuffer {
    /// Puts fresh physical memory behind the same addresses: whoever has mapped what was there keeps that, and reaches nothing of
    /// this any more. What the bytes are afterwards is undefined. Memory that others have open is freed when they close it, so
    /// there may be twice as much until then.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`], or the driver's. The buffer has no bytes any more then.
    pub fn renew(&mut self) -> Result<(), Error> {
        // Nobody else has a handle on the buffer, so no work that was posted through one is in flight. Other work of this process
        // with its addresses is over after this.
        self.device.synchronize()?;
        let len = std::mem::take(&mut self.len);
        let chunks: Vec<Range<u64>> = self.chunks().collect();
        for (chunk, range) in std::mem::take(&mut self.chunks).into_iter().zip(&chunks) {
            let bytes = address_len(chunk.len);
            // SAFETY: mapped by `map` as one, and no work uses it.
            let unmapped = self.device.run(|| unsafe { cu!(cuMemUnmap(range.start, bytes)) });
            let handle = chunk.handle;
            // SAFETY: the chunk's own handle; the driver keeps the memory while it is mapped.
            self.device.release_later("a chunk", move || unsafe { cu!(cuMemRelease(handle)) });
            unmapped?;
        }
        let lens: Vec<u64> = chunks.iter().map(|range| range.end - range.start).collect();
        self.fill(&lens)?;
        self.len = len;
        Ok(())
    }

    /// Allocates chunks of these lengths and maps them behind those that there are; then the device may use all of them.
    fn fill(&mut self, lens: &[u64]) -> Result<(), Error> {
        let device = self.device.clone();
        let properties = device.vmm_properties()?;
        let total = lens.iter().sum();
        for &len in lens {
            let mut handle = 0;
            let bytes = usize::try_from(len).unwrap_or(usize::MAX);
            // SAFETY: the driver reads the properties and writes one handle, which the chunk releases.
            let create = || unsafe { cu!(cuMemCreate(&raw mut handle, bytes, &raw const properties, 0)) };
            device.run(create).map_err(|error| device.out_of_memory(error, "device memory", total))?;
            self.map(handle, len)?;
        }
        self.allow(&device)
    }

    /// Maps a chunk behind those that there are, and takes its handle over.
    fn map(&mut self, handle: u64, len: u64) -> Result<(), Error> {
        let address = self.address + self.mapped();
        let bytes = usize::try_from(len).unwrap_or(usize::MAX);
        // SAFETY: the addresses are reserved and nothing is mapped there yet; the handle is open.
        let mapped = self.device.run(|| unsafe { cu!(cuMemMap(address, bytes, 0, handle, 0)) });
        match mapped {
            Ok(()) => self.chunks.push(Chunk { handle, len }),
            // SAFETY: the handle is open and nobody else has it.
            Err(_) => self.device.release_later("a chunk", move || unsafe { cu!(cuMemRelease(handle)) }),
        }
        mapped
    }

    fn mapped(&self) -> u64 {
        self.chunks.iter().map(|chunk| chunk.len).sum()
    }

    /// Lets another device read and write the memory: its kernels, and copies between the two.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when that device cannot reach it.
    pub fn allow(&mut self, device: &Device) -> Result<(), Error> {
        let access = sys::CUmemAccessDesc {
            location: device.location(),
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        let bytes = usize::try_from(self.reserved).unwrap_or(usize::MAX);
        // SAFETY: the whole range is mapped; the driver reads one description.
        self.device.run(|| unsafe { cu!(cuMemSetAccess(self.address, bytes, &raw const access, 1)) })
    }

    /// Exports every chunk, in order, for [`Device::import_vmm`] of another process.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when the process has no descriptors left.
    pub fn export(&self) -> Result<Vec<SharedChunk>, Error> {
        let export = |chunk: &Chunk| {
            let mut fd: c_int = -1;
            let (into, handle) = ((&raw mut fd).cast(), chunk.handle);
            // SAFETY: the handle is open; the driver writes one descriptor.
            self.device.run(|| unsafe { cu!(cuMemExportToShareableHandle(into, handle, HANDLE_TYPE, 0)) })?;
            if fd < 0 {
                return Err(Error::BadHandle { why: format!("the driver exported descriptor {fd}") });
            }
            // SAFETY: the driver has made this descriptor for us, and nobody else knows of it.
            Ok(SharedChunk { fd: unsafe { OwnedFd::from_raw_fd(fd) }, len: chunk.len })
        };
        self.chunks.iter().map(export).collect()
    }

    /// The addresses of every chunk, in order: what a NIC must be told of one by one.
    pub fn chunks(&self) -> impl Iterator<Item = Range<u64>> {
        self.chunks.iter().scan(self.address, |start, chunk| {
            let range = *start..*start + chunk.len;
            *start = range.end;
            Some(range)
        })
    }
}

// SAFETY: mapped, with access for the device, until the drop; nothing of it changes.
unsafe impl DeviceMemory for VmmBuffer {
    fn device(&self) -> &Device {
        &self.device
    }

    fn address(&self) -> u64 {
        self.address
    }

    fn len(&self) -> u64 {
        self.len
    }
}

impl fmt::Debug for VmmBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "VmmBuffer({:#x}, {} bytes in {} chunks, {})",
            self.address,
            self.len,
            self.chunks.len(),
            self.device
        )
    }
}

impl Drop for VmmBuffer {
    fn drop(&mut self) {
        let mut mappings: Vec<(u64, usize)> =
            self.chunks().map(|range| (range.start, address_len(range.end - range.start))).collect();
        for Chunk { handle, .. } in self.chunks.drain(..) {
            // SAFETY: the chunk's own handle; the driver keeps the memory while it is mapped.
            self.device.release_later("a chunk", move || unsafe { cu!(cuMemRelease(handle)) });
        }
        let (address, reserved) = (self.address, address_len(self.reserved));
        self.device.release_later("mapped memory", move || {
            while let Some(&(start, len)) = mappings.last() {
                // SAFETY: mapped by `map` as one, and no work uses it: work in flight holds its buffers.
                unsafe { cu!(cuMemUnmap(start, len)) }?;
                mappings.pop();
            }
            // SAFETY: reserved by `reserve`, and nothing is mapped there any more.
            unsafe { cu!(cuMemAddressFree(address, reserved)) }
        });
    }
}

/// A length in the address space, which fits.
fn address_len(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn chunks_cover_what_was_asked_for_and_are_whole_pages(len in 1..1000_u64, chunk in 0..300_u64, page in 1..50_u64) {
            let lens = chunk_lens(len, chunk, page).unwrap();
            let total: u64 = lens.iter().sum();
            prop_assert!(total >= len && total < len + page);
            prop_assert!(lens.iter().all(|len| *len > 0 && len % page == 0));
            prop_assert!(lens.windows(2).all(|pair| pair[0] >= pair[1] && pair[0] >= chunk));
            prop_assert_eq!(imported_bytes(&lens, page), Ok(total));
        }

        #[test]
        fn what_a_peer_tells_is_summed_or_refused(lens in vec(any::<u64>(), 0..4), page in 1..5_u64) {
            let sum = lens.iter().map(|len| u128::from(*len)).sum::<u128>();
            let fine = !lens.is_empty() && lens.iter().all(|len| *len > 0 && len % page == 0) && sum <= i64::MAX as u128;
            prop_assert_eq!(imported_bytes(&lens, page).ok().map(u128::from), fine.then_some(sum));
        }
    }

    #[test]
    fn too_many_chunks_are_refused_before_anything_is_allocated() {
        assert!(chunk_lens(1 << 40, 1, 2 << 20).unwrap_err().contains("65536"));
        assert!(chunk_lens(0, 1, 2 << 20).is_err());
        assert!(chunk_lens(u64::MAX, 1, 2 << 20).is_err());
    }
}
