//! A version is committed only where every inference rank found what was sent.

use super::*;
use crate::protocol::PlannedPart;
use crate::verify::{Checksum, ParamSum};
use xfer_plan::{Inbound, ParamId};

const W: ParamId = ParamId(0);

fn written(push: PushId, sums: &[u128]) -> ToController {
    let sum = |sum: &u128| ParamSum { to: ReceiverRank(0), param: W, sum: Checksum::from(*sum) };
    let sums = sums.iter().map(sum).collect();
    ToController::Written { push, bytes: 8, writes: 1, fences: Vec::new(), sums }
}

/// All has been written.
fn to_verifying(bench: &mut Bench) -> PushId {
    let push = bench.begin_to_writing(1);
    bench.say(T0, written(push, &[u128::MAX]));
    bench.say(T1, written(push, &[8]));
    push
}

#[test]
fn what_was_sent_is_added_up_and_compared_before_the_commit() {
    let mut bench = Bench::verifying(Verify::Full);
    let push = to_verifying(&mut bench);
    assert_eq!(bench.controller.committed(), 0);
    let sums = vec![(W, Checksum::from(7))];
    assert_eq!(bench.told(I0).last(), Some(&ToMember::Verify { push, sums }));
    bench.say(I0, ToController::Verified { push });
    assert_eq!(bench.controller.committed(), 1);
    assert_eq!(bench.told(I0).last(), Some(&ToMember::Commit { push, version: 1 }));
}

#[test]
fn what_arrived_as_something_else_is_no_commit_and_nothing_of_it_counts_for_the_next() {
    let mut bench = Bench::verifying(Verify::Full);
    let push = to_verifying(&mut bench);
    let reason = "other bytes in w".to_owned();
    bench.say(I0, ToController::Failed { push, reason, fences: Vec::new() });
    assert_eq!(bench.reason(T0), "inference 0: other bytes in w");
    assert_eq!(bench.controller.committed(), 0);
    let again = to_verifying(&mut bench);
    bench.say(I0, ToController::Verified { push });
    assert_eq!(bench.controller.committed(), 0, "an answer to the attempt before");
    let sums = vec![(W, Checksum::from(7))];
    assert_eq!(bench.told(I0).last(), Some(&ToMember::Verify { push: again, sums }));
    bench.say(I0, ToController::Verified { push: again });
    assert_eq!(bench.controller.committed(), 1);
}

#[test]
fn rails_are_closed_before_anything_is_compared() {
    let mut bench = Bench::verifying(Verify::Full);
    let push = bench.begin_to_writing(1);
    bench.say(T0, FENCED(push));
    bench.say(T1, written(push, &[1]));
    assert_eq!(bench.told(I0).last(), Some(&ToMember::Fence { push, rails: vec![3] }));
    bench.say(I0, ToController::Fenced { push });
    assert!(matches!(bench.told(I0).last(), Some(ToMember::Verify { .. })));
    assert_eq!(bench.controller.committed(), 0);
}

#[test]
fn who_compares_has_as_long_as_it_makes_progress() {
    let mut bench = Bench::verifying(Verify::Full);
    to_verifying(&mut bench);
    for progress in 1..100 {
        bench.pass(1, &[T0, T1]);
        bench.say(I0, ToController::Heartbeat { progress });
    }
    assert!(matches!(bench.told(I0).last(), Some(ToMember::Verify { .. })));
    // The first heartbeat is another number, which is progress.
    bench.pass(32, &[T0, T1, I0]);
    let reason = bench.reason(T0);
    assert!(reason.contains("waited 30s for inference 0 to compare"), "{reason}");
}

#[test]
fn more_checksums_than_the_plan_has_are_refused() {
    for (verify, sums) in [(Verify::Off, vec![1]), (Verify::Full, vec![1, 2])] {
        let mut bench = Bench::verifying(verify);
        let push = bench.begin_to_writing(1);
        bench.say(T0, written(push, &sums));
        let reason = bench.reason(T1);
        assert!(reason.contains("trainer 0 was lost") && reason.contains("checksums"), "{reason}");
    }
}

#[test]
fn inference_ranks_are_told_what_arrives_where_it_is_verified() {
    for verify in [Verify::Off, Verify::Sampled(0.5)] {
        let mut bench = Bench::new(verify);
        for member in world().members() {
            bench.say(member, ToController::Join(Box::new(join(member))));
        }
        let ToMember::Planned(planned) = &bench.told(I0)[0] else { panic!("no plan") };
        let PlannedPart::Inference { inbound, names, .. } = &planned.part else { panic!("a trainer's part") };
        assert_eq!(planned.verify, verify);
        let mut places: Vec<u64> =
            inbound.iter().map(|arrives: &Inbound| arrives.destination.offset).collect();
        places.sort_unstable();
        if verify.is_on() {
            assert_eq!((places, names.get(&W).map(String::as_str)), (vec![0, 8], Some("w")));
        } else {
            assert!(places.is_empty() && names.is_empty());
        }
    }
}

#[test]
fn a_part_that_is_no_probability_is_refused() {
    for part in [0.0, -1.0, 1.1, f64::NAN] {
        let config =
            ControllerConfig { verify: Verify::Sampled(part), ..Bench::new(Verify::Off).controller.config };
        assert!(Controller::new(config).is_err_and(|reason| reason.contains("cannot be verified")));
    }
}
