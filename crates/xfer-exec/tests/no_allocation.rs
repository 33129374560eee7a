//! The way of a WRITE through the engine and the driver allocates nothing: the whole second push of a program is counted,
//! on rails that move nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use efa_core::{Lease, LeaseMut};
use xfer_exec::driver::{Driver, DriverConfig, HostRail, Outcome, Step};
use xfer_exec::null::NullRail;
use xfer_exec::program::Route;
use xfer_exec::{Program, RailIndex, RailLimits, RankLimits};
use xfer_plan::{Op, ParamId, RankPlan, ReceiverRank, RegionIndex, Strided, Transform};

const RECEIVERS: u32 = 16;
const RAILS: u16 = 4;
const CHUNK_BYTES: u32 = 64 << 10;

fn driver(writes: u64) -> Driver {
    let op = |at: u64| {
        let place = Strided { region: RegionIndex(0), offset: 0, stride: u64::from(CHUNK_BYTES) };
        Op {
            to: ReceiverRank((at % u64::from(RECEIVERS)) as u32),
            param: ParamId(0),
            row_bytes: CHUNK_BYTES,
            rows: 1,
            source: place,
            destination: place,
            gather: false,
            transform: Transform::Copy,
            rail: (at / u64::from(RECEIVERS)) as u8,
            wave: 0,
        }
    };
    let plan = RankPlan {
        bytes: writes * u64::from(CHUNK_BYTES),
        writes,
        ops: (0..writes).map(op).collect(),
        tags: Vec::new(),
    };
    let route =
        Route { rails: (0..RAILS).map(RailIndex).collect(), region_bytes: vec![u64::from(CHUNK_BYTES)] };
    let routes = (0..RECEIVERS).map(|to| (ReceiverRank(to), route.clone())).collect();
    let limits = RankLimits { region_bytes: vec![u64::from(CHUNK_BYTES)], ..RankLimits::default() };
    let program = Program::new(plan, BTreeMap::new(), &limits, routes).unwrap();
    let limits = RailLimits { depth: 128, in_flight_bytes_max: u64::MAX, takes_rows: false };
    let rails = (0..RAILS).map(|_| -> HostRail { Box::new(NullRail::new(limits, 3)) }).collect();
    let (deadline, stall) = (Duration::from_secs(10), Duration::from_secs(2));
    let staging = LeaseMut::zeroed(0).unwrap();
    Driver::new(DriverConfig { program, rails, staging, slot_bytes: 0, deadline, stall }).unwrap()
}

/// Pushes, and gives the weights back.
fn push(driver: &mut Driver, weights: Vec<Lease>) -> Outcome {
    driver.begin(weights);
    loop {
        if let Step::Over(outcome) = driver.step() {
            return outcome;
        }
    }
}

#[test]
fn a_write_allocates_nothing() {
    const WRITES: u64 = 100_000;
    let mut driver = driver(WRITES);
    let weights = vec![LeaseMut::zeroed(CHUNK_BYTES as usize).unwrap().freeze()];
    let first = push(&mut driver, weights);
    assert_eq!(first.result.unwrap().writes, WRITES);
    let mut second = None;
    let counted = allocation_counter::measure(|| second = Some(push(&mut driver, first.regions)));
    assert_eq!(second.unwrap().result.unwrap().writes, WRITES);
    // What each rail did is collected once, at the end.
    assert!(counted.count_total <= 8, "{} allocations in {WRITES} writes", counted.count_total);
}
