//! Keeps a controller's lease, on a thread of its own: it must be kept also while the controller plans, which takes seconds for
//! a large job.
//!
//! An etcd that is away changes nothing: the lease may be there still when it is back. One that answers that the key is
//! gone ends it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::sleep;
use xfer_plan::Rank;

use super::Failure;
use super::office::{Claim, taken_over};
use super::store::{CHANGES_MAX, CONTROLLER, Change, Compare, MEMBERS, Store};

/// A lease is kept this many times before it would end: some may fail.
const ROUNDS_PER_LEASE: u32 = 4;

/// Ends the thread when it is dropped.
pub(super) struct Keeper {
    _running: mpsc::Sender<()>,
}

/// What is to be told of members: for each rank the last word only, so that it is bounded.
#[derive(Default)]
pub(super) struct Roster {
    pending: Mutex<BTreeMap<Rank, Option<String>>>,
    changed: Notify,
}

impl Roster {
    pub(super) fn set(&self, rank: Rank, entry: Option<String>) {
        self.pending().insert(rank, entry);
        self.changed.notify_one();
    }

    fn pending(&self) -> MutexGuard<'_, BTreeMap<Rank, Option<String>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Vec<(Rank, Option<String>)> {
        let mut pending = self.pending();
        std::iter::from_fn(|| pending.pop_first()).take(CHANGES_MAX).collect()
    }

    /// What could not be told, where there is no later word.
    fn put_back(&self, batch: Vec<(Rank, Option<String>)>) {
        let mut pending = self.pending();
        for (rank, entry) in batch {
            pending.entry(rank).or_insert(entry);
        }
    }
}

impl Keeper {
    /// Begins to keep the lease of this claim.
    pub(super) fn start(
        store: Arc<Store>,
        claim: Claim,
        roster: Arc<Roster>,
    ) -> Result<(Self, oneshot::Receiver<String>), Failure> {
        let (running, stopped) = mpsc::channel(1);
        let (deposed, told) = oneshot::channel();
        let failed =
            |error: std::io::Error| Failure::Refused(format!("no thread to keep the lease: {error}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let round = Round { store, claim, roster };
        std::thread::Builder::new()
            .name("etcd lease".into())
            .spawn(move || {
                if let Some(reason) = runtime.block_on(round.repeat(stopped)) {
                    let _ = deposed.send(reason);
                }
            })
            .map_err(failed)?;
        Ok((Self { _running: running }, told))
    }
}

struct Round {
    store: Arc<Store>,
    claim: Claim,
    roster: Arc<Roster>,
}

impl Round {
    /// Until the controller is not in charge any more: why. None where it is stopped.
    async fn repeat(self, mut stopped: mpsc::Receiver<()>) -> Option<String> {
        let mut away = false;
        loop {
            let kept = tokio::select! {
                kept = self.keep() => kept,
                _ = stopped.recv() => return None,
            };
            match &kept {
                Ok(Some(reason)) => return Some(format!("etcd at {}: {reason}", self.store.gateway.url())),
                Ok(None) if away => tracing::info!("etcd is back, and the lease is kept"),
                Ok(None) => {}
                Err(failure) if !away => tracing::warn!(%failure, "etcd is away: nothing can be committed"),
                Err(failure) => tracing::debug!(%failure, "etcd is still away"),
            }
            away = kept.is_err();
            let pause = self.claim.lease.ttl / ROUNDS_PER_LEASE;
            tokio::select! {
                () = sleep(pause) => {}
                () = self.roster.changed.notified(), if !away => {}
                _ = stopped.recv() => return None,
            }
        }
    }

    async fn keep(&self) -> Result<Option<String>, Failure> {
        // A lease that has ended took the key along; and somebody may have deleted the key alone.
        let alive = self.store.keep(self.claim.lease).await?;
        let [controller] = self.store.look([CONTROLLER]).await?;
        let reason = taken_over(&self.store, self.claim.created, controller.as_ref());
        if reason.is_none() && alive {
            self.tell_of_members().await?;
        }
        Ok(reason)
    }

    async fn tell_of_members(&self) -> Result<(), Failure> {
        let compare = [Compare::Created(CONTROLLER, self.claim.created)];
        loop {
            let batch = self.roster.take();
            if batch.is_empty() {
                return Ok(());
            }
            let keys: Vec<String> =
                batch.iter().map(|(rank, _)| format!("{MEMBERS}{rank}").replace(' ', "-")).collect();
            let changes: Vec<Change> = keys
                .iter()
                .zip(&batch)
                .map(|(key, (_, entry))| match entry {
                    Some(entry) => Change::Put { key, value: entry.as_bytes(), lease: self.claim.lease.id },
                    None => Change::Delete(key),
                })
                .collect();
            if let Err(failure) = self.store.change(&compare, &changes).await {
                self.roster.put_back(batch);
                return Err(failure);
            }
        }
    }
}
