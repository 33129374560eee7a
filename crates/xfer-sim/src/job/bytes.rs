//! What every byte is, and whether that is right: the oracle of a simulated push.
//!
//! A byte is named by where it comes from, by a *stamp*: the version, and a hash of the source byte that it is made of. What a
//! receiver should have follows from the plan's transfers and groups alone; nothing here knows operations' order, tags or relays
//! but by what it sees written.

use xfer_exec::engine::Slot;
use xfer_exec::{Rows, Source};
use xfer_plan::{Manifest, Op, ParamId, Plan, Strided, Transform};

use super::rank::{Half, SimRank};
use super::wire::Carried;

/// Version in the upper 16 bits, origin in the lower 48. 0: what was there at the start.
pub(super) type Stamp = u64;

const ORIGIN_BITS: u32 = 48;

/// The version of memory that has been given back.
const FREED: u64 = 0xffff;

fn stamp(version: u64, origin: u64) -> Stamp {
    version << ORIGIN_BITS | origin
}

fn with_version(stamp: Stamp, version: u64) -> Stamp {
    version << ORIGIN_BITS | stamp & ((1 << ORIGIN_BITS) - 1)
}

/// A rank's or a region's stamps.
type Region = Vec<Stamp>;

/// See the module.
pub(super) struct Bytes {
    trainers: u32,
    watermark_bytes: u64,
    /// By trainer, the version of its weights.
    versions: Vec<u64>,
    /// By rank, by slot.
    slots: Vec<Vec<Region>>,
    /// By rank, the operation that each slot is being filled for.
    filling: Vec<Vec<Option<u32>>>,
    /// By receiver.
    memory: Vec<Vec<Region>>,
    expected: Vec<Vec<Region>>,
    /// WRITEs of the present push that put each byte there.
    counts: Vec<Vec<Vec<u8>>>,
    /// [`super::sabotage::Sabotage::WrongSlot`].
    pub(super) fills_wrong_slot: bool,
}

impl Bytes {
    pub(super) fn new(plan: &Plan, manifest: &Manifest) -> Bytes {
        let regions = |receiver: &xfer_plan::ReceiverManifest| -> Vec<Region> {
            receiver.regions.iter().map(|bytes| vec![0; *bytes as usize]).collect()
        };
        let memory: Vec<Vec<Region>> = manifest.receivers.iter().map(regions).collect();
        let mut expected = memory.clone();
        for placed in plan.transfers() {
            let transfer = placed.transfer;
            let members = plan.group(placed.to).into_iter().flat_map(|group| group.members());
            for member in members {
                for row in 0..u64::from(transfer.rows) {
                    for column in 0..transfer.row_bytes {
                        let origin = origin(
                            transfer.trainer.0,
                            placed.param,
                            transfer.transform,
                            transfer.source,
                            row,
                            column,
                        );
                        let at = transfer.destination.offset + row * transfer.destination.stride + column;
                        expected[member.index()][transfer.destination.region.index()][at as usize] = origin;
                    }
                }
            }
        }
        let counts = memory
            .iter()
            .map(|regions| regions.iter().map(|region| vec![0; region.len()]).collect())
            .collect();
        let ranks = manifest.trainers.len() + manifest.receivers.len();
        Bytes {
            trainers: manifest.trainers.len() as u32,
            watermark_bytes: manifest.options.watermark_bytes,
            versions: vec![0; manifest.trainers.len()],
            slots: vec![Vec::new(); ranks],
            filling: vec![Vec::new(); ranks],
            memory,
            expected,
            counts,
            fills_wrong_slot: false,
        }
    }

    /// A trainer's weights are those of this version now.
    pub(super) fn set_version(&mut self, trainer: u32, version: u64) {
        if let Some(of) = self.versions.get_mut(trainer as usize) {
            *of = version;
        }
    }

    /// A trainer's memory is somebody else's now.
    pub(super) fn free(&mut self, trainer: u32) {
        self.set_version(trainer, FREED);
    }

    /// A receiver begins a push.
    pub(super) fn prepare(&mut self, rank: u32) {
        let receiver = (rank - self.trainers) as usize;
        self.counts[receiver].iter_mut().for_each(|region| region.fill(0));
    }

    // --- slots ---------------------------------------------------------------------------------------------------

    /// A slot begins to be filled: by nobody else, and within the watermark.
    pub(super) fn staging(&mut self, rank: u32, slot: Slot, index: u32, op: &Op) -> Result<(), String> {
        let slots = &mut self.filling[rank as usize];
        let at = slot.0 as usize;
        let (bytes, watermark_bytes) =
            (op.staged_bytes().saturating_mul(at as u64 + 1), self.watermark_bytes);
        if bytes > watermark_bytes {
            return Err(format!(
                "slot {at} of rank {rank} lies beyond the watermark of {watermark_bytes} bytes"
            ));
        }
        if slots.len() <= at {
            slots.resize(at + 1, None);
        }
        match slots[at].replace(index) {
            None => Ok(()),
            Some(other) => Err(format!("slot {at} is filled for operation {index} while it is for {other}")),
        }
    }

    pub(super) fn staged(&mut self, rank: u32, slot: Slot, ops: &[Op]) {
        let index = self.filling[rank as usize].get_mut(slot.0 as usize).and_then(Option::take);
        let Some(op) = index.and_then(|index| ops.get(index as usize)) else { return };
        let version = self.versions.get(rank as usize).copied().unwrap_or(0);
        let stamps = (0..u64::from(op.rows)).flat_map(|row| {
            (0..u64::from(op.row_bytes)).map(move |column| {
                stamp(version, origin(rank, op.param, op.transform, op.source, row, column))
            })
        });
        let stamps = stamps.collect();
        let at = slot.0 as usize + usize::from(self.fills_wrong_slot && slot.0 % 2 == 1);
        let slots = &mut self.slots[rank as usize];
        if slots.len() <= at {
            slots.resize(at + 1, Vec::new());
        }
        slots[at] = stamps;
    }

    // --- flights -------------------------------------------------------------------------------------------------

    /// What the buffer of a rank's WRITE holds at this moment.
    pub(super) fn read(&self, from: u32, write: &Carried, ops: &[Op]) -> Result<Vec<Stamp>, String> {
        let Rows { count, bytes, stride } = write.rows;
        let (count, bytes) = (u64::from(count), u64::from(bytes));
        let outside = || format!("a write of rank {from} reads outside its memory");
        let own = from.checked_sub(self.trainers).map(|receiver| receiver as usize);
        let gathered = |region: &Region, start: u64| -> Option<Vec<Stamp>> {
            let row = |row: u64| {
                let at = (start + row * stride) as usize;
                region.get(at..at + bytes as usize)
            };
            (0..count).map(row).collect::<Option<Vec<_>>>().map(|rows| rows.concat())
        };
        match (write.source, own) {
            (Source::Slot(slot, offset), _) => {
                let region = self.slots[from as usize].get(slot.0 as usize).ok_or_else(outside)?;
                gathered(region, offset).ok_or_else(outside)
            }
            // A receiver passes on what it has.
            (Source::Region(region, offset), Some(receiver)) => {
                let region = self.memory[receiver].get(region.index()).ok_or_else(outside)?;
                gathered(region, offset).ok_or_else(outside)
            }
            (Source::Region(region, offset), None) => {
                let op = ops.get(write.id.op as usize).ok_or_else(outside)?;
                let version = self.versions[from as usize];
                let source = Strided { region, offset, stride };
                let stamps = (0..count).flat_map(|row| {
                    (0..bytes).map(move |column| {
                        stamp(version, origin(from, op.param, op.transform, source, row, column))
                    })
                });
                Ok(stamps.collect())
            }
        }
    }

    /// The bytes of a WRITE are in a receiver's memory.
    pub(super) fn write(
        &mut self,
        (to, receiver): (u32, &SimRank),
        write: &Carried,
        stamps: &[Stamp],
    ) -> Result<(), String> {
        let at = (to - self.trainers) as usize;
        let range = write.offset as usize..write.offset as usize + stamps.len();
        let region = self.memory[at].get_mut(write.region.index());
        let Some(target) = region.and_then(|region| region.get_mut(range)) else {
            return Err(format!("a write to {} leaves its region", receiver.rank));
        };
        let changes = target != stamps;
        target.copy_from_slice(stamps);
        match &receiver.half {
            Half::Receiver(member) if changes && receiver.is_in() => match member.served() {
                rendezvous::member::Served::Version(version) => {
                    Err(format!("{} serves version {version}, and a byte of it changes", receiver.rank))
                }
                rendezvous::member::Served::Torn(_) | rendezvous::member::Served::Behind(_) => Ok(()),
            },
            _ => Ok(()),
        }
    }

    /// A WRITE counts for the push of its sender (`true`), or does not after all.
    pub(super) fn count(&mut self, to: u32, write: &Carried, counts: bool) {
        let at = (to - self.trainers) as usize;
        let start = write.offset as usize;
        let range = start..start + write.rows.total_bytes() as usize;
        let region = self.counts[at].get_mut(write.region.index());
        for count in region.and_then(|region| region.get_mut(range)).into_iter().flatten() {
            *count = if counts { count.saturating_add(1) } else { count.saturating_sub(1) };
        }
    }

    // --- what must hold ------------------------------------------------------------------------------------------

    /// A receiver's memory is this version, whole, each byte written once.
    pub(super) fn check(&self, rank: u32, version: u64) -> Result<(), String> {
        let receiver = (rank - self.trainers) as usize;
        for (region, expected) in self.expected[receiver].iter().enumerate() {
            for (at, &origin) in expected.iter().enumerate().filter(|(_, origin)| **origin != 0) {
                let found = self.memory[receiver][region][at];
                if found != with_version(origin, version) {
                    let found = found >> ORIGIN_BITS;
                    return Err(format!(
                        "inference {receiver} has another byte than version {version}'s at {at} of region {region}: \
                         it is of version {found}"
                    ));
                }
                let count = self.counts[receiver][region][at];
                if count != 1 {
                    return Err(format!(
                        "byte {at} of region {region} of inference {receiver} was written {count} times"
                    ));
                }
            }
        }
        Ok(())
    }

    /// So it is for every receiver.
    pub(super) fn check_all(&self, version: u64) -> Result<(), String> {
        (0..self.expected.len() as u32).try_for_each(|receiver| self.check(self.trainers + receiver, version))
    }
}

/// Names the source byte that a byte is made of. Where elements change their size, the first byte of the source element, and
/// which byte of the new element.
fn origin(rank: u32, param: ParamId, transform: Transform, source: Strided, row: u64, column: u64) -> u64 {
    let (kind, width) = match transform {
        Transform::Copy => (0, 1),
        Transform::Cast { to, .. } => (1, to.bytes()),
        Transform::Quantize { .. } => (2, 1),
        Transform::Scales { .. } => (3, 1),
    };
    // Scales come from a table that the operation and the transfer number differently.
    let region = if kind == 3 { 0 } else { u64::from(source.region.0) };
    let element = source.offset + row * source.stride + transform.source_bytes(column - column % width);
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for word in [rank.into(), u64::from(param.0), kind, region, element, column % width] {
        hash = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash ^= hash >> 29;
    }
    // 0 is nothing.
    (hash & ((1 << ORIGIN_BITS) - 1)).max(1)
}
