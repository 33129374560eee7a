//! Rates after any changes: as progressive filling from scratch gives them, or as far from that as is tolerated.

use proptest::prelude::*;

use super::super::links::{Link, Links, Path, Way};
use super::FairShare;
use crate::cluster::{Cluster, NicId, Preset, Racks};

/// NICs of the test's cluster: 6 hosts of 2, in racks of 2 hosts.
const NICS: u32 = 12;

#[derive(Clone, Debug)]
enum Change {
    Join { from: u32, to: u32 },
    Leave { which: prop::sample::Index },
    Capacity { link: prop::sample::Index, capacity: u32 },
}

fn changes() -> impl Strategy<Value = Vec<Vec<Change>>> {
    let change = prop_oneof![
        5 => (0..NICS, 0..NICS).prop_map(|(from, to)| Change::Join { from, to }),
        3 => any::<prop::sample::Index>().prop_map(|which| Change::Leave { which }),
        1 => (any::<prop::sample::Index>(), 0..200_u32)
            .prop_map(|(link, capacity)| Change::Capacity { link, capacity }),
    ];
    prop::collection::vec(prop::collection::vec(change, 1..4), 1..40)
}

fn cluster() -> Cluster {
    let mut cluster = Preset::Lab32x100M.cluster(3, 3);
    (cluster.host.nics, cluster.nic.bytes_per_second) = (2, 100);
    cluster.racks = Some(Racks { hosts: 2, uplink_bytes_per_second: 150 });
    cluster
}

/// A network of flows, and what it must be.
struct Bed {
    cluster: Cluster,
    links: Links,
    fair: FairShare,
    capacities: Vec<f64>,
    /// By their numbers.
    flows: Vec<Option<Path>>,
}

impl Bed {
    fn new(tolerance: f64) -> Bed {
        let cluster = cluster();
        let links = Links::of(&cluster);
        let capacities = links.capacities(&cluster);
        Bed { fair: FairShare::new(capacities.clone(), tolerance), capacities, links, cluster, flows: vec![] }
    }

    fn apply(&mut self, change: &Change) {
        match change {
            Change::Join { from, to } => {
                let path = self.links.path(Way::Nic { from: NicId(*from), to: NicId(*to) }, &self.cluster);
                let vacant = self.flows.iter().position(Option::is_none).unwrap_or(self.flows.len());
                self.flows.resize(self.flows.len().max(vacant + 1), None);
                self.flows[vacant] = path;
                self.fair.join(vacant as u32, path.unwrap());
            }
            Change::Leave { which } => {
                let there: Vec<_> = self.active().map(|(flow, _)| flow).collect();
                if !there.is_empty() {
                    let flow = *which.get(&there);
                    self.flows[flow as usize] = None;
                    self.fair.leave(flow);
                }
            }
            Change::Capacity { link, capacity } => {
                // NICs and uplinks come first.
                let link = link.index(self.links.number(Link::NvlinkOut(crate::GpuId(0))).unwrap() as usize);
                self.capacities[link] = f64::from(*capacity);
                self.fair.set_capacity(link as u32, f64::from(*capacity));
            }
        }
    }

    fn active(&self) -> impl Iterator<Item = (u32, Path)> {
        (0..).zip(&self.flows).filter_map(|(flow, path)| path.map(|path| (flow, path)))
    }

    fn on(&self, link: u32) -> Vec<u32> {
        self.active().filter(|(_, path)| path.links().contains(&link)).map(|(flow, _)| flow).collect()
    }

    /// All flows filled together, from nothing.
    fn filled(&self) -> Vec<f64> {
        let mut rates = vec![None; self.flows.len()];
        loop {
            let share = |link: u32| {
                let (mut room, mut open) = (self.capacities[link as usize], 0);
                for flow in self.on(link) {
                    match rates[flow as usize] {
                        Some(rate) => room -= rate,
                        None => open += 1,
                    }
                }
                (open > 0).then(|| (room.max(0.0) / f64::from(open), link))
            };
            let shares = (0..self.capacities.len() as u32).filter_map(share);
            let Some((level, link)) = shares.min_by(|a, b| a.0.total_cmp(&b.0)) else { break };
            for flow in self.on(link) {
                rates[flow as usize].get_or_insert(level);
            }
        }
        rates.into_iter().map(Option::unwrap_or_default).collect()
    }

    /// Nothing above its capacity, and for every flow a full link on which none is faster, both as far as is tolerated.
    fn check(&self, tolerance: f64) -> Result<(), TestCaseError> {
        let least = 1.0 - tolerance - 1e-6;
        let rate = |flow: u32| self.fair.rate(flow);
        let load = |link| self.on(link).into_iter().map(rate).sum::<f64>();
        for link in 0..self.capacities.len() as u32 {
            prop_assert!(
                load(link) <= self.capacities[link as usize] * (1.0 + tolerance + 1e-6),
                "link {link}"
            );
            prop_assert!((load(link) - self.fair.load(link)).abs() < 1e-6);
        }
        for (flow, path) in self.active() {
            let is_bottleneck = |link: u32| {
                let full = load(link) >= self.capacities[link as usize] * least;
                full && self.on(link).into_iter().all(|other| rate(flow) >= rate(other) * least)
            };
            prop_assert!(
                path.links().iter().any(|link| is_bottleneck(*link)),
                "flow {flow} has no bottleneck"
            );
        }
        Ok(())
    }
}

proptest! {
    #[test]
    fn without_tolerance_rates_are_those_of_filling_from_scratch(rounds in changes()) {
        let mut bed = Bed::new(0.0);
        let mut told = vec![];
        for round in rounds {
            round.iter().for_each(|change| bed.apply(change));
            told.resize(bed.flows.len(), 0.0);
            for (flow, told) in told.iter_mut().enumerate() {
                // A flow that took another's number begins at nothing.
                if bed.flows[flow].is_none() || bed.fair.rate(flow as u32) == 0.0 {
                    *told = 0.0;
                }
            }
            bed.fair.update(|flow, rate| told[flow as usize] = rate);
            let expected = bed.filled();
            for (flow, _) in bed.active() {
                let (rate, expected) = (bed.fair.rate(flow), expected[flow as usize]);
                prop_assert!((rate - expected).abs() <= 1e-6 * expected, "flow {}: {} for {}", flow, rate, expected);
                prop_assert_eq!(rate, told[flow as usize], "a change was not told");
            }
            bed.check(0.0)?;
        }
    }

    #[test]
    fn with_a_tolerance_every_flow_has_a_bottleneck_within_it(rounds in changes(), tolerance in 0.001..0.5) {
        let mut bed = Bed::new(tolerance);
        for round in rounds {
            round.iter().for_each(|change| bed.apply(change));
            bed.fair.update(|_, _| {});
            bed.check(tolerance)?;
        }
    }
}

#[test]
fn one_of_many_may_come_to_a_tolerant_link_and_leave_it_without_a_change() {
    let mut bed = Bed::new(0.5);
    (0..4).for_each(|from| bed.apply(&Change::Join { from, to: 4 }));
    bed.fair.update(|_, _| {});
    bed.apply(&Change::Join { from: 5, to: 4 });
    bed.fair
        .update(|flow, rate| assert_eq!((flow, rate), (4, 25.0), "as the others, and they stay as they are"));
    bed.fair.leave(4);
    bed.fair.leave(3);
    bed.flows[3] = None;
    bed.fair.update(|flow, _| panic!("flow {flow} need not change: 3 of 4 shares are more than half"));
}
