//! The memory of a rank, in the host or on a GPU, for whoever need not know which: what a trainer lends to its rails, and what an
//! inference rank is written to.

use std::ops::Range;
use std::sync::Arc;

use efa_core::{Lease, LeaseMut, MemoryRef, Rail, RangeError, RegionError, RemoteRegion, Target};
use gpu_mem::{DeviceMemory as _, Observer};
use weight_ops::cuda::DeviceRange;
use xfer_exec::driver::ReadRows;
use xfer_exec::ofi::for_nics;
use xfer_plan::Strided;

use crate::device::Device;
use crate::error::Error;
use crate::fabric::FabricError;
use crate::gpu::{self, Gpu};

/// Equally long rows at equal distances in a memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    /// Of the first, in bytes.
    pub(crate) offset: u64,
    pub(crate) count: u64,
    /// Of each.
    pub(crate) bytes: u64,
    /// From the start of one to that of the next, in bytes.
    pub(crate) stride: u64,
}

impl Rows {
    /// From the first byte to the last.
    pub(crate) fn extent(self) -> Option<Range<u64>> {
        let before_last = self.count.checked_sub(1)?.checked_mul(self.stride)?;
        Some(self.offset..self.offset.checked_add(before_last)?.checked_add(self.bytes)?)
    }

    /// Where each lies; `None` where that is no address.
    fn ranges(self) -> impl Iterator<Item = Option<Range<u64>>> {
        (0..self.count).map(move |row| {
            let start = row.checked_mul(self.stride)?.checked_add(self.offset)?;
            Some(start..start.checked_add(self.bytes)?)
        })
    }

    /// The same bytes in the same order, in pieces of at most `bytes_max` bytes: of several rows, or of one.
    pub(crate) fn blocks(self, bytes_max: u64) -> impl Iterator<Item = Self> {
        let Self { offset, count, bytes, stride } = self;
        let joined = match count.checked_mul(bytes) {
            Some(all) if stride == bytes => Self { offset, count: 1, bytes: all, stride: all },
            _ => self,
        };
        let Self { count, bytes, .. } = joined;
        let together = (bytes_max / bytes.max(1)).max(1);
        let pieces = bytes.div_ceil(bytes_max.max(1)).max(1);
        let firsts = (0..count.div_ceil(together)).map(move |group| group * together);
        firsts.flat_map(move |first| {
            let rows = together.min(count - first);
            (0..pieces).map(move |piece| {
                let at = piece * bytes_max;
                // Where that is no address, it is outside any memory.
                let start = first.saturating_mul(joined.stride).saturating_add(offset).saturating_add(at);
                Self { offset: start, count: rows, bytes: bytes_max.min(bytes - at), stride: joined.stride }
            })
        })
    }
}

/// Memory of a trainer, by region.
pub(crate) enum Weights {
    Host(Vec<LeaseMut>),
    Device(Vec<DeviceRange>),
}

impl Weights {
    /// None yet, in the host.
    pub(crate) fn in_host() -> Self {
        Self::Host(Vec::new())
    }

    /// None yet.
    pub(crate) fn on(device: Device) -> Self {
        match device {
            Device::Cpu => Self::in_host(),
            Device::Cuda(_) => Self::Device(Vec::new()),
        }
    }

    /// 0 for a region that there is not.
    pub(crate) fn region_len(&self, region: usize) -> u64 {
        match self {
            Self::Host(regions) => regions.get(region).map_or(0, LeaseMut::len) as u64,
            Self::Device(regions) => regions.get(region).map_or(0, DeviceRange::len),
        }
    }

    pub(crate) fn region_bytes(&self) -> Vec<u64> {
        let count = match self {
            Self::Host(regions) => regions.len(),
            Self::Device(regions) => regions.len(),
        };
        (0..count).map(|region| self.region_len(region)).collect()
    }

    /// What NICs register of host memory.
    pub(crate) fn memories(&self) -> Vec<MemoryRef> {
        match self {
            Self::Host(regions) => regions.iter().map(|region| region.memory().clone()).collect(),
            Self::Device(_) => Vec::new(),
        }
    }

    /// The same of a GPU's.
    pub(crate) fn device_memories(&self) -> Vec<DeviceRange> {
        match self {
            Self::Host(_) => Vec::new(),
            Self::Device(regions) => regions.clone(),
        }
    }

    /// Bytes of a region in host memory; `None` for others, and where there are none.
    pub(crate) fn bytes_mut(&mut self, region: usize, range: Range<usize>) -> Option<&mut [u8]> {
        match self {
            Self::Host(regions) => regions.get_mut(region)?.bytes_mut().get_mut(range),
            Self::Device(_) => None,
        }
    }

    /// Writes bytes to a region, which has them.
    pub(crate) fn write(
        &mut self,
        gpu: Option<&Gpu>,
        region: usize,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), Error> {
        if let (Self::Device(regions), Some(gpu), Ok(offset)) = (&*self, gpu, u64::try_from(offset))
            && let Some(memory) = regions.get(region)
        {
            return gpu.write(&memory.part(offset..offset.saturating_add(bytes.len() as u64))?, bytes);
        }
        let into = self.bytes_mut(region, offset..offset.saturating_add(bytes.len()));
        let outside = || Error::Memory { what: "weights", reason: "defect: there is no such region".into() };
        into.ok_or_else(outside)?.copy_from_slice(bytes);
        Ok(())
    }
}

/// Memory of a rank that others read meanwhile.
pub(crate) enum Lent {
    Host(Vec<Lease>),
    Device(Arc<Gpu>, Vec<DeviceRange>),
    /// The one region of a rank that passes on.
    Arena(Exposed),
}

impl Lent {
    /// Reads rows of a region one after another, a piece at a time. `None` where they are not all in it, or cannot be read.
    pub(crate) fn rows(&self, region: usize, rows: Rows, read: &mut dyn FnMut(&[u8])) -> Option<()> {
        match self {
            Self::Host(regions) => {
                let bytes = regions.get(region)?.bytes();
                for range in rows.ranges() {
                    let Range { start, end } = range?;
                    read(bytes.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?)?);
                }
                Some(())
            }
            Self::Device(gpu, regions) => row_by_row(gpu, regions.get(region)?, rows, read),
            Self::Arena(arena) => (region == 0).then(|| arena.rows(rows, read))?,
        }
    }
}

/// Of a GPU a block is copied at once, and read in the host.
impl ReadRows for Lent {
    fn bytes_max(&self) -> usize {
        match self {
            Self::Host(regions) => regions.bytes_max(),
            Self::Device(..) | Self::Arena(_) => gpu::BLOCK_BYTES as usize,
        }
    }

    fn read(
        &self,
        at: Strided,
        [rows, row_bytes]: [usize; 2],
        work: &mut dyn FnMut(&[u8], usize) -> Option<()>,
    ) -> Option<()> {
        match self {
            Self::Host(regions) => regions.read(at, [rows, row_bytes], work),
            Self::Device(gpu, regions) => {
                let Strided { region, offset, stride } = at;
                let wanted = Rows { offset, count: rows as u64, bytes: row_bytes as u64, stride };
                let mut done = None;
                let mut once = |bytes: &[u8], landed: Rows| {
                    // Rows without a gap between them land as one.
                    let stride = if landed.count == 1 { row_bytes as u64 } else { landed.stride };
                    done = usize::try_from(stride).ok().and_then(|stride| work(bytes, stride));
                };
                read_or_log(gpu, regions.get(region.index())?, wanted, &mut once)?;
                done
            }
            // What is passed on is never made into anything else.
            Self::Arena(_) => None,
        }
    }
}

/// Copied at once from host memory that others may write; with what reads it, it stays in a core's own cache.
const BLOCK_BYTES: u64 = 128 << 10;

/// Memory of an inference rank, which others may write.
#[derive(Clone)]
pub(crate) enum Exposed {
    Host(Target),
    Device(Arc<Gpu>, DeviceRange),
}

impl Exposed {
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Host(target) => target.len() as u64,
            Self::Device(_, range) => range.len(),
        }
    }

    pub(crate) fn in_host(&self) -> Option<&Target> {
        if let Self::Host(target) = self { Some(target) } else { None }
    }

    pub(crate) fn on_gpu(&self) -> Option<(&Arc<Gpu>, &DeviceRange)> {
        if let Self::Device(gpu, range) = self { Some((gpu, range)) } else { None }
    }

    /// Lets peers write to it over a rail.
    pub(crate) fn expose(&self, rail: &mut Rail) -> Result<RemoteRegion, Error> {
        let refused = |error: RegionError| FabricError::Rail(error.to_string());
        let (_, region) = match self {
            Self::Host(target) => rail.expose(target).map_err(refused)?,
            Self::Device(_, range) => rail.expose_device(&for_nics(range)?).map_err(refused)?,
        };
        Ok(region)
    }

    /// Makes what NICs have written visible to whoever reads it next.
    pub(crate) fn flush(&self) -> Result<(), Error> {
        match self {
            Self::Host(_) => Ok(()),
            Self::Device(gpu, _) => {
                gpu.device().flush_rdma_writes(Observer::AllDevices)?;
                Ok(())
            }
        }
    }

    /// Its address, which on a GPU no host code can follow.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        match self {
            Self::Host(target) => target.as_ptr(),
            // An address of this process fits.
            Self::Device(_, range) => {
                std::ptr::without_provenance_mut(usize::try_from(range.address()).unwrap_or(0))
            }
        }
    }

    /// Copies bytes from `offset` on out into `into`.
    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        match self {
            Self::Host(target) => {
                target.read(usize::try_from(offset).unwrap_or(usize::MAX), into).map_err(outside)
            }
            Self::Device(gpu, range) => gpu.read(&range.part(offset..range.len())?, into),
        }
    }

    /// Reads rows one after another, a piece at a time. `None` where they are not all in it, or cannot be read.
    pub(crate) fn rows(&self, rows: Rows, read: &mut dyn FnMut(&[u8])) -> Option<()> {
        match self {
            Self::Host(target) => {
                let mut block = vec![0; BLOCK_BYTES as usize];
                for range in rows.blocks(BLOCK_BYTES).flat_map(Rows::ranges) {
                    let Range { start, end } = range?;
                    let block = block.get_mut(..usize::try_from(end - start).ok()?)?;
                    target.read(usize::try_from(start).ok()?, block).ok()?;
                    read(block);
                }
                Some(())
            }
            Self::Device(gpu, range) => row_by_row(gpu, range, rows, read),
        }
    }

    /// Copies all of it over another as long, on the same device. Nothing may write to either meanwhile.
    pub(crate) fn copy_to(&self, other: &Self) -> Result<(), Error> {
        match (self, other) {
            (Self::Host(from), Self::Host(to)) => from.copy_to(to).map_err(outside),
            (Self::Device(gpu, from), Self::Device(_, to)) => gpu.copy(from.clone(), to.clone()),
            _ => Err(Error::Memory { what: "the weights", reason: "defect: on two devices".into() }),
        }
    }
}

fn outside(error: RangeError) -> Error {
    Error::Memory { what: "the weights", reason: format!("defect: {error}") }
}

/// As [`Lent::rows`].
fn row_by_row(gpu: &Gpu, from: &DeviceRange, rows: Rows, read: &mut dyn FnMut(&[u8])) -> Option<()> {
    let mut each = |bytes: &[u8], rows: Rows| {
        for range in rows.ranges().flatten() {
            read(bytes.get(range.start as usize..range.end as usize).unwrap_or_default());
        }
    };
    read_or_log(gpu, from, rows, &mut each)
}

fn read_or_log(gpu: &Gpu, from: &DeviceRange, rows: Rows, read: &mut dyn FnMut(&[u8], Rows)) -> Option<()> {
    gpu.rows(from, rows, read).inspect_err(|error| tracing::error!(%error, "cannot read the weights")).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn blocks_are_the_same_bytes_in_the_same_order(
            offset in 0..50_u64, count in 0..20_u64, bytes in 0..30_u64, gap in 0..3_u64, bytes_max in 1..100_u64
        ) {
            let rows = Rows { offset, count, bytes, stride: bytes + gap };
            let each = |rows: Rows| rows.ranges().flat_map(Option::unwrap);
            let mut found = Vec::new();
            for block in rows.blocks(bytes_max) {
                prop_assert!(block.count * block.bytes <= bytes_max);
                let extent = block.extent().unwrap();
                prop_assert!(each(block).all(|at| extent.contains(&at)));
                found.extend(each(block));
            }
            prop_assert_eq!(found, each(rows).collect::<Vec<_>>());
        }
    }
}
