//! The completion queue: opening it, reading it, and finding the operation of each entry.
//!
//! What an entry says is checked against the in-flight table: an entry that fits no operation must never free a buffer.

use std::os::fd::RawFd;

use libfabric_sys as sys;

use crate::completion::{Completion, Fault, OpDone, OpKind};
use crate::error::{OpError, RailError};
use crate::object::{Object, call_error, errno};
use crate::rail::{Live, Rail, RailConfig};
use crate::wait;

/// The most entries of the completion queue that one poll reads: enough to empty it at any rate seen, few enough to come
/// back to posting soon.
pub const COMPLETIONS_PER_POLL_MAX: usize = 32;

/// Room for one run of entries, made once.
pub(crate) struct Entries(Box<[sys::fi_cq_data_entry; COMPLETIONS_PER_POLL_MAX]>);

// SAFETY: plain values that the provider wrote. Of the addresses among them only the context is looked at, and it is
// compared with those of our own contexts, never followed.
unsafe impl Send for Entries {}

impl Entries {
    pub(crate) fn new() -> Self {
        Self(Box::new([EMPTY_ENTRY; COMPLETIONS_PER_POLL_MAX]))
    }
}

impl Rail {
    /// Moves what has ended into `completions`, and says how much: at most [`COMPLETIONS_PER_POLL_MAX`]. Never blocks.
    /// With most providers this is also what makes progress, on the receiving side too.
    ///
    /// # Errors
    ///
    /// When the queue itself has failed. Nothing more can be posted then, and what is in flight comes back from
    /// [`Rail::close`]; `completions` still holds what had ended before.
    pub fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<usize, RailError> {
        let before = completions.len();
        let live = &mut *self.live;
        // Each turn reads one run of entries, or one error entry, which libfabric keeps apart.
        for errors in 0..COMPLETIONS_PER_POLL_MAX {
            let room = COMPLETIONS_PER_POLL_MAX - errors;
            // SAFETY: the queue is open, and its format is that of `entries`, which has at least `room` of them.
            let read = unsafe { sys::fi_cq_read(live.cq.as_ptr(), live.entries.0.as_mut_ptr().cast(), room) };
            match usize::try_from(read) {
                Ok(count) => {
                    for index in 0..count.min(room) {
                        let entry = live.entries.0[index];
                        live.settle(&entry, completions)?;
                    }
                    break;
                }
                Err(_) if read == -(sys::FI_EAVAIL as isize) => live.settle_error(completions)?,
                Err(_) if read == -(sys::FI_EAGAIN as isize) || read == -(sys::FI_EINTR as isize) => break,
                Err(_) => {
                    live.broken = true;
                    let code = i32::try_from(read).unwrap_or(sys::FI_EOTHER);
                    return Err(call_error(&live.library, "fi_cq_read", &live.name, code).into());
                }
            }
        }
        Ok(completions.len() - before)
    }
}

impl Live {
    fn settle(
        &mut self,
        entry: &sys::fi_cq_data_entry,
        completions: &mut Vec<Completion>,
    ) -> Result<(), RailError> {
        if is_remote(entry.flags) {
            if entry.flags & sys::FI_REMOTE_CQ_DATA != 0 {
                match u32::try_from(entry.data) {
                    Ok(data) => completions.push(Completion::Immediate { data }),
                    // Rails send 32 bits, so this is no rail.
                    Err(_) => {
                        tracing::warn!(rail = self.name, "a peer sent an immediate of more than 32 bits")
                    }
                }
            }
            return Ok(());
        }
        let Some((id, op)) = self.in_flight.finish(entry.op_context) else {
            return Err(self.stray(entry.op_context.addr()));
        };
        self.count(op.peer, op.region, -1);
        let bytes = if op.kind == OpKind::Receive { entry.len.min(op.bytes) } else { op.bytes };
        completions.push(Completion::Op {
            id,
            token: op.token,
            kind: op.kind,
            peer: op.peer,
            result: Ok(OpDone { bytes }),
            lease: op.held,
        });
        Ok(())
    }

    #[cold]
    fn settle_error(&mut self, completions: &mut Vec<Completion>) -> Result<(), RailError> {
        let mut entry = EMPTY_ERROR;
        // SAFETY: the queue is open, and the entry is of the newest size, so no version writes beyond it.
        let read = unsafe { sys::fi_cq_readerr(self.cq.as_ptr(), &raw mut entry, 0) };
        if read == -(sys::FI_EAGAIN as isize) {
            return Ok(());
        }
        if read < 0 {
            self.broken = true;
            let code = i32::try_from(read).unwrap_or(sys::FI_EOTHER);
            return Err(call_error(&self.library, "fi_cq_readerr", &self.name, code).into());
        }
        let errno = errno(&self.library, entry.err);
        let provider_text = self.provider_text(&entry);
        let on = self.name.clone();
        if is_remote(entry.flags) || entry.op_context.is_null() {
            let fault = Fault { on, errno, provider_errno: entry.prov_errno, provider_text };
            completions.push(Completion::Fault(Box::new(fault)));
            return Ok(());
        }
        let Some((id, op)) = self.in_flight.finish(entry.op_context) else {
            return Err(self.stray(entry.op_context.addr()));
        };
        let peer_name = op.peer.and_then(|peer| self.peers.get(peer.0)).map(|peer| peer.name.clone());
        self.count(op.peer, op.region, -1);
        let error = OpError {
            on,
            kind: op.kind,
            peer: op.peer,
            peer_name: peer_name.unwrap_or_default(),
            token: op.token,
            errno,
            provider_errno: entry.prov_errno,
            provider_text,
        };
        completions.push(Completion::Op {
            id,
            token: op.token,
            kind: op.kind,
            peer: op.peer,
            result: Err(Box::new(error)),
            lease: op.held,
        });
        Ok(())
    }

    fn provider_text(&self, entry: &sys::fi_cq_err_entry) -> String {
        const TEXT_BYTES_MAX: usize = 256;
        let mut room = [0_u8; TEXT_BYTES_MAX];
        // SAFETY: the queue is open, the error data is that of the entry read just now, and the provider writes at
        // most as many bytes as the room has.
        let text = unsafe {
            sys::fi_cq_strerror(
                self.cq.as_ptr(),
                entry.prov_errno,
                entry.err_data,
                room.as_mut_ptr().cast(),
                room.len(),
            )
        };
        if text.is_null() {
            return "nothing".to_owned();
        }
        // SAFETY: not null, so a terminated text: in `room`, or the provider's own.
        let text = unsafe { std::ffi::CStr::from_ptr(text) };
        text.to_string_lossy().into_owned()
    }

    #[cold]
    fn stray(&mut self, context: usize) -> RailError {
        self.broken = true;
        RailError::StrayCompletion { on: self.name.clone(), context }
    }
}

/// Whether an entry tells of a peer's access to our memory. Its context is nobody's then.
fn is_remote(flags: u64) -> bool {
    let access = sys::FI_REMOTE_WRITE | sys::FI_REMOTE_READ;
    flags & access != 0 || (flags & sys::FI_REMOTE_CQ_DATA != 0 && flags & sys::FI_RECV == 0)
}

pub(crate) const EMPTY_ENTRY: sys::fi_cq_data_entry = sys::fi_cq_data_entry {
    op_context: std::ptr::null_mut(),
    flags: 0,
    len: 0,
    buf: std::ptr::null_mut(),
    data: 0,
};

pub(crate) const EMPTY_ERROR: sys::fi_cq_err_entry = sys::fi_cq_err_entry {
    op_context: std::ptr::null_mut(),
    flags: 0,
    len: 0,
    buf: std::ptr::null_mut(),
    data: 0,
    tag: 0,
    olen: 0,
    err: 0,
    prov_errno: 0,
    err_data: std::ptr::null_mut(),
    err_data_size: 0,
    src_addr: sys::FI_ADDR_NOTAVAIL,
};

/// Opens the completion queue, with a descriptor to wait on where that is asked for and the provider has one.
pub(crate) fn open_queue(
    library: &sys::Library,
    domain: &Object<sys::fid_domain>,
    config: &RailConfig,
    on: &str,
) -> Result<(Object<sys::fid_cq>, Option<RawFd>), RailError> {
    // An overrun of the queue is fatal, so it has room for all that may end between two polls. All three are bounded.
    let depths = [config.writes_max, config.receives_max, config.immediates_max];
    let size = depths.into_iter().map(|depth| depth as usize).sum();
    let open = |wait_obj| {
        let mut attr = sys::fi_cq_attr {
            size,
            flags: 0,
            format: sys::FI_CQ_FORMAT_DATA,
            wait_obj,
            signaling_vector: 0,
            wait_cond: 0,
            wait_set: std::ptr::null_mut(),
        };
        Object::open(library, "fi_cq_open", on, |cq| {
            // SAFETY: the domain is open.
            unsafe { sys::fi_cq_open(domain.as_ptr(), &raw mut attr, cq) }
        })
    };
    if config.blocking_wait {
        match open(sys::FI_WAIT_FD) {
            Ok(cq) => {
                let descriptor = wait::queue_descriptor(library, &cq, on)?;
                return Ok((cq, Some(descriptor)));
            }
            Err(error) if is_unsupported(error.errno.code) => {
                tracing::debug!(on, "the provider has no descriptor to wait on: waits are short naps");
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok((open(sys::FI_WAIT_NONE)?, None))
}

fn is_unsupported(code: i32) -> bool {
    matches!(code, sys::FI_ENOSYS | sys::FI_EINVAL | sys::FI_EOPNOTSUPP | sys::FI_ENOPROTOOPT)
}
