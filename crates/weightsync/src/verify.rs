//! Checksums of what was sent and of what arrived, to be compared before a version is committed.
//!
//! A trainer hashes the rows of each operation at their source, beside the rails and on a thread of its own: nothing on the way
//! of a WRITE knows of it, and a copy that goes wrong on the way is found too. What is cast or quantised on the way it makes once
//! more, on the CPU, so that a kernel that goes wrong is found as well. An inference rank hashes the same rows where they landed,
//! once everything has. Neither may say that it has hashed what it has not read.
//!
//! The hash is XXH3 with 128 bits, as its specification says. It finds accidents, not adversaries.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use rendezvous::{Checksum, ParamSum, PushId, Verify};
use tokio::sync::oneshot;
use xfer_exec::Quantization;
use xfer_exec::driver::Transforms;
use xfer_plan::{Inbound, Op, ParamId, ReceiverRank, RegionIndex, Strided, Transform};
use xxhash_rust::xxh3::Xxh3;

use crate::error::Error;
use crate::memory::{Exposed, Lent, Rows};
use crate::report::VerifyReport;
use worker::Worker;

mod worker;

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
    worker: Worker,
    verify: Verify,
    ops: Arc<[Op]>,
    names: Arc<Names>,
    quantization: Arc<Quantization>,
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
    /// The rails have nothing left to do.
    alone: Arc<AtomicBool>,
    given_up: Arc<AtomicBool>,
}

impl Outgoing {
    /// `None` where nothing is verified.
    ///
    /// # Errors
    ///
    /// If the thread that hashes cannot start.
    pub(crate) fn new(
        verify: Verify,
        ops: &[Op],
        names: &Names,
        progress: Arc<AtomicU64>,
    ) -> io::Result<Option<Self>> {
        if !verify.is_on() {
            return Ok(None);
        }
        let (worker, ops, names) = (Worker::start()?, by_place(ops), Arc::new(names.clone()));
        Ok(Some(Self { worker, verify, ops, names, quantization: Arc::default(), progress }))
    }

    /// For operations that quantise, too.
    pub(crate) fn quantising(self, quantization: &Arc<Quantization>) -> Self {
        Self { quantization: Arc::clone(quantization), ..self }
    }

    /// Begins to hash what the operations send of these regions, with the magnitudes that this rank is `told`, until it is `given_up`.
    pub(crate) fn start(
        &self,
        (push, told): (PushId, &[f32]),
        regions: Lent,
        given_up: Arc<AtomicBool>,
    ) -> Summing {
        let Self { worker, verify, ops, names, quantization, progress } = self;
        let (ops, names, progress, verify) = (ops.clone(), names.clone(), progress.clone(), *verify);
        let (quantization, told) = (Arc::clone(quantization), told.to_vec());
        let (reply, summed) = oneshot::channel::<Option<Summed>>();
        let alone = Arc::<AtomicBool>::default();
        let (rails_are_done, stop) = (alone.clone(), given_up.clone());
        worker.run(move || {
            let covered = covered(verify, push, &names);
            let next = || {
                if rails_are_done.load(Ordering::Relaxed) {
                    // A sign of life, too small to be seen among the bytes.
                    progress.fetch_add(1, Ordering::Relaxed);
                }
                !stop.load(Ordering::Relaxed) && !reply.is_closed()
            };
            // Where it is told too little, the rails refuse the push and say so.
            let transforms = Transforms::new(&quantization, &told);
            let summed = transforms.and_then(|transforms| sum(&ops, &regions, transforms, &covered, next));
            // Before anybody takes the weights for free.
            drop(regions);
            drop(reply.send(summed));
        });
        Summing { summed, alone, given_up }
    }
}

/// In the order of memory, and what replicas get alike side by side.
fn by_place(ops: &[Op]) -> Arc<[Op]> {
    let mut ops: Arc<[Op]> = ops.into();
    Arc::make_mut(&mut ops).sort_unstable_by_key(|op| (place(op), op.to));
    ops
}

/// Operations that have this in common have the same hash.
fn place(op: &Op) -> (Strided, Strided, u32, u32, Transform) {
    (op.source, op.destination, op.rows, op.row_bytes, op.transform)
}

/// Hashes the covered operations, while `next` says to go on. `None` if it did not, or where an operation reads outside the
/// regions.
fn sum(
    ops: &[Op],
    regions: &Lent,
    mut transforms: Transforms,
    covered: &BTreeSet<ParamId>,
    next: impl Fn() -> bool,
) -> Option<Summed> {
    let began = Instant::now();
    let mut made = Vec::new();
    let mut sums: BTreeMap<(ReceiverRank, ParamId), Checksum> = BTreeMap::new();
    let mut bytes = 0;
    for alike in ops.chunk_by(|a, b| place(a) == place(b)) {
        let mut alike = alike.iter().filter(|op| covered.contains(&op.param)).peekable();
        let Some(first) = alike.peek() else { continue };
        if !next() {
            return None;
        }
        let hash = Checksum::from(hash_sent(first, regions, &mut transforms, &mut made)?);
        for op in alike {
            sums.entry((op.to, op.param)).or_default().add(hash);
            bytes += op.bytes();
        }
    }
    let sums: Vec<_> = sums.into_iter().map(|((to, param), sum)| ParamSum { to, param, sum }).collect();
    let report = VerifyReport::new(sums.len(), bytes, began.elapsed());
    Some(Summed { sums, report })
}

/// `None` where it reads outside the regions. What is not copied as it is, is `made` in memory of one operation's length.
fn hash_sent(op: &Op, regions: &Lent, transforms: &mut Transforms, made: &mut Vec<u8>) -> Option<u128> {
    let mut hash = hasher(op.destination);
    if op.transform.is_copy() {
        let rows = rows(op.source, op.rows, op.row_bytes);
        regions.rows(op.source.region.index(), rows, &mut |bytes| hash.update(bytes))?;
    } else {
        // As long as a staging slot at most.
        made.resize(usize::try_from(op.bytes()).ok()?, 0);
        transforms.fill(op, regions, made)?;
        hash.update(made);
    }
    Some(hash.digest128())
}

fn rows(at: Strided, count: u32, bytes: u32) -> Rows {
    Rows { offset: at.offset, count: count.into(), bytes: bytes.into(), stride: at.stride }
}

impl Summing {
    /// Waits for the end, on a thread that may: the rails have delivered everything, or nothing further counts. `None` where
    /// it does not, or where nothing could be hashed. Either way the regions have been let go of when it returns: whoever has
    /// them back may change them.
    pub(crate) fn end(self, delivered: bool) -> Option<Summed> {
        let began = Instant::now();
        self.alone.store(true, Ordering::Relaxed);
        self.given_up.fetch_or(!delivered, Ordering::Relaxed);
        let mut summed = self.summed.blocking_recv().ok().flatten()?;
        summed.report.exposed_seconds = began.elapsed().as_secs_f64();
        Some(summed)
    }
}

/// What an inference rank has to hash.
pub(crate) struct Incoming {
    worker: Worker,
    verify: Verify,
    inbound: Arc<[Inbound]>,
    names: Arc<Names>,
    progress: Arc<AtomicU64>,
}

/// The end of a comparison: what was compared, or which parameter is not what was sent.
pub(crate) type Compared = Result<VerifyReport, String>;

impl Incoming {
    /// Checks that these operations are all of the `bytes` that arrive, in an arena of `arena_bytes`, and starts the thread that
    /// hashes. `None` where nothing is verified.
    ///
    /// # Errors
    ///
    /// [`Error::Inbound`] if they are not, [`Error::Thread`] if the thread cannot start.
    pub(crate) fn new(
        verify: Verify,
        inbound: Vec<Inbound>,
        names: Names,
        (bytes, arena_bytes): (u64, u64),
        progress: Arc<AtomicU64>,
    ) -> Result<Option<Self>, Error> {
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
            let name = names.get(&outside.param).map_or("a parameter", String::as_str);
            let reason = format!("the plan has {name} arrive outside the {arena_bytes} bytes of this rank");
            return Err(Error::Inbound(reason));
        }
        let listed = inbound.iter().map(Inbound::bytes).fold(0, u64::saturating_add);
        if listed != bytes {
            let reason = format!("of {bytes} bytes that arrive here the plan says where {listed} do");
            return Err(Error::Inbound(reason));
        }
        let worker = Worker::start()?;
        Ok(Some(Self { worker, verify, inbound: inbound.into(), names: Arc::new(names), progress }))
    }

    /// Begins to compare what is in the arena with what was sent. It ends early where nobody waits for it any more.
    pub(crate) fn start(
        &self,
        (push, version): (PushId, u64),
        sent: Vec<(ParamId, Checksum)>,
        arena: Exposed,
    ) -> oneshot::Receiver<Compared> {
        let Self { worker, verify, inbound, names, progress } = self;
        let (inbound, names, progress, verify) = (inbound.clone(), names.clone(), progress.clone(), *verify);
        let (reply, compared) = oneshot::channel();
        progress.store(0, Ordering::Relaxed);
        worker.run(move || {
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
    arena: &Exposed,
    covered: &BTreeSet<ParamId>,
    sent: &BTreeMap<ParamId, Checksum>,
    next: impl Fn(u64) -> bool,
) -> Result<VerifyReport, BTreeSet<ParamId>> {
    let began = Instant::now();
    let mut found: BTreeMap<ParamId, Checksum> = BTreeMap::new();
    let mut bytes = 0;
    for arrived in inbound.iter().filter(|arrived| covered.contains(&arrived.param)) {
        if !next(arrived.bytes()) {
            break;
        }
        if let Some(hash) = hash_arrived(arrived, arena) {
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
fn hash_arrived(arrived: &Inbound, arena: &Exposed) -> Option<u128> {
    let mut hash = hasher(arrived.destination);
    let rows = rows(arrived.destination, arrived.rows, arrived.row_bytes);
    arena.rows(rows, &mut |bytes| hash.update(bytes))?;
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
