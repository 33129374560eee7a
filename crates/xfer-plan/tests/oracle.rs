//! Random transfers, planned, carried out on byte arrays, and compared with an element-by-element evaluation.

mod scenario;

use proptest::prelude::*;
use scenario::Choices;
use xfer_plan::{
    CheckError, DType, Manifest, OpKind, Plan, Planner, Rank, ReceiverPart, ReceiverRank, TrainerRank,
    Transfer, Transform, plan,
};

const UNTOUCHED: u8 = 0xee;

fn damage_one(transfer: &mut Transfer, by: u64, damage: i32) {
    match damage {
        5 => transfer.source.offset += by,
        6 => transfer.source.offset = transfer.source.offset.wrapping_sub(by),
        7 => transfer.destination.offset += by,
        8 => transfer.row_bytes = transfer.row_bytes.saturating_sub(by),
        9 => transfer.rows = transfer.rows.saturating_sub(by as u32),
        10 => transfer.source.stride += by,
        11 => transfer.trainer.0 = by as u32 % 4,
        12 => transfer.row_bytes += by,
        13 => transfer.transform = Transform::Cast { from: DType::BF16, to: DType::F32 },
        _ => {
            // One long row instead of several: right at the start only.
            transfer.row_bytes *= u64::from(transfer.rows);
            transfer.rows = 1;
            (transfer.source.stride, transfer.destination.stride) = (transfer.row_bytes, transfer.row_bytes);
        }
    }
}

fn damage_two(transfers: &mut Vec<Transfer>, index: usize, damage: i32) {
    let it = transfers[index];
    let alike =
        |other: &&mut Transfer| (other.rows, other.row_bytes) == (it.rows, it.row_bytes) && **other != it;
    match damage {
        2 => {
            if let Some(other) = transfers.iter_mut().find(alike) {
                let source = std::mem::replace(&mut other.source, it.source);
                transfers[index].source = source;
            }
        }
        3 => {
            if let Some(other) = transfers.iter_mut().find(alike) {
                let destination = std::mem::replace(&mut other.destination, it.destination);
                transfers[index].destination = destination;
            }
        }
        _ => {
            // Goes on where another transfer should write, in its place.
            let stride = it.destination.stride;
            let end = it.destination.offset + u64::from(it.rows) * stride;
            let follows = |other: &Transfer| {
                (other.trainer, other.destination.region, other.destination.offset)
                    == (it.trainer, it.destination.region, end)
            };
            if let Some(at) = transfers.iter().position(follows) {
                let other = transfers[at];
                if (it.rows, other.rows) == (1, 1) {
                    transfers[index].row_bytes += other.row_bytes;
                    let row_bytes = transfers[index].row_bytes;
                    (transfers[index].source.stride, transfers[index].destination.stride) =
                        (row_bytes, row_bytes);
                } else if other.row_bytes == it.row_bytes {
                    transfers[index].rows += other.rows;
                }
                transfers.remove(at);
            }
        }
    }
}

proptest! {
    #![proptest_config(scenario::config(500))]

    #[test]
    fn plans_move_every_element_to_its_place(choices in scenario::choices()) {
        let manifest = scenario::manifest(&mut Choices::new(choices));
        let plan = plan(&manifest).unwrap();
        prop_assert_eq!(
            scenario::execute(&plan, &manifest, UNTOUCHED).map_err(TestCaseError::fail)?,
            scenario::expected(&manifest, UNTOUCHED),
            "{:#?}\n{:#?}", manifest, plan
        );
        let checked = plan.check(&manifest);
        prop_assert!(checked.is_ok(), "{:?}\n{:#?}\n{:#?}", checked, manifest, plan);

        // What receivers are said to pass on is what they do pass on.
        for (from, relay) in (0..).map(ReceiverRank).zip(plan.parts(&manifest).unwrap().receivers) {
            for (to, part) in (0..).map(ReceiverRank).zip(&plan.receivers) {
                let said = part.arrivals.iter().find(|arrival| arrival.from == Rank::Receiver(from));
                let passed_on = relay.plan.ops.iter().filter(|op| op.to == to);
                let (bytes, writes) =
                    passed_on.fold((0, 0), |(bytes, writes), op| (bytes + op.bytes(), writes + op.writes()));
                prop_assert_eq!((bytes, writes), said.map_or((0, 0), |said| (said.bytes, said.writes)));
            }
        }

        let options = manifest.options;
        for trainer in (0..plan.trainers.len() as u32).map(TrainerRank) {
            for op in plan.part(trainer, &manifest).unwrap().ops {
                prop_assert!(op.bytes() <= options.chunk_bytes_max);
                if op.kind() == OpKind::Gather {
                    prop_assert!(op.bytes() <= options.gather_chunk_bytes_max);
                    prop_assert!(u64::from(op.row_bytes) < options.gather_row_bytes_max);
                }
            }
        }
    }

    #[test]
    fn encodings_round_trip(choices in scenario::choices()) {
        let manifest = scenario::manifest(&mut Choices::new(choices));
        let plan = plan(&manifest).unwrap();
        let bytes = postcard::to_stdvec(&manifest).unwrap();
        prop_assert_eq!(&postcard::from_bytes::<xfer_plan::Manifest>(&bytes).unwrap(), &manifest);
        let text = serde_json::to_string(&manifest).unwrap();
        prop_assert_eq!(&serde_json::from_str::<xfer_plan::Manifest>(&text).unwrap(), &manifest);
        let bytes = postcard::to_stdvec(&plan).unwrap();
        prop_assert_eq!(&postcard::from_bytes::<Plan>(&bytes).unwrap(), &plan);
        let text = serde_json::to_string(&plan).unwrap();
        prop_assert_eq!(&serde_json::from_str::<Plan>(&text).unwrap(), &plan);
    }

    /// Receivers are lost, come back, join, and want something else, and now and then a trainer changes, again and again: what is
    /// planned with all that is known from before is what is planned from scratch, also where that fails.
    #[test]
    fn planning_again_is_planning_from_scratch(
        choices in scenario::choices(),
        changes in proptest::collection::vec((any::<u32>(), any::<u32>()), 1..8),
    ) {
        let mut manifest = scenario::manifest(&mut Choices::new(choices));
        let whole = manifest.clone();
        let mut planner = Planner::new();
        prop_assert_eq!(planner.plan(&manifest), plan(&manifest));
        for (change, which) in changes {
            change_something(&mut manifest, &whole, change, which as usize);
            let again = planner.plan(&manifest);
            prop_assert_eq!(&again, &plan(&manifest));
            if let Ok(again) = again {
                prop_assert_eq!(again.check(&manifest), Ok(()));
            }
        }
    }

    /// Damages one operation, or two. Whenever that changes what arrives, the check must see it, and in the
    /// operations themselves: a damaged plan could have been given a new digest and new sums.
    #[test]
    fn check_finds_damage(
        choices in scenario::choices(),
        damage in 0..16,
        which in any::<u32>(),
        by in 1u64..9,
        chunk_bytes_max in prop_oneof![Just(None), Just(Some(1 << 20))],
    ) {
        let mut manifest = scenario::manifest(&mut Choices::new(choices));
        manifest.options.chunk_bytes_max = chunk_bytes_max.unwrap_or(manifest.options.chunk_bytes_max);
        let good = plan(&manifest).unwrap();
        let mut bad = good.clone();
        let Some(fill) = bad.fills.iter_mut().max_by_key(|fill| fill.transfers.len()) else { return Ok(()) };
        let mut transfers = fill.transfers.to_vec();
        let index = which as usize % transfers.len();
        match damage {
            0 => _ = transfers.remove(index),
            1 => transfers.push(transfers[index]),
            2..=4 => damage_two(&mut transfers, index, damage),
            14 => fill.to.0 = by as u32 % 4,
            _ => damage_one(&mut transfers[index], by, damage),
        }
        fill.transfers = transfers.into();
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

/// Changes one rank of a job that was `whole` once.
fn change_something(manifest: &mut Manifest, whole: &Manifest, change: u32, which: usize) {
    let (trainers, receivers) = (&mut manifest.trainers, &mut manifest.receivers);
    let (trainer, receiver) = (which % trainers.len().max(1), which % receivers.len().max(1));
    match change % 12 {
        // Lost: it keeps its number, has nothing and needs nothing.
        0..3 if !receivers.is_empty() => receivers[receiver].params.clear(),
        3..5 => receivers.iter_mut().for_each(|receiver| receiver.params.clear()),
        // Back, all who were lost and all who were never there.
        5..8 => receivers.clone_from(&whole.receivers),
        8 if !receivers.is_empty() => {
            let mut other = receivers[receiver].clone();
            other.host.push('x');
            other.params.pop();
            receivers.push(other);
        }
        9 if !receivers.is_empty() => {
            let last = receivers.len() - 1;
            receivers.swap(receiver, last);
        }
        10 if !trainers.is_empty() => trainers[trainer].pieces.clear(),
        11 if !trainers.is_empty() => trainers.clone_from(&whole.trainers),
        _ => {}
    }
}

/// The random transfers are worth something only while they reach what can go wrong.
#[test]
fn random_transfers_reach_every_kind_of_operation() {
    use proptest::strategy::ValueTree;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let (mut direct, mut gathered, mut by_rows, mut empty, mut shared) = (0, 0, 0, 0, 0);
    let (mut cast, mut quantised, mut scales, mut exchanged, mut relayed) = (0, 0, 0, 0, 0);
    for _ in 0..1000 {
        let tree = scenario::choices().new_tree(&mut runner).unwrap();
        let manifest = scenario::manifest(&mut Choices::new(tree.current()));
        let plan = plan(&manifest).unwrap();
        for trainer in (0..plan.trainers.len() as u32).map(TrainerRank) {
            for op in plan.part(trainer, &manifest).unwrap().ops {
                match (op.kind(), op.transform) {
                    (OpKind::Direct, _) => direct += 1,
                    (OpKind::Gather, _) => gathered += 1,
                    (OpKind::Rows, _) => by_rows += 1,
                    (_, Transform::Cast { .. }) => cast += 1,
                    (_, Transform::Quantize { .. }) => quantised += 1,
                    (_, Transform::Scales { .. }) => scales += 1,
                    (OpKind::Transform, Transform::Copy) => panic!("a copy is no transform"),
                }
            }
        }
        exchanged += plan.tables.iter().map(|table| table.exchanges.len()).sum::<usize>();
        let onward = |part: &ReceiverPart| part.arrivals.iter().any(|a| matches!(a.from, Rank::Receiver(_)));
        relayed += plan.receivers.iter().filter(|part| onward(part)).count();
        let params = manifest.receivers.iter().flat_map(|receiver| &receiver.params);
        empty += params.filter(|param| param.bytes() == Some(0)).count();
        shared += plan.receivers.iter().filter(|part| part.arrivals.len() > 1).count();
    }
    let counts = [direct, gathered, by_rows, empty, shared, cast, quantised, scales, exchanged, relayed];
    assert!(counts.iter().all(|&count| count >= 50), "{counts:?}");
}

proptest! {
    #![proptest_config(scenario::config(500))]

    /// A manifest comes from peers. Whatever they send, the planner answers; and what it accepts, it plans
    /// right.
    #[test]
    fn hostile_manifests_do_no_harm(
        choices in scenario::choices(),
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
