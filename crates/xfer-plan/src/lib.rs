#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod bound;
mod check;
mod cost;
mod cut;
mod diff;
mod digest;
mod dtype;
mod error;
mod explain;
mod ids;
mod inbound;
mod intersect;
pub mod limits;
mod magnitudes;
mod manifest;
mod mesh;
pub mod model;
mod param_map;
mod plan;
mod quant;
mod quantized;
mod relay;
pub mod report;
mod route;
mod schedule;
mod sender;
mod source_index;
mod template;
mod templates;
mod tensor_box;
mod totals;
pub mod traffic;
mod transform;
mod validate;

pub use bound::LowerBound;
pub use cost::{CostModel, Prediction, Resource};
pub use cut::{Routed, Way};
pub use diff::{Amount, Change, ParamDiff, PlanDiff, ReceiverDiff, TrainerDiff, diff};
pub use digest::Digest;
pub use dtype::DType;
pub use error::{CheckError, LayoutError, ManifestError, PlanError, TransferPlace};
pub use explain::{ExplainError, ExplainedBox, ExplainedTransfer, Explanation, Why, explain};
pub use ids::{GroupIndex, ParamId, Rank, ReceiverRank, RegionIndex, TrainerRank};
pub use inbound::Inbound;
pub use magnitudes::{HeldPiece, HeldTable, MagnitudeError, Magnitudes, QuantPart};
pub use manifest::{
    DestinationParam, Manifest, PlanOptions, RailDecl, ReceiverManifest, Relay, SourcePiece, TrainerManifest,
};
pub use mesh::{DeviceMesh, Placement, shard_box};
pub use param_map::ParamMap;
pub use plan::{
    Arrival, Fill, Op, OpKind, Placed, Plan, PlannedParam, RankPlan, ReceiverPart, Strided, TrainerPart,
    Transfer, paired_rail,
};
pub use quant::{Exchange, ScaleTable};
pub use quantized::{Quantized, TensorPart};
pub use relay::{NO_TAG, Parts, RelayPlan, TAG_BITS};
pub use report::PlanReport;
pub use route::{Group, Leg, Link, Loads, ReceiverLoad, Route, TrainerLoad};
pub use schedule::{Planner, plan};
pub use tensor_box::{Dims, TensorBox};
pub use transform::{BlockQuant, ScaleFormat, Transform};
