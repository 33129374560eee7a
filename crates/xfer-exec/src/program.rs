//! A rank's part of the plan, checked against this rank's memory and bound to its rails.
//!
//! The plan comes from another process. [`Program::new`] is where it is believed: after it, every operation reads from
//! within a region that this rank has, writes to a peer and a region that it knows, and goes over a rail that exists.

use std::collections::BTreeMap;
use std::ops::Range;
#[cfg(feature = "driver")]
use std::sync::Arc;

use xfer_plan::limits::RANKS_MAX;
use xfer_plan::{NO_TAG, Op, OpKind, ParamId, RankPlan, ReceiverRank, RegionIndex, RelayPlan, Transform};

use crate::engine::Slot;
#[cfg(feature = "driver")]
use crate::quant::{QuantError, Quantization};
use crate::rail::RailIndex;

mod error;
mod fit;

pub use error::ProgramError;

/// Staging slots that a [`WriteId`] can name. A rail has far fewer WRITEs in flight.
pub(crate) const SLOTS_MAX: u32 = 1 << SLOT_BITS;

/// Rows of a staged operation that a [`WriteId`] can name, where each is a WRITE.
const ROWS_MAX: u64 = 1 << (u32::BITS - SLOT_BITS);

const SLOT_BITS: u32 = 12;

/// Names one WRITE of a program: an operation, and within it a row, for an operation that is staged also its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WriteId {
    /// Index of the operation in the program.
    pub op: u32,
    /// The row; of an operation that is staged the lower 12 bits are the slot, and the others the row.
    pub row: u32,
}

impl WriteId {
    /// A row of an operation in a slot.
    pub(crate) fn staged(op: u32, slot: Slot, row: u32) -> Self {
        Self { op, row: row << SLOT_BITS | slot.0 }
    }

    /// The inverse of [`WriteId::staged`].
    pub(crate) fn slot_and_row(self) -> (Slot, u32) {
        (Slot(self.row & (SLOTS_MAX - 1)), self.row >> SLOT_BITS)
    }

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

/// What the rank that runs a program has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RankLimits {
    /// Bytes of each of its regions, by region index.
    pub region_bytes: Vec<u64>,
    /// Bytes of a staging slot; 0 where it has none.
    pub slot_bytes: u64,
    /// Whether it can transform elements on their way into a slot.
    pub transforms: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Program {
    ops: Vec<Op>,
    /// By operation; empty where none has a tag.
    tags: Vec<u32>,
    names: BTreeMap<ParamId, String>,
    routes: Vec<Option<Route>>,
    /// By receiver, of those that have two banks of regions: whether these have changed places. Empty where none has.
    banks: Vec<Option<bool>>,
    relay: Option<Relay>,
    /// Whether no rail can read where the weights are.
    stages_all: bool,
    bytes: u64,
    writes: u64,
    /// As the plan counts them, whose operations may have been cut.
    writes_planned: u64,
    #[cfg(feature = "driver")]
    quantization: Arc<Quantization>,
}

/// What releases the operations of a rank that passes on.
#[derive(Debug)]
struct Relay {
    /// By tag, the first operation that it releases, and how many there are at the end.
    first: Vec<u32>,
    /// By tag.
    awaited: Vec<u32>,
}

/// What a tag releases.
#[derive(Debug, Clone)]
pub(crate) struct Release {
    /// Operations.
    pub(crate) ops: Range<u32>,
    /// WRITEs that must have arrived.
    pub(crate) awaited: u32,
}

impl Program {
    /// Checks `plan` against what this rank has and the routes to its peers.
    ///
    /// # Errors
    ///
    /// [`ProgramError`] naming the first operation that is not possible here.
    pub fn new(
        plan: RankPlan,
        names: BTreeMap<ParamId, String>,
        rank: &RankLimits,
        routes: BTreeMap<ReceiverRank, Route>,
    ) -> Result<Self, ProgramError> {
        Self::bind(plan, names, rank, routes, false)
    }

    /// As [`Program::new`] for a rank whose rails cannot read where its weights are: every operation goes through a staging slot,
    /// and one that is longer than a slot is cut. A push still counts its WRITEs as the plan does.
    ///
    /// # Errors
    ///
    /// As [`Program::new`]; [`ProgramError::Size`] for an operation that would have to be cut within an element, or that tells its
    /// receiver something, which counts its WRITEs; [`ProgramError::TooManyParts`].
    pub fn staged(
        plan: RankPlan,
        names: BTreeMap<ParamId, String>,
        rank: &RankLimits,
        routes: BTreeMap<ReceiverRank, Route>,
    ) -> Result<Self, ProgramError> {
        Self::bind(plan, names, rank, routes, true)
    }

    fn bind(
        plan: RankPlan,
        names: BTreeMap<ParamId, String>,
        rank: &RankLimits,
        routes: BTreeMap<ReceiverRank, Route>,
        stages_all: bool,
    ) -> Result<Self, ProgramError> {
        if u32::try_from(plan.ops.len()).is_err() {
            return Err(ProgramError::TooManyOps(plan.ops.len()));
        }
        if !plan.tags.is_empty() && plan.tags.len() != plan.ops.len() {
            return Err(ProgramError::Tags { tags: plan.tags.len(), ops: plan.ops.len() });
        }
        let ranks = routes.last_key_value().map_or(0, |(last, _)| last.index() + 1);
        if ranks > RANKS_MAX {
            return Err(ProgramError::Rank(ranks - 1));
        }
        let mut by_rank: Vec<Option<Route>> = vec![None; ranks];
        for (rank, route) in routes {
            by_rank[rank.index()] = Some(route);
        }
        let mut program = Self {
            ops: Vec::new(),
            tags: Vec::new(),
            names,
            routes: by_rank,
            banks: Vec::new(),
            relay: None,
            stages_all,
            bytes: 0,
            writes: 0,
            writes_planned: 0,
            #[cfg(feature = "driver")]
            quantization: Arc::default(),
        };
        for (index, op) in plan.ops.iter().enumerate() {
            program.check(index, op, rank)?;
            let sums = program.bytes.checked_add(op.bytes()).zip(program.writes.checked_add(op.writes()));
            let Some((bytes, writes)) = sums else { return Err(ProgramError::TooMuch) };
            (program.bytes, program.writes) = (bytes, writes);
        }
        program.writes_planned = program.writes;
        match stages_all {
            true => program.fit(&plan, rank.slot_bytes)?,
            false => (program.ops, program.tags) = (plan.ops, plan.tags),
        }
        Ok(program)
    }

    /// As [`Program::new`] for a rank that passes on what it receives: its operations wait until
    /// [`Event::Arrived`](crate::Event::Arrived) has told of all WRITEs that they pass on.
    ///
    /// # Errors
    ///
    /// As [`Program::new`], and where an operation is staged, or not every one is released by one tag.
    pub fn relay(
        relay: RelayPlan,
        names: BTreeMap<ParamId, String>,
        rank: &RankLimits,
        routes: BTreeMap<ReceiverRank, Route>,
    ) -> Result<Self, ProgramError> {
        let RelayPlan { plan, mut first, awaited } = relay;
        let mut program = Self::new(plan, names, rank, routes)?;
        if program.ops.iter().any(|op| op.staged_bytes() > 0) {
            return Err(ProgramError::Relay("an operation is gathered or transformed"));
        }
        let ops = program.ops.len() as u32;
        // The end may be left out: the last tag releases all that is left.
        if first.len() != awaited.len() || awaited.contains(&0) {
            return Err(ProgramError::Relay("an operation waits for nothing"));
        }
        first.push(ops);
        if first.first() != Some(&0) || !first.is_sorted() {
            return Err(ProgramError::Relay("an operation is not released by one tag"));
        }
        program.relay = Some(Relay { first, awaited });
        Ok(program)
    }

    /// Says that a receiver has two banks of regions, the second behind the first: a push is told which to write to, or where they
    /// have `turned`, which not to ([`Attempt`](crate::Attempt)).
    ///
    /// # Errors
    ///
    /// [`ProgramError::Banks`] where the two are not as long as each other.
    pub fn with_banks(mut self, to: ReceiverRank, turned: bool) -> Result<Self, ProgramError> {
        let region_bytes = self.route(to).map_or(&[][..], |route| &route.region_bytes);
        let (first, second) = region_bytes.split_at(region_bytes.len() / 2);
        if first != second {
            return Err(ProgramError::Banks { to, region_bytes: region_bytes.to_vec() });
        }
        self.banks.resize(self.routes.len(), None);
        if let Some(banks) = self.banks.get_mut(to.index()) {
            *banks = Some(turned);
        }
        Ok(self)
    }

    /// Where an operation writes, in a push to the second bank or not.
    pub(crate) fn region(&self, op: &Op, second: bool) -> RegionIndex {
        let region = op.destination.region;
        match self.banks.get(op.to.index()) {
            Some(Some(turned)) if *turned != second => {
                let regions = self.route(op.to).map_or(0, |route| route.region_bytes.len() / 2);
                RegionIndex(region.0 + regions as u32)
            }
            _ => region,
        }
    }

    /// Adds what this rank has to know of the tensors that it quantises: without it, a push of a plan that quantises fails.
    ///
    /// # Errors
    ///
    /// [`QuantError`] where that is not in this rank's memory, or not all that its operations quantise.
    #[cfg(feature = "driver")]
    pub fn with_quantization(
        mut self,
        part: &xfer_plan::QuantPart,
        rank: &RankLimits,
    ) -> Result<Self, QuantError> {
        self.quantization = Arc::new(Quantization::new(part, &rank.region_bytes, &self.ops)?);
        Ok(self)
    }

    /// What [`Program::with_quantization`] has added; empty without it.
    #[cfg(feature = "driver")]
    pub fn quantization(&self) -> &Arc<Quantization> {
        &self.quantization
    }

    fn check(&self, index: usize, op: &Op, rank: &RankLimits) -> Result<(), ProgramError> {
        let param = || self.name(op.param).to_owned();
        if !op.transform.is_copy() && !rank.transforms {
            return Err(ProgramError::Transform { param: param(), transform: op.transform });
        }
        // Where everything is staged, what is too long for a slot is cut.
        let is_staged = op.staged_bytes() > 0 && !self.stages_all;
        // What leaves as one WRITE has a length of 32 bits.
        let one_write_max = u64::from(u32::MAX);
        let bytes_max = match is_staged {
            true => rank.slot_bytes.min(one_write_max),
            false if self.stages_all => u64::MAX,
            false => one_write_max,
        };
        if op.bytes() == 0 || op.bytes() > bytes_max && op.kind() != OpKind::Rows {
            return Err(ProgramError::Size { op: index, param: param(), bytes: op.bytes(), bytes_max });
        }
        if is_staged && op.writes() > ROWS_MAX {
            return Err(ProgramError::Rows { param: param(), rows: op.rows });
        }
        // The end of the last row, or `None` where that is no address at all.
        let end = |offset: u64, stride: u64, row_bytes: u64| {
            let last = u64::from(op.rows.saturating_sub(1)).checked_mul(stride)?;
            offset.checked_add(last)?.checked_add(row_bytes)
        };
        let within = |end: Option<u64>, len: Option<u64>| end.zip(len).is_some_and(|(end, len)| end <= len);
        let row_bytes = u64::from(op.row_bytes);
        let source = rank.region_bytes.get(op.source.region.index()).copied();
        let source_end = end(op.source.offset, op.source.stride, op.transform.source_bytes(row_bytes));
        // Scales are read from a table and not from a region.
        if !matches!(op.transform, Transform::Scales { .. }) && !within(source_end, source) {
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
            _ => end(op.destination.offset, op.destination.stride, row_bytes),
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

    /// Whether an operation goes through a slot, to a receiver for which gathers do or do not.
    pub(crate) fn is_staged(&self, op: &Op, stages_gathers: bool) -> bool {
        match op.kind() {
            _ if self.stages_all => true,
            OpKind::Transform => true,
            OpKind::Gather => stages_gathers,
            OpKind::Direct | OpKind::Rows => false,
        }
    }

    /// Whether every operation goes through a slot.
    #[cfg(feature = "cuda")]
    pub(crate) fn stages_all(&self) -> bool {
        self.stages_all
    }

    /// Whether its operations wait for what arrives.
    pub(crate) fn is_relay(&self) -> bool {
        self.relay.is_some()
    }

    /// How many tags release operations of this rank.
    pub(crate) fn tags(&self) -> usize {
        self.relay.as_ref().map_or(0, |relay| relay.awaited.len())
    }

    /// What a tag releases; `None` for one that there is not.
    pub(crate) fn release(&self, tag: u32) -> Option<Release> {
        let Relay { first, awaited } = self.relay.as_ref()?;
        let at = tag as usize;
        Some(Release { ops: *first.get(at)?..*first.get(at + 1)?, awaited: *awaited.get(at)? })
    }

    /// What the arrival of an operation's WRITEs tells its receiver.
    pub(crate) fn tag(&self, op: u32) -> u32 {
        self.tags.get(op as usize).copied().unwrap_or(NO_TAG)
    }

    /// Bytes of one push of this rank.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// WRITEs of one push of this rank.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// The same as the plan counts them.
    pub(crate) fn writes_planned(&self) -> u64 {
        self.writes_planned
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
