//! The engine against a seeded, adversarial driver: completions out of order, refusals, failures, aborts and silence.
//! The oracle is the plan itself: on success every WRITE of it was delivered once, no bound was ever exceeded; on
//! failure nothing is in use when the push ends.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use xfer_plan::{Op, ParamId, RankPlan, Strided, Transform};

use super::*;
use crate::program::Route;

const ROW_BYTES: u32 = 8;
const SLOT_BYTES: u64 = 64;

#[derive(Debug, Clone)]
struct Case {
    /// Per operation: receiver, rows, gathered.
    ops: Vec<(u32, u32, bool)>,
    rails: Vec<RailLimits>,
    slots: u32,
    /// Decides everything that the world does.
    seed: u64,
    fault: Fault,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    None,
    FailWrite(u8),
    Abort(u8),
    /// A receiver never completes anything.
    Silent(u32),
    /// As above, and its completions never come back before the rails are closed.
    BrokenRail(u8),
}

fn cases() -> impl Strategy<Value = Case> {
    let ops = prop::collection::vec((0u32..3, 1u32..9, any::<bool>()), 0..40);
    let fault = prop_oneof![
        3 => Just(Fault::None),
        1 => any::<u8>().prop_map(Fault::FailWrite),
        1 => any::<u8>().prop_map(Fault::Abort),
        1 => (0u32..3).prop_map(Fault::Silent),
        1 => any::<u8>().prop_map(Fault::BrokenRail),
    ];
    let rail = (1u32..5, 1u64..100, any::<bool>()).prop_map(|(depth, in_flight_bytes_max, takes_rows)| {
        RailLimits { depth, in_flight_bytes_max, takes_rows }
    });
    let rails = prop::collection::vec(rail, 1..4);
    (ops, rails, 1u32..4, any::<u64>(), fault).prop_map(|(ops, rails, slots, seed, fault)| Case {
        ops,
        rails,
        slots,
        seed,
        fault,
    })
}

fn program(case: &Case) -> Program {
    let mut at = 0;
    let ops = case.ops.iter().map(|&(to, rows, gather)| {
        let bytes = u64::from(rows * ROW_BYTES);
        let region = RegionIndex(0);
        let stride = 2 * u64::from(ROW_BYTES);
        let op = Op {
            to: ReceiverRank(to),
            param: ParamId(0),
            row_bytes: ROW_BYTES,
            rows,
            source: Strided { region, offset: at * 2, stride },
            destination: Strided { region, offset: at, stride: u64::from(ROW_BYTES) },
            gather: gather && rows > 1,
            transform: Transform::Copy,
            rail: 0,
            wave: 0,
        };
        at += bytes;
        op
    });
    let ops: Vec<Op> = ops.collect();
    let bytes = ops.iter().map(Op::bytes).sum();
    let plan = RankPlan { bytes, writes: ops.iter().map(Op::writes).sum(), ops };
    let route = |to| {
        (
            ReceiverRank(to),
            Route { rail: RailIndex((to as usize % case.rails.len()) as u16), region_bytes: vec![at] },
        )
    };
    let routes: BTreeMap<_, _> = (0..3).map(route).collect();
    Program::new(plan, BTreeMap::new(), &[at * 2], routes, SLOT_BYTES).unwrap()
}

/// The world around the engine.
struct World {
    engine: Engine,
    case: Case,
    now: Duration,
    actions: VecDeque<Action>,
    in_flight: Vec<Post>,
    gathering: Vec<Slot>,
    delivered: BTreeSet<WriteId>,
    closing: bool,
    was_closed: bool,
    finished: Option<Result<Delivered, Failure>>,
}

impl World {
    fn new(case: Case) -> Self {
        let config = EngineConfig {
            rails: case.rails.clone(),
            slots: case.slots,
            deadline: Duration::from_millis(100),
            drain: Duration::from_millis(50),
        };
        let engine = Engine::new(program(&case), config);
        Self {
            engine,
            case,
            now: Duration::ZERO,
            actions: VecDeque::new(),
            in_flight: Vec::new(),
            gathering: Vec::new(),
            delivered: BTreeSet::new(),
            closing: false,
            was_closed: false,
            finished: None,
        }
    }

    fn handle(&mut self, event: Event) {
        self.engine.handle(event, self.now, &mut self.actions);
    }

    /// Carries actions out; `refuse` is asked for every post.
    fn carry_out(&mut self, mut refuse: impl FnMut() -> bool) {
        while let Some(action) = self.actions.pop_front() {
            assert!(self.finished.is_none(), "an action after the end: {action:?}");
            match action {
                Action::Gather { slot, op } => {
                    assert!(!self.slot_in_use(slot), "slot given out twice");
                    assert!(self.case.ops[op as usize].2);
                    self.gathering.push(slot);
                }
                Action::Post(post) => {
                    assert!(!self.in_flight.iter().any(|other| other.id == post.id), "posted twice");
                    assert!(!self.delivered.contains(&post.id), "posted again after delivery");
                    assert!(post.rows.count == 1 || self.case.rails[post.rail.index()].takes_rows);
                    if refuse() {
                        let refused = post.id.row % 2 == 0;
                        self.handle(if refused {
                            Event::Refused(post.id)
                        } else {
                            Event::Unoffered(post.id)
                        });
                    } else {
                        self.in_flight.push(post);
                        let rail = self.in_flight.iter().filter(|other| other.rail == post.rail);
                        let bytes: u64 = rail.clone().map(|other| other.rows.total_bytes()).sum();
                        let limits = self.case.rails[post.rail.index()];
                        assert!(rail.clone().count() <= limits.depth as usize, "rail over its depth");
                        assert!(
                            rail.count() == 1 || bytes <= limits.in_flight_bytes_max,
                            "rail over its bytes"
                        );
                    }
                }
                Action::CloseRails => self.closing = true,
                Action::Finish(result) => {
                    let result_is_final = self.gathering.is_empty() && self.in_flight.is_empty();
                    assert!(result_is_final, "ended with buffers in use");
                    self.finished = Some(result);
                }
            }
            let staged = self.gathering.len()
                + self.in_flight.iter().filter(|post| matches!(post.source, Source::Slot(_))).count();
            assert!(staged <= self.case.slots as usize, "watermark exceeded");
        }
    }

    fn slot_in_use(&self, slot: Slot) -> bool {
        self.gathering.contains(&slot) || self.in_flight.iter().any(|post| post.source == Source::Slot(slot))
    }

    fn is_silent(&self, post: &Post) -> bool {
        matches!(self.case.fault, Fault::Silent(rank) if post.to == ReceiverRank(rank))
    }

    fn run(&mut self) {
        let mut state = self.case.seed;
        // splitmix64, its middle byte.
        let mut choice = move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            ((mixed ^ (mixed >> 27)) >> 32) as u8
        };
        self.handle(Event::Start);
        for step in 0..20_000u32 {
            // Refusals come in bursts but not for ever.
            let refuse_from = if step % 7 < 3 { 128 } else { 255 };
            let mut refusals = (choice() % 5) as u32;
            self.carry_out(|| {
                let refuse = refusals > 0 && choice() > refuse_from / 2;
                refusals -= u32::from(refuse);
                refuse
            });
            if self.finished.is_some() {
                return;
            }
            self.now += Duration::from_millis(1);
            match self.case.fault {
                Fault::Abort(at) if step == u32::from(at) => self.handle(Event::Abort("stop".into())),
                Fault::BrokenRail(at) if step == u32::from(at) => {
                    self.handle(Event::RailFailed(RailIndex(0), "broken".into()));
                }
                _ => {}
            }
            if self.closing {
                (self.closing, self.was_closed) = (false, true);
                self.in_flight.clear();
                self.handle(Event::RailsClosed);
                continue;
            }
            if !self.gathering.is_empty() && choice() % 2 == 0 {
                let index = choice() as usize % self.gathering.len();
                let slot = self.gathering.swap_remove(index);
                self.handle(Event::Gathered(slot));
            }
            let live: Vec<usize> =
                (0..self.in_flight.len()).filter(|at| !self.is_silent(&self.in_flight[*at])).collect();
            if !live.is_empty() && choice() % 4 != 0 {
                let post = self.in_flight.swap_remove(live[choice() as usize % live.len()]);
                if matches!(self.case.fault, Fault::FailWrite(at) if self.delivered.len() >= usize::from(at))
                {
                    self.handle(Event::Failed(post.id, "no".into()));
                } else {
                    assert!(self.delivered.insert(post.id), "delivered twice");
                    self.handle(Event::Delivered(post.id));
                }
            }
            for rail in 0..self.case.rails.len() {
                self.handle(Event::Polled(RailIndex(rail as u16)));
            }
            self.handle(Event::Tick);
        }
        panic!("no end");
    }
}

proptest! {
    #[test]
    fn every_push_ends_rightly(case in cases()) {
        let mut world = World::new(case.clone());
        world.run();
        let planned = world.engine.program().writes();
        match world.finished.take().unwrap() {
            Ok(delivered) => {
                prop_assert_eq!(delivered.writes, planned);
                prop_assert_eq!(delivered.bytes, world.engine.program().bytes());
                let takes_rows = |to: u32| case.rails[to as usize % case.rails.len()].takes_rows;
                let gathered = case.ops.iter().filter(|(to, rows, gather)| *gather && *rows > 1 && !takes_rows(*to));
                prop_assert_eq!(delivered.bytes_gathered, gathered.map(|(_, rows, _)| u64::from(rows * ROW_BYTES)).sum::<u64>());
                let unreached = |fault| match fault {
                    Fault::Silent(rank) => case.ops.iter().all(|(to, ..)| *to != rank),
                    _ => true,
                };
                prop_assert!(unreached(case.fault));
            }
            Err(failure) => {
                let expected = match case.fault {
                    Fault::None => false,
                    Fault::FailWrite(_) => matches!(failure, Failure::Write { .. }),
                    Fault::Abort(_) => matches!(failure, Failure::Aborted(_)),
                    Fault::Silent(rank) => matches!(failure, Failure::Deadline { to, .. } if to == ReceiverRank(rank)),
                    Fault::BrokenRail(_) => matches!(failure, Failure::Rail { .. }),
                };
                prop_assert!(expected, "{:?} gave {failure}", case.fault);
            }
        }
        // Whatever happened, the next push on the same engine is whole, unless the rails are gone.
        let closed = world.was_closed;
        world.case.fault = Fault::None;
        world.delivered.clear();
        world.run();
        let again = world.finished.take().unwrap();
        prop_assert_eq!(again.map(|delivered| delivered.writes), if closed { Err(Failure::Closed) } else { Ok(planned) });
    }
}

#[test]
fn an_empty_program_ends_at_once() {
    let case = Case {
        ops: vec![],
        rails: vec![RailLimits { depth: 1, in_flight_bytes_max: u64::MAX, takes_rows: false }],
        slots: 1,
        seed: 0,
        fault: Fault::None,
    };
    let mut world = World::new(case);
    world.run();
    assert_eq!(world.finished, Some(Ok(Delivered::default())));
    assert_eq!(world.now, Duration::ZERO);
}

#[test]
fn a_completion_that_is_not_in_flight_fails_the_push_and_does_not_panic() {
    let case = Case {
        ops: vec![(0, 1, false)],
        rails: vec![RailLimits { depth: 1, in_flight_bytes_max: u64::MAX, takes_rows: false }],
        slots: 1,
        seed: 0,
        fault: Fault::None,
    };
    for id in [WriteId { op: 0, row: 0 }, WriteId { op: 7, row: 0 }] {
        let mut world = World::new(case.clone());
        world.handle(Event::Start);
        world.handle(Event::Delivered(WriteId { op: 0, row: 0 }));
        world.actions.clear();
        world.handle(Event::Start);
        world.handle(Event::Delivered(WriteId { op: 0, row: 0 }));
        world.actions.clear();
        world.handle(Event::Start);
        world.handle(Event::Refused(WriteId { op: 0, row: 0 }));
        world.handle(Event::Delivered(id));
        let Some(Action::Finish(Err(Failure::Protocol(_)))) = world.actions.back() else {
            panic!("{:?}", world.actions);
        };
    }
}

#[test]
fn a_program_that_could_never_end_fails_at_once() {
    let gather = Case {
        ops: vec![(0, 2, true)],
        rails: vec![RailLimits { depth: 1, in_flight_bytes_max: u64::MAX, takes_rows: false }],
        slots: 0,
        seed: 0,
        fault: Fault::None,
    };
    let shallow = Case {
        rails: vec![RailLimits { depth: 0, in_flight_bytes_max: u64::MAX, takes_rows: true }],
        ..gather.clone()
    };
    for case in [gather, shallow] {
        let mut world = World::new(case);
        world.run();
        let Some(Err(Failure::Protocol(_))) = world.finished else { panic!("{:?}", world.finished) };
    }
}

#[test]
fn a_gather_that_never_ends_does_not_hold_the_push_for_ever() {
    let rails = vec![RailLimits { depth: 1, in_flight_bytes_max: u64::MAX, takes_rows: false }];
    let case = Case { ops: vec![(0, 2, true)], rails, slots: 1, seed: 0, fault: Fault::None };
    let mut world = World::new(case);
    world.handle(Event::Start);
    let Some(Action::Gather { .. }) = world.actions.pop_front() else { panic!("no gather") };
    let mut ended = None;
    for _ in 0..1000 {
        world.now += Duration::from_millis(1);
        world.handle(Event::Tick);
        match world.actions.pop_front() {
            Some(Action::CloseRails) => world.handle(Event::RailsClosed),
            Some(Action::Finish(result)) => ended = Some(result),
            _ => {}
        }
    }
    assert!(matches!(ended, Some(Err(Failure::Stalled { gathering: 1, .. }))), "{ended:?}");
}
