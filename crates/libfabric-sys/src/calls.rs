//! The calls that libfabric's headers define inline: each goes through an operation table of the object.
//!
//! A table that is too short for an entry (an older library), or an empty entry, is answered with `-FI_ENOSYS`
//! (null for the calls that return a text), so no wrapper here ever calls through a pointer that is not there.

use std::ffi::{c_char, c_int, c_void};
use std::mem::offset_of;
use std::ptr;

use crate::*;

/// Reads one entry of the operation table `(*$object).$ops`, or `None` where the table has none.
macro_rules! entry {
    ($object:expr, $($ops:ident).+, $table:ty, $name:ident) => {{
        // SAFETY: the caller of the wrapper passes a live object.
        let table: *const $table = unsafe { (*$object).$($ops).+ };
        if table.is_null() {
            None
        } else {
            // SAFETY: an operation table lives as long as its object, and starts with its size.
            let table_bytes = unsafe { (*table).size };
            if table_bytes > offset_of!($table, $name) {
                // SAFETY: the table reaches over this entry.
                unsafe { (*table).$name }
            } else {
                None
            }
        }
    }};
}

/// Defines wrappers with the C names.
macro_rules! calls {
    ($(
        $(#[$doc:meta])*
        fn $name:ident($object:ident: *mut $type:ty $(, $argument:ident: $argument_type:ty)*) -> $result:ty
            = [$($ops:ident).+] $table:ident.$entry:ident($($pass:expr),*) or $absent:expr;
    )*) => { $(
        $(#[$doc])*
        ///
        /// # Safety
        ///
        /// The object must be open, and every pointer valid as libfabric's manual page of this call asks. Calls on
        /// one domain's objects must be serialised as its threading model asks.
        #[inline]
        pub unsafe fn $name($object: *mut $type $(, $argument: $argument_type)*) -> $result {
            match entry!($object, $($ops).+, $table, $entry) {
                // SAFETY: the entry is this object's own, and the caller keeps the call's contract.
                Some(call) => unsafe { call($($pass),*) },
                None => $absent,
            }
        }
    )* };
}

const ABSENT: c_int = -FI_ENOSYS;

calls! {
    /// Closes any object.
    fn fi_close(object: *mut fid) -> c_int = [ops] fi_ops.close(object) or ABSENT;

    /// Sends a control command to any object.
    fn fi_control(object: *mut fid, command: c_int, argument: *mut c_void) -> c_int
        = [ops] fi_ops.control(object, command, argument) or ABSENT;

    /// Opens a domain.
    fn fi_domain(fabric: *mut fid_fabric, info: *mut fi_info, domain: *mut *mut fid_domain) -> c_int
        = [ops] fi_ops_fabric.domain(fabric, info, domain, ptr::null_mut()) or ABSENT;

    /// Says whether it is safe to block on the wait objects of `fids`.
    fn fi_trywait(fabric: *mut fid_fabric, fids: *mut *mut fid, count: c_int) -> c_int
        = [ops] fi_ops_fabric.trywait(fabric, fids, count) or ABSENT;

    /// Opens an address vector.
    fn fi_av_open(domain: *mut fid_domain, attr: *mut fi_av_attr, av: *mut *mut fid_av) -> c_int
        = [ops] fi_ops_domain.av_open(domain, attr, av, ptr::null_mut()) or ABSENT;

    /// Opens a completion queue.
    fn fi_cq_open(domain: *mut fid_domain, attr: *mut fi_cq_attr, cq: *mut *mut fid_cq) -> c_int
        = [ops] fi_ops_domain.cq_open(domain, attr, cq, ptr::null_mut()) or ABSENT;

    /// Opens an endpoint.
    fn fi_endpoint(domain: *mut fid_domain, info: *mut fi_info, ep: *mut *mut fid_ep) -> c_int
        = [ops] fi_ops_domain.endpoint(domain, info, ep, ptr::null_mut()) or ABSENT;

    /// Registers memory.
    fn fi_mr_regattr(domain: *mut fid_domain, attr: *const fi_mr_attr, flags: u64, mr: *mut *mut fid_mr) -> c_int
        = [mr] fi_ops_mr.regattr(domain.cast(), attr, flags, mr) or ABSENT;

    /// Binds an endpoint to a completion queue or an address vector.
    fn fi_ep_bind(ep: *mut fid_ep, object: *mut fid, flags: u64) -> c_int
        = [fid.ops] fi_ops.bind(ep.cast(), object, flags) or ABSENT;

    /// Enables an endpoint.
    fn fi_enable(ep: *mut fid_ep) -> c_int
        = [fid.ops] fi_ops.control(ep.cast(), FI_ENABLE, ptr::null_mut()) or ABSENT;

    /// Asks for the cancellation of the operation with this context.
    fn fi_cancel(ep: *mut fid_ep, context: *mut c_void) -> isize
        = [ops] fi_ops_ep.cancel(ep.cast(), context) or ABSENT as isize;

    /// Reads an endpoint option.
    fn fi_getopt(ep: *mut fid_ep, level: c_int, name: c_int, value: *mut c_void, value_bytes: *mut usize) -> c_int
        = [ops] fi_ops_ep.getopt(ep.cast(), level, name, value, value_bytes) or ABSENT;

    /// Sets an endpoint option.
    fn fi_setopt(ep: *mut fid_ep, level: c_int, name: c_int, value: *const c_void, value_bytes: usize) -> c_int
        = [ops] fi_ops_ep.setopt(ep.cast(), level, name, value, value_bytes) or ABSENT;

    /// Copies the endpoint's own address.
    fn fi_getname(ep: *mut fid_ep, address: *mut c_void, address_bytes: *mut usize) -> c_int
        = [cm] fi_ops_cm.getname(ep.cast(), address, address_bytes) or ABSENT;

    /// Inserts addresses. The call reads as many bytes as the address format has: the caller must have them.
    fn fi_av_insert(av: *mut fid_av, addresses: *const c_void, count: usize, peers: *mut fi_addr_t, flags: u64)
        -> c_int = [ops] fi_ops_av.insert(av, addresses, count, peers, flags, ptr::null_mut()) or ABSENT;

    /// Removes addresses.
    fn fi_av_remove(av: *mut fid_av, peers: *mut fi_addr_t, count: usize, flags: u64) -> c_int
        = [ops] fi_ops_av.remove(av, peers, count, flags) or ABSENT;

    /// Writes a printable form of an address.
    fn fi_av_straddr(av: *mut fid_av, address: *const c_void, text: *mut c_char, text_bytes: *mut usize)
        -> *const c_char = [ops] fi_ops_av.straddr(av, address, text, text_bytes) or ptr::null();

    /// Reads completions, never blocking.
    fn fi_cq_read(cq: *mut fid_cq, entries: *mut c_void, count: usize) -> isize
        = [ops] fi_ops_cq.read(cq, entries, count) or ABSENT as isize;

    /// Reads completions and who sent them, never blocking.
    fn fi_cq_readfrom(cq: *mut fid_cq, entries: *mut c_void, count: usize, peers: *mut fi_addr_t) -> isize
        = [ops] fi_ops_cq.readfrom(cq, entries, count, peers) or ABSENT as isize;

    /// Reads completions, waiting up to `timeout_ms` for the first (negative: for ever).
    fn fi_cq_sread(cq: *mut fid_cq, entries: *mut c_void, count: usize, timeout_ms: c_int) -> isize
        = [ops] fi_ops_cq.sread(cq, entries, count, ptr::null(), timeout_ms) or ABSENT as isize;

    /// Reads the error entry at the head of the queue.
    fn fi_cq_readerr(cq: *mut fid_cq, entry: *mut fi_cq_err_entry, flags: u64) -> isize
        = [ops] fi_ops_cq.readerr(cq, entry, flags) or ABSENT as isize;

    /// Explains a provider's error number; null where the provider has no such call.
    fn fi_cq_strerror(cq: *mut fid_cq, prov_errno: c_int, err_data: *const c_void, text: *mut c_char, text_bytes: usize)
        -> *const c_char = [ops] fi_ops_cq.strerror(cq, prov_errno, err_data, text, text_bytes) or ptr::null();

    /// Posts a remote write.
    fn fi_writemsg(ep: *mut fid_ep, message: *const fi_msg_rma, flags: u64) -> isize
        = [rma] fi_ops_rma.writemsg(ep, message, flags) or ABSENT as isize;

    /// Posts a remote read.
    fn fi_readmsg(ep: *mut fid_ep, message: *const fi_msg_rma, flags: u64) -> isize
        = [rma] fi_ops_rma.readmsg(ep, message, flags) or ABSENT as isize;

    /// Posts a message.
    fn fi_sendmsg(ep: *mut fid_ep, message: *const fi_msg, flags: u64) -> isize
        = [msg] fi_ops_msg.sendmsg(ep, message, flags) or ABSENT as isize;

    /// Posts a buffer for a message.
    fn fi_recvmsg(ep: *mut fid_ep, message: *const fi_msg, flags: u64) -> isize
        = [msg] fi_ops_msg.recvmsg(ep, message, flags) or ABSENT as isize;
}

/// The descriptor that local buffers of this registration are posted with.
///
/// # Safety
///
/// The registration must be open.
#[inline]
pub unsafe fn fi_mr_desc(mr: *mut fid_mr) -> *mut c_void {
    // SAFETY: the caller passes a live registration.
    unsafe { (*mr).mem_desc }
}

/// The key that a peer names this registration with.
///
/// # Safety
///
/// The registration must be open.
#[inline]
pub unsafe fn fi_mr_key(mr: *mut fid_mr) -> u64 {
    // SAFETY: the caller passes a live registration.
    unsafe { (*mr).key }
}
