//! WRITEs as batches on a stream.
//!
//! The host's part in a batch is to list its spans. The list travels to the GPU while earlier batches are copied, so the link
//! is busy as long as there is something to post. A batch holds its buffers until its event has passed.

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use gpu_mem::{DeviceMemory, Pending, Span, Stream};
use weight_ops::cuda::{BoxCopy, CopyBatch, DeviceRange, Kernels, PendingBatch, Place};
use xfer_plan::ReceiverRank;

use super::CudaError;
use super::region::CudaPeer;
use crate::local::{Arrived, Untold};
use crate::program::WriteId;
use crate::rail::{Armed, Done, Rail, RailError, RailLimits, RailWrite, Rows};

/// From here on the copy engine is as fast as a kernel, and takes no multiprocessor. Measured from one H200 to another over
/// NVLink: 377 GB/s in spans of 8 MiB, against 318 in spans of 1 MiB and 351 by a kernel of 16 blocks.
const ENGINE_BYTES_MIN: u64 = 8 << 20;

/// Bytes of a batch: 0.2 ms at 350 GB/s, ten times what posting it costs the host and the GPU. A single WRITE may be longer.
const BATCH_BYTES_MAX: u64 = 64 << 20;

/// WRITEs of a batch, so that very short ones come back in time to be followed by others.
const BATCH_WRITES_MAX: usize = 1024;

/// The lists of a batch: at most 48 bytes for each 8 KiB, 24 for each span and 80 for each box. Room for them is made in advance,
/// because freeing shorter ones would wait for all work of the GPU.
const LIST_BYTES: u64 = BATCH_BYTES_MAX / (8 << 10) * 48 + BATCH_WRITES_MAX as u64 * 80;

/// Batches in flight: one that is copied, one whose list is there, and two for a host thread that is late by 0.4 ms.
const BATCHES_MAX: usize = 4;

/// How long a refused batch is waited for, so that its buffers come back: its part that is on the stream takes a thousandth.
const SETTLE_MAX: Duration = Duration::from_secs(1);

/// How long a rail takes to close at most; a GPU that is longer at its copies is not going to end them.
const CLOSE_MAX: Duration = Duration::from_secs(10);

/// How a rail copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaRailConfig {
    /// How many of the sending GPU's multiprocessors may be kept busy; the rest are for training. Between two H200 over NVLink 16
    /// reach 321 GB/s in spans of 64 KiB and 261 in spans of 16 KiB, and all 132 reach 370 in both.
    pub multiprocessors: NonZeroU32,
}

impl Default for CudaRailConfig {
    fn default() -> Self {
        Self { multiprocessors: NonZeroU32::MIN.saturating_add(15) }
    }
}

/// A rail to receivers of the same host, from one GPU.
///
/// What a WRITE reads must be there when it is posted: the rail's streams do not wait for anybody else's.
pub struct CudaRail {
    config: CudaRailConfig,
    kernels: Kernels,
    /// In the order in which they were posted, which is the order of their events.
    batches: VecDeque<Batch>,
    /// To be filled again.
    idle: Vec<CopyBatch>,
    untold: Untold<DeviceRange>,
    done: Vec<Done<DeviceRange>>,
    /// WRITEs whose buffers are in use for ever.
    lost: Vec<WriteId>,
    /// Why nothing works any more.
    failed: Option<String>,
    peers: BTreeMap<ReceiverRank, CudaPeer>,
    uploads: Stream,
    copies: Stream,
}

/// WRITEs that are copied. Its parts are over in the order of their fields.
struct Batch {
    ids: Vec<WriteId>,
    kernels: PendingBatch,
    _engine: Vec<Pending<(DeviceRange, DeviceRange)>>,
    writes: Pending<Vec<Arrived<DeviceRange>>>,
}

/// A batch that is being put together.
struct Draft {
    list: CopyBatch,
    engine: Vec<(DeviceRange, DeviceRange, Vec<Span>)>,
    /// Which will have arrived when the batch is over.
    writes: Vec<Arrived<DeviceRange>>,
    bytes: u64,
}

impl CudaRail {
    /// A rail from the GPU of these kernels to these receivers, which were opened for that GPU.
    ///
    /// # Errors
    ///
    /// When the GPU has no room for streams and lists.
    pub fn new(
        kernels: &Kernels,
        peers: BTreeMap<ReceiverRank, CudaPeer>,
        config: CudaRailConfig,
    ) -> Result<Self, CudaError> {
        let device = kernels.device();
        Ok(Self {
            config,
            kernels: kernels.clone(),
            batches: VecDeque::with_capacity(BATCHES_MAX),
            idle: (0..BATCHES_MAX)
                .map(|_| kernels.batch().with_room(LIST_BYTES))
                .collect::<Result<_, _>>()?,
            untold: Untold::new(),
            done: Vec::new(),
            lost: Vec::new(),
            failed: None,
            peers,
            uploads: device.stream()?,
            copies: device.stream()?,
        })
    }

    /// Takes WRITEs for one batch. Those that lie outside their receiver's memory are done, and have failed.
    fn draft(&mut self, writes: &mut VecDeque<RailWrite<DeviceRange>>) -> Draft {
        let list = self.idle.pop().unwrap_or_else(|| self.kernels.batch());
        let mut draft = Draft { list, engine: Vec::new(), writes: Vec::new(), bytes: 0 };
        while draft.writes.len() < BATCH_WRITES_MAX
            && let Some(RailWrite { rows, .. }) = writes.front()
            && (draft.bytes == 0 || draft.bytes.saturating_add(rows.total_bytes()) <= BATCH_BYTES_MAX)
            && let Some(RailWrite { id, from, rows, to, region, offset, tag }) = writes.pop_front()
        {
            let memory = self.peers.get(&to).and_then(|peer| peer.regions.get(region.index()));
            match memory.and_then(|memory| draft.add(&from, rows, memory, offset)) {
                Some(()) => {
                    draft.bytes = draft.bytes.saturating_add(rows.total_bytes());
                    draft.writes.push(Arrived { id, from, to, tag });
                }
                None => {
                    let reason =
                        format!("{rows:?} at {offset} are outside {region} of {to}, or of what is sent");
                    self.done.push(Done { id, from, result: Err(reason) });
                }
            }
        }
        draft
    }

    /// Posts a batch. When that fails its buffers come back, unless nobody can tell when they are last read.
    fn launch(&mut self, draft: Draft) {
        let Draft { list, engine, writes, bytes: _ } = draft;
        let ids: Vec<WriteId> = writes.iter().map(|write| write.id).collect();
        let posted = list
            .enqueue(&self.uploads, &self.copies, self.config.multiprocessors.get())
            .map_err(|error| error.to_string())
            .and_then(|kernels| {
                let post = |(from, to, spans): (DeviceRange, DeviceRange, Vec<Span>)| {
                    self.copies.copy(from, to, &spans).map_err(|failed| failed.to_string())
                };
                Ok((kernels, engine.into_iter().map(post).collect::<Result<Vec<_>, _>>()?))
            });
        let (kernels, engine) = match posted {
            Ok(posted) => posted,
            // A part of it may be on the stream.
            Err(reason) => match self.copies.synchronize_until(Instant::now() + SETTLE_MAX) {
                Ok(true) => return self.give_back(writes, &reason),
                Ok(false) | Err(_) => {
                    std::mem::forget(writes);
                    return self.lose(ids, reason);
                }
            },
        };
        match self.copies.hold(writes) {
            Ok(writes) => self.batches.push_back(Batch { ids, kernels, _engine: engine, writes }),
            Err(failed) => match failed.returned {
                Some(writes) => self.give_back(writes, &failed.error.to_string()),
                None => self.lose(ids, failed.error.to_string()),
            },
        }
    }

    fn give_back(&mut self, writes: Vec<Arrived<DeviceRange>>, reason: &str) {
        let failed = |Arrived { id, from, .. }| Done { id, from, result: Err(reason.to_owned()) };
        self.done.extend(writes.into_iter().map(failed));
    }

    /// Ends the rail: nothing of this GPU works any more in this process.
    fn lose(&mut self, ids: Vec<WriteId>, reason: String) {
        tracing::error!(rail = self.name(), reason, writes = ids.len(), "the buffers of a batch are leaked");
        self.lost.extend(ids);
        self.failed = Some(reason);
    }

    /// Takes in the oldest batch, whose event has passed.
    fn finish(&mut self) {
        let Some(Batch { ids, kernels, writes, _engine }) = self.batches.pop_front() else { return };
        match writes.wait() {
            Ok(writes) => writes.into_iter().for_each(|write| self.untold.push(write)),
            Err(failed) => return self.lose(ids, failed.error.to_string()),
        }
        match kernels.wait() {
            Ok(list) => self.idle.push(list),
            // The next batch will say the same, and this one is over.
            Err(error) => tracing::error!(%error, "the lists of a batch are leaked"),
        }
    }
}

impl Draft {
    /// Adds what a WRITE copies. `None`, and nothing added, if it does not fit at either end.
    fn add(&mut self, from: &DeviceRange, rows: Rows, memory: &DeviceRange, offset: u64) -> Option<()> {
        let to = memory.part(offset..offset.checked_add(rows.total_bytes())?).ok()?;
        let regions = [from.clone(), to.clone()];
        let [source, destination] = [0, 1].map(|region| Place { region, offset: 0 });
        match way(rows) {
            Way::Engine { rows, bytes, stride } => {
                let extent = u64::from(rows.checked_sub(1)?).checked_mul(stride)?.checked_add(bytes)?;
                let row = |row: u32| {
                    let row = u64::from(row);
                    Span { from: row * stride, to: row * bytes, len: bytes }
                };
                let fits = extent <= from.len();
                fits.then(|| self.engine.push((from.clone(), to, (0..rows).map(row).collect())))
            }
            Way::Span { bytes } => {
                self.list.span(&regions, &weight_ops::cuda::Span { source, destination, bytes }).ok()
            }
            Way::Rows { rows, bytes, stride } => {
                let copy = BoxCopy {
                    source,
                    destination,
                    row_bytes: bytes,
                    counts: [1, 1, rows],
                    source_strides: [0, 0, stride],
                    destination_strides: [0, 0, bytes],
                };
                self.list.rows(&regions, &copy).ok()
            }
        }
    }
}

/// What copies a WRITE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// The copy engine, row by row.
    Engine { rows: u32, bytes: u64, stride: u64 },
    /// The kernel for spans.
    Span { bytes: u64 },
    /// The kernel for rows.
    Rows { rows: u32, bytes: u64, stride: u64 },
}

fn way(rows: Rows) -> Way {
    let Rows { count, bytes, stride } = rows;
    // Rows without gaps are one.
    let (count, bytes) = match count > 1 && stride != u64::from(bytes) {
        true => (count, u64::from(bytes)),
        false => (1, rows.total_bytes()),
    };
    match count {
        _ if bytes >= ENGINE_BYTES_MIN => Way::Engine { rows: count, bytes, stride },
        1 => Way::Span { bytes },
        _ => Way::Rows { rows: count, bytes, stride },
    }
}

impl Rail for CudaRail {
    type Buffer = DeviceRange;

    fn name(&self) -> String {
        format!("cuda-ipc ({})", self.kernels.device())
    }

    fn limits(&self) -> RailLimits {
        RailLimits {
            depth: (BATCHES_MAX * BATCH_WRITES_MAX) as u32,
            in_flight_bytes_max: BATCHES_MAX as u64 * BATCH_BYTES_MAX,
            takes_rows: true,
        }
    }

    fn post(&mut self, writes: &mut VecDeque<RailWrite<DeviceRange>>) -> Result<(), RailError> {
        while self.batches.len() < BATCHES_MAX && !writes.is_empty() {
            if let Some(reason) = &self.failed {
                return Err(RailError { rail: self.name(), reason: reason.clone() });
            }
            let draft = self.draft(writes);
            match draft.writes.is_empty() {
                true => self.idle.push(draft.list),
                false => self.launch(draft),
            }
        }
        Ok(())
    }

    fn poll(&mut self, done: &mut Vec<Done<DeviceRange>>) -> Result<(), RailError> {
        while self.failed.is_none()
            && let Some(oldest) = self.batches.front()
        {
            match oldest.writes.is_done() {
                Ok(true) => self.finish(),
                Ok(false) => break,
                Err(error) => self.failed = Some(error.to_string()),
            }
        }
        self.untold.tell(&mut self.peers, &mut self.done);
        done.append(&mut self.done);
        match &self.failed {
            None => Ok(()),
            Some(reason) => Err(RailError { rail: self.name(), reason: reason.clone() }),
        }
    }

    fn arm(&mut self) -> Armed<'_> {
        match self.done.is_empty() && self.failed.is_none() {
            // An event cannot be waited for together with the descriptors of other rails.
            true => Armed::Blind,
            false => Armed::Ready,
        }
    }

    fn close(self: Box<Self>, unfinished: &mut Vec<WriteId>) -> Result<(), RailError> {
        let name = self.name();
        unfinished.extend(self.batches.iter().flat_map(|batch| &batch.ids));
        unfinished.extend(self.untold.ids());
        unfinished.extend(self.done.iter().map(|done| done.id));
        unfinished.extend(&self.lost);
        let until = Instant::now() + CLOSE_MAX;
        let idle = [&self.uploads, &self.copies].map(|stream| stream.synchronize_until(until));
        let failed = idle.into_iter().find_map(|idle| match idle {
            Ok(true) => None,
            Ok(false) => Some(format!("the GPU has not ended its copies within {CLOSE_MAX:?}")),
            Err(error) => Some(error.to_string()),
        });
        match failed {
            None => Ok(()),
            Some(reason) => {
                tracing::error!(rail = name, reason, "does not close: the buffers in flight are leaked");
                // Batches that are dropped now leave their buffers at the streams, which leak what may be in use.
                Err(RailError { rail: name, reason })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_way_copies_the_bytes_of_the_rows(count in 0..6_u32, bytes in prop_oneof![0..9_u32, (8 << 20) - 1..(8 << 20) + 2_u32], gap in 0..3_u64) {
            let stride = u64::from(bytes) + gap;
            let (rows, len, apart) = match way(Rows { count, bytes, stride }) {
                Way::Engine { rows, bytes, stride } => {
                    prop_assert!(bytes >= ENGINE_BYTES_MIN);
                    (rows, bytes, stride)
                }
                Way::Span { bytes } => (1, bytes, 0),
                Way::Rows { rows, bytes, stride } => {
                    prop_assert!(rows > 1 && bytes < ENGINE_BYTES_MIN && stride > bytes);
                    (rows, bytes, stride)
                }
            };
            // Runs of bytes, those that touch as one.
            let runs = |rows: u32, len: u64, apart: u64| {
                let mut runs: Vec<(u64, u64)> = Vec::new();
                for start in (0..rows).map(|row| u64::from(row) * apart).filter(|_| len > 0) {
                    match runs.last_mut() {
                        Some((_, end)) if *end == start => *end += len,
                        _ => runs.push((start, start + len)),
                    }
                }
                runs
            };
            prop_assert_eq!(runs(rows, len, apart), runs(count, u64::from(bytes), stride));
        }
    }
}
