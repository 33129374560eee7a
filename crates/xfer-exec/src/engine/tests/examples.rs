//! Stories: one situation each, with what must come of it.

use xfer_plan::Op;

use super::world::{Case, Fault, Kind, ROW_BYTES, World};
use super::*;

const RAIL: RailIndex = RailIndex(0);

/// Rails of different speeds: completions come at given rates, in bytes per millisecond.
#[test]
fn a_slow_rail_gets_less_and_delays_nobody() {
    let limits = RailLimits { depth: 128, in_flight_bytes_max: u64::MAX, takes_rows: false };
    let speeds = [4_u64, 4, 4, 1];
    let case = Case {
        ops: vec![(0, 1, Kind::Plain); 40_000],
        rails: vec![limits; speeds.len()],
        routes: vec![15, 0, 0],
        slots: 1,
        seed: 0,
        fault: Fault::None,
    };
    // Operations of 8 KiB at so many of them in a millisecond.
    let mut world = World::new(case);
    let ops: Vec<Op> = world.engine.program.ops().to_vec();
    let bytes: u64 = ops.iter().map(|op| op.bytes()).sum();
    world.handle(Event::Start);
    let mut queues: Vec<VecDeque<WriteId>> = vec![VecDeque::new(); speeds.len()];
    let mut took = 0;
    while world.finished.is_none() {
        world.now += Duration::from_millis(1);
        took += 1;
        while let Some(action) = world.actions.pop_front() {
            match action {
                Action::Post(post) => queues[post.rail.index()].push_back(post.id),
                Action::Finish(result) => world.finished = Some(result),
                other => panic!("{other:?}"),
            }
        }
        for (rail, (queue, speed)) in queues.iter_mut().zip(speeds).enumerate() {
            for id in queue.drain(..queue.len().min(speed as usize)) {
                world.engine.handle(
                    Event::Delivered(RailIndex(rail as u16), id),
                    world.now,
                    &mut world.actions,
                );
            }
        }
        world.handle(Event::Tick);
        assert!(took < 100_000, "no end");
    }
    let by_rail: Vec<u64> = world.engine.rails().map(|rail| rail.bytes).collect();
    assert!(matches!(world.finished, Some(Ok(_))), "{:?}", world.finished);
    assert_eq!(by_rail.iter().sum::<u64>(), bytes);
    let best = bytes / u64::from(ROW_BYTES) / speeds.iter().sum::<u64>();
    assert!(took * 100 < best * 103, "{took} ms where {best} are possible: {by_rail:?}");
}

#[test]
fn an_empty_program_ends_at_once() {
    let case = Case {
        ops: vec![],
        rails: vec![RailLimits { depth: 1, in_flight_bytes_max: u64::MAX, takes_rows: false }],
        routes: vec![1; 3],
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
        ops: vec![(0, 1, Kind::Plain)],
        rails: vec![RailLimits { depth: 1, in_flight_bytes_max: u64::MAX, takes_rows: false }],
        routes: vec![1; 3],
        slots: 1,
        seed: 0,
        fault: Fault::None,
    };
    for id in [WriteId { op: 0, row: 0 }, WriteId { op: 7, row: 0 }] {
        let mut world = World::new(case.clone());
        world.handle(Event::Start);
        world.handle(Event::Delivered(RAIL, WriteId { op: 0, row: 0 }));
        world.actions.clear();
        world.handle(Event::Start);
        world.handle(Event::Delivered(RAIL, WriteId { op: 0, row: 0 }));
        world.actions.clear();
        world.handle(Event::Start);
        world.handle(Event::Refused(RAIL, WriteId { op: 0, row: 0 }));
        world.handle(Event::Delivered(RAIL, id));
        let Some(Action::Finish(Err(Failure::Protocol(_)))) = world.actions.back() else {
            panic!("{:?}", world.actions);
        };
    }
}

#[test]
fn the_way_of_a_write_that_failed_is_named_with_the_first_reason() {
    let case = Case {
        ops: (0..40).map(|op| (op % 2, 1, Kind::Plain)).collect(),
        rails: vec![RailLimits { depth: 8, in_flight_bytes_max: u64::MAX, takes_rows: false }; 2],
        routes: vec![3; 3],
        slots: 1,
        seed: 0,
        fault: Fault::None,
    };
    let mut world = World::new(case);
    let mut reasons = ["reset", "cancelled"].into_iter().cycle();
    for _push in 0..2 {
        world.handle(Event::Start);
        while let Some(action) = world.actions.pop_front() {
            match action {
                Action::Post(post) if (post.rail, post.to) == (RailIndex(1), ReceiverRank(0)) => {
                    let reason = reasons.next().unwrap_or_default().into();
                    world.handle(Event::Failed(post.rail, post.id, reason));
                }
                Action::Post(post) => world.handle(Event::Delivered(post.rail, post.id)),
                Action::Finish(result) => assert!(result.is_ok(), "{result:?}"),
                other => panic!("{other:?}"),
            }
        }
        let lost: Vec<_> = world.engine.rails().map(|rail| rail.lost).collect();
        assert_eq!(lost, [vec![], vec![(ReceiverRank(0), "reset".into())]]);
    }
}

/// Receivers close what `unfinished` names. The last way to one that may be tried again is not among it.
#[test]
fn what_a_failed_write_may_leave_behind_is_named_unless_it_is_the_last_way() {
    for (rails, named) in [(1, vec![]), (2, vec![ReceiverRank(0)])] {
        let case = Case {
            ops: vec![(0, 1, Kind::Plain)],
            rails: vec![WIDE; rails],
            routes: vec![3; 3],
            slots: 1,
            seed: 0,
            fault: Fault::None,
        };
        let mut world = World::new(case);
        for fails in [true, false] {
            world.finished = None;
            world.handle(Event::Start);
            while let Some(action) = world.actions.pop_front() {
                match action {
                    Action::Post(post) if fails && post.rail == RAIL => {
                        world.handle(Event::Failed(post.rail, post.id, "reset".into()));
                    }
                    Action::Post(post) => world.handle(Event::Delivered(post.rail, post.id)),
                    Action::Finish(result) => world.finished = Some(result),
                    other => panic!("{other:?}"),
                }
            }
            let ended_well = matches!(world.finished, Some(Ok(_)));
            assert_eq!(ended_well, !fails || rails > 1, "{:?}", world.finished);
            let unfinished = world.engine.rails().next().unwrap().unfinished;
            assert_eq!(unfinished, if fails { named.clone() } else { vec![] });
        }
    }
}

/// A receiver that was stopped answers on one rail after the other when it goes on: the first must not accuse the rest.
#[test]
fn a_receiver_that_was_silent_on_all_rails_has_a_whole_stall_again() {
    let case = Case {
        ops: (0..100).map(|_| (0, 1, Kind::Plain)).collect(),
        rails: vec![RailLimits { depth: 8, in_flight_bytes_max: u64::MAX, takes_rows: false }; 2],
        routes: vec![3; 3],
        slots: 1,
        seed: 0,
        fault: Fault::None,
    };
    let mut world = World::new(case);
    world.handle(Event::Start);
    let mut posted = VecDeque::new();
    // Rail 0 says nothing at all, rail 1 from some time on.
    let mut closed_after = |world: &mut World, ms: u64, speaks: bool| {
        for _ in 0..ms / 10 {
            while let Some(action) = world.actions.pop_front() {
                match action {
                    Action::Post(post) => posted.extend((post.rail == RailIndex(1)).then_some(post.id)),
                    Action::CloseRail(rail) => return Some(rail),
                    other => panic!("{other:?}"),
                }
            }
            world.now += Duration::from_millis(10);
            if speaks {
                world.handle(Event::Delivered(RailIndex(1), posted.pop_front().unwrap()));
            }
            world.handle(Event::Tick);
        }
        None
    };
    assert_eq!(closed_after(&mut world, 180, false), None);
    assert_eq!(closed_after(&mut world, 140, true), None);
    assert_eq!(closed_after(&mut world, 60, true), Some(RailIndex(0)));
}

#[test]
fn a_program_that_could_never_end_fails_at_once() {
    let gather = Case {
        ops: vec![(0, 2, Kind::Gather)],
        rails: vec![RailLimits { depth: 1, in_flight_bytes_max: u64::MAX, takes_rows: false }],
        routes: vec![1; 3],
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
    let routes = vec![1; 3];
    let case = Case { ops: vec![(0, 2, Kind::Gather)], rails, routes, slots: 1, seed: 0, fault: Fault::None };
    let mut world = World::new(case);
    world.handle(Event::Start);
    let Some(Action::Stage { .. }) = world.actions.pop_front() else { panic!("no gather") };
    let mut ended = None;
    for _ in 0..1000 {
        world.now += Duration::from_millis(1);
        world.handle(Event::Tick);
        if let Some(Action::Finish(result)) = world.actions.pop_front() {
            ended = Some(result);
        }
    }
    assert!(matches!(ended, Some(Err(Failure::Stalled { filling: 1, .. }))), "{ended:?}");
}

/// Limits that limit nothing here.
const WIDE: RailLimits = RailLimits { depth: 128, in_flight_bytes_max: u64::MAX, takes_rows: false };

/// Pushes as a driver does, for so many milliseconds at most: what is posted to a rail goes in one batch, which ends at the
/// first WRITE that is refused; the others are delivered one step later.
fn drive(world: &mut World, steps: u32, refuses: impl Fn(&Post) -> bool) {
    world.handle(Event::Start);
    for _ in 0..steps {
        let mut outboxes: Vec<VecDeque<Post>> = vec![VecDeque::new(); world.case.rails.len()];
        while let Some(action) = world.actions.pop_front() {
            match action {
                Action::Post(post) => outboxes[post.rail.index()].push_back(post),
                Action::Stage { slot, op } => world.stage(slot, op),
                Action::CloseRail(rail) => world.close(rail),
                Action::Finish(result) => return world.finished = Some(result),
            }
        }
        world.now += Duration::from_millis(1);
        for (rail, mut outbox) in (0..).map(RailIndex).zip(outboxes) {
            let taken = outbox.iter().position(&refuses).unwrap_or(outbox.len());
            let done: Vec<Post> = world.in_flight.extract_if(.., |post| post.rail == rail).collect();
            world.in_flight.extend(outbox.drain(..taken));
            let refused = !outbox.is_empty();
            while let Some(post) = outbox.pop_back() {
                world.handle(match outbox.is_empty() {
                    true => Event::Refused(rail, post.id),
                    false => Event::Unoffered(rail, post.id),
                });
            }
            for post in done {
                if world.is_silent(&post) {
                    world.in_flight.push(post);
                } else {
                    world.delivered(post);
                }
            }
            if refused {
                world.handle(Event::Polled(rail));
            }
        }
        for filled in std::mem::take(&mut world.filling) {
            world.staged(filled);
        }
        world.handle(Event::Tick);
    }
}

/// libfabric's `tcp` answers "again" for ever to a post to an address that is gone.
#[test]
fn a_rail_that_refuses_one_receiver_for_ever_delays_nobody() {
    let case = Case {
        ops: (0..300).map(|op| (op % 3, 1, Kind::Plain)).collect(),
        rails: vec![WIDE; 2],
        routes: vec![3; 3],
        slots: 1,
        seed: 0,
        fault: Fault::None,
    };
    let mut world = World::new(case);
    drive(&mut world, 1000, |post| post.to == ReceiverRank(1) && post.rail == RailIndex(0));
    assert!(matches!(world.finished, Some(Ok(_))), "{:?}", world.finished);
    // Long before any deadline.
    assert!(world.now < Duration::from_millis(50), "{:?}", world.now);
    assert!(
        world.engine.rails().all(|rail| rail.writes >= 50),
        "{:?}",
        world.engine.rails().collect::<Vec<_>>()
    );
}

#[test]
fn a_write_that_some_rails_refuse_for_ever_finds_the_one_that_takes_it() {
    for takes in 0..4 {
        let case = Case {
            ops: vec![(0, 1, Kind::Plain); 10],
            rails: vec![WIDE; 4],
            routes: vec![15],
            slots: 1,
            seed: 0,
            fault: Fault::None,
        };
        let mut world = World::new(case);
        drive(&mut world, 1000, |post| post.rail != RailIndex(takes));
        assert!(matches!(world.finished, Some(Ok(_))), "only rail {takes}: {:?}", world.finished);
    }
}

#[test]
fn what_is_gathered_goes_over_all_rails_about_as_the_plan_says() {
    let case = Case {
        ops: vec![(0, 2, Kind::Gather); 100],
        rails: vec![WIDE; 4],
        routes: vec![15],
        slots: 8,
        seed: 0,
        fault: Fault::None,
    };
    let mut world = World::new(case);
    let ops = world.engine.program().ops();
    let planned = [0, 1, 2, 3].map(|rail| ops.iter().filter(|op| op.rail % 4 == rail).count() as u64);
    drive(&mut world, 1000, |_| false);
    assert!(matches!(world.finished, Some(Ok(_))), "{:?}", world.finished);
    let writes: Vec<u64> = world.engine.rails().map(|rail| rail.writes).collect();
    assert!(
        writes.iter().zip(planned).all(|(writes, planned)| *writes > planned / 2),
        "{writes:?} of {planned:?}"
    );
}

#[test]
fn a_receiver_that_falls_silent_is_named_in_time_and_keeps_the_rails_of_the_others() {
    let case = Case {
        ops: vec![(0, 1, Kind::Plain), (1, 1, Kind::Plain)],
        rails: vec![WIDE; 4],
        routes: vec![15; 3],
        slots: 1,
        seed: 0,
        fault: Fault::Silent(1),
    };
    let mut world = World::new(case);
    drive(&mut world, 5000, |_| false);
    let Some(Err(Failure::Deadline { to: ReceiverRank(1), .. })) = world.finished else {
        panic!("{:?}", world.finished);
    };
    let closed: Vec<_> = world.closed.iter().collect();
    assert!(world.now <= Duration::from_millis(500) && closed.len() <= 2, "{:?} {closed:?}", world.now);
}

#[test]
fn waiting_for_slots_takes_no_memory() {
    let case = Case {
        ops: (0..300).map(|op| (op % 3, 2, Kind::Gather)).collect(),
        rails: vec![WIDE; 2],
        routes: vec![3; 3],
        slots: 6,
        seed: 0,
        fault: Fault::None,
    };
    let mut world = World::new(case);
    drive(&mut world, 1000, |_| false);
    assert!(matches!(world.finished, Some(Ok(_))), "{:?}", world.finished);
    assert!(world.engine.staging_ring.capacity() <= 8, "{}", world.engine.staging_ring.capacity());
}

#[test]
fn a_pause_of_this_process_after_a_failure_closes_no_rail() {
    let case = Case {
        ops: vec![(0, 1, Kind::Plain)],
        rails: vec![WIDE],
        routes: vec![1; 3],
        slots: 1,
        seed: 0,
        fault: Fault::None,
    };
    let mut world = World::new(case);
    world.handle(Event::Start);
    let Some(Action::Post(post)) = world.actions.pop_front() else { panic!("no post") };
    world.handle(Event::Abort("stop".into()));
    world.now += Duration::from_secs(60);
    world.handle(Event::Tick);
    assert_eq!(world.actions.pop_front(), None);
    // But a process that never runs for long ends too.
    for _ in 0..2 {
        world.now += Duration::from_secs(60);
        world.handle(Event::Tick);
    }
    assert_eq!(world.actions.pop_front(), Some(Action::CloseRail(RAIL)));
    world.in_flight.push(post);
    world.close(RAIL);
    assert_eq!(world.actions.pop_front(), Some(Action::Finish(Err(Failure::Aborted("stop".into())))));
}
