//! A rail of libfabric that reads and writes memory which this process does not touch itself; a memory file stands in for a GPU's.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use efa_core::{DeviceRef, DeviceSlice, Hints, Interface, LeaseMut, Library, MemoryFile, RailConfig};
use xfer_exec::ofi::{OfiPeer, OfiRail, OfiTarget};
use xfer_exec::{Done, Rail, RailWrite, Rows, WriteId};
use xfer_plan::{NO_TAG, ReceiverRank, RegionIndex};

const LEN: usize = 1 << 20;
const ROW: usize = 700;
const DEADLINE: Duration = Duration::from_secs(20);
const TO: ReceiverRank = ReceiverRank(0);

/// Memory, and a way to see it.
fn memory() -> (DeviceRef, OwnedFd) {
    let file = MemoryFile::new(4096, LEN, Interface::Host, true).unwrap();
    let peek = file.peek().unwrap();
    (DeviceRef::new(file), peek)
}

fn open(library: &Library) -> efa_core::Rail {
    let hints = Hints::new(library.tcp_provider()).source([127, 0, 0, 1].into());
    let info = library.infos(&hints).unwrap().swap_remove(0);
    efa_core::Rail::open(&info, &RailConfig::for_info(&info)).unwrap()
}

fn write(number: u32, from: DeviceSlice, at: usize) -> RailWrite<DeviceSlice> {
    let (rows, offset) = (Rows::one(from.len() as u32), at as u64);
    RailWrite {
        id: WriteId { op: number, row: 0 },
        from,
        rows,
        to: TO,
        region: RegionIndex(0),
        offset,
        tag: NO_TAG,
    }
}

#[test]
fn rows_change_places_and_buffers_come_back() {
    let library = match Library::open() {
        Ok(library) => library,
        Err(error) => {
            assert!(std::env::var_os("LIBFABRIC_SO").is_none(), "{error}");
            return println!("skipped: {error}");
        }
    };
    let ((source, from), (late, from_late), (target, to)) = (memory(), memory(), memory());
    let bytes: Vec<u8> = (0..LEN).map(|at| ((at * 31) >> 3) as u8 ^ at as u8).collect();
    rustix::io::pwrite(&from, &bytes, 4096).unwrap();
    rustix::io::pwrite(&from_late, &bytes, 4096).unwrap();
    let mut receiver = open(&library);
    let (_, region) = receiver.expose_device(&target).unwrap();
    let scratch = LeaseMut::zeroed(4096).unwrap().expose();
    let (_, scratch) = receiver.expose(&scratch).unwrap();
    let address = receiver.address().clone();
    let peer = OfiPeer { address, regions: vec![region], scratch };
    let target_thread = OfiTarget::start(vec![receiver], Vec::new()).unwrap();
    let rail = OfiRail::connect(
        open(&library),
        std::slice::from_ref(&source),
        BTreeMap::from([(TO, peer)]),
        DEADLINE,
    );
    let mut rail: OfiRail<DeviceSlice> = rail.unwrap();

    // Row `n` goes to where the last but `n` is; every third comes from memory that was registered later.
    rail.register(&late).unwrap();
    let rows = LEN / ROW;
    let source_of = |row: usize| if row.is_multiple_of(3) { &late } else { &source };
    let slice = |row: usize| source_of(row).slice(row * ROW, ROW).unwrap();
    let mut writes: VecDeque<_> =
        (0..rows).map(|row| write(row as u32, slice(row), (rows - 1 - row) * ROW)).collect();
    let (mut done, mut over): (Vec<Done<DeviceSlice>>, BTreeSet<u32>) = Default::default();
    let began = Instant::now();
    while over.len() < rows {
        assert!(began.elapsed() < DEADLINE, "{} of {rows}", over.len());
        rail.post(&mut writes).unwrap();
        rail.poll(&mut done).unwrap();
        for Done { id, from, result } in done.drain(..) {
            result.unwrap();
            assert!(from.memory().ptr_eq(source_of(id.op as usize)) && from.len() == ROW);
            assert!(over.insert(id.op), "twice");
        }
    }
    let mut found = vec![0; LEN];
    rustix::io::pread(&to, &mut found, 4096).unwrap();
    for row in 0..rows {
        let (there, here) = ((rows - 1 - row) * ROW, row * ROW);
        assert!(found[there..there + ROW] == bytes[here..here + ROW], "row {row}");
    }
    assert!(found[rows * ROW..].iter().all(|byte| *byte == 0), "nothing else was written");

    // Only a WRITE of memory that is not registered is refused, and what stood before it is not.
    let (stranger, _) = memory();
    let mut writes = VecDeque::from([write(0, slice(0), 0), write(1, stranger.slice(0, ROW).unwrap(), 0)]);
    let error = rail.post(&mut writes).unwrap_err();
    assert!(error.reason.contains("not registered") && writes.len() == 1, "{error}");
    Box::new(rail).close(&mut Vec::new()).unwrap();
    drop(target_thread);
}
