//! The controller against members that say anything at any time.

use proptest::prelude::*;

use super::measuring::quantised;
use super::*;

#[derive(Debug, Clone)]
enum Step {
    Say(u8, u8),
    Lose(u8),
    Pass(u8),
    /// How the next commits are recorded.
    Record(bool),
}

fn on_loss() -> impl Strategy<Value = OnLoss> {
    prop_oneof![Just(OnLoss::Fail), Just(OnLoss::Wait), Just(OnLoss::Continue)]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        20 => (0u8..3, 0u8..17).prop_map(|(who, what)| Step::Say(who, what)),
        1 => (0u8..3).prop_map(Step::Lose),
        2 => (0u8..20).prop_map(Step::Pass),
        1 => prop::bool::weighted(0.9).prop_map(Step::Record),
    ];
    prop::collection::vec(step, 0..80)
}

proptest! {
    /// Members that say anything at any time: no panic, no commit without both reports of the same attempt, versions
    /// only rise, and every ended job was reported as ended.
    #[test]
    fn no_order_of_messages_breaks_the_rules(
        steps in steps(), (from_start, quantises) in any::<(bool, bool)>(), on_loss in on_loss(),
    ) {
        let bench = Bench::of(ControllerConfig { on_loss, ..config(Verify::Off) });
        let join = if quantises { quantised } else { join };
        let bench = Bench { join, ..bench };
        let mut bench = if from_start { bench } else { bench.start() };
        let members = [T0, T1, I0];
        let mut written: BTreeSet<(Rank, PushId)> = BTreeSet::new();
        let mut measured: BTreeSet<(Rank, PushId)> = BTreeSet::new();
        let mut committed = 0;
        for step in steps {
            let push = match &bench.controller.phase {
                Phase::Pushing(push) => push.id,
                _ => PushId([9; 16]),
            };
            match step {
                Step::Say(who, what) => {
                    let member = members[usize::from(who)];
                    let digest = bench.controller.digest;
                    let version = committed + u64::from(what % 2);
                    let message = match what {
                        0 | 1 => ToController::Begin { version },
                        2 => ToController::Prepared { push },
                        // What the plan has it write: the codes of its row, and the scales by one of them.
                        3 => match bench.controller.quotas.get(&member) {
                            Some(&Quota { bytes, writes }) => {
                                let (fences, sums) = (Vec::new(), Vec::new());
                                ToController::Written { push, bytes, writes, fences, sums }
                            }
                            None => WRITTEN(push),
                        },
                        4 => ToController::Committed { push },
                        5 => ToController::Failed { push, reason: "r".repeat(10_000), fences: Vec::new() },
                        6 => ToController::Join(Box::new(join(member))),
                        10 | 11 => {
                            let attempt = Commit { version, push };
                            let holds = if what == 10 { Holds::Undecided { attempt, serves: None } } else { Holds::Torn };
                            ToController::Join(Box::new(Join { holds, ..join(member) }))
                        }
                        12 => ToController::Leave { reason: Some("no memory".into()) },
                        7 => ToController::Ready { digest },
                        8 => FENCED(push),
                        9 => ToController::Fenced { push },
                        14 | 15 => ToController::Magnitudes { push, magnitudes: vec![1.0; 2] },
                        16 => ToController::Magnitudes { push, magnitudes: vec![f32::INFINITY; 2] },
                        _ => ToController::Leave { reason: None },
                    };
                    match &message {
                        ToController::Written { .. } => drop(written.insert((member, push))),
                        ToController::Magnitudes { .. } => drop(measured.insert((member, push))),
                        _ => {}
                    }
                    bench.say(member, message);
                }
                Step::Lose(who) => bench.event(Event::Disconnected(connection(members[usize::from(who)]), "x".into())),
                Step::Record(well) => bench.recorded = if well { Ok(()) } else { Err("no space".into()) },
                Step::Pass(seconds) => bench.pass(u64::from(seconds), &members),
            }
            bench.check_status();
            let now_committed = bench.controller.committed();
            if now_committed != committed {
                prop_assert!(now_committed > committed);
                prop_assert!([T0, T1].iter().all(|member| written.contains(&(*member, push))));
                prop_assert!(!quantises || [T0, T1].iter().all(|member| measured.contains(&(*member, push))));
                prop_assert!(bench.controller.fences.is_empty(), "committed with writes still on their way");
                committed = now_committed;
            }
        }
        let ended = bench.log.iter().filter(|action| matches!(action, Action::Report(Report::Ended { .. }))).count();
        prop_assert_eq!(ended, usize::from(bench.controller.has_ended()));
    }
}
