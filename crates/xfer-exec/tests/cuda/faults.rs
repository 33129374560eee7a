//! What a rail does with what goes wrong: every WRITE that was posted comes back once, as done or as unfinished; a buffer comes
//! back only when nobody reads it; and after a failure that harms nothing the rail goes on.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use gpu_mem::{Cuda, DeviceBuffer, inject};
use weight_ops::cuda::DeviceRange;
use xfer_exec::arrivals::Arrivals;
use xfer_exec::cuda::{CudaPeer, CudaRail, DeviceRegion, expose};
use xfer_exec::program::WriteId;
use xfer_exec::{Done, Rail, Rows};

use crate::gpu::{Gpu, Random, gpus};
use crate::{LONG, Planned, SOON, TO, Write, push, rail};

/// Something invalid, which harms nothing but the call.
const REFUSED: i32 = 1;
/// An access to no memory: nothing of the device works any more.
const LOST: i32 = 700;

/// A sender and a receiver in this process, on a handle of their own on the device: what one test breaks stays its own.
struct Bed {
    gpu: Gpu,
    source: Arc<DeviceBuffer>,
    bytes: Vec<u8>,
    received: DeviceRange,
    arrivals: Arrivals,
    rail: Box<CudaRail>,
}

const BYTES: u64 = 2 * LONG;

fn bed() -> Option<Bed> {
    gpus()?;
    let gpu = Gpu::on(&Cuda::open().unwrap().device(0).unwrap());
    let bytes = Random(3).bytes(BYTES as usize);
    let source = Arc::new(gpu.device.alloc(BYTES).unwrap());
    gpu.write(&DeviceRange::whole(&source), &bytes);
    let buffer = Arc::new(gpu.device.alloc_vmm(BYTES, BYTES).unwrap());
    let (doorman, arrivals) = expose(vec![DeviceRegion::mapped(&buffer).unwrap()]).unwrap();
    let opened = CudaPeer::open(&gpu.device, doorman.address(), &[BYTES], SOON).unwrap();
    let received = DeviceRange::whole(&buffer);
    gpu.write(&received, &vec![0; BYTES as usize]);
    let rail = Box::new(rail(&gpu, opened));
    Some(Bed { gpu, source, bytes, received, arrivals, rail })
}

impl Bed {
    /// One WRITE of each way: a span, rows, and what the copy engine takes. They overlap nowhere.
    fn writes(&self, number: u32) -> Vec<Write> {
        let rows = |count, bytes, stride| Rows { count, bytes, stride };
        let shapes = [
            (rows(1, 5000, 5000), 17),
            (rows(40, 30, 100), 6000),
            (rows(1, LONG as u32, LONG), 10_000),
            (rows(2, 700, 9000), LONG + 20_000),
        ];
        let source = DeviceRange::whole(&self.source);
        let write = |(index, (rows, offset)): (usize, (Rows, u64))| {
            Planned { from: offset, rows, region: 0, offset }.write(number + index as u32, &source)
        };
        shapes.into_iter().enumerate().map(write).collect()
    }

    fn arrived(&self) {
        let mut expected = vec![0; BYTES as usize];
        for write in self.writes(0) {
            let at = write.offset;
            let planned = Planned { from: at, rows: write.rows, region: 0, offset: at };
            let mut regions = [expected];
            planned.apply(&self.bytes, &mut regions);
            [expected] = regions;
        }
        assert!(self.gpu.download(&self.received) == expected, "bytes differ");
    }
}

fn ids(writes: &[Write]) -> BTreeSet<WriteId> {
    writes.iter().map(|write| write.id).collect()
}

#[test]
fn whatever_fails_every_write_comes_back_once_and_no_buffer_too_early() {
    let calls = [
        "cuMemcpyHtoDAsync_v2",
        "cuStreamWaitEvent",
        "cuLaunchKernel",
        "cuMemcpyDtoDAsync_v2",
        "cuEventCreate",
        "cuEventRecord",
        "cuEventQuery",
    ];
    let mut met = 0;
    for (call, code) in calls.into_iter().flat_map(|call| [(call, REFUSED), (call, LOST)]) {
        // Later queries are about what is over already.
        for skip in 0..if call == "cuEventQuery" { 1 } else { 4 } {
            let Some(mut bed) = bed() else { return };
            let posted = bed.writes(0);
            let expected = ids(&posted);
            let free = Arc::strong_count(&bed.source);
            let mut outbox: VecDeque<Write> = posted.into();
            inject::fail(call, skip, code);
            let mut done: Vec<Done<DeviceRange>> = Vec::new();
            let mut ended = bed.rail.post(&mut outbox).is_err();
            assert!(outbox.is_empty(), "{call}: there was room");
            while !ended && done.len() < expected.len() {
                ended = bed.rail.poll(&mut done).is_err();
            }
            let hit = inject::clear() == 0;
            met += usize::from(hit);
            let failed = done.iter().filter(|done| done.result.is_err()).count();
            assert!(ended == (hit && code == LOST) || call == "cuEventQuery", "{call} {code} {skip}");
            assert!(!hit || ended || failed > 0, "{call} {code} {skip}: nobody was told");
            let mut seen: BTreeSet<WriteId> = done.iter().map(|done| done.id).collect();
            if ended {
                assert!(bed.rail.post(&mut bed.writes(9).into()).is_err(), "{call}: it takes no more");
                let mut unfinished = Vec::new();
                let lost = code == LOST;
                assert_eq!(bed.rail.close(&mut unfinished).is_err(), lost, "{call} {skip}");
                assert_eq!(unfinished.len() + done.len(), expected.len(), "{call} {skip}");
                seen.extend(unfinished);
                done.clear();
                assert_eq!(Arc::strong_count(&bed.source) > free - 4, lost, "{call}: leaked, not freed");
            } else {
                assert_eq!(done.len(), expected.len());
                done.clear();
                let again = bed.writes(0);
                for done in push(&mut bed.rail, again, &mut Random(1)) {
                    done.result.unwrap();
                }
                bed.arrived();
                bed.rail.close(&mut Vec::new()).unwrap();
                assert_eq!(Arc::strong_count(&bed.source), 1, "{call}: nobody holds what has come back");
            }
            assert_eq!(seen, expected, "{call} {code} {skip}");
            if !hit {
                break;
            }
        }
    }
    assert!(met > 20, "only {met} failures were met");
}

#[test]
fn a_batch_holds_its_buffers_until_it_is_over() {
    let Some(mut bed) = bed() else { return };
    let mut outbox: VecDeque<Write> = bed.writes(0).into();
    let expected = outbox.len();
    bed.rail.post(&mut outbox).unwrap();
    assert!(Arc::strong_count(&bed.source) > expected, "the rail holds a part of it for each WRITE");
    let mut done = Vec::new();
    while done.len() < expected {
        assert!(done.is_empty(), "a batch is over as a whole");
        bed.rail.poll(&mut done).unwrap();
    }
    bed.arrived();
    drop(done);
    assert_eq!(Arc::strong_count(&bed.source), 1);
}

#[test]
fn a_rail_that_is_closed_says_what_was_in_flight_and_holds_nothing() {
    let Some(mut bed) = bed() else { return };
    let posted = bed.writes(0);
    let expected = ids(&posted);
    bed.rail.post(&mut posted.into()).unwrap();
    let mut unfinished = Vec::new();
    bed.rail.close(&mut unfinished).unwrap();
    assert_eq!(unfinished.into_iter().collect::<BTreeSet<_>>(), expected);
    assert_eq!(Arc::strong_count(&bed.source), 1);
}

#[test]
fn no_more_is_taken_than_there_is_room_for_and_the_rest_keeps_its_order() {
    let Some(mut bed) = bed() else { return };
    let limits = bed.rail.limits();
    let source = DeviceRange::whole(&bed.source);
    let planned = |number: u32| {
        let offset = u64::from(number);
        Planned { from: offset, rows: Rows::one(1), region: 0, offset }.write(number, &source)
    };
    let count = limits.depth + 100;
    let mut outbox: VecDeque<Write> = (0..count).map(planned).collect();
    bed.rail.post(&mut outbox).unwrap();
    assert_eq!(outbox.len(), 100);
    assert!(outbox.iter().map(|write| write.id.op).eq(limits.depth..count));
    let mut done = Vec::new();
    while done.len() < count as usize {
        bed.rail.poll(&mut done).unwrap();
        bed.rail.post(&mut outbox).unwrap();
    }
    assert!(done.iter().map(|done| done.id.op).eq(0..count), "events are asked in order");
    let received = bed.gpu.download(&bed.received.part(0..u64::from(count)).unwrap());
    assert!(received == bed.bytes[..count as usize]);
}

#[test]
fn a_write_outside_fails_alone() {
    let Some(mut bed) = bed() else { return };
    let mut writes = bed.writes(0);
    let good = writes.len();
    let with = |change: &dyn Fn(&mut Write)| {
        let mut write = bed.writes(100).remove(0);
        change(&mut write);
        write
    };
    let wrong = [
        with(&|write| write.offset = BYTES - 4999),
        with(&|write| write.offset = u64::MAX),
        with(&|write| write.region = xfer_plan::RegionIndex(1)),
        with(&|write| write.to = xfer_plan::ReceiverRank(TO.0 + 1)),
        with(&|write| write.from = write.from.part(0..4999).unwrap()),
        with(&|write| write.rows = Rows { count: 2, bytes: 2500, stride: 2501 }),
        with(&|write| write.rows = Rows { count: u32::MAX, bytes: u32::MAX, stride: u64::MAX }),
        with(&|write| write.rows = Rows { count: 3, bytes: 1, stride: u64::MAX / 2 }),
    ];
    let bad = wrong.len();
    for (at, write) in wrong.into_iter().enumerate() {
        writes.insert(at % 3, write);
    }
    let mut outbox: VecDeque<Write> = writes.into();
    bed.rail.post(&mut outbox).unwrap();
    let mut done = Vec::new();
    while done.len() < good + bad {
        bed.rail.poll(&mut done).unwrap();
    }
    assert_eq!(done.iter().filter(|done| done.result.is_err()).count(), bad);
    assert!(done.iter().all(|done| done.result.is_err() == (done.id.op >= 100)));
    bed.arrived();
}

#[test]
fn a_receiver_is_told_of_every_tag_once_and_holds_back_only_what_it_does_not_hear() {
    let Some(mut bed) = bed() else { return };
    let source = DeviceRange::whole(&bed.source);
    // Every third has no tag.
    let tag_of = |number: u32| if number.is_multiple_of(3) { xfer_plan::NO_TAG } else { number / 3 };
    let write = |number: u32| {
        let offset = u64::from(number % 1000);
        let mut write =
            Planned { from: offset, rows: Rows::one(1), region: 0, offset }.write(number, &source);
        write.tag = tag_of(number);
        write
    };
    // Far more than its socket holds.
    let count = 200_000;
    let (mut next, mut outbox) = (0, VecDeque::new());
    let (mut done, mut tags) = (Vec::new(), Vec::new());
    let mut stuck = 0;
    while done.len() < count as usize {
        let depth = bed.rail.limits().depth as usize;
        while next < count && (next as usize - done.len()) < depth {
            outbox.push_back(write(next));
            next += 1;
        }
        bed.rail.post(&mut outbox).unwrap();
        let before = done.len();
        bed.rail.poll(&mut done).unwrap();
        stuck = if done.len() == before { stuck + 1 } else { 0 };
        // Listens only when nothing moves.
        if stuck > 100 {
            bed.arrivals.poll(&mut tags).unwrap();
        }
    }
    bed.arrivals.poll(&mut tags).unwrap();
    assert!(done.iter().all(|done| done.result.is_ok()));
    assert!(tags.into_iter().eq((0..count).map(tag_of).filter(|tag| *tag != xfer_plan::NO_TAG)));

    drop(bed.arrivals);
    bed.rail.post(&mut [write(0), write(1), write(2), write(3)].into()).unwrap();
    done.clear();
    while done.len() < 4 {
        bed.rail.poll(&mut done).unwrap();
    }
    let failed: Vec<u32> = done.iter().filter(|done| done.result.is_err()).map(|done| done.id.op).collect();
    assert_eq!(failed, [1, 2], "who hears nothing has not been told, and the others have arrived");
}
