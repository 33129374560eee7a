//! A rank's part of the plan, checked against this rank's memory and bound to its rails.
//!
//! The plan comes from another process. [`Program::new`] is where it is believed: after it, every operation reads from
//! within a region that this rank has, writes to a peer and a region that it knows, and goes over a rail that exists.

use std::collections::BTreeMap;

use xfer_plan::limits::RANKS_MAX;
use xfer_plan::{Op, OpKind, ParamId, RankPlan, ReceiverRank, RegionIndex, Transform};

use crate::rail::RailIndex;

/// Names one WRITE of a program: an operation, and within it a row, or for a gathered operation its staging slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WriteId {
    /// Index of the operation in the program.
    pub op: u32,
    /// Row (direct and row-wise operations) or staging slot (gathered operations).
    pub row: u32,
}

impl WriteId {
    /// As one word, for a completion's token.
    pub fn to_token(self) -> u64 {
        u64::from(self.op) << 32 | u64::from(self.row)
    }

    /// The inverse of [`WriteId::to_token`].
    pub fn from_token(token: u64) -> Self {
        Self { op: (token >> 32) as u32, row: token as u32 }
    }
}

/// A receiver as this rank reaches it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The rails that lead to it. The plan deals its operations to them by number, modulo how many there are.
    pub rails: Vec<RailIndex>,
    /// Bytes of each of its regions, by region index.
    pub region_bytes: Vec<u64>,
}

/// Why a part of a plan cannot be run here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProgramError {
    /// More operations than a [`WriteId`] can name.
    #[error("the plan has {0} operations for this rank, more than 2^32")]
    TooManyOps(usize),
    /// More bytes or WRITEs than 2^64.
    #[error("the plan has more than 2^64 bytes or writes for this rank")]
    TooMuch,
    /// A rank that no job has.
    #[error("there is no inference {0}: a job has at most {RANKS_MAX}")]
    Rank(usize),
    /// An operation without bytes, or whose gather exceeds a staging slot.
    #[error("the plan's operation {op} for {param} moves {bytes} bytes where 1 to {bytes_max} are possible")]
    Size {
        /// The operation.
        op: usize,
        /// Its parameter.
        param: String,
        /// Its bytes.
        bytes: u64,
        /// The bound.
        bytes_max: u64,
    },
    /// An operation that reads outside this rank's memory.
    #[error(
        "the plan reads {param} outside {region} of this rank, which has {region_bytes:?} bytes; do both sides run the same manifest?"
    )]
    Source {
        /// Its parameter.
        param: String,
        /// The region.
        region: RegionIndex,
        /// Its length, if it exists.
        region_bytes: Option<u64>,
    },
    /// An operation that writes outside the peer's memory.
    #[error(
        "the plan writes {param} outside {region} of {to}, which exposes {region_bytes:?} bytes; its region is shorter than its manifest says"
    )]
    Destination {
        /// Its parameter.
        param: String,
        /// The receiver.
        to: ReceiverRank,
        /// The region.
        region: RegionIndex,
        /// Its length, if it exists.
        region_bytes: Option<u64>,
    },
    /// An operation that changes elements on the way.
    #[error(
        "the plan wants {param} as {transform:?}; the engine writes elements as they are, so convert them on the trainer"
    )]
    Transform {
        /// Its parameter.
        param: String,
        /// What is asked for.
        transform: Transform,
    },
    /// An operation to a receiver without a rail.
    #[error("the plan writes {param} to {to}, to which this rank has no rail")]
    NoRoute {
        /// Its parameter.
        param: String,
        /// The receiver.
        to: ReceiverRank,
    },
}

/// See the module.
#[derive(Debug)]
pub struct Program {
    ops: Vec<Op>,
    names: BTreeMap<ParamId, String>,
    routes: Vec<Option<Route>>,
    bytes: u64,
    writes: u64,
}

impl Program {
    /// Checks `plan` against this rank's regions, the routes to its peers and the bytes of a staging slot.
    pub fn new(
        plan: RankPlan,
        names: BTreeMap<ParamId, String>,
        region_bytes: &[u64],
        routes: BTreeMap<ReceiverRank, Route>,
        slot_bytes: u64,
    ) -> Result<Self, ProgramError> {
        if u32::try_from(plan.ops.len()).is_err() {
            return Err(ProgramError::TooManyOps(plan.ops.len()));
        }
        let ranks = routes.last_key_value().map_or(0, |(last, _)| last.index() + 1);
        if ranks > RANKS_MAX {
            return Err(ProgramError::Rank(ranks - 1));
        }
        let mut by_rank: Vec<Option<Route>> = vec![None; ranks];
        for (rank, route) in routes {
            by_rank[rank.index()] = Some(route);
        }
        let mut program = Self { ops: Vec::new(), names, routes: by_rank, bytes: 0, writes: 0 };
        for (index, op) in plan.ops.iter().enumerate() {
            program.check(index, op, region_bytes, slot_bytes)?;
            let sums = program.bytes.checked_add(op.bytes()).zip(program.writes.checked_add(op.writes()));
            let Some((bytes, writes)) = sums else { return Err(ProgramError::TooMuch) };
            (program.bytes, program.writes) = (bytes, writes);
        }
        program.ops = plan.ops;
        Ok(program)
    }

    fn check(
        &self,
        index: usize,
        op: &Op,
        region_bytes: &[u64],
        slot_bytes: u64,
    ) -> Result<(), ProgramError> {
        let param = || self.name(op.param).to_owned();
        if !op.transform.is_copy() {
            return Err(ProgramError::Transform { param: param(), transform: op.transform });
        }
        // What leaves as one WRITE has a length of 32 bits.
        let one_write_max = u64::from(u32::MAX);
        let bytes_max =
            if op.kind() == OpKind::Gather { slot_bytes.min(one_write_max) } else { one_write_max };
        if op.bytes() == 0 || op.bytes() > bytes_max && op.kind() != OpKind::Rows {
            return Err(ProgramError::Size { op: index, param: param(), bytes: op.bytes(), bytes_max });
        }
        // The end of the last row, or `None` where that is no address at all.
        let end = |offset: u64, stride: u64| {
            let last = u64::from(op.rows.saturating_sub(1)).checked_mul(stride)?;
            offset.checked_add(last)?.checked_add(u64::from(op.row_bytes))
        };
        let within = |end: Option<u64>, len: Option<u64>| end.zip(len).is_some_and(|(end, len)| end <= len);
        let source = region_bytes.get(op.source.region.index()).copied();
        if !within(end(op.source.offset, op.source.stride), source) {
            let region = op.source.region;
            return Err(ProgramError::Source { param: param(), region, region_bytes: source });
        }
        let Some(route) = self.route(op.to).filter(|route| !route.rails.is_empty()) else {
            return Err(ProgramError::NoRoute { param: param(), to: op.to });
        };
        let target = route.region_bytes.get(op.destination.region.index()).copied();
        // A gathered chunk lands in one piece.
        let target_end = match op.kind() {
            OpKind::Gather => op.destination.offset.checked_add(op.bytes()),
            _ => end(op.destination.offset, op.destination.stride),
        };
        if !within(target_end, target) {
            let region = op.destination.region;
            return Err(ProgramError::Destination {
                param: param(),
                to: op.to,
                region,
                region_bytes: target,
            });
        }
        Ok(())
    }

    /// The operations, in the order in which they are begun.
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// Bytes of one push of this rank.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// WRITEs of one push of this rank.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// A parameter's name, for a message.
    pub fn name(&self, param: ParamId) -> &str {
        self.names.get(&param).map_or("an unnamed parameter", String::as_str)
    }

    /// How a receiver is reached.
    pub fn route(&self, to: ReceiverRank) -> Option<&Route> {
        self.routes.get(to.index())?.as_ref()
    }

    /// One more than the largest receiver rank that it writes to.
    pub(crate) fn ranks(&self) -> usize {
        self.routes.len()
    }
}
