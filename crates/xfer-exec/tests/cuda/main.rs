//! The rail over CUDA IPC, against a receiver that is another process, and the ways from a GPU by host memory. Needs one GPU; with
//! two, also from one to the other.
//! Without any it says `skipped: no CUDA device`, and fails where hardware was asked for (`WEIGHTSYNC_HW=1`).

mod drivers;
mod faults;
mod gpu;
mod mirror;
mod offloaded;
mod peer;
mod staged;
mod transforms;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use gpu::{Gpu, Random, gpus};
use gpu_mem::Device;
use peer::{Peer, REGION_BYTES};
use weight_ops::cuda::DeviceRange;
use xfer_exec::cuda::{CudaError, CudaPeer, CudaRail, CudaRailConfig, DeviceRegion, expose};
use xfer_exec::local::DoormanAddress;
use xfer_exec::program::WriteId;
use xfer_exec::{Done, Rail, RailWrite, Rows};
use xfer_plan::{NO_TAG, ReceiverRank, RegionIndex};

const SOON: Duration = Duration::from_secs(10);
const TO: ReceiverRank = ReceiverRank(3);
const SOURCE_BYTES: u64 = 24 << 20;
/// From here on a span goes by the copy engine.
const LONG: u64 = 8 << 20;

type Write = RailWrite<DeviceRange>;

/// A WRITE, as numbers.
#[derive(Debug, Clone, Copy)]
struct Planned {
    from: u64,
    rows: Rows,
    region: usize,
    offset: u64,
}

impl Planned {
    fn write(&self, number: u32, source: &DeviceRange) -> Write {
        let extent = self.rows.extent_bytes().unwrap();
        RailWrite {
            id: WriteId { op: number, row: 0 },
            from: source.part(self.from..self.from + extent).unwrap(),
            rows: self.rows,
            to: TO,
            region: RegionIndex(self.region as u32),
            offset: self.offset,
            tag: NO_TAG,
        }
    }

    /// What the WRITE does, byte by byte.
    fn apply(&self, source: &[u8], regions: &mut [Vec<u8>]) {
        let mut to = self.offset as usize;
        for row in 0..u64::from(self.rows.count) {
            for byte in 0..u64::from(self.rows.bytes) {
                regions[self.region][to] = source[(self.from + row * self.rows.stride + byte) as usize];
                to += 1;
            }
        }
    }
}

/// WRITEs of all shapes that overlap nowhere at the receiver.
fn plan(random: &mut Random) -> Vec<Planned> {
    let mut planned = Vec::new();
    let mut below = |bound: u64| random.below(bound as usize) as u64;
    for (region, len) in REGION_BYTES.into_iter().enumerate() {
        let mut offset = below(40);
        loop {
            // Both ways of the copy engine, then anything.
            let kind = if planned.len() < 2 { planned.len() as u64 } else { below(20) };
            let (count, bytes, gap) = match kind {
                0 => (1, LONG + below(1 << 20), 0),
                1 => (2, LONG + below(1000), below(1000)),
                2 => (3 + below(3), 3 << 20, 0),
                3..6 => (1, below(300), 0),
                6..12 => (1 + below(300), 1 + below(700), below(90)),
                12..15 => (2 + below(9), 16 * (1 + below(2000)), 16 * below(3)),
                _ => (1, below(300_000), 0),
            };
            let rows = Rows { count: count as u32, bytes: bytes as u32, stride: bytes + gap };
            let extent = rows.extent_bytes().unwrap();
            if offset + rows.total_bytes() > len {
                break;
            }
            planned.push(Planned { from: below(SOURCE_BYTES - extent), rows, region, offset });
            offset += rows.total_bytes() + below(3) * below(40);
        }
    }
    for last in (1..planned.len()).rev() {
        planned.swap(last, random.below(last + 1));
    }
    planned
}

fn opened(device: &Device, address: &DoormanAddress) -> CudaPeer {
    CudaPeer::open(device, address, &REGION_BYTES, SOON).unwrap()
}

fn rail(gpu: &Gpu, peer: CudaPeer) -> CudaRail {
    CudaRail::new(&gpu.kernels, BTreeMap::from([(TO, peer)]), CudaRailConfig::default()).unwrap()
}

/// Posts everything, and polls until it is over. Every WRITE comes back once.
fn push(rail: &mut CudaRail, writes: Vec<Write>, random: &mut Random) -> Vec<Done<DeviceRange>> {
    let count = writes.len();
    let mut waiting: VecDeque<Write> = writes.into();
    let (mut outbox, mut done) = (VecDeque::new(), Vec::new());
    let began = Instant::now();
    while done.len() < count {
        let more = random.below(60).min(waiting.len());
        outbox.extend(waiting.drain(..more));
        rail.post(&mut outbox).unwrap();
        rail.poll(&mut done).unwrap();
        assert!(began.elapsed() < SOON * 12, "{} of {count} are done", done.len());
    }
    let mut ids: Vec<WriteId> = done.iter().map(|done| done.id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!((ids.len(), done.len()), (count, count));
    done
}

fn bytes_arrive(sender: &Gpu, receiver: &Gpu, kind: &str) {
    let mut random = Random(7 + u64::from(receiver.device.index()));
    let peer = Peer::start(kind, receiver.device.index());
    let source = random.bytes(SOURCE_BYTES as usize);
    let memory = sender.upload(&source);
    let mut rail = rail(sender, opened(&sender.device, &peer.address));
    let mut expected = peer::fresh();
    // Two pushes over the same batches.
    for _ in 0..2 {
        let planned = plan(&mut random);
        let write = |(number, planned): (usize, &Planned)| planned.write(number as u32, &memory);
        let writes = planned.iter().enumerate().map(write).collect();
        for done in push(&mut rail, writes, &mut random) {
            done.result.unwrap();
        }
        planned.iter().for_each(|write| write.apply(&source, &mut expected));
        for (region, (found, expected)) in peer.regions().into_iter().zip(&expected).enumerate() {
            let differs = found.iter().zip(expected).position(|(found, expected)| found != expected);
            assert_eq!((differs, found.len()), (None, expected.len()), "{kind}, region {region}");
        }
    }
    Box::new(rail).close(&mut Vec::new()).unwrap();
}

#[test]
fn every_byte_arrives_in_another_process_by_descriptors_and_nothing_else_changes() {
    let Some(gpus) = gpus() else { return };
    gpus.iter().for_each(|receiver| bytes_arrive(&gpus[0], receiver, peer::MAPPED));
}

#[test]
fn every_byte_arrives_in_another_process_by_a_handle_and_nothing_else_changes() {
    let Some(gpus) = gpus() else { return };
    gpus.iter().for_each(|receiver| bytes_arrive(&gpus[0], receiver, peer::HANDLE));
}

#[test]
fn memory_of_a_peer_that_was_killed_is_there_while_it_is_open() {
    let Some(gpus) = gpus() else { return };
    let peer = Peer::start(peer::MAPPED, gpus[0].device.index());
    let device = &gpus[0].device;
    let (address, opened) = (peer.address.clone(), opened(device, &peer.address));
    peer.kill();
    let gone = CudaPeer::open(device, &address, &REGION_BYTES, SOON).err().unwrap();
    assert!(matches!(gone, CudaError::Local(_)), "{gone}");

    let mut random = Random(5);
    let source = random.bytes(SOURCE_BYTES as usize);
    let memory = gpus[0].upload(&source);
    let planned = plan(&mut random);
    let write = |(number, planned): (usize, &Planned)| planned.write(number as u32, &memory);
    let regions = opened.regions().to_vec();
    let mut rail = rail(&gpus[0], opened);
    for done in push(&mut rail, planned.iter().enumerate().map(write).collect(), &mut random) {
        done.result.unwrap();
    }
    let mut expected = peer::fresh();
    planned.iter().for_each(|write| write.apply(&source, &mut expected));
    for (region, expected) in regions.iter().zip(&expected) {
        assert!(gpus[0].download(region) == *expected);
    }
}

#[test]
fn who_lies_or_has_no_key_opens_nothing() {
    let Some(gpus) = gpus() else { return };
    let device = &gpus[0].device;
    let peer = Peer::start(peer::HANDLE, device.index());
    let open = |address: &DoormanAddress, bytes: &[u64]| {
        CudaPeer::open(device, address, bytes, SOON).map_err(Box::new)
    };
    let wrong = DoormanAddress { key: [0; 16], ..peer.address.clone() };
    let refused = open(&wrong, &REGION_BYTES).err().unwrap();
    assert!(matches!(*refused, CudaError::Local(_)), "{refused}");
    let longer = open(&peer.address, &[REGION_BYTES[0], REGION_BYTES[1] + 1]).err().unwrap();
    assert!(matches!(*longer, CudaError::Length { region: 1, .. }), "{longer}");
    let none = open(&peer.address, &[REGION_BYTES[0], REGION_BYTES[1], 1]).err().unwrap();
    assert!(matches!(*none, CudaError::Local(_)), "{none}");

    // Host memory is not taken for device memory, nor the other way round.
    let (_target, file) = xfer_exec::local::SharedFile::create(64).unwrap();
    let (doorman, _) = xfer_exec::local::Doorman::open(vec![file]).unwrap();
    let host = open(doorman.address(), &[64]).err().unwrap();
    assert!(matches!(*host, CudaError::NotDeviceMemory { region: 0, .. }), "{host}");
    let buffer = Arc::new(device.alloc_vmm(1 << 20, 1 << 20).unwrap());
    let (doorman, _arrivals) = expose(vec![DeviceRegion::mapped(&buffer).unwrap()]).unwrap();
    assert!(xfer_exec::local::fetch(doorman.address(), 0, SOON).is_err());
    let same = open(doorman.address(), &[1 << 20]).unwrap();
    assert_eq!(gpus[0].download(&same.regions()[0]).len(), 1 << 20);

    let scattered = Arc::new(device.alloc_vmm(130 << 20, 2 << 20).unwrap());
    let many = DeviceRegion::mapped(&scattered).err().unwrap();
    assert!(matches!(many, CudaError::TooManyChunks { chunks: 65, max: 64 }), "{many}");
}
