//! What observers are told is what is the case, and asking changes nothing.

use super::*;
use crate::status::{PhaseStatus, RAILS_TOLD_MAX, RailStatus, Status};

const OBSERVER: ConnectionId = ConnectionId(1000);

impl Bench {
    /// What an observer is told now.
    pub(super) fn status(&mut self) -> Status {
        self.event(Event::Received(OBSERVER, ToController::Status));
        match self.log.pop() {
            Some(Action::Send(OBSERVER, ToMember::StatusReport(status))) => *status,
            other => panic!("an observer was answered with {other:?}"),
        }
    }

    /// The status agrees with itself and with the controller.
    pub(super) fn check_status(&mut self) {
        let status = self.status();
        assert_eq!(status.committed, self.controller.committed());
        assert_eq!(status.phase == PhaseStatus::Ended, self.controller.has_ended());
        assert_eq!(status.push.is_some(), matches!(status.phase, PhaseStatus::Pushing(_)));
        assert!(status.phase.missing().is_some() || status.waiting.is_empty(), "{status:?}");
        assert!(status.since <= status.up, "{status:?}");
        let last = status.attempts.iter().find(|attempt| attempt.aborted.is_none());
        assert_eq!(last.map_or(0, |attempt| attempt.version), status.committed);
        for rank in &status.ranks {
            assert!(world().contains(rank.rank) && rank.bytes_per_second >= 0.0, "{rank:?}");
        }
    }
}

fn bytes_of(status: &Status, rank: Rank) -> (u64, Option<u64>, f64) {
    let rank = status.ranks.iter().find(|known| known.rank == rank).unwrap();
    (rank.bytes, rank.planned, rank.bytes_per_second)
}

#[test]
fn a_job_is_told_from_its_first_rank_to_its_end() {
    let mut bench = Bench::new(Verify::Off);
    bench.event(Event::Connected(connection(T1), "10.0.0.7:4242".into()));
    bench.say(T1, ToController::Join(Box::new(join(T1))));
    let status = bench.status();
    assert_eq!((status.phase, status.waiting), (PhaseStatus::Joining, vec![T0, I0]));
    assert_eq!((status.ranks.len(), status.ranks[0].address.as_str()), (1, "10.0.0.7:4242"));
    assert!(status.plan.is_none());
    for member in [T0, I0] {
        bench.say(member, ToController::Join(Box::new(join(member))));
    }
    let status = bench.status();
    assert_eq!((status.phase, status.waiting.len()), (PhaseStatus::Connecting, 3));
    assert_eq!(status.plan.map(|plan| (plan.bytes, plan.writes)), Some((16, 2)));
    let digest = bench.controller.digest;
    world().members().for_each(|member| bench.say(member, ToController::Ready { digest }));
    assert_eq!(bench.status().phase, PhaseStatus::Idle);

    bench.now += Duration::from_secs(5);
    let push = bench.begin_to_writing(1);
    bench.say(T0, ToController::Heartbeat { progress: 0 });
    bench.now += Duration::from_secs(2);
    bench.say(T0, ToController::Heartbeat { progress: 6 });
    bench.say(T1, WRITTEN(push));
    let status = bench.status();
    assert_eq!((status.phase, status.waiting.as_slice()), (PhaseStatus::Pushing(Stage::Writing), &[T0][..]));
    assert_eq!(status.since, Duration::from_secs(2));
    assert_eq!(bytes_of(&status, T0), (6, Some(8), 3.0));
    assert_eq!(bytes_of(&status, T1), (8, Some(8), 0.0));
    assert_eq!(status.ranks[2].served, Some(crate::member::Served::Torn(1)));
    assert_eq!(status.push.map(|told| (told.push, told.version)), Some((push, 1)));

    bench.say(T0, WRITTEN(push));
    bench.say(I0, ToController::Committed { push });
    let status = bench.status();
    assert_eq!((status.phase, status.committed), (PhaseStatus::Idle, 1));
    assert_eq!(status.ranks[2].served, Some(crate::member::Served::Version(1)));
    assert_eq!((status.attempts[0].version, status.attempts[0].took), (1, Duration::from_secs(2)));

    let push = bench.begin_to_writing(2);
    let reason = "no memory".to_owned();
    bench.say(T0, ToController::Failed { push, reason, fences: Vec::new() });
    let status = bench.status();
    assert_eq!((status.attempts.len(), status.attempts[0].version), (2, 2));
    assert!(status.attempts[0].aborted.as_ref().unwrap().contains("no memory"), "{status:?}");
    assert_eq!(status.ranks[2].served, Some(crate::member::Served::Torn(2)));
    bench.check_status();
}

/// A rank that stages is not torn by a push, and one that comes to a job with a version has not got that.
#[test]
fn what_a_rank_serves_is_told_as_it_is() {
    let mut bench = Bench::new(Verify::Off);
    let commit = Commit { version: 5, push: PushId([5; 16]) };
    bench.controller = Controller::new(ControllerConfig {
        resume: Some(commit),
        on_loss: OnLoss::Wait,
        ..bench.controller.config.clone()
    })
    .unwrap();
    bench.say(I0, ToController::Join(Box::new(Join { stages: true, ..join(I0) })));
    assert_eq!(bench.status().ranks[0].served, Some(crate::member::Served::Behind(5)));
    for member in [T0, T1] {
        bench.say(member, ToController::Join(Box::new(join(member))));
    }
    let digest = bench.controller.digest;
    world().members().for_each(|member| bench.say(member, ToController::Ready { digest }));
    let push = bench.begin_to_writing(6);
    let served = |bench: &mut Bench| bench.status().ranks[2].served;
    assert_eq!(served(&mut bench), Some(crate::member::Served::Behind(5)));
    bench.say(T0, WRITTEN(push));
    bench.say(T1, WRITTEN(push));
    bench.say(I0, ToController::Committed { push });
    assert_eq!(served(&mut bench), Some(crate::member::Served::Version(6)));
    let push = bench.begin_to_writing(7);
    assert_eq!(served(&mut bench), Some(crate::member::Served::Version(6)));
    bench.say(T0, ToController::Failed { push, reason: "no".into(), fences: Vec::new() });
    assert_eq!(served(&mut bench), Some(crate::member::Served::Version(6)));
}

#[test]
fn what_members_say_of_their_rails_is_bounded() {
    let mut bench = Bench::started();
    let rail = RailStatus { name: "n".repeat(10_000), bytes: 5, seconds: f64::NAN, up: true };
    bench.say(T0, ToController::Rails { rails: vec![rail; 1000] });
    bench.say(T0, ToController::Rails { rails: vec![RailStatus::new("a", 6, 2.0, false); 1000] });
    let told = bench.status().ranks[0].rails.clone();
    assert_eq!((told.len(), told[0].bytes_per_second(), told[0].up), (RAILS_TOLD_MAX, 3.0, false));
}

#[test]
fn a_member_is_no_observer() {
    let mut bench = Bench::started();
    bench.say(T0, ToController::Status);
    assert!(bench.reason(T1).contains("trainer 0 was lost"), "{}", bench.reason(T1));
}
