//! A controller that wants to be in charge: it stands by while another is, and takes over when that one's key is gone.
//!
//! It never takes the key from another; only etcd, when a lease ends, or the other itself does.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::sleep;

use super::finder::address;
use super::office::{Claim, Office};
use super::store::{COMMITTED, CONTROLLER, Change, Compare, ENDED, Entry, Lease, Store};
use super::{Failure, environment};
use crate::error::RendezvousError;
use crate::protocol::{Commit, cut};
use crate::record::{RECORD_BYTES_MAX, parse};

/// Between looks of a controller that stands by.
const STANDBY_PAUSE: Duration = Duration::from_millis(500);

/// A lease lasts this part of the deadline: members that have lost a controller look for another for the whole of it.
const LEASE_DIVISOR: u32 = 3;

/// A controller that wants to be in charge of a job.
pub(crate) struct Candidate {
    store: Arc<Store>,
    job: String,
    /// Where members are to come.
    address: String,
}

/// How it went.
pub(crate) enum Campaign {
    /// It is in charge.
    InCharge {
        office: Arc<Office>,
        /// What an earlier controller recorded last.
        last: Option<Commit>,
        /// Told once, when it is not in charge any more.
        deposed: oneshot::Receiver<String>,
    },
    /// The job ended under the controller for which it stood by: in good order without a reason.
    Over(Option<String>),
}

impl Candidate {
    /// For `job`, at the address `url` of etcd. Nothing is sent yet.
    pub(crate) fn new(
        url: &str,
        job: &str,
        address: String,
        deadline: Duration,
    ) -> Result<Self, RendezvousError> {
        let refused = |reason| Failure::Refused(reason).at(url);
        let store = Store::new(url, job, deadline, &environment).map_err(refused)?;
        Ok(Self::of(store, job, address))
    }

    pub(super) fn of(store: Store, job: &str, address: String) -> Self {
        Self { store: Arc::new(store), job: job.to_owned(), address }
    }

    /// Waits until this controller is in charge, or the job is over. `standing_by` is told of every other that is in charge
    /// meanwhile.
    ///
    /// # Errors
    ///
    /// An etcd that is away for the deadline, or refuses; and keys that hold what no controller has written.
    pub(crate) async fn campaign(self, standing_by: impl FnMut(String)) -> Result<Campaign, RendezvousError> {
        let url = self.store.gateway.url().to_owned();
        self.run(standing_by).await.map_err(|failure| failure.at(&url))
    }

    async fn run(self, mut standing_by: impl FnMut(String)) -> Result<Campaign, Failure> {
        let Self { store, job, address: ours } = self;
        let gateway = &store.gateway;
        let mut claimed: Option<Lease> = None;
        let mut stood_by_for = None;
        loop {
            let keys = [CONTROLLER, COMMITTED, ENDED];
            let [controller, committed, ended] = gateway.patiently(|| store.look(keys)).await?;
            let last =
                committed.as_ref().map(|entry| commit(entry, &job, &store.name(COMMITTED))).transpose()?;
            match (controller, claimed) {
                // It is known by its lease, also where the answer to the claim was lost.
                (Some(entry), Some(lease)) if entry.lease == lease.id => {
                    let committed = committed.map_or(0, |entry| entry.modified);
                    let claim = Claim { lease, created: entry.created, committed };
                    let (office, deposed) = Office::take(store, job, claim)?;
                    return Ok(Campaign::InCharge { office, last, deposed });
                }
                (Some(entry), _) => {
                    if stood_by_for.replace(entry.created) != Some(entry.created) {
                        standing_by(address(&entry, &store.name(CONTROLLER))?);
                    }
                    sleep(STANDBY_PAUSE).await;
                }
                (None, _) => {
                    if let (Some(since), Some(ended)) = (stood_by_for, ended)
                        && ended.modified > since
                    {
                        return Ok(Campaign::Over(reason(&ended)));
                    }
                    let ttl = gateway.deadline() / LEASE_DIVISOR;
                    let lease = gateway.patiently(|| store.lease(ttl)).await?;
                    claimed = Some(lease);
                    let put = Change::Put { key: CONTROLLER, value: ours.as_bytes(), lease: lease.id };
                    let free = [Compare::Created(CONTROLLER, 0)];
                    // Whether it was done is seen at the next look.
                    if let Err(Failure::Refused(reason)) =
                        store.change(&free, &[put, Change::Delete(ENDED)]).await
                    {
                        return Err(Failure::Refused(reason));
                    }
                }
            }
        }
    }
}

/// The commit on record, if it is one of this job.
fn commit(entry: &Entry, job: &str, name: &str) -> Result<Commit, Failure> {
    let fits = u64::try_from(entry.value.len()).is_ok_and(|bytes| bytes <= RECORD_BYTES_MAX);
    let text = std::str::from_utf8(&entry.value).ok().filter(|_| fits);
    match text.and_then(parse) {
        Some((of, commit)) if of == job => Ok(commit),
        Some((of, _)) => {
            Err(Failure::Refused(format!("{name} is the record of the job '{of}', not of '{job}'")))
        }
        None => Err(Failure::Refused(format!(
            "{name} is no record of a commit; if you know what every inference rank serves, delete that key"
        ))),
    }
}

/// Why the job ended. Anybody may have written it who can write there.
fn reason(ended: &Entry) -> Option<String> {
    let mut reason = String::from_utf8_lossy(&ended.value).into_owned();
    cut(&mut reason);
    (!reason.is_empty()).then_some(reason)
}
