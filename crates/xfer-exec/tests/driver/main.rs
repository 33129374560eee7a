//! The driver on real rails, byte for byte: random programs over shared memory and over libfabric, with staging so small
//! that gathers wait for it. The oracle copies rows one at a time.

use std::collections::BTreeMap;
use std::sync::mpsc;
use std::time::Duration;

use efa_core::{Lease, LeaseMut};
use proptest::prelude::*;
use xfer_exec::driver::{DriverConfig, HostRail, Outcome, Sender, ThreadConfig};
use xfer_exec::{Failure, Program, RankLimits};
use xfer_plan::{Op, ParamId, RankPlan, ReceiverRank, RegionIndex, Strided, Transform};

mod ends;
mod relay;

use ends::{Receivers, libfabric, local, ofi, routes};

type Ends = ends::Ends<Lease>;

const RECEIVERS: u32 = 2;
const SOURCE_BYTES: usize = 1 << 16;
const SLOT_BYTES: u64 = 4096;
const DEADLINE: Duration = Duration::from_secs(20);

#[derive(Debug, Clone)]
struct Case {
    /// Receiver, rows, bytes of a row, gap between rows at the source, gap at the destination, gathered.
    ops: Vec<(u32, u32, u32, u32, u32, bool)>,
    seed: u8,
}

fn cases() -> impl Strategy<Value = Case> {
    let op = (0..RECEIVERS, 1u32..6, 1u32..700, 0u32..50, 0u32..50, any::<bool>());
    (prop::collection::vec(op, 0..40), any::<u8>()).prop_map(|(ops, seed)| Case { ops, seed })
}

impl Case {
    /// The plan, and the bytes that each receiver needs.
    fn plan(&self) -> (RankPlan, Vec<u64>) {
        let mut ends = vec![0_u64; RECEIVERS as usize];
        let mut source = 0_u64;
        let mut ops = Vec::new();
        for &(to, rows, row_bytes, source_gap, destination_gap, gather) in &self.ops {
            let region = RegionIndex(0);
            let gather = gather && rows > 1;
            let one = rows == 1;
            let source_stride = u64::from(if one { row_bytes } else { row_bytes + source_gap });
            // A gathered chunk lands in one piece.
            let destination_stride =
                u64::from(if one || gather { row_bytes } else { row_bytes + destination_gap });
            let extent = u64::from(rows - 1) * source_stride + u64::from(row_bytes);
            if source + extent > SOURCE_BYTES as u64 {
                source = 0;
            }
            let end = &mut ends[to as usize];
            ops.push(Op {
                to: ReceiverRank(to),
                param: ParamId(0),
                row_bytes,
                rows,
                source: Strided { region, offset: source, stride: source_stride },
                destination: Strided { region, offset: *end, stride: destination_stride },
                gather,
                transform: Transform::Copy,
                rail: ops.len() as u8,
                wave: 0,
            });
            source += extent / 2;
            *end += u64::from(rows - 1) * destination_stride + u64::from(row_bytes);
        }
        let plan = RankPlan {
            bytes: ops.iter().map(Op::bytes).sum(),
            writes: ops.iter().map(Op::writes).sum(),
            ops,
            tags: Vec::new(),
        };
        // No receiver is empty: libfabric exposes nothing of no bytes.
        (plan, ends.into_iter().map(|end| end.max(1)).collect())
    }

    fn weights(&self, step: u8) -> Vec<u8> {
        (0..SOURCE_BYTES).map(|at| (at as u8).wrapping_mul(31) ^ (at >> 8) as u8 ^ self.seed ^ step).collect()
    }
}

fn oracle(plan: &RankPlan, source: &[u8], bytes: &[u64]) -> Vec<Vec<u8>> {
    let mut arenas: Vec<Vec<u8>> = bytes.iter().map(|bytes| vec![0; *bytes as usize]).collect();
    for op in &plan.ops {
        for row in 0..u64::from(op.rows) {
            let from = (op.source.offset + row * op.source.stride) as usize;
            let to = (op.destination.offset + row * op.destination.stride) as usize;
            let len = op.row_bytes as usize;
            arenas[op.to.index()][to..to + len].copy_from_slice(&source[from..from + len]);
        }
    }
    arenas
}

/// Whether every arena is what the plan makes of `source`.
fn check_arenas(receivers: &Receivers, plan: &RankPlan, source: &[u8], bytes: &[u64]) {
    for (arena, expected) in receivers.arenas.iter().zip(oracle(plan, source, bytes)) {
        assert!(ends::read(arena) == expected, "bytes differ");
    }
}

fn sender(plan: RankPlan, rails: Vec<HostRail>, bytes: &[u64], staging: LeaseMut) -> Sender {
    let routes = routes(rails.len(), bytes);
    let limits =
        RankLimits { region_bytes: vec![SOURCE_BYTES as u64], slot_bytes: SLOT_BYTES, transforms: false };
    let program = Program::new(plan, BTreeMap::new(), &limits, routes).unwrap();
    let stall = DEADLINE / 5;
    let driver = DriverConfig { program, rails, staging, slot_bytes: SLOT_BYTES, deadline: DEADLINE, stall };
    Sender::start(driver, ThreadConfig { name: "test".into(), ..ThreadConfig::default() }).unwrap()
}

fn push(sender: &Sender, weights: LeaseMut) -> (Outcome, LeaseMut) {
    let (reply, outcome) = mpsc::channel();
    sender.push(vec![weights.freeze()], move |outcome| reply.send(outcome).unwrap());
    let mut outcome = outcome.recv_timeout(2 * DEADLINE).unwrap();
    let weights = outcome.regions.pop().map(Lease::thaw).unwrap().unwrap();
    (outcome, weights)
}

/// Two pushes with the weights changed in between.
fn check(case: &Case, make: impl FnOnce(&[u64], &[efa_core::MemoryRef]) -> Ends) {
    check_pushes(case, 2, make, |_, _| {});
}

/// So many pushes with the weights changed in between, and something done after each.
fn check_pushes(
    case: &Case,
    pushes: u8,
    make: impl FnOnce(&[u64], &[efa_core::MemoryRef]) -> Ends,
    after: impl Fn(u8, &Receivers),
) {
    let (plan, bytes) = case.plan();
    // Two slots: gathers have to wait for each other.
    let staging = LeaseMut::zeroed(2 * SLOT_BYTES as usize).unwrap();
    let mut weights = LeaseMut::zeroed(SOURCE_BYTES).unwrap();
    let memories = [weights.memory().clone(), staging.memory().clone()];
    let (rails, receivers) = make(&bytes, &memories);
    let sender = sender(plan.clone(), rails, &bytes, staging);
    for step in 1..=pushes {
        weights.bytes_mut().copy_from_slice(&case.weights(step));
        let (outcome, back) = push(&sender, weights);
        weights = back;
        let delivered = outcome.result.unwrap();
        assert_eq!((delivered.bytes, delivered.writes), (plan.bytes, plan.writes));
        check_arenas(&receivers, &plan, weights.bytes(), &bytes);
        after(step, &receivers);
    }
    sender.close();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn local_pushes_are_bit_exact(case in cases()) {
        check(&case, |bytes, _| local(bytes));
    }
}

proptest! {
    // Each case opens up to nine rails.
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]
    #[test]
    fn libfabric_pushes_are_bit_exact(case in cases(), rails in 1usize..4) {
        if let Some(library) = libfabric() {
            check(&case, |bytes, memories| ofi(&library, bytes, memories, rails));
        }
    }
}

#[test]
fn a_plan_without_gathers_needs_no_staging() {
    let case = Case { ops: vec![(0, 1, 100, 0, 0, false), (1, 3, 10, 5, 5, false)], seed: 3 };
    let (plan, bytes) = case.plan();
    let (rail, _receivers) = local(&bytes);
    let sender = sender(plan, rail, &bytes, LeaseMut::zeroed(0).unwrap());
    let (outcome, _) = push(&sender, LeaseMut::zeroed(SOURCE_BYTES).unwrap());
    assert_eq!(outcome.result.unwrap().bytes_gathered, 0);
}

#[test]
fn libfabric_gathers_what_is_short_and_shared_memory_copies_it_once() {
    let case = Case { ops: vec![(0, 4, 100, 7, 0, true)], seed: 3 };
    let (plan, bytes) = case.plan();
    let gathered = |make: &dyn Fn(&[efa_core::MemoryRef]) -> Ends| {
        let staging = LeaseMut::zeroed(SLOT_BYTES as usize).unwrap();
        let weights = LeaseMut::zeroed(SOURCE_BYTES).unwrap();
        let (rail, _receivers) = make(&[weights.memory().clone(), staging.memory().clone()]);
        let sender = sender(plan.clone(), rail, &bytes, staging);
        push(&sender, weights).0.result.unwrap().bytes_gathered
    };
    assert_eq!(gathered(&|_| local(&bytes)), 0);
    if let Some(library) = libfabric() {
        assert_eq!(gathered(&|memories| ofi(&library, &bytes, memories, 1)), 400);
    }
}

#[test]
fn an_aborted_push_gives_the_weights_back() {
    let Some(library) = libfabric() else { return };
    // Enough bytes that the abort comes in the middle, most times; whole or aborted, the weights come back.
    let case = Case { ops: vec![(0, 1, 60_000, 0, 0, false); 400], seed: 3 };
    let (plan, bytes) = case.plan();
    let staging = LeaseMut::zeroed(0).unwrap();
    let weights = LeaseMut::zeroed(SOURCE_BYTES).unwrap();
    let memories = [weights.memory().clone()];
    let (rail, _receivers) = ofi(&library, &bytes, &memories, 1);
    let sender = sender(plan, rail, &bytes, staging);
    let (reply, outcome) = mpsc::channel();
    sender.push(vec![weights.freeze()], move |outcome| reply.send(outcome).unwrap());
    sender.abort("the test says so".into());
    let outcome = outcome.recv_timeout(2 * DEADLINE).unwrap();
    match outcome.result {
        Ok(_) => {}
        Err(Failure::Aborted(reason)) => assert_eq!(reason, "the test says so"),
        Err(other) => panic!("{other}"),
    }
    assert!(outcome.rails.iter().all(|rail| rail.closed.is_none()));
    let weights: Vec<_> = outcome.regions.into_iter().map(Lease::thaw).collect();
    assert!(weights.iter().all(Result::is_ok));
}

#[test]
fn a_rail_that_a_receiver_closes_is_replaced_by_the_others() {
    let Some(library) = libfabric() else { return };
    let case = Case { ops: (0..400).map(|op| (op % RECEIVERS, 1, 60_000, 0, 0, false)).collect(), seed: 3 };
    let (plan, bytes) = case.plan();
    let mut weights = LeaseMut::zeroed(SOURCE_BYTES).unwrap();
    let (rails, receivers) = ofi(&library, &bytes, &[weights.memory().clone()], 3);
    let sender = sender(plan.clone(), rails, &bytes, LeaseMut::zeroed(0).unwrap());
    for step in 1..=3 {
        weights.bytes_mut().copy_from_slice(&case.weights(step));
        let (reply, outcome) = mpsc::channel();
        sender.push(vec![weights.freeze()], move |outcome| reply.send(outcome).unwrap());
        if step == 2 {
            // In the middle of a push or after it, as it happens; later ones must do without.
            receivers.targets[0].close_rail(1).unwrap();
        }
        let mut outcome = outcome.recv_timeout(2 * DEADLINE).unwrap();
        weights = outcome.regions.pop().map(Lease::thaw).unwrap().unwrap();
        let delivered = outcome.result.unwrap();
        assert_eq!((delivered.bytes, delivered.writes), (plan.bytes, plan.writes));
        assert_eq!(outcome.rails.iter().map(|rail| rail.bytes).sum::<u64>(), plan.bytes);
        check_arenas(&receivers, &plan, weights.bytes(), &bytes);
    }
    receivers.targets[0].close_rail(1).unwrap();
    assert!(receivers.targets[0].close_rail(3).is_err());
}

/// As the receiver does when another trainer gives the rail up: nothing is in flight that could fail, and `tcp` then answers
/// "again" to every post.
#[test]
fn a_rail_that_a_receiver_closes_between_pushes_is_done_without() {
    let Some(library) = libfabric() else { return };
    // What is gathered for one receiver is posted after the rails have been polled for the other.
    let op = |op| if op % RECEIVERS == 0 { (0, 4, 1000, 7, 0, true) } else { (1, 1, 60_000, 0, 0, false) };
    let case = Case { ops: (0..100).map(op).collect(), seed: 3 };
    let close = |step, receivers: &Receivers| {
        if step < 3 {
            receivers.targets[0].close_rail(usize::from(step) - 1).unwrap();
        }
    };
    check_pushes(&case, 4, |bytes, memories| ofi(&library, bytes, memories, 3), close);
}
