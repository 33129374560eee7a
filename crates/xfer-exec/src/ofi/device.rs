//! A rail of libfabric from a GPU's memory, for the driver over that memory: GPUDirect RDMA, where no byte touches the host.
//!
//! The driver's buffers are ranges of device memory; libfabric's are parts of what was registered with it. This turns the one
//! into the other, and keeps the range until the WRITE is over. What a NIC is told of must be one allocation, or one chunk of
//! mapped memory.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use efa_core::{DeviceRef, DeviceSlice};
use gpu_mem::{DeviceMemory as _, NicMemory};
use weight_ops::cuda::DeviceRange;
use xfer_plan::ReceiverRank;

use super::{OfiPeer, OfiRail};
use crate::program::WriteId;
use crate::rail::{Armed, Done, Rail, RailError, RailLimits, RailWrite};

/// Tells a NIC of device memory, by a dma-buf where there can be one. Done once, for all rails that are to register it.
///
/// # Errors
///
/// Memory without a byte, or of several chunks; a GPU that is lost.
pub fn for_nics(memory: &DeviceRange) -> Result<DeviceRef, gpu_mem::Error> {
    Ok(DeviceRef::new(NicMemory::export(memory.clone(), 0, memory.len())?))
}

/// See the module.
pub struct DeviceOfiRail {
    rail: OfiRail<DeviceSlice>,
    /// What was registered, by its first address.
    memories: BTreeMap<usize, DeviceRef>,
    /// What WRITEs in flight read.
    held: HashMap<WriteId, DeviceRange>,
    batch: VecDeque<RailWrite<DeviceSlice>>,
    done: Vec<Done<DeviceSlice>>,
}

impl DeviceOfiRail {
    /// As [`OfiRail::connect`], with memories of [`for_nics`]; of a rail that was opened for device memory.
    ///
    /// # Errors
    ///
    /// Those of [`OfiRail::connect`].
    pub fn connect(
        rail: efa_core::Rail,
        memories: &[DeviceRef],
        peers: BTreeMap<ReceiverRank, OfiPeer>,
        deadline: Duration,
    ) -> Result<Self, RailError> {
        let rail = OfiRail::connect(rail, memories, peers, deadline)?;
        let memories = memories.iter().map(|memory| (memory.base_address(), memory.clone())).collect();
        Ok(Self { rail, memories, held: HashMap::new(), batch: VecDeque::new(), done: Vec::new() })
    }

    /// Registers one more memory to write from.
    ///
    /// # Errors
    ///
    /// [`RailError`] where it cannot be registered.
    pub fn register(&mut self, memory: &DeviceRef) -> Result<(), RailError> {
        self.rail.register(memory)?;
        self.memories.insert(memory.base_address(), memory.clone());
        Ok(())
    }

    /// The part of what was registered that a range is.
    fn slice(&self, range: &DeviceRange) -> Option<DeviceSlice> {
        let (address, len) = (usize::try_from(range.address()).ok()?, usize::try_from(range.len()).ok()?);
        let (start, memory) = self.memories.range(..=address).next_back()?;
        memory.slice(address - start, len).ok()
    }

    /// A WRITE that was not taken, as it came.
    fn back(&mut self, write: RailWrite<DeviceSlice>) -> Option<RailWrite<DeviceRange>> {
        let from = self.held.remove(&write.id)?;
        let RailWrite { id, rows, to, region, offset, tag, .. } = write;
        Some(RailWrite { id, from, rows, to, region, offset, tag })
    }
}

impl Rail for DeviceOfiRail {
    type Buffer = DeviceRange;

    fn name(&self) -> String {
        self.rail.name()
    }

    fn limits(&self) -> RailLimits {
        self.rail.limits()
    }

    fn post(&mut self, writes: &mut VecDeque<RailWrite<DeviceRange>>) -> Result<(), RailError> {
        let mut unregistered = None;
        while let Some(write) = writes.pop_front() {
            let Some(slice) = self.slice(&write.from) else {
                unregistered = Some(write.id);
                writes.push_front(write);
                break;
            };
            let RailWrite { id, from, rows, to, region, offset, tag } = write;
            self.held.insert(id, from);
            self.batch.push_back(RailWrite { id, from: slice, rows, to, region, offset, tag });
        }
        let posted = self.rail.post(&mut self.batch);
        while let Some(write) = self.batch.pop_back() {
            if let Some(write) = self.back(write) {
                writes.push_front(write);
            }
        }
        posted?;
        match unregistered {
            // Only the WRITE at the front may be blamed.
            Some(id) if writes.front().is_some_and(|write| write.id == id) => {
                Err(RailError { rail: self.name(), reason: "its buffer is not registered".into() })
            }
            _ => Ok(()),
        }
    }

    fn poll(&mut self, done: &mut Vec<Done<DeviceRange>>) -> Result<(), RailError> {
        let polled = self.rail.poll(&mut self.done);
        for Done { id, result, .. } in self.done.drain(..) {
            if let Some(from) = self.held.remove(&id) {
                done.push(Done { id, from, result });
            }
        }
        polled
    }

    fn arm(&mut self) -> Armed<'_> {
        self.rail.arm()
    }

    fn close(self: Box<Self>, unfinished: &mut Vec<WriteId>) -> Result<(), RailError> {
        // Where it does not close, it keeps what was registered for ever, and with it what its WRITEs read.
        Box::new(self.rail).close(unfinished)
    }
}
