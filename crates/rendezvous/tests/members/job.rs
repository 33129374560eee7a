//! The job that the members form: who they are and what each has or needs.

use std::time::Duration;

use rendezvous::{Holds, Join, MemberManifest, OnLoss, SessionId, Verify, World};
use xfer_plan::{
    BlockQuant, DType, DestinationParam, ParamMap, RailDecl, Rank, ReceiverManifest, ReceiverRank,
    RegionIndex, Relay, ScaleFormat, SourcePiece, TensorBox, TrainerManifest, TrainerRank,
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
    pub(crate) verify: Verify,
    pub(crate) on_loss: OnLoss,
    /// The inference ranks that stage versions, a bit each.
    pub(crate) stages: u8,
    /// Each trainer owns everything.
    pub(crate) replicated: bool,
    /// A tensor is quantised on its way, and where each trainer owns a part of it, they share its blocks.
    pub(crate) quantised: bool,
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
            verify: Verify::Off,
            on_loss: OnLoss::Fail,
            stages: 0,
            replicated: false,
            quantised: false,
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

/// A tensor of the job, by its name: how many columns it has at which offset, in which type.
type Declared = (&'static str, DType, u64, u64);

const PLAIN: [Declared; 2] = [("v", DType::U8, 8, 0), ("w", DType::U8, 8, 16)];

/// Blocks of two rows, of which each trainer has one.
const QUANT: BlockQuant = BlockQuant { block: [2, 3], scales: ScaleFormat::F32 };

const QUANTISED: [Declared; 2] = [("v", DType::BF16, 6, 0), ("w", DType::U8, 6, 24)];

/// Two trainers with a row each of two tensors, or with both rows, that all inference ranks need whole, two of them on
/// each host.
pub(crate) fn join(member: Rank, setup: &Setup, endpoint: &Endpoint) -> Join {
    let rails = vec![RailDecl { bytes_per_second: 1000 }];
    let region = RegionIndex(0);
    let manifest = match member {
        Rank::Trainer(TrainerRank(rank)) => {
            let tensors = if setup.quantised { QUANTISED } else { PLAIN };
            let (origin, rows) = if setup.replicated { (0, 2) } else { (u64::from(rank), 1) };
            let piece = |(name, dtype, columns, offset): Declared| SourcePiece {
                tensor: name.into(),
                dtype,
                shape: vec![2, columns],
                bounds: TensorBox::new(&[origin, 0], &[rows, columns]).unwrap(),
                region,
                offset,
            };
            let pieces = tensors.map(piece).into();
            MemberManifest::Trainer(TrainerManifest {
                host: "trainers".into(),
                regions: vec![36],
                rails,
                pieces,
            })
        }
        Rank::Receiver(ReceiverRank(rank)) => {
            let param =
                |(name, dtype, shape, offset, map): (&str, _, [u64; 2], _, ParamMap)| DestinationParam {
                    name: name.into(),
                    dtype,
                    shape: shape.into(),
                    region,
                    offset,
                    map: map.into(),
                    priority: 0,
                };
            let tensor = ParamMap::tensor;
            // All of the arena.
            let params = match setup.quantised {
                false => PLAIN
                    .map(|(name, dtype, columns, at)| (name, dtype, [2, columns], at, tensor(name)))
                    .to_vec(),
                true => vec![
                    ("v", DType::F8E4M3, [2, 6], 0, tensor("v").quantize(QUANT)),
                    ("w", DType::U8, [2, 6], 12, tensor("w")),
                    ("v_scales", DType::F32, [1, 2], 24, tensor("v").scales(QUANT)),
                ],
            };
            let params = params.into_iter().map(param).collect();
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
