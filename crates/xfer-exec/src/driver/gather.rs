//! The thread that fills staging slots, so that the thread of the rails never does: it copies rows together, and casts and
//! quantises.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use efa_core::{Lease, LeaseMut};
use xfer_plan::{Op, Transform};

use super::transform::{self, Scales};
use crate::engine::Slot;
use crate::quant::Quantization;

/// What the slots of one push are filled from.
pub(super) struct Weights {
    pub(super) regions: Vec<Lease>,
    pub(super) quantization: Arc<Quantization>,
    /// Of one fill at a time.
    pub(super) scales: Mutex<Scales>,
}

pub(super) struct Job {
    pub(super) slot: Slot,
    pub(super) op: Op,
    pub(super) weights: Arc<Weights>,
    pub(super) into: LeaseMut,
}

pub(super) struct Gathered {
    pub(super) slot: Slot,
    pub(super) lease: LeaseMut,
    pub(super) took: Duration,
    /// `false` when what is wanted does not fit, at either end.
    pub(super) ok: bool,
}

/// Starts the thread, with room for `slots` jobs and as many results. It ends with the sender of its jobs.
pub(super) fn start(name: &str, slots: usize) -> io::Result<(Sender<Job>, Receiver<Gathered>)> {
    let (to_gather, jobs) = bounded::<Job>(slots.max(1));
    let (results, from_gather) = bounded(slots.max(1));
    std::thread::Builder::new().name(format!("gather {name}")).spawn(move || {
        for Job { slot, op, weights, mut into } in jobs {
            let began = Instant::now();
            let ok = fill(&op, &weights, into.bytes_mut()).is_some();
            drop(weights);
            if results.send(Gathered { slot, lease: into, took: began.elapsed(), ok }).is_err() {
                return;
            }
        }
    })?;
    Ok((to_gather, from_gather))
}

/// Puts the rows of `op` one after another, as they are to be at the receiver. `None` if they do not fit.
fn fill(op: &Op, weights: &Weights, into: &mut [u8]) -> Option<()> {
    let Weights { regions, quantization, scales } = weights;
    let into = into.get_mut(..usize::try_from(op.bytes()).ok()?)?;
    let source = || transform::bytes_from(regions, op.source.region, op.source.offset);
    let scales = || scales.lock().unwrap_or_else(PoisonError::into_inner);
    match op.transform {
        Transform::Copy => gather(op, source()?, into),
        Transform::Cast { from, to } => transform::cast(op, (from, to), source()?, into),
        Transform::Quantize { .. } => scales().quantize(quantization, regions, op, into),
        Transform::Scales { .. } => scales().store(quantization, regions, op, into),
    }
}

/// Copies the rows of `op` from the start of `source` on, one after another. `None` if they do not fit.
fn gather(op: &Op, source: &[u8], into: &mut [u8]) -> Option<()> {
    let row_bytes = op.row_bytes as usize;
    let mut at = 0_usize;
    for row in into.chunks_exact_mut(row_bytes) {
        row.copy_from_slice(source.get(at..at.checked_add(row_bytes)?)?);
        at = at.checked_add(usize::try_from(op.source.stride).ok()?)?;
    }
    Some(())
}
