//! Being in charge: what a controller may do as long as `controller` is the key that it created.
//!
//! Every change compares that, in the same transaction. So whatever this process believes of its lease, and however late a request
//! of it arrives, nothing changes any more once another has taken over.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;
use xfer_plan::Rank;

use super::Failure;
use super::finder::address;
use super::keeper::{Keeper, Roster};
use super::store::{COMMITTED, CONTROLLER, Change, Compare, ENDED, Lease, MEMBERS, Store};
use crate::protocol::Commit;
use crate::record;

/// How long the end of a job waits for etcd to be told. Where it is not, the lease ends by itself.
const FINISH_MAX: Duration = Duration::from_secs(2);

/// What etcd says of a key that this controller has put.
#[derive(Debug, Clone, Copy)]
pub(super) struct Claim {
    pub(super) lease: Lease,
    /// The revision at which `controller` was created.
    pub(super) created: i64,
    /// The revision at which `committed` was changed last, 0 where it is not there.
    pub(super) committed: i64,
}

/// A controller that is in charge, or was.
pub(crate) struct Office {
    store: Arc<Store>,
    job: String,
    created: i64,
    committed: AtomicI64,
    roster: Arc<Roster>,
    _keeper: Keeper,
}

impl Office {
    /// From now on the lease is kept. The receiver is told why this controller is not in charge any more.
    pub(super) fn take(
        store: Arc<Store>,
        job: String,
        claim: Claim,
    ) -> Result<(Arc<Self>, oneshot::Receiver<String>), Failure> {
        let roster = Arc::<Roster>::default();
        let (keeper, deposed) = Keeper::start(store.clone(), claim, roster.clone())?;
        let committed = AtomicI64::new(claim.committed);
        let office = Self { store, job, created: claim.created, committed, roster, _keeper: keeper };
        Ok((Arc::new(office), deposed))
    }

    /// Puts a commit on record, within the deadline. One at a time.
    ///
    /// # Errors
    ///
    /// Why this controller is in charge no more, or cannot tell. Then nobody may be told of the commit: whoever is in charge next
    /// sees whether it is on record.
    pub(crate) async fn store(&self, commit: Commit) -> Result<(), String> {
        let stored = self.store.gateway.patiently(|| self.try_to_store(commit)).await;
        stored.map_err(|failure| format!("etcd at {}: {failure}", self.store.gateway.url()))
    }

    async fn try_to_store(&self, commit: Commit) -> Result<(), Failure> {
        let text = record::text(&self.job, commit);
        let known = self.committed.load(Ordering::Relaxed);
        // With the second, an attempt that arrives late changes nothing once a later one has.
        let compare = [Compare::Created(CONTROLLER, self.created), Compare::Modified(COMMITTED, known)];
        let put = Change::Put { key: COMMITTED, value: text.as_bytes(), lease: 0 };
        if let Some(revision) = self.store.change(&compare, &[put]).await? {
            self.committed.store(revision, Ordering::Relaxed);
            return Ok(());
        }
        let [controller, committed] = self.store.look([CONTROLLER, COMMITTED]).await?;
        if let Some(reason) = taken_over(&self.store, self.created, controller.as_ref()) {
            return Err(Failure::Refused(reason));
        }
        match committed {
            // An earlier attempt, whose answer was lost.
            Some(entry) if entry.value == text.as_bytes() => {
                self.committed.store(entry.modified, Ordering::Relaxed);
                Ok(())
            }
            _ => Err(Failure::Refused(format!(
                "{} was changed by something else than the controller in charge",
                self.store.name(COMMITTED)
            ))),
        }
    }

    /// A member joined, or with `None` is gone. Told to etcd when it can be; no rule of the job reads it.
    pub(crate) fn member(&self, rank: Rank, entry: Option<String>) {
        self.roster.set(rank, entry);
    }

    /// The job is over, and whoever stands by need not take over.
    pub(crate) async fn finish(&self, reason: Option<&str>) {
        let compare = [Compare::Created(CONTROLLER, self.created)];
        let value = reason.unwrap_or_default().as_bytes();
        let put = Change::Put { key: ENDED, value, lease: 0 };
        let ended = [Change::Delete(CONTROLLER), Change::DeleteAll(MEMBERS), put];
        let told = self.store.gateway.patiently(|| self.store.change(&compare, &ended));
        match timeout(FINISH_MAX, told).await {
            Ok(Ok(_)) => {}
            Ok(Err(failure)) => tracing::warn!(%failure, "etcd was not told that the job is over"),
            Err(_) => tracing::warn!("etcd was not told that the job is over within {FINISH_MAX:?}"),
        }
    }
}

/// Why the controller whose key was created at this revision is not in charge any more, if it is not.
pub(super) fn taken_over(store: &Store, created: i64, found: Option<&super::store::Entry>) -> Option<String> {
    let lost = "this controller has lost its lease";
    match found {
        Some(entry) if entry.created == created => None,
        Some(entry) => Some(match address(entry, &store.name(CONTROLLER)) {
            Ok(address) => format!("{lost}: the controller at {address} has taken over"),
            Err(failure) => format!("{lost}: {failure}"),
        }),
        None => Some(format!("{lost}, and no other has taken over yet")),
    }
}
