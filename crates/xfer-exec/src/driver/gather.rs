//! The thread that fills staging slots, so that the thread of the rails never does: it copies rows together, and casts and
//! quantises.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use efa_core::{Lease, LeaseMut};
use xfer_plan::Op;

use super::transform::Transforms;
use crate::engine::Slot;

/// What the slots of one push are filled from.
pub(super) struct Weights {
    pub(super) regions: Vec<Lease>,
    /// Of one fill at a time.
    pub(super) transforms: Mutex<Transforms>,
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
    let into = into.get_mut(..usize::try_from(op.bytes()).ok()?)?;
    let mut transforms = weights.transforms.lock().unwrap_or_else(PoisonError::into_inner);
    transforms.fill(op, weights.regions.as_slice(), into)
}
