//! A member of the cluster: its half of the protocol, its queues, and a model of its memory.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use rendezvous::member::{InferenceMember, TrainerMember};
use rendezvous::{Fence, Join, MemberManifest, PushId, ToController, ToMember};
use xfer_plan::{
    DType, DestinationParam, ParamMap, RailDecl, Rank, ReceiverManifest, ReceiverRank, RegionIndex,
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
    pub(crate) expected: BTreeSet<(Rank, usize)>,
    pub(crate) memory: BTreeMap<(Rank, usize), PushId>,
    pub(crate) writing: Option<Writing>,
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
                let (protocol, joins) = InferenceMember::join(join);
                (Protocol::Inference(protocol), joins)
            }
        };
        Self {
            protocol,
            said: [joins].into(),
            told: VecDeque::new(),
            writes: RelayPlan::default(),
            expected: BTreeSet::new(),
            memory: BTreeMap::new(),
            writing: None,
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

    pub(crate) fn fail(&mut self) {
        if let Some(writing) = &mut self.writing {
            writing.failed = true;
        }
    }
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
    Join { job: "job".into(), member, world: WORLD, deadline: DEADLINE, manifest, endpoint: vec![1, 2, 3] }
}
