//! Random transfers, planned, carried out on byte arrays, and compared with an element-by-element evaluation.

mod scenario;

use proptest::prelude::*;
use scenario::Choices;
use xfer_plan::{CheckError, Op, OpKind, Plan, plan};

const UNTOUCHED: u8 = 0xee;

fn damage_one(op: &mut Op, by: u32, damage: i32) {
    match damage {
        5 => op.source.offset += u64::from(by),
        6 => op.source.offset = op.source.offset.wrapping_sub(u64::from(by)),
        7 => op.destination.offset += u64::from(by),
        8 => op.row_bytes = op.row_bytes.saturating_sub(by),
        9 => op.rows = op.rows.saturating_sub(by),
        10 => op.source.stride += u64::from(by),
        11 => op.to.0 = by % 4,
        12 => op.row_bytes += by,
        _ => {
            // One long row instead of several: right at the start only.
            op.row_bytes *= op.rows;
            (op.rows, op.gather) = (1, false);
            (op.source.stride, op.destination.stride) = (op.row_bytes.into(), op.row_bytes.into());
        }
    }
}

fn damage_two(ops: &mut Vec<Op>, index: usize, damage: i32) {
    let op = ops[index];
    let alike = |other: &&mut Op| (other.rows, other.row_bytes) == (op.rows, op.row_bytes) && **other != op;
    match damage {
        2 => {
            if let Some(other) = ops.iter_mut().find(alike) {
                let source = std::mem::replace(&mut other.source, op.source);
                ops[index].source = source;
            }
        }
        3 => {
            if let Some(other) = ops.iter_mut().find(alike) {
                let destination = std::mem::replace(&mut other.destination, op.destination);
                ops[index].destination = destination;
            }
        }
        _ => {
            // Goes on where another operation should write, in its place.
            let stride = op.destination.stride;
            let end = op.destination.offset + u64::from(op.rows) * stride;
            let follows = |other: &Op| {
                (other.to, other.destination.region, other.destination.offset)
                    == (op.to, op.destination.region, end)
            };
            if let Some(at) = ops.iter().position(follows) {
                let other = ops[at];
                if (op.rows, other.rows) == (1, 1) {
                    ops[index].row_bytes += other.row_bytes;
                    let row_bytes = u64::from(ops[index].row_bytes);
                    (ops[index].source.stride, ops[index].destination.stride) = (row_bytes, row_bytes);
                } else if other.row_bytes == op.row_bytes {
                    ops[index].rows += other.rows;
                }
                ops.remove(at);
            }
        }
    }
}

fn config() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(500);
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

fn choices() -> impl Strategy<Value = Vec<u32>> {
    proptest::collection::vec(any::<u32>(), 0..300)
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn plans_move_every_element_to_its_place(choices in choices()) {
        let manifest = scenario::manifest(&mut Choices::new(choices));
        let plan = plan(&manifest).unwrap();
        prop_assert_eq!(
            scenario::execute(&plan, &manifest, UNTOUCHED).map_err(TestCaseError::fail)?,
            scenario::expected(&manifest, UNTOUCHED),
            "{:#?}\n{:#?}", manifest, plan
        );
        let checked = plan.check(&manifest);
        prop_assert!(checked.is_ok(), "{:?}\n{:#?}\n{:#?}", checked, manifest, plan);

        let options = manifest.options;
        for op in plan.trainers.iter().flat_map(|part| &part.ops) {
            prop_assert!(op.bytes() <= options.chunk_bytes_max);
            if op.kind() == OpKind::Gather {
                prop_assert!(op.bytes() <= options.gather_chunk_bytes_max);
                prop_assert!(u64::from(op.row_bytes) < options.gather_row_bytes_max);
            }
        }
    }

    #[test]
    fn encodings_round_trip(choices in choices()) {
        let manifest = scenario::manifest(&mut Choices::new(choices));
        let plan = plan(&manifest).unwrap();
        let bytes = postcard::to_stdvec(&manifest).unwrap();
        prop_assert_eq!(&postcard::from_bytes::<xfer_plan::Manifest>(&bytes).unwrap(), &manifest);
        let text = serde_json::to_string(&manifest).unwrap();
        prop_assert_eq!(&serde_json::from_str::<xfer_plan::Manifest>(&text).unwrap(), &manifest);
        let bytes = postcard::to_stdvec(&plan).unwrap();
        prop_assert_eq!(&postcard::from_bytes::<Plan>(&bytes).unwrap(), &plan);
    }

    /// Damages one operation, or two. Whenever that changes what arrives, the check must see it, and in the
    /// operations themselves: a damaged plan could have been given a new digest and new sums.
    #[test]
    fn check_finds_damage(
        choices in choices(),
        damage in 0..14,
        which in any::<u32>(),
        by in 1u32..9,
        chunk_bytes_max in prop_oneof![Just(None), Just(Some(1 << 20))],
    ) {
        let mut manifest = scenario::manifest(&mut Choices::new(choices));
        manifest.options.chunk_bytes_max = chunk_bytes_max.unwrap_or(manifest.options.chunk_bytes_max);
        let good = plan(&manifest).unwrap();
        let mut bad = good.clone();
        let Some(part) = bad.trainers.iter_mut().max_by_key(|part| part.ops.len()) else { return Ok(()) };
        if part.ops.is_empty() {
            return Ok(());
        }
        let index = which as usize % part.ops.len();
        match damage {
            0 => _ = part.ops.remove(index),
            1 => part.ops.push(part.ops[index]),
            2..=4 => damage_two(&mut part.ops, index, damage),
            _ => damage_one(&mut part.ops[index], by, damage),
        }
        let arrives = std::panic::catch_unwind(|| scenario::execute(&bad, &manifest, UNTOUCHED));
        let harmless = matches!(arrives, Ok(Ok(memory)) if memory == scenario::expected(&manifest, UNTOUCHED));
        match bad.check(&manifest) {
            Ok(()) => prop_assert_eq!(bad, good),
            Err(
                CheckError::Digest { .. } | CheckError::Total { .. } | CheckError::Arrivals { .. } | CheckError::Bound,
            ) => prop_assert!(harmless, "only the sums or the digest betray the damage"),
            Err(_) => {}
        }
    }
}

/// The random transfers are worth something only while they reach what can go wrong.
#[test]
fn random_transfers_reach_every_kind_of_operation() {
    use proptest::strategy::ValueTree;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let (mut direct, mut gathered, mut by_rows, mut empty, mut shared) = (0, 0, 0, 0, 0);
    for _ in 0..300 {
        let tree = choices().new_tree(&mut runner).unwrap();
        let manifest = scenario::manifest(&mut Choices::new(tree.current()));
        let plan = plan(&manifest).unwrap();
        for op in plan.trainers.iter().flat_map(|part| &part.ops) {
            match op.kind() {
                OpKind::Direct => direct += 1,
                OpKind::Gather => gathered += 1,
                OpKind::Rows => by_rows += 1,
            }
        }
        let params = manifest.receivers.iter().flat_map(|receiver| &receiver.params);
        empty += params.filter(|param| param.bytes() == Some(0)).count();
        shared += plan.receivers.iter().filter(|part| part.arrivals.len() > 1).count();
    }
    println!("{direct} {gathered} {by_rows} {empty} {shared}");
    assert!([direct, gathered, by_rows, empty, shared].iter().all(|&count| count >= 50));
}

proptest! {
    #![proptest_config(config())]

    /// A manifest comes from peers. Whatever they send, the planner answers; and what it accepts, it plans
    /// right.
    #[test]
    fn hostile_manifests_do_no_harm(
        choices in choices(),
        damage in proptest::collection::vec((any::<u32>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = postcard::to_stdvec(&scenario::manifest(&mut Choices::new(choices))).unwrap();
        for (at, value) in damage {
            let at = at as usize % bytes.len();
            bytes[at] = value;
        }
        let Ok(manifest) = postcard::from_bytes::<xfer_plan::Manifest>(&bytes) else { return Ok(()) };
        if manifest.validate().is_err() {
            return Ok(());
        }
        // Large regions are legal; carrying them out here would only take long.
        let regions = manifest.trainers.iter().flat_map(|trainer| &trainer.regions);
        let memory: u64 = regions.chain(manifest.receivers.iter().flat_map(|receiver| &receiver.regions)).sum();
        if memory < 1 << 20 && let Ok(plan) = plan(&manifest) {
            prop_assert_eq!(plan.check(&manifest), Ok(()));
        }
    }
}
