//! The engine against a seeded, adversarial driver: completions out of order, refusals, failures, aborts and silence.
//! The oracle is the plan itself: on success every row of it has landed once, no bound was ever exceeded, and no slot was filled
//! while a WRITE of it could still be read; on failure nothing is in use when the push ends. A push succeeds whenever every
//! receiver keeps a rail.

use proptest::prelude::*;

use super::*;
use crate::program::WriteId;

mod examples;
mod world;

use world::{Case, Fault, Kind, RAILS_MAX, RECEIVERS, ROW_BYTES, World};

fn cases() -> impl Strategy<Value = Case> {
    let kind = prop_oneof![
        2 => Just(Kind::Plain),
        2 => Just(Kind::Gather),
        1 => Just(Kind::Transform),
        1 => Just(Kind::TransformRows),
    ];
    let ops = prop::collection::vec((0..RECEIVERS, 1u32..9, kind), 0..40);
    let fault = prop_oneof![
        3 => Just(Fault::None),
        1 => any::<u8>().prop_map(Fault::FailWrite),
        1 => any::<u8>().prop_map(Fault::Abort),
        1 => (0..RECEIVERS).prop_map(Fault::Silent),
        1 => (0..RAILS_MAX as u16).prop_map(Fault::SilentRail),
        1 => (0..RAILS_MAX as u16, 0..RECEIVERS).prop_map(|(rail, to)| Fault::Refuses(rail, to)),
        1 => any::<u8>().prop_map(Fault::BrokenRail),
        1 => any::<u8>().prop_map(Fault::Leak),
    ];
    let rail = (1u32..5, 1u64..100, any::<bool>()).prop_map(|(depth, in_flight_bytes_max, takes_rows)| {
        RailLimits { depth, in_flight_bytes_max, takes_rows }
    });
    let rails = prop::collection::vec(rail, 1..=RAILS_MAX);
    let routes = prop::collection::vec(any::<u8>(), RECEIVERS as usize);
    (ops, rails, routes, 1u32..8, any::<u64>(), fault)
        .prop_map(|(ops, rails, routes, slots, seed, fault)| Case { ops, rails, routes, slots, seed, fault })
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
                let staged = (0..).zip(&case.ops).filter(|(op, _)| case.is_staged(*op));
                let staged: u64 = staged.map(|(_, (_, rows, _))| u64::from(rows * ROW_BYTES)).sum();
                prop_assert_eq!(delivered.bytes_gathered, staged);
                prop_assert_eq!(&world.landed, &world.planned_rows());
                let by_rail: Vec<RailUse> = world.engine.rails().collect();
                prop_assert_eq!(by_rail.iter().map(|rail| rail.bytes).sum::<u64>(), delivered.bytes);
                prop_assert_eq!(by_rail.iter().map(|rail| rail.writes).sum::<u64>(), delivered.writes);
                let unreached = |fault| match fault {
                    Fault::Silent(rank) => case.ops.iter().all(|(to, ..)| *to != rank),
                    Fault::Refuses(rail, rank) => !case.depends(rank, rail),
                    _ => true,
                };
                prop_assert!(unreached(case.fault));
                if let Fault::None | Fault::FailWrite(_) | Fault::Refuses(..) = case.fault {
                    prop_assert!(by_rail.iter().all(|rail| rail.closed.is_none()), "{by_rail:?}");
                }
            }
            Err(failure) => {
                let uncertain = match &failure {
                    Failure::Uncertain { to, rail, .. } => Some((*to, *rail)),
                    _ => None,
                };
                let expected = match case.fault {
                    Fault::None => false,
                    // The seed says which WRITEs may not be repeated.
                    Fault::FailWrite(_) if uncertain.is_some() => true,
                    Fault::Silent(rank) if uncertain.is_some() => uncertain.unwrap().0 == ReceiverRank(rank),
                    Fault::SilentRail(rail) if uncertain.is_some() => uncertain.unwrap().1 == RailIndex(rail),
                    Fault::BrokenRail(_) if uncertain.is_some() => uncertain.unwrap().1 == RailIndex(0),
                    // One path after another fails.
                    Fault::FailWrite(_) => matches!(failure, Failure::Write { .. }),
                    Fault::Abort(_) => matches!(failure, Failure::Aborted(_)),
                    Fault::Silent(rank) => match failure {
                        Failure::Deadline { to, .. } => to == ReceiverRank(rank),
                        _ => false,
                    },
                    Fault::SilentRail(rail) => match failure {
                        Failure::Deadline { to, .. } => {
                            case.ways(to.0).contains(&RailIndex(rail)) && case.needs(rail)
                        }
                        _ => false,
                    },
                    Fault::Refuses(rail, rank) => match failure {
                        Failure::Deadline { to, .. } => to == ReceiverRank(rank) && case.depends(rank, rail),
                        _ => false,
                    },
                    Fault::BrokenRail(_) => matches!(failure, Failure::Rail { .. }) && case.needs(0),
                    Fault::Leak(_) => matches!(failure, Failure::Rail { .. }),
                };
                prop_assert!(expected, "{:?} gave {failure}", case.fault);
            }
        }
        // Whatever happened, the next push on the same engine is whole, unless a receiver has lost its rails.
        let lost = case.ops.iter().any(|(to, ..)| case.ways(*to).iter().all(|rail| world.closed.contains(rail)));
        let starved = world.leaked.len() == case.slots as usize;
        world.case.fault = Fault::None;
        world.delivered.clear();
        world.landed.clear();
        world.lost.clear();
        world.run();
        match world.finished.take().unwrap() {
            Ok(delivered) => prop_assert_eq!((delivered.writes, lost), (planned, false)),
            Err(Failure::Closed { .. }) => prop_assert!(lost),
            Err(Failure::Protocol(reason)) => prop_assert!(starved && reason.contains("staging"), "{reason}"),
            Err(other) => prop_assert!(false, "{other}"),
        }
    }
}

fn events() -> impl Strategy<Value = Vec<(Event, u16)>> {
    // A row, or a row and a slot.
    let id = || (0u32..6, 0u32..6, 0u32..3).prop_map(|(op, low, high)| WriteId { op, row: high << 12 | low });
    let rail = || (0u16..4).prop_map(RailIndex);
    let event = prop_oneof![
        2 => Just(Event::Start),
        3 => (0u32..5).prop_map(|slot| Event::Staged(Slot(slot))),
        1 => (rail(), id()).prop_map(|(rail, id)| Event::Refused(rail, id)),
        1 => (rail(), id()).prop_map(|(rail, id)| Event::Unoffered(rail, id)),
        1 => rail().prop_map(Event::Polled),
        6 => (rail(), id()).prop_map(|(rail, id)| Event::Delivered(rail, id)),
        1 => (rail(), id()).prop_map(|(rail, id)| Event::Failed(rail, id, "no".into())),
        1 => rail().prop_map(|rail| Event::RailFailed(rail, "no".into())),
        1 => (rail(), id()).prop_map(|(rail, id)| Event::Returned(rail, id)),
        1 => (rail(), any::<bool>()).prop_map(|(rail, closes)| {
            Event::RailClosed(rail, if closes { Ok(()) } else { Err("no".into()) })
        }),
        1 => (0u32..4).prop_map(Event::Arrived),
        1 => Just(Event::Abort("stop".into())),
        2 => Just(Event::Tick),
    ];
    prop::collection::vec((event, 0u16..200), 0..60)
}

proptest! {
    /// Events that no sound driver sends: whatever they are, the engine does not panic.
    #[test]
    fn no_order_of_events_breaks_the_engine(case in cases(), events in events()) {
        let mut world = World::new(case);
        world.handle(Event::Start);
        for (event, after) in events {
            world.now += Duration::from_millis(after.into());
            world.handle(event);
        }
    }
}
