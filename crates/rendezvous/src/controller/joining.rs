//! Who may take part, and what each is told to do: from the first join to the start, and again after every loss.
//!
//! Nothing here is believed before it is checked: a manifest goes to the planner, which validates it, and an endpoint is passed
//! on unread.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use xfer_plan::{
    Digest, Manifest, Op, ParamId, Plan, RailDecl, Rank, ReceiverManifest, ReceiverRank, TrainerManifest,
    TrainerRank,
};

use super::{Action, Actions, ConnectionId, Controller, Phase, Quota, Report, Seat, refuse};
use crate::member::Served;
use crate::protocol::{
    Bank, Commit, ENDPOINT_BYTES_MAX, Holds, Join, MemberManifest, OnLoss, Peer, Planned, PlannedPart,
    ToMember,
};
use crate::refusal::Refusal;
use crate::status::PlanStatus;

impl Controller {
    /// Over a new connection.
    pub(super) fn join(&mut self, from: ConnectionId, join: Join, now: Duration, actions: &mut Actions) {
        // A cut that this end has not noticed yet: the old connection is good for nothing.
        let is_back = |seat: &Seat| seat.session == join.session && self.config.on_loss != OnLoss::Fail;
        if self.seats.get(&join.member).is_some_and(is_back) {
            self.lose(join.member, "it came back over another connection", now, actions);
        }
        let admitted = self.admits(&join).and_then(|()| self.has_room_for(join.member));
        if let Err(reason) = admitted.and_then(|()| self.agrees(&join)) {
            let peer = join.member.to_string();
            let refused = Report::Refused { peer, refusal: Refusal::Join, reason: reason.clone() };
            actions.push(Action::Report(refused));
            return refuse(from, reason, actions);
        }
        self.members.insert(from, join.member);
        self.history.joined(join.member, from);
        self.seat(from, join, true, now, actions);
    }

    /// Over the connection of before, after everybody was told to.
    pub(super) fn join_again(&mut self, member: Rank, join: Join, now: Duration, actions: &mut Actions) {
        let Some(seat) = self.seats.get(&member) else { return };
        let (connection, is_new) = (seat.connection, seat.is_new);
        let takes_part = !matches!(self.phase, Phase::Joining(_)) && self.assembly.contains(&member);
        if join.member != member || seat.manifest.is_some() || takes_part {
            return self.expel(member, "it joined twice", now, actions);
        }
        if let Err(reason) = self.admits(&join).and_then(|()| self.agrees(&join)) {
            return self.expel(member, &reason, now, actions);
        }
        self.seat(connection, join, is_new, now, actions);
    }

    fn seat(
        &mut self,
        connection: ConnectionId,
        join: Join,
        is_new: bool,
        now: Duration,
        actions: &mut Actions,
    ) {
        let Join { member, manifest, endpoint, holds, stages, session, .. } = join;
        // A rank that has a version knows that it was committed, also where the controller's record was lost.
        if let Some(commit) = holds.served().filter(|commit| commit.version > self.committed()) {
            self.committed = Some(commit);
        }
        let served = match (holds.served(), self.committed) {
            (Some(commit), _) => Some(Served::Version(commit.version)),
            (None, Some(commit)) if holds == Holds::Nothing => Some(Served::Behind(commit.version)),
            _ => None,
        };
        self.history.seated(member, stages, served);
        let manifest = Some(manifest);
        let (heard_at, progress_at) = (now, now);
        let seat = Seat {
            connection,
            session,
            manifest,
            endpoint,
            is_new,
            holds,
            heard_at,
            progress: 0,
            progress_at,
            left: false,
        };
        self.seats.insert(member, seat);
        self.absent.remove(&member);
        if is_new {
            actions.push(Action::Report(Report::Joined(member)));
        }
        match &mut self.phase {
            Phase::Joining(since) => {
                // Whoever joins is progress: the others get the whole deadline again.
                *since = Some(now);
                if self.started && !self.trains_soon() {
                    self.phase = Phase::Joining(None);
                }
                self.plan_if_complete(now, actions);
            }
            Phase::Connecting { .. } | Phase::Idle => self.let_in(now, actions),
            // After the push.
            Phase::Pushing(_) | Phase::Ended => {}
        }
    }

    /// Whether a trainer has joined. In a job that has started it does so when it has something to push; before, trainers train
    /// for as long as they like, and nobody waits.
    fn trains_soon(&self) -> bool {
        let trains =
            |(member, seat): (&Rank, &Seat)| matches!(member, Rank::Trainer(_)) && seat.manifest.is_some();
        self.seats.iter().any(trains)
    }

    /// Regroups if somebody waits to take part. Between pushes.
    pub(super) fn let_in(&mut self, now: Duration, actions: &mut Actions) {
        // While trainers leave, no version can come: who is back need not take part.
        let leave = self.seats.values().any(|seat| seat.left);
        let waits = self.seats.iter().find(|(_, seat)| seat.manifest.is_some()).map(|(member, _)| *member);
        if let Some(member) = waits.filter(|_| !leave) {
            self.regroup(format!("{member} is back"), now, actions);
        }
    }

    /// Tells everybody to join again, but those who have just done so.
    pub(super) fn regroup(&mut self, reason: String, now: Duration, actions: &mut Actions) {
        actions.push(Action::Report(Report::Regrouping { reason: reason.clone() }));
        // Who takes no part has been told before, and may have opened its rails anew since.
        for (_, seat) in
            self.seats.iter_mut().filter(|(member, seat)| self.assembly.contains(member) && !seat.left)
        {
            seat.is_new = false;
            actions.push(Action::Send(seat.connection, ToMember::Regroup { reason: reason.clone() }));
        }
        // Every rail is closed: nothing that was on its way over one arrives.
        self.fences.clear();
        self.relaying.clear();
        self.assembly.clear();
        self.phase = Phase::Joining(self.trains_soon().then_some(now));
        self.plan_if_complete(now, actions);
    }

    /// Who is waited for: everybody, but those whom the job goes on without.
    pub(super) fn missing(&self) -> Vec<Rank> {
        let joined = |member: &Rank| self.seats.get(member).is_some_and(|seat| seat.manifest.is_some());
        let members = self.config.world.members();
        members.filter(|member| !self.absent.contains(member) && !joined(member)).collect()
    }

    pub(super) fn plan_if_complete(&mut self, now: Duration, actions: &mut Actions) {
        let receives =
            |(member, seat): (&Rank, &Seat)| matches!(member, Rank::Receiver(_)) && seat.manifest.is_some();
        // To push to nobody would be to say that a version is served which nobody has.
        if self.missing().is_empty() && self.seats.iter().any(receives) {
            self.plan(now, actions);
        }
    }

    /// Who was joined when no plan could be made without the others joins again when it has something to push.
    pub(super) fn lapse(&mut self, reason: &str, actions: &mut Actions) {
        let version = self.committed();
        for (member, seat) in &mut self.seats {
            if matches!(member, Rank::Trainer(_)) && seat.manifest.take().is_some() {
                let abort = ToMember::Abort { version, reason: reason.to_owned() };
                actions.push(Action::Send(seat.connection, abort));
            }
        }
        self.phase = Phase::Joining(None);
    }

    fn has_room_for(&self, member: Rank) -> Result<(), String> {
        if self.seats.contains_key(&member) {
            return Err(format!("{member} has joined already; is the same rank started twice?"));
        }
        match self.phase {
            Phase::Joining(_) => Ok(()),
            _ if self.config.on_loss != OnLoss::Fail => Ok(()),
            _ => Err(format!("{member} comes too late: the job has started without it")),
        }
    }

    /// A rank that has a newer version than the job comes from another job, or the record is older than it should be. Before
    /// there is a plan the job can believe it; afterwards others have been told otherwise.
    fn agrees(&self, join: &Join) -> Result<(), String> {
        match join.holds.served() {
            Some(Commit { version, .. })
                if version > self.committed() && !matches!(self.phase, Phase::Joining(_)) =>
            {
                let (member, committed) = (join.member, self.committed());
                Err(format!("{member} has version {version}, but this job has committed {committed} only"))
            }
            _ => Ok(()),
        }
    }

    fn admits(&self, join: &Join) -> Result<(), String> {
        let Join { job, member, world, deadline, manifest, endpoint, holds: _, stages: _, session: _ } = join;
        if *job != self.config.job {
            return Err(format!("{member} wants another job than '{}'", self.config.job));
        }
        if *world != self.config.world {
            return Err(format!("{member} expects {world}, but this job has {}", self.config.world));
        }
        if *deadline != self.config.deadline {
            let ours = self.config.deadline;
            return Err(format!(
                "{member} has a deadline of {deadline:?}, this job of {ours:?}; give the same everywhere"
            ));
        }
        if !world.contains(*member) {
            return Err(format!("there is no {member} among {world}; ranks count from 0"));
        }
        if endpoint.len() > ENDPOINT_BYTES_MAX {
            return Err(format!(
                "{member} has an endpoint of {} bytes, more than {ENDPOINT_BYTES_MAX}",
                endpoint.len()
            ));
        }
        match (member, manifest) {
            (Rank::Trainer(_), MemberManifest::Trainer(_))
            | (Rank::Receiver(_), MemberManifest::Inference(_)) => Ok(()),
            _ => Err(format!("{member} sent the other side's manifest")),
        }
    }

    fn plan(&mut self, now: Duration, actions: &mut Actions) {
        let manifest = self.manifest();
        let plan = match self.planner.plan(&manifest) {
            Ok(plan) => plan,
            Err(error) => return self.no_plan(manifest, error.to_string(), now, actions),
        };
        let parts = match (self.parts)(&plan, &manifest) {
            Ok(parts) => parts,
            Err(error) => return self.end(Some(format!("no plan: {error}")), actions),
        };
        self.digest = plan.digest;
        self.assembly = self.config.world.members().filter(|member| !self.absent.contains(member)).collect();
        (self.started, self.hindrance, self.bank) = (true, None, Bank::default());
        let trainers = (0..).map(|rank| Rank::Trainer(TrainerRank(rank))).zip(&parts.trainers);
        let relays = parts.receivers.iter().map(|relay| &relay.plan);
        let relays = (0..).map(|rank| Rank::Receiver(ReceiverRank(rank))).zip(relays);
        let trainers = trainers.filter(|(rank, _)| self.assembly.contains(rank));
        let writers = trainers.chain(relays.filter(|(_, plan)| !plan.ops.is_empty()));
        self.quotas =
            writers.map(|(rank, plan)| (rank, Quota { bytes: plan.bytes, writes: plan.writes })).collect();
        let agreed = self.plan_verification(&parts);
        let agreed = agreed.and_then(|inbound| Ok((inbound, self.plan_measuring(&plan, &manifest)?)));
        let (inbound, quants) = match agreed {
            Ok(agreed) => agreed,
            Err(reason) => return self.end(Some(reason), actions),
        };
        let bytes_total = self.quotas.values().map(|quota| quota.bytes).sum();
        let bound_seconds = plan.bound.seconds();
        let writes = plan.receivers.iter().map(|part| part.writes).sum();
        self.history.planned(PlanStatus { digest: self.digest, bytes: bytes_total, writes, bound_seconds });
        actions.push(Action::Report(Report::Planned {
            digest: self.digest,
            bytes: bytes_total,
            writes,
            bound_seconds,
            limited_by: plan.bound.limited_by.map(|(rank, _)| rank),
            without: self.absent.iter().copied().collect(),
        }));
        let (committed, turned) = (self.committed, self.tell_missed());
        let (behind, on_loss) = (self.behind(), self.config.on_loss);

        let peer = |member: Rank| {
            let endpoint = self.seats.get(&member)?.endpoint.clone();
            Some(Peer { member, endpoint, turned: turned.contains(&member) })
        };
        let mut send = |member: Rank, part, peers: BTreeSet<Rank>| {
            let peers = peers.into_iter().filter_map(peer).collect();
            // Who is absent may be there, and still has to join.
            if let Some(seat) = self.seats.get(&member).filter(|_| self.assembly.contains(&member)) {
                let (digest, verify, behind) = (self.digest, self.config.verify, behind.clone());
                let planned = Planned {
                    digest,
                    part,
                    peers,
                    bound_seconds,
                    bytes_total,
                    verify,
                    committed,
                    behind,
                    on_loss,
                };
                actions.push(Action::Send(seat.connection, ToMember::Planned(Box::new(planned))));
            }
        };
        for (rank, (part, quant)) in (0..).map(TrainerRank).zip(parts.trainers.into_iter().zip(quants)) {
            let names = names(&plan, part.ops.iter().map(|op| op.param));
            let peers = destinations(&part.ops).collect();
            send(Rank::Trainer(rank), PlannedPart::Trainer { plan: part, names, quant }, peers);
        }
        let receivers = plan.receivers.iter().zip(parts.receivers).zip(inbound);
        for (rank, ((part, relay), inbound)) in (0..).map(ReceiverRank).zip(receivers) {
            let passed_on = relay.plan.ops.iter().map(|op| op.param);
            let names = names(&plan, passed_on.chain(inbound.iter().map(|arrives| arrives.param)));
            let from = part.arrivals.iter().map(|arrival| arrival.from);
            let peers = from.chain(destinations(&relay.plan.ops)).collect();
            let part = PlannedPart::Inference { part: part.clone(), relay, names, inbound };
            send(Rank::Receiver(rank), part, peers);
        }
        self.phase = Phase::Connecting { since: now, waiting: self.assembly.clone() };
    }

    /// Who learns with this plan of the last commit, which it had missed. Not before all have joined: what is committed may only
    /// be known from them.
    fn tell_missed(&mut self) -> BTreeSet<Rank> {
        let committed = self.committed;
        let missed = |(_, seat): &(&Rank, &mut Seat)| seat.holds.missed(committed);
        let served = committed.map_or(Holds::Nothing, Holds::Version);
        let turn = |(member, seat): (&Rank, &mut Seat)| {
            seat.holds = served;
            *member
        };
        self.seats.iter_mut().filter(missed).map(turn).collect()
    }

    /// What all who take part have said. Who does not, has nothing and needs nothing.
    fn manifest(&mut self) -> Manifest {
        let mut manifest =
            Manifest { trainers: Vec::new(), receivers: Vec::new(), options: self.config.options };
        for member in self.config.world.members() {
            let said = self.seats.get_mut(&member).and_then(|seat| seat.manifest.take());
            let (host, regions) = ("absent".to_owned(), Vec::new());
            let rails = vec![RailDecl { bytes_per_second: 1 }];
            match (member, said) {
                (_, Some(MemberManifest::Trainer(trainer))) => manifest.trainers.push(trainer),
                (_, Some(MemberManifest::Inference(receiver))) => manifest.receivers.push(receiver),
                (Rank::Trainer(_), None) => {
                    manifest.trainers.push(TrainerManifest { host, regions, rails, pieces: Vec::new() });
                }
                (Rank::Receiver(_), None) => {
                    manifest.receivers.push(ReceiverManifest { host, regions, rails, params: Vec::new() });
                }
            }
        }
        manifest
    }

    /// Without a trainer there may be none: then it is waited for. A rank that has come back with something else than it
    /// had is refused. A job that has not started has made no sense.
    fn no_plan(&mut self, manifest: Manifest, reason: String, now: Duration, actions: &mut Actions) {
        let is_trainer = |member: &Rank| matches!(member, Rank::Trainer(_));
        let newcomers = self.seats.iter().filter(|(_, seat)| seat.is_new).map(|(member, _)| *member);
        let newcomers: Vec<Rank> = newcomers.collect();
        let reason = format!("no plan: {reason}");
        if !self.started {
            return self.end(Some(reason), actions);
        }
        let trainers = manifest.trainers.into_iter().map(MemberManifest::Trainer);
        let receivers = manifest.receivers.into_iter().map(MemberManifest::Inference);
        for (member, manifest) in self.config.world.members().zip(trainers.chain(receivers)) {
            // Who is absent may be there, and still has to join.
            if let Some(seat) = self.seats.get_mut(&member).filter(|_| !self.absent.contains(&member)) {
                seat.manifest = Some(manifest);
            }
        }
        if self.absent.iter().any(is_trainer) {
            self.absent.retain(|member| !is_trainer(member));
            self.hindrance = Some(reason);
        } else if newcomers.is_empty() || newcomers.len() == self.seats.len() {
            self.end(Some(reason), actions);
        } else {
            for member in newcomers {
                // Without one of them there may be a plan for the others.
                if let Phase::Joining(_) = self.phase {
                    self.expel(member, &reason, now, actions);
                }
            }
        }
    }

    pub(super) fn ready(&mut self, member: Rank, digest: Digest, now: Duration, actions: &mut Actions) {
        if digest != self.digest {
            return self.expel(member, "it is ready for another plan than the one agreed", now, actions);
        }
        let Phase::Connecting { waiting, .. } = &mut self.phase else {
            return self.expel(member, "it said twice that it is ready", now, actions);
        };
        waiting.remove(&member);
        if waiting.is_empty() {
            self.phase = Phase::Idle;
            self.history.settled();
            self.send_all(|_| true, ToMember::Start, actions);
            actions.push(Action::Report(Report::Started));
        }
    }
}

/// The names of these parameters.
fn names(plan: &Plan, params: impl Iterator<Item = ParamId>) -> BTreeMap<ParamId, String> {
    let params: BTreeSet<ParamId> = params.collect();
    params.into_iter().map(|param| (param, plan.name(param).to_owned())).collect()
}

/// Whom these operations write to.
fn destinations(ops: &[Op]) -> impl Iterator<Item = Rank> {
    ops.iter().map(|op| Rank::Receiver(op.to))
}
