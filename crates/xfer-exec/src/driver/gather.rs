//! The thread that copies rows together, so that the thread of the rails never does.

use std::io;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use efa_core::{Lease, LeaseMut};
use xfer_plan::Op;

use crate::engine::Slot;

pub(super) struct Job {
    pub(super) slot: Slot,
    pub(super) op: Op,
    /// From the operation's first byte on.
    pub(super) source: Lease,
    pub(super) into: LeaseMut,
}

pub(super) struct Gathered {
    pub(super) slot: Slot,
    pub(super) lease: LeaseMut,
    pub(super) took: Duration,
    /// `false` when the rows do not fit, at either end.
    pub(super) ok: bool,
}

/// Starts the thread, with room for `slots` jobs and as many results. It ends with the sender of its jobs.
pub(super) fn start(name: &str, slots: usize) -> io::Result<(Sender<Job>, Receiver<Gathered>)> {
    let (to_gather, jobs) = bounded::<Job>(slots.max(1));
    let (results, from_gather) = bounded(slots.max(1));
    std::thread::Builder::new().name(format!("gather {name}")).spawn(move || {
        for Job { slot, op, source, mut into } in jobs {
            let began = Instant::now();
            let ok = gather(&op, source.bytes(), into.bytes_mut()).is_some();
            drop(source);
            if results.send(Gathered { slot, lease: into, took: began.elapsed(), ok }).is_err() {
                return;
            }
        }
    })?;
    Ok((to_gather, from_gather))
}

/// Copies the rows of `op` from the start of `source` on, one after another. `None` if they do not fit.
fn gather(op: &Op, source: &[u8], into: &mut [u8]) -> Option<()> {
    let row_bytes = op.row_bytes as usize;
    let into = into.get_mut(..usize::try_from(op.bytes()).ok()?)?;
    let mut at = 0_usize;
    for row in into.chunks_exact_mut(row_bytes) {
        row.copy_from_slice(source.get(at..at.checked_add(row_bytes)?)?);
        at = at.checked_add(usize::try_from(op.source.stride).ok()?)?;
    }
    Some(())
}
