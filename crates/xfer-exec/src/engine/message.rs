//! What the engine is told, and what it asks for.

use xfer_plan::{ReceiverRank, RegionIndex};

use super::Failure;
use crate::program::WriteId;
use crate::rail::{RailIndex, Rows};

/// A piece of staging memory, as long as the longest operation that goes through one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Begin a push. The weights do not change until [`Action::Finish`].
    Start,
    /// A slot has been filled.
    Staged(Slot),
    /// A rail had no room for a WRITE.
    Refused(RailIndex, WriteId),
    /// A WRITE was not offered to its rail, which had refused another: it waits its turn.
    Unoffered(RailIndex, WriteId),
    /// A rail has been polled: it may have room again.
    Polled(RailIndex),
    /// A WRITE is in the peer's memory.
    Delivered(RailIndex, WriteId),
    /// A WRITE failed; its buffer is free.
    Failed(RailIndex, WriteId, String),
    /// A rail is broken.
    RailFailed(RailIndex, String),
    /// A WRITE was in flight on a rail that has been closed; its buffer is free, whether it took place is unknown.
    Returned(RailIndex, WriteId),
    /// A rail has been closed, as asked, and all that it had in flight was returned; or why it could not be, and its buffers
    /// are in use for ever.
    RailClosed(RailIndex, Result<(), String>),
    /// A WRITE with this tag has arrived at this rank; [`NO_TAG`](xfer_plan::NO_TAG) says nothing. What arrives while no push
    /// runs is not counted: a rank that passes on starts before those who write to it.
    Arrived(u32),
    /// Somebody else ended this push.
    Abort(String),
    /// Time has passed.
    Tick,
}

/// Where a WRITE's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// In a region of this rank: no copy is made.
    Region(RegionIndex, u64),
    /// In a staging slot, at this offset.
    Slot(Slot, u64),
}

/// One WRITE to post.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Post {
    /// Names it in later events.
    pub id: WriteId,
    /// Over which rail.
    pub rail: RailIndex,
    /// From where.
    pub source: Source,
    /// How its bytes lie there.
    pub rows: Rows,
    /// To whom.
    pub to: ReceiverRank,
    /// To which of its regions.
    pub region: RegionIndex,
    /// Where in it.
    pub offset: u64,
    /// What its arrival tells the receiver; [`NO_TAG`](xfer_plan::NO_TAG) is nothing.
    pub tag: u32,
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Put the rows of operation `op` into a slot, one after another, transformed where it says so.
    Stage {
        /// The slot.
        slot: Slot,
        /// Index of the operation.
        op: u32,
    },
    /// Post a WRITE.
    Post(Post),
    /// Close a rail, report each WRITE that it had in flight as [`Event::Returned`], then [`Event::RailClosed`].
    CloseRail(RailIndex),
    /// The push is over and no buffer of it is in use.
    Finish(Result<Delivered, Failure>),
}

/// What a push has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Delivered {
    /// Bytes in the peers' memory.
    pub bytes: u64,
    /// WRITEs. Of a push that is done they are as many as the plan has, also where a program has cut its operations.
    pub writes: u64,
    /// Of the bytes, those that went through staging.
    pub bytes_gathered: u64,
    /// How often a rail had no room.
    pub refusals: u64,
}

/// What one rail did in the present push, or the last.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RailUse {
    /// Bytes that it delivered.
    pub bytes: u64,
    /// WRITEs.
    pub writes: u64,
    /// Why it was closed, in this push or an earlier one.
    pub closed: Option<String>,
    /// Receivers that it does not lead to any more, because a WRITE failed in this push or an earlier one, and why.
    pub lost: Vec<(ReceiverRank, String)>,
    /// Receivers to which WRITEs over it ended in this push without being delivered, and to which it is not used again: bytes
    /// of them may still be on their way, and must not arrive after something newer.
    pub unfinished: Vec<ReceiverRank>,
}
