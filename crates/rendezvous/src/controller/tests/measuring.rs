//! Nobody is told to stop or to write before everyone who shares a quantised block has measured its part.

use super::*;
use crate::protocol::PlannedPart;
use xfer_plan::{BlockQuant, ScaleFormat};

/// Two trainers with a row each of a tensor that is quantised in two blocks, which each has half of.
pub(super) fn quantised(member: Rank) -> Join {
    let quant = BlockQuant { block: [2, 4], scales: ScaleFormat::F32 };
    let mut join = join(member);
    match &mut join.manifest {
        MemberManifest::Trainer(TrainerManifest { regions, pieces, .. }) => {
            regions[0] = 16;
            pieces[0].dtype = DType::BF16;
        }
        MemberManifest::Inference(ReceiverManifest { regions, params, .. }) => {
            regions[0] = 24;
            let map = |map: ParamMap| std::sync::Arc::new(map);
            let codes = DestinationParam {
                dtype: DType::F8E4M3,
                map: map(ParamMap::tensor("w").quantize(quant)),
                ..params[0].clone()
            };
            let scales = DestinationParam {
                name: "w_scales".into(),
                dtype: DType::F32,
                shape: vec![1, 2],
                offset: 16,
                map: map(ParamMap::tensor("w").scales(quant)),
                ..codes.clone()
            };
            *params = vec![codes, scales];
        }
    }
    join
}

/// All have joined, and both trainers have begun version 1.
fn begun() -> (Bench, PushId) {
    let mut bench = Bench { join: quantised, ..Bench::new(Verify::Off) }.start();
    let push = begin(&mut bench);
    (bench, push)
}

fn begin(bench: &mut Bench) -> PushId {
    bench.say(T0, ToController::Begin { version: 1 });
    bench.say(T1, ToController::Begin { version: 1 });
    bench.push_id()
}

fn found(push: PushId, magnitudes: &[f32]) -> ToController {
    ToController::Magnitudes { push, magnitudes: magnitudes.to_vec() }
}

#[test]
fn each_is_told_the_largest_of_what_all_have_found() {
    let (mut bench, push) = begun();
    assert_eq!(bench.told(T1), [ToMember::Measure { push, version: 1 }]);
    bench.say(T0, found(push, &[1.0, 4.0]));
    assert_eq!(bench.told(I0), [], "it serves while trainers measure");
    bench.say(T1, found(push, &[2.0, 3.0]));
    assert!(matches!(bench.told(I0)[..], [ToMember::Prepare { .. }]));
    assert_eq!(bench.told(T0).len(), 1);
    bench.say(I0, ToController::Prepared { push });
    let write = ToMember::Write { push, version: 1, bank: Bank::default(), told: vec![2.0, 4.0] };
    for trainer in [T0, T1] {
        assert_eq!(bench.told(trainer).last(), Some(&write));
    }
}

#[test]
fn what_was_found_in_one_attempt_counts_for_no_other() {
    let (mut bench, first) = begun();
    bench.say(T0, found(first, &[9.0, 9.0]));
    bench.say(T1, ToController::Failed { push: first, reason: "no".into(), fences: Vec::new() });
    assert_eq!(bench.reason(T0), "trainer 1: no");
    assert_eq!(bench.told(I0), [], "nothing of it was torn");
    let push = begin(&mut bench);
    bench.say(T1, found(first, &[9.0, 9.0]));
    bench.say(T1, found(push, &[1.0, 1.0]));
    assert_eq!(bench.told(I0), []);
    bench.say(T0, found(push, &[0.0, 2.0]));
    bench.say(I0, ToController::Prepared { push });
    let write = ToMember::Write { push, version: 1, bank: Bank::default(), told: vec![1.0, 2.0] };
    assert_eq!(bench.told(T0).last(), Some(&write));
}

#[test]
fn who_reports_what_cannot_be_is_lost_and_named() {
    let wrong: [(&[f32], &str); 4] = [
        (&[1.0], "reports 1 magnitudes where the plan has 2"),
        (&[1.0; 3], "reports 3 magnitudes where the plan has 2"),
        (&[1.0, f32::NAN], "reports NaN as magnitude 1"),
        (&[-1.0, 1.0], "reports -1 as magnitude 0"),
    ];
    for (magnitudes, expected) in wrong {
        let (mut bench, push) = begun();
        bench.say(T0, found(push, magnitudes));
        let reason = bench.reason(T1);
        assert!(reason.starts_with("trainer 0 was lost during version 1 (stage: measuring)"), "{reason}");
        assert!(reason.contains(expected), "{reason}");
    }
    // Twice, or by who has nothing to measure.
    let (mut bench, push) = begun();
    bench.say(T0, found(push, &[1.0, 1.0]));
    bench.say(T0, found(push, &[1.0, 1.0]));
    assert!(bench.reason(T1).contains("a second time"));
    let (mut bench, push) = begun();
    bench.say(I0, found(push, &[]));
    assert!(bench.reason(T1).contains("inference 0 was lost"));
    let mut bench = Bench::started();
    let push = begin(&mut bench);
    bench.say(T0, found(push, &[]));
    assert!(bench.reason(T1).contains("nothing for it to measure"));
}

#[test]
fn who_does_not_measure_is_waited_for_as_long_as_any_stage() {
    let (mut bench, push) = begun();
    bench.say(T0, found(push, &[1.0, 1.0]));
    bench.pass(32, &[T0, T1, I0]);
    let reason = bench.reason(T0);
    assert!(reason.contains("waited 30s for trainer 1 to measure"), "{reason}");
    let (mut bench, _) = begun();
    bench.event(Event::Disconnected(connection(T1), "reset".into()));
    let reason = bench.reason(T0);
    assert!(reason.contains("trainer 1 was lost during version 1 (stage: measuring)"), "{reason}");
}

#[test]
fn trainers_are_told_what_they_quantise_and_nobody_else() {
    let told = |join: fn(Rank) -> Join, to: Rank| {
        let mut bench = Bench { join, ..Bench::new(Verify::Off) };
        for member in world().members() {
            bench.say(member, ToController::Join(Box::new(join(member))));
        }
        let ToMember::Planned(planned) = bench.told(to).swap_remove(0) else { panic!("no plan") };
        let PlannedPart::Trainer { quant, .. } = planned.part else { panic!("an inference rank's part") };
        (quant.tables.len(), quant.is_exchanged(), bench.controller.measures())
    };
    assert_eq!(told(quantised, T1), (1, true, true));
    assert_eq!(told(join, T1), (0, false, false));
}

#[test]
fn the_longest_message_fits_a_frame() {
    let with = |count: usize| found(PushId([255; 16]), &vec![f32::MAX; count]).encoded_bytes();
    let each = with(2) - with(1);
    assert_eq!(each, 4);
    let max = each * crate::protocol::MAGNITUDES_MAX as u64;
    assert!(max <= u64::from(crate::protocol::FRAME_BYTES_MAX) * 3 / 4);
}
