//! The planner, the host driver and the kernels together: random models are cast and quantised on their way, and arrive as
//! if each tensor had been quantised whole.
//!
//! Two oracles, neither of which knows the planner's boxes or the driver's rectangles: element by element, as the planner's
//! own tests have it, and the kernels over the whole tensor.

#[allow(dead_code)] // its own tests use all of it
#[path = "../../../xfer-plan/tests/scenario/mod.rs"]
mod scenario;
mod whole;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use efa_core::{Lease, LeaseMut};
use proptest::prelude::*;
use scenario::Choices;
use xfer_exec::driver::{
    DriverConfig, HostRail, Measured, Outcome, ReadRows, Sender, ThreadConfig, Transforms,
};
use xfer_exec::program::Route;
use xfer_exec::{
    Armed, Done, Program, Rail, RailError, RailIndex, RailLimits, RailWrite, RankLimits, WriteId,
};
use xfer_plan::{Manifest, Op, Plan, ReceiverRank, Relay, Strided, TrainerRank, plan};

const UNTOUCHED: u8 = 0xee;
const SOON: Duration = Duration::from_secs(20);

/// Every region of every receiver.
type Memory = Arc<Mutex<Vec<Vec<Vec<u8>>>>>;

/// How bytes get to the rail.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    /// It takes rows as they are.
    Rows,
    /// What lies apart is gathered.
    Contiguous,
    /// It cannot read the weights: everything is staged, in slots that most operations do not fit.
    Staged,
}

/// A rail into memory of this process, which writes when it is polled.
struct InMemory {
    memory: Memory,
    taken: VecDeque<RailWrite<Lease>>,
    way: Way,
}

impl Rail for InMemory {
    type Buffer = Lease;

    fn name(&self) -> String {
        "in memory".into()
    }
    fn limits(&self) -> RailLimits {
        RailLimits { depth: 4, in_flight_bytes_max: 1 << 20, takes_rows: self.way == Way::Rows }
    }
    fn post(&mut self, writes: &mut VecDeque<RailWrite<Lease>>) -> Result<(), RailError> {
        while self.taken.len() < 4
            && let Some(write) = writes.pop_front()
        {
            self.taken.push_back(write);
        }
        Ok(())
    }
    fn poll(&mut self, done: &mut Vec<Done<Lease>>) -> Result<(), RailError> {
        for RailWrite { id, from, rows, to, region, offset, .. } in self.taken.drain(..) {
            let mut memory = self.memory.lock().unwrap();
            for row in 0..rows.count as usize {
                let bytes = &from.bytes()[row * rows.stride as usize..][..rows.bytes as usize];
                let at = offset as usize + row * rows.bytes as usize;
                memory[to.index()][region.index()][at..at + bytes.len()].copy_from_slice(bytes);
            }
            done.push(Done { id, from, result: Ok(()) });
        }
        Ok(())
    }
    fn arm(&mut self) -> Armed<'_> {
        Armed::Ready
    }
    fn close(self: Box<Self>, unfinished: &mut Vec<WriteId>) -> Result<(), RailError> {
        unfinished.extend(self.taken.iter().map(|write| write.id));
        Ok(())
    }
}

/// What the receivers' memory is before a push.
fn untouched(manifest: &Manifest) -> Vec<Vec<Vec<u8>>> {
    let regions = |regions: &[u64]| regions.iter().map(|bytes| vec![UNTOUCHED; *bytes as usize]).collect();
    manifest.receivers.iter().map(|receiver| regions(&receiver.regions)).collect()
}

fn program(plan: &Plan, manifest: &Manifest, rank: TrainerRank, way: Way) -> (Program, u64) {
    let part = plan.part(rank, manifest).unwrap();
    let longest = |bytes: fn(&Op) -> u64| part.ops.iter().map(bytes).max().unwrap_or(0);
    let slot_bytes = match way {
        Way::Rows | Way::Contiguous => longest(Op::staged_bytes),
        Way::Staged => (longest(Op::bytes) / 3).max(16),
    };
    let region_bytes = manifest.trainers[rank.index()].regions.clone();
    let limits = RankLimits { region_bytes, slot_bytes, transforms: true };
    let route = |receiver: &xfer_plan::ReceiverManifest| Route {
        rails: vec![RailIndex(0)],
        region_bytes: receiver.regions.clone(),
    };
    let routes = (0..).map(ReceiverRank).zip(manifest.receivers.iter().map(route)).collect();
    let quantised = plan.quant_part(rank, manifest).unwrap();
    let bind = if way == Way::Staged { Program::staged } else { Program::new };
    let program = bind(part, BTreeMap::new(), &limits, routes).unwrap();
    (program.with_quantization(&quantised, &limits).unwrap(), slot_bytes)
}

fn sender(plan: &Plan, manifest: &Manifest, rank: TrainerRank, memory: &Memory, way: Way) -> Sender {
    let (program, slot_bytes) = program(plan, manifest, rank, way);
    let rail = InMemory { memory: Arc::clone(memory), taken: VecDeque::new(), way };
    let rails: Vec<HostRail> = vec![Box::new(rail)];
    // Two slots: what is transformed has to wait for what is written.
    let staging = LeaseMut::zeroed(2 * slot_bytes as usize).unwrap();
    let driver = DriverConfig { program, rails, staging, slot_bytes, deadline: SOON, stall: SOON / 5 };
    Sender::start(driver, ThreadConfig { name: rank.to_string(), ..ThreadConfig::default() }).unwrap()
}

fn lease(bytes: &[u8]) -> Lease {
    let mut lease = LeaseMut::zeroed(bytes.len()).unwrap();
    lease.bytes_mut().copy_from_slice(bytes);
    lease.freeze()
}

/// Pushes what the trainers have, twice with the same drivers, and gives what has arrived.
fn push(manifest: &Manifest, sources: &[Vec<Vec<u8>>], way: Way) -> Vec<Vec<Vec<u8>>> {
    let plan = plan(manifest).unwrap();
    let memory: Memory = Arc::new(Mutex::new(Vec::new()));
    let ranks: Vec<TrainerRank> = (0..sources.len() as u32).map(TrainerRank).collect();
    let senders: Vec<Sender> =
        ranks.iter().map(|rank| sender(&plan, manifest, *rank, &memory, way)).collect();
    let mut magnitudes = plan.magnitudes();
    let mut weights: Vec<Vec<Lease>> =
        sources.iter().map(|regions| regions.iter().map(|bytes| lease(bytes)).collect()).collect();
    for _ in 0..2 {
        *memory.lock().unwrap() = untouched(manifest);
        magnitudes.clear();
        for ((rank, sender), weights) in ranks.iter().zip(&senders).zip(&mut weights) {
            let (reply, measured) = mpsc::channel();
            sender.magnitudes(std::mem::take(weights), move |measured| reply.send(measured).unwrap());
            let Measured { result, regions } = measured.recv_timeout(SOON).unwrap();
            *weights = regions;
            magnitudes.report(*rank, &result.unwrap()).unwrap();
        }
        for ((rank, sender), weights) in ranks.iter().zip(&senders).zip(&mut weights) {
            let (reply, outcome) = mpsc::channel();
            let told = magnitudes.merged(*rank).unwrap();
            sender.push_told(std::mem::take(weights), told, move |outcome| reply.send(outcome).unwrap());
            let Outcome { result, regions, .. } = outcome.recv_timeout(2 * SOON).unwrap();
            let (delivered, planned) = (result.unwrap(), plan.part(*rank, manifest).unwrap());
            assert_eq!((delivered.bytes, delivered.writes), (planned.bytes, planned.writes));
            let all = delivered.bytes_gathered == delivered.bytes;
            assert!(all || way != Way::Staged, "{delivered:?}");
            // Nobody keeps a handle on what was given back.
            *weights = regions.into_iter().map(|region| region.thaw().unwrap().freeze()).collect();
        }
    }
    senders.into_iter().for_each(Sender::close);
    std::mem::take(&mut *memory.lock().unwrap())
}

/// Weights of which so many bytes are copied out at once.
struct Elsewhere<'a> {
    regions: &'a [Vec<u8>],
    bytes_max: usize,
}

impl ReadRows for Elsewhere<'_> {
    fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    fn read(
        &self,
        at: Strided,
        [rows, row_bytes]: [usize; 2],
        work: &mut dyn FnMut(&[u8], usize) -> Option<()>,
    ) -> Option<()> {
        assert!(rows * row_bytes <= self.bytes_max, "{rows} rows of {row_bytes} bytes");
        let region = self.regions.get(at.region.index())?;
        let row = |row: usize| region.get(at.offset as usize + row * at.stride as usize..)?.get(..row_bytes);
        let copied: Vec<&[u8]> = (0..rows).map(row).collect::<Option<_>>()?;
        work(&copied.concat(), row_bytes)
    }
}

/// What arrives if each operation is made apart from any driver, as whoever verifies does, and read a little at a time.
fn made(manifest: &Manifest, sources: &[Vec<Vec<u8>>], bytes_max: usize) -> Vec<Vec<Vec<u8>>> {
    let plan = plan(manifest).unwrap();
    let ranks = (0..sources.len() as u32).map(TrainerRank);
    let bind = |rank| (rank, program(&plan, manifest, rank, Way::Rows).0);
    let programs: Vec<(TrainerRank, Program)> = ranks.map(bind).collect();
    let mut magnitudes = plan.magnitudes();
    for ((rank, _), regions) in programs.iter().zip(sources) {
        let memory: Memory = Arc::default();
        let (reply, measured) = mpsc::channel();
        let sender = sender(&plan, manifest, *rank, &memory, Way::Rows);
        let regions = regions.iter().map(|bytes| lease(bytes)).collect();
        sender.magnitudes(regions, move |measured| reply.send(measured.result).unwrap());
        magnitudes.report(*rank, &measured.recv_timeout(SOON).unwrap().unwrap()).unwrap();
    }
    let mut arrived = untouched(manifest);
    for ((rank, program), regions) in programs.iter().zip(sources) {
        let told = magnitudes.merged(*rank).unwrap();
        let mut transforms = Transforms::new(program.quantization(), &told).unwrap();
        for op in program.ops() {
            let mut bytes = vec![UNTOUCHED; op.bytes() as usize];
            transforms.fill(op, &Elsewhere { regions, bytes_max }, &mut bytes).unwrap();
            let into = &mut arrived[op.to.index()][op.destination.region.index()];
            for (row, bytes) in bytes.chunks_exact(op.row_bytes as usize).enumerate() {
                let at = op.destination.offset as usize + row * op.destination.stride as usize;
                into[at..at + bytes.len()].copy_from_slice(bytes);
            }
        }
    }
    arrived
}

proptest! {
    #![proptest_config(scenario::config(300))]

    #[test]
    fn what_is_made_without_a_driver_is_the_same(
        choices in scenario::choices(),
        bytes_max in prop_oneof![8..100_usize, Just(usize::MAX)],
    ) {
        let mut manifest = scenario::manifest(&mut Choices::new(choices));
        manifest.options.relay = Relay::Never;
        let found = made(&manifest, &scenario::sources(&manifest), bytes_max);
        prop_assert_eq!(found, scenario::expected(&manifest, UNTOUCHED), "{:#?}", manifest);
    }

    #[test]
    fn what_arrives_is_what_the_whole_tensors_give(
        choices in scenario::choices(),
        way in prop::sample::select(vec![Way::Rows, Way::Contiguous, Way::Staged]),
    ) {
        let mut manifest = scenario::manifest(&mut Choices::new(choices));
        manifest.options.relay = Relay::Never;
        let found = push(&manifest, &scenario::sources(&manifest), way);
        prop_assert_eq!(found, scenario::expected(&manifest, UNTOUCHED), "{:#?}", manifest);
    }
}

#[test]
fn blocks_that_four_trainers_cut_arrive_as_the_kernels_quantise_the_whole() {
    for way in [Way::Contiguous, Way::Staged] {
        whole::check(&|manifest, sources| push(manifest, sources, way));
    }
    for bytes_max in [1000, 64 << 10] {
        whole::check(&|manifest, sources| made(manifest, sources, bytes_max));
    }
}

#[test]
fn a_push_that_is_told_too_little_fails_and_gives_the_weights_back() {
    let (manifest, sources) = whole::cut_by_four();
    let plan = plan(&manifest).unwrap();
    let memory: Memory = Arc::new(Mutex::new(untouched(&manifest)));
    let sender = sender(&plan, &manifest, TrainerRank(1), &memory, Way::Rows);
    let weights: Vec<Lease> = sources[1].iter().map(|bytes| lease(bytes)).collect();
    let (reply, outcome) = mpsc::channel();
    sender.push(weights, move |outcome| reply.send(outcome).unwrap());
    let Outcome { result, regions, .. } = outcome.recv_timeout(SOON).unwrap();
    let error = result.unwrap_err().to_string();
    assert!(error.contains("is told 0 magnitudes"), "{error}");
    assert_eq!(regions.len(), sources[1].len());
    sender.close();
    assert!(*memory.lock().unwrap() == untouched(&manifest), "nothing was written");
}

#[test]
fn a_part_that_lies_elsewhere_is_refused() {
    let (manifest, _) = whole::cut_by_four();
    let plan = plan(&manifest).unwrap();
    let rank = TrainerRank(1);
    let refused = |change: &dyn Fn(&mut xfer_plan::HeldTable)| {
        let region_bytes = manifest.trainers[1].regions.clone();
        let limits = RankLimits { region_bytes, slot_bytes: 1 << 20, transforms: true };
        let (program, _) = program(&plan, &manifest, rank, Way::Rows);
        let mut part = plan.quant_part(rank, &manifest).unwrap();
        change(&mut part.tables[0]);
        program.with_quantization(&part, &limits).unwrap_err().to_string()
    };
    assert!(refused(&|table| table.pieces[0].offset += 1 << 30).contains("is not in region 0"));
    assert!(refused(&|table| table.pieces[0].offset += 2).contains("share bytes"));
    assert!(refused(&|table| table.pieces.clear()).contains("holds nothing"));
    assert!(refused(&|table| table.shape[0] = 8).contains("is not in region 0"));
    assert!(refused(&|table| table.shape = vec![3]).contains("not possible"));
    assert!(refused(&|table| table.dtype = xfer_plan::DType::I16).contains("not possible"));
    assert!(refused(&|table| table.quant.block = [64, 128]).contains("holds nothing"));
}
