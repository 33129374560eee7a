//! Reports, explanations and differences of plans, compared with plain sums over operations, legs and elements.

#[allow(dead_code)] // a part of it is for other tests
mod scenario;

use std::collections::{BTreeMap, BTreeSet};

use expect_test::expect;
use proptest::prelude::*;
use scenario::{Choices, elements};
use xfer_plan::model::{InferLayout, Machine, ModelSpec, TrainLayout};
use xfer_plan::report::{Distribution, Nics, PlanReport};
use xfer_plan::{
    BlockQuant, CostModel, DType, DestinationParam, ExplainError, ExplainedBox, Group, Link, Loads, Manifest,
    ParamMap, Placed, Plan, PlanOptions, RailDecl, Rank, ReceiverManifest, ReceiverRank, RegionIndex, Relay,
    SourcePiece, TensorBox, TrainerManifest, TrainerRank, Transform, Why, diff, explain, plan,
};

/// Bytes by rank and rail.
type ByNic = Vec<Vec<u64>>;

/// What `group` does with a transfer after the trainer has written it to `entry`.
fn onward(group: &Group, lane: u16, entry: ReceiverRank) -> Vec<xfer_plan::Leg> {
    let mut has = BTreeSet::from([entry]);
    let legs = group.legs(TrainerRank(0), lane);
    legs.filter(|leg| matches!(leg.from, Rank::Receiver(from) if has.contains(&from)) && has.insert(leg.to))
        .collect()
}

/// Everything that moves, one operation and one leg at a time.
struct Counted {
    trainers_out: ByNic,
    receivers_in: ByNic,
    receivers_out: ByNic,
    from_trainers: BTreeMap<(usize, usize), u64>,
    over_nics: BTreeMap<(usize, usize), u64>,
    over_nvlink: BTreeMap<(usize, usize), u64>,
    operations: u64,
    /// By trainer, the bytes of each wave.
    waves: Vec<Vec<u64>>,
}

fn count(plan: &Plan, manifest: &Manifest) -> Counted {
    let silent = |rails: &[RailDecl]| vec![0; rails.len()];
    let receivers: ByNic = manifest.receivers.iter().map(|rank| silent(&rank.rails)).collect();
    let mut counted = Counted {
        trainers_out: manifest.trainers.iter().map(|rank| silent(&rank.rails)).collect(),
        receivers_in: receivers.clone(),
        receivers_out: receivers,
        from_trainers: BTreeMap::new(),
        over_nics: BTreeMap::new(),
        over_nvlink: BTreeMap::new(),
        operations: 0,
        waves: Vec::new(),
    };
    for rank in 0..plan.trainers.len() {
        // Which transfer writes a byte of a receiver.
        let mut writes: BTreeMap<(ReceiverRank, RegionIndex, u64), (u64, Placed<'_>)> = BTreeMap::new();
        for placed in plan.transfers_of(TrainerRank(rank as u32)) {
            let transfer = placed.transfer;
            for member in plan.group(placed.to).unwrap().members() {
                for row in 0..u64::from(transfer.rows) {
                    let start = transfer.destination.offset + row * transfer.destination.stride;
                    let key = (member, transfer.destination.region, start);
                    writes.insert(key, (start + transfer.row_bytes, placed));
                }
            }
        }
        let mut waves: Vec<u64> = Vec::new();
        for op in plan.part(TrainerRank(rank as u32), manifest).unwrap().ops {
            counted.operations += 1;
            waves.resize(op.wave as usize + 1, 0);
            waves[op.wave as usize] += op.staged_bytes();
            counted.trainers_out[rank][usize::from(op.rail)] += op.bytes();
            *counted.from_trainers.entry((rank, op.to.index())).or_default() += op.bytes();
            let arrive = |at: ReceiverRank, nics: &mut ByNic| {
                let rails = nics[at.index()].len();
                let ours = manifest.trainers[rank].rails.len();
                nics[at.index()][(rank * ours + usize::from(op.rail)) % rails] += op.bytes();
            };
            arrive(op.to, &mut counted.receivers_in);
            let at = (op.to, op.destination.region, op.destination.offset);
            let (_, (end, placed)) = writes.range(..=at).next_back().unwrap();
            assert!(op.destination.offset < *end, "an operation without a transfer: {op:?}");
            for leg in onward(plan.group(placed.to).unwrap(), placed.lane, op.to) {
                let Rank::Receiver(from) = leg.from else { panic!("a trainer passes on") };
                let pair = (from.index(), leg.to.index());
                if leg.link == Link::Nic {
                    arrive(from, &mut counted.receivers_out);
                    arrive(leg.to, &mut counted.receivers_in);
                    *counted.over_nics.entry(pair).or_default() += op.bytes();
                } else {
                    *counted.over_nvlink.entry(pair).or_default() += op.bytes();
                }
            }
        }
        counted.waves.push(waves);
    }
    counted
}

fn distribution(bytes: &[u64]) -> Distribution {
    let mut sorted = bytes.to_vec();
    sorted.sort_unstable();
    let (n, sum) = (sorted.len(), sorted.iter().sum::<u64>());
    let mean = sum as f64 / n as f64;
    Distribution {
        count: n as u64,
        min: sorted[0],
        median: if n % 2 == 1 { sorted[n / 2] } else { (sorted[n / 2 - 1] + sorted[n / 2]) / 2 },
        max: sorted[n - 1],
        mean: sum / n as u64,
        imbalance: (sum > 0).then(|| sorted[n - 1] as f64 / mean),
    }
}

fn nics_are(found: &Nics, by_nic: &ByNic) -> Result<(), TestCaseError> {
    let flat: Vec<u64> = by_nic.iter().flatten().copied().collect();
    let means: Vec<u64> =
        by_nic.iter().map(|of_rank| of_rank.iter().sum::<u64>() / of_rank.len() as u64).collect();
    for (found, expected) in [(found.nics, distribution(&flat)), (found.ranks, distribution(&means))] {
        let (a, b) = (found.imbalance.unwrap_or(0.0), expected.imbalance.unwrap_or(0.0));
        prop_assert!((a - b).abs() < 1e-9, "{a} is not {b}");
        let without = |of: Distribution| Distribution { imbalance: None, ..of };
        prop_assert_eq!(without(found), without(expected));
    }
    prop_assert_eq!(found.nics_per_bar, 1);
    let bars = found.bars.iter().map(|bar| (bar.rank as usize, bar.rail as usize, bar.bytes, bar.max_bytes));
    let each = by_nic.iter().enumerate().flat_map(|(rank, of_rank)| {
        of_rank.iter().enumerate().map(move |(rail, &bytes)| (rank, rail, bytes, bytes))
    });
    prop_assert_eq!(bars.collect::<Vec<_>>(), each.collect::<Vec<_>>());
    Ok(())
}

fn cells_are(cells: &[Vec<u64>], counted: &BTreeMap<(usize, usize), u64>) -> Result<(), TestCaseError> {
    let mut found = BTreeMap::new();
    for (from, row) in cells.iter().enumerate() {
        found.extend(row.iter().enumerate().filter(|(_, b)| **b > 0).map(|(to, &bytes)| ((from, to), bytes)));
    }
    prop_assert_eq!(&found, counted);
    Ok(())
}

fn nanoseconds(amount: u64, per_second: u64) -> u64 {
    u64::try_from((u128::from(amount) * 1_000_000_000).div_ceil(per_second.into())).unwrap()
}

/// The longest time of any resource of any rank.
fn longest(loads: &Loads, manifest: &Manifest) -> u64 {
    let cost: CostModel = manifest.options.cost;
    let CostModel { post_nanoseconds, nvlink_bytes_per_second, transform_bytes_per_second, .. } = cost;
    let rate = |rails: &[RailDecl]| rails.iter().map(|rail| rail.bytes_per_second).sum();
    let mut times = vec![0];
    for (load, rank) in loads.trainers.iter().zip(&manifest.trainers) {
        times.push(nanoseconds(load.nic_out_bytes, rate(&rank.rails)));
        times.push(nanoseconds(load.transform_bytes, transform_bytes_per_second));
        times.push(load.writes * post_nanoseconds);
        let touched = load.nic_out_bytes + 2 * load.transform_bytes;
        times.push(nanoseconds(touched, cost.hbm_bytes_per_second));
        let copied = if cost.offloaded { load.source_bytes } else { 0 };
        times.push(nanoseconds(copied, cost.copy_engine_bytes_per_second));
    }
    for (load, rank) in loads.receivers.iter().zip(&manifest.receivers) {
        times.push(nanoseconds(load.nic_in_bytes, rate(&rank.rails)));
        times.push(nanoseconds(load.nic_out_bytes, rate(&rank.rails)));
        times.push(nanoseconds(load.nvlink_in_bytes, nvlink_bytes_per_second));
        times.push(nanoseconds(load.nvlink_out_bytes, nvlink_bytes_per_second));
        let (into, out) =
            (load.nic_in_bytes + load.nvlink_in_bytes, load.nic_out_bytes + load.nvlink_out_bytes);
        times.push(nanoseconds(into + out, cost.hbm_bytes_per_second));
    }
    times.into_iter().max().unwrap()
}

/// The plan without what is sent after this priority.
fn until(plan: &Plan, priority: u32) -> Plan {
    let mut early = plan.clone();
    for fill in &mut early.fills {
        if plan.params[fill.param.index()].priority > priority {
            fill.transfers = Vec::new().into();
        }
    }
    early
}

/// Where an element lies in a row-major box.
fn place_in(bounds: &TensorBox, at: &[u64]) -> u64 {
    let dims = at.iter().zip(bounds.start().zip(bounds.len()));
    dims.fold(0, |place, (index, (start, len))| place * len + (index - start))
}

/// Every index of a box.
fn indices(bounds: &TensorBox) -> Vec<Vec<u64>> {
    let mut all = vec![Vec::new()];
    for (start, len) in bounds.start().zip(bounds.len()) {
        let longer = |at: Vec<u64>| (start..start + len).map(move |index| [at.as_slice(), &[index]].concat());
        all = all.into_iter().flat_map(longer).collect();
    }
    all
}

/// What can be said about a box without knowing the parameter's map.
fn box_is_true(
    it: &ExplainedBox,
    trainer: TrainerRank,
    transform: Transform,
    plan: &Plan,
    manifest: &Manifest,
    source_region: RegionIndex,
) -> Result<(), TestCaseError> {
    prop_assert_eq!(it.bounds.shape(), it.result.shape());
    let start: Vec<u64> = it.bounds.start().collect();
    if let Transform::Scales { quant, .. } = transform {
        let table = &plan.tables[source_region.index()];
        prop_assert_eq!(&table.tensor, &it.tensor);
        let whole = TensorBox::whole(&quant.scales_shape(&table.shape).unwrap()).unwrap();
        prop_assert_eq!(it.source_offset, place_in(&whole, &start) * quant.scales.dtype().bytes());
        let of_scales = matches!(it.why, Why::HasBlocks | Why::OwnsBlocks { .. });
        prop_assert!(of_scales);
        return Ok(());
    }
    let lies_there = |piece: &SourcePiece| {
        piece.tensor == it.tensor
            && piece.region == source_region
            && piece.bounds.contains(&TensorBox::new(&start, &vec![1; start.len()]).unwrap())
            && piece.offset + place_in(&piece.bounds, &start) * piece.dtype.bytes() == it.source_offset
    };
    prop_assert!(manifest.trainers[trainer.index()].pieces.iter().any(lies_there), "{it:?}");
    // How often each trainer has an element: pieces of one trainer may overlap.
    let times = |rank: &TrainerManifest, at: &[u64]| {
        let one = TensorBox::new(at, &vec![1; at.len()]).unwrap();
        rank.pieces.iter().filter(|piece| piece.tensor == it.tensor && piece.bounds.contains(&one)).count()
    };
    let all = indices(&it.bounds);
    let each = manifest.trainers.iter().map(|rank| all.iter().map(|at| times(rank, at)).collect::<Vec<_>>());
    let each: Vec<Vec<usize>> = each.collect();
    let holders = each.iter().filter(|times| times.iter().all(|times| *times > 0)).count();
    let said = match it.why {
        Why::SoleHolder => 1,
        Why::LeastLoaded { holders } => holders as usize,
        _ => 0,
    };
    if each.iter().flatten().all(|times| *times <= 1) {
        prop_assert_eq!(said, holders, "{:?}", it);
    } else {
        prop_assert!(said >= holders, "{holders} hold it: {it:?}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(scenario::config(300))]

    #[test]
    fn sums_are_those_of_operations_and_legs(choices in scenario::choices()) {
        let manifest = scenario::manifest(&mut Choices::new(choices));
        let plan = plan(&manifest).unwrap();
        let report = PlanReport::new(&plan, &manifest).unwrap();
        let counted = count(&plan, &manifest);
        nics_are(&report.trainers.sends, &counted.trainers_out)?;
        nics_are(&report.receivers.receives, &counted.receivers_in)?;
        nics_are(&report.receivers.passes_on, &counted.receivers_out)?;
        cells_are(&report.flows.from_trainers, &counted.from_trainers)?;
        cells_are(&report.flows.over_nics, &counted.over_nics)?;
        cells_are(&report.flows.over_nvlink, &counted.over_nvlink)?;

        let payload = report.payload;
        prop_assert_eq!(payload.trainer_nic_bytes, counted.from_trainers.values().sum::<u64>());
        prop_assert_eq!(payload.receiver_nic_bytes, counted.over_nics.values().sum::<u64>());
        prop_assert_eq!(payload.nvlink_bytes, counted.over_nvlink.values().sum::<u64>());
        let arrived = payload.trainer_nic_bytes + payload.receiver_nic_bytes + payload.nvlink_bytes;
        prop_assert_eq!(payload.arrives_bytes, arrived);
        prop_assert_eq!(report.routes.iter().map(|of| of.bytes * of.members).sum::<u64>(), arrived);
        prop_assert_eq!(report.routes.iter().map(|of| of.bytes * of.copies).sum::<u64>(), payload.trainer_nic_bytes);
        prop_assert_eq!(report.routes.iter().map(|of| of.transfers).sum::<u64>(), report.counts.transfers);
        prop_assert_eq!(report.counts.operations, counted.operations);
        prop_assert_eq!(report.counts.trainer_writes, plan.trainers.iter().map(|part| part.writes).sum::<u64>());

        let staged: Vec<u64> = counted.waves.iter().map(|waves| waves.iter().sum()).collect();
        let most = staged.iter().copied().max().unwrap_or(0);
        prop_assert_eq!(report.staging.push_bytes, most);
        if let Some(trainer) = report.staging.trainer {
            prop_assert_eq!(trainer.index(), staged.iter().position(|bytes| *bytes == most).unwrap());
            let waves = &counted.waves[trainer.index()];
            prop_assert_eq!(report.staging.waves as usize, waves.len());
            prop_assert_eq!(report.staging.largest_wave_bytes, *waves.iter().max().unwrap());
        }
    }

    #[test]
    fn times_are_those_of_the_cost_model(choices in scenario::choices()) {
        let mut choices = Choices::new(choices);
        let mut manifest = scenario::manifest(&mut choices);
        // Slow enough for any of them to limit.
        manifest.options.cost.nvlink_bytes_per_second = 1 + choices.below(8);
        manifest.options.cost.transform_bytes_per_second = 1 + choices.below(8);
        manifest.options.cost.post_nanoseconds = choices.below(3) * 10_000_000_000;
        manifest.options.cost.hbm_bytes_per_second = 1 + choices.below(16);
        manifest.options.cost.copy_engine_bytes_per_second = 1 + choices.below(8);
        manifest.options.cost.offloaded = choices.below(2) == 1;
        let plan = plan(&manifest).unwrap();
        let report = PlanReport::new(&plan, &manifest).unwrap();
        let busiest = report.busiest.first();
        prop_assert_eq!(busiest.map(|busy| (busy.rank, busy.resource)), plan.predicted.limited_by);
        prop_assert_eq!(busiest.map_or(0, |busy| busy.nanoseconds), plan.predicted.busiest_nanoseconds);
        prop_assert!(report.busiest.is_sorted_by_key(|busy| std::cmp::Reverse(busy.nanoseconds)));
        prop_assert!(report.busiest.len() <= 5);

        let after = plan.predicted.nanoseconds - plan.predicted.busiest_nanoseconds;
        let priorities: BTreeSet<u32> = plan.params.iter().map(|param| param.priority).collect();
        let steps = &report.timeline;
        prop_assert_eq!(steps.iter().map(|step| step.first_priority).collect::<Vec<_>>(), Vec::from_iter(priorities));
        let mut arrived = 0;
        for step in steps {
            prop_assert_eq!(step.first_priority, step.last_priority);
            let early = until(&plan, step.last_priority);
            let loads = early.loads(&manifest.options);
            let busiest = longest(&loads, &manifest);
            prop_assert_eq!(step.nanoseconds, if busiest > 0 { busiest + after } else { 0 });
            prop_assert_eq!(step.limited_by.is_some(), busiest > 0);
            arrived += step.bytes;
            let expected = loads.receivers.iter().map(|load| load.nic_in_bytes + load.nvlink_in_bytes).sum::<u64>();
            prop_assert_eq!(arrived, expected);
        }
        prop_assert_eq!(steps.last().map_or(0, |step| step.nanoseconds), plan.predicted.nanoseconds);
    }

    #[test]
    fn each_element_is_explained_once(choices in scenario::choices()) {
        let manifest = scenario::manifest(&mut Choices::new(choices));
        let plan = plan(&manifest).unwrap();
        for (rank, receiver) in (0..).map(ReceiverRank).zip(&manifest.receivers) {
            let mut explained_bytes = 0;
            for param in &receiver.params {
                let explanation = match explain(&plan, &manifest, &param.name, Some(rank)) {
                    Err(ExplainError::NotThere { .. }) => continue, // only padding, or nothing at all
                    explanation => explanation.unwrap(),
                };
                let mut seen = vec![false; elements(&param.shape) as usize];
                let mut of_tensors: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
                for transfer in &explanation.transfers {
                    prop_assert!(explanation.groups[&transfer.group].members().any(|member| member == rank));
                    prop_assert!(!transfer.carries_more);
                    for it in &transfer.boxes {
                        box_is_true(it, transfer.trainer, transfer.transform, &plan, &manifest, transfer.source.region)?;
                        of_tensors.entry(&it.tensor).or_default().insert(format!("{} {it:?}", transfer.trainer));
                        // Elements of a box are not side by side in the parameter: follow its rows, which are.
                        let shape = shape_of(&param.map, &manifest);
                        let whole = TensorBox::whole(&shape).unwrap();
                        for at in indices(&it.result) {
                            let place = place_in(&whole, &at);
                            prop_assert!(!std::mem::replace(&mut seen[place as usize], true), "twice: {it:?}");
                            explained_bytes += param.dtype.bytes();
                        }
                        let first = place_in(&whole, &it.result.start().collect::<Vec<_>>());
                        prop_assert_eq!(it.destination_offset, param.offset + first * param.dtype.bytes());
                    }
                }
                prop_assert!(!explanation.to_string().is_empty());
                // Asked for by its tensors, the parameter is explained by the same boxes.
                for (tensor, boxes) in of_tensors {
                    let explanation = explain(&plan, &manifest, tensor, Some(rank)).unwrap();
                    let here = explanation.transfers.iter().filter(|transfer| transfer.param == param.name);
                    let found: BTreeSet<String> = here
                        .flat_map(|transfer| transfer.boxes.iter().map(|it| format!("{} {it:?}", transfer.trainer)))
                        .collect();
                    prop_assert_eq!(found, boxes);
                }
            }
            prop_assert_eq!(explained_bytes, plan.receivers[rank.index()].bytes);
        }
    }

    #[test]
    fn differences_add_up(choices in scenario::choices(), other in scenario::choices(), relay in 0..4usize) {
        let manifest = scenario::manifest(&mut Choices::new(choices));
        let a = plan(&manifest).unwrap();
        prop_assert!(a.is_intact());
        prop_assert!(diff(&a, &a).equal);
        let mut options = manifest.options;
        options.relay = [Relay::Never, Relay::PerHost, Relay::Chain, Relay::Auto][relay];
        let receivers = manifest.receivers.iter().take(2).cloned().collect();
        let others = [
            Manifest { options, ..manifest.clone() },
            Manifest { receivers, ..manifest.clone() },
            scenario::manifest(&mut Choices::new(other)),
        ];
        for other in others {
            let b = plan(&other).unwrap();
            let found = diff(&a, &b);
            prop_assert_eq!(found.equal, a == b);
            let transfers = |plan: &Plan| plan.transfers().count() as u64;
            prop_assert_eq!(found.common_transfers + found.transfers.a.transfers, transfers(&a));
            prop_assert_eq!(found.common_transfers + found.transfers.b.transfers, transfers(&b));
            let sum = |of: &dyn Fn(&xfer_plan::ParamDiff) -> u64| found.params.iter().map(of).sum::<u64>();
            prop_assert_eq!(sum(&|param| param.transfers.a.bytes), found.transfers.a.bytes);
            prop_assert_eq!(sum(&|param| param.transfers.b.transfers), found.transfers.b.transfers);
            let sum = |of: &dyn Fn(&xfer_plan::TrainerDiff) -> u64| found.by_trainer.iter().map(of).sum::<u64>();
            prop_assert_eq!(sum(&|of| of.transfers.b.bytes), found.transfers.b.bytes);
            prop_assert_eq!(sum(&|of| of.transfers.a.transfers), found.transfers.a.transfers);
            let least = found.transfers.a.transfers.min(found.transfers.b.transfers);
            prop_assert!(found.redirected_transfers <= least);
            // What is only in one plan is what its sums have more.
            let changed = i128::from(found.trainer_bytes.b) - i128::from(found.trainer_bytes.a);
            prop_assert_eq!(changed, i128::from(found.transfers.b.bytes) - i128::from(found.transfers.a.bytes));
            prop_assert!(!found.to_string().is_empty());
            let back = diff(&b, &a);
            prop_assert_eq!(back.common_transfers, found.common_transfers);
            prop_assert_eq!((back.transfers.a, back.transfers.b), (found.transfers.b, found.transfers.a));
            prop_assert_eq!((back.groups.a, back.groups.b), (found.groups.b, found.groups.a));
        }
    }
}

/// The shape in which a map's boxes are: that of what it views, where it is a view.
fn shape_of(map: &ParamMap, manifest: &Manifest) -> Vec<u64> {
    let map = if let ParamMap::View { of, .. } = map { of } else { map };
    let pieces = || manifest.trainers.iter().flat_map(|trainer| &trainer.pieces);
    map.shape(|name| pieces().find(|piece| piece.tensor == name).map(|piece| piece.shape.clone())).unwrap()
}

/// `trainers` ranks with one row each of `w`, which all receivers want: two on each host.
fn rows(trainers: u64, receivers: u64, relay: Relay) -> Manifest {
    let rails = vec![RailDecl { bytes_per_second: 1000 }; 2];
    let shape = vec![trainers, 100];
    let trainer = |rank: u64| TrainerManifest {
        host: format!("t{}", rank / 2),
        regions: vec![100],
        rails: rails.clone(),
        pieces: vec![SourcePiece {
            tensor: "layers.0.w".into(),
            dtype: DType::U8,
            shape: shape.clone(),
            bounds: TensorBox::new(&[rank, 0], &[1, 100]).unwrap(),
            region: RegionIndex(0),
            offset: 0,
        }],
    };
    let param = DestinationParam {
        name: "layers.0.fused".into(),
        dtype: DType::U8,
        shape: shape.clone(),
        region: RegionIndex(0),
        offset: 0,
        map: ParamMap::tensor("layers.0.w").into(),
        priority: 0,
    };
    let receiver = |rank: u64| ReceiverManifest {
        host: format!("r{}", rank / 2),
        regions: vec![100 * trainers],
        rails: rails.clone(),
        params: vec![param.clone()],
    };
    let options = PlanOptions { relay, ..PlanOptions::default() };
    Manifest {
        trainers: (0..trainers).map(trainer).collect(),
        receivers: (0..receivers).map(receiver).collect(),
        options,
    }
}

#[test]
fn many_ranks_share_cells_and_bars() {
    let manifest = rows(700, 300, Relay::Chain);
    let plan = plan(&manifest).unwrap();
    let report = PlanReport::new(&plan, &manifest).unwrap();
    let flows = &report.flows;
    assert_eq!((flows.trainers_per_cell, flows.receivers_per_cell), (6, 3));
    assert_eq!((flows.from_trainers.len(), flows.from_trainers[0].len()), (117, 100));
    let sum = |cells: &[Vec<u64>]| cells.iter().flatten().sum::<u64>();
    assert_eq!(sum(&flows.from_trainers), 70_000);
    assert_eq!(sum(&flows.over_nics), 70_000 * 149);
    assert_eq!(sum(&flows.over_nvlink), 70_000 * 150);
    assert_eq!(report.trainers.sends.nics_per_bar, 2);
    assert_eq!(report.trainers.sends.bars.len(), 700);
    assert!(report.trainers.sends.bars.iter().all(|bar| (bar.bytes, bar.max_bytes) == (100, 100)));
    assert_eq!(report.trainers.hosts.len(), 350);
    assert_eq!((report.trainers.hosts[1].first, report.trainers.hosts[1].ranks), (2, 2));
    assert_eq!(report.timeline[0].names, "layers.0.fused");
}

#[test]
fn very_many_priorities_share_steps() {
    let mut manifest = rows(1, 1, Relay::Never);
    let param = manifest.receivers[0].params[0].clone();
    manifest.receivers[0].regions = vec![100_000];
    manifest.receivers[0].params = (0..1000)
        .map(|number| DestinationParam {
            name: format!("layers.{number}.fused"),
            offset: 100 * u64::from(number),
            priority: 2 * number,
            ..param.clone()
        })
        .collect();
    let plan = plan(&manifest).unwrap();
    let steps = PlanReport::new(&plan, &manifest).unwrap().timeline;
    assert_eq!(steps.len(), 250);
    assert_eq!((steps[1].first_priority, steps[1].last_priority, steps[1].params), (8, 14, 4));
    assert!(steps.iter().all(|step| step.bytes == 400 && step.names == "layers"));
    assert_eq!(steps[249].nanoseconds, plan.predicted.nanoseconds);
}

#[test]
fn nics_of_both_sides_are_even() {
    let (model, machine) = (ModelSpec::preset("qwen3-0.6b").unwrap(), Machine::default());
    let train: TrainLayout = "fsdp=4".parse().unwrap();
    let infer: InferLayout = "tp=2".parse().unwrap();
    for relay in [Relay::Never, Relay::PerHost] {
        let manifest = Manifest {
            trainers: train.trainers(&model, &machine).unwrap(),
            receivers: infer.receivers(&model, &machine).unwrap(),
            options: PlanOptions { relay, ..PlanOptions::default() },
        };
        let report = PlanReport::new(&plan(&manifest).unwrap(), &manifest).unwrap();
        let nics = [report.trainers.sends.nics, report.receivers.receives.nics];
        assert_eq!(nics.map(|nics| nics.count), [16, 8]);
        assert!(nics.iter().all(|nics| nics.imbalance.unwrap() < 1.02), "{relay:?}: {nics:?}");
    }
}

#[test]
fn reasons_are_given() {
    let said = |manifest: &Manifest, name: &str, rank| {
        let plan = plan(manifest).unwrap();
        explain(&plan, manifest, name, rank).map(|explanation| explanation.to_string())
    };
    let mut manifest = rows(2, 3, Relay::Never);
    expect![[r#"
        `layers.0.w` is a source tensor: 2 transfer(s) bring it to inference 2
        trainer 0 (t0) sends 100 B of `layers.0.fused`
          [0..1, 0..100] of `layers.0.w` at [0..1, 0..100]: nobody else has all of it
          1 row(s) of 100 bytes, from region 0 + 0 to region 0 + 0: as they are
          to inference 0-2, written to each; 1 operation(s) a copy, the first copy on rail 0
        trainer 1 (t0) sends 100 B of `layers.0.fused`
          [1..2, 0..100] of `layers.0.w` at [1..2, 0..100]: nobody else has all of it
          1 row(s) of 100 bytes, from region 0 + 0 to region 0 + 100: as they are
          to inference 0-2, written to each; 1 operation(s) a copy, the first copy on rail 1
    "#]]
    .assert_eq(&said(&manifest, "layers.0.w", Some(ReceiverRank(2))).unwrap());
    manifest.options.relay = Relay::PerHost;
    // A replica of the first row, and both rows quantised in one block.
    let piece = manifest.trainers[0].pieces[0].clone();
    manifest.trainers.push(TrainerManifest { pieces: vec![piece], ..manifest.trainers[0].clone() });
    for trainer in &mut manifest.trainers {
        trainer.regions = vec![200];
        trainer.pieces.iter_mut().for_each(|piece| piece.dtype = DType::BF16);
    }
    for receiver in &mut manifest.receivers {
        let w = ParamMap::tensor("layers.0.w");
        let param = receiver.params[0].clone();
        let quant = BlockQuant::default();
        receiver.regions = vec![300];
        receiver.params = vec![
            DestinationParam { dtype: DType::F8E4M3, map: w.clone().quantize(quant).into(), ..param.clone() },
            DestinationParam {
                name: "layers.0.fused_scale_inv".into(),
                dtype: DType::F32,
                shape: vec![1, 1],
                offset: 256,
                map: w.scales(quant).into(),
                ..param
            },
        ];
    }
    expect![[r#"
        `layers.0.w` is a source tensor: 3 transfer(s) bring it to all who want it
        trainer 1 (t0) sends 100 B of `layers.0.fused`
          [1..2, 0..100] of `layers.0.w` at [1..2, 0..100]: nobody else has all of it
          1 row(s) of 100 bytes, from region 0 + 0 to region 0 + 100: quantised from BF16 in blocks of 128 x 128
          to inference 0-2, written to inference 0, 2, passed on within hosts; 1 operation(s) a copy, the first copy on rail 1
        trainer 2 (t0) sends 100 B of `layers.0.fused`
          [0..1, 0..100] of `layers.0.w` at [0..1, 0..100]: one of 2 that have it, and the one with least to send when it was dealt
          1 row(s) of 100 bytes, from region 0 + 0 to region 0 + 0: quantised from BF16 in blocks of 128 x 128
          to inference 0-2, written to inference 1-2, passed on within hosts; 1 operation(s) a copy, the first copy on rail 1
        trainer 0 (t0) sends 4 B of `layers.0.fused_scale_inv`
          scales of [0..1, 0..1] of `layers.0.w` at [0..1, 0..1]: shard borders cut these blocks between 2 trainers, and it collects their largest magnitudes
          1 row(s) of 4 bytes, from table 0 + 0 to region 0 + 256: as F32
          to inference 0-2, written to inference 1-2, passed on within hosts; 1 operation(s) a copy, the first copy on rail 1
    "#]].assert_eq(&said(&manifest, "layers.0.w", None).unwrap());
    let refused = |name: &str, rank| said(&manifest, name, rank).unwrap_err().to_string();
    expect!["no tensor and no parameter is called `layers.0.fusd`; near it are `layers.0.fused`, `layers.0.w`, `layers.0.fused_scale_inv`"].assert_eq(&refused("layers.0.fusd", None));
    expect!["no tensor and no parameter is called `?`"].assert_eq(&refused("?", None));
    expect!["there is no inference 3: the plan has 3 inference rank(s), counted from 0"]
        .assert_eq(&refused("layers.0.w", Some(ReceiverRank(3))));
    let plan = plan(&manifest).unwrap();
    let other = rows(3, 3, Relay::Never);
    let error = explain(&plan, &other, "layers.0.fused", None);
    assert!(matches!(error, Err(ExplainError::OtherManifest { .. })), "{error:?}");
}

/// One trainer with tensors `a` and `b`, [1, 100] each, one behind the other; one receiver with one parameter.
fn beside_each_other(dtype: DType, shape: &[u64], map: ParamMap) -> Manifest {
    let mut manifest = rows(1, 1, Relay::Never);
    let trainer = &mut manifest.trainers[0];
    trainer.regions = vec![400];
    let piece = trainer.pieces.remove(0);
    for (name, offset) in [("a", 0), ("b", 200)] {
        trainer.pieces.push(SourcePiece { tensor: name.into(), dtype: DType::BF16, offset, ..piece.clone() });
    }
    let param = &mut manifest.receivers[0].params[0];
    (param.dtype, param.shape, param.map) = (dtype, shape.to_vec(), map.into());
    manifest.receivers[0].regions = vec![800];
    manifest
}

#[test]
fn one_transfer_can_carry_two_tensors() {
    let both = ParamMap::concat(0, ["a", "b"].map(|name| ParamMap::tensor(name).cast(DType::F32)));
    let manifest = beside_each_other(DType::F32, &[2, 100], both);
    let plan = plan(&manifest).unwrap();
    assert_eq!(plan.transfers().count(), 1);
    let explanation = explain(&plan, &manifest, "b", None).unwrap();
    let [transfer] = explanation.transfers.as_slice() else { panic!("{explanation}") };
    assert!(transfer.carries_more);
    assert_eq!((transfer.boxes.len(), transfer.boxes[0].tensor.as_str()), (1, "b"));
    assert_eq!((transfer.boxes[0].source_offset, transfer.boxes[0].destination_offset), (200, 400));
    assert!(explanation.to_string().contains("and elements of other tensors that lie beside them"));
}

#[test]
fn who_has_only_a_part_is_no_holder() {
    let mut manifest = rows(3, 1, Relay::Never);
    manifest.receivers[0].params[0].shape = vec![2, 100];
    manifest.trainers[0].regions = vec![200];
    for (trainer, (first, len)) in manifest.trainers.iter_mut().zip([(0, 2), (0, 1), (1, 1)]) {
        trainer.pieces[0].shape = vec![2, 100];
        trainer.pieces[0].bounds = TensorBox::new(&[first, 0], &[len, 100]).unwrap();
    }
    // So slow that the first trainer is given both rows, which then leave together.
    for trainer in &mut manifest.trainers[1..] {
        trainer.rails = vec![RailDecl { bytes_per_second: 1 }];
    }
    let plan = plan(&manifest).unwrap();
    let explanation = explain(&plan, &manifest, "layers.0.w", None).unwrap();
    let [transfer] = explanation.transfers.as_slice() else { panic!("{explanation}") };
    assert_eq!((transfer.trainer, transfer.boxes[0].why), (TrainerRank(0), Why::SoleHolder));
}

#[test]
fn scales_of_another_tensor_are_a_difference() {
    let of = |name: &str| {
        let map = ParamMap::tensor(name).scales(BlockQuant::default());
        plan(&beside_each_other(DType::F32, &[1, 1], map)).unwrap()
    };
    let (a, b) = (of("a"), of("b"));
    assert_eq!(a.fills[0].transfers, b.fills[0].transfers, "they are told apart by their tables alone");
    assert_eq!(diff(&a, &b).common_transfers, 0);
}

#[test]
fn a_single_row_at_the_end_is_not_staged() {
    let mut manifest = rows(9, 1, Relay::Never);
    manifest.options.chunk_bytes_max = 64;
    manifest.options.gather_chunk_bytes_max = 64;
    // One trainer with all rows; of each, 8 bytes are wanted.
    let piece = manifest.trainers[0].pieces[0].clone();
    manifest.trainers.truncate(1);
    manifest.trainers[0].regions = vec![900];
    manifest.trainers[0].pieces = vec![SourcePiece { bounds: TensorBox::whole(&[9, 100]).unwrap(), ..piece }];
    let param = &mut manifest.receivers[0].params[0];
    param.shape = vec![9, 8];
    param.map = ParamMap::tensor("layers.0.w").slice(TensorBox::new(&[0, 0], &[9, 8]).unwrap()).into();
    let plan = plan(&manifest).unwrap();
    let report = PlanReport::new(&plan, &manifest).unwrap();
    assert_eq!((report.counts.operations, report.staging.push_bytes), (2, 64));
}

#[test]
fn a_plan_that_was_changed_is_not_intact() {
    let manifest = rows(2, 2, Relay::Never);
    let mut plan = plan(&manifest).unwrap();
    assert!(plan.is_intact());
    let mut transfers = plan.fills[0].transfers.to_vec();
    transfers[0].row_bytes += 1;
    plan.fills[0].transfers = transfers.into();
    assert!(!plan.is_intact());
}

/// Digests change with every option that is added to the manifest; what is said about them does not.
fn without_digests(text: &str, plans: &[&Plan]) -> String {
    let names = plans.iter().zip(["FIRST", "SECOND"]);
    names.fold(text.to_owned(), |text, (plan, name)| text.replace(&plan.digest.to_string(), name))
}

#[test]
fn differences_are_told() {
    let a = plan(&rows(2, 3, Relay::Never)).unwrap();
    let b = plan(&rows(2, 4, Relay::PerHost)).unwrap();
    expect![[r#"
        plan a FIRST
        plan b SECOND
        made from different manifests
        trainers: 2 in both
        inference ranks: 3 -> 4
        trainers write: 600 B -> 400 B
        in WRITEs: 6 -> 4
        lower bound: 150.000 ms -> 100.000 ms
        predicted: 524438.020 ms -> 524388.023 ms
        groups that get it directly: 1 -> 0
        groups that get it once per host: 0 -> 1
        groups only in a: 1, only in b: 1
        transfers in both: 0, only in a: 2 (600 B), only in b: 2 (400 B)
        of those, in both but to other receivers or by another route: 2
        parameters that differ: 1
          layers.0.fused, -2 transfers (600 B), +2 (400 B)
        trainers that send something else: 2
          trainer 0: 300 B -> 200 B, -1 transfers (300 B), +1 (200 B)
          trainer 1: 300 B -> 200 B, -1 transfers (300 B), +1 (200 B)
        receivers that get another number of bytes: 1
          inference 3: 0 B -> 200 B
    "#]]
    .assert_eq(&without_digests(&diff(&a, &b).to_string(), &[&a, &b]));
    expect![[r#"
        the plans are equal: FIRST
    "#]]
    .assert_eq(&without_digests(&diff(&a, &a).to_string(), &[&a]));
}

#[test]
fn nothing_to_move_is_no_division_by_zero() {
    let mut manifest = rows(1, 1, Relay::Auto);
    manifest.receivers[0].params.clear();
    let plan = plan(&manifest).unwrap();
    let report = PlanReport::new(&plan, &manifest).unwrap();
    assert_eq!(report.trainers.sends.nics.imbalance, None);
    assert!(report.busiest.is_empty() && report.timeline.is_empty() && report.routes.is_empty());
    let empty = Manifest::default();
    let nobody = xfer_plan::plan(&empty).unwrap();
    assert_eq!(PlanReport::new(&nobody, &empty).unwrap().trainers.sends.nics, Distribution::default());
}
