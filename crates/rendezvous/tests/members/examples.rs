//! Single runs: what the properties found, and what has to be seen once to be believed.

use rendezvous::Verify;
use rendezvous::member::Served;
use xfer_plan::{Rank, ReceiverRank, Relay, TrainerRank};

use crate::cluster::Cluster;
use crate::job::{Setup, TARGET};
use crate::next::Next;
use crate::{go_on, to_the_end};

#[test]
fn without_faults_every_version_is_committed_at_once() {
    for (relay, writers) in [(Relay::Never, 2), (Relay::PerHost, 6), (Relay::Chain, 6)] {
        let mut cluster = Cluster::new(Setup { relay, ..Setup::default() });
        to_the_end(&mut cluster);
        assert_eq!(cluster.served(), [Served::Version(TARGET); 4]);
        assert_eq!((cluster.writers(), cluster.aborts.len()), (writers, 0));
    }
}

#[test]
fn nobody_writes_before_all_who_share_a_block_have_measured_it() {
    let trainers = [0, 1].map(|rank| Rank::Trainer(TrainerRank(rank)));
    let mut cluster = Cluster::new(Setup { quantised: true, ..Setup::default() });
    let late = |next: &Next| !matches!(next, Next::Measured(rank) if *rank == trainers[1]);
    go_on(&mut cluster, late, |cluster| cluster.aborts.len() == 1);
    assert!(cluster.aborts[0].contains("waited 30s for trainer 1 to measure"), "{:?}", cluster.aborts);
    assert!(!trainers.iter().any(|rank| cluster.is_writing(*rank)));
    // Nobody was told to stop serving.
    assert_eq!(cluster.served(), [Served::Version(0); 4]);
    to_the_end(&mut cluster);
    assert_eq!(cluster.served(), [Served::Version(TARGET); 4]);
    // Where everybody has all of a block, nobody measures for others.
    let mut cluster = Cluster::new(Setup { quantised: true, replicated: true, ..Setup::default() });
    go_on(&mut cluster, |next| !matches!(next, Next::Measured(_)), Cluster::is_at_the_target);
}

#[test]
fn a_byte_that_became_another_aborts_the_attempt() {
    let rank = Rank::Receiver(ReceiverRank(2));
    let jobs = [
        (Relay::Never, 0, false),
        (Relay::PerHost, 15, false),
        (Relay::Chain, 0, false),
        (Relay::Never, 0, true),
        (Relay::Chain, 15, true),
    ];
    for (relay, stages, quantised) in jobs {
        let setup = Setup { relay, stages, quantised, verify: Verify::Full, ..Setup::default() };
        let mut cluster = Cluster::new(setup.clone());
        to_the_end(&mut cluster);
        assert_eq!(cluster.aborts, [""; 0]);
        let mut cluster = Cluster::new(setup);
        // Where something of the attempt has arrived, so that it is not written again.
        let arrived = |cluster: &mut Cluster| {
            let process = cluster.process(rank);
            process.flip_would_be_found() && process.memory.written().iter().any(Option::is_some)
        };
        while !arrived(&mut cluster) {
            let calm = |next: &&Next| !next.is_fault() && !matches!(next, Next::Tick);
            let next = *cluster.possible().iter().find(calm).unwrap();
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
    let mut cluster = Cluster::new(Setup { relay: Relay::PerHost, ..Setup::default() });
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
