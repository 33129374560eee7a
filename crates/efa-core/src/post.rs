//! Handing operations to the provider.
//!
//! Buffers go in by value. Across the call itself a buffer sits in a `ManuallyDrop`, so nothing on the way could free
//! it; an accepted post moves it into the in-flight table, a refused one gives the whole operation back.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::fmt;
use std::mem::ManuallyDrop;

use libfabric_sys as sys;

use crate::completion::{Held, OpKind};
use crate::device::DeviceSlice;
use crate::error::PostError;
use crate::in_flight::{Op, OpId};
use crate::memory::{Lease, LeaseMut, Target};
use crate::object::call_error;
use crate::peer::PeerId;
use crate::rail::{Live, Rail};
use crate::region::{RegionId, RemoteSpan};

/// How many writes of a batch may wait for one doorbell. Sixteen posts between polls took a 32-NIC host from 48 % to
/// 81 % of line rate; a longer run only delays the first of them.
pub const WRITES_PER_DOORBELL_MAX: u32 = 16;

/// Writes our bytes to a peer's region.
#[derive(Debug)]
pub struct Write<S = Lease> {
    /// The bytes: a [`Lease`], a [`Target`], or a [`DeviceSlice`].
    pub from: S,
    /// The region of ours that they lie in.
    pub region: RegionId,
    /// The peer.
    pub to: PeerId,
    /// Where in the peer's region; as long as `from`.
    pub remote: RemoteSpan,
    /// A number that the peer's rail reports once the bytes have landed.
    pub immediate: Option<u32>,
    /// Complete only when the bytes have landed in the peer's memory, not when they have left ours.
    pub delivery_complete: bool,
    /// Comes back with the completion; the rail does not look at it.
    pub token: u64,
}

/// Reads a peer's bytes into our buffer.
#[derive(Debug)]
pub struct Read {
    /// The buffer.
    pub into: LeaseMut,
    /// The region of ours that it lies in.
    pub region: RegionId,
    /// The peer.
    pub from: PeerId,
    /// Where in the peer's region; as long as `into`.
    pub remote: RemoteSpan,
    /// Comes back with the completion; the rail does not look at it.
    pub token: u64,
}

/// A message to a peer, which must have posted a receive for it.
#[derive(Debug)]
pub struct Message {
    /// Its bytes.
    pub from: Lease,
    /// The region of ours that it lies in.
    pub region: RegionId,
    /// The peer.
    pub to: PeerId,
    /// Comes back with the completion; the rail does not look at it.
    pub token: u64,
}

/// Takes a message from any peer.
#[derive(Debug)]
pub struct Receive {
    /// Room for the message.
    pub into: LeaseMut,
    /// The region of ours that it lies in.
    pub region: RegionId,
    /// Comes back with the completion; the rail does not look at it.
    pub token: u64,
}

/// Why an operation was not posted.
#[derive(Debug)]
#[non_exhaustive]
pub enum RejectReason {
    /// The provider has no room just now, or is still connecting: poll, then post again. Ordinary.
    Again,
    /// As many operations are in flight as the rail was opened for: poll, then post again. Ordinary.
    TableFull,
    /// It will not work as it is.
    Fatal(Box<PostError>),
}

impl From<PostError> for RejectReason {
    fn from(error: PostError) -> Self {
        Self::Fatal(Box::new(error))
    }
}

impl fmt::Display for RejectReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Again => f.write_str("the provider has no room just now: poll, then post again"),
            Self::TableFull => f.write_str("the rail's in-flight table is full: poll, then post again"),
            Self::Fatal(error) => error.fmt(f),
        }
    }
}

/// A refused operation: nothing is in flight, and it comes back whole.
#[derive(Debug)]
pub struct Rejected<T> {
    /// Why.
    pub reason: RejectReason,
    /// The operation.
    pub op: T,
}

impl<T> fmt::Display for Rejected<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reason.fmt(f)
    }
}

impl<T: fmt::Debug> std::error::Error for Rejected<T> {}

/// A buffer that can be in flight. Not to be implemented elsewhere, and not named there.
pub trait Buffer: Into<Held> {
    #[doc(hidden)]
    fn base(&self) -> *mut u8;
    #[doc(hidden)]
    fn len(&self) -> usize;
}

/// What a write can come from: a [`Lease`], a [`Target`], or a [`DeviceSlice`].
pub trait Source: Buffer {}

impl Source for Lease {}
impl Source for Target {}
impl Source for DeviceSlice {}

impl Buffer for DeviceSlice {
    fn base(&self) -> *mut u8 {
        std::ptr::without_provenance_mut(self.address())
    }

    fn len(&self) -> usize {
        DeviceSlice::len(self)
    }
}

impl Buffer for Lease {
    fn base(&self) -> *mut u8 {
        Lease::base(self).as_ptr()
    }

    fn len(&self) -> usize {
        Lease::len(self)
    }
}

impl Buffer for Target {
    fn base(&self) -> *mut u8 {
        Target::base(self).as_ptr()
    }

    fn len(&self) -> usize {
        Target::len(self)
    }
}

impl Buffer for LeaseMut {
    fn base(&self) -> *mut u8 {
        LeaseMut::base(self).as_ptr()
    }

    fn len(&self) -> usize {
        LeaseMut::len(self)
    }
}

/// What an operation is, beside its buffer.
struct Order {
    kind: OpKind,
    peer: Option<PeerId>,
    region: RegionId,
    remote: Option<RemoteSpan>,
    immediate: Option<u32>,
    flags: u64,
    token: u64,
}

impl Order {
    fn of_write<S>(write: &Write<S>, more: u64) -> Self {
        let delivery = if write.delivery_complete { sys::FI_DELIVERY_COMPLETE } else { 0 };
        let data = if write.immediate.is_some() { sys::FI_REMOTE_CQ_DATA } else { 0 };
        Self {
            kind: OpKind::Write,
            peer: Some(write.to),
            region: write.region,
            remote: Some(write.remote),
            immediate: write.immediate,
            flags: sys::FI_COMPLETION | delivery | data | more,
            token: write.token,
        }
    }
}

/// What the provider is told about the local side and the peer.
struct Local {
    iov: sys::iovec,
    desc: *mut c_void,
    peer: sys::fi_addr_t,
    context: *mut c_void,
}

impl Rail {
    /// Posts a write. Writes to one peer may land in any order.
    ///
    /// # Errors
    ///
    /// [`Rejected`] gives the write back: nothing is in flight.
    pub fn write<S: Source>(&mut self, write: Write<S>) -> Result<OpId, Rejected<Write<S>>> {
        self.live.post_write(write, 0)
    }

    /// Posts writes from the front of the queue until it is empty, the rail is full or the provider has no room just
    /// now, and says how many were posted. Neighbours for one peer may share a doorbell, so go on posting or polling
    /// until the queue is empty.
    ///
    /// # Errors
    ///
    /// When a write is refused for good. It stays at the front; those before it are in flight.
    pub fn write_batch<S: Source>(&mut self, queue: &mut VecDeque<Write<S>>) -> Result<usize, PostError> {
        let mut posted = 0;
        let mut waiting = 0;
        while let Some(write) = queue.pop_front() {
            // The doorbell waits only for a write that is going to be posted right after this one, to the same peer. One
            // that would be refused for good would leave those before it without any.
            let follows = self.live.in_flight.room(OpKind::Write) > 1
                && queue.front().is_some_and(|next| {
                    next.to == write.to && self.live.admit(&next.from, &Order::of_write(next, 0)).is_ok()
                });
            waiting = if follows && waiting + 1 < WRITES_PER_DOORBELL_MAX { waiting + 1 } else { 0 };
            let more = if waiting > 0 { sys::FI_MORE } else { 0 };
            match self.live.post_write(write, more) {
                Ok(_) => posted += 1,
                Err(Rejected { reason, op }) => {
                    queue.push_front(op);
                    return match reason {
                        RejectReason::Again | RejectReason::TableFull => Ok(posted),
                        RejectReason::Fatal(error) => Err(*error),
                    };
                }
            }
        }
        Ok(posted)
    }

    /// Posts a read.
    ///
    /// # Errors
    ///
    /// [`Rejected`] gives the read back: nothing is in flight.
    pub fn read(&mut self, read: Read) -> Result<OpId, Rejected<Read>> {
        let Read { into, region, from, remote, token } = read;
        let order = Order {
            kind: OpKind::Read,
            peer: Some(from),
            region,
            remote: Some(remote),
            immediate: None,
            flags: sys::FI_COMPLETION,
            token,
        };
        self.live
            .post(into, order)
            .map_err(|(reason, into)| Rejected { reason, op: Read { into, region, from, remote, token } })
    }

    /// Posts a message.
    ///
    /// # Errors
    ///
    /// [`Rejected`] gives the message back: nothing is in flight.
    pub fn send(&mut self, message: Message) -> Result<OpId, Rejected<Message>> {
        let Message { from, region, to, token } = message;
        let order = Order {
            kind: OpKind::Send,
            peer: Some(to),
            region,
            remote: None,
            immediate: None,
            flags: sys::FI_COMPLETION,
            token,
        };
        self.live
            .post(from, order)
            .map_err(|(reason, from)| Rejected { reason, op: Message { from, region, to, token } })
    }

    /// Posts room for a message.
    ///
    /// # Errors
    ///
    /// [`Rejected`] gives the room back: nothing is in flight.
    pub fn receive(&mut self, receive: Receive) -> Result<OpId, Rejected<Receive>> {
        let Receive { into, region, token } = receive;
        let order = Order {
            kind: OpKind::Receive,
            peer: None,
            region,
            remote: None,
            immediate: None,
            flags: sys::FI_COMPLETION,
            token,
        };
        self.live
            .post(into, order)
            .map_err(|(reason, into)| Rejected { reason, op: Receive { into, region, token } })
    }
}

impl Live {
    fn post_write<S: Source>(&mut self, write: Write<S>, more: u64) -> Result<OpId, Rejected<Write<S>>> {
        let order = Order::of_write(&write, more);
        let Write { from, region, to, remote, immediate, delivery_complete, token } = write;
        self.post(from, order).map_err(|(reason, from)| Rejected {
            reason,
            op: Write { from, region, to, remote, immediate, delivery_complete, token },
        })
    }

    /// Checks an operation, takes a slot for it and posts it. Gives the buffer back on every refusal.
    fn post<B: Buffer>(&mut self, buffer: B, order: Order) -> Result<OpId, (RejectReason, B)> {
        let bytes = buffer.len();
        let (desc, peer) = match self.admit(&buffer, &order) {
            Ok(admitted) => admitted,
            Err(error) => return Err((error.into(), buffer)),
        };
        let Some(vacancy) = self.in_flight.reserve(order.kind) else {
            return Err((RejectReason::TableFull, buffer));
        };
        let iov = sys::iovec { iov_base: buffer.base().cast(), iov_len: bytes };
        let local = Local { iov, desc, peer, context: self.in_flight.context(&vacancy) };
        let buffer = ManuallyDrop::new(buffer);
        let (call, code) = self.call(&local, &order);
        let buffer = ManuallyDrop::into_inner(buffer);
        if code == 0 {
            let Order { kind, peer, region, token, .. } = order;
            self.count(peer, region, 1);
            return Ok(self
                .in_flight
                .occupy(vacancy, Op { held: buffer.into(), kind, peer, region, token, bytes }));
        }
        self.in_flight.release(vacancy);
        if code == -(sys::FI_EAGAIN as isize) {
            return Err((RejectReason::Again, buffer));
        }
        let code = i32::try_from(code).unwrap_or(sys::FI_EOTHER);
        Err((PostError::from(call_error(&self.library, call, &self.name, code)).into(), buffer))
    }

    /// Makes the call. The provider answers 0 when it has taken the operation over.
    fn call(&self, local: &Local, order: &Order) -> (&'static str, isize) {
        let mut desc = local.desc;
        let Some(remote) = order.remote else {
            let message = sys::fi_msg {
                msg_iov: &raw const local.iov,
                desc: &raw mut desc,
                iov_count: 1,
                addr: local.peer,
                context: local.context,
                data: 0,
            };
            return match order.kind {
                OpKind::Receive => {
                    // SAFETY: the endpoint is open. The buffer lies in a region that the rail keeps registered, and
                    // the caller keeps it across this call and then puts it into the in-flight table, which owns it
                    // until the completion is read or the endpoint has closed; so does the context's slot.
                    let code =
                        unsafe { sys::fi_recvmsg(self.endpoint.as_ptr(), &raw const message, order.flags) };
                    ("fi_recvmsg", code)
                }
                _ => {
                    // SAFETY: as above.
                    let code =
                        unsafe { sys::fi_sendmsg(self.endpoint.as_ptr(), &raw const message, order.flags) };
                    ("fi_sendmsg", code)
                }
            };
        };
        // The length was checked to equal the buffer's.
        let rma_iov = sys::fi_rma_iov { addr: remote.address, len: local.iov.iov_len, key: remote.key };
        let message = sys::fi_msg_rma {
            msg_iov: &raw const local.iov,
            desc: &raw mut desc,
            iov_count: 1,
            addr: local.peer,
            rma_iov: &raw const rma_iov,
            rma_iov_count: 1,
            context: local.context,
            data: order.immediate.map_or(0, u64::from),
        };
        match order.kind {
            OpKind::Read => {
                // SAFETY: as above.
                let code =
                    unsafe { sys::fi_readmsg(self.endpoint.as_ptr(), &raw const message, order.flags) };
                ("fi_readmsg", code)
            }
            _ => {
                // SAFETY: as above.
                let code =
                    unsafe { sys::fi_writemsg(self.endpoint.as_ptr(), &raw const message, order.flags) };
                ("fi_writemsg", code)
            }
        }
    }

    /// Checks an operation against what the rail knows; answers the local descriptor and the peer's address.
    fn admit<B: Buffer>(
        &self,
        buffer: &B,
        order: &Order,
    ) -> Result<(*mut c_void, sys::fi_addr_t), PostError> {
        let on = || self.name.clone();
        if self.broken {
            return Err(PostError::Broken { on: on() });
        }
        let (region, len) = (order.region, buffer.len());
        let registration =
            self.regions.table.get(region.0).ok_or_else(|| PostError::UnknownRegion { on: on(), region })?;
        let address = buffer.base().addr();
        if !registration.covers(address, len) && len > 0 {
            return Err(PostError::OutsideRegion { on: on(), region, address, len });
        }
        let max = self.message_bytes_max;
        if len > max {
            return Err(PostError::TooLong { on: on(), len, max });
        }
        if let Some(remote) = order.remote.filter(|remote| remote.len != len as u64) {
            return Err(PostError::Length { on: on(), local_bytes: len, remote_bytes: remote.len });
        }
        let peer = match order.peer {
            None => sys::FI_ADDR_UNSPEC,
            Some(peer) => {
                self.peers.get(peer.0).ok_or_else(|| PostError::UnknownPeer { on: on(), peer })?.fi_addr
            }
        };
        Ok((registration.desc(), peer))
    }
}
