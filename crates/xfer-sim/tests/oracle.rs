//! The network against a naive one: the same transfers at the same times, whatever is started, cancelled, slowed or broken.

mod common;

use std::collections::BTreeMap;

use proptest::prelude::*;
use xfer_sim::{Cluster, Done, Link, Network, NicId, Outcome, Preset, Racks, Time, TransferId, Way};

use common::{NaiveNetwork, links};

/// NICs of 6 hosts, 2 each.
const NICS: u32 = 12;

/// Nanoseconds that the two may be apart: the network serves to the end of a nanosecond, each time a little late.
const APART: f64 = 100.0;

#[derive(Clone, Debug)]
enum Operation {
    Start { from: u32, to: u32, bytes: u64 },
    Cancel { which: prop::sample::Index },
    Rate { nic: u32, out: bool, rate: u64 },
    Fail { nic: u32 },
    Wait { nanoseconds: u64 },
}

fn operations(faults: u32) -> impl Strategy<Value = Vec<Operation>> {
    // Many between few, so that lanes are long and links are shared.
    let operation = prop_oneof![
        12 => (0..NICS, 0..4_u32, 0..200_000_u64)
            .prop_map(|(from, to, bytes)| Operation::Start { from, to: to * 3, bytes }),
        8 => (1..100_000_u64).prop_map(|nanoseconds| Operation::Wait { nanoseconds }),
        faults => any::<prop::sample::Index>().prop_map(|which| Operation::Cancel { which }),
        faults => (0..NICS, any::<bool>(), 0..3_000_000_000_u64)
            .prop_map(|(nic, out, rate)| Operation::Rate { nic, out, rate }),
        faults.div_ceil(3) => (0..NICS).prop_map(|nic| Operation::Fail { nic }),
    ];
    prop::collection::vec(operation, 1..60)
}

fn cluster(racks: bool) -> Cluster {
    let mut cluster = Preset::H100Ib400.cluster(24, 24);
    cluster.host.nics = 2;
    cluster.nic.bytes_per_second = 2_000_000_000;
    cluster.racks = racks.then_some(Racks { hosts: 2, uplink_bytes_per_second: 3_000_000_000 });
    cluster
}

/// Drives a network from event to event, and adds up what its links moved.
struct Bed {
    network: Network,
    done: Vec<Done>,
    links: Vec<Link>,
    moved: Vec<f64>,
}

impl Bed {
    fn new(cluster: &Cluster) -> Bed {
        let nics = (0..cluster.nics()).map(NicId);
        let mut links: Vec<_> = nics.flat_map(|nic| [Link::NicOut(nic), Link::NicIn(nic)]).collect();
        links.extend((0..cluster.rack_count()).flat_map(|rack| [Link::RackUp(rack), Link::RackDown(rack)]));
        let moved = vec![0.0; links.len()];
        Bed { network: Network::new(cluster, 0.0, 0).unwrap(), done: vec![], links, moved }
    }

    fn run_to(&mut self, to: Time) {
        while let Some(next) = self.network.next_time().filter(|next| *next <= to) {
            self.step(next);
        }
        self.step(to);
    }

    fn step(&mut self, to: Time) {
        let seconds = to.since(self.network.now()).as_secs_f64();
        for (link, moved) in self.links.iter().zip(&mut self.moved) {
            let (used, capacity) = (self.network.used(*link).unwrap(), self.network.capacity(*link).unwrap());
            assert!(used <= capacity * (1.0 + 1e-9), "{link:?}: {used} of {capacity}");
            *moved += used * seconds;
        }
        self.network.advance(to, &mut self.done);
    }
}

proptest! {
    #[test]
    fn transfers_end_when_the_naive_network_says(operations in operations(2), racks in any::<bool>()) {
        let cluster = cluster(racks);
        let (mut bed, mut naive) = (Bed::new(&cluster), NaiveNetwork::new(&cluster));
        let mut ids: Vec<TransferId> = vec![];
        let mut now = Time::ZERO;
        for operation in operations {
            match operation {
                Operation::Wait { nanoseconds } => {
                    now = now.plus_nanos(nanoseconds);
                    bed.run_to(now);
                    naive.run_to(now.nanos() as f64);
                    // What ends at nearly the time of an operation may be over for the one and not for the other.
                    prop_assume!(naive.moments.iter().all(|at| (at - naive.now).abs() > APART));
                }
                Operation::Start { from, to, bytes } => {
                    let way = Way::Nic { from: NicId(from), to: NicId(to) };
                    let tag = ids.len() as u64;
                    ids.push(bed.network.start(now, way, bytes, tag).unwrap());
                    naive.start(way, bytes, tag);
                }
                Operation::Cancel { which } if !ids.is_empty() => {
                    let which = which.index(ids.len());
                    prop_assert_eq!(bed.network.cancel(now, ids[which]), naive.cancel(which as u64));
                }
                Operation::Cancel { .. } => {}
                Operation::Rate { nic, out, rate } => {
                    let link = if out { Link::NicOut(NicId(nic)) } else { Link::NicIn(NicId(nic)) };
                    bed.network.set_rate(now, link, rate).unwrap();
                    naive.set_rate(link, rate);
                }
                Operation::Fail { nic } => {
                    bed.network.fail_nic(now, NicId(nic)).unwrap();
                    naive.fail(NicId(nic));
                }
            }
        }
        let end = Time::from_nanos(1 << 40);
        bed.run_to(end);
        naive.run_to(end.nanos() as f64);

        let ended = |done: &Done| (done.at.nanos() as f64, matches!(done.outcome, Outcome::Delivered { .. }));
        let over: BTreeMap<u64, _> = bed.done.iter().map(|done| (done.tag, ended(done))).collect();
        prop_assert_eq!(over.len(), bed.done.len(), "reported twice");
        for transfer in &naive.transfers {
            let near = match (over.get(&transfer.tag), transfer.over) {
                (Some((at, delivered)), Some((expected, as_expected))) => {
                    delivered == &as_expected && (at - expected).abs() <= APART
                }
                (None, None) => true,
                _ => false,
            };
            prop_assert!(near, "{:?}: {:?}", transfer, over.get(&transfer.tag));
        }
        prop_assert!(bed.done.is_sorted_by_key(|done| done.at));
    }

    #[test]
    fn links_move_exactly_what_was_sent_over_them(operations in operations(0), racks in any::<bool>()) {
        let cluster = cluster(racks);
        let mut bed = Bed::new(&cluster);
        let (mut now, mut count) = (Time::ZERO, 0.0);
        let mut sent: BTreeMap<String, f64> = BTreeMap::new();
        for operation in operations {
            match operation {
                Operation::Wait { nanoseconds } => {
                    now = now.plus_nanos(nanoseconds);
                    bed.run_to(now);
                }
                Operation::Start { from, to, bytes } => {
                    let way = Way::Nic { from: NicId(from), to: NicId(to) };
                    bed.network.start(now, way, bytes, 0).unwrap();
                    count += 1.0;
                    for link in links(&cluster, way) {
                        *sent.entry(format!("{link:?}")).or_default() += cluster.nic.wire_bytes(bytes) as f64;
                    }
                }
                _ => {}
            }
        }
        bed.run_to(Time::from_nanos(1 << 40));
        prop_assert_eq!(bed.done.len() as f64, count);
        for (link, moved) in bed.links.iter().zip(&bed.moved) {
            let sent = sent.get(&format!("{link:?}")).copied().unwrap_or_default();
            // A nanosecond at full rate for each that ended, which is when the next one begins.
            let rounding = count * cluster.nic.bytes_per_second as f64 / 1e9 + 1e-3;
            prop_assert!((moved - sent).abs() <= rounding, "{:?}: {} of {}", link, moved, sent);
        }
    }

    #[test]
    fn the_same_calls_give_the_same_answers(operations in operations(2), seed in any::<u64>(), tolerance in 0.0..0.5) {
        let mut cluster = cluster(true);
        (cluster.nic.jitter_nanoseconds, cluster.nic.semantics) = (3_000, xfer_sim::Semantics::Srd);
        let run = || {
            let mut network = Network::new(&cluster, tolerance, seed).unwrap();
            let (mut now, mut done, mut ids) = (Time::ZERO, vec![], vec![]);
            for operation in &operations {
                match *operation {
                    Operation::Wait { nanoseconds } => {
                        now = now.plus_nanos(nanoseconds);
                        network.advance(now, &mut done);
                    }
                    Operation::Start { from, to, bytes } => {
                        let way = Way::Nic { from: NicId(from), to: NicId(to) };
                        ids.push(network.start(now, way, bytes, 0).unwrap());
                    }
                    Operation::Cancel { which } if !ids.is_empty() => drop(network.cancel(now, *which.get(&ids))),
                    Operation::Cancel { .. } => {}
                    Operation::Rate { nic, rate, .. } => network.set_rate(now, Link::NicIn(NicId(nic)), rate).unwrap(),
                    Operation::Fail { nic } => network.fail_nic(now, NicId(nic)).unwrap(),
                }
            }
            network.advance(Time::from_nanos(1 << 40), &mut done);
            done
        };
        prop_assert_eq!(run(), run());
    }
}
