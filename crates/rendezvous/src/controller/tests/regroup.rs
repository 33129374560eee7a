//! What a loss does to a job that goes on: who is told what, and who is waited for.

mod job;

use job::Job;
use proptest::prelude::*;

use super::*;

const T2: Rank = Rank::Trainer(TrainerRank(2));

const PLAN: &str = "a plan";
const START: &str = "a start";
const REGROUP: &str = "a call to join again";
const ABORT: &str = "an abort";
const REFUSED: &str = "a refusal";

#[test]
fn between_versions_everybody_joins_again_and_versions_go_on() {
    let mut job = Job::started(OnLoss::Wait);
    let committed = job.push(1);
    job.lose(I1);
    for member in [T0, T1, I0] {
        let reason = job.reason(member);
        assert!(
            reason.contains("inference 1 was lost between versions") && reason.contains("reset"),
            "{reason}"
        );
    }
    job.join(T0);
    job.join(T1);
    job.join_with(I0, Holds::Version(committed));
    assert_eq!((job.told(T0), job.told(I0)), (vec![], vec![]), "it is waited for");
    job.join_with(I1, Holds::Version(committed));
    let planned = job.plan(T0);
    assert_eq!((planned.committed, planned.behind, planned.on_loss), (Some(committed), vec![], OnLoss::Wait));
    job.join_connected(&[T0, T1, I0, I1]);
    job.push(2);
}

#[test]
fn while_trainers_write_the_attempt_is_aborted_first() {
    let mut job = Job::started(OnLoss::Wait);
    let push = job.write(1);
    job.lose(I1);
    for member in [T0, T1, I0] {
        assert_eq!(job.told(member), [ABORT, REGROUP]);
    }
    // What they say of it counts for nothing.
    job.say(T0, WRITTEN(push));
    job.join(T0);
    job.say(I0, ToController::Prepared { push });
    job.join_with(I0, Holds::Torn);
    job.join(T1);
    job.join(I1);
    assert_eq!(job.plan(T0).behind, [], "nothing is committed that they could not have");
    job.join_connected(&[T0, T1, I0, I1]);
    job.push(1);
}

#[test]
fn what_is_decided_is_recorded_although_all_inference_ranks_are_lost_meanwhile() {
    let mut job = Job::started(OnLoss::Wait);
    let push = job.written(1);
    job.forget();
    job.lose(I0);
    job.lose(I1);
    assert_eq!(job.told(T0), [""; 0], "it is not known yet how this ends");
    // The first is back before the record is there.
    job.join_with(I0, Holds::Undecided { attempt: Commit { version: 1, push }, serves: None });
    assert_eq!(job.told(I0), [""; 0]);
    job.event(Event::Recorded(Ok(())));
    for trainer in [T0, T1] {
        let told = job.messages(trainer);
        let [ToMember::Done { version: 1, unconfirmed, .. }, ToMember::Regroup { .. }] = &told[..] else {
            panic!("{told:?}")
        };
        assert_eq!(unconfirmed, &[I0, I1]);
        job.join(trainer);
    }
    job.join(I1);
    let planned = job.plan(I0);
    assert_eq!(planned.committed, Some(Commit { version: 1, push }));
    assert_eq!(
        planned.behind,
        [ReceiverRank(1)],
        "it has lost what it had, the other only missed the commit"
    );
}

#[test]
fn during_the_commit_the_others_confirm_it_before_all_join_again() {
    for lost in [I1, T1] {
        let mut job = Job::started(OnLoss::Wait);
        let Commit { push, .. } = job.commit(1);
        job.forget();
        job.lose(lost);
        assert_eq!((job.told(T0), job.told(I0)), (vec![], vec![]));
        job.say(I0, ToController::Committed { push });
        if lost != I1 {
            job.say(I1, ToController::Committed { push });
        }
        let told = job.messages(T0);
        let [ToMember::Done { unconfirmed, .. }, ToMember::Regroup { reason }] = &told[..] else {
            panic!("{told:?}")
        };
        assert_eq!(unconfirmed, if lost == I1 { &[I1][..] } else { &[] });
        assert!(
            reason.contains(&format!("{lost} was lost during version 1 (stage: committing)")),
            "{reason}"
        );
        assert_eq!(job.told(I0), [REGROUP]);
    }
}

#[test]
fn a_decision_that_cannot_be_recorded_is_told_to_nobody() {
    let mut job = Job::started(OnLoss::Continue);
    job.written(1);
    job.forget();
    job.event(Event::Recorded(Err("no space".into())));
    for member in [T0, T1, I0, I1] {
        assert_eq!(job.reason(member), "the commit of version 1 could not be recorded: no space");
    }
    assert!(job.controller.has_ended() && job.controller.committed() == 0);
}

#[test]
fn a_rank_that_is_only_silent_may_join_over_a_new_connection() {
    let mut job = Job::started(OnLoss::Wait);
    let silent = job.connections.remove(&I1).unwrap();
    job.pass(16);
    let told = job.told.remove(&silent).unwrap();
    assert!(
        matches!(&told[..], [ToMember::Regroup { reason }] if reason.contains("nothing was heard")),
        "{told:?}"
    );
    assert!(job.closed.contains(&silent));
    for member in [T0, T1, I0, I1] {
        job.join(member);
    }
    job.connect(&[I1, T0, T1, I0]);
    // One that says itself that it cannot go on is not waited for over a new connection.
    job.say(I1, ToController::Leave { reason: Some("no memory".into()) });
    assert!(job.reason(I1).contains("it gave up: no memory"));
}

#[test]
fn without_an_inference_rank_the_others_go_on_until_it_is_back() {
    let mut job = Job::started(OnLoss::Continue);
    let first = job.push(1);
    job.lose(I1);
    job.join(T0);
    job.join(T1);
    job.join_with(I0, Holds::Version(first));
    job.connect(&[T0, T1, I0]);
    let without = |report: &Report| matches!(report, Report::Planned { without, .. } if *without == [I1]);
    assert!(job.reports.iter().any(without), "{:?}", job.reports);
    let second = job.push(2);
    // It comes while a version is pushed: after that it takes part.
    let push = job.write(3);
    job.join_with(I1, Holds::Version(first));
    assert_eq!((job.told(I1), job.told(T0)), (vec![], vec![]));
    let failed = ToController::Failed { push, reason: "no".into(), fences: Vec::new() };
    job.say(T0, failed);
    let told = job.messages(T0);
    let [ToMember::Abort { .. }, ToMember::Regroup { reason }] = &told[..] else { panic!("{told:?}") };
    assert_eq!(reason, "inference 1 is back");
    assert_eq!(job.told(I1), [""; 0], "it has just joined");
    job.join(T0);
    job.join(T1);
    job.join_with(I0, Holds::Undecided { attempt: Commit { version: 3, push }, serves: Some(second) });
    let planned = job.plan(T0);
    assert_eq!((planned.committed, planned.behind), (Some(second), vec![ReceiverRank(1)]));
    assert!(planned.peers.iter().all(|peer| !peer.turned));
}

#[test]
fn without_a_trainer_others_push_what_it_had() {
    let mut job = Job::started_with(OnLoss::Continue, &[(0, 2), (0, 2)]);
    job.push(1);
    job.lose(T1);
    job.join(T0);
    job.join(I0);
    job.join(I1);
    job.connect(&[T0, I0, I1]);
    let push = job.write(2);
    // A rail at a rank that is not there is nothing to wait for.
    let Quota { bytes, writes } = job.controller.quotas[&T0];
    let fences = vec![Fence { at: ReceiverRank(7), rail: 0 }];
    job.say(T0, ToController::Written { push, bytes, writes, fences, sums: Vec::new() });
    assert_eq!(job.recording, Some(Commit { version: 2, push }));
}

#[test]
fn without_a_trainer_whose_pieces_nobody_has_no_version_comes_until_it_is_back() {
    let mut job = Job::started(OnLoss::Continue);
    job.lose(T1);
    job.forget();
    for member in [T0, I0, I1] {
        job.join(member);
    }
    job.pass(31);
    let reason = job.reason(T0);
    assert!(reason.contains("waited 30s for trainer 1 to join again (without: no plan"), "{reason}");
    // Inference ranks stay; nobody trains soon, so nobody is waited for.
    job.pass(100);
    assert_eq!((job.told(T0), job.told(I0)), (vec![], vec![]));
    job.join(T1);
    assert_eq!(job.told(T1), [""; 0]);
    job.join(T0);
    job.connect(&[T0, T1, I0, I1]);
    job.push(1);
}

#[test]
fn who_is_there_but_did_not_join_in_time_still_can() {
    let mut job = Job::started(OnLoss::Continue);
    job.lose(I1);
    for member in [T0, I0, I1] {
        job.join(member);
    }
    // Trainer 1 computes; without it there is no plan.
    job.pass(31);
    assert!(job.reason(T0).contains("waited 30s for trainer 1 to join again (without: no plan"));
    job.forget();
    job.join(T1);
    job.join(T0);
    job.connect(&[T0, T1, I0, I1]);
}

#[test]
fn of_two_trainers_that_are_lost_only_the_one_with_pieces_of_its_own_is_needed() {
    let mut job = Job::started_with(OnLoss::Continue, &[(0, 1), (1, 1), (0, 2)]);
    job.lose(T1);
    job.lose(T2);
    job.forget();
    for member in [T0, I0, I1] {
        job.join(member);
    }
    job.pass(31);
    assert!(job.reason(T0).contains("trainer 1, trainer 2 to join again"));
    job.join(T0);
    job.join(T1);
    job.pass(31);
    job.connect(&[T0, T1, I0, I1]);
}

#[test]
fn who_does_not_join_again_within_the_deadline_is_named_or_left_out() {
    let mut job = Job::started(OnLoss::Wait);
    job.lose(I1);
    job.forget();
    for member in [T0, T1, I0] {
        job.join(member);
    }
    job.pass(31);
    for trainer in [T0, T1] {
        let reason = job.reason(trainer);
        assert!(reason.contains("waited 30s for inference 1 to join again"), "{reason}");
    }
    assert!(!job.controller.has_ended());

    // This one is there, and busy.
    let mut job = Job::started(OnLoss::Continue);
    job.lose(I1);
    assert_eq!(job.told(I0), [REGROUP]);
    job.join(T0);
    job.join(T1);
    job.join(I1);
    job.pass(31);
    job.connect(&[T0, T1, I1]);
    // Another loss: it has been told already, and may be about to join with rails that it has opened since.
    job.lose(T1);
    assert_eq!(job.told(I0), [""; 0]);
    assert_eq!(job.told(T0), [REGROUP]);
    job.join(I0);
    for member in [T0, T1, I1] {
        job.join(member);
    }
    job.connect(&[T0, T1, I0, I1]);
}

#[test]
fn nothing_is_pushed_to_nobody() {
    let mut job = Job::started(OnLoss::Continue);
    job.lose(I1);
    job.forget();
    // The other inference rank is there, and does not join again.
    job.join(T0);
    job.join(T1);
    job.pass(31);
    assert!(job.reason(T0).contains("inference 0"), "a plan for trainers alone");
}

#[test]
fn the_next_controller_goes_on_from_the_record() {
    let last = Commit { version: 7, push: PushId([1; 16]) };
    let other = Commit { version: 8, push: PushId([2; 16]) };
    let mut job = Job::new(OnLoss::Continue, &[(0, 2), (0, 2)], Some(last));
    assert_eq!(job.controller.committed(), 7);
    job.join(T0);
    job.join_with(I0, Holds::Undecided { attempt: last, serves: None });
    job.join_with(I1, Holds::Undecided { attempt: other, serves: Some(last) });
    // Of the ranks that it has never seen one is missing.
    job.pass(31);
    let planned = job.plan(T0);
    assert_eq!((planned.committed, planned.behind), (Some(last), vec![]));
    let turned: Vec<_> = planned.peers.iter().filter(|peer| peer.turned).map(|peer| peer.member).collect();
    assert_eq!(turned, [I0], "it had missed the commit, the other's attempt came to nothing");
    job.join_connected(&[T0, I0, I1]);
    job.say(T0, ToController::Begin { version: 7 });
    assert!(job.reason(T0).contains("not newer"), "all have it");
    job.push(8);
}

#[test]
fn without_a_record_the_members_know() {
    let (old, last) = ([3, 4]).map(|version| Commit { version, push: PushId([version as u8; 16]) }).into();
    for order in [[I0, I1], [I1, I0]] {
        let mut job = Job::new(OnLoss::Wait, &[(0, 1), (1, 1)], None);
        for member in order {
            let holds = match member {
                I0 => Holds::Undecided { attempt: last, serves: Some(old) },
                _ => Holds::Version(last),
            };
            job.join_with(member, holds);
        }
        job.join(T0);
        job.join(T1);
        let planned = job.plan(T0);
        assert_eq!((planned.committed, planned.behind), (Some(last), vec![]));
        assert!(planned.peers.iter().all(|peer| peer.turned == (peer.member == I0)), "{:?}", planned.peers);
    }
}

#[test]
fn the_committed_version_is_pushed_again_for_those_who_have_not_got_it() {
    let last = Commit { version: 7, push: PushId([1; 16]) };
    let mut job = Job::new(OnLoss::Wait, &[(0, 1), (1, 1)], Some(last));
    job.join_with(I0, Holds::Version(last));
    for member in [T0, T1, I1] {
        job.join(member);
    }
    assert_eq!(job.plan(T0).behind, [ReceiverRank(1)]);
    job.join_connected(&[T0, T1, I0, I1]);
    let again = job.push(7);
    assert_ne!(again, last);
    job.say(T0, ToController::Begin { version: 7 });
    assert!(job.reason(T0).contains("not newer"));
}

#[test]
fn a_rank_with_a_newer_version_than_the_job_comes_too_late_to_be_believed() {
    let mut job = Job::started(OnLoss::Continue);
    job.lose(I1);
    for member in [T0, T1, I0] {
        job.join(member);
    }
    job.connect(&[T0, T1, I0]);
    job.write(1);
    job.join_with(I1, Holds::Version(Commit { version: 9, push: PushId([9; 16]) }));
    assert_eq!(job.reason(I1), "inference 1 has version 9, but this job has committed 0 only");
    assert_eq!(job.controller.committed(), 0);
}

#[test]
fn a_rank_that_comes_back_as_another_is_refused_and_waited_for() {
    let mut job = Job::started(OnLoss::Wait);
    job.lose(T1);
    for member in [T0, I0, I1] {
        job.join(member);
    }
    job.owned[1] = (0, 1);
    job.join(T1);
    assert!(job.reason(T1).contains("no plan"));
    job.connections.remove(&T1);
    job.owned[1] = (1, 1);
    job.join(T1);
    job.connect(&[T0, T1, I0, I1]);
}

#[test]
fn trainers_may_leave_while_others_join_again() {
    let mut job = Job::started(OnLoss::Wait);
    job.lose(I1);
    job.forget();
    // They have not heard of it yet.
    job.say(T0, ToController::Leave { reason: None });
    assert!(!job.controller.has_ended());
    job.say(T1, ToController::Leave { reason: None });
    assert_eq!(job.told(I0), ["a finish"]);
    assert!(matches!(job.reports.last(), Some(Report::Ended { reason: None })), "{:?}", job.reports);

    // Who comes back while they leave is told so too, and changes nothing.
    let mut job = Job::started_with(OnLoss::Continue, &[(0, 2), (0, 2), (0, 2)]);
    for lost in [I1, T2] {
        job.lose(lost);
    }
    for member in [T0, T1, I0] {
        job.join(member);
    }
    job.connect(&[T0, T1, I0]);
    job.say(T0, ToController::Leave { reason: None });
    job.join(I1);
    job.join(T2);
    assert_eq!((job.told(T1), job.told(I0)), (vec![], vec![]));
    job.say(T1, ToController::Leave { reason: None });
    assert_eq!(
        (job.told(I0), job.told(I1), job.told(T2)),
        (vec!["a finish"], vec!["a finish"], vec![REFUSED])
    );
    assert!(job.controller.has_ended());
}

/// The network was cut, and only the rank has noticed.
#[test]
fn a_session_that_comes_back_takes_the_place_of_its_old_connection() {
    for policy in [OnLoss::Wait, OnLoss::Continue] {
        let mut job = Job::started(policy);
        let committed = job.push(1);
        let old = job.connections.remove(&I1).unwrap();
        job.join_with(I1, Holds::Version(committed));
        assert!(job.closed.contains(&old));
        for member in [T0, T1, I0] {
            let reason = job.reason(member);
            assert!(reason.contains("inference 1 was lost between versions: it came back over"), "{reason}");
            job.join(member);
        }
        assert_eq!(job.plan(I1).committed, Some(committed));
        assert!(job.plan(T0).peers.iter().any(|peer| peer.member == I1));
        // What the old one still says counts for nothing.
        job.event(Event::Disconnected(old, "reset".into()));
        job.join_connected(&[T0, T1, I0, I1]);
        job.push(2);

        // Another process that was started as the same rank.
        let real = job.connections.remove(&I1).unwrap();
        let mut other = Join { world: job.config.world, ..join(I1) };
        other.session = SessionId([1; 16]);
        job.opened += 1;
        job.connections.insert(I1, ConnectionId(job.opened));
        job.say(I1, ToController::Join(Box::new(other)));
        assert!(job.reason(I1).contains("inference 1 has joined already"));
        job.connections.insert(I1, real);
        job.push(3);
    }
}

#[test]
fn a_job_that_fails_on_loss_regroups_for_nobody() {
    let mut job = Job::started(OnLoss::Fail);
    job.push(1);
    job.opened += 1;
    let late = ConnectionId(job.opened);
    let refused = job.connections.insert(I1, late).unwrap();
    job.join(I1);
    assert!(job.reason(I1).contains("inference 1 has joined already"));
    job.connections.insert(I1, refused);
    job.lose(I1);
    for member in [T0, T1, I0] {
        assert_eq!(job.told(member), [REFUSED]);
    }
    assert!(job.controller.has_ended());
}

proptest! {
    /// One rank after another is lost and comes back, some with another manifest; every plan is compared with one from scratch.
    #[test]
    fn who_comes_back_is_planned_with_as_if_for_the_first_time(
        turns in prop::collection::vec((0_usize..5, 0_u64..4, any::<bool>()), 1..12),
    ) {
        // Any one of the trainers can be done without.
        let mut job = Job::started_with(OnLoss::Continue, &[(0, 2), (0, 1), (0, 2)]);
        let all: Vec<Rank> = job.config.world.members().collect();
        for (turn, moved, pushes) in turns {
            let member = all[turn];
            job.lose(member);
            let others: Vec<Rank> = all.iter().copied().filter(|other| *other != member).collect();
            others.iter().for_each(|other| job.join(*other));
            job.connect(&others);
            if pushes {
                let version = job.controller.committed() + 1;
                job.push(version);
            }
            job.moved.insert(member, 8 * moved);
            job.forget();
            job.join(member);
            others.iter().for_each(|other| job.join(*other));
            job.connect(&all);
        }
    }
}
