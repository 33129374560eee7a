//! One measurement as rank 0 describes it to the ranks that take part: what is pushed, from where to where, how often.
//!
//! Every rank works out its own tensors from it, so the description stays short however large the job is.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use weightsync::{DType, ParamMap, RailReport, Rank, TensorSpec, World};
use xfer_plan::SourcePiece;

use super::facts::RankFacts;
use super::model::ModelJob;

/// From a rank to rank 0.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum FromRank {
    /// Its first words.
    Facts(Box<RankFacts>),
    /// A job has ended well; an inference rank reports no rounds.
    Done(Pushed),
    /// It has not.
    Failed(String),
}

/// From rank 0 to a rank.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ToRank {
    Run(Box<Job>),
    /// Nothing more to do. Why it was given up, if it was, is said once and not by every rank.
    End {
        given_up: bool,
    },
}

/// See the module.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) payload: Payload,
    /// Counted rounds. One before them warms up, one after them is sampled.
    pub(crate) rounds: u32,
    /// Where the controller of this job listens, on rank 0's host.
    pub(crate) controller_port: u16,
    /// How many ranks each side has.
    pub(crate) trainers: u32,
    pub(crate) receivers: u32,
    /// Who the addressed rank is in it.
    pub(crate) member: Rank,
    /// Its number on its host, and how many of the benchmark's ranks are there.
    pub(crate) local_rank: u32,
    pub(crate) ranks_on_host: u32,
    /// What its rail binds to if the way to rank 0 leads over loopback, which other hosts cannot reach.
    pub(crate) bind: Option<IpAddr>,
    pub(crate) rails: RailOptions,
}

/// How ranks reach each other: the same for every job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct RailOptions {
    /// A name of `weightsync::Fabric`.
    pub(crate) fabric: String,
    /// NICs of a rank, by its number on its host; a rank beyond the list begins it anew. Empty: as the PCI tree pairs them.
    pub(crate) nics: Vec<Vec<String>>,
    /// What one NIC moves, for hosts whose NICs do not say; bytes a second.
    pub(crate) line_bytes_per_second: Option<u64>,
    pub(crate) deadline: Duration,
}

impl Job {
    pub(crate) fn world(&self) -> World {
        World { trainers: self.trainers, inference: self.receivers }
    }
}

/// What is pushed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Payload {
    /// From every trainer to every receiver so many bytes.
    Pairs { bytes: u64 },
    /// A model.
    Model(ModelJob),
}

/// A parameter of an inference rank, as it is declared.
pub(crate) struct ParamSpec {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<u64>,
    pub(crate) map: ParamMap,
}

impl Payload {
    /// What trainer `rank` owns.
    pub(crate) fn tensors(&self, rank: u32, world: World) -> anyhow::Result<Vec<TensorSpec>> {
        match self {
            Self::Pairs { bytes } => (0..world.inference)
                .map(|to| Ok(TensorSpec::whole(pair(rank, to), DType::U8, &[*bytes])?))
                .collect(),
            Self::Model(model) => {
                let pieces = model.trainer(rank, world)?.pieces.into_iter();
                let spec = |piece: SourcePiece| {
                    let SourcePiece { tensor: name, dtype, shape, bounds, .. } = piece;
                    TensorSpec { name, dtype, shape, bounds }
                };
                Ok(pieces.map(spec).collect())
            }
        }
    }

    /// What receiver `rank` wants.
    pub(crate) fn params(&self, rank: u32, world: World) -> anyhow::Result<Vec<ParamSpec>> {
        match self {
            Self::Pairs { bytes } => Ok((0..world.trainers)
                .map(|from| {
                    let name = pair(from, rank);
                    ParamSpec { map: ParamMap::tensor(&name), name, dtype: DType::U8, shape: vec![*bytes] }
                })
                .collect()),
            Self::Model(model) => Ok(model
                .receiver(rank, world)?
                .params
                .into_iter()
                .map(|param| ParamSpec {
                    name: param.name,
                    dtype: param.dtype,
                    shape: param.shape,
                    map: ParamMap::clone(&param.map),
                })
                .collect()),
        }
    }
}

fn pair(from: u32, to: u32) -> String {
    format!("from {from} to {to}")
}

/// What a rank tells of a job.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Pushed {
    /// A trainer's counted rounds.
    pub(crate) rounds: Vec<Push>,
    /// Of a further round: seconds since its begin, and the bytes delivered by then.
    pub(crate) samples: Vec<(f64, u64)>,
    /// What each of its rails did in the last counted round.
    pub(crate) rails: Vec<RailReport>,
    /// Lower bound of the whole push in seconds: the busiest NIC's bytes over its bandwidth.
    pub(crate) bound_seconds: f64,
}

/// A round of one trainer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Push {
    pub(crate) bytes: u64,
    pub(crate) writes: u64,
    /// Of the writes alone.
    pub(crate) write_seconds: f64,
    /// From the call to the commit confirmed by every inference rank.
    pub(crate) seconds: f64,
}
