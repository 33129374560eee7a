//! What a rail is to the driver: it takes WRITEs with their buffers, and gives the buffers back when the peer has them.
//!
//! A rail never keeps a buffer that it refused, never gives one back while it may still be read, and reports a WRITE as
//! done only when its bytes are in the peer's memory (delivery-complete).

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::BorrowedFd;

use xfer_plan::{ReceiverRank, RegionIndex};

use crate::program::WriteId;

/// Bytes that a software provider is given at once: eight times the bandwidth-delay product of 100 Gb/s over 160 us, and over
/// loopback TCP in WRITEs of 1 MiB a tenth faster than 128 MiB (6.3 against 5.4 GB/s on 2 cores of an EPYC).
pub const SOFTWARE_IN_FLIGHT_BYTES_MAX: u64 = 16 << 20;

/// A rail of this rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RailIndex(pub u16);

impl RailIndex {
    /// As an index.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl fmt::Display for RailIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rail {}", self.0)
    }
}

/// What a rail takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RailLimits {
    /// WRITEs that may be in flight at once.
    pub depth: u32,
    /// Bytes that may be in flight at once. A single WRITE may be longer.
    pub in_flight_bytes_max: u64,
    /// Whether it takes WRITEs of several rows. For one that does not, rows are gathered in staging memory first.
    pub takes_rows: bool,
}

/// A WRITE as it is handed to a rail. `B` is the buffer it reads from, owned by the rail until it is done.
#[derive(Debug)]
pub struct RailWrite<B> {
    /// Which WRITE this is.
    pub id: WriteId,
    /// From the first of its bytes to the last.
    pub from: B,
    /// How its bytes lie in `from`; at the receiver they are contiguous.
    pub rows: Rows,
    /// The receiver.
    pub to: ReceiverRank,
    /// The receiver's region.
    pub region: RegionIndex,
    /// Where in that region.
    pub offset: u64,
    /// What its arrival tells the receiver; [`NO_TAG`](xfer_plan::NO_TAG) is nothing. Rails that cannot carry it leave it out.
    pub tag: u32,
}

/// Equally long rows at equal distances. One row is contiguous bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// How many.
    pub count: u32,
    /// Bytes of each.
    pub bytes: u32,
    /// From the start of one to the start of the next, in bytes.
    pub stride: u64,
}

impl Rows {
    /// Contiguous bytes.
    pub fn one(bytes: u32) -> Self {
        Self { count: 1, bytes, stride: u64::from(bytes) }
    }

    /// Bytes of all rows together, without the gaps.
    pub fn total_bytes(self) -> u64 {
        u64::from(self.count) * u64::from(self.bytes)
    }

    /// Bytes from the start of the first row to the end of the last, gaps included; `None` if that is no length.
    pub fn extent_bytes(self) -> Option<u64> {
        let before_last = u64::from(self.count.checked_sub(1)?).checked_mul(self.stride)?;
        before_last.checked_add(u64::from(self.bytes))
    }
}

/// A WRITE that is over.
#[derive(Debug)]
pub struct Done<B> {
    /// Which WRITE it was.
    pub id: WriteId,
    /// Its buffer, no longer read by anybody.
    pub from: B,
    /// Delivered, or why not.
    pub result: Result<(), String>,
}

/// A rail that cannot go on. Every buffer that it holds comes back from [`Rail::close`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{rail}: {reason}")]
pub struct RailError {
    /// Which rail.
    pub rail: String,
    /// What happened and what to do.
    pub reason: String,
}

/// One way to the memory of peers. Used by one thread.
pub trait Rail {
    /// What it reads from.
    type Buffer;

    /// For messages: fabric, device, address.
    fn name(&self) -> String;

    /// What it takes.
    fn limits(&self) -> RailLimits;

    /// Takes WRITEs from the front of `writes` for as long as there is room; what stays was refused for now, which is
    /// an ordinary outcome. An error concerns the WRITE at the front, which also stays.
    fn post(&mut self, writes: &mut VecDeque<RailWrite<Self::Buffer>>) -> Result<(), RailError>;

    /// Appends the WRITEs that are over. Never blocks.
    fn poll(&mut self, done: &mut Vec<Done<Self::Buffer>>) -> Result<(), RailError>;

    /// What to wait for until [`Rail::poll`] may find something.
    fn arm(&mut self) -> Armed<'_>;

    /// Ends every WRITE in flight, drops its buffer once nobody can read it any more, and appends its id to `unfinished`:
    /// whether it took place is unknown.
    ///
    /// # Errors
    ///
    /// When the rail does not close: its buffers are in use for ever.
    fn close(self: Box<Self>, unfinished: &mut Vec<WriteId>) -> Result<(), RailError>;
}

/// What a rail has to be waited for.
#[derive(Debug)]
pub enum Armed<'a> {
    /// Nothing: poll it now.
    Ready,
    /// Until this is readable.
    On(BorrowedFd<'a>),
    /// It cannot say: poll it every now and then.
    Blind,
}
