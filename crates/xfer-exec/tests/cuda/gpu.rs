//! The GPUs that there are, and bytes.

use std::sync::Arc;

use gpu_mem::{Cuda, Device, Span, Stream};
use weight_ops::cuda::{DeviceRange, Kernels};

/// A device with its kernels and a stream.
pub(crate) struct Gpu {
    pub(crate) device: Device,
    pub(crate) kernels: Kernels,
    stream: Stream,
}

/// The first GPU, and the second if the first reaches it; `None` where the test is to be skipped.
pub(crate) fn gpus() -> Option<Vec<Gpu>> {
    match Cuda::open().and_then(|cuda| cuda.devices()) {
        Ok(devices) if !devices.is_empty() => {
            let reached = |device: &&Device| devices[0].can_access(device).unwrap();
            Some(devices.iter().take(2).filter(reached).map(Gpu::on).collect())
        }
        other => {
            let asked = std::env::var_os("WEIGHTSYNC_HW").is_some_and(|value| value == "1");
            assert!(!asked, "WEIGHTSYNC_HW=1 asks for a GPU: {other:?}");
            println!("skipped: no CUDA device");
            None
        }
    }
}

impl Gpu {
    pub(crate) fn on(device: &Device) -> Self {
        let kernels = Kernels::new(device).unwrap();
        Self { device: device.clone(), kernels, stream: device.stream().unwrap() }
    }

    /// Writes bytes to the start of device memory.
    pub(crate) fn write(&self, to: &DeviceRange, bytes: &[u8]) {
        let mut host = self.device.pinned(bytes.len()).unwrap();
        host.bytes_mut().copy_from_slice(bytes);
        let all = [Span::first(bytes.len() as u64)];
        self.stream.copy_to_device(host, to.clone(), &all).unwrap().wait().unwrap();
    }

    pub(crate) fn upload(&self, bytes: &[u8]) -> DeviceRange {
        let memory = DeviceRange::whole(&Arc::new(self.device.alloc(bytes.len() as u64).unwrap()));
        self.write(&memory, bytes);
        memory
    }

    pub(crate) fn download(&self, range: &DeviceRange) -> Vec<u8> {
        let len = gpu_mem::DeviceMemory::len(range);
        let host = self.device.pinned(len as usize).unwrap();
        let (_, host) =
            self.stream.copy_to_host(range.clone(), host, &[Span::first(len)]).unwrap().wait().unwrap();
        host.bytes().to_vec()
    }
}

/// Sebastiano Vigna's SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(8)).flat_map(|_| self.next().to_ne_bytes()).take(len).collect()
    }
}
