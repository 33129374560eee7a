//! Runners on a toy cluster in memory: a trainer whose operations are gathered, transformed or neither, and receivers that pass
//! on what arrives, along random trees. The oracle makes each row from the weights.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use proptest::prelude::*;
use xfer_exec::program::Route;
use xfer_exec::{Program, RailIndex, RailLimits, RankLimits, Runner, Turn};
use xfer_plan::{DType, NO_TAG, Op, ParamId, RankPlan, ReceiverRank, RelayPlan, Strided, Transform};

mod network;
mod rules;

use network::{Bytes, Host, NOTHING, Network, REGION, Wire, made};

const SLOT_BYTES: usize = 256;

/// Rows for one receiver or more.
#[derive(Debug, Clone)]
struct Item {
    rows: u32,
    row_elements: u32,
    /// Whether the rows lie apart at the receivers.
    apart: bool,
    cast: bool,
    /// Each receiver and, by place among those before it, who passes the rows on to it; the first has them of the trainer.
    tree: Vec<(u32, u8)>,
}

#[derive(Debug, Clone)]
struct Case {
    items: Vec<Item>,
    receivers: u32,
    wires: usize,
    depth: u32,
    takes_rows: bool,
    slots: u32,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    (2u32..6).prop_flat_map(|receivers| {
        let ranks = Just((0..receivers).collect::<Vec<_>>()).prop_shuffle();
        let tree = (ranks, prop::collection::vec(any::<u8>(), 1..=receivers as usize))
            .prop_map(|(ranks, parents)| ranks.into_iter().zip(parents).collect());
        let item = (1u32..5, 1u32..9, any::<bool>(), any::<bool>(), tree).prop_map(
            |(rows, row_elements, apart, cast, tree)| Item { rows, row_elements, apart, cast, tree },
        );
        let items = prop::collection::vec(item, 0..20);
        (items, 1usize..4, 2u32..5, any::<bool>(), 1u32..4, any::<u64>()).prop_map(
            move |(items, wires, depth, takes_rows, slots, seed)| Case {
                items,
                receivers,
                wires,
                depth,
                takes_rows,
                slots,
                seed,
            },
        )
    })
}

/// What every rank does.
struct Plans {
    trainer: RankPlan,
    relays: Vec<RelayPlan>,
    source_bytes: u64,
    region_bytes: u64,
}

fn add(plan: &mut RankPlan, op: Op, tag: u32) {
    plan.bytes += op.bytes();
    plan.writes += op.writes();
    plan.ops.push(op);
    plan.tags.push(tag);
}

/// Adds what is passed on of an operation from the receiver at `at` in the tree; the operation's tag.
fn pass_on(item: &Item, at: usize, op: &Op, relays: &mut [RelayPlan]) -> u32 {
    let children = (at + 1..item.tree.len()).filter(|child| usize::from(item.tree[*child].1) % child == at);
    let onward: Vec<(Op, u32)> = children
        .map(|child| {
            let mut op = Op {
                to: ReceiverRank(item.tree[child].0),
                source: op.destination,
                gather: false,
                transform: Transform::Copy,
                ..*op
            };
            if op.destination.stride == u64::from(op.row_bytes) {
                // It has arrived in one piece.
                (op.row_bytes, op.rows) = (op.row_bytes * op.rows, 1);
            }
            (op, pass_on(item, child, &op, relays))
        })
        .collect();
    if onward.is_empty() {
        return NO_TAG;
    }
    let relay = &mut relays[op.to.index()];
    let tag = relay.awaited.len() as u32;
    relay.first.push(relay.plan.ops.len() as u32);
    relay.awaited.push(op.writes() as u32);
    onward.into_iter().for_each(|(op, tag)| add(&mut relay.plan, op, tag));
    tag
}

impl Case {
    fn plans(&self) -> Plans {
        let mut relays = vec![RelayPlan::default(); self.receivers as usize];
        let mut trainer = RankPlan::default();
        let (mut source, mut at) = (0_u64, 0_u64);
        for (number, item) in self.items.iter().enumerate() {
            let row_bytes = 2 * item.row_elements;
            let read_bytes = u64::from(row_bytes) * if item.cast { 2 } else { 1 };
            let apart = u64::from(row_bytes) + if item.apart && item.rows > 1 { 6 } else { 0 };
            let transform = match item.cast {
                true => Transform::Cast { from: DType::F32, to: DType::BF16 },
                false => Transform::Copy,
            };
            let op = Op {
                to: ReceiverRank(item.tree[0].0),
                param: ParamId(0),
                row_bytes,
                rows: item.rows,
                source: Strided { region: REGION, offset: source, stride: read_bytes + 4 },
                destination: Strided { region: REGION, offset: at, stride: apart },
                gather: !item.cast && !item.apart && item.rows > 1,
                transform,
                rail: number as u8,
                wave: 0,
            };
            source += u64::from(item.rows) * op.source.stride;
            at += u64::from(item.rows) * apart;
            let tag = pass_on(item, 0, &op, &mut relays);
            add(&mut trainer, op, tag);
        }
        Plans { trainer, relays, source_bytes: source, region_bytes: at }
    }

    /// The memory of a receiver after a push of `weights`.
    fn oracle(&self, receiver: u32, plans: &Plans, weights: &[u8]) -> Vec<u8> {
        let mut region = vec![NOTHING; plans.region_bytes as usize];
        for (item, op) in self.items.iter().zip(&plans.trainer.ops) {
            let is_wanted = item.tree.iter().any(|(rank, _)| *rank == receiver);
            for row in (0..u64::from(op.rows)).filter(|_| is_wanted) {
                let to = (op.destination.offset + row * op.destination.stride) as usize;
                region[to..to + op.row_bytes as usize].copy_from_slice(&made(op, weights, row));
            }
        }
        region
    }

    /// A rank and what it pushes.
    fn rank(&self, program: Program, region: Bytes, network: &Rc<RefCell<Network>>) -> (Runner<Host>, Host) {
        let first = network.borrow().done.len();
        network.borrow_mut().done.extend((0..self.wires).map(|_| Vec::new()));
        let limits = RailLimits { depth: self.depth, in_flight_bytes_max: 64, takes_rows: self.takes_rows };
        let wire = |number| Box::new(Wire { network: network.clone(), number, limits });
        let wires = (first..first + self.wires).map(wire).collect();
        let slots = (0..self.slots).map(|_| Rc::new(RefCell::new(vec![NOTHING; SLOT_BYTES]))).collect();
        let second = Duration::from_secs(1);
        let runner = Runner::new(program, wires, self.slots, 10 * second, 2 * second);
        (runner, Host { region, slots, filling: Vec::new() })
    }

    fn check(&self) {
        let plans = self.plans();
        let rails: Vec<RailIndex> = (0..self.wires as u16).map(RailIndex).collect();
        let route = Route { rails, region_bytes: vec![plans.region_bytes] };
        let routes: BTreeMap<_, _> =
            (0..self.receivers).map(|to| (ReceiverRank(to), route.clone())).collect();
        let network = Rc::new(RefCell::new(Network::default()));
        let memory = |bytes: u64| Rc::new(RefCell::new(vec![NOTHING; bytes as usize]));
        let regions: Vec<Bytes> = (0..self.receivers).map(|_| memory(plans.region_bytes)).collect();
        network.borrow_mut().regions.clone_from(&regions);
        let limits = |region_bytes: u64, transforms| RankLimits {
            region_bytes: vec![region_bytes],
            slot_bytes: SLOT_BYTES as u64,
            transforms,
        };
        let mut ranks = Vec::new();
        for (relay, region) in plans.relays.iter().zip(&regions) {
            let limits = limits(plans.region_bytes, false);
            let program = Program::relay(relay.clone(), BTreeMap::new(), &limits, routes.clone()).unwrap();
            ranks.push(self.rank(program, region.clone(), &network));
        }
        let source = memory(plans.source_bytes);
        let limits = limits(plans.source_bytes, true);
        let program = Program::new(plans.trainer.clone(), BTreeMap::new(), &limits, routes).unwrap();
        ranks.push(self.rank(program, source.clone(), &network));

        let mut state = self.seed;
        // An LCG, its upper bits.
        let mut choice = move |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below.max(1)
        };
        for push in 1..=2 {
            let weight = |at: usize| match (at * 31 + at / 7 * push) as u8 {
                NOTHING => 0,
                byte => byte,
            };
            let weights: Vec<u8> = (0..plans.source_bytes as usize).map(weight).collect();
            source.borrow_mut().copy_from_slice(&weights);
            regions.iter().for_each(|region| region.borrow_mut().fill(NOTHING));
            let mut now = Duration::ZERO;
            let mut results: Vec<_> = ranks.iter().map(|_| None).collect();
            ranks.iter_mut().for_each(|(runner, _)| runner.start(now));
            for _step in 0..200_000 {
                now += Duration::from_micros(1);
                let rank = choice(ranks.len());
                let (runner, host) = &mut ranks[rank];
                match choice(4) {
                    0 if results[rank].is_none() => {
                        if let Turn::Over(result) = runner.step(host, now) {
                            results[rank] = Some(result);
                        }
                    }
                    1 if !host.filling.is_empty() => {
                        let filling = host.filling.swap_remove(choice(host.filling.len()));
                        host.fill(filling);
                        runner.staged(filling.0, Ok(()), now);
                    }
                    2 => runner.tick(now),
                    _ => {
                        let in_flight = network.borrow().in_flight.len();
                        if in_flight > 0 {
                            let (to, tag) = network.borrow_mut().deliver(choice(in_flight));
                            ranks[to.index()].0.arrived(tag, now);
                        }
                    }
                }
                if results.iter().all(Option::is_some) {
                    break;
                }
            }
            let planned = plans.relays.iter().map(|relay| &relay.plan).chain([&plans.trainer]);
            for (result, plan) in results.into_iter().zip(planned) {
                let delivered = result.expect("an end").unwrap();
                assert_eq!((delivered.bytes, delivered.writes), (plan.bytes, plan.writes));
            }
            for (receiver, region) in (0..).zip(&regions) {
                assert_eq!(*region.borrow(), self.oracle(receiver, &plans, &weights), "receiver {receiver}");
            }
        }
    }
}

proptest! {
    #[test]
    fn every_row_reaches_every_receiver_of_its_tree(case in cases()) {
        case.check();
    }
}
