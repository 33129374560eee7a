//! The job that the members form: who they are and what each has or needs.

use std::time::Duration;

use rendezvous::{Holds, Join, MemberManifest, OnLoss, SessionId, Verify, World};
use xfer_plan::{
    DType, DestinationParam, ParamMap, RailDecl, Rank, ReceiverManifest, ReceiverRank, RegionIndex, Relay,
    SourcePiece, TensorBox, TrainerManifest, TrainerRank,
};

pub(crate) const WORLD: World = World { trainers: 2, inference: 4 };
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// The last version that is pushed.
pub(crate) const TARGET: u64 = 3;

/// Bytes of an inference rank's arena.
pub(crate) const ARENA_BYTES: usize = 32;

/// What a run is about.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) relay: Relay,
    /// Whether inference ranks can pass bytes on.
    pub(crate) relays: bool,
    pub(crate) verify: Verify,
    pub(crate) on_loss: OnLoss,
    /// The inference ranks that stage versions, a bit each.
    pub(crate) stages: u8,
    /// Each trainer owns everything.
    pub(crate) replicated: bool,
    /// The controller's record outlives it.
    pub(crate) records: bool,
    /// Trainers push the committed version again as soon as somebody has not got it; otherwise only the last one.
    pub(crate) repeats: bool,
    /// Once lost, this rank never comes back.
    pub(crate) forever: Option<Rank>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            relay: Relay::Never,
            relays: true,
            verify: Verify::Off,
            on_loss: OnLoss::Fail,
            stages: 0,
            replicated: false,
            records: true,
            repeats: false,
            forever: None,
        }
    }
}

impl Setup {
    pub(crate) fn stages(&self, rank: Rank) -> bool {
        matches!(rank, Rank::Receiver(rank) if self.stages >> rank.0 & 1 == 1)
    }
}

pub(crate) fn is_trainer(rank: Rank) -> bool {
    matches!(rank, Rank::Trainer(_))
}

/// How a rank is reached: which rails it has opened, of all that it ever did, and its two arenas.
pub(crate) struct Endpoint {
    pub(crate) epoch: u64,
    pub(crate) arenas: [usize; 2],
}

impl Endpoint {
    fn encode(&self) -> Vec<u8> {
        let arenas = self.arenas.map(|arena| arena as u8);
        [&self.epoch.to_le_bytes()[..], &arenas].concat()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Self {
        let (epoch, arenas) = bytes.split_first_chunk().unwrap();
        Self { epoch: u64::from_le_bytes(*epoch), arenas: [arenas[0].into(), arenas[1].into()] }
    }
}

/// Two trainers with a row each of two tensors, or with both rows, that all inference ranks need whole, two of them on
/// each host.
pub(crate) fn join(member: Rank, replicated: bool, endpoint: &Endpoint) -> Join {
    let rails = vec![RailDecl { bytes_per_second: 1000 }];
    let (region, names) = (RegionIndex(0), ["v", "w"]);
    let manifest = match member {
        Rank::Trainer(TrainerRank(rank)) => {
            let (origin, rows) = if replicated { (0, 2) } else { (u64::from(rank), 1) };
            let piece = |(name, offset): (&str, u64)| SourcePiece {
                tensor: name.into(),
                dtype: DType::U8,
                shape: vec![2, 8],
                bounds: TensorBox::new(&[origin, 0], &[rows, 8]).unwrap(),
                region,
                offset,
            };
            let pieces = names.into_iter().zip([0, 16]).map(piece).collect();
            MemberManifest::Trainer(TrainerManifest {
                host: "trainers".into(),
                regions: vec![32],
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
            let regions = vec![ARENA_BYTES as u64];
            MemberManifest::Inference(ReceiverManifest { host, regions, rails, params })
        }
    };
    Join {
        job: "job".into(),
        member,
        world: WORLD,
        deadline: DEADLINE,
        manifest,
        endpoint: endpoint.encode(),
        holds: Holds::Nothing,
        stages: false,
        session: SessionId::default(),
    }
}
