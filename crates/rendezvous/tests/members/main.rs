//! The controller and the members' halves of the protocol against each other, in any order of events, with relays.

mod cluster;
mod member;

use cluster::{Cluster, Next};
use proptest::prelude::*;
use rendezvous::Verify;
use rendezvous::member::Served;
use xfer_plan::{Rank, ReceiverRank, Relay, TrainerRank};

/// Versions that are pushed.
const TARGET: u64 = 3;

/// Steps after the last fault within which every run must end.
const STEPS_MAX: usize = 20_000;

/// A step in this many is a fault, where one is possible.
const FAULT_EVERY: u32 = 12;

/// At most so many members are lost in a run.
const LOSSES_MAX: usize = 2;

/// Picks by `choice` among what can happen, now and then a fault.
fn pick(cluster: &Cluster, choice: u32) -> Next {
    let losses = cluster.lost.len() < LOSSES_MAX && choice.is_multiple_of(8 * FAULT_EVERY);
    let faults = choice.is_multiple_of(FAULT_EVERY);
    let fits = |next: &Next| next.is_fault() == faults && (!next.is_loss() || losses);
    let possible = cluster.possible(TARGET);
    let fitting: Vec<Next> = possible.into_iter().filter(fits).collect();
    let place = (choice / FAULT_EVERY) as usize;
    fitting.get(place % fitting.len().max(1)).copied().unwrap_or(Next::Tick)
}

/// Goes on without faults, in whatever order of what `may` be, until `done`. Time passes where nothing else can happen.
fn go_on(cluster: &mut Cluster, may: impl Fn(&Next) -> bool, done: impl Fn(&Cluster) -> bool) {
    let mut choice = 1_u64;
    for _ in 0..STEPS_MAX {
        choice = choice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let calm = |next: &Next| !next.is_fault() && !matches!(next, Next::Tick) && may(next);
        let calm: Vec<Next> = cluster.possible(TARGET).into_iter().filter(calm).collect();
        match calm.get((choice >> 33) as usize % calm.len().max(1)) {
            Some(next) => cluster.step(*next),
            None if done(cluster) => return,
            None => cluster.step(Next::Tick),
        }
    }
    panic!("it comes to no end");
}

/// Until all versions are committed, or the job has ended.
fn to_the_end(cluster: &mut Cluster) {
    let committed = |cluster: &Cluster| cluster.lost.is_empty() && cluster.known_to_trainers() == TARGET;
    go_on(cluster, |_| true, |cluster| cluster.ended.is_some() || committed(cluster));
}

fn relays() -> impl Strategy<Value = Relay> {
    prop_oneof![Just(Relay::Never), Just(Relay::PerHost), Just(Relay::Chain)]
}

fn verify() -> impl Strategy<Value = Verify> {
    prop_oneof![Just(Verify::Off), Just(Verify::Sampled(0.5)), Just(Verify::Full)]
}

proptest! {
    /// What the cluster itself asserts at every step: no inference rank on a newer version than the controller committed,
    /// no byte of another attempt in what is committed, none that lands in what is served, none counted for another attempt
    /// by a rank that passes it on, no byte in what is committed that became another where everything is verified. And here: every run ends with everybody on the last version, or with a reason that names
    /// who was lost or waited for, and who is left then agrees on what was committed.
    #[test]
    fn every_order_of_events_ends_well_or_by_name(
        relay in relays(), verify in verify(), choices in prop::collection::vec(any::<u32>(), 0..600),
    ) {
        let mut cluster = Cluster::new(relay, true, verify);
        for choice in choices {
            let next = pick(&cluster, choice);
            cluster.step(next);
        }
        to_the_end(&mut cluster);
        let served = cluster.served();
        match &cluster.ended {
            Some(reason) => {
                let reason = reason.as_deref().unwrap_or_default();
                let named = cluster.lost.iter().any(|rank| reason.contains(&rank.to_string()));
                prop_assert!(named || reason.contains("waited"), "{}", reason);
            }
            None => {
                prop_assert!(served.iter().all(|served| *served == Served::Version(TARGET)), "{:?}", served);
                cluster.leave();
                prop_assert_eq!(&cluster.ended, &Some(None));
            }
        }
    }
}

#[test]
fn without_faults_every_version_is_committed_at_once() {
    for (relay, writers) in [(Relay::Never, 2), (Relay::PerHost, 6), (Relay::Chain, 6)] {
        let mut cluster = Cluster::new(relay, true, Verify::Off);
        to_the_end(&mut cluster);
        assert_eq!(cluster.served(), [Served::Version(TARGET); 4]);
        assert_eq!((cluster.writers(), cluster.aborts.len()), (writers, 0));
    }
}

#[test]
fn a_byte_that_became_another_aborts_the_attempt() {
    let rank = Rank::Receiver(ReceiverRank(2));
    for relay in [Relay::Never, Relay::PerHost, Relay::Chain] {
        let mut cluster = Cluster::new(relay, true, Verify::Full);
        go_on(&mut cluster, |_| true, |cluster| cluster.known_to_trainers() == TARGET);
        assert_eq!(cluster.aborts, [""; 0]);
        let mut cluster = Cluster::new(relay, true, Verify::Full);
        let flip = |cluster: &Cluster| {
            cluster.possible(TARGET).iter().any(|next| matches!(next, Next::Flip(at) if *at == rank))
        };
        while !flip(&cluster) {
            let calm = |next: &&Next| !next.is_fault() && !matches!(next, Next::Tick);
            let next = *cluster.possible(TARGET).iter().find(calm).unwrap();
            cluster.step(next);
        }
        cluster.step(Next::Flip(rank));
        to_the_end(&mut cluster);
        assert_eq!(cluster.aborts, ["inference 2: other bytes arrived"]);
        assert_eq!(cluster.served(), [Served::Version(TARGET); 4]);
    }
}

#[test]
fn an_attempt_waits_until_the_one_before_is_passed_on_no_more() {
    let relay = Rank::Receiver(ReceiverRank(0));
    let mut cluster = Cluster::new(Relay::PerHost, true, Verify::Off);
    // Nothing lands, so the rank goes on passing on until it is stopped; and it does not say so.
    let may =
        |next: &Next| !matches!(next, Next::Land(_)) && !matches!(next, Next::Report(rank) if *rank == relay);
    go_on(&mut cluster, may, |cluster| cluster.is_writing(relay));
    cluster.step(Next::Fail(Rank::Trainer(TrainerRank(0))));
    go_on(&mut cluster, may, |cluster| cluster.aborts.len() == 2);
    assert_eq!(cluster.aborts[0], "trainer 0: it failed");
    assert!(
        cluster.aborts[1].contains("waited 30s for inference 0 to stop passing on"),
        "{:?}",
        cluster.aborts
    );
    to_the_end(&mut cluster);
    assert_eq!(cluster.served(), [Served::Version(TARGET); 4]);
}

#[test]
fn where_ranks_cannot_pass_on_a_plan_with_relays_ends_the_job() {
    let mut cluster = Cluster::new(Relay::PerHost, false, Verify::Off);
    to_the_end(&mut cluster);
    let reason = cluster.ended.flatten().unwrap();
    assert!(reason.contains("pass bytes on, which they cannot do yet"), "{reason}");
    let mut cluster = Cluster::new(Relay::Never, false, Verify::Off);
    to_the_end(&mut cluster);
    assert_eq!(cluster.served(), [Served::Version(TARGET); 4]);
}
