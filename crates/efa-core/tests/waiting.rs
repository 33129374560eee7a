//! Rails in threads of their own, which block instead of spinning.

mod common;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{PATIENCE, bytes_of, info, lease_of, pattern};
use efa_core::{Completion, LeaseMut, Provider, Rail, RailConfig, Write};

/// Each end blocks in its own thread until the other has done something.
fn ends_wait_for_each_other(provider: Provider, blocking_wait: bool) {
    const WRITES: usize = 50;
    const BYTES: usize = 20_000;
    let Some(info) = info(provider) else { return };
    let config = RailConfig { blocking_wait, writes_max: 4, ..RailConfig::for_info(&info) };
    let mut receiver = Rail::open(&info, &config).unwrap();
    let mut sender = Rail::open(&info, &config).unwrap();
    let bytes = pattern(1, WRITES * BYTES);
    let target = LeaseMut::zeroed(WRITES * BYTES).unwrap().expose();
    let (_, remote) = receiver.expose(&target).unwrap();
    let to = sender.insert_peer(receiver.address()).unwrap();
    let (waker, all_ended) = (receiver.waker(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut receiver = receiver;
            let mut seen = Vec::new();
            // Also after the last arrival: the sender's last completion needs both ends to move.
            while !all_ended.load(Ordering::Acquire) {
                receiver.wait(PATIENCE).unwrap();
                receiver.poll(&mut seen).unwrap();
            }
            assert_eq!(seen.len(), WRITES);
            assert!(
                seen.iter().all(|completion| matches!(completion, Completion::Immediate { .. })),
                "{seen:?}"
            );
            assert!(bytes_of(&target) == bytes);
        });
        scope.spawn(|| {
            let mut sender = sender;
            let source = lease_of(&bytes);
            let region = sender.register(source.memory()).unwrap();
            let mut queue: VecDeque<Write> = (0..WRITES)
                .map(|index| Write {
                    from: source.slice(index * BYTES..(index + 1) * BYTES).unwrap(),
                    region,
                    to,
                    remote: remote.at((index * BYTES) as u64, BYTES as u64).unwrap(),
                    immediate: Some(index as u32),
                    delivery_complete: true,
                    token: index as u64,
                })
                .collect();
            let mut seen = Vec::new();
            while seen.len() < WRITES {
                sender.write_batch(&mut queue).unwrap();
                sender.wait(PATIENCE).unwrap();
                sender.poll(&mut seen).unwrap();
            }
            assert!(seen.iter().all(|completion| matches!(completion, Completion::Op { result: Ok(_), .. })));
            all_ended.store(true, Ordering::Release);
            waker.wake();
        });
    });
}

#[test]
fn ends_wait_on_descriptors_over_tcp() {
    ends_wait_for_each_other(Provider::Tcp, true);
}

#[test]
fn ends_wait_on_descriptors_over_tcp_rxm() {
    ends_wait_for_each_other(Provider::TcpRxm, true);
}

#[test]
fn ends_nap_where_there_is_no_descriptor() {
    ends_wait_for_each_other(Provider::Tcp, false);
    ends_wait_for_each_other(Provider::Shm, true);
}

#[test]
fn a_waker_ends_a_wait_from_another_thread() {
    let Some(info) = common::tcp() else { return };
    let mut rail = Rail::open(&info, &RailConfig::for_info(&info)).unwrap();
    let waker = rail.waker();
    let called = Arc::new(AtomicBool::new(false));
    let thread = std::thread::spawn({
        let called = Arc::clone(&called);
        move || {
            called.store(true, Ordering::Release);
            waker.wake();
        }
    });
    // Without the call this lasts until the test runner gives up.
    while !called.load(Ordering::Acquire) {
        rail.wait(Duration::MAX).unwrap();
        rail.poll(&mut Vec::new()).unwrap();
    }
    thread.join().unwrap();
}

#[test]
fn a_call_before_the_wait_is_not_lost() {
    let Some(info) = common::tcp() else { return };
    let mut rail = Rail::open(&info, &RailConfig::for_info(&info)).unwrap();
    // Opening may leave something to do.
    while rail.wait(Duration::ZERO).unwrap() {
        rail.poll(&mut Vec::new()).unwrap();
    }
    rail.waker().wake();
    rail.waker().wake();
    assert!(rail.wait(Duration::MAX).unwrap());
    assert!(!rail.wait(Duration::ZERO).unwrap(), "one wait answers all calls before it");
}
