//! The memory of an inference rank: which attempt's bytes are where, in two arenas, one of which is served.

use rendezvous::{Bank, Checksum, PushId};
use xfer_plan::{Inbound, Op};

use crate::job::ARENA_BYTES;

/// What is in a byte: of which attempt, and for which place.
pub(crate) type Cell = Option<(PushId, usize)>;

/// A rank that does not stage has the first arena alone.
#[derive(Clone)]
pub(crate) struct Memory {
    pub(crate) stages: bool,
    arenas: [[Cell; ARENA_BYTES]; 2],
    /// Which one is served.
    front: usize,
    named: [usize; 2],
    /// Which one the present attempt is written to.
    into: usize,
}

impl Memory {
    pub(crate) fn new(stages: bool) -> Self {
        Self { stages, arenas: [[None; ARENA_BYTES]; 2], front: 0, named: [0; 2], into: 0 }
    }

    /// Its arenas as an endpoint names them.
    pub(crate) fn name(&mut self) -> [usize; 2] {
        self.named = if self.stages { [1 - self.front, self.front] } else { [0, 0] };
        self.named
    }

    /// An attempt is written to the arena of this bank.
    pub(crate) fn prepare(&mut self, own: Bank) {
        self.into = self.named[own.index()];
        assert!(!self.stages || self.into != self.front, "it is to write into what it serves");
    }

    /// The attempt is served.
    pub(crate) fn commit(&mut self) {
        self.front = self.into;
    }

    pub(crate) fn served(&self) -> &[Cell] {
        &self.arenas[self.front]
    }

    pub(crate) fn written(&self) -> &[Cell] {
        &self.arenas[self.into]
    }

    pub(crate) fn write(&mut self, arena: usize, bytes: &[(usize, Cell)]) {
        assert!(!self.stages || arena != self.front, "written into what is served");
        for (place, cell) in bytes {
            self.arenas[arena][*place] = *cell;
        }
    }

    /// What an inference rank passes on by `op`.
    pub(crate) fn read(&self, op: &Op) -> Vec<(usize, Cell)> {
        places(&Inbound::from(op)).map(|place| (place, self.arenas[self.into][place])).collect()
    }

    /// The hash of what arrives by one operation.
    pub(crate) fn sum(&self, inbound: &Inbound) -> Checksum {
        sum(&places(inbound).map(|place| (place, self.arenas[self.into][place])).collect::<Vec<_>>())
    }

    /// A byte that was written becomes another.
    pub(crate) fn flip(&mut self) {
        if let Some(cell) = self.arenas[self.into].iter_mut().flatten().next() {
            cell.0 = PushId([0; 16]);
        }
    }
}

/// Whether all of it is of `push`, each byte at its place.
pub(crate) fn is_whole(cells: &[Cell], push: PushId) -> bool {
    cells.iter().enumerate().all(|(place, cell)| *cell == Some((push, place)))
}

/// What a trainer sends by `op`.
pub(crate) fn sent(op: &Op, push: PushId) -> Vec<(usize, Cell)> {
    places(&Inbound::from(op)).map(|place| (place, Some((push, place)))).collect()
}

/// Stands for the hash of these bytes.
pub(crate) fn sum(bytes: &[(usize, Cell)]) -> Checksum {
    let mut sum = Checksum::default();
    for (at, cell) in bytes {
        let (push, place) = cell.map_or((0, 0), |(push, place)| (u128::from_le_bytes(push.0), place));
        sum.add((push ^ (*at as u128) << 64 ^ (place as u128) << 96).into());
    }
    sum
}

fn places(inbound: &Inbound) -> impl Iterator<Item = usize> {
    let (first, stride, bytes) = (inbound.destination.offset, inbound.destination.stride, inbound.row_bytes);
    let rows = u64::from(inbound.rows);
    (0..rows)
        .flat_map(move |row| (0..u64::from(bytes)).map(move |byte| (first + row * stride + byte) as usize))
}
