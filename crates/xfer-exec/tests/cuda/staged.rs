//! From a GPU to a GPU by way of host memory at both ends: the driver over staged memory, rails that read and write host memory,
//! and a mirror that is uploaded.

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use efa_core::{Lease, LeaseMut, MemoryRef};
use gpu_mem::{Cuda, inject};
use weight_ops::cuda::DeviceRange;
use xfer_exec::cuda::{CudaError, Mirror, StagedMemory, StagedMemoryConfig};
use xfer_exec::driver::{Driver, HostRail, Outcome, Step};
use xfer_exec::local::{Attached, Doorman, LocalPeer, LocalRail, fetch};
use xfer_exec::program::Route;
use xfer_exec::{
    Armed, Done, Failure, Program, Rail, RailError, RailIndex, RailLimits, RailWrite, RankLimits, WriteId,
};
use xfer_plan::RankPlan;

use crate::drivers::{BYTES, made_of, mixed, plan_of};
use crate::gpu::{Gpu, Random, gpus};
use crate::{SOON, TO};

/// Most operations do not fit: rows are cut, and so are groups of them.
const SLOT_BYTES: u64 = 1008;
const SLOTS: u64 = 3;

/// What is served before.
pub(crate) const BEFORE: u8 = 0x5e;

/// A receiver's memory, what keeps it in reach, and the sender's rails to it.
pub(crate) struct Way {
    rails: Vec<HostRail>,
    pub(crate) mirror: Mirror,
    pub(crate) served: DeviceRange,
    /// Tells shared memory to peers.
    pub(crate) doorman: Option<Doorman>,
    #[cfg(feature = "ofi")]
    target: Option<xfer_exec::ofi::OfiTarget>,
}

fn served(gpu: &Gpu) -> DeviceRange {
    gpu.upload(&[BEFORE; BYTES as usize])
}

pub(crate) fn attached(doorman: &Doorman) -> Attached {
    Attached::new(&fetch(doorman.address(), 0, SOON).unwrap(), 0, BYTES).unwrap()
}

fn local(doorman: &Doorman) -> LocalRail {
    LocalRail::new(BTreeMap::from([(TO, LocalPeer::open(doorman.address(), &[BYTES], SOON).unwrap())]))
}

/// So many rails of shared memory.
pub(crate) fn shared(to: &Gpu, rails: usize) -> Way {
    let mirror = Mirror::shared(&to.device, BYTES).unwrap();
    let (doorman, _) = Doorman::open(vec![mirror.file().unwrap().clone()]).unwrap();
    let rail = |_| -> HostRail { Box::new(local(&doorman)) };
    Way {
        rails: (0..rails).map(rail).collect(),
        mirror,
        served: served(to),
        doorman: Some(doorman),
        #[cfg(feature = "ofi")]
        target: None,
    }
}

/// So many rails of libfabric over TCP, which register the staging memory; `None` where there is no libfabric.
#[cfg(feature = "ofi")]
fn tcp(to: &Gpu, rails: usize, staging: &MemoryRef) -> Option<Way> {
    use efa_core::{Hints, Library, RailConfig};
    use xfer_exec::ofi::{OfiPeer, OfiRail, OfiTarget};

    let library = match Library::open() {
        Ok(library) => library,
        Err(error) => {
            let required = std::env::var("WEIGHTSYNC_REQUIRE").is_ok_and(|names| names.contains("libfabric"));
            assert!(!required, "{error}");
            println!("skipped: no libfabric: {error}");
            return None;
        }
    };
    let open = || {
        let hints = Hints::new(library.tcp_provider()).source([127, 0, 0, 1].into());
        let info = library.infos(&hints).unwrap().remove(0);
        efa_core::Rail::open(&info, &RailConfig::for_info(&info)).unwrap()
    };
    let mirror = Mirror::private(&to.device, BYTES).unwrap();
    let scratch = LeaseMut::zeroed(64).unwrap().expose();
    let (mut theirs, mut peers) = (Vec::new(), Vec::new());
    for _ in 0..rails {
        let mut rail = open();
        let (_, region) = rail.expose(mirror.target()).unwrap();
        let (_, scratch) = rail.expose(&scratch).unwrap();
        peers.push(OfiPeer { address: rail.address().clone(), regions: vec![region], scratch });
        theirs.push(rail);
    }
    let target = Some(OfiTarget::start(theirs, Vec::new()).unwrap());
    let connect = |peer| -> HostRail {
        let peers = BTreeMap::from([(TO, peer)]);
        Box::new(OfiRail::connect(open(), std::slice::from_ref(staging), peers, SOON).unwrap())
    };
    let rails = peers.into_iter().map(connect).collect();
    Some(Way { rails, mirror, served: served(to), doorman: None, target })
}

/// Page-locked staging memory.
pub(crate) fn staging(gpu: &Gpu, bytes: u64) -> LeaseMut {
    LeaseMut::new(gpu.device.pinned(bytes as usize).unwrap())
}

pub(crate) fn driver(
    gpu: &Gpu,
    program: Program,
    rails: Vec<HostRail>,
    staging: LeaseMut,
    slot_bytes: u64,
) -> Driver<StagedMemory> {
    let config = StagedMemoryConfig { slot_bytes, multiprocessors: NonZeroU32::MIN, close_max: SOON };
    let memory = StagedMemory::new(&gpu.kernels, &program, staging, config).unwrap();
    Driver::over(memory, program, rails, SOON * 6, SOON)
}

fn program(plan: RankPlan, rails: usize, slot_bytes: u64) -> Program {
    let limits = RankLimits { region_bytes: vec![BYTES], slot_bytes, transforms: true };
    let rails = (0..rails as u16).map(RailIndex).collect();
    let routes = BTreeMap::from([(TO, Route { rails, region_bytes: vec![BYTES] })]);
    Program::staged(plan, BTreeMap::new(), &limits, routes).unwrap()
}

/// A driver that pushes `plan` over these rails, in as few and short slots as it can.
fn over(gpu: &Gpu, plan: &RankPlan, rails: Vec<HostRail>, staging: LeaseMut) -> Driver<StagedMemory> {
    driver(gpu, program(plan.clone(), rails.len(), SLOT_BYTES), rails, staging, SLOT_BYTES)
}

/// Steps until a push is over; `each` is asked at every step whether to abort it.
fn finish(driver: &mut Driver<StagedMemory>, mut each: impl FnMut(u64) -> bool) -> Outcome<DeviceRange> {
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

fn push(driver: &mut Driver<StagedMemory>, weights: &DeviceRange) -> Outcome<DeviceRange> {
    driver.begin(vec![weights.clone()]);
    finish(driver, |_| false)
}

impl Way {
    /// Of shared memory.
    pub(crate) fn doorman(&self) -> &Doorman {
        self.doorman.as_ref().unwrap()
    }

    /// Takes the place of what is served, which is whole until then.
    fn upload(&self, gpu: &Gpu, expected: &[u8]) {
        let before = gpu.download(&self.served);
        assert!(before.iter().all(|byte| *byte == BEFORE), "it changes with the upload alone");
        self.mirror.upload_all(&self.served).unwrap().wait(SOON).unwrap();
        let found = gpu.download(&self.served);
        let differs = found.iter().zip(expected).position(|(found, expected)| found != expected);
        assert_eq!((differs, found.len()), (None, expected.len()));
        gpu.write(&self.served, &before);
    }
}

fn arrives(gpus: &[Gpu], make: impl Fn(&Gpu, &MemoryRef) -> Option<Way>) {
    let (from, to) = (&gpus[0], &gpus[gpus.len() - 1]);
    let mut random = Random(21);
    for slot_bytes in [SLOT_BYTES, 40_000, 1 << 18] {
        let mut source = random.bytes(BYTES as usize);
        let staging = staging(from, SLOTS * slot_bytes);
        let Some(mut way) = make(to, staging.memory()) else { return };
        let rails = std::mem::take(&mut way.rails);
        let (ops, mut expected) = mixed(&mut random, &source);
        let plan = plan_of(ops, vec![]);
        let program = program(plan.clone(), rails.len(), slot_bytes);
        assert_eq!(program.ops().len() > 2 * plan.ops.len(), slot_bytes == SLOT_BYTES, "cut or not");
        let mut driver = driver(from, program, rails, staging, slot_bytes);
        // The same driver pushes twice.
        for _ in 0..2 {
            let weights = from.upload(&source);
            let delivered = push(&mut driver, &weights).result.unwrap();
            assert_eq!((delivered.bytes, delivered.writes), (plan.bytes, plan.writes));
            assert_eq!(delivered.bytes_gathered, plan.bytes, "everything is staged");
            way.upload(to, &expected);
            source.iter_mut().for_each(|byte| *byte ^= 0x11);
            expected = made_of(&plan.ops, &source);
        }
    }
}

#[test]
fn what_goes_by_shared_memory_arrives_in_the_receivers_gpu() {
    let Some(gpus) = gpus() else { return };
    arrives(&gpus, |to, _| Some(shared(to, 1)));
}

#[cfg(feature = "ofi")]
#[test]
fn what_goes_over_tcp_arrives_in_the_receivers_gpu() {
    let Some(gpus) = gpus() else { return };
    arrives(&gpus, |to, staging| tcp(to, 2, staging));
}

/// What is aborted after so many bytes leaves what is served as it was, and is whole when it is repeated.
fn aborted_and_repeated(gpus: &[Gpu], make: impl Fn(&Gpu, &MemoryRef) -> Option<Way>) {
    let (from, to) = (&gpus[0], &gpus[gpus.len() - 1]);
    let mut random = Random(22);
    let source = random.bytes(BYTES as usize);
    let (ops, expected) = mixed(&mut random, &source);
    let plan = plan_of(ops, vec![]);
    let staging = staging(from, SLOTS * SLOT_BYTES);
    let Some(mut way) = make(to, staging.memory()) else { return };
    let mut driver = over(from, &plan, std::mem::take(&mut way.rails), staging);
    let buffer = Arc::new(from.device.alloc(BYTES).unwrap());
    let weights = DeviceRange::whole(&buffer);
    from.write(&weights, &source);
    drop(weights);
    for at in [0, 1, plan.bytes / 3, plan.bytes * 2 / 3] {
        driver.begin(vec![DeviceRange::whole(&buffer)]);
        let Outcome { result, regions, .. } = finish(&mut driver, |delivered| delivered >= at);
        let failure = result.unwrap_err();
        assert!(matches!(&failure, Failure::Aborted(reason) if reason == "the test says so"), "{failure}");
        assert_eq!(regions.len(), 1);
    }
    assert_eq!(push(&mut driver, &DeviceRange::whole(&buffer)).result.unwrap().bytes, plan.bytes);
    way.upload(to, &expected);
    // Also of what was given up.
    let until = Instant::now() + SOON;
    while Arc::strong_count(&buffer) > 1 {
        assert!(Instant::now() < until, "somebody holds weights that came back");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_push_by_shared_memory_that_is_aborted_in_the_middle_is_whole_when_it_is_repeated() {
    let Some(gpus) = gpus() else { return };
    aborted_and_repeated(&gpus, |to, _| Some(shared(to, 1)));
}

#[cfg(feature = "ofi")]
#[test]
fn a_push_over_tcp_that_is_aborted_in_the_middle_is_whole_when_it_is_repeated() {
    let Some(gpus) = gpus() else { return };
    aborted_and_repeated(&gpus, |to, staging| tcp(to, 1, staging));
}

/// A rail that breaks when it has taken so many WRITEs, and has what it took unread.
struct Breaking {
    rail: LocalRail,
    left: usize,
}

impl Rail for Breaking {
    type Buffer = Lease;

    fn name(&self) -> String {
        "breaking".into()
    }
    fn limits(&self) -> RailLimits {
        self.rail.limits()
    }
    fn post(&mut self, writes: &mut VecDeque<RailWrite<Lease>>) -> Result<(), RailError> {
        self.left = self.left.saturating_sub(writes.len());
        self.rail.post(writes)
    }
    fn poll(&mut self, done: &mut Vec<Done<Lease>>) -> Result<(), RailError> {
        match self.left {
            0 => Err(RailError { rail: self.name(), reason: "broken".into() }),
            _ => self.rail.poll(done),
        }
    }
    fn arm(&mut self) -> Armed<'_> {
        Armed::Ready
    }
    fn close(self: Box<Self>, unfinished: &mut Vec<WriteId>) -> Result<(), RailError> {
        Box::new(self.rail).close(unfinished)
    }
}

#[test]
fn what_a_rail_that_breaks_had_in_flight_goes_over_another_and_without_one_the_weights_come_back() {
    let Some(gpus) = gpus() else { return };
    let (from, to) = (&gpus[0], &gpus[gpus.len() - 1]);
    let mut random = Random(23);
    let source = random.bytes(BYTES as usize);
    let (ops, expected) = mixed(&mut random, &source);
    let plan = plan_of(ops, vec![]);
    let weights = from.upload(&source);
    for others in [1, 0] {
        let mut way = shared(to, others);
        let breaking = Breaking { rail: local(way.doorman()), left: 50 };
        way.rails.insert(0, Box::new(breaking));
        let mut driver = over(from, &plan, std::mem::take(&mut way.rails), staging(from, SLOTS * SLOT_BYTES));
        let Outcome { result, regions, rails, .. } = push(&mut driver, &weights);
        assert_eq!((regions.len(), rails[0].closed.is_some()), (1, true));
        match others {
            0 => {
                let failure = result.unwrap_err();
                assert!(matches!(failure, Failure::Rail { .. }), "{failure}");
                let failure = push(&mut driver, &weights).result.unwrap_err();
                assert!(matches!(failure, Failure::Closed { .. }), "{failure}");
            }
            _ => {
                assert_eq!(result.unwrap().bytes, plan.bytes);
                way.upload(to, &expected);
                // And once more, without it.
                assert_eq!(push(&mut driver, &weights).result.unwrap().writes, plan.writes);
                way.upload(to, &expected);
            }
        }
    }
}

#[cfg(feature = "ofi")]
#[test]
fn a_tcp_rail_that_the_receiver_closes_in_the_middle_is_done_without() {
    let Some(gpus) = gpus() else { return };
    let (from, to) = (&gpus[0], &gpus[gpus.len() - 1]);
    let mut random = Random(24);
    let source = random.bytes(BYTES as usize);
    let (ops, expected) = mixed(&mut random, &source);
    let plan = plan_of(ops, vec![]);
    let weights = from.upload(&source);
    let staging = staging(from, SLOTS * SLOT_BYTES);
    let Some(mut way) = tcp(to, 2, staging.memory()) else { return };
    let mut driver = over(from, &plan, std::mem::take(&mut way.rails), staging);
    driver.begin(vec![weights.clone()]);
    let mut closed = false;
    let outcome = finish(&mut driver, |delivered| {
        if delivered > plan.bytes / 4 && !std::mem::replace(&mut closed, true) {
            way.target.as_ref().unwrap().close_rail(0).unwrap();
        }
        false
    });
    assert_eq!((outcome.result.unwrap().bytes, closed), (plan.bytes, true));
    way.upload(to, &expected);
}

/// Something invalid, which harms nothing but the call.
const REFUSED: i32 = 1;
/// An access to no memory: nothing of the device works any more.
const LOST: i32 = 700;

#[test]
fn whatever_call_is_refused_the_push_fails_and_the_next_is_whole() {
    let Some(gpus) = gpus() else { return };
    let mut random = Random(25);
    let source = random.bytes(BYTES as usize);
    let (mut ops, _) = mixed(&mut random, &source);
    ops.truncate(8);
    let expected = made_of(&ops, &source);
    let plan = plan_of(ops, vec![]);
    let to = &gpus[gpus.len() - 1];
    let calls = [
        "cuMemcpyDtoHAsync_v2",
        "cuMemcpyHtoDAsync_v2",
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
        let weights = gpu.upload(&source);
        let mut way = shared(to, 1);
        let mut driver = over(&gpu, &plan, std::mem::take(&mut way.rails), staging(&gpu, SLOTS * SLOT_BYTES));
        inject::fail(call, skip, code);
        let Outcome { result, regions, .. } = push(&mut driver, &weights);
        let hit = inject::clear() == 0;
        met += usize::from(hit);
        assert_eq!((result.is_err(), regions.len()), (hit, 1), "{call} {code} {skip}");
        let again = push(&mut driver, &weights);
        assert_eq!(again.result.is_err(), hit && code == LOST, "{call} {code} {skip}: {:?}", again.result);
        if again.result.is_ok() {
            way.upload(to, &expected);
        }
    }
    assert!(met > 20, "only {met} failures were met");
}

#[test]
fn a_program_that_writes_from_the_weights_is_refused() {
    let Some(gpus) = gpus() else { return };
    let program =
        Program::new(plan_of(vec![], vec![]), BTreeMap::new(), &RankLimits::default(), BTreeMap::new());
    let config =
        StagedMemoryConfig { slot_bytes: SLOT_BYTES, multiprocessors: NonZeroU32::MIN, close_max: SOON };
    let refused =
        StagedMemory::new(&gpus[0].kernels, &program.unwrap(), staging(&gpus[0], SLOT_BYTES), config);
    let refused = refused.err().unwrap();
    assert!(matches!(refused, CudaError::NotStaged), "{refused}");
}
