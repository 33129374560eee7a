//! What rails of libfabric read from: host memory, also such that others write to, or a GPU's.

use efa_core::{DeviceRef, DeviceSlice, Held, Lease, MemoryRef, Rail, RegionError, RegionId, Source, Target};

/// See the module.
pub trait OfiSource: Source + Send + 'static {
    /// What is registered.
    type Memory: Clone + Send;

    /// What it is a part of.
    fn memory(&self) -> &Self::Memory;

    /// Its length in bytes.
    fn bytes(&self) -> u64;

    /// Where a memory begins.
    fn base_address(memory: &Self::Memory) -> usize;

    /// Whether both are the same memory.
    fn same(one: &Self::Memory, other: &Self::Memory) -> bool;

    /// Makes a memory one that the rail may write from.
    ///
    /// # Errors
    ///
    /// The rail's.
    fn register(rail: &mut Rail, memory: &Self::Memory) -> Result<RegionId, RegionError>;

    /// As it comes back from the rail.
    fn returned(held: Held) -> Option<Self>;
}

impl OfiSource for Lease {
    type Memory = MemoryRef;

    fn memory(&self) -> &MemoryRef {
        self.memory()
    }
    fn bytes(&self) -> u64 {
        self.len() as u64
    }
    fn base_address(memory: &MemoryRef) -> usize {
        memory.base_address()
    }
    fn same(one: &MemoryRef, other: &MemoryRef) -> bool {
        one.ptr_eq(other)
    }
    fn register(rail: &mut Rail, memory: &MemoryRef) -> Result<RegionId, RegionError> {
        rail.register(memory)
    }
    fn returned(held: Held) -> Option<Self> {
        held.shared()
    }
}

impl OfiSource for Target {
    type Memory = MemoryRef;

    fn memory(&self) -> &MemoryRef {
        self.memory()
    }
    fn bytes(&self) -> u64 {
        self.len() as u64
    }
    fn base_address(memory: &MemoryRef) -> usize {
        memory.base_address()
    }
    fn same(one: &MemoryRef, other: &MemoryRef) -> bool {
        one.ptr_eq(other)
    }
    fn register(rail: &mut Rail, memory: &MemoryRef) -> Result<RegionId, RegionError> {
        rail.register(memory)
    }
    fn returned(held: Held) -> Option<Self> {
        held.target()
    }
}

impl OfiSource for DeviceSlice {
    type Memory = DeviceRef;

    fn memory(&self) -> &DeviceRef {
        self.memory()
    }
    fn bytes(&self) -> u64 {
        self.len() as u64
    }
    fn base_address(memory: &DeviceRef) -> usize {
        memory.base_address()
    }
    fn same(one: &DeviceRef, other: &DeviceRef) -> bool {
        one.ptr_eq(other)
    }
    fn register(rail: &mut Rail, memory: &DeviceRef) -> Result<RegionId, RegionError> {
        rail.register_device(memory)
    }
    fn returned(held: Held) -> Option<Self> {
        held.device()
    }
}
