//! A member of the cluster: its half of the protocol, its queues, and a model of its memory.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use rendezvous::member::{InferenceMember, Served, TrainerMember};
use rendezvous::{
    Checksum, Fence, Holds, Join, MemberManifest, ParamSum, PushId, ToController, ToMember, Verify,
};
use xfer_plan::{
    DType, DestinationParam, ParamId, ParamMap, RailDecl, Rank, ReceiverManifest, ReceiverRank, RegionIndex,
    RelayPlan, SourcePiece, TensorBox, TrainerManifest, TrainerRank,
};

use crate::cluster::{DEADLINE, WORLD};

pub(crate) enum Protocol {
    Trainer(TrainerMember),
    Inference(InferenceMember),
}

/// What a rank writes in an attempt.
pub(crate) struct Writing {
    pub(crate) push: PushId,
    pub(crate) posted: usize,
    pub(crate) landed: BTreeSet<usize>,
    /// Tags of what has arrived.
    pub(crate) arrived: BTreeSet<u32>,
    pub(crate) failed: bool,
    pub(crate) fences: Vec<Fence>,
}

pub(crate) struct Member {
    pub(crate) protocol: Protocol,
    pub(crate) said: VecDeque<ToController>,
    pub(crate) told: VecDeque<ToMember>,
    /// What it writes; for a trainer nothing releases it.
    pub(crate) writes: RelayPlan,
    /// What is written here, by writer and operation.
    pub(crate) expected: BTreeMap<(Rank, usize), ParamId>,
    pub(crate) memory: BTreeMap<(Rank, usize), PushId>,
    pub(crate) writing: Option<Writing>,
    pub(crate) verify: Verify,
    pub(crate) names: BTreeMap<ParamId, String>,
    /// It has compared its bytes in this attempt, so that what changes now is not seen.
    pub(crate) compared: bool,
    pub(crate) flipped: bool,
    pub(crate) rail: u16,
    /// For a trainer: between versions.
    pub(crate) idle: bool,
    /// For a trainer: between versions once it has reported.
    pub(crate) stopped: bool,
    pub(crate) committed: u64,
    pub(crate) sticks: bool,
    /// The controller knows it.
    pub(crate) joined: bool,
    /// The controller reads what it says.
    pub(crate) open: bool,
    pub(crate) gone: bool,
    pub(crate) silent: bool,
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
}

impl Member {
    pub(crate) fn join(rank: Rank) -> Self {
        let join = join(rank);
        let (protocol, joins) = match rank {
            Rank::Trainer(_) => {
                let (protocol, joins) = TrainerMember::join(join);
                (Protocol::Trainer(protocol), joins)
            }
            Rank::Receiver(_) => {
                let (protocol, joins) = InferenceMember::join(join, false);
                (Protocol::Inference(protocol), joins)
            }
        };
        Self {
            protocol,
            said: [joins].into(),
            told: VecDeque::new(),
            writes: RelayPlan::default(),
            expected: BTreeMap::new(),
            memory: BTreeMap::new(),
            writing: None,
            verify: Verify::Off,
            names: BTreeMap::new(),
            compared: false,
            flipped: false,
            rail: 0,
            idle: false,
            stopped: false,
            committed: 0,
            sticks: false,
            joined: false,
            open: true,
            gone: false,
            silent: false,
        }
    }

    /// Says what the protocol has it say, which must be something.
    pub(crate) fn say(&mut self, answer: impl FnOnce(&mut Protocol) -> Option<ToController>) {
        self.said.push_back(answer(&mut self.protocol).unwrap());
    }

    pub(crate) fn start(&mut self, push: PushId, rail: u16) {
        assert!(self.writing.is_none(), "it still writes for the attempt before");
        self.rail = rail;
        let (landed, arrived) = (BTreeSet::new(), BTreeSet::new());
        self.writing = Some(Writing { push, posted: 0, landed, arrived, failed: false, fences: Vec::new() });
    }

    /// What it sent in an attempt, summed.
    pub(crate) fn sums(&self, from: Rank, push: PushId) -> Vec<ParamSum> {
        let mut sums: BTreeMap<_, Checksum> = BTreeMap::new();
        for (number, op) in self.writes.plan.ops.iter().enumerate() {
            if self.verify.covers(push, &self.names[&op.param]) {
                sums.entry((op.to, op.param)).or_default().add(hash((from, number), push));
            }
        }
        sums.into_iter().map(|((to, param), sum)| ParamSum { to, param, sum }).collect()
    }

    /// Compares what is here with what was sent. Only a byte that became another makes a difference.
    pub(crate) fn compare(&mut self, push: PushId, sent: Vec<(ParamId, Checksum)>) -> Result<(), String> {
        let mut found: BTreeMap<_, Checksum> = BTreeMap::new();
        for (cell, param) in &self.expected {
            if self.verify.covers(push, &self.names[param]) {
                found.entry(*param).or_default().add(hash(*cell, self.memory[cell]));
            }
        }
        self.compared = true;
        let same = found == sent.into_iter().collect();
        assert!(same || self.flipped, "other bytes than were sent");
        if same { Ok(()) } else { Err("other bytes arrived".into()) }
    }

    /// Whether a byte that becomes another now is either overwritten or found.
    pub(crate) fn flip_would_be_found(&self) -> bool {
        let torn = match &self.protocol {
            Protocol::Trainer(_) => false,
            Protocol::Inference(protocol) => matches!(protocol.served(), Served::Torn(_)),
        };
        torn && self.verify == Verify::Full && !self.compared && !self.memory.is_empty()
    }

    pub(crate) fn flip(&mut self) {
        self.flipped = true;
        if let Some(mut cell) = self.memory.first_entry() {
            cell.insert(PushId([0; 16]));
        }
    }

    pub(crate) fn fail(&mut self) {
        if let Some(writing) = &mut self.writing {
            writing.failed = true;
        }
    }
}

/// Stands for the hash of what an operation wrote in an attempt.
fn hash((from, op): (Rank, usize), push: PushId) -> Checksum {
    let from = match from {
        Rank::Trainer(TrainerRank(rank)) => u128::from(rank),
        Rank::Receiver(ReceiverRank(rank)) => 100 + u128::from(rank),
    };
    (u128::from_le_bytes(push.0) ^ from << 64 ^ op as u128).into()
}

/// Two trainers with a row each of two tensors that all inference ranks need whole, two of them on each host.
fn join(member: Rank) -> Join {
    let rails = vec![RailDecl { bytes_per_second: 1000 }];
    let (region, names) = (RegionIndex(0), ["v", "w"]);
    let manifest = match member {
        Rank::Trainer(TrainerRank(rank)) => {
            let piece = |(name, offset): (&str, u64)| SourcePiece {
                tensor: name.into(),
                dtype: DType::U8,
                shape: vec![2, 8],
                bounds: TensorBox::new(&[u64::from(rank), 0], &[1, 8]).unwrap(),
                region,
                offset,
            };
            let pieces = names.into_iter().zip([0, 8]).map(piece).collect();
            MemberManifest::Trainer(TrainerManifest {
                host: "trainers".into(),
                regions: vec![16],
                rails,
                pieces,
            })
        }
        Rank::Receiver(ReceiverRank(rank)) => {
            let param = |(name, offset): (&str, u64)| DestinationParam {
                name: name.into(),
                dtype: DType::U8,
                shape: vec![2, 8],
                region,
                offset,
                map: ParamMap::tensor(name).into(),
                priority: 0,
            };
            let params = names.into_iter().zip([0, 16]).map(param).collect();
            let host = format!("inference {}", rank / 2);
            MemberManifest::Inference(ReceiverManifest { host, regions: vec![32], rails, params })
        }
    };
    Join {
        job: "job".into(),
        member,
        world: WORLD,
        deadline: DEADLINE,
        manifest,
        endpoint: vec![1, 2, 3],
        holds: Holds::Nothing,
    }
}
