//! When a relay waits, when it fails, and which it refuses.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use xfer_exec::program::Route;
use xfer_exec::{
    Action, Attempt, Engine, EngineConfig, Event, Failure, Post, Program, ProgramError, RailIndex,
    RailLimits, RankLimits, Rows,
};
use xfer_plan::{DType, NO_TAG, Op, ParamId, RankPlan, ReceiverRank, RelayPlan, Strided, Transform};

use super::network::REGION;

/// A relay of one operation of two rows, which arrive one by one.
fn relay() -> RelayPlan {
    let place = Strided { region: REGION, offset: 0, stride: 16 };
    let op = Op {
        to: ReceiverRank(0),
        param: ParamId(0),
        row_bytes: 8,
        rows: 2,
        source: place,
        destination: place,
        gather: false,
        transform: Transform::Copy,
        rail: 0,
        wave: 0,
    };
    let plan = RankPlan { bytes: op.bytes(), writes: op.writes(), ops: vec![op], tags: Vec::new() };
    RelayPlan { plan, first: vec![0], awaited: vec![2] }
}

fn program(relay: RelayPlan) -> Result<Program, ProgramError> {
    let route = Route { rails: vec![RailIndex(0)], region_bytes: vec![64] };
    let limits = RankLimits { region_bytes: vec![64], slot_bytes: 64, transforms: true };
    Program::relay(relay, BTreeMap::new(), &limits, [(ReceiverRank(0), route)].into())
}

fn engine() -> Engine {
    over(program(relay()).unwrap())
}

fn over(program: Program) -> Engine {
    let rails = vec![RailLimits { depth: 8, in_flight_bytes_max: u64::MAX, takes_rows: false }];
    let [deadline, stall, drain] = [10, 2, 1].map(Duration::from_secs);
    Engine::new(program, EngineConfig { rails, slots: 0, deadline, stall, drain })
}

#[test]
fn what_has_not_arrived_is_waited_for_without_a_deadline_and_what_has_been_posted_is_not() {
    let mut engine = engine();
    let mut actions = VecDeque::new();
    let mut now = Duration::ZERO;
    let mut ticks = |engine: &mut Engine, actions: &mut VecDeque<Action>, seconds: u64| {
        for _ in 0..seconds {
            now += Duration::from_secs(1);
            engine.handle(Event::Tick, now, actions);
        }
        now
    };
    engine.handle(Event::Start, Duration::ZERO, &mut actions);
    let now = ticks(&mut engine, &mut actions, 3600);
    engine.handle(Event::Arrived(0), now, &mut actions);
    let now = ticks(&mut engine, &mut actions, 3600);
    assert!(actions.is_empty(), "{actions:?}");
    engine.handle(Event::Arrived(0), now, &mut actions);
    let posts: Vec<Action> = actions.drain(..).collect();
    assert!(matches!(posts[..], [Action::Post(_), Action::Post(_)]), "{posts:?}");
    let Action::Post(Post { id, rail, rows, .. }) = posts[0] else { unreachable!() };
    assert_eq!(rows, Rows::one(8));
    engine.handle(Event::Delivered(rail, id), now, &mut actions);
    // The other one never ends.
    ticks(&mut engine, &mut actions, 20);
    assert!(matches!(actions.pop_front(), Some(Action::CloseRail(_))), "{actions:?}");
    engine.handle(Event::RailClosed(rail, Err("stuck".into())), now, &mut actions);
    let Some(Action::Finish(Err(Failure::Deadline { to: ReceiverRank(0), .. }))) = actions.pop_front() else {
        panic!("{actions:?}");
    };
}

#[test]
fn arrivals_of_another_attempt_count_for_nothing() {
    let [first, second] = [7, 8].map(|number| Attempt::new(false, number));
    let tag_in = |attempt: Attempt| {
        let mut plan = relay().plan;
        plan.tags = vec![0];
        let route = Route { rails: vec![RailIndex(0)], region_bytes: vec![64] };
        let limits = RankLimits { region_bytes: vec![64], slot_bytes: 64, transforms: true };
        let program =
            Program::new(plan, BTreeMap::new(), &limits, [(ReceiverRank(0), route)].into()).unwrap();
        let mut trainer = over(program);
        let mut actions = VecDeque::new();
        trainer.set_attempt(attempt);
        trainer.handle(Event::Start, Duration::ZERO, &mut actions);
        let Some(Action::Post(post)) = actions.pop_front() else { panic!("{actions:?}") };
        post.tag
    };
    let tags = [first, second].map(tag_in);
    assert_ne!(tags[0], tags[1]);
    let mut engine = engine();
    engine.set_attempt(second);
    let mut actions = VecDeque::new();
    engine.handle(Event::Start, Duration::ZERO, &mut actions);
    for tag in [tags[0], tags[1], tags[0], tags[0]] {
        engine.handle(Event::Arrived(tag), Duration::ZERO, &mut actions);
    }
    assert!(actions.is_empty(), "{actions:?}");
    engine.handle(Event::Arrived(tags[1]), Duration::ZERO, &mut actions);
    assert!(matches!(actions.make_contiguous(), [Action::Post(_), Action::Post(_)]), "{actions:?}");
}

#[test]
fn arrivals_that_cannot_be_right_end_the_push() {
    // All that the second push has to pass on has arrived in the first one: it counts anew.
    for (arrivals, is_right) in
        [(&[0, 0][..], true), (&[0, 0, 0], false), (&[1], false), (&[0, NO_TAG, 0], true)]
    {
        let mut engine = engine();
        for _push in 0..2 {
            let mut actions = VecDeque::new();
            // Before the push: not counted.
            engine.handle(Event::Arrived(0), Duration::ZERO, &mut actions);
            engine.handle(Event::Start, Duration::ZERO, &mut actions);
            for tag in arrivals {
                engine.handle(Event::Arrived(*tag), Duration::ZERO, &mut actions);
            }
            let mut result = None;
            while let Some(action) = actions.pop_front() {
                match action {
                    Action::Post(post) => {
                        engine.handle(Event::Delivered(post.rail, post.id), Duration::ZERO, &mut actions);
                    }
                    Action::Finish(ended) => result = Some(ended),
                    other => panic!("{other:?}"),
                }
            }
            match result {
                Some(Ok(delivered)) => assert_eq!((is_right, delivered.writes), (true, 2)),
                Some(Err(Failure::Protocol(_))) => assert!(!is_right),
                other => panic!("{arrivals:?}: {other:?}"),
            }
        }
    }
}

#[test]
fn a_relay_whose_operations_are_not_each_released_once_is_refused() {
    let staged = |change: &dyn Fn(&mut Op)| {
        let mut relay = relay();
        change(&mut relay.plan.ops[0]);
        relay
    };
    let refused = [
        RelayPlan { first: vec![1], ..relay() },
        RelayPlan { first: vec![0, 0], ..relay() },
        RelayPlan { first: vec![0, 2], awaited: vec![1; 2], ..relay() },
        RelayPlan { first: vec![0, 1, 0], awaited: vec![1; 3], ..relay() },
        RelayPlan { first: vec![], ..relay() },
        RelayPlan { first: vec![], awaited: vec![], ..relay() },
        RelayPlan { awaited: vec![0], ..relay() },
        staged(&|op| op.gather = true),
        staged(&|op| op.transform = Transform::Cast { from: DType::BF16, to: DType::F16 }),
    ];
    for relay in refused {
        let error = program(relay.clone()).unwrap_err();
        assert!(matches!(error, ProgramError::Relay(_)), "{relay:?}: {error}");
    }
    assert!(program(RelayPlan::default()).is_ok());
}
