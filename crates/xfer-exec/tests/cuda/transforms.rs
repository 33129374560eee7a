//! The planner, the driver over device memory and the kernels together, as the test `transforms` has it in host memory.

#[allow(dead_code)] // its own tests use all of it
#[path = "../../../xfer-plan/tests/scenario/mod.rs"]
mod scenario;
#[allow(dead_code)] // as well
#[path = "../transforms/whole.rs"]
mod whole;

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use efa_core::Lease;
use proptest::strategy::{Strategy as _, ValueTree as _};
use proptest::test_runner::TestRunner;
use scenario::Choices;
use weight_ops::cuda::DeviceRange;
use xfer_exec::arrivals::Arrivals;
use xfer_exec::cuda::{
    CudaPeer, CudaRail, CudaRailConfig, DeviceRail, DeviceRegion, GpuMemory, GpuMemoryConfig, Mirror,
    OffloadedMemory, StagedMemory, expose,
};
use xfer_exec::driver::{Driver, Outcome, Step, Store};
use xfer_exec::local::{Attached, Doorman, LocalPeer, LocalRail, fetch};
use xfer_exec::program::Route;
use xfer_exec::{Program, RailIndex, RankLimits};
use xfer_plan::{Manifest, Op, Plan, ReceiverManifest, ReceiverRank, Relay, TrainerRank, plan};

use crate::drivers::Contiguous;
use crate::gpu::{Gpu, gpus};
use crate::{SOON, offloaded, staged};

const UNTOUCHED: u8 = 0xee;

/// Device memory is mapped in multiples of this.
const REGION_BYTES: u64 = 2 << 20;

struct Receiver {
    regions: Vec<DeviceRange>,
    /// Of the regions, where that is how they are reached.
    mirrors: Vec<Mirror>,
    doorman: Doorman,
    _arrivals: Arrivals,
}

/// One whose memory is written where it is.
fn receiver(gpu: &Gpu, regions: &[u64]) -> Receiver {
    let buffers: Vec<_> =
        regions.iter().map(|bytes| Arc::new(gpu.device.alloc_vmm(*bytes, REGION_BYTES).unwrap())).collect();
    let told = buffers.iter().map(|buffer| DeviceRegion::mapped(buffer).unwrap()).collect();
    let (doorman, arrivals) = expose(told).unwrap();
    let regions = buffers.iter().map(DeviceRange::whole).collect();
    Receiver { regions, mirrors: Vec::new(), doorman, _arrivals: arrivals }
}

/// One whose memory is behind mirrors.
fn mirrored(gpu: &Gpu, regions: &[u64]) -> Receiver {
    let buffer = |bytes: &u64| DeviceRange::whole(&Arc::new(gpu.device.alloc(*bytes).unwrap()));
    let regions: Vec<DeviceRange> = regions.iter().map(buffer).collect();
    let mirror = |_| Mirror::shared(&gpu.device, REGION_BYTES).unwrap();
    let mirrors: Vec<Mirror> = regions.iter().map(mirror).collect();
    let files = mirrors.iter().map(|mirror| mirror.file().unwrap().clone()).collect();
    let (doorman, arrivals) = Doorman::open(files).unwrap();
    Receiver { regions, mirrors, doorman, _arrivals: arrivals }
}

impl Receiver {
    fn attached(&self) -> Vec<Attached> {
        let attach = |region: u32| {
            let file = fetch(self.doorman.address(), region, SOON).unwrap();
            Attached::new(&file, region, REGION_BYTES).unwrap()
        };
        (0..self.mirrors.len() as u32).map(attach).collect()
    }

    fn clear(&self, gpu: &Gpu) {
        let untouched = vec![UNTOUCHED; REGION_BYTES as usize];
        self.regions.iter().for_each(|region| gpu.write(region, &untouched));
        self.attached().iter_mut().for_each(|memory| memory.copy_in(0, &untouched).unwrap());
    }

    fn read(&self, gpu: &Gpu) -> Vec<Vec<u8>> {
        for (mirror, region) in self.mirrors.iter().zip(&self.regions) {
            mirror.upload_all(region).unwrap().wait(SOON).unwrap();
        }
        self.regions.iter().map(|region| gpu.download(region)).collect()
    }
}

/// A rank of a plan.
type Part<'a> = (&'a Plan, &'a Manifest, TrainerRank);

/// Its program, and how long a slot is: where everything is staged most operations do not fit.
fn bound((plan, manifest, rank): Part<'_>, stages_all: bool) -> (Program, u64) {
    let part = plan.part(rank, manifest).unwrap();
    let longest = |bytes: fn(&Op) -> u64| part.ops.iter().map(bytes).max().unwrap_or(0);
    let slot_bytes = if stages_all { (longest(Op::bytes) / 3).max(16) } else { longest(Op::staged_bytes) };
    let region_bytes = manifest.trainers[rank.index()].regions.clone();
    let limits = RankLimits { region_bytes, slot_bytes, transforms: true };
    let route = |receiver: &ReceiverManifest| Route {
        rails: vec![RailIndex(0)],
        region_bytes: receiver.regions.clone(),
    };
    let routes = (0..).map(ReceiverRank).zip(manifest.receivers.iter().map(route)).collect();
    let quantised = plan.quant_part(rank, manifest).unwrap();
    let bind = if stages_all { Program::staged } else { Program::new };
    let program = bind(part, BTreeMap::new(), &limits, routes).unwrap();
    (program.with_quantization(&quantised, &limits).unwrap(), slot_bytes)
}

/// To these receivers' GPUs.
fn rail(gpu: &Gpu, receivers: &[Receiver]) -> Box<CudaRail> {
    let opened = |receiver: &Receiver| {
        let region_bytes = vec![REGION_BYTES; receiver.regions.len()];
        CudaPeer::open(&gpu.device, receiver.doorman.address(), &region_bytes, SOON).unwrap()
    };
    let peers = (0..).map(ReceiverRank).zip(receivers.iter().map(opened)).collect();
    Box::new(CudaRail::new(&gpu.kernels, peers, CudaRailConfig::default()).unwrap())
}

/// A driver that writes to GPUs.
fn direct(gpu: &Gpu, part: Part<'_>, receivers: &[Receiver], takes_rows: bool) -> Driver<GpuMemory> {
    let (program, slot_bytes) = bound(part, false);
    let rail = rail(gpu, receivers);
    let rail: Box<DeviceRail> = if takes_rows { rail } else { Box::new(Contiguous(*rail)) };
    let config = GpuMemoryConfig {
        staging_bytes: 2 * slot_bytes,
        slot_bytes,
        multiprocessors: NonZeroU32::MIN,
        close_max: SOON,
    };
    let memory = GpuMemory::new(&gpu.kernels, &program, config, None).unwrap();
    Driver::over(memory, program, vec![rail], SOON * 6, SOON)
}

/// A driver that writes to mirrors.
fn by_host(gpu: &Gpu, part: Part<'_>, receivers: &[Receiver]) -> Driver<StagedMemory> {
    let (program, slot_bytes) = bound(part, true);
    let peer = |receiver: &Receiver| {
        let region_bytes = vec![REGION_BYTES; receiver.mirrors.len()];
        LocalPeer::open(receiver.doorman.address(), &region_bytes, SOON).unwrap()
    };
    let rail = LocalRail::new((0..).map(ReceiverRank).zip(receivers.iter().map(peer)).collect());
    staged::driver(gpu, program, vec![Box::new(rail)], staged::staging(gpu, 3 * slot_bytes), slot_bytes)
}

/// A driver of weights in page-locked memory that writes to GPUs.
fn offloaded(gpu: &Gpu, part: Part<'_>, receivers: &[Receiver]) -> Driver<OffloadedMemory> {
    let (program, slot_bytes) = bound(part, true);
    offloaded::driver(gpu, program, rail(gpu, receivers), slot_bytes)
}

fn lent(gpu: &Gpu, bytes: &[u8]) -> Lease {
    offloaded::pinned(gpu, bytes).freeze()
}

/// Pushes other weights and then, with the same drivers, what the trainers have, from the first GPU to the last; gives what has arrived.
fn push<M: Store<Region: Clone>>(
    gpus: &[Gpu],
    manifest: &Manifest,
    sources: &[Vec<Vec<u8>>],
    weights: fn(&Gpu, &[u8]) -> M::Region,
    receiver: fn(&Gpu, &[u64]) -> Receiver,
    driver: impl Fn(&Gpu, Part<'_>, &[Receiver]) -> Driver<M>,
) -> Vec<Vec<Vec<u8>>> {
    let (from, to) = (&gpus[0], &gpus[gpus.len() - 1]);
    let manifest = &aligned(manifest);
    let plan = plan(manifest).unwrap();
    let receivers: Vec<Receiver> =
        manifest.receivers.iter().map(|declared| receiver(to, &declared.regions)).collect();
    let ranks: Vec<TrainerRank> = (0..sources.len() as u32).map(TrainerRank).collect();
    let mut drivers: Vec<_> =
        ranks.iter().map(|rank| driver(from, (&plan, manifest, *rank), &receivers)).collect();
    let lend = |lend: &dyn Fn(&Vec<u8>) -> M::Region| -> Vec<Vec<M::Region>> {
        sources.iter().map(|regions| regions.iter().map(lend).collect()).collect()
    };
    let others = lend(&|bytes| weights(from, &vec![0; bytes.len()]));
    let weights = lend(&|bytes| weights(from, bytes));
    let mut magnitudes = plan.magnitudes();
    for weights in [others, weights] {
        receivers.iter().for_each(|receiver| receiver.clear(to));
        magnitudes.clear();
        for ((rank, driver), weights) in ranks.iter().zip(&mut drivers).zip(&weights) {
            magnitudes.report(*rank, &driver.magnitudes(weights).unwrap()).unwrap();
        }
        for ((rank, driver), weights) in ranks.iter().zip(&mut drivers).zip(&weights) {
            driver.begin_told(weights.clone(), &magnitudes.merged(*rank).unwrap());
            let Outcome { result, regions, .. } = loop {
                if let Step::Over(outcome) = driver.step() {
                    break outcome;
                }
            };
            result.unwrap();
            assert_eq!(regions.len(), weights.len());
        }
    }
    receivers.iter().map(|receiver| receiver.read(to)).collect()
}

/// The same with regions as device memory is mapped.
fn aligned(manifest: &Manifest) -> Manifest {
    let mut manifest = manifest.clone();
    for bytes in manifest.receivers.iter_mut().flat_map(|receiver| &mut receiver.regions) {
        *bytes = REGION_BYTES;
    }
    manifest
}

/// The same with every piece at a multiple of its elements: kernels take no others.
fn with_aligned_pieces(mut manifest: Manifest) -> Manifest {
    for trainer in &mut manifest.trainers {
        trainer.regions.fill(0);
        for piece in &mut trainer.pieces {
            let end = &mut trainer.regions[piece.region.index()];
            piece.offset = end.next_multiple_of(8);
            *end = piece.offset + piece.bytes().unwrap();
        }
        // No GPU has memory of no bytes.
        trainer.regions.iter_mut().for_each(|bytes| *bytes = (*bytes).max(8));
    }
    manifest
}

#[test]
fn what_a_gpu_sends_is_what_the_whole_tensors_give() {
    let Some(gpus) = gpus() else { return };
    let mut runner = TestRunner::deterministic();
    for case in 0..24 {
        let choices = scenario::choices().new_tree(&mut runner).unwrap().current();
        let mut manifest = scenario::manifest(&mut Choices::new(choices));
        manifest.options.relay = Relay::Never;
        let manifest = with_aligned_pieces(manifest);
        let (sources, takes_rows) = (scenario::sources(&manifest), case % 2 == 0);
        let direct = |gpu: &Gpu, part: Part<'_>, to: &[Receiver]| direct(gpu, part, to, takes_rows);
        let expected = scenario::expected(&aligned(&manifest), UNTOUCHED);
        let found = push(&gpus, &manifest, &sources, Gpu::upload, receiver, direct);
        assert!(found == expected, "{case}: {manifest:#?}");
        let found = push(&gpus, &manifest, &sources, Gpu::upload, mirrored, by_host);
        assert!(found == expected, "{case}, by host memory: {manifest:#?}");
        let found = push(&gpus, &manifest, &sources, lent, receiver, offloaded);
        assert!(found == expected, "{case}, offloaded: {manifest:#?}");
    }
}

#[test]
fn blocks_that_four_trainers_cut_arrive_from_a_gpu_as_the_cpu_quantises_the_whole() {
    let Some(gpus) = gpus() else { return };
    let direct = |gpu: &Gpu, part: Part<'_>, to: &[Receiver]| direct(gpu, part, to, true);
    whole::check(&|manifest, sources| push(&gpus, manifest, sources, Gpu::upload, receiver, direct));
    whole::check(&|manifest, sources| push(&gpus, manifest, sources, Gpu::upload, mirrored, by_host));
    whole::check(&|manifest, sources| push(&gpus, manifest, sources, lent, receiver, offloaded));
}
