//! A job in which ranks are lost, and what its members are told.

use super::*;
use crate::protocol::Planned;

/// A job and what its members were told.
pub(super) struct Job {
    pub(super) controller: Controller,
    pub(super) config: ControllerConfig,
    /// The rows of the tensor that each trainer owns: from, count.
    pub(super) owned: Vec<(u64, u64)>,
    /// How far from where it was what a rank has or needs lies in its memory, in bytes; 0 where nothing is said.
    pub(super) moved: BTreeMap<Rank, u64>,
    pub(super) now: Duration,
    pub(super) connections: BTreeMap<Rank, ConnectionId>,
    pub(super) opened: u64,
    pub(super) told: BTreeMap<ConnectionId, Vec<ToMember>>,
    pub(super) closed: BTreeSet<ConnectionId>,
    pub(super) reports: Vec<Report>,
    /// What is to be recorded.
    pub(super) recording: Option<Commit>,
}

impl Job {
    /// Trainers that own these rows, and two inference ranks; nobody has joined.
    pub(super) fn new(on_loss: OnLoss, owned: &[(u64, u64)], resume: Option<Commit>) -> Self {
        let world = World { trainers: owned.len() as u32, inference: 2 };
        let config = ControllerConfig { world, on_loss, resume, ..config(Verify::Off) };
        Self {
            controller: Controller::with_parts(config.clone(), Box::new(as_from_scratch)).unwrap(),
            config,
            owned: owned.to_vec(),
            moved: BTreeMap::new(),
            now: Duration::ZERO,
            connections: BTreeMap::new(),
            opened: 0,
            told: BTreeMap::new(),
            closed: BTreeSet::new(),
            reports: Vec::new(),
            recording: None,
        }
    }

    pub(super) fn started_with(on_loss: OnLoss, owned: &[(u64, u64)]) -> Self {
        let mut job = Self::new(on_loss, owned, None);
        job.assemble();
        job
    }

    /// Two trainers with a row each.
    pub(super) fn started(on_loss: OnLoss) -> Self {
        Self::started_with(on_loss, &[(0, 1), (1, 1)])
    }

    /// All join, and are ready.
    pub(super) fn assemble(&mut self) {
        let all: Vec<Rank> = self.config.world.members().collect();
        all.iter().for_each(|member| self.join(*member));
        self.connect(&all);
    }

    /// These have a plan and are ready: so that the job starts.
    pub(super) fn connect(&mut self, members: &[Rank]) {
        let digest = self.controller.digest;
        for member in members {
            assert_eq!(self.told(*member).last(), Some(&PLAN), "{member}");
        }
        members.iter().for_each(|member| self.say(*member, ToController::Ready { digest }));
        for member in members {
            assert_eq!(self.told(*member), [START], "{member}");
        }
    }

    /// As [`Job::connect`], where the plan has been looked at.
    pub(super) fn join_connected(&mut self, members: &[Rank]) {
        let digest = self.controller.digest;
        members.iter().for_each(|member| self.say(*member, ToController::Ready { digest }));
        assert!(matches!(self.controller.phase, Phase::Idle));
        self.forget();
    }

    pub(super) fn event(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.controller.handle(event, self.now, &mut actions);
        for action in actions {
            match action {
                Action::Send(_, ToMember::Heartbeat) => {}
                Action::Send(to, message) => self.told.entry(to).or_default().push(message),
                Action::Close(connection) => drop(self.closed.insert(connection)),
                Action::Record(commit) => self.recording = Some(commit),
                Action::Report(report) => self.reports.push(report),
            }
        }
    }

    pub(super) fn say(&mut self, member: Rank, message: ToController) {
        self.event(Event::Received(self.connections[&member], message));
    }

    /// Joins, over its connection if it has one.
    pub(super) fn join(&mut self, member: Rank) {
        self.join_with(member, Holds::Nothing);
    }

    pub(super) fn join_with(&mut self, member: Rank, holds: Holds) {
        let mut join = Join { world: self.config.world, holds, ..join(member) };
        if let MemberManifest::Trainer(manifest) = &mut join.manifest
            && let Rank::Trainer(TrainerRank(rank)) = member
        {
            let (from, rows) = self.owned[rank as usize];
            manifest.regions = vec![8 * rows];
            manifest.pieces[0].bounds = TensorBox::new(&[from, 0], &[rows, 8]).unwrap();
        }
        let moved = self.moved.get(&member).copied().unwrap_or(0);
        match &mut join.manifest {
            MemberManifest::Trainer(TrainerManifest { regions, pieces, .. }) => {
                (regions[0], pieces[0].offset) = (regions[0] + moved, moved);
            }
            MemberManifest::Inference(ReceiverManifest { regions, params, .. }) => {
                (regions[0], params[0].offset) = (regions[0] + moved, moved);
            }
        }
        self.opened += 1;
        self.connections.entry(member).or_insert(ConnectionId(self.opened));
        self.say(member, ToController::Join(Box::new(join)));
    }

    /// Its connection ends; it comes back over another.
    pub(super) fn lose(&mut self, member: Rank) {
        let connection = self.connections.remove(&member).unwrap();
        self.event(Event::Disconnected(connection, "reset".into()));
    }

    /// Time passes while those who have a connection say that they are alive.
    pub(super) fn pass(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.now += Duration::from_secs(1);
            let alive: Vec<Rank> = self.connections.keys().copied().collect();
            alive.iter().for_each(|member| self.say(*member, ToController::Heartbeat { progress: 0 }));
            self.event(Event::Tick);
        }
    }

    /// What it has been told since this was asked last.
    pub(super) fn messages(&mut self, member: Rank) -> Vec<ToMember> {
        let connection = self.connections.get(&member);
        connection.and_then(|connection| self.told.remove(connection)).unwrap_or_default()
    }

    pub(super) fn told(&mut self, member: Rank) -> Vec<&'static str> {
        self.messages(member).iter().map(ToMember::name).collect()
    }

    /// The reason in the last thing that it was told.
    pub(super) fn reason(&mut self, member: Rank) -> String {
        match self.messages(member).pop() {
            Some(
                ToMember::Abort { reason, .. } | ToMember::Regroup { reason } | ToMember::Refused { reason },
            ) => reason,
            other => panic!("{member} was told {other:?}"),
        }
    }

    pub(super) fn plan(&mut self, member: Rank) -> Planned {
        match self.messages(member).pop() {
            Some(ToMember::Planned(planned)) => *planned,
            other => panic!("{member} was told {other:?}"),
        }
    }

    pub(super) fn push_id(&self) -> PushId {
        match &self.controller.phase {
            Phase::Pushing(push) => push.id,
            _ => panic!("no push"),
        }
    }

    /// Up to the moment that trainers write.
    pub(super) fn write(&mut self, version: u64) -> PushId {
        let trainers: Vec<Rank> = self.controller.trainers().collect();
        trainers.iter().for_each(|trainer| self.say(*trainer, ToController::Begin { version }));
        let (push, receivers) = (self.push_id(), self.controller.receivers().collect::<Vec<_>>());
        receivers.iter().for_each(|receiver| self.say(*receiver, ToController::Prepared { push }));
        self.forget();
        push
    }

    /// Up to the moment that the decision is to be recorded.
    pub(super) fn written(&mut self, version: u64) -> PushId {
        let push = self.write(version);
        let quotas: Vec<(Rank, Quota)> =
            self.controller.quotas.iter().map(|(rank, quota)| (*rank, *quota)).collect();
        for (rank, Quota { bytes, writes }) in quotas {
            let (fences, sums) = (Vec::new(), Vec::new());
            self.say(rank, ToController::Written { push, bytes, writes, fences, sums });
        }
        assert_eq!(self.recording, Some(Commit { version, push }));
        push
    }

    /// Up to the moment that inference ranks are told of the commit.
    pub(super) fn commit(&mut self, version: u64) -> Commit {
        let push = self.written(version);
        self.event(Event::Recorded(Ok(())));
        Commit { version, push }
    }

    /// From the beginning of a version to its end.
    pub(super) fn push(&mut self, version: u64) -> Commit {
        let commit = self.commit(version);
        let receivers: Vec<Rank> = self.controller.receivers().collect();
        receivers
            .iter()
            .for_each(|receiver| self.say(*receiver, ToController::Committed { push: commit.push }));
        assert!(matches!(self.controller.phase, Phase::Idle));
        self.forget();
        commit
    }

    pub(super) fn forget(&mut self) {
        self.told.clear();
        self.reports.clear();
    }
}

/// Whatever the controller knew before, its plan is the one that is made from the manifest alone.
fn as_from_scratch(plan: &Plan, manifest: &Manifest) -> Result<Parts, PlanError> {
    assert_eq!(Ok(plan), xfer_plan::plan(manifest).as_ref());
    plan.parts(manifest)
}
