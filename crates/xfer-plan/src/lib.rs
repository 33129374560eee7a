#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod bound;
mod check;
mod cut;
mod digest;
mod dtype;
mod error;
mod ids;
mod intersect;
pub mod limits;
mod manifest;
mod mesh;
mod param_map;
mod plan;
mod schedule;
mod sender;
mod source_index;
mod tensor_box;
mod validate;

pub use bound::LowerBound;
pub use digest::Digest;
pub use dtype::DType;
pub use error::{CheckError, LayoutError, ManifestError, OpPlace, PlanError};
pub use ids::{ParamId, Rank, ReceiverRank, RegionIndex, TrainerRank};
pub use manifest::{
    DestinationParam, Manifest, PlanOptions, RailDecl, ReceiverManifest, SourcePiece, TrainerManifest,
};
pub use mesh::{DeviceMesh, Placement, shard_box};
pub use param_map::ParamMap;
pub use plan::{Arrival, Op, OpKind, Plan, RankPlan, ReceiverPart, Strided};
pub use schedule::plan;
pub use tensor_box::{Dims, TensorBox};
