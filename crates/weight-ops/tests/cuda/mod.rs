//! What the tests on a GPU share: the device or a reason to skip, memory with guards, and inputs.

#![allow(dead_code)] // each test takes what it needs

use std::sync::Arc;

use gpu_mem::{Cuda, Device, DeviceMemory, Span, Stream};
use weight_ops::Dtype;
use weight_ops::cuda::{DeviceRange, Kernels, Operation};

/// What memory holds that nothing may write, or nothing has written.
pub(crate) const POISON: u8 = 0xa5;

/// Bytes before and behind a destination.
const GUARD_BYTES: u64 = 512;

pub(crate) const FLOATS: [Dtype; 3] = [Dtype::BF16, Dtype::F16, Dtype::F32];

/// A device, its kernels, and a stream.
pub(crate) struct Gpu {
    pub(crate) device: Device,
    pub(crate) kernels: Kernels,
    pub(crate) stream: Stream,
}

/// A destination in the middle of poisoned memory.
pub(crate) struct Guarded {
    all: DeviceRange,
    pub(crate) range: DeviceRange,
    start: usize,
}

/// All devices; none where the test is to be skipped. Says so, or fails where hardware was asked for.
pub(crate) fn devices(needed: usize) -> Option<Vec<Device>> {
    let opened = Cuda::open().and_then(|cuda| cuda.devices());
    match opened {
        Ok(devices) if devices.len() >= needed => return Some(devices),
        Ok(devices) if !devices.is_empty() => println!("skipped: one CUDA device, {needed} are needed"),
        other => {
            assert!(std::env::var_os("WEIGHTSYNC_HW").is_none_or(|asked| asked != "1"), "{other:?}");
            println!("skipped: no CUDA device");
        }
    }
    None
}

impl Gpu {
    pub(crate) fn open() -> Option<Gpu> {
        devices(1).map(|devices| Gpu::on(&devices[0]))
    }

    pub(crate) fn on(device: &Device) -> Gpu {
        let kernels = Kernels::new(device).unwrap();
        Gpu { device: device.clone(), kernels, stream: device.stream().unwrap() }
    }

    /// Bytes in memory of exactly their length, after `shift` more.
    pub(crate) fn upload(&self, bytes: &[u8], shift: usize) -> DeviceRange {
        let mut staging = self.device.pinned(shift + bytes.len()).unwrap();
        staging.bytes_mut()[shift..].copy_from_slice(bytes);
        let len = (shift + bytes.len()) as u64;
        let memory = self.device.alloc(len).unwrap();
        let (_, memory) =
            self.stream.copy_to_device(staging, memory, &[Span::first(len)]).unwrap().wait().unwrap();
        DeviceRange::new(&Arc::new(memory), shift as u64..len).unwrap()
    }

    pub(crate) fn download(&self, range: &DeviceRange) -> Vec<u8> {
        let host = self.device.pinned(range.len() as usize).unwrap();
        let all = [Span::first(range.len())];
        let (_, host) = self.stream.copy_to_host(range.clone(), host, &all).unwrap().wait().unwrap();
        host.bytes().to_vec()
    }

    /// A poisoned destination, `shift` bytes behind an address that is aligned to 256.
    pub(crate) fn guarded(&self, len: usize, shift: usize) -> Guarded {
        let start = GUARD_BYTES as usize + shift;
        let bytes = (start + len) as u64 + GUARD_BYTES;
        let memory = self.device.alloc(bytes).unwrap();
        let memory = self.stream.fill(memory, POISON).unwrap().wait().unwrap();
        let all = DeviceRange::whole(&Arc::new(memory));
        let range = all.part(start as u64..(start + len) as u64).unwrap();
        Guarded { all, range, start }
    }

    /// The bytes of a destination. Nothing around it may have changed.
    pub(crate) fn read(&self, guarded: &Guarded) -> Vec<u8> {
        let mut bytes = self.download(&guarded.all);
        let behind = bytes.split_off(guarded.start + guarded.range.len() as usize);
        let inside = bytes.split_off(guarded.start);
        assert!(bytes.iter().all(|&byte| byte == POISON), "written before the destination");
        assert!(behind.iter().all(|&byte| byte == POISON), "written behind the destination");
        inside
    }

    pub(crate) fn run(&self, operation: Operation) -> Operation {
        operation.enqueue(&self.stream).unwrap().wait().unwrap()
    }
}

/// Sebastiano Vigna's SplitMix64.
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(8)).flat_map(|_| self.next().to_ne_bytes()).take(len).collect()
    }

    /// Elements: most of them as large as weights are, one in eight any bits at all.
    pub(crate) fn elements(&mut self, dtype: Dtype, count: usize) -> Vec<u8> {
        let singles: Vec<f32> =
            (0..count).map(|_| self.next() as i64 as f32 / i64::MAX as f32 * 0.1).collect();
        let mut bytes = encoded(dtype, &singles);
        for element in bytes.chunks_mut(dtype.bytes()) {
            if self.next().is_multiple_of(8) {
                element.copy_from_slice(&self.next().to_ne_bytes()[..dtype.bytes()]);
            }
        }
        bytes
    }
}

/// Singles as elements of a type.
pub(crate) fn encoded(dtype: Dtype, singles: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; singles.len() * dtype.bytes()];
    let singles: Vec<u8> = singles.iter().flat_map(|value| value.to_ne_bytes()).collect();
    weight_ops::cast_bytes(Dtype::F32, &singles, dtype, &mut bytes).unwrap();
    bytes
}

/// Elements that are hard to get right: every bit pattern of types of 8 and 16 bits; of f32 each sign, exponent and leading
/// mantissa with what decides about rounding to bf16, and the values of f16 and e4m3 and the middles between them, each with
/// its neighbours.
pub(crate) fn adversarial(dtype: Dtype) -> Vec<u8> {
    let mut values: Vec<f32> = Vec::new();
    match dtype {
        Dtype::F8E4M3 => return (0..=u8::MAX).collect(),
        Dtype::BF16 | Dtype::F16 => return (0..=u16::MAX).flat_map(u16::to_ne_bytes).collect(),
        Dtype::F32 => {}
    }
    for upper in 0..=u16::MAX {
        for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
            values.push(f32::from_bits(u32::from(upper) << 16 | lower));
        }
    }
    let e4m3: Vec<f32> = (0..0x7f).map(weight_ops::oracle::e4m3_to_f32).collect();
    let f16: Vec<f32> = (0..0x7c00).map(|bits| half::f16::from_bits(bits).to_f32()).collect();
    for pair in e4m3.windows(2).chain(f16.windows(2)) {
        for value in [pair[0], (pair[0] + pair[1]) / 2.0] {
            let near = [value.next_down(), value, value.next_up()];
            values.extend(near.iter().chain(&near.map(|value| -value)));
        }
    }
    encoded(dtype, &values)
}

/// Bytes as singles, for tables.
pub(crate) fn singles(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|single| f32::from_ne_bytes(single.try_into().unwrap())).collect()
}

/// Fails at the first difference, and shows its surroundings.
pub(crate) fn assert_same(ours: &[u8], expected: &[u8], what: &str) {
    assert_eq!(ours.len(), expected.len(), "{what}: lengths");
    let differs = ours.iter().zip(expected).filter(|(a, b)| a != b).count();
    if let Some(at) = ours.iter().zip(expected).position(|(a, b)| a != b) {
        let near = at.saturating_sub(4)..(at + 12).min(ours.len());
        panic!(
            "{what}: {differs} of {} bytes differ, first {at}: {:02x?} for {:02x?}",
            ours.len(),
            &ours[near.clone()],
            &expected[near]
        );
    }
}
