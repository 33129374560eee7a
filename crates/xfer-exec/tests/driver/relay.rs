//! A receiver that passes on what arrives, over real rails: shared memory or libfabric on either side of it.

use std::collections::BTreeMap;
use std::sync::mpsc;

use efa_core::{Lease, LeaseMut, MemoryRef, Target};
use proptest::prelude::*;
use xfer_exec::arrivals::Arrivals;
use xfer_exec::driver::{Driver, DriverConfig, RelayMemory, Sender, ThreadConfig};
use xfer_exec::{Failure, Program, RankLimits};
use xfer_plan::{NO_TAG, Op, ParamId, RankPlan, ReceiverRank, RegionIndex, RelayPlan, Strided, Transform};

use super::DEADLINE;
use super::ends::{Ends, libfabric, local, ofi, read, routes};

/// Rows and their length of each operation, and whether the one in the middle passes it on.
type Case = Vec<(u32, u32, bool)>;

/// What the trainer does, what the one in the middle does, and how long their memory is.
fn plans(case: &Case) -> (RankPlan, RelayPlan, u64) {
    let (mut trainer, mut relay, mut end) = (RankPlan::default(), RelayPlan::default(), 0);
    let add = |plan: &mut RankPlan, op: Op, tag| {
        (plan.bytes, plan.writes) = (plan.bytes + op.bytes(), plan.writes + op.writes());
        plan.ops.push(op);
        plan.tags.push(tag);
    };
    for &(rows, row_bytes, passed_on) in case {
        // Rows that lie apart, so that each is a WRITE of its own over libfabric.
        let place = Strided { region: RegionIndex(0), offset: end, stride: u64::from(row_bytes) + 3 };
        let op = Op {
            to: ReceiverRank(0),
            param: ParamId(0),
            row_bytes,
            rows,
            source: place,
            destination: place,
            gather: false,
            transform: Transform::Copy,
            rail: 0,
            wave: 0,
        };
        let tag = if passed_on { relay.first.len() as u32 } else { NO_TAG };
        add(&mut trainer, op, tag);
        if passed_on {
            relay.first.push(relay.plan.ops.len() as u32);
            relay.awaited.push(op.writes() as u32);
            add(&mut relay.plan, op, NO_TAG);
        }
        end += place.stride * u64::from(rows);
    }
    (trainer, relay, end.max(1))
}

/// The rank in the middle.
fn relay(plan: RelayPlan, (rails, bytes): (Rails<Target>, u64), arrivals: Arrivals) -> Sender<Target> {
    let limits = RankLimits { region_bytes: vec![bytes], slot_bytes: 0, transforms: false };
    let program = Program::relay(plan, BTreeMap::new(), &limits, routes(rails.len(), &[bytes])).unwrap();
    let memory = RelayMemory::new(arrivals, DEADLINE);
    let driver = Driver::over(memory, program, rails, DEADLINE, DEADLINE / 5);
    Sender::drive(driver, ThreadConfig { name: "relay".into(), ..ThreadConfig::default() }).unwrap()
}

fn trainer(plan: RankPlan, (rails, bytes): (Rails<Lease>, u64)) -> Sender {
    let limits = RankLimits { region_bytes: vec![bytes], slot_bytes: 0, transforms: false };
    let program = Program::new(plan, BTreeMap::new(), &limits, routes(rails.len(), &[bytes])).unwrap();
    let (staging, deadline) = (LeaseMut::zeroed(0).unwrap(), DEADLINE);
    let driver = DriverConfig { program, rails, staging, slot_bytes: 0, deadline, stall: DEADLINE / 5 };
    Sender::start(driver, ThreadConfig { name: "trainer".into(), ..ThreadConfig::default() }).unwrap()
}

type Rails<S> = Vec<Box<dyn xfer_exec::Rail<Buffer = S> + Send>>;

/// Two pushes. `into` leads to the one in the middle, `onward` from it.
fn check(
    case: &Case,
    into: impl FnOnce(u64, &[MemoryRef]) -> Ends<Lease>,
    onward: impl FnOnce(u64, &[MemoryRef]) -> Ends<Target>,
) {
    let (plan, relays, bytes) = plans(case);
    let mut weights = LeaseMut::zeroed(bytes as usize).unwrap();
    let (rails, mut middle) = into(bytes, &[weights.memory().clone()]);
    let arena = middle.arenas[0].clone();
    let (onward, last) = onward(bytes, &[arena.memory().clone()]);
    let trainer = trainer(plan.clone(), (rails, bytes));
    let relay = relay(relays.clone(), (onward, bytes), middle.arrivals.remove(0));
    let mut expected = [vec![0; bytes as usize], vec![0; bytes as usize]];
    for step in 1..=2_u8 {
        for (at, byte) in weights.bytes_mut().iter_mut().enumerate() {
            *byte = (at as u8).wrapping_mul(31) ^ (at >> 8) as u8 ^ step;
        }
        for (plan, expected) in [&plan, &relays.plan].into_iter().zip(&mut expected) {
            for op in &plan.ops {
                for row in 0..u64::from(op.rows) {
                    let at = (op.destination.offset + row * op.destination.stride) as usize;
                    let at = at..at + op.row_bytes as usize;
                    expected[at.clone()].copy_from_slice(&weights.bytes()[at]);
                }
            }
        }
        let ((passed, relayed), (reply, pushed)) = (mpsc::channel(), mpsc::channel());
        assert!(relay.pass_on(vec![arena.clone()], move |outcome| passed.send(outcome).unwrap()));
        trainer.push(vec![weights.freeze()], move |outcome| reply.send(outcome).unwrap());
        let mut pushed = pushed.recv_timeout(2 * DEADLINE).unwrap();
        let passed = relayed.recv_timeout(2 * DEADLINE).unwrap();
        let (pushed_all, passed_all) = (pushed.result.unwrap(), passed.result.unwrap());
        assert_eq!((pushed_all.bytes, pushed_all.writes), (plan.bytes, plan.writes));
        assert_eq!((passed_all.bytes, passed_all.writes), (relays.plan.bytes, relays.plan.writes));
        weights = pushed.regions.remove(0).thaw().unwrap();
        assert!(read(&arena) == expected[0] && read(&last.arenas[0]) == expected[1]);
    }
}

fn cases() -> impl Strategy<Value = Case> {
    prop::collection::vec((1u32..5, 1u32..3000, any::<bool>()), 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
    #[test]
    fn what_arrives_over_shared_memory_is_passed_on_over_it(case in cases()) {
        check(&case, |bytes, _| local(&[bytes]), |bytes, _| local(&[bytes]));
    }
}

proptest! {
    // Each case opens up to eight rails.
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]
    #[test]
    fn what_arrives_over_libfabric_is_passed_on_over_either(case in cases(), rails in 1usize..3, far: bool) {
        let Some(library) = libfabric() else { return Ok(()) };
        let into = |bytes: u64, memories: &[MemoryRef]| ofi(&library, &[bytes], memories, rails);
        match far {
            true => check(&case, into, |bytes, memories| ofi(&library, &[bytes], memories, rails)),
            false => check(&case, into, |bytes, _| local(&[bytes])),
        }
    }
}

/// A push that was given up may have told what nobody has read when the next one begins.
#[test]
fn what_was_told_before_a_relay_begins_is_not_heard_later() {
    let Some(library) = libfabric() else { return };
    let (plan, _, bytes) = plans(&vec![(3, 10, true); 20]);
    let mut weights = LeaseMut::zeroed(bytes as usize).unwrap();
    let (rails, mut middle) = ofi(&library, &[bytes], &[weights.memory().clone()], 2);
    let trainer = trainer(plan.clone(), (rails, bytes));
    for _ in 0..200 {
        let (reply, pushed) = mpsc::channel();
        trainer.push(vec![weights.freeze()], move |outcome| reply.send(outcome).unwrap());
        let mut pushed = pushed.recv_timeout(2 * DEADLINE).unwrap();
        weights = pushed.regions.remove(0).thaw().unwrap();
        pushed.result.unwrap();
        middle.targets[0].settle().unwrap();
        let mut tags = Vec::new();
        assert!(middle.arrivals[0].poll(&mut tags).unwrap());
        assert_eq!(tags.len() as u64, plan.writes);
    }
}

/// Those who still push to it must not find out by their own deadline that it has stopped.
#[test]
fn a_relay_that_has_stopped_holds_nobody_up() {
    // More than a socket holds.
    let (plan, relays, bytes) = plans(&vec![(1000, 1, true); 200]);
    let mut weights = LeaseMut::zeroed(bytes as usize).unwrap();
    let (rails, mut middle): Ends<Lease> = local(&[bytes]);
    let (onward, _last) = local(&[bytes]);
    let trainer = trainer(plan, (rails, bytes));
    let relay = relay(relays, (onward, bytes), middle.arrivals.remove(0));
    for _ in 0..2 {
        let (reply, outcome) = mpsc::channel();
        assert!(relay.pass_on(middle.arenas.clone(), move |outcome| reply.send(outcome).unwrap()));
        relay.abort("somebody else has failed".into());
        assert!(outcome.recv_timeout(DEADLINE).unwrap().result.is_err());
        let (reply, pushed) = mpsc::channel();
        trainer.push(vec![weights.freeze()], move |outcome| reply.send(outcome).unwrap());
        let mut pushed = pushed.recv_timeout(2 * DEADLINE).unwrap();
        pushed.result.unwrap();
        weights = pushed.regions.remove(0).thaw().unwrap();
    }
}

#[test]
fn a_relay_waits_for_what_does_not_come_until_it_is_told_to_stop() {
    let (_, relays, bytes) = plans(&vec![(1, 10, true)]);
    let (onward, last) = local(&[bytes]);
    let (rails, mut middle): Ends<Lease> = local(&[bytes]);
    let relay = relay(relays, (onward, bytes), middle.arrivals.remove(0));
    let (reply, outcome) = mpsc::channel();
    assert!(relay.pass_on(middle.arenas.clone(), move |outcome| reply.send(outcome).unwrap()));
    relay.abort("the trainers are gone".into());
    let outcome = outcome.recv_timeout(DEADLINE).unwrap();
    assert!(matches!(outcome.result, Err(Failure::Aborted(reason)) if reason == "the trainers are gone"));
    assert_eq!(outcome.regions.len(), 1);
    drop((rails, last));
}
