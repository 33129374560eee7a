//! What members do in their steps.

use rendezvous::member::{InferenceStep, Served, TrainerStep};
use rendezvous::{Fence, OnLoss, Planned, PlannedPart, ToController, ToMember};
use xfer_plan::{Inbound, NO_TAG, QuantPart, Rank, RelayPlan, TrainerRank};

use crate::cluster::Cluster;
use crate::job::{self, Endpoint, WORLD};
use crate::link::Link;
use crate::network::Flight;
use crate::process::{Part, Protocol, magnitude};

impl Cluster {
    /// Says what the protocol has it say, which must be something.
    pub(crate) fn say(&mut self, rank: Rank, answer: impl FnOnce(&mut Protocol) -> Option<ToController>) {
        let process = self.process(rank);
        let message = answer(&mut process.protocol).unwrap();
        let link = process.link;
        if let Some(link) = link.and_then(|id| self.links.get_mut(&id)) {
            link.say(message);
        }
    }

    /// Closes all rails, opens others, and joins with these.
    pub(crate) fn join(&mut self, rank: Rank) {
        self.opened += 1;
        let epoch = self.opened;
        self.network.close_all_but(rank, Some(epoch));
        self.network.give_up(rank);
        let setup = self.setup.clone();
        let process = self.process(rank);
        let is_new = process.link.is_none();
        process.link.get_or_insert(epoch);
        (process.epoch, process.writing, process.prepared, process.measuring) = (epoch, None, None, None);
        let endpoint = Endpoint { epoch, arenas: process.memory.name() };
        let join = job::join(rank, &setup, &endpoint);
        if is_new {
            self.links.insert(epoch, Link::new(rank));
        }
        self.say(rank, |protocol| {
            Some(match protocol {
                Protocol::Trainer(protocol) => protocol.rejoin(join),
                Protocol::Inference(protocol) => {
                    let served = protocol.served();
                    let message = protocol.rejoin(join);
                    if let ToController::Join(join) = &message {
                        // It says that it has what it serves, and nothing else.
                        let holds = join.holds.served().map_or(0, |commit| commit.version);
                        let serves = if let Served::Version(version) = served { version } else { 0 };
                        assert_eq!(holds, serves, "{rank} is {served} and says that it has {:?}", join.holds);
                    }
                    message
                }
            })
        });
    }

    /// The process is gone, and its memory and rails with it. What it has sent is on its way.
    pub(crate) fn die(&mut self, rank: Rank, delivered: bool) {
        let process = self.members.get_mut(&rank).unwrap().process.take().unwrap();
        if let Some(link) = process.link.and_then(|id| self.links.get_mut(&id)) {
            link.die(delivered);
        }
        self.network.close_all_but(rank, None);
        self.network.give_up(rank);
    }

    pub(crate) fn tell(&mut self, rank: Rank) {
        let id = self.process(rank).link.unwrap();
        let link = self.links.get_mut(&id).unwrap();
        match (link.told.pop_front(), self.setup.on_loss) {
            (Some(message), _) => self.told(rank, message),
            (None, OnLoss::Fail) => self.process(rank).refused = true,
            (None, _) => {
                link.read = false;
                let process = self.process(rank);
                (process.link, process.writing) = (None, None);
                self.network.give_up(rank);
            }
        }
    }

    fn told(&mut self, rank: Rank, message: ToMember) {
        match &mut self.process(rank).protocol {
            Protocol::Trainer(protocol) => {
                let step = protocol.handle(message).unwrap();
                self.train(rank, step);
            }
            Protocol::Inference(protocol) => {
                let step = protocol.handle(message).unwrap();
                self.serve(rank, step);
            }
        }
    }

    fn train(&mut self, rank: Rank, step: Option<TrainerStep>) {
        match step {
            Some(TrainerStep::Connect(planned)) => {
                self.resolve(rank, &planned);
                self.planned(rank, *planned);
            }
            Some(TrainerStep::Measure { push, .. }) => self.process(rank).measuring = Some(push),
            Some(TrainerStep::Write { push, bank, told, .. }) => {
                // Both have reported, whatever they were told of attempts before.
                let blocks = self.process(rank).part.measures();
                let largest = magnitude(push, Rank::Trainer(TrainerRank(WORLD.trainers - 1)));
                assert_eq!(told, vec![largest; blocks], "{rank} is told other magnitudes than were reported");
                let rail = self.network.fresh_rail();
                self.process(rank).start(push, bank, rail);
                self.post(rank);
            }
            Some(TrainerStep::Stop { .. }) => {
                let process = self.process(rank);
                process.fail();
                process.stopping = true;
            }
            Some(TrainerStep::Committed { version, .. }) => {
                self.ledger.told_committed(version);
                let process = self.process(rank);
                (process.known, process.behind, process.undecided) = (version, false, None);
            }
            // While it joins, it is told that nobody else does, and not how its last attempt ended.
            Some(TrainerStep::Aborted { .. }) if !self.process(rank).protocol.trainer().is_undecided() => {
                if let Some((version, push)) = self.process(rank).undecided.take() {
                    self.ledger.told_aborted(version, push);
                }
            }
            Some(TrainerStep::Refused { .. }) => self.refused(rank),
            Some(TrainerStep::Started | TrainerStep::Aborted { .. } | TrainerStep::Regroup { .. }) | None => {
            }
        }
    }

    /// A trainer finds out how the attempt ended that it has not heard of since.
    fn resolve(&mut self, rank: Rank, planned: &Planned) {
        let process = self.process(rank);
        let undecided = process.undecided.take();
        let missed = process.protocol.trainer().take_missed_commit();
        assert!(!process.protocol.trainer().is_undecided());
        process.known = planned.committed.map_or(0, |commit| commit.version);
        process.behind = !planned.behind.is_empty();
        let known = process.known;
        match (missed, undecided) {
            (Some(version), undecided) => {
                assert_eq!(undecided.map(|(version, _)| version), Some(version));
                self.ledger.told_committed(version);
            }
            (None, Some((version, push))) if known < version => self.ledger.told_aborted(version, push),
            // It is outdated, whether it was committed or not.
            (None, Some((version, _))) => assert!(known > version),
            (None, None) => {}
        }
    }

    fn serve(&mut self, rank: Rank, step: Option<InferenceStep>) {
        match step {
            Some(InferenceStep::Planned(planned)) => {
                let process = self.process(rank);
                if process.protocol.inference().take_missed_commit().is_some() {
                    process.memory.commit();
                }
                // Record or no record: what a rank has said that it serves is known from then on.
                let committed = planned.committed.map_or(0, |commit| commit.version);
                if let Served::Version(version) = process.protocol.inference().served() {
                    assert!(version <= committed, "{rank} serves {version} in a job that is at {committed}");
                }
                self.planned(rank, *planned);
            }
            Some(InferenceStep::Prepare { push, close, bank, own, .. }) => {
                let closed = self.close(rank, &close);
                let rail = self.network.fresh_rail();
                let process = self.process(rank);
                (process.compared, process.flipped) = (false, false);
                if closed.is_ok() {
                    process.prepared = Some(push);
                    process.memory.prepare(own);
                    if !process.part.writes.plan.ops.is_empty() {
                        process.start(push, bank, rail);
                    }
                }
                self.say(rank, |protocol| protocol.inference().prepared(closed));
            }
            Some(InferenceStep::Fence { close, .. }) => {
                let closed = self.close(rank, &close);
                self.say(rank, |protocol| protocol.inference().fenced(closed));
            }
            Some(InferenceStep::Verify { push, sums, .. }) => {
                let compared = self.process(rank).compare(push, sums);
                self.say(rank, |protocol| protocol.inference().verified(compared));
            }
            Some(InferenceStep::Commit { .. }) => {
                let process = self.process(rank);
                process.memory.commit();
                process.prepared = None;
                self.say(rank, |protocol| protocol.inference().committed());
            }
            Some(InferenceStep::Aborted { .. }) => {
                let process = self.process(rank);
                process.prepared = None;
                process.fail();
            }
            Some(InferenceStep::Regroup { .. }) => {
                self.process(rank).writing = None;
                self.network.give_up(rank);
            }
            Some(InferenceStep::Refused { .. }) => self.refused(rank),
            Some(InferenceStep::Started | InferenceStep::Finished) | None => {}
        }
    }

    /// Nothing further comes: where jobs go on, such a process ends, and is started again.
    fn refused(&mut self, rank: Rank) {
        match self.setup.on_loss {
            OnLoss::Fail => self.process(rank).refused = true,
            _ => self.die(rank, true),
        }
    }

    fn planned(&mut self, rank: Rank, planned: Planned) {
        let mut quant = QuantPart::default();
        let (writes, names, inbound) = match planned.part {
            PlannedPart::Trainer { plan, names, quant: own } => {
                quant = own;
                (RelayPlan { plan, ..RelayPlan::default() }, names, Vec::new())
            }
            PlannedPart::Inference { part, relay, names, inbound } => {
                let listed: u64 = inbound.iter().map(Inbound::bytes).sum();
                assert_eq!(listed, if planned.verify.is_on() { part.bytes } else { 0 });
                (relay, names, inbound)
            }
        };
        let peers = planned.peers.into_iter().map(|peer| (peer.member, peer)).collect();
        let part = Part { writes, peers, names, quant, verify: planned.verify, inbound };
        for op in &part.writes.plan.ops {
            assert_eq!(op.writes(), 1);
            assert!(
                part.peers.contains_key(&Rank::Receiver(op.to)),
                "{rank} is not told how to reach {}",
                op.to
            );
        }
        self.process(rank).part = part;
        self.say(rank, |protocol| match protocol {
            Protocol::Trainer(protocol) => protocol.ready(),
            Protocol::Inference(protocol) => protocol.ready(),
        });
    }

    /// Puts what is released on the network.
    pub(crate) fn post(&mut self, rank: Rank) {
        let flights = self.process(rank).post(rank);
        // What goes to rails that are closed comes nowhere.
        let open = |flight: &Flight| {
            let process = self.members[&flight.to].process.as_ref();
            process.is_some_and(|process| process.epoch == flight.epoch)
        };
        let flights: Vec<Flight> = flights.into_iter().filter(open).collect();
        self.network.flights.extend(flights);
    }

    pub(crate) fn land(&mut self, flight: usize) {
        let Flight { from, op, to, arena, tag, push, bytes, given_up, .. } =
            self.network.flights.swap_remove(flight);
        if !given_up && let Some(writing) = &mut self.process(from).writing {
            writing.landed.insert(op);
        }
        let awake = !self.members[&to].silent;
        let process = self.process(to);
        if let Protocol::Inference(protocol) = &process.protocol
            && !process.memory.stages
        {
            let served = protocol.served();
            assert!(matches!(served, Served::Torn(_)), "{to} serves what {from} still writes: {served}");
        }
        process.memory.write(arena, &bytes);
        let Some(writing) = process.writing.as_mut().filter(|_| tag != NO_TAG) else { return };
        assert_eq!(writing.push, push, "{to} counts what {from} wrote in another attempt");
        assert!(writing.arrived.insert(tag), "{to} counts twice what {from} wrote");
        if awake {
            self.post(to);
        }
    }

    /// What has not landed of what this rank wrote, and is not given up yet. It is now, and fences are owed.
    pub(crate) fn give_up(&mut self, rank: Rank) -> Vec<Flight> {
        let given_up = self.network.give_up(rank);
        let fence = |flight: &Flight| match flight.to {
            Rank::Receiver(at) => Some(Fence { at, rail: flight.rail }),
            Rank::Trainer(_) => None,
        };
        let fences: Vec<Fence> = given_up.iter().filter_map(fence).collect();
        if let Some(writing) = &mut self.process(rank).writing {
            writing.fences.extend(fences);
        }
        given_up
    }

    /// A trainer has measured, or could not. Where the attempt is over meanwhile, it says nothing.
    pub(crate) fn measured(&mut self, rank: Rank, well: bool) {
        let process = self.process(rank);
        let (push, blocks) = (process.measuring.take().unwrap(), process.part.measures());
        let result =
            if well { Ok(vec![magnitude(push, rank); blocks]) } else { Err("it did not measure".into()) };
        if let Some(message) = process.protocol.trainer().measured(result) {
            self.say(rank, |_| Some(message));
        }
    }

    pub(crate) fn report(&mut self, rank: Rank) {
        self.give_up(rank);
        let process = self.process(rank);
        process.stopping = false;
        let message = process.report().unwrap();
        if let (Protocol::Trainer(trainer), ToController::Written { push, .. }) =
            (&process.protocol, &message)
            && trainer.is_undecided()
        {
            process.undecided = Some((process.begun, *push));
        }
        self.say(rank, |_| Some(message));
    }

    fn close(&mut self, rank: Rank, rails: &[u16]) -> Result<(), String> {
        if !rails.is_empty() && std::mem::take(&mut self.process(rank).sticks) {
            return Err("it does not close".into());
        }
        self.network.close(rank, rails);
        Ok(())
    }
}
