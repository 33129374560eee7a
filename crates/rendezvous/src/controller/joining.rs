//! Who may take part, and what each is told to do: from the first join to the start.
//!
//! Nothing here is believed before it is checked: a manifest goes to the planner, which validates it, and an endpoint is passed
//! on unread.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use xfer_plan::{
    Digest, Manifest, Op, ParamId, Plan, Rank, ReceiverManifest, ReceiverPart, ReceiverRank, TrainerManifest,
    TrainerRank,
};

use super::{Action, Actions, ConnectionId, Controller, Phase, Quota, Report, Seat, refuse};
use crate::protocol::{ENDPOINT_BYTES_MAX, Join, MemberManifest, Peer, Planned, PlannedPart, ToMember};
use crate::refusal::Refusal;
use crate::status::PlanStatus;

impl Controller {
    pub(super) fn join(&mut self, from: ConnectionId, join: Join, now: Duration, actions: &mut Actions) {
        if let Err(reason) = self.admits(&join) {
            let peer = join.member.to_string();
            let refused = Report::Refused { peer, refusal: Refusal::Join, reason: reason.clone() };
            actions.push(Action::Report(refused));
            return refuse(from, reason, actions);
        }
        let member = join.member;
        self.members.insert(from, member);
        let seat = Seat {
            connection: from,
            manifest: Some(join.manifest),
            endpoint: join.endpoint,
            heard_at: now,
            progress: 0,
            progress_at: now,
            left: false,
        };
        self.seats.insert(member, seat);
        self.history.joined(member, from);
        actions.push(Action::Report(Report::Joined(member)));
        if let Phase::Joining(since) = &mut self.phase {
            // Whoever joins is progress: the others get the whole deadline again.
            *since = Some(now);
        }
        if self.config.world.members().all(|member| self.seats.contains_key(&member)) {
            self.plan(now, actions);
        }
    }

    fn admits(&self, join: &Join) -> Result<(), String> {
        let Join { job, member, world, deadline, manifest, endpoint } = join;
        let Phase::Joining(_) = self.phase else {
            return Err(format!("{member} comes too late: the job has started without it"));
        };
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
        if self.seats.contains_key(member) {
            return Err(format!("{member} has joined already; is the same rank started twice?"));
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
        let mut trainers: Vec<TrainerManifest> = Vec::new();
        let mut receivers: Vec<ReceiverManifest> = Vec::new();
        // The seats are in rank order, trainers first.
        for seat in self.seats.values_mut() {
            match seat.manifest.take() {
                Some(MemberManifest::Trainer(manifest)) => trainers.push(manifest),
                Some(MemberManifest::Inference(manifest)) => receivers.push(manifest),
                None => {}
            }
        }
        let manifest = Manifest { trainers, receivers, options: self.config.options };
        let plan = match xfer_plan::plan(&manifest) {
            Ok(plan) => plan,
            Err(error) => return self.end(Some(format!("no plan: {error}")), actions),
        };
        let passed_on =
            |part: &ReceiverPart| part.arrivals.iter().any(|a| matches!(a.from, Rank::Receiver(_)));
        if !self.config.relays && plan.receivers.iter().any(passed_on) {
            let reason = "the plan has inference ranks pass bytes on, which they cannot do yet: plan with relay `never`";
            return self.end(Some(reason.into()), actions);
        }
        let parts = match (self.parts)(&plan, &manifest) {
            Ok(parts) => parts,
            Err(error) => return self.end(Some(format!("no plan: {error}")), actions),
        };
        self.digest = plan.digest;
        let trainers = (0..).map(|rank| Rank::Trainer(TrainerRank(rank))).zip(&parts.trainers);
        let relays = parts.receivers.iter().map(|relay| &relay.plan);
        let relays = (0..).map(|rank| Rank::Receiver(ReceiverRank(rank))).zip(relays);
        let writers = trainers.chain(relays.filter(|(_, plan)| !plan.ops.is_empty()));
        self.quotas =
            writers.map(|(rank, plan)| (rank, Quota { bytes: plan.bytes, writes: plan.writes })).collect();
        let inbound = match self.plan_verification(&parts) {
            Ok(inbound) => inbound,
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
        }));

        let mut send = |member: Rank, part, peers: BTreeSet<Rank>| {
            let endpoint =
                |member| self.seats.get(&member).map(|seat| seat.endpoint.clone()).unwrap_or_default();
            let peers = peers.into_iter().map(|member| Peer { member, endpoint: endpoint(member) }).collect();
            if let Some(seat) = self.seats.get(&member) {
                let verify = self.config.verify;
                let planned =
                    Planned { digest: self.digest, part, peers, bound_seconds, bytes_total, verify };
                actions.push(Action::Send(seat.connection, ToMember::Planned(Box::new(planned))));
            }
        };
        for (rank, part) in (0..).map(TrainerRank).zip(parts.trainers) {
            let names = names(&plan, part.ops.iter().map(|op| op.param));
            let peers = destinations(&part.ops).collect();
            send(Rank::Trainer(rank), PlannedPart::Trainer { plan: part, names }, peers);
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
        self.phase = Phase::Connecting { since: now, waiting: self.config.world.members().collect() };
    }

    pub(super) fn ready(&mut self, member: Rank, digest: Digest, actions: &mut Actions) {
        if digest != self.digest {
            return self.lose(member, "it is ready for another plan than the one agreed", actions);
        }
        let Phase::Connecting { waiting, .. } = &mut self.phase else {
            return self.lose(member, "it said twice that it is ready", actions);
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
