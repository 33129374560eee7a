//! Flags, modes and error numbers, with libfabric's own names and meaning: see its manual pages.
//!
//! The layout test compares every value here with the C headers.

#![allow(missing_docs, reason = "libfabric's manual pages define these names; a copy would only age")]

use std::ffi::c_int;

/// Packs a version as libfabric does.
#[allow(non_snake_case, reason = "the name of the C macro")]
pub const fn FI_VERSION(major: u32, minor: u32) -> u32 {
    (major << 16) | minor
}

// Capabilities and operation flags.
pub const FI_MSG: u64 = 1 << 1;
pub const FI_RMA: u64 = 1 << 2;
pub const FI_READ: u64 = 1 << 8;
pub const FI_WRITE: u64 = 1 << 9;
pub const FI_RECV: u64 = 1 << 10;
pub const FI_SEND: u64 = 1 << 11;
pub const FI_TRANSMIT: u64 = FI_SEND;
pub const FI_REMOTE_READ: u64 = 1 << 12;
pub const FI_REMOTE_WRITE: u64 = 1 << 13;
pub const FI_REMOTE_CQ_DATA: u64 = 1 << 17;
pub const FI_MORE: u64 = 1 << 18;
pub const FI_COMPLETION: u64 = 1 << 24;
pub const FI_INJECT: u64 = 1 << 25;
pub const FI_TRANSMIT_COMPLETE: u64 = 1 << 27;
pub const FI_DELIVERY_COMPLETE: u64 = 1 << 28;
pub const FI_HMEM: u64 = 1 << 47;
pub const FI_LOCAL_COMM: u64 = 1 << 51;
pub const FI_REMOTE_COMM: u64 = 1 << 52;

// Mode bits.
pub const FI_CONTEXT: u64 = 1 << 59;
pub const FI_CONTEXT2: u64 = 1 << 52;

// Memory registration.
pub const FI_MR_LOCAL: c_int = 1 << 2;
pub const FI_MR_RAW: c_int = 1 << 3;
pub const FI_MR_VIRT_ADDR: c_int = 1 << 4;
pub const FI_MR_ALLOCATED: c_int = 1 << 5;
pub const FI_MR_PROV_KEY: c_int = 1 << 6;
pub const FI_MR_ENDPOINT: c_int = 1 << 9;
pub const FI_MR_HMEM: c_int = 1 << 10;
pub const FI_MR_DMABUF: u64 = 1 << 40;
pub const FI_KEY_NOTAVAIL: u64 = u64::MAX;

// enum fi_hmem_iface
pub const FI_HMEM_SYSTEM: u32 = 0;
pub const FI_HMEM_CUDA: u32 = 1;

// Address formats and types.
pub const FI_FORMAT_UNSPEC: u32 = 0;
pub const FI_SOCKADDR: u32 = 1;
pub const FI_SOCKADDR_IN: u32 = 2;
pub const FI_SOCKADDR_IN6: u32 = 3;
pub const FI_ADDR_STR: u32 = 9;
pub const FI_ADDR_EFA: u32 = 12;
pub const FI_ADDR_UNSPEC: u64 = u64::MAX;
pub const FI_ADDR_NOTAVAIL: u64 = u64::MAX;

// enum fi_av_type
pub const FI_AV_UNSPEC: u32 = 0;
pub const FI_AV_MAP: u32 = 1;
pub const FI_AV_TABLE: u32 = 2;

// enum fi_ep_type
pub const FI_EP_MSG: u32 = 1;
pub const FI_EP_DGRAM: u32 = 2;
pub const FI_EP_RDM: u32 = 3;

// enum fi_threading
pub const FI_THREAD_UNSPEC: u32 = 0;
pub const FI_THREAD_SAFE: u32 = 1;
pub const FI_THREAD_DOMAIN: u32 = 3;

// enum fi_progress
pub const FI_PROGRESS_UNSPEC: u32 = 0;
pub const FI_PROGRESS_AUTO: u32 = 1;
pub const FI_PROGRESS_MANUAL: u32 = 2;

// enum fi_cq_format
pub const FI_CQ_FORMAT_CONTEXT: u32 = 1;
pub const FI_CQ_FORMAT_MSG: u32 = 2;
pub const FI_CQ_FORMAT_DATA: u32 = 3;

// enum fi_wait_obj
pub const FI_WAIT_NONE: u32 = 0;
pub const FI_WAIT_UNSPEC: u32 = 1;
pub const FI_WAIT_FD: u32 = 3;

// enum fi_bus_type
pub const FI_BUS_PCI: u32 = 1;

// Control commands.
pub const FI_GETWAIT: c_int = 5;
pub const FI_ENABLE: c_int = 6;

// Endpoint options.
pub const FI_OPT_ENDPOINT: c_int = 0;
pub const FI_OPT_CUDA_API_PERMITTED: c_int = 10;
pub const FI_OPT_SHARED_MEMORY_PERMITTED: c_int = 11;
pub const FI_OPT_EFA_EMULATED_READ: c_int = -(0xefa << 16) + 1;
pub const FI_OPT_EFA_EMULATED_WRITE: c_int = -(0xefa << 16) + 2;

// enum fi_type, for fi_tostr.
pub const FI_TYPE_INFO: u32 = 0;

// Error numbers. Those below 256 are the system's own.
pub const FI_SUCCESS: c_int = 0;
pub const FI_EINTR: c_int = libc::EINTR;
pub const FI_EAGAIN: c_int = libc::EAGAIN;
pub const FI_EBUSY: c_int = libc::EBUSY;
pub const FI_EINVAL: c_int = libc::EINVAL;
pub const FI_ENOSYS: c_int = libc::ENOSYS;
pub const FI_ENODATA: c_int = libc::ENODATA;
pub const FI_EACCES: c_int = libc::EACCES;
pub const FI_EOPNOTSUPP: c_int = libc::EOPNOTSUPP;
pub const FI_ENOPROTOOPT: c_int = libc::ENOPROTOOPT;
pub const FI_ECANCELED: c_int = libc::ECANCELED;
pub const FI_ECONNREFUSED: c_int = libc::ECONNREFUSED;
pub const FI_ECONNRESET: c_int = libc::ECONNRESET;
pub const FI_ECONNABORTED: c_int = libc::ECONNABORTED;
pub const FI_ENOTCONN: c_int = libc::ENOTCONN;
pub const FI_ETIMEDOUT: c_int = libc::ETIMEDOUT;
pub const FI_EHOSTUNREACH: c_int = libc::EHOSTUNREACH;
pub const FI_ENETUNREACH: c_int = libc::ENETUNREACH;
pub const FI_EIO: c_int = libc::EIO;
pub const FI_EREMOTEIO: c_int = libc::EREMOTEIO;
pub const FI_ESHUTDOWN: c_int = libc::ESHUTDOWN;
pub const FI_EOTHER: c_int = 256;
pub const FI_ETOOSMALL: c_int = 257;
pub const FI_EAVAIL: c_int = 259;
pub const FI_ETRUNC: c_int = 265;
pub const FI_ENOKEY: c_int = 266;
pub const FI_EOVERRUN: c_int = 268;
pub const FI_ENORX: c_int = 269;
pub const FI_ENOMR: c_int = 270;
