//! The controller against a world of scripted members, without sockets and in made-up time.

use xfer_plan::{
    DType, DestinationParam, ParamMap, RailDecl, ReceiverManifest, RegionIndex, Relay, SourcePiece,
    TensorBox, TrainerManifest, TrainerRank,
};

use super::*;
use crate::protocol::{ENDPOINT_BYTES_MAX, Holds, Join, SessionId};

mod measuring;
mod random;
mod regroup;
mod status;
mod verify;

const DEADLINE: Duration = Duration::from_secs(30);
const T0: Rank = Rank::Trainer(TrainerRank(0));
const T1: Rank = Rank::Trainer(TrainerRank(1));
const I0: Rank = Rank::Receiver(ReceiverRank(0));
const I1: Rank = Rank::Receiver(ReceiverRank(1));

fn world() -> World {
    World { trainers: 2, inference: 1 }
}

/// Two trainers with one row each of a tensor that the one inference rank needs whole.
fn join(member: Rank) -> Join {
    let rails = vec![RailDecl { bytes_per_second: 1000 }];
    let (host, region) = ("host".to_owned(), RegionIndex(0));
    let manifest = match member {
        Rank::Trainer(rank) => MemberManifest::Trainer(TrainerManifest {
            host,
            regions: vec![8],
            rails,
            pieces: vec![SourcePiece {
                tensor: "w".into(),
                dtype: DType::U8,
                shape: vec![2, 8],
                bounds: TensorBox::new(&[u64::from(rank.0), 0], &[1, 8]).unwrap(),
                region,
                offset: 0,
            }],
        }),
        Rank::Receiver(_) => MemberManifest::Inference(ReceiverManifest {
            host,
            regions: vec![16],
            rails,
            params: vec![DestinationParam {
                name: "w".into(),
                dtype: DType::U8,
                shape: vec![2, 8],
                region,
                offset: 0,
                map: ParamMap::tensor("w").into(),
                priority: 0,
            }],
        }),
    };
    Join {
        job: "job".into(),
        member,
        world: world(),
        deadline: DEADLINE,
        manifest,
        endpoint: vec![1, 2, 3],
        holds: Holds::Nothing,
        stages: false,
        session: SessionId::default(),
    }
}

fn connection(member: Rank) -> ConnectionId {
    ConnectionId(match member {
        Rank::Trainer(rank) => u64::from(rank.0),
        Rank::Receiver(rank) => 100 + u64::from(rank.0),
    })
}

struct Bench {
    controller: Controller,
    join: fn(Rank) -> Join,
    now: Duration,
    log: Vec<Action>,
    /// How recording a commit ends.
    recorded: Result<(), String>,
}

fn config(verify: Verify) -> ControllerConfig {
    ControllerConfig {
        job: "job".into(),
        world: world(),
        deadline: DEADLINE,
        options: PlanOptions::default(),
        verify,
        on_loss: OnLoss::Fail,
        resume: None,
        seed: [7; 32],
    }
}

impl Bench {
    fn new(verify: Verify) -> Self {
        Self::of(config(verify))
    }

    fn of(config: ControllerConfig) -> Self {
        Self {
            controller: Controller::new(config).unwrap(),
            join,
            now: Duration::ZERO,
            log: Vec::new(),
            recorded: Ok(()),
        }
    }

    fn started() -> Self {
        Self::verifying(Verify::Off)
    }

    fn verifying(verify: Verify) -> Self {
        Self::new(verify).start()
    }

    /// All join, and are ready.
    fn start(self) -> Self {
        let mut bench = self;
        let world = bench.controller.config.world;
        for member in world.members() {
            bench.say(member, ToController::Join(Box::new((bench.join)(member))));
        }
        let digest = bench.controller.digest;
        for member in world.members() {
            bench.say(member, ToController::Ready { digest });
        }
        assert!(bench.told(T0).contains(&ToMember::Start), "{:?}", bench.log);
        bench.log.clear();
        bench
    }

    fn event(&mut self, event: Event) {
        let before = self.log.len();
        self.controller.handle(event, self.now, &mut self.log);
        if self.log[before..].iter().any(|action| matches!(action, Action::Record(_))) {
            self.controller.handle(Event::Recorded(self.recorded.clone()), self.now, &mut self.log);
        }
    }

    fn say(&mut self, member: Rank, message: ToController) {
        self.event(Event::Received(connection(member), message));
    }

    /// Time passes while `alive` say so.
    fn pass(&mut self, seconds: u64, alive: &[Rank]) {
        for _ in 0..seconds {
            self.now += Duration::from_secs(1);
            for member in alive {
                self.say(*member, ToController::Heartbeat { progress: 0 });
            }
            self.event(Event::Tick);
        }
    }

    fn told(&self, member: Rank) -> Vec<ToMember> {
        let to = |action: &Action| match action {
            Action::Send(to, ToMember::Heartbeat) if *to == connection(member) => None,
            Action::Send(to, message) if *to == connection(member) => Some(message.clone()),
            _ => None,
        };
        self.log.iter().filter_map(to).collect()
    }

    fn push_id(&self) -> PushId {
        match &self.controller.phase {
            Phase::Pushing(push) => push.id,
            _ => panic!("no push"),
        }
    }

    fn begin_to_writing(&mut self, version: u64) -> PushId {
        self.say(T0, ToController::Begin { version });
        self.say(T1, ToController::Begin { version });
        let push = self.push_id();
        self.say(I0, ToController::Prepared { push });
        push
    }

    fn reason(&self, member: Rank) -> String {
        match self.told(member).last() {
            Some(ToMember::Abort { reason, .. } | ToMember::Refused { reason }) => reason.clone(),
            other => panic!("{member} was told {other:?}"),
        }
    }
}

const WRITTEN: fn(PushId) -> ToController =
    |push| ToController::Written { push, bytes: 8, writes: 1, fences: Vec::new(), sums: Vec::new() };

#[test]
fn a_version_is_committed_when_every_byte_is_reported_and_not_before() {
    let mut bench = Bench::started();
    let push = bench.begin_to_writing(1);
    assert_eq!(
        bench.told(T0),
        [ToMember::Write { push, version: 1, bank: Bank::default(), told: Vec::new() }]
    );
    bench.say(T0, WRITTEN(push));
    assert_eq!(bench.controller.committed(), 0);
    assert_eq!(
        bench.told(I0),
        [ToMember::Prepare { push, version: 1, fence: Vec::new(), bank: Bank::default() }]
    );
    bench.say(T1, WRITTEN(push));
    assert_eq!(bench.controller.committed(), 1);
    assert_eq!(bench.told(I0).last(), Some(&ToMember::Commit { push, version: 1 }));
    bench.say(I0, ToController::Committed { push });
    assert_eq!(bench.told(T1).last(), Some(&ToMember::Done { push, version: 1, unconfirmed: vec![] }));
}

/// As above, and one rail was given up.
const FENCED: fn(PushId) -> ToController = |push| {
    let fences = vec![Fence { at: ReceiverRank(0), rail: 3 }];
    ToController::Written { push, bytes: 8, writes: 1, fences, sums: Vec::new() }
};

#[test]
fn a_rail_that_was_given_up_is_closed_before_the_commit() {
    let mut bench = Bench::started();
    let push = bench.begin_to_writing(1);
    bench.say(T0, FENCED(push));
    bench.say(T1, FENCED(push));
    assert_eq!(bench.controller.committed(), 0);
    assert_eq!(bench.told(I0).last(), Some(&ToMember::Fence { push, rails: vec![3] }));
    bench.say(I0, ToController::Fenced { push });
    assert_eq!(bench.controller.committed(), 1);
}

#[test]
fn a_rail_that_a_failed_attempt_gave_up_is_closed_before_the_next() {
    let mut bench = Bench::started();
    let push = bench.begin_to_writing(1);
    bench.say(T0, FENCED(push));
    // What no inference rank has is no reason to wait.
    let fences = [(0, 1), (1, 0)].map(|(at, rail)| Fence { at: ReceiverRank(at), rail }).into();
    bench.say(T1, ToController::Failed { push, reason: "no".into(), fences });
    bench.say(T0, ToController::Begin { version: 1 });
    bench.say(T1, ToController::Begin { version: 1 });
    let push = bench.push_id();
    assert_eq!(
        bench.told(I0).last(),
        Some(&ToMember::Prepare { push, version: 1, fence: vec![1, 3], bank: Bank::default() })
    );
    bench.say(I0, ToController::Prepared { push });
    bench.say(T0, WRITTEN(push));
    bench.say(T1, WRITTEN(push));
    assert_eq!(bench.controller.committed(), 1);
}

#[test]
fn an_inference_rank_that_does_not_close_a_rail_is_named() {
    let mut bench = Bench::started();
    let push = bench.begin_to_writing(1);
    bench.say(T0, FENCED(push));
    bench.say(T1, WRITTEN(push));
    bench.pass(31, &[T0, T1, I0]);
    assert_eq!(bench.controller.committed(), 0);
    let reason = bench.reason(T0);
    assert!(reason.contains("inference 0") && reason.contains("close the rails"), "{reason}");
}

#[test]
fn fewer_bytes_than_planned_are_no_commit() {
    let mut bench = Bench::started();
    let push = bench.begin_to_writing(1);
    bench.say(T0, WRITTEN(push));
    bench.say(T1, ToController::Written { push, bytes: 7, writes: 1, fences: Vec::new(), sums: Vec::new() });
    assert_eq!(bench.controller.committed(), 0);
    assert!(
        bench.reason(T0).contains("trainer 1") && bench.reason(T0).contains("7 bytes"),
        "{}",
        bench.reason(T0)
    );
}

#[test]
fn a_lost_inference_rank_aborts_the_push_and_is_named() {
    let mut bench = Bench::started();
    bench.begin_to_writing(3);
    bench.event(Event::Disconnected(connection(I0), "reset".into()));
    let told = bench.told(T0);
    let [.., ToMember::Abort { version: 3, reason }, ToMember::Refused { .. }] = &told[..] else {
        panic!("{told:?}")
    };
    assert!(reason.contains("inference 0 was lost during version 3") && reason.contains("reset"), "{reason}");
    assert!(bench.controller.has_ended());
}

#[test]
fn a_silent_member_is_lost_before_its_stage_is_over() {
    let mut bench = Bench::started();
    bench.begin_to_writing(1);
    bench.pass(16, &[T0, T1]);
    let reason = bench.reason(T0);
    assert!(
        reason.contains("inference 0 was lost") && reason.contains("nothing was heard from it for 15s"),
        "{reason}"
    );
}

#[test]
fn a_trainer_that_writes_nothing_is_named_at_the_deadline_and_the_job_goes_on() {
    let mut bench = Bench::started();
    let push = bench.begin_to_writing(1);
    bench.say(T0, WRITTEN(push));
    bench.pass(31, &[T0, T1, I0]);
    let reason = bench.reason(I0);
    assert!(reason.contains("waited 30s for trainer 1 to finish its writes"), "{reason}");
    assert!(!bench.controller.has_ended());
    // The late report of the dead attempt counts for nothing.
    bench.say(T1, WRITTEN(push));
    bench.log.clear();
    let again = bench.begin_to_writing(1);
    assert_ne!(again, push);
    bench.say(T0, WRITTEN(again));
    bench.say(T1, WRITTEN(again));
    assert_eq!(bench.controller.committed(), 1);
}

#[test]
fn a_trainer_that_makes_progress_is_not_late() {
    let mut bench = Bench::started();
    bench.begin_to_writing(1);
    for progress in 1..100 {
        bench.pass(1, &[I0]);
        bench.say(T0, ToController::Heartbeat { progress });
        bench.say(T1, ToController::Heartbeat { progress });
    }
    assert!(matches!(bench.controller.phase, Phase::Pushing(_)));
}

fn relaying() -> Bench {
    const WORLD: World = World { trainers: 2, inference: 2 };
    let options = PlanOptions { relay: Relay::PerHost, ..PlanOptions::default() };
    let config = ControllerConfig { world: WORLD, options, ..config(Verify::Off) };
    Bench { join: |member| Join { world: WORLD, ..join(member) }, ..Bench::of(config) }.start()
}

#[test]
fn a_trainer_that_is_late_is_named_without_those_who_wait_for_it() {
    let mut bench = relaying();
    let push = bench.begin_to_writing(1);
    bench.say(I1, ToController::Prepared { push });
    bench.say(T1, WRITTEN(push));
    bench.pass(31, &[T0, T1, I0, I1]);
    assert!(bench.reason(T1).contains("waited 30s for trainer 0 to"), "{}", bench.reason(T1));
}

#[test]
fn who_passes_on_is_not_late_while_others_make_progress() {
    let mut bench = relaying();
    let push = bench.begin_to_writing(1);
    bench.say(I1, ToController::Prepared { push });
    bench.say(T1, WRITTEN(push));
    for progress in 1..50 {
        bench.pass(1, &[I0, I1, T1]);
        bench.say(T0, ToController::Heartbeat { progress });
    }
    bench.say(T0, WRITTEN(push));
    bench.pass(20, &[T0, T1, I0, I1]);
    // All that they wait for is there.
    for progress in 1..50 {
        bench.pass(1, &[T0, T1, I0]);
        bench.say(I1, ToController::Heartbeat { progress });
    }
    bench.say(I1, WRITTEN(push));
    bench.pass(29, &[T0, T1, I0, I1]);
    assert!(matches!(bench.controller.phase, Phase::Pushing(_)), "{:?}", bench.told(T0));
    bench.pass(3, &[T0, T1, I0, I1]);
    assert!(bench.reason(T0).contains("waited 30s for inference 0 to"), "{}", bench.reason(T0));
}

#[test]
fn who_is_missing_is_named() {
    let mut bench = Bench::new(Verify::Off);
    bench.say(T1, ToController::Join(Box::new(join(T1))));
    bench.pass(31, &[T1]);
    assert!(
        bench.reason(T1).contains("waited 30s for trainer 0, inference 0 to join"),
        "{}",
        bench.reason(T1)
    );

    let mut bench = Bench::started();
    bench.say(T0, ToController::Begin { version: 1 });
    bench.pass(31, &[T0, T1, I0]);
    assert!(bench.reason(T0).contains("trainer 1 to begin the version"), "{}", bench.reason(T0));
}

#[test]
fn a_failure_that_is_no_loss_leaves_the_job_running() {
    let mut bench = Bench::started();
    let push = bench.begin_to_writing(1);
    bench.say(T0, ToController::Failed { push, reason: "no staging".into(), fences: Vec::new() });
    assert_eq!(bench.reason(I0), "trainer 0: no staging");
    let push = bench.begin_to_writing(1);
    bench.say(T0, WRITTEN(push));
    bench.say(T1, WRITTEN(push));
    assert_eq!(bench.controller.committed(), 1);
}

#[test]
fn a_loss_after_the_decision_is_told_as_unconfirmed() {
    let mut bench = Bench::started();
    let push = bench.begin_to_writing(1);
    bench.say(T0, WRITTEN(push));
    bench.say(T1, WRITTEN(push));
    bench.event(Event::Disconnected(connection(I0), "killed".into()));
    let done = ToMember::Done { push, version: 1, unconfirmed: vec![I0] };
    assert!(bench.told(T0).contains(&done), "{:?}", bench.told(T0));
    assert_eq!(bench.controller.committed(), 1);
}

#[test]
fn a_trainer_that_is_lost_after_the_decision_ends_the_job_once_the_commit_is_confirmed() {
    let mut bench = Bench::started();
    let push = bench.begin_to_writing(1);
    bench.say(T0, WRITTEN(push));
    bench.say(T1, WRITTEN(push));
    bench.event(Event::Disconnected(connection(T1), "killed".into()));
    assert!(!bench.controller.has_ended(), "inference 0 has not confirmed yet");
    bench.say(I0, ToController::Committed { push });
    assert!(bench.controller.has_ended());
    let done = ToMember::Done { push, version: 1, unconfirmed: vec![] };
    assert!(bench.told(T0).contains(&done), "{:?}", bench.told(T0));
    for member in [T0, I0] {
        assert!(bench.reason(member).contains("trainer 1"), "{}", bench.reason(member));
    }
}

#[test]
fn versions_only_rise_and_agree() {
    let mut bench = Bench::started();
    let push = bench.begin_to_writing(5);
    bench.say(T0, WRITTEN(push));
    bench.say(T1, WRITTEN(push));
    bench.say(I0, ToController::Committed { push });
    bench.say(T0, ToController::Begin { version: 5 });
    assert!(bench.reason(T0).contains("not newer than the committed version 5"));
    bench.say(T0, ToController::Begin { version: 6 });
    bench.say(T1, ToController::Begin { version: 7 });
    assert!(bench.reason(T0).contains("trainer 1 began version 7 while others began version 6"));
}

#[test]
fn strangers_and_mistakes_are_refused_by_name() {
    let wrong = |change: fn(&mut Join)| {
        let mut bench = Bench::new(Verify::Off);
        let mut bad = join(T0);
        change(&mut bad);
        bench.say(T0, ToController::Join(Box::new(bad)));
        bench.reason(T0)
    };
    assert!(wrong(|join| join.job = "other".into()).contains("another job"));
    assert!(wrong(|join| join.deadline = Duration::from_secs(1)).contains("give the same everywhere"));
    assert!(wrong(|join| join.world.trainers = 9).contains("expects 9 trainers"));
    assert!(wrong(|join| join.member = Rank::Trainer(TrainerRank(7))).contains("no trainer 7"));
    assert!(wrong(|join| join.member = I0).contains("other side's manifest"));
    assert!(wrong(|join| join.endpoint = vec![0; ENDPOINT_BYTES_MAX + 1]).contains("endpoint of"));

    let mut bench = Bench::new(Verify::Off);
    bench.say(T0, ToController::Join(Box::new(join(T0))));
    bench.event(Event::Received(ConnectionId(55), ToController::Join(Box::new(join(T0)))));
    assert!(bench.log.iter().any(|action| matches!(
        action,
        Action::Send(ConnectionId(55), ToMember::Refused { reason }) if reason.contains("joined already")
    )));
}

#[test]
fn a_rank_that_dies_while_others_join_may_come_back() {
    let mut bench = Bench::new(Verify::Off);
    bench.say(T0, ToController::Join(Box::new(join(T0))));
    bench.event(Event::Disconnected(connection(T0), "killed".into()));
    for member in world().members() {
        bench.say(member, ToController::Join(Box::new(join(member))));
    }
    assert!(matches!(bench.told(I0)[..], [ToMember::Planned(_)]));
}

#[test]
fn a_manifest_without_a_plan_ends_the_job_with_the_planners_words() {
    let mut bench = Bench::new(Verify::Off);
    bench.say(T0, ToController::Join(Box::new(join(T0))));
    bench.say(T1, ToController::Join(Box::new(join(T1))));
    let mut bad = join(I0);
    if let MemberManifest::Inference(manifest) = &mut bad.manifest {
        manifest.params[0].map = ParamMap::tensor("absent").into();
    }
    bench.say(I0, ToController::Join(Box::new(bad)));
    assert!(
        bench.reason(T0).contains("no plan") && bench.reason(T0).contains("absent"),
        "{}",
        bench.reason(T0)
    );
}

#[test]
fn when_all_trainers_have_left_the_inference_ranks_are_told() {
    let mut bench = Bench::started();
    bench.say(T0, ToController::Leave { reason: None });
    assert!(!bench.controller.has_ended());
    bench.say(T1, ToController::Leave { reason: None });
    assert_eq!(bench.told(I0), [ToMember::Finished]);
    assert!(bench.controller.has_ended());
}

#[test]
fn a_failure_after_the_decision_cannot_undo_it() {
    let mut bench = Bench::started();
    let push = bench.begin_to_writing(1);
    bench.say(T0, WRITTEN(push));
    bench.say(T1, WRITTEN(push));
    bench.say(I0, ToController::Failed { push, reason: "no flush".into(), fences: Vec::new() });
    let told = bench.told(T0);
    assert!(!told.iter().any(|message| matches!(message, ToMember::Abort { .. })), "{told:?}");
    assert!(told.contains(&ToMember::Done { push, version: 1, unconfirmed: vec![I0] }), "{told:?}");
}

#[test]
fn a_controller_that_was_stopped_blames_nobody() {
    let mut bench = Bench::started();
    bench.begin_to_writing(1);
    bench.pass(1, &[T0, T1, I0]);
    // Stopped for a minute: the tick comes before the heartbeats that wait in its queue.
    bench.now += Duration::from_secs(60);
    bench.event(Event::Tick);
    assert!(matches!(bench.controller.phase, Phase::Pushing(_)));
    // Who is silent from then on is lost as ever.
    bench.pass(16, &[T0, T1]);
    assert!(bench.reason(T0).contains("inference 0 was lost"), "{}", bench.reason(T0));
}

#[test]
fn members_that_come_one_by_one_all_get_the_deadline() {
    let mut bench = Bench::new(Verify::Off);
    bench.say(T0, ToController::Join(Box::new(join(T0))));
    bench.pass(25, &[T0]);
    bench.say(T1, ToController::Join(Box::new(join(T1))));
    bench.pass(25, &[T0, T1]);
    assert!(!bench.controller.has_ended());
    bench.pass(6, &[T0, T1]);
    assert!(bench.reason(T0).contains("inference 0 to join"), "{}", bench.reason(T0));
}
