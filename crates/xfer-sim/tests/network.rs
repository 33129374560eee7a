//! What a transfer takes, in which order transfers arrive, and what happens to them when links slow down or die.

use std::collections::BTreeMap;

use proptest::prelude::*;
use xfer_sim::{
    Cluster, Done, GpuId, Link, Network, NetworkError, NicId, Outcome, Preset, Racks, Semantics, Time, Way,
};

/// NICs that move a byte a nanosecond, in packets of 100 bytes with a header of 10; a delivery takes 1000 ns, its completion
/// 500 more. Four hosts of two NICs.
fn cluster() -> Cluster {
    let mut cluster = Preset::H100Ib400.cluster(16, 16);
    let nic = &mut cluster.nic;
    (nic.bytes_per_second, nic.packet_payload_bytes, nic.packet_header_bytes) = (1_000_000_000, 100, 10);
    (nic.latency_nanoseconds, nic.completion_nanoseconds, nic.message_nanoseconds) = (1_000, 500, 0);
    cluster.host.nics = 2;
    cluster
}

fn network(cluster: &Cluster) -> Network {
    Network::new(cluster, 0.0, 0).unwrap()
}

fn nic(from: u32, to: u32) -> Way {
    Way::Nic { from: NicId(from), to: NicId(to) }
}

fn at(nanoseconds: u64) -> Time {
    Time::from_nanos(nanoseconds)
}

fn drain(network: &mut Network) -> Vec<Done> {
    let mut done = vec![];
    while let Some(next) = network.next_time() {
        network.advance(next, &mut done);
    }
    done
}

/// When each tag was over.
fn times(done: &[Done]) -> BTreeMap<u64, u64> {
    done.iter().map(|done| (done.tag, done.at.nanos())).collect()
}

#[test]
fn a_lone_transfer_takes_its_packets_and_the_latency() {
    let mut network = network(&cluster());
    let transfer = network.start(at(7), nic(0, 3), 250, 42).unwrap();
    assert_eq!(network.used(Link::NicOut(NicId(0))), Ok(1e9));
    // 250 bytes in three packets: 280 bytes on the wire.
    let delivered = at(7 + 280 + 1_000);
    let outcome = Outcome::Delivered { completed: delivered.plus_nanos(500) };
    assert_eq!(drain(&mut network), [Done { transfer, tag: 42, at: delivered, outcome }]);
    assert_eq!(network.next_time(), None);
    assert_eq!(network.rate(nic(0, 3)), 0.0);
}

#[test]
fn a_nic_sends_no_more_messages_than_its_rate_allows() {
    let mut cluster = cluster();
    cluster.nic.message_nanoseconds = 50;
    let mut network = network(&cluster);
    (0..100).for_each(|tag| drop(network.start(Time::ZERO, nic(0, 2), 1, tag)));
    assert_eq!(drain(&mut network).last().unwrap().at, at(100 * 50 + 1_000));
}

#[test]
fn a_nanosecond_holds_many_short_messages() {
    let mut cluster = cluster();
    (cluster.nic.bytes_per_second, cluster.nic.packet_header_bytes) = (3_000_000_000, 0);
    let mut network = network(&cluster);
    (0..1_000).for_each(|tag| drop(network.start(Time::ZERO, nic(0, 2), 1, tag)));
    assert_eq!(drain(&mut network).last().unwrap().at, at(334 + 1_000));
}

#[test]
fn ways_share_and_transfers_of_one_way_wait_for_each_other() {
    let mut network = network(&cluster());
    // Twice 100 bytes on one way, once on another, all from NIC 0: each way has half.
    for (tag, to) in [(0, 2), (1, 2), (2, 4)] {
        network.start(Time::ZERO, nic(0, to), 100, tag).unwrap();
    }
    assert_eq!((network.rate(nic(0, 2)), network.rate(nic(0, 4))), (5e8, 5e8));
    assert_eq!(times(&drain(&mut network)), [(0, 1_220), (1, 1_330), (2, 1_220)].into());
}

#[test]
fn racks_share_an_uplink_and_hosts_of_one_rack_do_not_need_it() {
    let mut cluster = cluster();
    cluster.racks = Some(Racks { hosts: 2, uplink_bytes_per_second: 500_000_000 });
    let mut network = network(&cluster);
    for (tag, from, to) in [(0, 0, 4), (1, 2, 6), (2, 1, 3)] {
        network.start(Time::ZERO, nic(from, to), 1_000, tag).unwrap();
    }
    assert_eq!(network.used(Link::RackUp(0)), Ok(5e8));
    assert_eq!(network.used(Link::RackDown(1)), Ok(5e8));
    assert_eq!(times(&drain(&mut network)), [(0, 5_400), (1, 5_400), (2, 2_100)].into());
}

#[test]
fn gpus_move_bytes_over_links_of_their_own() {
    let mut cluster = cluster();
    let gpu = &mut cluster.host.gpu;
    (gpu.nvlink_bytes_per_second, gpu.copy_engine_bytes_per_second) = (4_000_000_000, 2_000_000_000);
    (gpu.hbm_bytes_per_second, gpu.launch_nanoseconds) = (8_000_000_000, 30);
    let mut network = network(&cluster);
    let (a, b) = (GpuId(0), GpuId(1));
    let ways = [
        Way::Nvlink { from: a, to: b },
        Way::Nvlink { from: b, to: a },
        Way::HostToDevice(a),
        Way::DeviceToHost(a),
        Way::Kernel(a),
    ];
    for (tag, way) in (0..).zip(ways) {
        network.start(Time::ZERO, way, 8_000, tag).unwrap();
    }
    let done = drain(&mut network);
    assert_eq!(times(&done), [(0, 2_030), (1, 2_030), (2, 4_030), (3, 4_030), (4, 1_030)].into());
    let told = |done: &Done| done.outcome == Outcome::Delivered { completed: done.at };
    assert!(done.iter().all(told), "nothing acknowledges a copy");
}

#[test]
fn a_slow_nic_slows_its_transfers_and_a_stopped_one_holds_them() {
    let mut network = network(&cluster());
    network.start(Time::ZERO, nic(0, 2), 1_000, 0).unwrap();
    // 1100 bytes: 100 at full rate, 100 at a tenth, none for 5000 ns, 900 at full rate.
    network.set_rate(at(100), Link::NicIn(NicId(2)), 100_000_000).unwrap();
    network.set_rate(at(1_100), Link::NicIn(NicId(2)), 0).unwrap();
    assert_eq!(network.next_time(), None);
    network.set_rate(at(6_100), Link::NicIn(NicId(2)), 1_000_000_000).unwrap();
    assert_eq!(times(&drain(&mut network)), [(0, 6_100 + 900 + 1_000)].into());
}

#[test]
fn what_a_dead_nic_sends_or_would_receive_fails_and_what_it_had_sent_arrives() {
    let mut network = network(&cluster());
    // On their way when NIC 2 dies: 0 has left it, 1 is about to reach it. In line: 2 and 3. Elsewhere: 4.
    for (tag, from, to, bytes) in
        [(0, 2, 0, 100), (1, 4, 2, 100), (2, 2, 0, 900), (3, 6, 2, 900), (4, 1, 3, 900)]
    {
        network.start(Time::ZERO, nic(from, to), bytes, tag).unwrap();
    }
    let mut done = vec![];
    network.advance(at(500), &mut done);
    network.fail_nic(at(500), NicId(2)).unwrap();
    assert_eq!(network.next_time(), Some(at(500)), "failures are told at once");
    done.extend(drain(&mut network));
    let failed: BTreeMap<_, _> =
        done.iter().map(|done| (done.tag, done.outcome == Outcome::Failed)).collect();
    assert_eq!(failed, [(0, false), (1, true), (2, true), (3, true), (4, false)].into());
    network.start(network.now(), nic(2, 0), 1, 5).unwrap();
    assert_eq!(network.next_time(), None, "a later transfer stalls");
}

#[test]
fn a_cancelled_transfer_is_not_heard_of_and_makes_way() {
    let mut network = network(&cluster());
    let ids: Vec<_> = (0..3).map(|tag| network.start(Time::ZERO, nic(0, 2), 100, tag).unwrap()).collect();
    assert!(network.cancel(at(50), ids[0]), "served by half");
    assert!(!network.cancel(at(50), ids[0]));
    // 110 ns for the next one, which is then on its way and can still be taken back.
    assert!(network.cancel(at(200), ids[1]));
    assert_eq!(times(&drain(&mut network)), [(2, 50 + 220 + 1_000)].into());
    assert!(!network.cancel(network.now(), ids[2]), "over");
}

#[test]
fn what_a_cluster_does_not_have_is_refused() {
    let cluster = cluster();
    let mut network = network(&cluster);
    let refused = [
        nic(0, 8),
        nic(8, 0),
        Way::Nvlink { from: GpuId(0), to: GpuId(0) },
        Way::Nvlink { from: GpuId(7), to: GpuId(8) },
        Way::Kernel(GpuId(32)),
    ];
    for way in refused {
        assert_eq!(network.start(Time::ZERO, way, 1, 0), Err(NetworkError::NoSuchWay { way }));
    }
    let link = Link::RackUp(0);
    assert_eq!(network.set_rate(Time::ZERO, link, 1), Err(NetworkError::NoSuchLink { link }));
    for tolerance in [-0.1, 0.6, f64::NAN] {
        assert!(matches!(Network::new(&cluster, tolerance, 0), Err(NetworkError::Tolerance { .. })));
    }
    let broken = Cluster { hosts: 0, ..cluster };
    assert!(matches!(Network::new(&broken, 0.0, 0), Err(NetworkError::Cluster(_))));
}

/// Times of delivery by tag.
fn deliveries(cluster: &Cluster, messages: &[(u64, u32, u64)], seed: u64) -> BTreeMap<u64, u64> {
    let mut network = Network::new(cluster, 0.0, seed).unwrap();
    let (mut now, mut done) = (Time::ZERO, vec![]);
    for (tag, (wait, to, bytes)) in (0..).zip(messages) {
        now = now.plus_nanos(*wait);
        network.advance(now, &mut done);
        network.start(now, nic(0, *to), *bytes, tag).unwrap();
    }
    done.extend(drain(&mut network));
    times(&done)
}

proptest! {
    #[test]
    fn arrivals_keep_their_order_where_that_is_promised(
        messages in prop::collection::vec((0..200_u64, 1..4_u32, 0..300_u64), 1..60),
        seed in any::<u64>(),
        semantics in prop_oneof![Just(Semantics::Srd), Just(Semantics::Rc), Just(Semantics::Tcp)],
        jitter in 0..5_000_u64,
    ) {
        let mut cluster = cluster();
        cluster.nic.semantics = semantics;
        let still = deliveries(&cluster, &messages, seed);
        cluster.nic.jitter_nanoseconds = jitter;
        let shaken = deliveries(&cluster, &messages, seed);
        prop_assert_eq!(shaken.len(), messages.len());
        for (tag, time) in &shaken {
            prop_assert!((still[tag]..=still[tag] + jitter).contains(time), "message {}: {}", tag, time);
        }
        for to in 1..4 {
            let of_pair = |tag: &u64| messages[*tag as usize].1 == to;
            let times: Vec<_> = shaken.iter().filter(|(tag, _)| of_pair(tag)).map(|(_, time)| *time).collect();
            prop_assert!(!semantics.ordered() || times.is_sorted(), "{:?}", times);
        }
    }
}

#[test]
fn srd_delivers_out_of_order_and_the_seed_says_how() {
    let mut cluster = cluster();
    (cluster.nic.semantics, cluster.nic.jitter_nanoseconds) = (Semantics::Srd, 2_000);
    let messages = [(0, 2, 100); 20];
    let first = deliveries(&cluster, &messages, 1);
    assert!(!first.values().is_sorted());
    assert_eq!(first, deliveries(&cluster, &messages, 1));
    assert_ne!(first, deliveries(&cluster, &messages, 2));
}
