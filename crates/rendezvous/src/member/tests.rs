//! Each half alone: what it refuses, and what survives an attempt that ends early.

use proptest::prelude::*;
use xfer_plan::{
    Op, ParamId, QuantPart, Rank, RankPlan, ReceiverManifest, ReceiverPart, ReceiverRank, RegionIndex,
    RelayPlan, Strided, TrainerManifest, TrainerRank, Transform,
};

use super::*;
use crate::Verify;
use crate::protocol::{Bank, Commit, Holds, Join, MemberManifest, OnLoss, PlannedPart, SessionId, World};

const P: PushId = PushId([1; 16]);
const Q: PushId = PushId([2; 16]);

fn join(member: Rank) -> Join {
    let (host, regions, rails) = ("host".to_owned(), Vec::new(), Vec::new());
    let manifest = match member {
        Rank::Trainer(_) => {
            MemberManifest::Trainer(TrainerManifest { host, regions, rails, pieces: Vec::new() })
        }
        Rank::Receiver(_) => {
            MemberManifest::Inference(ReceiverManifest { host, regions, rails, params: Vec::new() })
        }
    };
    let world = World { trainers: 1, inference: 1 };
    let deadline = std::time::Duration::from_secs(30);
    Join {
        job: "job".into(),
        member,
        world,
        deadline,
        manifest,
        endpoint: Vec::new(),
        holds: Holds::Nothing,
        stages: false,
        session: SessionId::default(),
    }
}

fn planned(part: PlannedPart) -> ToMember {
    planned_at(part, None)
}

/// In a job where this is committed.
fn planned_at(part: PlannedPart, committed: Option<Commit>) -> ToMember {
    let (digest, peers, verify) = (Digest([3; 32]), Vec::new(), Verify::Full);
    let (behind, on_loss) = (Vec::new(), OnLoss::Fail);
    let (bound_seconds, bytes_total) = (0.0, 0);
    ToMember::Planned(Box::new(Planned {
        digest,
        part,
        peers,
        bound_seconds,
        bytes_total,
        verify,
        committed,
        behind,
        on_loss,
    }))
}

fn for_trainer() -> ToMember {
    for_trainer_at(None)
}

fn for_trainer_at(committed: Option<Commit>) -> ToMember {
    planned_at(
        PlannedPart::Trainer {
            plan: RankPlan::default(),
            names: Default::default(),
            quant: QuantPart::default(),
        },
        committed,
    )
}

fn for_inference_at(committed: Option<Commit>) -> ToMember {
    let (part, relay, names) = (ReceiverPart::default(), RelayPlan::default(), Default::default());
    planned_at(PlannedPart::Inference { part, relay, names, inbound: Vec::new() }, committed)
}

fn regroup() -> ToMember {
    ToMember::Regroup { reason: "inference 1 is back".into() }
}

fn for_inference(relays: bool) -> ToMember {
    let mut relay = RelayPlan::default();
    if relays {
        let place = Strided { region: RegionIndex(0), offset: 0, stride: 1 };
        relay.plan.ops.push(Op {
            to: ReceiverRank(1),
            param: ParamId(0),
            row_bytes: 1,
            rows: 1,
            source: place,
            destination: place,
            gather: false,
            transform: Transform::Copy,
            rail: 0,
            wave: 0,
        });
    }
    let (part, names, inbound) = (ReceiverPart::default(), Default::default(), Vec::new());
    planned(PlannedPart::Inference { part, relay, names, inbound })
}

fn trainer() -> TrainerMember {
    let (mut member, _) = TrainerMember::join(join(Rank::Trainer(TrainerRank(0))));
    assert!(matches!(member.handle(for_trainer()), Ok(Some(TrainerStep::Connect(_)))));
    assert_eq!(member.ready(), Some(ToController::Ready { digest: Digest([3; 32]) }));
    assert!(matches!(member.handle(ToMember::Start), Ok(Some(TrainerStep::Started))));
    member
}

fn inference(relays: bool) -> InferenceMember {
    let (mut member, _) = InferenceMember::join(join(Rank::Receiver(ReceiverRank(0))), false);
    assert!(matches!(member.handle(for_inference(relays)), Ok(Some(InferenceStep::Planned(_)))));
    assert!(member.ready().is_some());
    assert!(matches!(member.handle(ToMember::Start), Ok(Some(InferenceStep::Started))));
    member
}

fn prepare(push: PushId, version: u64) -> ToMember {
    ToMember::Prepare { push, version, fence: Vec::new(), bank: Bank::default() }
}

fn abort(version: u64) -> ToMember {
    ToMember::Abort { version, reason: "no".into() }
}

fn prepared(relays: bool) -> InferenceMember {
    let mut member = inference(relays);
    assert!(matches!(member.handle(prepare(P, 1)), Ok(Some(InferenceStep::Prepare { .. }))));
    assert_eq!(member.served(), Served::Version(0));
    assert_eq!(member.prepared(Ok(())), Some(ToController::Prepared { push: P }));
    assert_eq!(member.served(), Served::Torn(1));
    member
}

#[test]
fn a_part_for_the_other_side_is_refused() {
    let (mut member, _) = TrainerMember::join(join(Rank::Trainer(TrainerRank(0))));
    assert_eq!(member.handle(for_inference(false)).unwrap_err().expected, "a trainer's part of the plan");
    let (mut member, _) = InferenceMember::join(join(Rank::Receiver(ReceiverRank(0))), false);
    assert_eq!(member.handle(for_trainer()).unwrap_err().found, "a trainer's");
}

#[test]
fn a_trainer_that_is_stopped_still_says_what_it_owes() {
    let mut member = trainer();
    assert_eq!(member.begin(1), Some(ToController::Begin { version: 1 }));
    assert_eq!(member.begin(2), None);
    assert!(
        member
            .handle(ToMember::Write { push: P, version: 2, bank: Bank::default(), told: Vec::new() })
            .is_err()
    );
    assert!(matches!(
        member.handle(ToMember::Write { push: P, version: 1, bank: Bank::default(), told: Vec::new() }),
        Ok(Some(TrainerStep::Write { .. }))
    ));
    assert!(matches!(member.handle(abort(1)), Ok(Some(TrainerStep::Stop { .. }))));
    assert_eq!(member.begin(1), None, "it still writes");
    let fences = vec![Fence { at: ReceiverRank(0), rail: 3 }];
    let said = member.written(Err("stopped".into()), fences.clone(), Vec::new());
    assert_eq!(said, Some(ToController::Failed { push: P, reason: "stopped".into(), fences }));
    assert_eq!(member.written(Ok((0, 0)), Vec::new(), Vec::new()), None, "once");
    assert!(member.begin(1).is_some());
}

#[test]
fn a_trainer_writes_for_the_attempt_that_it_measured_for() {
    let measure = |push, version| ToMember::Measure { push, version };
    let write = |push| ToMember::Write { push, version: 1, bank: Bank::default(), told: vec![2.0] };
    let mut member = trainer();
    assert!(member.handle(measure(P, 1)).is_err(), "it has not begun");
    member.begin(1);
    assert!(member.handle(measure(P, 2)).is_err());
    assert!(matches!(member.handle(measure(P, 1)), Ok(Some(TrainerStep::Measure { .. }))));
    assert_eq!(member.handle(write(P)).unwrap_err().expected, "its own measuring");
    let magnitudes = vec![1.0];
    assert_eq!(
        member.measured(Ok(magnitudes.clone())),
        Some(ToController::Magnitudes { push: P, magnitudes })
    );
    assert_eq!(member.measured(Ok(Vec::new())), None, "once");
    assert!(member.handle(write(Q)).is_err());
    let step = member.handle(write(P)).unwrap();
    assert!(matches!(step, Some(TrainerStep::Write { told, .. }) if told == [2.0]));
}

#[test]
fn an_attempt_that_ends_while_a_trainer_measures_is_owed_nothing() {
    for ended in [abort(1), regroup()] {
        let mut member = trainer();
        member.begin(1);
        member.handle(ToMember::Measure { push: P, version: 1 }).unwrap();
        let step = member.handle(ended).unwrap();
        assert!(matches!(step, Some(TrainerStep::Aborted { .. } | TrainerStep::Regroup { .. })));
        assert_eq!(member.measured(Ok(vec![1.0])), None);
        assert!(member.is_idle() != member.is_out() && !member.is_undecided());
    }
    let mut member = trainer();
    member.begin(1);
    member.handle(ToMember::Measure { push: P, version: 1 }).unwrap();
    let failed = ToController::Failed { push: P, reason: "no".into(), fences: Vec::new() };
    assert_eq!(member.measured(Err("no".into())), Some(failed));
    assert!(matches!(member.handle(abort(1)), Ok(Some(TrainerStep::Aborted { .. }))));
    assert!(member.begin(1).is_some());
}

#[test]
fn a_trainer_that_failed_is_not_told_of_a_commit() {
    let mut member = trainer();
    member.begin(1);
    member.handle(ToMember::Write { push: P, version: 1, bank: Bank::default(), told: Vec::new() }).unwrap();
    member.written(Err("no".into()), Vec::new(), Vec::new());
    let done = ToMember::Done { push: P, version: 1, unconfirmed: Vec::new() };
    assert_eq!(
        member.handle(done).unwrap_err(),
        Unexpected { expected: "the end of the failed push", found: "a done" }
    );
    assert!(matches!(member.handle(abort(1)), Ok(Some(TrainerStep::Aborted { version: 1, .. }))));
}

#[test]
fn a_commit_of_another_attempt_changes_nothing() {
    let mut member = prepared(false);
    assert!(matches!(member.handle(ToMember::Commit { push: Q, version: 2 }), Ok(None)));
    assert_eq!(member.served(), Served::Torn(1));
    assert!(matches!(
        member.handle(ToMember::Commit { push: P, version: 1 }),
        Ok(Some(InferenceStep::Commit { .. }))
    ));
    assert!(member.handle(abort(1)).is_err(), "it is decided, and this rank has not answered");
    assert_eq!(member.committed(), Some(ToController::Committed { push: P }));
    assert_eq!((member.served(), member.committed_version()), (Served::Version(1), 1));
}

#[test]
fn rails_that_do_not_close_fail_the_attempt_and_tear_nothing() {
    let mut member = inference(true);
    member.handle(prepare(P, 1)).unwrap();
    let failed = ToController::Failed { push: P, reason: "stuck".into(), fences: Vec::new() };
    assert_eq!(member.prepared(Err("stuck".into())), Some(failed));
    assert_eq!(member.served(), Served::Version(0));
    assert_eq!(member.relayed(Ok((0, 0)), Vec::new(), Vec::new()), None, "it passed nothing on");
    assert!(matches!(member.handle(abort(1)), Ok(Some(InferenceStep::Aborted { .. }))));
    assert!(member.handle(prepare(Q, 1)).is_ok());
}

#[test]
fn what_is_passed_on_ends_before_the_next_attempt() {
    let mut member = prepared(true);
    assert!(matches!(member.handle(abort(1)), Ok(Some(InferenceStep::Aborted { .. }))));
    assert_eq!(member.handle(prepare(Q, 1)).unwrap_err().expected, "the end of the push");
    let fences = vec![Fence { at: ReceiverRank(1), rail: 0 }];
    let failed = ToController::Failed { push: P, reason: "stopped".into(), fences: fences.clone() };
    assert_eq!(member.relayed(Err("stopped".into()), fences, Vec::new()), Some(failed));
    assert!(member.handle(prepare(Q, 1)).is_ok());
}

/// Up to the moment that it has written version 1.
fn written() -> TrainerMember {
    let mut member = trainer();
    member.begin(1);
    member.handle(ToMember::Write { push: P, version: 1, bank: Bank::default(), told: Vec::new() }).unwrap();
    member.written(Ok((0, 0)), Vec::new(), Vec::new());
    member
}

#[test]
fn a_trainer_that_was_given_up_learns_how_its_attempt_ended() {
    let commit = |version, push| Some(Commit { version, push });
    // The same version in another attempt is that version; a newer one says nothing of it.
    let ends = [(commit(1, P), Some(1)), (commit(1, Q), Some(1)), (commit(2, Q), None), (None, None)];
    for (committed, missed) in ends {
        let mut member = written();
        assert!(matches!(member.handle(regroup()), Ok(Some(TrainerStep::Regroup { .. }))));
        assert!(member.is_undecided() && member.is_out());
        member.rejoin(join(Rank::Trainer(TrainerRank(0))));
        // Nobody else joins in time: that is not the end of the attempt.
        member.handle(abort(0)).unwrap();
        assert!(member.is_undecided());
        member.rejoin(join(Rank::Trainer(TrainerRank(0))));
        member.handle(for_trainer_at(committed)).unwrap();
        assert!(!member.is_undecided());
        assert_eq!((member.take_missed_commit(), member.take_missed_commit()), (missed, None));
    }
}

#[test]
fn a_trainer_that_was_given_up_while_it_wrote_stops_first() {
    for told_before in [false, true] {
        let mut member = trainer();
        member.begin(1);
        member
            .handle(ToMember::Write { push: P, version: 1, bank: Bank::default(), told: Vec::new() })
            .unwrap();
        if told_before {
            assert!(matches!(member.handle(abort(1)), Ok(Some(TrainerStep::Stop { .. }))));
            assert!(matches!(member.handle(regroup()), Ok(None)));
        } else {
            assert!(matches!(member.handle(regroup()), Ok(Some(TrainerStep::Stop { .. }))));
        }
        assert!(!member.is_out());
        let failed = ToController::Failed { push: P, reason: "stopped".into(), fences: Vec::new() };
        assert_eq!(member.written(Err("stopped".into()), Vec::new(), Vec::new()), Some(failed));
        assert!(member.is_out() && !member.is_undecided());
    }
}

/// What an inference rank says that it has when it joins again.
fn holds(member: &mut InferenceMember) -> Holds {
    match member.rejoin(join(Rank::Receiver(ReceiverRank(0)))) {
        ToController::Join(join) => join.holds,
        other => panic!("{other:?}"),
    }
}

/// One that serves version 1 and is prepared for version 2.
fn prepared_again(stages: bool) -> InferenceMember {
    let mut member = InferenceMember::new(stages);
    assert_eq!(holds(&mut member), Holds::Nothing);
    member.handle(for_inference_at(None)).unwrap();
    member.ready();
    member.handle(ToMember::Start).unwrap();
    for (push, version) in [(P, 1), (Q, 2)] {
        member.handle(prepare(push, version)).unwrap();
        member.prepared(Ok(()));
        if version == 1 {
            member.handle(ToMember::Commit { push, version }).unwrap();
            member.committed();
        }
    }
    member
}

#[test]
fn a_rank_that_has_not_heard_the_end_of_an_attempt_serves_what_it_can_until_it_joins_again() {
    let (first, second) = (Commit { version: 1, push: P }, Commit { version: 2, push: Q });
    for stages in [false, true] {
        let (served, serves) =
            if stages { (Served::Version(1), Some(first)) } else { (Served::Torn(2), None) };
        // It was the commit; it came to nothing; or others did the same again without this rank.
        let again = Commit { version: 2, push: P };
        let ends = [(second, Served::Version(2)), (first, served), (again, served)];
        for (committed, after) in ends {
            let mut member = prepared_again(stages);
            assert_eq!(member.served(), served);
            assert_eq!(holds(&mut member), Holds::Undecided { attempt: second, serves });
            // The connection is lost again before it learns anything.
            assert_eq!(holds(&mut member), Holds::Undecided { attempt: second, serves });
            member.handle(for_inference_at(Some(committed))).unwrap();
            assert_eq!((member.served(), member.committed_version()), (after, committed.version));
            let missed = committed == second;
            assert_eq!(member.take_missed_commit(), missed.then_some(2));
            member.ready();
            member.handle(ToMember::Start).unwrap();
            let step = member.handle(prepare(PushId([3; 16]), 3)).unwrap();
            let Some(InferenceStep::Prepare { bank, own, .. }) = step else { panic!("{step:?}") };
            assert_eq!((bank.index(), own.index()), (0, usize::from(missed)), "its arenas changed places");
        }
    }
}

#[test]
fn a_rank_that_comes_to_a_job_serves_nothing_before_it_has_what_others_have() {
    let committed = Commit { version: 5, push: P };
    for stages in [false, true] {
        let mut member = InferenceMember::new(stages);
        holds(&mut member);
        member.handle(for_inference_at(Some(committed))).unwrap();
        assert_eq!(member.served(), Served::Behind(5));
        assert_eq!(holds(&mut member), Holds::Nothing);
        assert!(matches!(member.handle(regroup()), Ok(Some(InferenceStep::Regroup { .. }))));
        // All trainers leave before there is another plan.
        assert!(matches!(member.handle(ToMember::Finished), Ok(Some(InferenceStep::Finished))));
    }
}

#[test]
fn a_message_has_the_bytes_of_its_frame() {
    for message in [prepare(P, u64::MAX), for_inference(true), abort(1), ToMember::Heartbeat] {
        assert_eq!(message.encoded_bytes(), postcard::to_stdvec(&message).unwrap().len() as u64);
    }
    let message = ToController::Join(Box::new(join(Rank::Trainer(TrainerRank(0)))));
    assert_eq!(message.encoded_bytes(), postcard::to_stdvec(&message).unwrap().len() as u64);
}

fn message(number: u8) -> ToMember {
    let push = if number.is_multiple_of(2) { P } else { Q };
    let version = u64::from(number % 3);
    match number / 8 {
        0 => for_trainer(),
        1 => for_inference(number.is_multiple_of(2)),
        2 => ToMember::Start,
        3 => prepare(push, version),
        4 => ToMember::Fence { push, rails: vec![0] },
        5 => ToMember::Write { push, version, bank: Bank::default(), told: Vec::new() },
        6 => ToMember::Commit { push, version },
        7 => ToMember::Done { push, version, unconfirmed: Vec::new() },
        8 => abort(version),
        9 => ToMember::Finished,
        10 => ToMember::Verify { push, sums: Vec::new() },
        11 => ToMember::Measure { push, version },
        _ => ToMember::Heartbeat,
    }
}

proptest! {
    /// Whatever comes, and whatever the driver answers: no panic, a version is served only after its commit, and every attempt
    /// is reported once.
    #[test]
    fn no_order_of_messages_is_half_obeyed(events in prop::collection::vec((0u8..104, any::<bool>()), 0..60)) {
        let (mut trains, mut serves) = (trainer(), prepared(true));
        // The relay of `prepared` is under way.
        let (mut owed, mut reports) = (1, 0);
        for (number, well) in events {
            let result = || if well { Ok((0, 0)) } else { Err("no".to_owned()) };
            let closed = if well { Ok(()) } else { Err("no".to_owned()) };
            let asked = matches!(trains.handle(message(number)), Ok(Some(TrainerStep::Measure { .. })));
            let measured = if well { Ok(vec![1.0]) } else { Err("no".to_owned()) };
            prop_assert_eq!(trains.measured(measured).is_some(), asked);
            trains.begin(u64::from(number));
            trains.written(result(), Vec::new(), Vec::new());
            let committed = serves.committed_version();
            match serves.handle(message(number)) {
                Ok(Some(InferenceStep::Prepare { version, .. })) => {
                    prop_assert_eq!(owed, reports, "prepared while it passes on");
                    prop_assert!(serves.prepared(closed.clone()).is_some());
                    if well {
                        owed += 1;
                        prop_assert_eq!(serves.served(), Served::Torn(version));
                    }
                }
                Ok(Some(InferenceStep::Fence { .. })) => prop_assert!(serves.fenced(closed).is_some()),
                Ok(Some(InferenceStep::Verify { version, .. })) => {
                    prop_assert_eq!(serves.served(), Served::Torn(version));
                    prop_assert!(serves.handle(ToMember::Finished).is_err(), "it owes an answer");
                    prop_assert!(serves.verified(closed).is_some());
                    prop_assert_eq!(serves.served(), Served::Torn(version));
                }
                Ok(Some(InferenceStep::Commit { version, .. })) => {
                    prop_assert_eq!(serves.served(), Served::Torn(version));
                    prop_assert!(serves.committed().is_some());
                    prop_assert_eq!(serves.served(), Served::Version(version));
                }
                _ => prop_assert_eq!(serves.committed_version(), committed),
            }
            if well {
                reports += usize::from(serves.relayed(result(), Vec::new(), Vec::new()).is_some());
            }
            prop_assert!(reports <= owed);
        }
    }
}
