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

use proptest::strategy::{Strategy as _, ValueTree as _};
use proptest::test_runner::TestRunner;
use scenario::Choices;
use weight_ops::cuda::DeviceRange;
use xfer_exec::cuda::{
    Arrivals, CudaPeer, CudaRail, CudaRailConfig, DeviceRail, DeviceRegion, GpuMemory, GpuMemoryConfig,
    expose,
};
use xfer_exec::driver::{Driver, Outcome, Step};
use xfer_exec::local::Doorman;
use xfer_exec::program::Route;
use xfer_exec::{Program, RailIndex, RankLimits};
use xfer_plan::{Manifest, Op, Plan, ReceiverRank, Relay, TrainerRank, plan};

use crate::SOON;
use crate::drivers::Contiguous;
use crate::gpu::{Gpu, gpus};

const UNTOUCHED: u8 = 0xee;

/// Device memory is mapped in multiples of this.
const REGION_BYTES: u64 = 2 << 20;

struct Receiver {
    regions: Vec<DeviceRange>,
    doorman: Doorman,
    _arrivals: Arrivals,
}

fn receiver(gpu: &Gpu, regions: &[u64]) -> Receiver {
    let buffers: Vec<_> =
        regions.iter().map(|bytes| Arc::new(gpu.device.alloc_vmm(*bytes, REGION_BYTES).unwrap())).collect();
    let told = buffers.iter().map(|buffer| DeviceRegion::mapped(buffer).unwrap()).collect();
    let (doorman, arrivals) = expose(told).unwrap();
    let regions = buffers.iter().map(DeviceRange::whole).collect();
    Receiver { regions, doorman, _arrivals: arrivals }
}

fn driver(
    gpu: &Gpu,
    (plan, manifest, rank): (&Plan, &Manifest, TrainerRank),
    receivers: &[Receiver],
    takes_rows: bool,
) -> Driver<GpuMemory> {
    let part = plan.part(rank, manifest).unwrap();
    let slot_bytes = part.ops.iter().map(Op::staged_bytes).max().unwrap_or(0);
    let region_bytes = manifest.trainers[rank.index()].regions.clone();
    let limits = RankLimits { region_bytes, slot_bytes, transforms: true };
    let (mut routes, mut peers) = (BTreeMap::new(), BTreeMap::new());
    for ((to, receiver), declared) in (0..).map(ReceiverRank).zip(receivers).zip(&manifest.receivers) {
        let region_bytes = declared.regions.clone();
        let peer = CudaPeer::open(&gpu.device, receiver.doorman.address(), &region_bytes, SOON).unwrap();
        peers.insert(to, peer);
        routes.insert(to, Route { rails: vec![RailIndex(0)], region_bytes });
    }
    let quantised = plan.quant_part(rank, manifest).unwrap();
    let program = Program::new(part, BTreeMap::new(), &limits, routes).unwrap();
    let program = program.with_quantization(&quantised, &limits).unwrap();
    let rail = CudaRail::new(&gpu.kernels, peers, CudaRailConfig::default()).unwrap();
    let rail: Box<DeviceRail> = if takes_rows { Box::new(rail) } else { Box::new(Contiguous(rail)) };
    let config = GpuMemoryConfig {
        staging_bytes: 2 * slot_bytes,
        slot_bytes,
        multiprocessors: NonZeroU32::MIN,
        close_max: SOON,
    };
    let memory = GpuMemory::new(&gpu.kernels, &program, config, None).unwrap();
    Driver::over(memory, program, vec![rail], SOON * 6, SOON)
}

/// Pushes what the trainers have, twice with the same drivers, from the first GPU to the last; gives what has arrived.
fn push(gpus: &[Gpu], manifest: &Manifest, sources: &[Vec<Vec<u8>>], takes_rows: bool) -> Vec<Vec<Vec<u8>>> {
    let (from, to) = (&gpus[0], &gpus[gpus.len() - 1]);
    let manifest = &aligned(manifest);
    let plan = plan(manifest).unwrap();
    let receivers: Vec<Receiver> =
        manifest.receivers.iter().map(|declared| receiver(to, &declared.regions)).collect();
    let ranks: Vec<TrainerRank> = (0..sources.len() as u32).map(TrainerRank).collect();
    let mut drivers: Vec<_> =
        ranks.iter().map(|rank| driver(from, (&plan, manifest, *rank), &receivers, takes_rows)).collect();
    let weights: Vec<Vec<DeviceRange>> =
        sources.iter().map(|regions| regions.iter().map(|bytes| from.upload(bytes)).collect()).collect();
    let mut magnitudes = plan.magnitudes();
    for _ in 0..2 {
        for region in receivers.iter().flat_map(|receiver| &receiver.regions) {
            to.write(region, &vec![UNTOUCHED; REGION_BYTES as usize]);
        }
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
    let read = |receiver: &Receiver| receiver.regions.iter().map(|region| to.download(region)).collect();
    receivers.iter().map(read).collect()
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
        let found = push(&gpus, &manifest, &scenario::sources(&manifest), case % 2 == 0);
        let expected = scenario::expected(&aligned(&manifest), UNTOUCHED);
        assert!(found == expected, "{case}: {manifest:#?}");
    }
}

#[test]
fn blocks_that_four_trainers_cut_arrive_from_a_gpu_as_the_cpu_quantises_the_whole() {
    let Some(gpus) = gpus() else { return };
    whole::check(&|manifest, sources| push(&gpus, manifest, sources, true));
}
