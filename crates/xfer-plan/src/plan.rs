//! Plans: for every trainer, what it writes.
//!
//! A plan is a value: it can be sent, compared by digest, printed, diffed and checked. It is kept small: receivers that
//! want the same bytes at the same place are one group, and what a trainer sends to a group stands once, as a transfer;
//! plans for other receivers share it.
//! The ordered list of operations of a rank follows from its transfers ([`Plan::part`]).

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::bound::LowerBound;
use crate::cost::Prediction;
use crate::digest::Digest;
use crate::ids::{GroupIndex, ParamId, Rank, ReceiverRank, RegionIndex, TrainerRank};
use crate::quant::ScaleTable;
use crate::route::Group;
use crate::transform::Transform;

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
    /// The rows are transformed into staging memory, and leave as one WRITE if they land in one piece, and otherwise as one
    /// WRITE a row.
    Transform,
}

/// `rows` rows of `row_bytes` each, from a trainer's memory into a receiver's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Op {
    /// Whose memory is written.
    pub to: ReceiverRank,
    /// The destination parameter, for messages.
    pub param: ParamId,
    /// Length of a row at the destination, in bytes; at least 1.
    pub row_bytes: u32,
    /// Number of rows; at least 1.
    pub rows: u32,
    /// Where the rows are read. For [`Transform::Scales`] the region is a place in [`Plan::tables`], and the offset one in
    /// that table, row-major.
    pub source: Strided,
    /// Where they are written.
    pub destination: Strided,
    /// Whether the rows are gathered; only ever true where they are contiguous at the destination.
    pub gather: bool,
    /// What happens to the elements on the way.
    pub transform: Transform,
    /// The trainer's rail that the planner counts it on; [`paired_rail`] says which of the receiver's it leads to.
    pub rail: u8,
    /// Operations of one wave may be in flight together; a wave stages no more than the watermark.
    pub wave: u32,
}

impl Op {
    /// How to carry it out.
    pub fn kind(&self) -> OpKind {
        match (self.rows, self.gather) {
            _ if !self.transform.is_copy() => OpKind::Transform,
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
            OpKind::Transform if self.destination.stride == u64::from(self.row_bytes) => 1,
            OpKind::Rows | OpKind::Transform => u64::from(self.rows),
        }
    }

    /// Staging memory that it takes, in bytes.
    pub fn staged_bytes(&self) -> u64 {
        match self.kind() {
            OpKind::Direct | OpKind::Rows => 0,
            OpKind::Gather | OpKind::Transform => self.bytes(),
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
    /// By operation, what each of its WRITEs tells the receiver: a place in
    /// [`RelayPlan::awaited`](crate::RelayPlan) there, or [`NO_TAG`](crate::NO_TAG) where nobody passes it on. Empty where no operation has a tag.
    pub tags: Vec<u32>,
}

/// Rows of any length, from a trainer's memory to the same place in the memory of every member of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Transfer {
    /// Who sends.
    pub trainer: TrainerRank,
    /// Number of rows; at least 1.
    pub rows: u32,
    /// Length of a row at the destination, in bytes; at least 1.
    pub row_bytes: u64,
    /// What happens to the elements.
    pub transform: Transform,
    /// Where the rows are read. For [`Transform::Scales`] the region is a place in [`Fill::tables`], and the offset one in
    /// that table, row-major.
    pub source: Strided,
    /// Where they are written.
    pub destination: Strided,
}

impl Transfer {
    /// Payload for one member, in bytes.
    pub fn bytes(&self) -> u64 {
        self.row_bytes.saturating_mul(self.rows.into())
    }
}

/// How a parameter is filled that a group of receivers declares alike. A parameter may have two: what only one trainer
/// has, and what several have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fill {
    /// The parameter.
    pub param: ParamId,
    /// Who wants it.
    pub to: GroupIndex,
    /// Places in [`Plan::tables`]: of the quantised tensors that it is made of.
    pub tables: Vec<u32>,
    /// Which of the group's lanes the first transfer takes; the others take the next in turn.
    pub lane: u16,
    /// The transfers, by trainer and then by destination. Plans for other receivers share them.
    pub transfers: Arc<[Transfer]>,
}

impl Fill {
    /// The lane of one of its transfers, of so many.
    pub(crate) fn lane(&self, index: usize, lanes: usize) -> u16 {
        ((usize::from(self.lane) + index) % lanes.max(1)) as u16
    }
}

/// A transfer where it stands in a plan.
#[derive(Clone, Copy, Debug)]
pub struct Placed<'p> {
    /// Place of its fill in [`Plan::fills`].
    pub fill: usize,
    /// Place in the fill.
    pub index: usize,
    /// Who wants it.
    pub to: GroupIndex,
    /// The parameter.
    pub param: ParamId,
    /// Which of the group's routes it takes.
    pub lane: u16,
    /// The transfer.
    pub transfer: &'p Transfer,
}

/// What one trainer sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainerPart {
    /// Bytes that it writes itself: passed on by receivers, they are not its own.
    pub bytes: u64,
    /// In so many WRITEs.
    pub writes: u64,
}

/// What one rank sends to one receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrival {
    /// Who sends: a trainer, or a receiver that passes on.
    pub from: Rank,
    /// How many bytes.
    pub bytes: u64,
    /// In how many WRITEs.
    pub writes: u64,
}

/// What must have arrived at one receiver when a push is complete.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiverPart {
    /// Bytes from all ranks together: the size of the parameters, without what is padding.
    pub bytes: u64,
    /// WRITEs from all ranks together.
    pub writes: u64,
    /// The same by rank, trainers first, ascending; ranks that send nothing are left out.
    pub arrivals: Vec<Arrival>,
}

/// A destination parameter's name and when it is sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedParam {
    /// Its name.
    pub name: String,
    /// Smaller numbers are sent first.
    pub priority: u32,
}

/// A schedule for all ranks: a pure function of the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The destination parameters, each name and priority once; a [`ParamId`] is a place in this list.
    pub params: Vec<PlannedParam>,
    /// Receivers that want the same; a [`GroupIndex`] is a place in this list.
    pub groups: Vec<Group>,
    /// The scales of quantised tensors, and who finds out what about them.
    pub tables: Vec<ScaleTable>,
    /// How every parameter is filled.
    pub fills: Vec<Fill>,
    /// One per trainer.
    pub trainers: Vec<TrainerPart>,
    /// One per receiver.
    pub receivers: Vec<ReceiverPart>,
    /// The time that no schedule over these routes can beat.
    pub bound: LowerBound,
    /// How long it takes by the cost model.
    pub predicted: Prediction,
    /// Of the manifest that this was planned from.
    pub manifest_digest: Digest,
    /// Of everything above.
    pub digest: Digest,
}

impl Plan {
    /// What must arrive at `receiver`; `None` when there is no such rank.
    pub fn arrivals(&self, receiver: ReceiverRank) -> Option<&ReceiverPart> {
        self.receivers.get(receiver.index())
    }

    /// The digest of everything but the digest.
    pub(crate) fn compute_digest(&self) -> Result<Digest, postcard::Error> {
        self.digest_with(|fill| Digest::of(&fill.transfers))
    }

    /// The same where the digest of each fill's transfers is known.
    pub(crate) fn digest_with(
        &self,
        digest_of: impl FnMut(&Fill) -> Result<Digest, postcard::Error>,
    ) -> Result<Digest, postcard::Error> {
        let Plan { params, groups, tables, fills, trainers, receivers, .. } = self;
        let transfers = fills.iter().map(digest_of).collect::<Result<Vec<_>, _>>()?;
        let fills: Vec<_> = fills.iter().map(|fill| (fill.param, fill.to, &fill.tables, fill.lane)).collect();
        Digest::of(&(
            (params, groups, tables),
            (fills, transfers),
            (trainers, receivers),
            (self.bound, self.predicted, self.manifest_digest),
        ))
    }

    /// All transfers, fill by fill.
    pub fn transfers(&self) -> impl Iterator<Item = Placed<'_>> {
        let fills = self.fills.iter().enumerate();
        fills.flat_map(|(number, fill)| self.placed(number, fill, 0..fill.transfers.len()))
    }

    /// The transfers of one trainer.
    pub fn transfers_of(&self, trainer: TrainerRank) -> impl Iterator<Item = Placed<'_>> {
        self.fills.iter().enumerate().flat_map(move |(number, fill)| {
            let first = fill.transfers.partition_point(|transfer| transfer.trainer < trainer);
            let rest = fill.transfers.get(first..).unwrap_or_default();
            let own = rest.partition_point(|transfer| transfer.trainer == trainer);
            self.placed(number, fill, first..first + own)
        })
    }

    fn placed<'p>(
        &'p self,
        number: usize,
        fill: &'p Fill,
        range: Range<usize>,
    ) -> impl Iterator<Item = Placed<'p>> {
        let lanes = self.group(fill.to).map_or(1, |group| usize::from(group.lanes()));
        let transfers = fill.transfers.get(range.clone()).unwrap_or_default();
        transfers.iter().zip(range).map(move |(transfer, index)| Placed {
            fill: number,
            index,
            to: fill.to,
            param: fill.param,
            lane: fill.lane(index, lanes),
            transfer,
        })
    }

    /// The name behind a parameter id, for messages.
    pub fn name(&self, param: ParamId) -> &str {
        self.params.get(param.index()).map_or("?", |param| param.name.as_str())
    }

    /// When a parameter is sent.
    pub(crate) fn priority(&self, param: ParamId) -> u32 {
        self.params.get(param.index()).map_or(0, |param| param.priority)
    }

    /// The group of a transfer.
    pub fn group(&self, group: GroupIndex) -> Option<&Group> {
        self.groups.get(group.index())
    }
}

/// A summary in a few lines.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "plan {}: {} trainer(s) to {} inference rank(s), {} parameter name(s)",
            self.digest,
            self.trainers.len(),
            self.receivers.len(),
            self.params.len(),
        )?;
        writeln!(
            f,
            "  moves {} in {} transfers to {} group(s), {} WRITEs of trainers",
            Bytes(self.trainers.iter().map(|part| part.bytes).fold(0, u64::saturating_add)),
            self.fills.iter().map(|fill| fill.transfers.len()).sum::<usize>(),
            self.groups.len(),
            self.trainers.iter().map(|part| part.writes).fold(0, u64::saturating_add),
        )?;
        let range = |f: &mut fmt::Formatter<'_>, what: &str, bytes: &mut dyn Iterator<Item = u64>| {
            let (least, most) = bytes.fold((u64::MAX, 0), |(a, b), bytes| (a.min(bytes), b.max(bytes)));
            writeln!(f, "  {what} from {} to {} a rank", Bytes(least.min(most)), Bytes(most))
        };
        range(f, "egress ", &mut self.trainers.iter().map(|part| part.bytes))?;
        range(f, "ingress", &mut self.receivers.iter().map(|part| part.bytes))?;
        match self.bound.limited_by {
            None => write!(f, "  lower bound 0 s: nothing moves"),
            Some((rank, resource)) => write!(
                f,
                "  lower bound {:.3} ms: {rank} {} {} at {}/s; predicted {:.3} ms",
                self.bound.seconds() * 1e3,
                resource.verb(),
                Bytes(self.bound.bytes),
                Bytes(self.bound.bytes_per_second),
                self.predicted.seconds() * 1e3,
            ),
        }
    }
}

/// A number of bytes in decimal units, as NICs are rated.
pub(crate) struct Bytes(pub(crate) u64);

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

/// The rail of a receiver that has `theirs` which rail `rail` of a trainer that has `rails` writes to: the one of the same number
/// where both have as many. Where a receiver has more, one trainer takes its rails up where the last one ended, so that all of
/// them are used.
pub fn paired_rail(trainer: TrainerRank, rails: usize, rail: usize, theirs: usize) -> usize {
    trainer.index().wrapping_mul(rails).wrapping_add(rail) % theirs.max(1)
}
