//! The driver over device memory: gathers, casts, and passing on, from GPU to GPU.

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU32;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use weight_ops::cuda::DeviceRange;
use xfer_exec::arrivals::Arrivals;
use xfer_exec::cuda::{
    CudaPeer, CudaRail, CudaRailConfig, DeviceRail, DeviceRegion, GpuMemory, GpuMemoryConfig, expose,
};
use xfer_exec::driver::{Driver, Outcome, Sender, Step, ThreadConfig};
use xfer_exec::local::Doorman;
use xfer_exec::program::Route;
use xfer_exec::{Armed, Done, Program, Rail, RailError, RailIndex, RailLimits, RailWrite, RankLimits};
use xfer_plan::{
    BlockQuant, DType, Op, ParamId, RankPlan, ReceiverRank, RegionIndex, RelayPlan, Strided, Transform,
};

use crate::gpu::{Gpu, Random, gpus};
use crate::{SOON, TO};

pub(crate) const BYTES: u64 = 4 << 20;
const SLOT_BYTES: u64 = 256 << 10;

/// A receiver of this process, with one region.
pub(crate) struct Receiver {
    pub(crate) memory: DeviceRange,
    doorman: Doorman,
    arrivals: Arrivals,
}

pub(crate) fn receiver(gpu: &Gpu) -> Receiver {
    let buffer = Arc::new(gpu.device.alloc_vmm(BYTES, BYTES).unwrap());
    let memory = DeviceRange::whole(&buffer).part(0..BYTES).unwrap();
    gpu.write(&memory, &vec![0; BYTES as usize]);
    let (doorman, arrivals) = expose(vec![DeviceRegion::mapped(&buffer).unwrap()]).unwrap();
    Receiver { memory, doorman, arrivals }
}

/// A rail that takes contiguous bytes alone, as libfabric's do: what lies apart is gathered first.
pub(crate) struct Contiguous(pub(crate) CudaRail);

impl Rail for Contiguous {
    type Buffer = DeviceRange;

    fn name(&self) -> String {
        self.0.name()
    }
    fn limits(&self) -> RailLimits {
        RailLimits { takes_rows: false, ..self.0.limits() }
    }
    fn post(&mut self, writes: &mut VecDeque<RailWrite<DeviceRange>>) -> Result<(), RailError> {
        assert!(writes.iter().all(|write| write.rows.count == 1));
        self.0.post(writes)
    }
    fn poll(&mut self, done: &mut Vec<Done<DeviceRange>>) -> Result<(), RailError> {
        self.0.poll(done)
    }
    fn arm(&mut self) -> Armed<'_> {
        self.0.arm()
    }
    fn close(self: Box<Self>, unfinished: &mut Vec<xfer_exec::WriteId>) -> Result<(), RailError> {
        Box::new(self.0).close(unfinished)
    }
}

pub(crate) fn rail_to(gpu: &Gpu, to: &Receiver) -> CudaRail {
    let peer = CudaPeer::open(&gpu.device, to.doorman.address(), &[BYTES], SOON).unwrap();
    CudaRail::new(&gpu.kernels, BTreeMap::from([(TO, peer)]), CudaRailConfig::default()).unwrap()
}

fn limits() -> RankLimits {
    RankLimits { region_bytes: vec![BYTES], slot_bytes: SLOT_BYTES, transforms: true }
}

fn routes() -> BTreeMap<ReceiverRank, Route> {
    BTreeMap::from([(TO, Route { rails: vec![RailIndex(0)], region_bytes: vec![BYTES] })])
}

pub(crate) fn plan_of(ops: Vec<Op>, tags: Vec<u32>) -> RankPlan {
    let (bytes, writes) = (ops.iter().map(Op::bytes).sum(), ops.iter().map(Op::writes).sum());
    RankPlan { ops, bytes, writes, tags }
}

fn driver(
    gpu: &Gpu,
    program: Program,
    rail: Box<DeviceRail>,
    arrivals: Option<Arrivals>,
) -> Driver<GpuMemory> {
    let config = GpuMemoryConfig {
        staging_bytes: 3 * SLOT_BYTES,
        slot_bytes: SLOT_BYTES,
        multiprocessors: NonZeroU32::MIN,
        close_max: SOON,
    };
    let memory = GpuMemory::new(&gpu.kernels, &program, config, arrivals).unwrap();
    Driver::over(memory, program, vec![rail], SOON * 6, SOON)
}

/// Operations of all kinds, one behind the other at the receiver, and what they make of `source`.
pub(crate) fn mixed(random: &mut Random, source: &[u8]) -> (Vec<Op>, Vec<u8>) {
    let casts = [
        (DType::F32, DType::BF16),
        (DType::BF16, DType::F8E4M3),
        (DType::F16, DType::F32),
        (DType::BF16, DType::BF16),
    ];
    let (mut ops, mut at) = (Vec::new(), 0);
    for number in 0..60 {
        let (from, to) = casts[random.below(4)];
        let transform = if number % 2 == 0 { Transform::Cast { from, to } } else { Transform::Copy };
        let rows = [1, 1 + random.below(40) as u64][random.below(2)];
        // Whole elements of any type.
        let row_bytes = 16 * (1 + random.below(250) as u64);
        let row_source = transform.source_bytes(row_bytes);
        let stride = row_source + 16 * random.below(3) as u64;
        let offset = 16 * random.below(((BYTES - rows * stride) / 16) as usize) as u64;
        // Rows that land together, and rows that land apart.
        let apart = random.below(2) as u64 * 32;
        let destination = Strided { region: RegionIndex(0), offset: at, stride: row_bytes + apart };
        ops.push(Op {
            to: TO,
            param: ParamId(0),
            row_bytes: row_bytes as u32,
            rows: rows as u32,
            source: Strided { region: RegionIndex(0), offset, stride },
            destination,
            gather: apart == 0,
            transform,
            rail: 0,
            wave: 0,
        });
        at += rows * (row_bytes + apart);
        assert!(at < BYTES);
    }
    let expected = made_of(&ops, source);
    (ops, expected)
}

/// What operations of one region make of its bytes, as a CPU does it.
pub(crate) fn made_of(ops: &[Op], source: &[u8]) -> Vec<u8> {
    let mut made = vec![0; BYTES as usize];
    for Op { row_bytes, rows, source: from, destination, transform, .. } in ops {
        for row in 0..u64::from(*rows) {
            let row_source = transform.source_bytes((*row_bytes).into()) as usize;
            let bytes = &source[(from.offset + row * from.stride) as usize..][..row_source];
            let into =
                &mut made[(destination.offset + row * destination.stride) as usize..][..*row_bytes as usize];
            match transform {
                Transform::Cast { from, to } => {
                    weight_ops::cast_bytes(float(*from), bytes, float(*to), into).unwrap()
                }
                _ => into.copy_from_slice(bytes),
            }
        }
    }
    made
}

fn float(dtype: DType) -> weight_ops::Dtype {
    match dtype {
        DType::F32 => weight_ops::Dtype::F32,
        DType::F16 => weight_ops::Dtype::F16,
        DType::BF16 => weight_ops::Dtype::BF16,
        _ => weight_ops::Dtype::F8E4M3,
    }
}

#[test]
fn gathers_and_casts_arrive_as_a_cpu_makes_them_over_rails_with_and_without_rows() {
    let Some(gpus) = gpus() else { return };
    let gpu = &gpus[0];
    let mut random = Random(11);
    for takes_rows in [true, false] {
        let source = random.bytes(BYTES as usize);
        let (ops, expected) = mixed(&mut random, &source);
        let to = receiver(gpu);
        let program = Program::new(plan_of(ops, vec![]), BTreeMap::new(), &limits(), routes()).unwrap();
        let bytes = program.bytes();
        let rail: Box<DeviceRail> = match rail_to(gpu, &to) {
            rail if takes_rows => Box::new(rail),
            rail => Box::new(Contiguous(rail)),
        };
        let sender =
            Sender::drive(driver(gpu, program, rail, None), ThreadConfig { ..ThreadConfig::default() })
                .unwrap();
        let memory = gpu.upload(&source);
        // The same driver pushes twice.
        for _ in 0..2 {
            gpu.write(&to.memory, &vec![0; BYTES as usize]);
            let (reply, outcome) = mpsc::channel();
            sender.push(vec![memory.clone()], move |outcome| drop(reply.send(outcome)));
            let Outcome { result, regions, .. } = outcome.recv_timeout(SOON * 12).unwrap();
            assert_eq!((result.unwrap().bytes, regions.len()), (bytes, 1));
            let found = gpu.download(&to.memory);
            let differs = found.iter().zip(&expected).position(|(found, expected)| found != expected);
            assert_eq!(differs, None, "takes rows: {takes_rows}");
        }
        sender.close();
    }
}

#[test]
fn what_device_memory_cannot_do_is_refused_before_anything_is_pushed() {
    let Some(gpus) = gpus() else { return };
    let strided = Strided { region: RegionIndex(0), offset: 0, stride: 128 };
    for transform in [
        Transform::Quantize { from: DType::BF16, quant: BlockQuant::default() },
        Transform::Cast { from: DType::I16, to: DType::F32 },
    ] {
        let op = Op {
            to: TO,
            param: ParamId(0),
            row_bytes: 128,
            rows: 1,
            source: strided,
            destination: strided,
            gather: false,
            transform,
            rail: 0,
            wave: 0,
        };
        let program = Program::new(plan_of(vec![op], vec![]), BTreeMap::new(), &limits(), routes()).unwrap();
        let config = GpuMemoryConfig {
            staging_bytes: SLOT_BYTES,
            slot_bytes: SLOT_BYTES,
            multiprocessors: NonZeroU32::MIN,
            close_max: Duration::ZERO,
        };
        let refused = GpuMemory::new(&gpus[0].kernels, &program, config, None).err().unwrap();
        assert!(refused.to_string().contains("device memory cannot do"), "{refused}");
    }
}

#[test]
fn a_receiver_passes_on_what_has_arrived_and_the_last_has_every_byte() {
    let Some(gpus) = gpus() else { return };
    let (first_gpu, second_gpu) = (&gpus[0], &gpus[gpus.len() - 1]);
    let mut random = Random(12);
    let source = random.bytes(BYTES as usize);
    let chunk = 64 << 10;
    let ops: Vec<Op> = (0..BYTES / chunk)
        .map(|number| {
            let strided = Strided { region: RegionIndex(0), offset: number * chunk, stride: chunk };
            Op {
                to: TO,
                param: ParamId(0),
                row_bytes: chunk as u32,
                rows: 1,
                source: strided,
                destination: strided,
                gather: false,
                transform: Transform::Copy,
                rail: 0,
                wave: 0,
            }
        })
        .collect();
    // Each chunk is passed on when it has arrived; it waits for one WRITE.
    let tags: Vec<u32> = (0..ops.len() as u32).collect();
    let relay =
        RelayPlan { plan: plan_of(ops.clone(), vec![]), first: tags.clone(), awaited: vec![1; ops.len()] };
    let (middle, last) = (receiver(second_gpu), receiver(first_gpu));
    let pushing = Program::new(plan_of(ops.clone(), tags), BTreeMap::new(), &limits(), routes()).unwrap();
    let mut trainer = driver(first_gpu, pushing, Box::new(rail_to(first_gpu, &middle)), None);
    let passing = Program::relay(relay, BTreeMap::new(), &limits(), routes()).unwrap();
    let rail = Box::new(rail_to(second_gpu, &last));
    let Receiver { memory: passed_on, doorman: _doorman, arrivals } = middle;
    let mut passer = driver(second_gpu, passing, rail, Some(arrivals));
    for seed in 0..2 {
        // Chunks that follow one another at another place in the second push.
        let mut bytes = source.clone();
        bytes.rotate_left(seed * 1000);
        let memory = first_gpu.upload(&bytes);
        passer.begin(vec![passed_on.clone()]);
        trainer.begin(vec![memory]);
        let (mut pushed, mut passed) = (None, None);
        while pushed.is_none() || passed.is_none() {
            if let Step::Over(outcome) = trainer.step() {
                pushed = Some(outcome.result.unwrap());
            }
            if let Step::Over(outcome) = passer.step() {
                passed = Some(outcome.result.unwrap());
            }
        }
        assert_eq!(passed.map(|passed| (passed.bytes, passed.writes)), Some((BYTES, ops.len() as u64)));
        assert!(second_gpu.download(&passed_on) == bytes, "the one in the middle");
        assert!(first_gpu.download(&last.memory) == bytes, "the last");
    }
}
