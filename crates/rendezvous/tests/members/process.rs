//! A process of a rank: its half of the protocol, and what it knows and writes.

use std::collections::{BTreeMap, BTreeSet};

use rendezvous::member::{InferenceMember, TrainerMember};
use rendezvous::{Bank, Checksum, Fence, ParamSum, Peer, PushId, ToController, Verify};
use xfer_plan::{HeldTable, Inbound, NO_TAG, ParamId, QuantPart, Rank, ReceiverRank, RelayPlan, TensorBox};

use crate::job::{Endpoint, is_trainer};
use crate::memory::{self, Memory};
use crate::network::Flight;

pub(crate) enum Protocol {
    Trainer(TrainerMember),
    Inference(InferenceMember),
}

impl Protocol {
    pub(crate) fn trainer(&mut self) -> &mut TrainerMember {
        let Self::Trainer(protocol) = self else { panic!("not a trainer") };
        protocol
    }

    pub(crate) fn inference(&mut self) -> &mut InferenceMember {
        let Self::Inference(protocol) = self else { panic!("not an inference rank") };
        protocol
    }

    pub(crate) fn is_out(&self) -> bool {
        match self {
            Self::Trainer(protocol) => protocol.is_out(),
            Self::Inference(protocol) => protocol.is_out(),
        }
    }
}

/// What a rank writes in an attempt.
pub(crate) struct Writing {
    pub(crate) push: PushId,
    bank: Bank,
    posted: BTreeSet<usize>,
    pub(crate) landed: BTreeSet<usize>,
    /// Tags of what has arrived, which releases operations.
    pub(crate) arrived: BTreeSet<u32>,
    pub(crate) failed: bool,
    pub(crate) fences: Vec<Fence>,
    sums: BTreeMap<(ReceiverRank, ParamId), Checksum>,
}

/// A rank's part of the plan.
#[derive(Default)]
pub(crate) struct Part {
    /// What it writes; for a trainer nothing releases it.
    pub(crate) writes: RelayPlan,
    pub(crate) peers: BTreeMap<Rank, Peer>,
    pub(crate) names: BTreeMap<ParamId, String>,
    pub(crate) quant: QuantPart,
    pub(crate) verify: Verify,
    pub(crate) inbound: Vec<Inbound>,
}

impl Part {
    /// Blocks that it measures, and is told of.
    pub(crate) fn measures(&self) -> usize {
        let blocks = |of: &dyn Fn(&HeldTable) -> &Vec<TensorBox>| -> u64 {
            self.quant.tables.iter().flat_map(of).filter_map(TensorBox::volume).sum()
        };
        let reports = blocks(&|table| &table.reports);
        assert_eq!(reports, blocks(&|table| &table.told));
        reports as usize
    }
}

/// What a trainer finds in an attempt: the last one the most.
pub(crate) fn magnitude(push: PushId, rank: Rank) -> f32 {
    let Rank::Trainer(rank) = rank else { panic!("not a trainer") };
    f32::from(push.0[0]) + rank.0 as f32
}

pub(crate) struct Process {
    pub(crate) protocol: Protocol,
    /// Its control connection.
    pub(crate) link: Option<u64>,
    /// Its rails.
    pub(crate) epoch: u64,
    pub(crate) part: Part,
    pub(crate) memory: Memory,
    pub(crate) writing: Option<Writing>,
    /// Its rail for what it posts from now on.
    pub(crate) rail: u16,
    /// For a trainer: the attempt that it measures for.
    pub(crate) measuring: Option<PushId>,
    /// The attempt that an inference rank is prepared for.
    pub(crate) prepared: Option<PushId>,
    /// It has compared its bytes in this attempt, so that what changes now is not seen.
    pub(crate) compared: bool,
    pub(crate) flipped: bool,
    /// The next rails that it has to close do not close.
    pub(crate) sticks: bool,
    /// For a trainer: it was told to stop, and reads nothing before it has.
    pub(crate) stopping: bool,
    /// For a trainer: the version that it knows to be committed.
    pub(crate) known: u64,
    /// For a trainer: somebody has not got that.
    pub(crate) behind: bool,
    /// For a trainer: the version that it began last.
    pub(crate) begun: u64,
    /// For a trainer: the attempt of which it said that it wrote everything.
    pub(crate) undecided: Option<(u64, PushId)>,
    /// The controller has refused it.
    pub(crate) refused: bool,
}

impl Process {
    pub(crate) fn new(rank: Rank, stages: bool) -> Self {
        let protocol = match is_trainer(rank) {
            true => Protocol::Trainer(TrainerMember::new()),
            false => Protocol::Inference(InferenceMember::new(stages)),
        };
        Self {
            protocol,
            link: None,
            epoch: 0,
            part: Part::default(),
            memory: Memory::new(stages),
            writing: None,
            rail: 0,
            measuring: None,
            prepared: None,
            compared: false,
            flipped: false,
            sticks: false,
            stopping: false,
            known: 0,
            behind: false,
            begun: 0,
            undecided: None,
            refused: false,
        }
    }

    /// Whether it waits to hear how an attempt ended.
    pub(crate) fn is_undecided(&self) -> bool {
        match &self.protocol {
            Protocol::Trainer(protocol) => protocol.is_undecided(),
            Protocol::Inference(protocol) => protocol.is_undecided(),
        }
    }

    /// Whether there is nothing left to land of what it writes.
    pub(crate) fn has_written(&self) -> bool {
        let done =
            |writing: &Writing| writing.failed || writing.landed.len() == self.part.writes.plan.ops.len();
        self.writing.as_ref().is_some_and(done)
    }

    pub(crate) fn is_writing(&self) -> bool {
        self.writing.is_some() && !self.has_written()
    }

    /// A relay counts what arrives: it must not arrive twice.
    pub(crate) fn is_counted(&self) -> bool {
        self.part.writes.plan.tags.iter().any(|tag| *tag != NO_TAG)
    }

    pub(crate) fn start(&mut self, push: PushId, bank: Bank, rail: u16) {
        assert!(self.writing.is_none(), "it still writes for the attempt before");
        self.rail = rail;
        self.writing = Some(Writing {
            push,
            bank,
            posted: BTreeSet::new(),
            landed: BTreeSet::new(),
            arrived: BTreeSet::new(),
            failed: false,
            fences: Vec::new(),
            sums: BTreeMap::new(),
        });
    }

    /// Posts what is released and not posted yet.
    pub(crate) fn post(&mut self, from: Rank) -> Vec<Flight> {
        let Some(writing) = self.writing.as_mut().filter(|writing| !writing.failed) else {
            return Vec::new();
        };
        let RelayPlan { plan, first, .. } = &self.part.writes;
        let released: Vec<usize> = match is_trainer(from) {
            true => (0..plan.ops.len()).collect(),
            false => writing
                .arrived
                .iter()
                .flat_map(|&tag| {
                    let end = first.get(tag as usize + 1).map_or(plan.ops.len(), |next| *next as usize);
                    first[tag as usize] as usize..end
                })
                .collect(),
        };
        let mut flights = Vec::new();
        for number in released {
            if !writing.posted.insert(number) {
                continue;
            }
            let (op, push) = (&plan.ops[number], writing.push);
            let to = Rank::Receiver(op.to);
            let peer = &self.part.peers[&to];
            let endpoint = Endpoint::decode(&peer.endpoint);
            let bytes = if is_trainer(from) { memory::sent(op, push) } else { self.memory.read(op) };
            writing.sums.entry((op.to, op.param)).or_default().add(memory::sum(&bytes));
            flights.push(Flight {
                from,
                op: number,
                to,
                epoch: endpoint.epoch,
                arena: endpoint.arenas[peer.bank(writing.bank).index()],
                tag: plan.tags.get(number).copied().unwrap_or(NO_TAG),
                rail: self.rail,
                push,
                bytes,
                given_up: false,
            });
        }
        flights
    }

    /// Its writes are over: what it says of them.
    pub(crate) fn report(&mut self) -> Option<ToController> {
        let Writing { push, failed, fences, sums, .. } = self.writing.take()?;
        let covered = |param: &ParamId| self.part.verify.covers(push, &self.part.names[param]);
        let sums = sums.into_iter().filter(|((_, param), _)| covered(param));
        let sums = sums.map(|((to, param), sum)| ParamSum { to, param, sum }).collect();
        let plan = &self.part.writes.plan;
        let result = if failed { Err("it failed".to_owned()) } else { Ok((plan.bytes, plan.writes)) };
        match &mut self.protocol {
            Protocol::Trainer(protocol) => protocol.written(result, fences, sums),
            Protocol::Inference(protocol) => protocol.relayed(result, fences, sums),
        }
    }

    /// Compares what is here with what was sent. Only a byte that became another makes a difference.
    pub(crate) fn compare(&mut self, push: PushId, sent: Vec<(ParamId, Checksum)>) -> Result<(), String> {
        let mut found: BTreeMap<_, Checksum> = BTreeMap::new();
        for inbound in &self.part.inbound {
            if self.part.verify.covers(push, &self.part.names[&inbound.param]) {
                found.entry(inbound.param).or_default().add(self.memory.sum(inbound));
            }
        }
        self.compared = true;
        let same = found == sent.into_iter().collect();
        assert!(same || self.flipped, "other bytes than were sent");
        if same { Ok(()) } else { Err("other bytes arrived".into()) }
    }

    /// Whether a byte that becomes another now is either overwritten or found.
    pub(crate) fn flip_would_be_found(&self) -> bool {
        self.prepared.is_some() && self.part.verify == Verify::Full && !self.compared
    }

    pub(crate) fn fail(&mut self) {
        if let Some(writing) = &mut self.writing {
            writing.failed = true;
        }
    }
}
