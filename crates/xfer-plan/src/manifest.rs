//! Manifests: the planner's whole input.
//!
//! A manifest is put together from what each rank says about itself. Nothing in it can be trusted:
//! [`Manifest::validate`] bounds and checks every number before anything else looks at it.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::cost::CostModel;
use crate::dtype::DType;
use crate::ids::RegionIndex;
use crate::param_map::ParamMap;
use crate::tensor_box::{TensorBox, volume};

/// Part of a source tensor in a trainer's memory: the bytes of `bounds`, row-major and contiguous.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourcePiece {
    /// The tensor's name, the same on all trainers that own a part of it.
    pub tensor: String,
    /// Its element type.
    pub dtype: DType,
    /// Its global shape.
    pub shape: Vec<u64>,
    /// The part that is here, in global indices. May be empty; may overlap or equal what other trainers hold.
    pub bounds: TensorBox,
    /// The region that holds the bytes.
    pub region: RegionIndex,
    /// Where in the region they start, in bytes.
    pub offset: u64,
}

impl SourcePiece {
    /// Size in bytes, `None` when it overflows.
    pub fn bytes(&self) -> Option<u64> {
        self.bounds.volume()?.checked_mul(self.dtype.bytes())
    }
}

/// A parameter in a receiver's memory: `shape`, row-major and contiguous, filled as `map` says.
///
/// Receivers that declare a parameter alike in everything are planned once, as a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DestinationParam {
    /// Its name on this rank; unique there.
    pub name: String,
    /// Its element type, the same as that of `map`'s result.
    pub dtype: DType,
    /// Its local shape, the same as `map`'s result. A stack of matrices can be declared as one taller matrix:
    /// the bytes are the same.
    pub shape: Vec<u64>,
    /// The region that holds the bytes.
    pub region: RegionIndex,
    /// Where in the region they start, in bytes.
    pub offset: u64,
    /// What it is made of. Receivers with the same map can share one.
    pub map: Arc<ParamMap>,
    /// When it is sent: smaller numbers first. Numbering parameters by layer lets an engine start on the first layers
    /// while the last ones are still under way.
    pub priority: u32,
}

/// Without the map, the largest part by far: parameters of one name and place rarely differ in it alone.
impl Hash for DestinationParam {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let DestinationParam { name, dtype, shape, region, offset, map: _, priority } = self;
        (name, dtype, shape, region, offset, priority).hash(state);
    }
}

impl DestinationParam {
    /// Size in bytes, `None` when it overflows.
    pub fn bytes(&self) -> Option<u64> {
        volume(self.shape.iter().copied())?.checked_mul(self.dtype.bytes())
    }
}

/// One NIC endpoint of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RailDecl {
    /// Payload that it moves each way, in bytes a second. At least 1.
    pub bytes_per_second: u64,
}

/// What all rails of a rank move together, in bytes a second.
pub(crate) fn bandwidth(rails: &[RailDecl]) -> u64 {
    rails.iter().map(|rail| rail.bytes_per_second).fold(0, u64::saturating_add)
}

/// What one training rank owns.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainerManifest {
    /// The host that it runs on.
    pub host: String,
    /// Registered regions: their lengths in bytes.
    pub regions: Vec<u64>,
    /// At least one.
    pub rails: Vec<RailDecl>,
    /// What it can send.
    pub pieces: Vec<SourcePiece>,
}

/// What one inference rank wants.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiverManifest {
    /// The host that it runs on.
    pub host: String,
    /// Registered regions: their lengths in bytes.
    pub regions: Vec<u64>,
    /// At least one.
    pub rails: Vec<RailDecl>,
    /// What must be filled. Their bytes must not overlap.
    pub params: Vec<DestinationParam>,
}

/// Trainers and receivers.
pub(crate) type Sides<'a> = (&'a [TrainerManifest], &'a [ReceiverManifest]);

/// How transfers are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlanOptions {
    /// No operation moves more than this, in bytes.
    pub chunk_bytes_max: u64,
    /// Rows that are scattered at the source and contiguous at the destination are gathered into one WRITE
    /// when a row is shorter than this, in bytes. 0: never.
    pub gather_row_bytes_max: u64,
    /// No gather, and no transform, takes more than this of staging memory, in bytes.
    pub gather_chunk_bytes_max: u64,
    /// Staging memory of a trainer, in bytes: what is gathered or transformed and not yet delivered never exceeds it.
    pub watermark_bytes: u64,
    /// How receivers that want the same bytes get them.
    pub relay: Relay,
    /// What the hardware does, for the choice of routes and for predictions.
    pub cost: CostModel,
}

/// How receivers that want the same bytes get them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Relay {
    /// Trainers write every copy.
    #[default]
    Never,
    /// Trainers write one copy per host; the receiver that gets it passes it on to the others there.
    PerHost,
    /// As `PerHost`, but trainers write one copy in all; each host passes it on to the next.
    Chain,
    /// Whichever of these the cost model says ends first, and of equals the first.
    Auto,
}

impl Relay {
    /// Every way and its name.
    pub const ALL: [(Self, &'static str); 4] =
        [(Self::Never, "never"), (Self::PerHost, "per-host"), (Self::Chain, "chain"), (Self::Auto, "auto")];
}

impl fmt::Display for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(relay, _)| relay == self).map_or("?", |(_, name)| name);
        f.write_str(name)
    }
}

impl FromStr for Relay {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(_, known)| *known == name).map(|(relay, _)| *relay);
        found.ok_or_else(|| "one of never, per-host, chain and auto is expected".into())
    }
}

impl Default for PlanOptions {
    /// 1 MiB chunks, gathered too, in 256 MiB of staging memory; rows shorter than 16 KiB are gathered. Many WRITEs of 32 to 64 KiB in
    /// flight saturate a 400 Gb/s NIC, so longer rows gain nothing from a copy.
    fn default() -> PlanOptions {
        PlanOptions {
            chunk_bytes_max: 1 << 20,
            gather_row_bytes_max: 16 << 10,
            gather_chunk_bytes_max: 1 << 20,
            watermark_bytes: 256 << 20,
            relay: Relay::Never,
            cost: CostModel::default(),
        }
    }
}

/// Both sides of a transfer. A rank's number is its place in its list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The ranks that write.
    pub trainers: Vec<TrainerManifest>,
    /// The ranks that are written to.
    pub receivers: Vec<ReceiverManifest>,
    /// How transfers are cut.
    pub options: PlanOptions,
}
