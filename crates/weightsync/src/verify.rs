//! Checksums of what was sent and of what arrived, to be compared before a version is committed.
//!
//! A trainer hashes the rows of each operation at their source, beside the rails and on another thread: nothing on the way
//! of a WRITE knows of it, and a copy that goes wrong on the way is found too. An inference rank hashes the same rows where
//! they landed, once everything has. Neither may say that it has hashed what it has not read.
//!
//! The hash is XXH3 with 128 bits, as its specification says. It finds accidents, not adversaries.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use efa_core::{Lease, Target};
use rendezvous::{Checksum, ParamSum, PushId, Verify};
use tokio::sync::oneshot;
use xfer_plan::{Inbound, Op, ParamId, ReceiverRank, RegionIndex, Strided};
use xxhash_rust::xxh3::Xxh3;

use crate::report::VerifyReport;

/// Copied at once from memory that others may write; with what hashes it, it stays in a core's own cache.
const BLOCK_BYTES: usize = 128 << 10;

/// An inference rank has one region.
const ARENA: RegionIndex = RegionIndex(0);

type Names = BTreeMap<ParamId, String>;

/// The hash of one operation, to be fed with its rows in order. Where they go is part of it, so rows that changed places
/// are found.
fn hasher(destination: Strided) -> Xxh3 {
    Xxh3::with_seed(destination.offset ^ u64::from(destination.region.0) << 48)
}

/// The parameters that are compared in an attempt.
fn covered(verify: Verify, push: PushId, names: &Names) -> BTreeSet<ParamId> {
    names.iter().filter(|(_, name)| verify.covers(push, name)).map(|(param, _)| *param).collect()
}

/// What a trainer has to hash.
pub(crate) struct Outgoing {
    verify: Verify,
    ops: Arc<[Op]>,
    names: Arc<Names>,
    /// What the controller takes for progress.
    progress: Arc<AtomicU64>,
}

/// What a trainer has hashed.
pub(crate) struct Summed {
    pub(crate) sums: Vec<ParamSum>,
    pub(crate) report: VerifyReport,
}

/// A trainer's hashing of one push.
pub(crate) struct Summing {
    summed: oneshot::Receiver<Option<Summed>>,
    alone: Arc<AtomicBool>,
    /// Nobody wants it any more.
    stopped: Arc<AtomicBool>,
}

impl Outgoing {
    /// `None` where nothing is verified.
    pub(crate) fn new(verify: Verify, ops: &[Op], names: &Names, progress: Arc<AtomicU64>) -> Option<Self> {
        verify.is_on().then(|| Self { verify, ops: by_place(ops), names: Arc::new(names.clone()), progress })
    }

    /// Begins to hash the operations in these regions.
    pub(crate) fn start(&self, push: PushId, regions: Vec<Lease>) -> Summing {
        let Self { verify, ops, names, progress } = self;
        let (ops, names, progress, verify) = (ops.clone(), names.clone(), progress.clone(), *verify);
        let (reply, summed) = oneshot::channel::<Option<Summed>>();
        let alone = Arc::new(AtomicBool::new(false));
        let stopped = Arc::new(AtomicBool::new(false));
        let (rails_are_done, is_stopped) = (alone.clone(), stopped.clone());
        tokio::task::spawn_blocking(move || {
            let covered = covered(verify, push, &names);
            let next = || {
                if rails_are_done.load(Ordering::Relaxed) {
                    // A sign of life, too small to be seen among the bytes.
                    progress.fetch_add(1, Ordering::Relaxed);
                }
                !is_stopped.load(Ordering::Relaxed) && !reply.is_closed()
            };
            let summed = sum(&ops, &regions, &covered, next);
            // Before anybody takes the weights for free.
            drop(regions);
            drop(reply.send(summed));
        });
        Summing { summed, alone, stopped }
    }
}

/// In the order of memory, and what replicas get alike side by side.
fn by_place(ops: &[Op]) -> Arc<[Op]> {
    let mut ops: Arc<[Op]> = ops.into();
    Arc::make_mut(&mut ops).sort_unstable_by_key(|op| (place(op), op.to));
    ops
}

/// Operations that have this in common have the same hash.
fn place(op: &Op) -> (Strided, Strided, u32, u32) {
    (op.source, op.destination, op.rows, op.row_bytes)
}

/// Hashes the covered operations, while `next` says to go on. `None` if it did not, or where an operation reads outside the
/// regions.
fn sum(
    ops: &[Op],
    regions: &[Lease],
    covered: &BTreeSet<ParamId>,
    next: impl Fn() -> bool,
) -> Option<Summed> {
    let began = Instant::now();
    let mut sums: BTreeMap<(ReceiverRank, ParamId), Checksum> = BTreeMap::new();
    let mut bytes = 0;
    for alike in ops.chunk_by(|a, b| place(a) == place(b)) {
        let mut alike = alike.iter().filter(|op| covered.contains(&op.param)).peekable();
        let Some(first) = alike.peek() else { continue };
        if !next() {
            return None;
        }
        let hash = Checksum::from(hash_sent(first, regions)?);
        for op in alike {
            sums.entry((op.to, op.param)).or_default().add(hash);
            bytes += op.bytes();
        }
    }
    let sums: Vec<_> = sums.into_iter().map(|((to, param), sum)| ParamSum { to, param, sum }).collect();
    let report = VerifyReport::new(sums.len(), bytes, began.elapsed());
    Some(Summed { sums, report })
}

/// `None` where it reads outside the regions.
fn hash_sent(op: &Op, regions: &[Lease]) -> Option<u128> {
    let source = regions.get(op.source.region.index())?.bytes();
    let mut hash = hasher(op.destination);
    for row in 0..u64::from(op.rows) {
        let from = op.source.offset.checked_add(row.checked_mul(op.source.stride)?)?;
        let from = usize::try_from(from).ok()?;
        hash.update(source.get(from..from.checked_add(op.row_bytes as usize)?)?);
    }
    Some(hash.digest128())
}

impl Summing {
    /// Waits for the end, on a thread that may: the rails have delivered everything, or nothing further counts. `None` where
    /// it does not, or where nothing could be hashed. In any case the weights are free then.
    pub(crate) fn end(self, delivered: bool) -> Option<Summed> {
        let began = Instant::now();
        self.alone.store(true, Ordering::Relaxed);
        self.stopped.store(!delivered, Ordering::Relaxed);
        let mut summed = self.summed.blocking_recv().ok().flatten()?;
        summed.report.exposed_seconds = began.elapsed().as_secs_f64();
        Some(summed)
    }
}

/// What an inference rank has to hash.
pub(crate) struct Incoming {
    verify: Verify,
    inbound: Arc<[Inbound]>,
    names: Arc<Names>,
    progress: Arc<AtomicU64>,
}

/// The end of a comparison: what was compared, or which parameter is not what was sent.
pub(crate) type Compared = Result<VerifyReport, String>;

impl Incoming {
    /// Checks that these operations are all of the `bytes` that arrive, in an arena of `arena_bytes`. `None` where nothing is
    /// verified.
    pub(crate) fn new(
        verify: Verify,
        inbound: Vec<Inbound>,
        names: Names,
        (bytes, arena_bytes): (u64, u64),
        progress: Arc<AtomicU64>,
    ) -> Result<Option<Self>, String> {
        if !verify.is_on() {
            return Ok(None);
        }
        let fits =
            |Inbound { destination: Strided { region, offset, stride }, rows, row_bytes, .. }: &Inbound| {
                let last = u64::from(*rows).checked_sub(1).and_then(|rows| rows.checked_mul(*stride));
                let end = last.and_then(|last| last.checked_add(*offset)?.checked_add(u64::from(*row_bytes)));
                *region == ARENA && end.is_some_and(|end| end <= arena_bytes)
            };
        if let Some(outside) = inbound.iter().find(|arrives| !fits(arrives)) {
            return Err(format!(
                "the plan has {} arrive outside the {arena_bytes} bytes of this rank",
                names.get(&outside.param).map_or("a parameter", String::as_str)
            ));
        }
        let listed = inbound.iter().map(Inbound::bytes).fold(0, u64::saturating_add);
        if listed != bytes {
            return Err(format!("of {bytes} bytes that arrive here the plan says where {listed} do"));
        }
        Ok(Some(Self { verify, inbound: inbound.into(), names: Arc::new(names), progress }))
    }

    /// Begins to compare what is in the arena with what was sent. It ends early where nobody waits for it any more.
    pub(crate) fn start(
        &self,
        (push, version): (PushId, u64),
        sent: Vec<(ParamId, Checksum)>,
        arena: Target,
    ) -> oneshot::Receiver<Compared> {
        let Self { verify, inbound, names, progress } = self;
        let (inbound, names, progress, verify) = (inbound.clone(), names.clone(), progress.clone(), *verify);
        let (reply, compared) = oneshot::channel();
        progress.store(0, Ordering::Relaxed);
        tokio::task::spawn_blocking(move || {
            let covered = covered(verify, push, &names);
            let next = |bytes| {
                progress.fetch_add(bytes, Ordering::Relaxed);
                !reply.is_closed()
            };
            let result = compare(&inbound, &arena, &covered, &sent.into_iter().collect(), next);
            let result = result.map_err(|params| differ(version, &params, &covered, &names));
            drop(reply.send(result));
        });
        compared
    }
}

/// Hashes the covered operations where they landed, while `next` says to go on, and compares; or which parameters are not
/// what was sent. What was not read counts as that.
fn compare(
    inbound: &[Inbound],
    arena: &Target,
    covered: &BTreeSet<ParamId>,
    sent: &BTreeMap<ParamId, Checksum>,
    next: impl Fn(u64) -> bool,
) -> Result<VerifyReport, BTreeSet<ParamId>> {
    let began = Instant::now();
    let mut found: BTreeMap<ParamId, Checksum> = BTreeMap::new();
    let mut block = vec![0; BLOCK_BYTES];
    let mut bytes = 0;
    for arrived in inbound.iter().filter(|arrived| covered.contains(&arrived.param)) {
        if !next(arrived.bytes()) {
            break;
        }
        if let Some(hash) = hash_arrived(arrived, arena, &mut block) {
            found.entry(arrived.param).or_default().add(hash.into());
            bytes += arrived.bytes();
        }
    }
    let params = found.keys().chain(sent.keys());
    let differ: BTreeSet<ParamId> =
        params.filter(|param| found.get(param) != sent.get(param)).copied().collect();
    if !differ.is_empty() {
        return Err(differ);
    }
    let mut report = VerifyReport::new(found.len(), bytes, began.elapsed());
    report.exposed_seconds = report.seconds;
    Ok(report)
}

/// `None` where it is not all in the arena.
fn hash_arrived(arrived: &Inbound, arena: &Target, block: &mut [u8]) -> Option<u128> {
    let Inbound { destination, .. } = arrived;
    let (rows, row_bytes) = match destination.stride == u64::from(arrived.row_bytes) {
        true => (1, arrived.bytes()),
        false => (u64::from(arrived.rows), u64::from(arrived.row_bytes)),
    };
    let mut hash = hasher(*destination);
    for row in 0_u64..rows {
        let mut at =
            usize::try_from(destination.offset.checked_add(row.checked_mul(destination.stride)?)?).ok()?;
        let mut left = usize::try_from(row_bytes).ok()?;
        while left > 0 {
            let len = left.min(block.len());
            let block = block.get_mut(..len)?;
            arena.read(at, block).ok()?;
            hash.update(block);
            (at, left) = (at.checked_add(len)?, left - len);
        }
    }
    Some(hash.digest128())
}

/// Names what is not what was sent.
fn differ(version: u64, params: &BTreeSet<ParamId>, covered: &BTreeSet<ParamId>, names: &Names) -> String {
    let first = params.first().and_then(|param| names.get(param));
    let first = first.map_or("a parameter that the plan does not name", String::as_str);
    format!(
        "version {version} arrived with other bytes than were sent in {first} ({} of {} parameters that were compared differ); \
         the memory or a NIC of this rank or of a trainer is at fault if it happens again",
        params.len(),
        covered.len()
    )
}

#[cfg(test)]
mod tests;
