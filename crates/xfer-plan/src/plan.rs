//! Plans: for every trainer, the ordered list of what it writes.
//!
//! A plan is a value: it can be sent, compared by digest, printed and checked. It holds no names twice and no
//! boxes, because a large job has millions of operations; one operation is 64 bytes, a cache line.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::bound::LowerBound;
use crate::digest::Digest;
use crate::ids::{ParamId, Rank, ReceiverRank, RegionIndex, TrainerRank};

/// One side of an operation: row `i` starts at `offset + i * stride`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Strided {
    /// The region that holds the rows.
    pub region: RegionIndex,
    /// First byte of the first row, in the region.
    pub offset: u64,
    /// From one row to the next, in bytes; at least the row's length.
    pub stride: u64,
}

/// How an operation is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OpKind {
    /// One WRITE straight from the source.
    Direct,
    /// The rows are gathered into staging memory and leave as one WRITE.
    Gather,
    /// One WRITE a row, straight from the source.
    Rows,
}

/// `rows` rows of `row_bytes` each, from a trainer's memory into a receiver's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Op {
    /// Whose memory is written.
    pub to: ReceiverRank,
    /// The destination parameter, for messages.
    pub param: ParamId,
    /// Length of a row in bytes; at least 1.
    pub row_bytes: u32,
    /// Number of rows; at least 1.
    pub rows: u32,
    /// Where the rows are read.
    pub source: Strided,
    /// Where they are written.
    pub destination: Strided,
    /// Whether the rows are gathered; only ever true where they are contiguous at the destination.
    pub gather: bool,
}

impl Op {
    /// How to carry it out.
    pub fn kind(&self) -> OpKind {
        match (self.rows, self.gather) {
            (0 | 1, _) => OpKind::Direct,
            (_, true) => OpKind::Gather,
            (_, false) => OpKind::Rows,
        }
    }

    /// Payload in bytes. At most [`PlanOptions::chunk_bytes_max`](crate::PlanOptions).
    pub fn bytes(&self) -> u64 {
        u64::from(self.row_bytes) * u64::from(self.rows)
    }

    /// Number of WRITEs that it posts.
    pub fn writes(&self) -> u64 {
        match self.kind() {
            OpKind::Direct | OpKind::Gather => 1,
            OpKind::Rows => u64::from(self.rows),
        }
    }
}

/// What one trainer does, in order. It needs nothing else to execute its part.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankPlan {
    /// The operations, in the order in which they should start.
    pub ops: Vec<Op>,
    /// Sum of their payloads, in bytes.
    pub bytes: u64,
    /// Sum of their WRITEs.
    pub writes: u64,
}

/// What one trainer sends to one receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrival {
    /// Who sends.
    pub from: TrainerRank,
    /// How many bytes.
    pub bytes: u64,
    /// In how many WRITEs.
    pub writes: u64,
}

/// What must have arrived at one receiver when a push is complete.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiverPart {
    /// Bytes from all trainers together: the size of the parameters.
    pub bytes: u64,
    /// WRITEs from all trainers together.
    pub writes: u64,
    /// The same by trainer, ascending; trainers that send nothing are left out.
    pub arrivals: Vec<Arrival>,
}

/// A schedule for all ranks: a pure function of the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Names of the destination parameters, each once; a [`ParamId`] is a place in this list.
    pub names: Vec<String>,
    /// One per trainer.
    pub trainers: Vec<RankPlan>,
    /// One per receiver.
    pub receivers: Vec<ReceiverPart>,
    /// The time that no schedule can beat.
    pub bound: LowerBound,
    /// Of the manifest that this was planned from.
    pub manifest_digest: Digest,
    /// Of everything above.
    pub digest: Digest,
}

impl Plan {
    /// What `trainer` does; `None` when there is no such rank.
    pub fn part(&self, trainer: TrainerRank) -> Option<&RankPlan> {
        self.trainers.get(trainer.index())
    }

    /// What must arrive at `receiver`; `None` when there is no such rank.
    pub fn arrivals(&self, receiver: ReceiverRank) -> Option<&ReceiverPart> {
        self.receivers.get(receiver.index())
    }

    /// The digest of everything but the digest.
    pub(crate) fn compute_digest(&self) -> Result<Digest, postcard::Error> {
        let Plan { names, trainers, receivers, bound, manifest_digest, digest: _ } = self;
        Digest::of(&(names, trainers, receivers, bound, manifest_digest))
    }

    /// The name behind an operation's parameter id, for messages.
    pub fn name(&self, param: ParamId) -> &str {
        self.names.get(param.index()).map_or("?", String::as_str)
    }
}

/// A summary in a few lines.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ops = || self.trainers.iter().flat_map(|part| &part.ops);
        let kind = |kind| ops().filter(|op| op.kind() == kind).count();
        writeln!(
            f,
            "plan {}: {} trainer(s) to {} inference rank(s), {} parameter name(s)",
            self.digest,
            self.trainers.len(),
            self.receivers.len(),
            self.names.len(),
        )?;
        writeln!(
            f,
            "  moves {} in {} operations ({} direct, {} gathered, {} by rows), {} WRITEs",
            Bytes(self.trainers.iter().map(|part| part.bytes).sum()),
            ops().count(),
            kind(OpKind::Direct),
            kind(OpKind::Gather),
            kind(OpKind::Rows),
            self.trainers.iter().map(|part| part.writes).sum::<u64>(),
        )?;
        let range = |f: &mut fmt::Formatter<'_>, what: &str, bytes: &mut dyn Iterator<Item = u64>| {
            let (least, most) = bytes.fold((u64::MAX, 0), |(a, b), bytes| (a.min(bytes), b.max(bytes)));
            writeln!(f, "  {what} from {} to {} a rank", Bytes(least.min(most)), Bytes(most))
        };
        range(f, "egress ", &mut self.trainers.iter().map(|part| part.bytes))?;
        range(f, "ingress", &mut self.receivers.iter().map(|part| part.bytes))?;
        match self.bound.limited_by {
            None => write!(f, "  lower bound 0 s: nothing moves"),
            Some(rank) => write!(
                f,
                "  lower bound {:.3} ms: {rank} {} {} at {}/s",
                self.bound.seconds() * 1e3,
                if matches!(rank, Rank::Trainer(_)) { "sends" } else { "receives" },
                Bytes(self.bound.bytes),
                Bytes(self.bound.bytes_per_second),
            ),
        }
    }
}

/// A number of bytes in decimal units, as NICs are rated.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            n @ ..1_000 => write!(f, "{n} B"),
            n @ ..1_000_000 => write!(f, "{:.2} kB", n as f64 / 1e3),
            n @ ..1_000_000_000 => write!(f, "{:.2} MB", n as f64 / 1e6),
            n => write!(f, "{:.2} GB", n as f64 / 1e9),
        }
    }
}
