//! What a rail does when the provider misbehaves. The provider is the real one, on loopback; single entries of its
//! operation tables are replaced, which is the one seam that costs the product nothing.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use libfabric_sys as sys;

use super::*;
use crate::queue::{COMPLETIONS_PER_POLL_MAX, EMPTY_ENTRY, EMPTY_ERROR};
use crate::{
    Completion, Hints, Lease, LeaseMut, Library, Memory, PostError, RegionError, RejectReason, Rejected,
    RemoteRegion, Write,
};

/// What the replaced entries answer, in order. One script per test, as each test has a thread.
enum Answer {
    Code(isize),
    Entries(Vec<sys::fi_cq_data_entry>),
    ErrorEntry(sys::fi_cq_err_entry),
}

thread_local! {
    static SCRIPT: RefCell<VecDeque<Answer>> = const { RefCell::new(VecDeque::new()) };
    static CONTEXTS: RefCell<Vec<*mut c_void>> = const { RefCell::new(Vec::new()) };
    /// Of each write that was taken, whether its doorbell waits for another.
    static WAITING: RefCell<Vec<bool>> = const { RefCell::new(Vec::new()) };
}

fn script(answers: impl IntoIterator<Item = Answer>) {
    SCRIPT.with_borrow_mut(|script| script.extend(answers));
}

/// The next answer, where it is a plain code.
fn next_code(otherwise: isize) -> isize {
    SCRIPT.with_borrow_mut(|script| match script.front() {
        Some(Answer::Code(code)) => {
            let code = *code;
            script.pop_front();
            code
        }
        _ => otherwise,
    })
}

unsafe extern "C" fn writemsg(_: *mut sys::fid_ep, message: *const sys::fi_msg_rma, flags: u64) -> isize {
    let code = next_code(0);
    if code == 0 {
        // SAFETY: the rail passes a message that lives across the call.
        let context = unsafe { (*message).context };
        CONTEXTS.with_borrow_mut(|contexts| contexts.push(context));
        WAITING.with_borrow_mut(|waiting| waiting.push(flags & sys::FI_MORE != 0));
    }
    code
}

unsafe extern "C" fn cq_read(_: *mut sys::fid_cq, room: *mut c_void, count: usize) -> isize {
    SCRIPT.with_borrow_mut(|script| match script.front() {
        Some(Answer::Entries(entries)) => {
            let written = entries.len().min(count);
            // SAFETY: the rail's room has `count` entries.
            unsafe { std::ptr::copy_nonoverlapping(entries.as_ptr(), room.cast(), written) };
            script.pop_front();
            written as isize
        }
        Some(Answer::ErrorEntry(_)) => -(sys::FI_EAVAIL as isize),
        Some(Answer::Code(code)) => {
            let code = *code;
            script.pop_front();
            code
        }
        None => -(sys::FI_EAGAIN as isize),
    })
}

unsafe extern "C" fn cq_readerr(_: *mut sys::fid_cq, room: *mut sys::fi_cq_err_entry, _: u64) -> isize {
    SCRIPT.with_borrow_mut(|script| match script.front() {
        Some(Answer::ErrorEntry(entry)) => {
            // SAFETY: the rail passes room for one entry.
            unsafe { room.write(*entry) };
            script.pop_front();
            1
        }
        _ => -(sys::FI_EAGAIN as isize),
    })
}

unsafe extern "C" fn close_fails(_: *mut sys::fid) -> c_int {
    -sys::FI_EBUSY
}

unsafe extern "C" fn regattr_collides(
    _: *mut sys::fid,
    _: *const sys::fi_mr_attr,
    _: u64,
    _: *mut *mut sys::fid_mr,
) -> c_int {
    CONTEXTS.with_borrow_mut(|tries| tries.push(std::ptr::null_mut()));
    -sys::FI_ENOKEY
}

/// Replaces an operation table by a changed copy, which is leaked, and answers the old one.
fn replace<T>(place: *mut *mut T, change: impl FnOnce(&mut T)) -> *mut T {
    // SAFETY: a field of a live object of the provider's.
    let old = unsafe { *place };
    // SAFETY: a table of plain pointers, as long in 1.17 as in 2.1.
    let mut table = Box::new(unsafe { old.read() });
    change(&mut table);
    // SAFETY: as above; nothing else runs on this rail.
    unsafe { *place = Box::leak(table) };
    old
}

fn fail_close(fid: *mut sys::fid) -> *mut sys::fi_ops {
    // SAFETY: a live object.
    let place = unsafe { &raw mut (*fid).ops };
    replace(place, |ops| ops.close = Some(close_fails))
}

/// A memory that tells when it is freed.
struct Watched {
    bytes: Box<[u8]>,
    base: NonNull<u8>,
    freed: Arc<AtomicBool>,
}

// SAFETY: the box is reached through `base` only, and lives until the value is dropped.
unsafe impl Send for Watched {}
// SAFETY: as above.
unsafe impl Sync for Watched {}
// SAFETY: `base` was taken from the box, which does not move its contents and which nobody else has.
unsafe impl Memory for Watched {
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.bytes.len()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.freed.store(true, Ordering::Relaxed);
    }
}

fn watched() -> (LeaseMut, impl Fn() -> bool) {
    let mut bytes = vec![0; 64].into_boxed_slice();
    let base = NonNull::from(&mut bytes[..]).cast();
    let freed = Arc::new(AtomicBool::new(false));
    let memory = Watched { bytes, base, freed: Arc::clone(&freed) };
    (LeaseMut::new(memory), move || freed.load(Ordering::Relaxed))
}

/// A rail whose writes and completions follow the script, with one peer: itself.
struct Scripted {
    rail: Rail,
    from: Lease,
    region: RegionId,
    to: PeerId,
    freed: Box<dyn Fn() -> bool>,
}

impl Scripted {
    fn open() -> Option<Self> {
        let library = Library::open().map_err(|error| println!("skipped: {error}")).ok()?;
        let hints = Hints { provider: library.tcp_provider(), ..Hints::default() };
        let info = library.infos(&hints).map_err(|error| println!("skipped: {error}")).ok()?.swap_remove(0);
        let mut rail = Rail::open(&info, &RailConfig::for_info(&info)).unwrap();
        let endpoint = rail.live.endpoint.as_ptr();
        // SAFETY: the endpoint is open.
        replace(unsafe { &raw mut (*endpoint).rma }, |rma| rma.writemsg = Some(writemsg));
        let queue = rail.live.cq.as_ptr();
        // SAFETY: the queue is open.
        replace(unsafe { &raw mut (*queue).ops }, |cq| {
            cq.read = Some(cq_read);
            cq.readerr = Some(cq_readerr);
        });
        let address = rail.address().clone();
        let to = rail.insert_peer(&address).unwrap();
        let (lease, freed) = watched();
        let region = rail.register(lease.memory()).unwrap();
        Some(Self { rail, from: lease.freeze(), region, to, freed: Box::new(freed) })
    }

    fn order(&self, token: u64) -> Write {
        let remote = RemoteRegion { base: 0, key: 1, len: 64 }.at(0, 64).unwrap();
        let (from, region, to) = (self.from.clone(), self.region, self.to);
        Write { from, region, to, remote, immediate: None, delivery_complete: true, token }
    }

    fn write(&mut self, token: u64) -> Result<*mut c_void, Rejected<Write>> {
        self.rail.write(self.order(token))?;
        Ok(CONTEXTS.with_borrow(|contexts| *contexts.last().unwrap()))
    }

    fn poll(&mut self) -> (Result<usize, RailError>, Vec<Completion>) {
        let mut completions = Vec::new();
        (self.rail.poll(&mut completions), completions)
    }
}

fn entry(op_context: *mut c_void, flags: u64, data: u64) -> Answer {
    Answer::Entries(vec![sys::fi_cq_data_entry { op_context, flags, data, ..EMPTY_ENTRY }])
}

#[test]
fn a_failed_close_leaks_everything_and_says_so() {
    let Some(mut it) = Scripted::open() else { return };
    it.write(1).unwrap();
    let (target, target_freed) = watched();
    let target = target.expose();
    it.rail.expose(&target).unwrap();
    drop((it.from, target));
    fail_close(it.rail.live.endpoint.as_fid());
    let failed = it.rail.close().unwrap_err();
    assert_eq!((failed.operations, failed.regions), (1, 2));
    assert_eq!(failed.call.errno.code, sys::FI_EBUSY);
    assert!(!(it.freed)() && !target_freed(), "the provider may still touch both");
}

#[test]
fn a_failed_close_on_drop_leaks_too() {
    let Some(mut it) = Scripted::open() else { return };
    it.write(1).unwrap();
    drop(it.from);
    fail_close(it.rail.live.endpoint.as_fid());
    drop(it.rail);
    assert!(!(it.freed)());
}

#[test]
fn a_close_gives_back_what_was_in_flight() {
    let Some(mut it) = Scripted::open() else { return };
    it.write(1).unwrap();
    it.write(2).unwrap();
    let held = it.rail.close().unwrap();
    assert_eq!(held.iter().map(|one| one.token).collect::<Vec<_>>(), [1, 2]);
    drop(it.from);
    assert!(!(it.freed)());
    drop(held);
    assert!((it.freed)());
}

#[test]
fn dropping_a_rail_frees_what_was_in_flight() {
    let Some(mut it) = Scripted::open() else { return };
    it.write(1).unwrap();
    drop(it.from);
    assert!(!(it.freed)(), "the in-flight table owns it");
    drop(it.rail);
    assert!((it.freed)());
}

#[test]
fn a_refused_post_gives_the_buffer_back() {
    let Some(mut it) = Scripted::open() else { return };
    script([Answer::Code(-(sys::FI_EAGAIN as isize)), Answer::Code(-(sys::FI_EINVAL as isize))]);
    let again = it.write(7).unwrap_err();
    assert!(matches!(again.reason, RejectReason::Again));
    assert_eq!(again.op.token, 7);
    drop(again);
    let fatal = it.write(8).unwrap_err();
    match &fatal.reason {
        RejectReason::Fatal(error) => match &**error {
            PostError::Call(error) => {
                assert_eq!((error.call, error.errno.code), ("fi_writemsg", sys::FI_EINVAL))
            }
            other => panic!("{other}"),
        },
        other => panic!("{other}"),
    }
    drop(fatal);
    assert_eq!(it.rail.in_flight(), 0);
    assert_eq!(it.rail.room(), RailConfig::default().writes_max);
    assert!(it.from.thaw().is_ok(), "no handle is left behind");
}

#[test]
fn no_doorbell_waits_for_a_write_that_is_refused() {
    let Some(mut it) = Scripted::open() else { return };
    let short = RemoteRegion { base: 0, key: 1, len: 64 }.at(0, 63).unwrap();
    let misfit = Write { remote: short, ..it.order(3) };
    let mut queue = VecDeque::from([it.order(0), it.order(1), it.order(2), misfit, it.order(4)]);
    assert!(matches!(it.rail.write_batch(&mut queue), Err(PostError::Length { .. })));
    assert_eq!(queue.front().map(|write| write.token), Some(3));
    WAITING.with_borrow(|waiting| assert_eq!(waiting[..], [true, true, false]));
}

#[test]
fn completions_find_their_operation() {
    let Some(mut it) = Scripted::open() else { return };
    let contexts: Vec<_> = (0..3).map(|token| it.write(token).unwrap()).collect();
    script([entry(contexts[2], 0, 0), entry(contexts[0], 0, 0)]);
    for expected in [2, 0] {
        let (polled, completions) = it.poll();
        assert_eq!(polled.unwrap(), 1);
        assert!(
            matches!(completions[..], [Completion::Op { token, result: Ok(_), .. }] if token == expected)
        );
    }
    assert_eq!(it.rail.in_flight(), 1);
    let (polled, _) = it.poll();
    assert_eq!(polled.unwrap(), 0);
}

#[test]
fn an_operation_is_never_completed_twice() {
    let Some(mut it) = Scripted::open() else { return };
    let context = it.write(1).unwrap();
    it.write(2).unwrap();
    script([entry(context, 0, 0), entry(context, 0, 0)]);
    assert_eq!(it.poll().0.unwrap(), 1);
    let (polled, completions) = it.poll();
    assert!(matches!(polled, Err(RailError::StrayCompletion { .. })), "{polled:?}");
    assert!(completions.is_empty());
    // The books are wrong, so nothing more is posted; what is in flight is still owned and comes back.
    let refused = it.write(3).unwrap_err();
    assert!(
        matches!(&refused.reason, RejectReason::Fatal(error) if matches!(**error, PostError::Broken { .. }))
    );
    assert_eq!(it.rail.close().unwrap().len(), 1);
}

#[test]
fn contexts_that_are_not_ours_are_refused() {
    for off in [1_usize, 8, 1 << 20] {
        let Some(mut it) = Scripted::open() else { return };
        let context = it.write(1).unwrap();
        script([entry(context.wrapping_byte_add(off), 0, 0)]);
        assert!(matches!(it.poll().0, Err(RailError::StrayCompletion { .. })), "{off}");
    }
    let Some(mut it) = Scripted::open() else { return };
    script([entry(std::ptr::null_mut(), 0, 0)]);
    assert!(matches!(it.poll().0, Err(RailError::StrayCompletion { .. })));
}

#[test]
fn a_failed_operation_comes_back_with_its_buffer() {
    let Some(mut it) = Scripted::open() else { return };
    let context = it.write(0xabc).unwrap();
    let error = sys::fi_cq_err_entry {
        op_context: context,
        flags: sys::FI_RMA | sys::FI_WRITE,
        err: sys::FI_ECANCELED,
        prov_errno: 107,
        ..EMPTY_ERROR
    };
    script([Answer::ErrorEntry(error)]);
    let (polled, mut completions) = it.poll();
    assert_eq!(polled.unwrap(), 1);
    match completions.pop() {
        Some(Completion::Op {
            token: 0xabc, kind: OpKind::Write, peer, result: Err(error), lease, ..
        }) => {
            assert_eq!(peer, Some(it.to));
            assert_eq!((error.errno.code, error.provider_errno), (sys::FI_ECANCELED, 107));
            let text = error.to_string();
            for part in [it.rail.name(), "write", "0xabc", "127.0.0.1", "(125)", "(107)", "new address"] {
                assert!(text.contains(part), "{part}: {text}");
            }
            drop(lease);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(it.rail.in_flight(), 0);
    // Nothing holds on to the region and the peer either.
    it.rail.close_region(it.region).unwrap();
    it.rail.remove_peer(it.to).unwrap();
    assert!(it.from.thaw().is_ok());
}

#[test]
fn a_peers_failure_is_nobodys_operation() {
    let Some(mut it) = Scripted::open() else { return };
    let context = it.write(1).unwrap();
    // The context of a remote access is the provider's own affair, even where it looks like one of ours.
    let flags = sys::FI_RMA | sys::FI_REMOTE_WRITE | sys::FI_REMOTE_CQ_DATA;
    let error = sys::fi_cq_err_entry { op_context: context, flags, err: sys::FI_EACCES, ..EMPTY_ERROR };
    script([Answer::ErrorEntry(error), entry(context, flags, 5)]);
    let (polled, completions) = it.poll();
    assert_eq!(polled.unwrap(), 2);
    assert!(
        matches!(&completions[..], [Completion::Fault(fault), Completion::Immediate { data: 5 }]
            if fault.errno.code == sys::FI_EACCES),
        "{completions:?}"
    );
    assert_eq!(it.rail.in_flight(), 1);
}

#[test]
fn accesses_without_a_number_say_nothing() {
    let Some(mut it) = Scripted::open() else { return };
    let context = it.write(1).unwrap();
    script([
        entry(context, sys::FI_RMA | sys::FI_REMOTE_WRITE, 0),
        entry(context, sys::FI_RMA | sys::FI_REMOTE_READ, 0),
    ]);
    assert!(it.poll().1.is_empty() && it.poll().1.is_empty());
    assert_eq!(it.rail.in_flight(), 1, "the context was not ours");
}

#[test]
fn immediates_that_no_rail_sends_are_dropped() {
    let Some(mut it) = Scripted::open() else { return };
    let flags = sys::FI_RMA | sys::FI_REMOTE_WRITE | sys::FI_REMOTE_CQ_DATA;
    script([entry(std::ptr::null_mut(), flags, 1 << 32), entry(std::ptr::null_mut(), flags, (1 << 32) - 1)]);
    assert!(it.poll().1.is_empty());
    assert!(matches!(it.poll().1[..], [Completion::Immediate { data: u32::MAX }]));
}

#[test]
fn a_failed_queue_breaks_the_rail() {
    let Some(mut it) = Scripted::open() else { return };
    it.write(1).unwrap();
    script([Answer::Code(-(sys::FI_EOVERRUN as isize))]);
    let (polled, _) = it.poll();
    assert!(
        matches!(&polled, Err(RailError::Call(error)) if error.errno.code == sys::FI_EOVERRUN),
        "{polled:?}"
    );
    assert!(it.write(2).is_err());
    assert_eq!(it.rail.close().unwrap().len(), 1);
}

#[test]
fn a_poll_ends_though_the_queue_keeps_announcing_errors() {
    let Some(mut it) = Scripted::open() else { return };
    // Announced, but then there is none.
    script((0..2 * COMPLETIONS_PER_POLL_MAX).map(|_| Answer::Code(-(sys::FI_EAVAIL as isize))));
    assert_eq!(it.poll().0.unwrap(), 0);
    let left = SCRIPT.with_borrow(VecDeque::len);
    assert_eq!(left, COMPLETIONS_PER_POLL_MAX);
}

#[test]
fn a_region_that_does_not_close_stays_open() {
    let Some(mut it) = Scripted::open() else { return };
    let (target, freed) = watched();
    let target = target.expose();
    let (region, _) = it.rail.expose(&target).unwrap();
    drop(target);
    let mr = it.rail.live.regions.table.get(region.0).unwrap().object().unwrap().as_fid();
    let working = fail_close(mr);
    let error = it.rail.close_region(region).unwrap_err();
    assert!(matches!(&error, RegionError::Call(error) if error.call == "fi_close(mr)"), "{error}");
    assert!(!freed());
    // SAFETY: the registration is still open, which is what this test shows.
    unsafe { (*mr).ops = working };
    it.rail.close_region(region).unwrap();
    drop(it.rail);
    assert!(freed());
}

#[test]
fn a_region_that_never_closes_leaks_its_memory() {
    let Some(mut it) = Scripted::open() else { return };
    let (target, freed) = watched();
    let target = target.expose();
    let (region, _) = it.rail.expose(&target).unwrap();
    drop(target);
    fail_close(it.rail.live.regions.table.get(region.0).unwrap().object().unwrap().as_fid());
    it.rail.close().unwrap();
    assert!(!freed());
}

#[test]
fn taken_keys_are_tried_again_a_bounded_number_of_times() {
    let Some(mut it) = Scripted::open() else { return };
    let domain = it.rail.live.domain.as_ptr();
    // SAFETY: the domain is open.
    replace(unsafe { &raw mut (*domain).mr }, |mr| mr.regattr = Some(regattr_collides));
    let target = LeaseMut::zeroed(64).unwrap().expose();
    let error = it.rail.expose(&target).unwrap_err();
    assert!(matches!(error, RegionError::NoKey { tries: 16, key_bytes: 8, .. }), "{error}");
    assert_eq!(CONTEXTS.with_borrow(Vec::len), 16);
    assert!(target.reclaim().is_ok(), "a failed registration keeps nothing");
}
