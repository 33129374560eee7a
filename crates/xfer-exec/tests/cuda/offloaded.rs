//! From host memory to a GPU's by way of a GPU: the driver over offloaded memory, and rails that read slots on the GPU.

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU32;
use std::time::Instant;

use efa_core::{Lease, LeaseMut};
use gpu_mem::{Cuda, inject};
use weight_ops::cuda::DeviceRange;
use xfer_exec::cuda::{CudaError, CudaRail, DeviceRail, GpuMemoryConfig, OffloadedMemory};
use xfer_exec::driver::{Driver, Outcome, Step};
use xfer_exec::program::{Route, WriteId};
use xfer_exec::{
    Armed, Done, Failure, Program, Rail, RailError, RailIndex, RailLimits, RailWrite, RankLimits,
};
use xfer_plan::{DType, Op, ParamId, RankPlan, RegionIndex, Strided, Transform};

use crate::drivers::{BYTES, Contiguous, Receiver, made_of, mixed, plan_of, rail_to, receiver};
use crate::gpu::{Gpu, Random, gpus};
use crate::{SOON, TO};

/// Most operations do not fit: rows are cut, and so are groups of them.
const SLOT_BYTES: u64 = 1008;
const SLOTS: u64 = 3;

fn config(slot_bytes: u64) -> GpuMemoryConfig {
    let staging_bytes = SLOTS * slot_bytes.next_multiple_of(256);
    GpuMemoryConfig { staging_bytes, slot_bytes, multiprocessors: NonZeroU32::MIN, close_max: SOON }
}

/// Bytes in page-locked memory.
pub(crate) fn pinned(gpu: &Gpu, bytes: &[u8]) -> LeaseMut {
    let mut memory = LeaseMut::new(gpu.device.pinned(bytes.len()).unwrap());
    memory.bytes_mut().copy_from_slice(bytes);
    memory
}

pub(crate) fn driver(
    gpu: &Gpu,
    program: Program,
    rail: Box<DeviceRail>,
    slot_bytes: u64,
) -> Driver<OffloadedMemory> {
    let memory = OffloadedMemory::new(&gpu.kernels, &program, config(slot_bytes)).unwrap();
    Driver::over(memory, program, vec![rail], SOON * 6, SOON)
}

fn program(plan: RankPlan, slot_bytes: u64) -> Program {
    let limits = RankLimits { region_bytes: vec![BYTES], slot_bytes, transforms: true };
    let routes = BTreeMap::from([(TO, Route { rails: vec![RailIndex(0)], region_bytes: vec![BYTES] })]);
    Program::staged(plan, BTreeMap::new(), &limits, routes).unwrap()
}

/// Steps until a push is over; `each` is asked at every step whether to abort it.
fn finish(driver: &mut Driver<OffloadedMemory>, mut each: impl FnMut(u64) -> bool) -> Outcome<Lease> {
    let until = Instant::now() + SOON * 6;
    loop {
        if let Step::Over(outcome) = driver.step() {
            return outcome;
        }
        if each(driver.delivered_bytes()) {
            driver.abort("the test says so".into());
        }
        assert!(Instant::now() < until, "{} bytes are delivered", driver.delivered_bytes());
    }
}

/// The weights, which nobody else holds any more.
fn returned(regions: Vec<Lease>) -> LeaseMut {
    let [weights] = <[Lease; 1]>::try_from(regions).unwrap();
    weights.thaw().expect("somebody holds weights that came back")
}

fn is_there(gpu: &Gpu, receiver: &Receiver, expected: &[u8]) {
    let found = gpu.download(&receiver.memory);
    let differs = found.iter().zip(expected).position(|(found, expected)| found != expected);
    assert_eq!((differs, found.len() >= expected.len()), (None, true));
    gpu.write(&receiver.memory, &vec![0; found.len()]);
}

/// Rows of any length, apart or not, and overlapping ones.
fn rows(random: &mut Random, source: &[u8]) -> (Vec<Op>, Vec<u8>) {
    let (mut ops, mut at) = (Vec::new(), 0);
    for number in 0..80 {
        let count = 1 + random.below(60) as u64;
        let is_cast = number % 4 == 0;
        let length = [4, 40, 300][random.below(3)];
        let row_bytes = 4 * (1 + random.below(length) as u64) - u64::from(!is_cast);
        let transform = match is_cast {
            true => Transform::Cast { from: DType::F32, to: DType::F32 },
            false => Transform::Copy,
        };
        let stride = [row_bytes, row_bytes + 4 * random.below(20) as u64, 4 * random.below(300) as u64];
        let stride = stride[random.below(3)].max(4).next_multiple_of(if is_cast { 4 } else { 1 });
        let extent = (count - 1) * stride + row_bytes;
        // Elements of any operation begin at any address of the host.
        let offset = random.below((BYTES - extent) as usize) as u64;
        ops.push(Op {
            to: TO,
            param: ParamId(0),
            row_bytes: row_bytes as u32,
            rows: count as u32,
            source: Strided { region: RegionIndex(0), offset, stride },
            destination: Strided { region: RegionIndex(0), offset: at, stride: row_bytes },
            gather: count > 1,
            transform,
            rail: 0,
            wave: 0,
        });
        at += count * row_bytes;
    }
    let expected = made_of(&ops, source);
    (ops, expected)
}

/// Twice with the same driver.
fn arrives(make: impl Fn(&mut Random, &[u8]) -> (Vec<Op>, Vec<u8>)) {
    let Some(gpus) = gpus() else { return };
    let (from, to) = (&gpus[0], &gpus[gpus.len() - 1]);
    let mut random = Random(31);
    for (slot_bytes, takes_rows) in
        [(SLOT_BYTES, true), (SLOT_BYTES, false), (40_000, true), (1 << 18, false)]
    {
        let source = random.bytes(BYTES as usize);
        let (ops, mut expected) = make(&mut random, &source);
        let plan = plan_of(ops, vec![]);
        let receiver = receiver(to);
        let rail = rail_to(from, &receiver);
        let rail: Box<DeviceRail> = if takes_rows { Box::new(rail) } else { Box::new(Contiguous(rail)) };
        let program = program(plan.clone(), slot_bytes);
        assert!(slot_bytes > SLOT_BYTES || program.ops().len() > plan.ops.len(), "cut");
        let mut driver = driver(from, program, rail, slot_bytes);
        let mut weights = pinned(from, &source);
        for _ in 0..2 {
            driver.begin(vec![weights.freeze()]);
            let Outcome { result, regions, .. } = finish(&mut driver, |_| false);
            let delivered = result.unwrap();
            assert_eq!((delivered.bytes, delivered.writes), (plan.bytes, plan.writes));
            assert_eq!(delivered.bytes_gathered, plan.bytes, "everything is staged");
            is_there(to, &receiver, &expected);
            weights = returned(regions);
            weights.bytes_mut().iter_mut().for_each(|byte| *byte ^= 0x11);
            expected = made_of(&plan.ops, weights.bytes());
        }
    }
}

#[test]
fn what_is_offloaded_arrives_as_a_cpu_makes_it() {
    arrives(mixed);
}

#[test]
fn rows_of_any_length_arrive() {
    arrives(rows);
}

#[test]
fn an_offloaded_push_that_is_aborted_in_the_middle_is_whole_when_it_is_repeated() {
    let Some(gpus) = gpus() else { return };
    let (from, to) = (&gpus[0], &gpus[gpus.len() - 1]);
    let mut random = Random(32);
    let source = random.bytes(BYTES as usize);
    let (ops, expected) = mixed(&mut random, &source);
    let plan = plan_of(ops, vec![]);
    let receiver = receiver(to);
    let rail = Box::new(rail_to(from, &receiver));
    let mut driver = driver(from, program(plan.clone(), SLOT_BYTES), rail, SLOT_BYTES);
    let mut weights = pinned(from, &source);
    for at in [0, 1, plan.bytes / 3, plan.bytes * 2 / 3] {
        driver.begin(vec![weights.freeze()]);
        let Outcome { result, regions, .. } = finish(&mut driver, |delivered| delivered >= at);
        let failure = result.unwrap_err();
        assert!(matches!(&failure, Failure::Aborted(reason) if reason == "the test says so"), "{failure}");
        weights = returned(regions);
    }
    driver.begin(vec![weights.freeze()]);
    assert_eq!(finish(&mut driver, |_| false).result.unwrap().bytes, plan.bytes);
    is_there(to, &receiver, &expected);
}

/// A rail whose calls are made by other threads: what is injected into this one's is the memory's alone.
struct Elsewhere(CudaRail);

impl Rail for Elsewhere {
    type Buffer = DeviceRange;

    fn name(&self) -> String {
        self.0.name()
    }
    fn limits(&self) -> RailLimits {
        RailLimits { takes_rows: false, ..self.0.limits() }
    }
    fn post(&mut self, writes: &mut VecDeque<RailWrite<DeviceRange>>) -> Result<(), RailError> {
        std::thread::scope(|scope| scope.spawn(|| self.0.post(writes)).join().unwrap())
    }
    fn poll(&mut self, done: &mut Vec<Done<DeviceRange>>) -> Result<(), RailError> {
        std::thread::scope(|scope| scope.spawn(|| self.0.poll(done)).join().unwrap())
    }
    fn arm(&mut self) -> Armed<'_> {
        self.0.arm()
    }
    fn close(self: Box<Self>, unfinished: &mut Vec<WriteId>) -> Result<(), RailError> {
        Box::new(self.0).close(unfinished)
    }
}

/// Something invalid, which harms nothing but the call.
const REFUSED: i32 = 1;
/// An access to no memory: nothing of the device works any more.
const LOST: i32 = 700;

#[test]
fn whatever_call_is_refused_the_weights_come_back_and_the_next_push_is_whole() {
    let Some(gpus) = gpus() else { return };
    let to = &gpus[gpus.len() - 1];
    let mut random = Random(33);
    let source = random.bytes(BYTES as usize);
    let (mut ops, _) = mixed(&mut random, &source);
    ops.truncate(8);
    let expected = made_of(&ops, &source);
    let plan = plan_of(ops, vec![]);
    let calls = [
        "cuPointerGetAttribute",
        "cuMemcpyHtoDAsync_v2",
        "cuMemcpy2DAsync_v2",
        "cuStreamWaitEvent",
        "cuLaunchKernel",
        "cuEventCreate",
        "cuEventRecord",
    ];
    let mut met = 0;
    for (call, skip, code) in calls.into_iter().flat_map(|call| {
        [(call, 0, REFUSED), (call, 1, REFUSED), (call, 2, REFUSED), (call, 7, REFUSED), (call, 2, LOST)]
    }) {
        // On a handle of its own on the device: what is lost stays its own.
        let gpu = Gpu::on(&Cuda::open().unwrap().device(0).unwrap());
        let receiver = receiver(to);
        // The rail has another, so that it outlives that.
        let sending = Gpu::on(&Cuda::open().unwrap().device(0).unwrap());
        let rail = Box::new(Elsewhere(rail_to(&sending, &receiver)));
        let mut driver = driver(&gpu, program(plan.clone(), SLOT_BYTES), rail, SLOT_BYTES);
        driver.begin(vec![]);
        assert!(finish(&mut driver, |_| false).result.is_err(), "without weights");
        inject::fail(call, skip, code);
        driver.begin(vec![pinned(&sending, &source).freeze()]);
        let Outcome { result, regions, .. } = finish(&mut driver, |_| false);
        let hit = inject::clear() == 0;
        met += usize::from(hit);
        assert_eq!(result.is_err(), hit, "{call} {code} {skip}: {result:?}");
        if code == LOST && hit {
            continue;
        }
        driver.begin(vec![returned(regions).freeze()]);
        let again = finish(&mut driver, |_| false).result;
        assert_eq!(again.unwrap().bytes, plan.bytes, "{call} {code} {skip}");
        is_there(to, &receiver, &expected);
    }
    assert!(met > 20, "only {met} failures were met");
}

#[test]
fn memory_that_is_not_page_locked_is_refused_and_so_is_a_program_that_is_not_staged() {
    let Some(gpus) = gpus() else { return };
    let gpu = &gpus[0];
    let receiver = receiver(gpu);
    let plan = plan_of(mixed(&mut Random(34), &[0; BYTES as usize]).0, vec![]);
    let rail = Box::new(rail_to(gpu, &receiver));
    let mut driver = driver(gpu, program(plan, SLOT_BYTES), rail, SLOT_BYTES);
    driver.begin(vec![LeaseMut::zeroed(BYTES as usize).unwrap().freeze()]);
    let Outcome { result, regions, .. } = finish(&mut driver, |_| false);
    let failure = result.unwrap_err().to_string();
    assert!(failure.contains("not page-locked"), "{failure}");
    returned(regions);
    let program =
        Program::new(plan_of(vec![], vec![]), BTreeMap::new(), &RankLimits::default(), BTreeMap::new());
    let refused = OffloadedMemory::new(&gpu.kernels, &program.unwrap(), config(SLOT_BYTES)).err().unwrap();
    assert!(matches!(refused, CudaError::NotStaged), "{refused}");
}
