use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

#[test]
fn committed_memory_is_zero_and_more_than_there_is_is_an_error() {
    let lease = LeaseMut::committed(3 * HUGE_PAGE_BYTES + 5).unwrap();
    assert_eq!(lease.len(), 3 * HUGE_PAGE_BYTES + 5);
    assert!(lease.bytes().iter().all(|byte| *byte == 0));
    assert!(LeaseMut::committed(0).unwrap().is_empty());
    assert!(LeaseMut::committed(1 << 60).is_err());
}

/// A memory that tells when it is dropped.
struct Watched {
    mapping: Mapping,
    dropped: Arc<AtomicBool>,
}

// SAFETY: the mapping's own promise, passed on; nobody else has the mapping.
unsafe impl Memory for Watched {
    fn base(&self) -> NonNull<u8> {
        self.mapping.base()
    }

    fn len(&self) -> usize {
        self.mapping.len()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.dropped.store(true, Ordering::Relaxed);
    }
}

fn watched(len: usize) -> (LeaseMut, impl Fn() -> bool) {
    let dropped = Arc::new(AtomicBool::new(false));
    let memory = Watched { mapping: Mapping::anonymous(len).unwrap(), dropped: Arc::clone(&dropped) };
    (LeaseMut::new(memory), move || dropped.load(Ordering::Relaxed))
}

fn counting(len: u8) -> LeaseMut {
    let mut lease = LeaseMut::zeroed(usize::from(len)).unwrap();
    for (index, byte) in lease.bytes_mut().iter_mut().enumerate() {
        *byte = index as u8;
    }
    lease
}

#[test]
fn fresh_memory_is_zero_and_page_aligned() {
    let lease = LeaseMut::zeroed(3 << 20).unwrap();
    assert!(lease.bytes().iter().all(|byte| *byte == 0));
    assert_eq!(lease.memory().base_address() % 4096, 0);
    assert_eq!(lease.memory().len(), 3 << 20);
}

#[test]
fn nothing_is_a_length_too() {
    let mut lease = LeaseMut::zeroed(0).unwrap();
    assert!(lease.is_empty() && lease.bytes().is_empty() && lease.bytes_mut().is_empty());
    assert!(lease.split_to(1).is_none());
    assert!(lease.split_to(0).unwrap().is_empty());
    let frozen = lease.freeze();
    assert!(frozen.slice(0..0).unwrap().bytes().is_empty());
    let target = frozen.thaw().unwrap().expose();
    assert_eq!(target.read(0, &mut []), Ok(()));
    assert!(target.read(0, &mut [0]).is_err());
}

#[test]
fn too_much_is_refused_by_name() {
    let error = LeaseMut::zeroed(usize::MAX / 2).unwrap_err();
    assert!(error.to_string().contains(&(usize::MAX / 2).to_string()), "{error}");
}

#[test]
fn splits_are_disjoint_and_whole() {
    let mut rest = counting(100);
    let mut front = rest.split_to(30).unwrap();
    let middle = rest.split_to(50).unwrap();
    assert_eq!((front.len(), middle.len(), rest.len()), (30, 50, 20));
    front.bytes_mut().fill(0xff);
    assert!(middle.bytes().iter().copied().eq(30..80));
    assert!(rest.bytes().iter().copied().eq(80..100));
    assert!(front.memory().ptr_eq(rest.memory()));
    assert!(rest.split_to(21).is_none());
    assert_eq!(rest.len(), 20, "a refused split changes nothing");
}

#[test]
fn slices_stay_inside() {
    let lease = counting(10).freeze();
    assert_eq!(lease.slice(2..5).unwrap().bytes(), [2, 3, 4]);
    assert_eq!(lease.slice(2..5).unwrap().slice(1..3).unwrap().bytes(), [3, 4]);
    assert!(lease.slice(10..10).unwrap().is_empty());
    #[expect(clippy::reversed_empty_ranges, reason = "that is the point")]
    for range in [0..11, 11..11, 5..4, usize::MAX - 1..usize::MAX, 1..0] {
        assert!(lease.slice(range.clone()).is_none(), "{range:?}");
    }
    assert!(
        lease.slice(2..5).unwrap().slice(0..4).is_none(),
        "a slice is bounded by itself, not by the whole"
    );
}

#[test]
fn thawing_needs_the_last_handle_and_gives_back_the_whole() {
    let lease = counting(10).freeze();
    let slice = lease.slice(3..4).unwrap();
    let lease = lease.thaw().unwrap_err();
    drop(lease);
    let whole = slice.thaw().unwrap();
    assert!(whole.bytes().iter().copied().eq(0..10));
}

#[test]
fn reclaiming_needs_the_last_handle() {
    let target = counting(10).expose();
    let clone = target.clone();
    let target = target.reclaim().unwrap_err();
    drop(clone);
    assert!(target.reclaim().unwrap().bytes().iter().copied().eq(0..10));
}

#[test]
fn a_target_is_read_inside_its_range_only() {
    let target = counting(10).expose();
    let mut bytes = [0xee; 4];
    target.read(6, &mut bytes).unwrap();
    assert_eq!(bytes, [6, 7, 8, 9]);
    for offset in [7, 10, 11, usize::MAX] {
        assert!(target.read(offset, &mut bytes).is_err(), "{offset}");
    }
    assert_eq!(bytes, [6, 7, 8, 9], "a refused read copies nothing");
}

#[test]
fn slices_of_a_target_stay_inside_and_give_back_the_whole() {
    let target = counting(10).expose();
    let mut bytes = [0; 3];
    let slice = target.slice(2..7).unwrap().slice(1..4).unwrap();
    slice.read(0, &mut bytes).unwrap();
    assert_eq!((slice.len(), bytes), (3, [3, 4, 5]));
    assert!(slice.read(1, &mut bytes).is_err(), "a slice is bounded by itself, not by the whole");
    assert!(slice.slice(0..4).is_none() && target.slice(10..11).is_none());
    assert!(target.slice(10..10).unwrap().is_empty());
    assert!(slice.copy_to(&target).is_err());
    slice.copy_to(&target.slice(7..10).unwrap()).unwrap();
    let target = target.reclaim().unwrap_err();
    drop(target);
    assert_eq!(slice.reclaim().unwrap().bytes(), [0, 1, 2, 3, 4, 5, 6, 3, 4, 5]);
}

#[test]
fn memory_lives_as_long_as_any_handle() {
    let (mut lease, dropped) = watched(8);
    let front = lease.split_to(4).unwrap();
    let memory = lease.memory().clone();
    drop(lease);
    let frozen = front.freeze();
    let slice = frozen.slice(1..2).unwrap();
    drop(frozen);
    let target = slice.thaw().unwrap().expose();
    assert!(!dropped());
    drop(target);
    assert!(!dropped(), "a MemoryRef alone keeps it");
    drop(memory);
    assert!(dropped());
}

#[test]
fn handles_go_to_other_threads() {
    let lease = counting(100).freeze();
    std::thread::scope(|scope| {
        for start in 0..4_usize {
            let part = lease.slice(start * 25..(start + 1) * 25).unwrap();
            scope.spawn(move || {
                assert!(part.bytes().iter().copied().eq((start as u8 * 25)..(start as u8 + 1) * 25))
            });
        }
    });
    assert!(lease.thaw().is_ok());
}
