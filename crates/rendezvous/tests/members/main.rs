//! The controller and the members' halves of the protocol against each other, in any order of events: relays, inference ranks
//! that stage versions and such that do not, ranks and controllers that are lost and come back.

mod cluster;
mod examples;
mod job;
mod ledger;
mod link;
mod memory;
mod network;
mod next;
mod process;
mod steps;

use cluster::Cluster;
use job::{Setup, WORLD};
use next::Next;
use proptest::prelude::*;
use rendezvous::member::Served;
use rendezvous::{OnLoss, Verify};
use xfer_plan::{Rank, Relay};

use crate::job::{TARGET, is_trainer};

/// Steps after the last fault within which every run must end.
const STEPS_MAX: usize = 20_000;

/// How often faults happen in a run.
struct Pace {
    /// A step in this many is a fault, where one is possible.
    fault: u32,
    /// And one in this many a loss: of a rank, or of the controller.
    loss: u32,
    losses_max: usize,
    /// One in this many brings somebody back.
    recovery: u32,
    /// And one in this many passes the time that a stage has, so that others go on without who is lost.
    pass: u32,
}

const FAILS: Pace = Pace { fault: 12, loss: 96, losses_max: 2, recovery: u32::MAX, pass: u32::MAX };

const REGROUPS: Pace = Pace { fault: 25, loss: 120, losses_max: 10, recovery: 15, pass: 60 };

/// Picks by `choice` among what can happen, now and then a fault.
fn pick(cluster: &Cluster, choice: u32) -> Next {
    let Pace { fault, loss, losses_max, recovery, pass } = if cluster.regroups() { REGROUPS } else { FAILS };
    let losses = choice.is_multiple_of(loss) && cluster.losses < losses_max;
    let faults = choice.is_multiple_of(fault) && !losses;
    let (recoveries, passes) = (choice % recovery == 1, choice % pass == 2);
    let fits = |next: &Next| match next {
        Next::Pass => passes,
        next if next.is_loss() => losses,
        next if next.is_fault() => faults,
        next if next.is_recovery() => recoveries,
        _ => !losses && !faults && !recoveries && !passes,
    };
    let fitting: Vec<Next> = cluster.possible().into_iter().filter(fits).collect();
    let place = (choice / fault) as usize;
    fitting.get(place % fitting.len().max(1)).copied().unwrap_or(Next::Tick)
}

/// Goes on without faults, in whatever order of what `may` be, until `done`. Time passes where nothing else can happen.
fn go_on(cluster: &mut Cluster, may: impl Fn(&Next) -> bool, done: impl Fn(&Cluster) -> bool) {
    let mut choice = 1_u64;
    for _ in 0..STEPS_MAX {
        choice = choice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let calm = |next: &Next| !next.is_fault() && !matches!(next, Next::Tick) && may(next);
        let calm: Vec<Next> = cluster.possible().into_iter().filter(calm).collect();
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
    let done = |cluster: &Cluster| cluster.ended.is_some() || cluster.is_at_the_target();
    go_on(cluster, |_| true, done);
}

fn relays() -> impl Strategy<Value = Relay> {
    prop_oneof![Just(Relay::Never), Just(Relay::PerHost), Just(Relay::Chain)]
}

fn verify() -> impl Strategy<Value = Verify> {
    prop_oneof![Just(Verify::Off), Just(Verify::Sampled(0.5)), Just(Verify::Full)]
}

prop_compose! {
    fn setups(regroup: bool)(
        relay in relays(),
        verify in verify(),
        stages in 0_u8..1 << WORLD.inference,
        (replicated, quantised, records, repeats, goes_on) in any::<(bool, bool, bool, bool, bool)>(),
        lost in 0..3 * WORLD.members().count(),
    ) -> Setup {
        let on_loss = match (regroup, goes_on) {
            (false, _) => OnLoss::Fail,
            (true, false) => OnLoss::Wait,
            (true, true) => OnLoss::Continue,
        };
        // What only one trainer has is missing without it.
        let may_go = |rank: &Rank| on_loss == OnLoss::Continue && (replicated || !is_trainer(*rank));
        let forever = WORLD.members().nth(lost).filter(may_go);
        Setup { relay, verify, on_loss, stages, replicated, quantised, records: records || forever.is_some(), repeats, forever }
    }
}

proptest! {
    /// What the cluster itself asserts at every step: an inference rank that says it serves a version has all bytes of one
    /// attempt that was committed as that version, in the arena that it serves, and no write lands there; one that stages
    /// is never torn. What is decided upon is everywhere, and nothing is on its way that could change it. None of the
    /// bytes of another attempt is counted by a rank that passes it on. What trainers are told of an attempt is so.
    ///
    /// And here: every run ends with everybody on the last version, or with a reason that names who was lost or waited for.
    #[test]
    fn every_order_of_events_ends_well_or_by_name(
        setup in setups(false), choices in prop::collection::vec(any::<u32>(), 0..600),
    ) {
        let mut cluster = Cluster::new(setup);
        for choice in choices {
            let next = pick(&cluster, choice);
            cluster.step(next);
        }
        to_the_end(&mut cluster);
        match &cluster.ended {
            Some(reason) => {
                let reason = reason.as_deref().unwrap_or_default();
                let named = cluster.lost.iter().any(|rank| reason.contains(&rank.to_string()));
                prop_assert!(named || reason.contains("waited"), "{}", reason);
            }
            None => {
                prop_assert!(cluster.is_at_the_target());
                cluster.leave();
                prop_assert_eq!(&cluster.ended, &Some(None));
            }
        }
    }

    /// The same of jobs that go on after a loss. Ranks die, are cut off or stopped, and come back; controllers die and
    /// another goes on from the record, or from what members know. What is committed stays so where there is a record. And
    /// every run ends with everybody on the last version, or, with a rank that never comes back, all others.
    #[test]
    fn a_job_that_regroups_comes_to_its_target(
        setup in setups(true), choices in prop::collection::vec(any::<u32>(), 0..2500),
    ) {
        let mut cluster = Cluster::new(setup);
        for choice in choices {
            let next = pick(&cluster, choice);
            cluster.step(next);
        }
        to_the_end(&mut cluster);
        while let Some(late) = cluster.possible().into_iter().find(|next| matches!(next, Next::LandLate(_))) {
            cluster.step(late);
        }
        let served = cluster.served();
        prop_assert!(served.iter().all(|served| *served == Served::Version(TARGET)), "{:?}", served);
        cluster.leave();
        prop_assert_eq!(&cluster.ended, &Some(None));
    }
}
