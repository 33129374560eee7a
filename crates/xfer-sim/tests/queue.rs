//! The event queue against a sorted map.

use std::collections::BTreeMap;

use proptest::prelude::*;
use xfer_sim::{EventId, EventQueue, Time};

#[derive(Clone, Debug)]
enum Operation {
    Push(u64),
    Pop,
    Cancel(prop::sample::Index),
    Move(prop::sample::Index, u64),
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    // Few moments, so that many events share one.
    let operation = prop_oneof![
        4 => (0..8_u64).prop_map(Operation::Push),
        2 => Just(Operation::Pop),
        1 => any::<prop::sample::Index>().prop_map(Operation::Cancel),
        2 => (any::<prop::sample::Index>(), 0..8_u64).prop_map(|(which, time)| Operation::Move(which, time)),
    ];
    prop::collection::vec(operation, 0..200)
}

proptest! {
    #[test]
    fn events_come_by_time_and_then_in_the_order_of_their_coming(operations in operations()) {
        let mut queue = EventQueue::new();
        // By moment and by the number of the operation that put it there; events are numbers too.
        let mut sorted: BTreeMap<(u64, usize), usize> = BTreeMap::new();
        let mut ids: Vec<EventId> = vec![];
        let pick = |which: &prop::sample::Index, ids: &[EventId]| (!ids.is_empty()).then(|| which.index(ids.len()));
        for (number, operation) in operations.into_iter().enumerate() {
            match operation {
                Operation::Push(time) => {
                    sorted.insert((time, number), ids.len());
                    ids.push(queue.push(Time::from_nanos(time), ids.len()));
                }
                Operation::Pop => {
                    let first = sorted.pop_first().map(|((time, _), event)| (Time::from_nanos(time), event));
                    prop_assert_eq!(queue.pop(), first);
                }
                Operation::Cancel(which) => {
                    let Some(event) = pick(&which, &ids) else { continue };
                    let key = sorted.iter().find(|(_, other)| **other == event).map(|(key, _)| *key);
                    let cancelled = key.and_then(|key| sorted.remove(&key));
                    prop_assert_eq!(queue.cancel(ids[event]), cancelled);
                }
                Operation::Move(which, time) => {
                    let Some(event) = pick(&which, &ids) else { continue };
                    let key = sorted.iter().find(|(_, other)| **other == event).map(|(key, _)| *key);
                    prop_assert_eq!(queue.move_to(ids[event], Time::from_nanos(time)), key.is_some());
                    if let Some(key) = key {
                        sorted.remove(&key);
                        sorted.insert((time, number), event);
                    }
                }
            }
            prop_assert_eq!(queue.len(), sorted.len());
            prop_assert_eq!(queue.next_time(), sorted.first_key_value().map(|((time, _), _)| Time::from_nanos(*time)));
        }
    }
}
