//! Posting and polling allocate nothing once they are under way.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use common::Pair;
use efa_core::{Completion, RailConfig, Write};

/// Counts the allocations of each thread. libfabric's own go to the C allocator and are not seen.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn writing_and_polling_allocate_nothing() {
    let Some(info) = common::tcp() else { return };
    let pair = &mut Pair::open(&info, &RailConfig::for_info(&info));
    let source = pair.source(&[7; 4096]);
    let (_, _, remote) = pair.target(4096);
    let (mut ours, mut theirs) = (Vec::with_capacity(64), Vec::with_capacity(64));
    let mut before = 0;
    for round in 0..1000 {
        if round == 1 {
            // The first connects, and its refusals may be put into words.
            before = ALLOCATIONS.get();
        }
        let write = Write {
            from: source.0.slice(0..round).unwrap(),
            region: source.1,
            to: pair.to,
            remote: remote.at(0, round as u64).unwrap(),
            immediate: Some(round as u32),
            delivery_complete: true,
            token: round as u64,
        };
        if round == 0 {
            pair.write(write);
        } else {
            pair.sender.write(write).unwrap();
        }
        while ours.is_empty() || theirs.is_empty() {
            pair.poll_into(&mut ours, &mut theirs);
        }
        match (ours.pop(), theirs.pop()) {
            (Some(Completion::Op { result: Ok(_), .. }), Some(Completion::Immediate { .. })) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(ALLOCATIONS.get() - before, 0);
}
