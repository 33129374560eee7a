//! Copies move the bytes that were asked for, and no others; buffers come back whatever happens.

mod common;

use std::sync::Arc;

use common::{device, devices, on_device, pattern, pinned, read, read_shared, write};
use gpu_mem::{DeviceMemory, Error, HostMemory, Rows, Span};
use proptest::collection::vec;
use proptest::prelude::*;

const LEN: usize = 5000;

/// Spans inside `LEN` bytes on both sides, whose destinations do not overlap.
fn spans() -> impl Strategy<Value = Vec<Span>> {
    vec((0..300_usize, 0..300_usize, 0..LEN), 0..12).prop_map(|parts| {
        let mut to = 0;
        let mut spans = Vec::new();
        for (gap, len, from) in parts {
            to += gap;
            let len = len.min(LEN - from);
            spans.push(Span { from: from as u64, to: to as u64, len: len as u64 });
            to += len;
        }
        // At most 12 times 600 bytes: what does not fit is left out.
        spans.retain(|span| span.to + span.len <= LEN as u64);
        spans
    })
}

fn moved(from: &[u8], to: &mut [u8], spans: &[Span]) {
    for span in spans {
        let [from_start, to_start, len] = [span.from, span.to, span.len].map(|part| part as usize);
        to[to_start..to_start + len].copy_from_slice(&from[from_start..from_start + len]);
    }
}

#[test]
fn rows_are_copied_one_after_another_and_nothing_else() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let config = ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() };
    let rows = (0..600_u64, 0..600_u64, 0..40_u64, 0..90_u64, 0..40_u64);
    proptest!(config, |((from, to, count, bytes, gap) in rows)| {
        let (source, mut expected) = (pattern(LEN, 5), pattern(LEN, 6));
        let stride = bytes + gap;
        let spans: Vec<Span> =
            (0..count).map(|row| Span { from: from + row * stride, to: to + row * bytes, len: bytes }).collect();
        let fits = bytes == 0 || spans.iter().all(|span| span.from.max(span.to) + bytes <= LEN as u64);
        let (host, memory) = (pinned(&device, &source), on_device(&stream, &expected));
        let memory = match stream.copy_rows_to_device(host, memory, Rows { from, to, count, bytes, stride }) {
            Ok(copy) => {
                prop_assert!(fits);
                moved(&source, &mut expected, if bytes == 0 { &[] } else { &spans });
                copy.wait().unwrap().1
            }
            Err(failed) => {
                prop_assert!(!fits && matches!(failed.error, Error::Range { .. }), "{failed}");
                failed.returned.unwrap().1
            }
        };
        prop_assert_eq!(read(&stream, memory).1, expected);
    });
    let overlapping = Rows { from: 0, to: 0, count: 2, bytes: 5, stride: 4 };
    let (host, memory) = (pinned(&device, &[0; 100]), on_device(&stream, &[0; 100]));
    let failed = stream.copy_rows_to_device(host, memory, overlapping).unwrap_err();
    assert!(matches!(failed.error, Error::Range { .. }), "{failed}");
}

#[test]
fn page_locked_memory_is_told_from_other() {
    let Some(device) = device() else { return };
    assert!(device.is_page_locked(&pinned(&device, &[1; 5000])).unwrap());
    let registered = device.register_host(vec![1_u8; 9000]).unwrap();
    assert!(device.is_page_locked(&registered).unwrap());
    assert!(!device.is_page_locked(&registered.unregister().unwrap()).unwrap());
    assert!(!device.is_page_locked(&vec![1_u8; 5000]).unwrap());
}

#[test]
fn every_kind_of_copy_moves_the_spans_and_nothing_else() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let config = ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(first in spans(), second in spans(), third in spans())| {
        let [mut a, mut b, mut c] = [1, 2, 3].map(|seed| pattern(LEN, seed));
        let source = pattern(LEN, 4);
        let host = pinned(&device, &source);
        let (on_a, on_b) = (on_device(&stream, &a), on_device(&stream, &b));
        let back = pinned(&device, &c);

        // Put on the stream one behind the other, without a wait between.
        let to_device = stream.copy_to_device(host, on_a, &first).unwrap();
        let (_, on_a) = to_device.wait().unwrap();
        let between = stream.copy(on_a, on_b, &second).unwrap();
        let (on_a, on_b) = between.wait().unwrap();
        let to_host = stream.copy_to_host(on_b, back, &third).unwrap();
        prop_assert!(to_host.event().wait().is_ok());
        prop_assert!(to_host.is_done().unwrap());
        let (_, back) = to_host.wait().unwrap();

        moved(&source, &mut a, &first);
        moved(&a, &mut b, &second);
        moved(&b, &mut c, &third);
        prop_assert_eq!(read(&stream, on_a).1, a);
        prop_assert_eq!(back.bytes(), c);
    });
}

#[test]
fn one_source_feeds_many_copies_at_a_time() {
    let Some(device) = device() else { return };
    let source = Arc::new(pinned(&device, &pattern(1 << 20, 7)));
    let target = Arc::new(device.alloc(1 << 20).unwrap());
    let streams: Vec<_> = (0..4).map(|_| device.stream().unwrap()).collect();
    let quarter = 1 << 18;
    let pending: Vec<_> = (streams.iter().zip(0..))
        .map(|(stream, index)| {
            let span = Span { from: index * quarter, to: index * quarter, len: quarter };
            stream.copy_to_device(Arc::clone(&source), Arc::clone(&target), &[span]).unwrap()
        })
        .collect();
    for (stream, pending) in streams.iter().zip(&pending) {
        streams[0].wait_for(pending.event()).unwrap();
        assert!(stream.device().same_as(&device));
    }
    assert_eq!(read_shared(&streams[0], &target), source.bytes());
    drop(pending);
}

#[test]
fn what_nobody_waits_for_is_still_copied_and_then_freed() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let bytes = pattern(32 << 20, 9);
    let target = Arc::new(device.alloc(32 << 20).unwrap());
    let dropped =
        stream.copy_to_device(pinned(&device, &bytes), Arc::clone(&target), &[Span::first(32 << 20)]);
    drop(dropped.unwrap());
    stream.synchronize().unwrap();
    assert_eq!(Arc::strong_count(&target), 1, "the stream has let go of it");
    assert!(read_shared(&stream, &target) == bytes);
}

#[test]
fn fresh_page_locked_memory_is_zero_and_empty_buffers_are_fine() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    assert!(device.pinned(100_000).unwrap().bytes().iter().all(|byte| *byte == 0));
    let (host, target) = (device.pinned(0).unwrap(), device.alloc(0).unwrap());
    assert!(host.bytes().is_empty() && target.is_empty() && target.address() == 0);
    let copied = stream.copy_to_device(host, target, &[Span::first(0)]).unwrap();
    let (host, target) = copied.wait().unwrap();
    let filled = stream.fill(target, 1).unwrap().wait().unwrap();
    assert!(stream.copy_to_host(filled, host, &[]).unwrap().wait().is_ok());
}

#[test]
fn fill_sets_every_byte() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let filled = stream.fill(on_device(&stream, &pattern(999, 1)), 0xA5).unwrap().wait().unwrap();
    assert_eq!(read(&stream, filled).1, [0xA5; 999]);
}

#[test]
fn a_span_outside_is_refused_with_both_buffers() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let (host, target) = (pinned(&device, &[1; 100]), on_device(&stream, &[2; 50]));
    let spans = [Span::first(50), Span { from: 60, to: 20, len: 40 }];
    let failed = stream.copy_to_device(host, target, &spans).unwrap_err();
    assert!(matches!(failed.error, Error::Range { offset: 20, len: 40, available: 50 }), "{failed}");
    let (host, target) = failed.returned.unwrap();
    assert_eq!((host.bytes(), read(&stream, target).1), (&[1; 100][..], vec![2; 50]), "nothing was copied");
}

#[test]
fn host_memory_that_exists_is_registered_and_comes_back() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let bytes = pattern(3 << 20, 5);
    let registered = device.register_host(bytes.clone()).unwrap();
    let target = device.alloc(3 << 20).unwrap();
    let copied = stream.copy_to_device(registered, target, &[Span::first(3 << 20)]).unwrap();
    let (mut registered, target) = copied.wait().unwrap();
    registered.bytes_mut().fill(0);
    let copied = stream.copy_to_host(target, registered, &[Span::first(3 << 20)]).unwrap();
    let (_, registered) = copied.wait().unwrap();
    let address = HostMemory::bytes(&registered).as_ptr();
    let back = registered.unregister().unwrap();
    assert!(back == bytes && back.as_ptr() == address);
    // Its pages can be registered again, so they were let go of.
    let again = device.register_host(back).unwrap();
    drop(again);
    assert!(device.register_host(Vec::new()).unwrap().unregister().unwrap().is_empty());
}

#[test]
fn two_devices_copy_with_and_without_access_to_each_other() {
    let Some([first, second]) = devices::<2>() else { return };
    let streams = [first.stream().unwrap(), second.stream().unwrap()];
    let bytes = pattern(4 << 20, 11);
    let spans = [Span { from: 1, to: 3, len: 1 << 20 }, Span { from: 2 << 20, to: 2 << 20, len: 1 << 20 }];
    for enable in [false, true] {
        if enable {
            if !first.can_access(&second).unwrap() {
                println!("skipped: GPU 0 and GPU 1 cannot reach each other");
                return;
            }
            for _ in 0..2 {
                first.enable_access(&second).unwrap();
                second.enable_access(&first).unwrap();
            }
        }
        // The copy may be put on a stream of either side.
        for stream in &streams {
            let from = on_device(&streams[0], &bytes);
            let to = on_device(&streams[1], &vec![0; bytes.len()]);
            let (from, to) = stream.copy(from, to, &spans).unwrap().wait().unwrap();
            let mut expected = vec![0; bytes.len()];
            moved(&bytes, &mut expected, &spans);
            assert!(read(&streams[1], to).1 == expected);
            assert!(read(&streams[0], from).1 == bytes);
        }
    }
}

#[test]
fn memory_of_another_device_is_refused_with_its_name() {
    let Some([first, second]) = devices::<2>() else { return };
    let stream = first.stream().unwrap();
    let there = on_device(&second.stream().unwrap(), &[1; 64]);
    let failed = stream.copy_to_device(pinned(&first, &[2; 64]), there, &[Span::first(64)]).unwrap_err();
    assert!(matches!(failed.error, Error::WrongDevice { .. }), "{failed}");
    assert!(failed.to_string().contains("GPU 1"), "{failed}");
    let (_, there) = failed.returned.unwrap();
    assert!(DeviceMemory::device(&there).same_as(&second));
    let mut event = second.event().unwrap();
    assert!(matches!(event.record(&stream), Err(Error::WrongDevice { .. })));
    stream.wait_for(&event).unwrap();
}

#[test]
fn mapped_memory_is_copied_across_its_chunks() {
    let Some(device) = device() else { return };
    if !device.has_vmm().unwrap() {
        println!("skipped: the device does not map memory separately");
        return;
    }
    let stream = device.stream().unwrap();
    let bytes = pattern((5 << 20) + 123, 3);
    let buffer = device.alloc_vmm(bytes.len() as u64, 1).unwrap();
    assert!(buffer.chunks().count() > 1, "{buffer:?}");
    let buffer = write(&stream, buffer, &bytes);
    assert!(read(&stream, buffer).1 == bytes);
}
