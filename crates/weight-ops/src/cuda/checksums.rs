//! Checksums of many parameters by one kernel.

use std::ops::Add;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use gpu_mem::{DeviceMemory, Pending, PinnedBuffer, Span, Stream};

use crate::checksum::{LEAF_BYTES, PartialChecksum};
use crate::cuda::Kernels;
use crate::cuda::error::Error;
use crate::cuda::memory::DeviceRange;
use crate::cuda::operation::{Argument, Operation};

/// As in checksum.cu.
const THREADS: u32 = 256;
const BLOCK_LEAVES: u64 = 8;

/// Blocks that run on a multiprocessor at a time: 2048 threads. More find their leaves done by others.
const BLOCKS_PER_MULTIPROCESSOR: u64 = 8;

/// `Leaf` of checksum.cu.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
struct Leaf {
    address: u64,
    number: u64,
    bytes: u64,
}

/// The checksums of some parameters' parts, to be computed any number of times.
#[derive(Debug)]
pub struct Checksums {
    operation: Operation,
    /// Two numbers for each leaf, on the device and here.
    sums: DeviceRange,
    results: PinnedBuffer,
    parts: Parts,
}

/// For each part the length in bytes of each leaf.
type Parts = Vec<Vec<u64>>;

/// Checksums that a stream has not finished.
#[derive(Debug)]
#[must_use = "wait for it to have the checksums"]
pub struct PendingChecksums {
    operation: Pending<Operation>,
    results: Pending<(DeviceRange, PinnedBuffer)>,
    parts: Parts,
}

impl Kernels {
    /// Computes what [`PartialChecksum::of`] does for each part: the number of its first leaf in the parameter, and its
    /// bytes, which begin anywhere. Fast is where they begin at a multiple of 16. The list is brought to the device here, once.
    ///
    /// # Errors
    /// When the list cannot be brought to the device.
    pub fn checksums(&self, stream: &Stream, parts: &[(u64, DeviceRange)]) -> Result<Checksums, Error> {
        let cut = |(first, range): &(u64, DeviceRange)| cut(*first, range.address(), range.len());
        let leaves_of_parts: Vec<Vec<Leaf>> = parts.iter().map(cut).collect();
        let leaves = leaves_of_parts.concat();
        let table = self.upload(stream, bytemuck::must_cast_slice(&leaves))?;
        let count = leaves.len() as u64;
        let sums = DeviceRange::whole(&Arc::new(self.device().alloc(count * 16)?));
        let blocks =
            count.div_ceil(BLOCK_LEAVES).min(u64::from(self.multiprocessors()) * BLOCKS_PER_MULTIPROCESSOR);
        let arguments =
            vec![Argument::U64(table.address()), Argument::U64(count), Argument::U64(sums.address())];
        let mut holds: Vec<DeviceRange> = parts.iter().map(|(_, range)| range.clone()).collect();
        holds.extend([table, sums.clone()]);
        let operation = self.operation(self.checksum.clone(), blocks, THREADS, arguments, holds)?;
        let results = self.device().pinned(leaves.len() * 16)?;
        let parts =
            leaves_of_parts.iter().map(|leaves| leaves.iter().map(|leaf| leaf.bytes).collect()).collect();
        Ok(Checksums { operation, sums, results, parts })
    }
}

impl Checksums {
    /// Puts the work behind what the stream has to do already.
    ///
    /// # Errors
    /// When the stream is of another device than the kernels, or CUDA refuses.
    pub fn enqueue(self, stream: &Stream) -> Result<PendingChecksums, Error> {
        let Self { operation, sums, results, parts } = self;
        let operation = operation.enqueue(stream)?;
        let all = Span::first(sums.len());
        let results = stream.copy_to_host(sums, results, &[all])?;
        Ok(PendingChecksums { operation, results, parts })
    }
}

impl PendingChecksums {
    /// Whether the work is done; then [`wait`](Self::wait) does not wait.
    ///
    /// # Errors
    /// When it failed.
    pub fn is_done(&self) -> Result<bool, Error> {
        Ok(self.results.is_done()?)
    }

    /// Waits, and gives one checksum for each part. What computes them comes back, to be used again.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn wait(self) -> Result<(Checksums, Vec<PartialChecksum>), Error> {
        let Self { operation, results, parts } = self;
        let operation = operation.wait()?;
        let (sums, results) = results.wait()?;
        let (numbers, _) = results.bytes().as_chunks::<8>();
        let mut numbers = numbers.iter().map(|number| u64::from_le_bytes(*number));
        let mut next = || numbers.next().unwrap_or_default(); // there are two for each leaf
        let checksums = parts
            .iter()
            .map(|leaves| {
                let of_leaf = |&bytes: &u64| PartialChecksum::from_sums([next(), next()], bytes);
                leaves.iter().map(of_leaf).fold(PartialChecksum::default(), Add::add)
            })
            .collect();
        Ok((Checksums { operation, sums, results, parts }, checksums))
    }
}

/// The leaves of a part.
fn cut(first_leaf: u64, address: u64, bytes: u64) -> Vec<Leaf> {
    let leaf_bytes = LEAF_BYTES as u64;
    let leaf = |index: u64| {
        let offset = index * leaf_bytes;
        Leaf {
            address: address + offset,
            number: first_leaf.wrapping_add(index),
            bytes: leaf_bytes.min(bytes - offset),
        }
    };
    (0..bytes.div_ceil(leaf_bytes)).map(leaf).collect()
}
