//! The wrappers never call through an entry that is not there, and a library that cannot be opened says why.

use std::ffi::{c_int, c_void};
use std::mem::offset_of;
use std::ptr;

use libfabric_sys as sys;

extern "C" fn empty_queue(_: *mut sys::fid_cq, _: *mut c_void, _: usize) -> isize {
    -(sys::FI_EAGAIN as isize)
}

fn table(size: usize, read: bool) -> sys::fi_ops_cq {
    sys::fi_ops_cq {
        size,
        read: if read { Some(empty_queue) } else { None },
        readfrom: None,
        readerr: None,
        sread: None,
        sreadfrom: ptr::null_mut(),
        signal: ptr::null_mut(),
        strerror: None,
    }
}

fn read(ops: *mut sys::fi_ops_cq) -> isize {
    let mut cq =
        sys::fid_cq { fid: sys::fid { fclass: 0, context: ptr::null_mut(), ops: ptr::null_mut() }, ops };
    // SAFETY: a queue made here, whose table is null or made here too.
    unsafe { sys::fi_cq_read(&raw mut cq, ptr::null_mut(), 0) }
}

#[test]
fn an_entry_is_called_only_where_the_table_has_it() {
    let absent = -(sys::FI_ENOSYS as isize);
    let up_to_read = offset_of!(sys::fi_ops_cq, read);
    assert_eq!(read(&mut table(up_to_read + 8, true)), -(sys::FI_EAGAIN as isize));
    assert_eq!(read(&mut table(up_to_read, true)), absent, "the table ends before the entry");
    assert_eq!(read(&mut table(up_to_read + 8, false)), absent, "the entry is empty");
    assert_eq!(read(ptr::null_mut()), absent, "there is no table");
}

#[test]
fn a_missing_text_is_null() {
    let mut ops = table(offset_of!(sys::fi_ops_cq, strerror), true);
    let mut cq = sys::fid_cq {
        fid: sys::fid { fclass: 0, context: ptr::null_mut(), ops: ptr::null_mut() },
        ops: &raw mut ops,
    };
    // SAFETY: a queue made here, whose table is made here too.
    let text = unsafe { sys::fi_cq_strerror(&raw mut cq, 0 as c_int, ptr::null(), ptr::null_mut(), 0) };
    assert!(text.is_null());
}

#[test]
fn a_library_that_cannot_be_opened_says_why() {
    let error = sys::Library::open_path("/nonexistent/libfabric.so.1").unwrap_err();
    assert_eq!(error.tried.len(), 1);
    let text = error.to_string();
    assert!(text.contains("/nonexistent/libfabric.so.1") && text.contains("LIBFABRIC_SO"), "{text}");

    let error = sys::Library::open_path("libc.so.6").unwrap_err();
    assert!(error.to_string().contains("fi_version"), "the missing symbol is named: {error}");
}

#[test]
fn versions_pack_as_libfabric_packs_them() {
    let version = sys::Version { major: 1, minor: 18 };
    assert_eq!(version.packed(), sys::FI_VERSION(1, 18));
    assert_eq!(sys::Version::from_packed(version.packed()), version);
    assert!(sys::Version { major: 1, minor: 22 } < sys::Version { major: 2, minor: 0 });
}
