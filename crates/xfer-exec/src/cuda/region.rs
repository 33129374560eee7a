//! How a sender comes to a receiver's device memory. Nothing that the peer says is believed: lengths are compared with its
//! manifest, and what is opened with what it says.

use std::any::Any;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use gpu_mem::{Device, DeviceMemory, IpcHandle, SharedChunk, VmmBuffer};
use serde::{Deserialize, Serialize};
use weight_ops::cuda::DeviceRange;

use super::CudaError;
use crate::arrivals::Arrivals;
use crate::local::{
    Doorman, DoormanAddress, FILES_MAX, MESSAGE_BYTES_MAX, Offer, Offers, Teller, fetch_all, fetch_teller,
};

/// What a peer is told of a region.
#[derive(Debug, Serialize, Deserialize)]
enum Told {
    /// Descriptors come along, of chunks of these lengths; the region is the first `bytes` of them.
    Chunks { bytes: u64, lens: Vec<u64> },
    /// A legacy handle.
    Handle(IpcHandle),
}

/// Device memory that senders of this host may write, from when it is exposed until the last of them has closed it.
pub struct DeviceRegion {
    bytes: u64,
    /// [`Told`], as it is sent.
    message: Vec<u8>,
    chunks: Vec<SharedChunk>,
    /// Keeps the memory for as long as anybody may ask for it.
    _owner: Arc<dyn Any + Send + Sync>,
}

impl DeviceRegion {
    /// Memory that is shared by descriptors. It outlives whoever dies, until the last process closes it.
    ///
    /// # Errors
    ///
    /// [`CudaError::TooManyChunks`], or the driver's.
    pub fn mapped(buffer: &Arc<VmmBuffer>) -> Result<Self, CudaError> {
        let chunks = buffer.chunks().count();
        if chunks > FILES_MAX {
            return Err(CudaError::TooManyChunks { chunks, max: FILES_MAX });
        }
        let chunks = buffer.export()?;
        let bytes = VmmBuffer::len(buffer);
        let told = Told::Chunks { bytes, lens: chunks.iter().map(|chunk| chunk.len).collect() };
        Ok(Self { bytes, message: encode(&told), chunks, _owner: Arc::<VmmBuffer>::clone(buffer) })
    }

    /// Memory that somebody else has allocated, by its legacy handle. `owner` is what keeps it allocated: it is held until the
    /// doorman is dropped, and must live until the senders have closed the memory as well.
    pub fn by_handle(handle: IpcHandle, owner: Arc<dyn Any + Send + Sync>) -> Self {
        let bytes = handle.len();
        Self { bytes, message: encode(&Told::Handle(handle)), chunks: Vec::new(), _owner: owner }
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Tells regions to senders of this host, by index, until the doorman is dropped. What was opened stays open. What they have
/// written comes out of the [`Arrivals`], where it has a tag.
///
/// # Errors
///
/// Those of [`Doorman::open`].
pub fn expose(regions: Vec<DeviceRegion>) -> Result<(Doorman, Arrivals), CudaError> {
    Ok(Doorman::serving(regions)?)
}

impl Offers for Vec<DeviceRegion> {
    fn offer(&self, region: u32) -> Option<Offer<'_>> {
        let region = self.get(region as usize)?;
        let files = region.chunks.iter().map(|chunk| chunk.fd.as_fd()).collect();
        Some(Offer { message: &region.message, files })
    }
}

/// A receiver's device memory, opened for work of one GPU of this process. Dropping it closes it.
pub struct CudaPeer {
    pub(super) regions: Vec<DeviceRange>,
    teller: Teller,
}

impl AsMut<Teller> for CudaPeer {
    fn as_mut(&mut self) -> &mut Teller {
        &mut self.teller
    }
}

impl CudaPeer {
    /// Opens all regions of a peer, which have these lengths by its manifest. The memory may be of another GPU that `device`
    /// reaches. Each step of the way to the peer takes `deadline` at most.
    ///
    /// # Errors
    ///
    /// [`CudaError::Local`] when the peer does not answer or refuses; [`CudaError::NotDeviceMemory`], [`CudaError::Length`]
    /// and [`CudaError::Unreachable`] when what it answers is of no use.
    pub fn open(
        device: &Device,
        address: &DoormanAddress,
        region_bytes: &[u64],
        deadline: Duration,
    ) -> Result<Self, CudaError> {
        let open = |(region, &bytes)| open_region(device, address, region, bytes, deadline);
        let regions = (0..).zip(region_bytes).map(open).collect::<Result<_, _>>()?;
        Ok(Self { regions, teller: fetch_teller(address, deadline)? })
    }

    /// Its regions, by index.
    pub fn regions(&self) -> &[DeviceRange] {
        &self.regions
    }
}

fn open_region(
    device: &Device,
    address: &DoormanAddress,
    region: u32,
    expected: u64,
    deadline: Duration,
) -> Result<DeviceRange, CudaError> {
    let (message, files) = fetch_all(address, region, deadline)?;
    let unreachable =
        |error| CudaError::Unreachable { device: device.to_string(), region, source: Box::new(error) };
    let length = |found| CudaError::Length { region, expected, found };
    match decode(&message, files.len()) {
        Ok(Told::Chunks { bytes, lens }) => {
            if bytes != expected {
                return Err(length(bytes));
            }
            let shared = files.into_iter().zip(lens).map(|(fd, len)| SharedChunk { fd, len }).collect();
            let memory = Arc::new(device.import_vmm(shared).map_err(unreachable)?);
            let found = VmmBuffer::len(&memory);
            DeviceRange::new(&memory, 0..expected).map_err(|_| length(found))
        }
        Ok(Told::Handle(handle)) => {
            if handle.len() != expected {
                return Err(length(handle.len()));
            }
            let memory = device.open_ipc(&handle).map_err(unreachable)?;
            Ok(DeviceRange::whole(&Arc::new(memory)))
        }
        Err(reason) => Err(CudaError::NotDeviceMemory { region, reason }),
    }
}

/// Bytes of what is told; they fit, for there are at most [`FILES_MAX`] lengths.
fn encode(told: &Told) -> Vec<u8> {
    // Writing to memory does not fail.
    postcard::to_allocvec(told).unwrap_or_default()
}

/// What is told, if as many descriptors have come along as it says.
fn decode(message: &[u8], files: usize) -> Result<Told, String> {
    let (told, rest) = postcard::take_from_bytes::<Told>(message).map_err(|error| error.to_string())?;
    let expected = match &told {
        Told::Chunks { lens, .. } => lens.len(),
        Told::Handle(_) => 0,
    };
    if files != expected || !rest.is_empty() {
        return Err(format!(
            "{files} descriptors where it says {expected}, and {} bytes too many",
            rest.len()
        ));
    }
    Ok(told)
}

/// The longest that is told fits: a variant, and lengths in at most 10 bytes each.
const _: () = assert!(10 * (FILES_MAX + 3) <= MESSAGE_BYTES_MAX);

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_told_is_understood_and_nothing_else_is(bytes: u64, lens in vec(any::<u64>(), 0..FILES_MAX), more in 1..3_usize) {
            let message = encode(&Told::Chunks { bytes, lens: lens.clone() });
            prop_assert!(message.len() <= MESSAGE_BYTES_MAX);
            let told = decode(&message, lens.len()).unwrap();
            let same = matches!(&told, Told::Chunks { bytes: b, lens: l } if (*b, l) == (bytes, &lens));
            prop_assert!(same);
            prop_assert!(decode(&message, lens.len() + more).is_err(), "descriptors that nobody announced");
            prop_assert!(decode(&message[..message.len() - 1], lens.len()).is_err());
            prop_assert!(decode(&[&message[..], &[0]].concat(), lens.len()).is_err());
        }

        #[test]
        fn noise_is_refused_or_harmless(message in vec(any::<u8>(), 0..200)) {
            if let Ok(Told::Chunks { lens, .. }) = decode(&message, 2) {
                prop_assert_eq!(lens.len(), 2);
            }
        }
    }
}
