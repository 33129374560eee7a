//! A member's look at etcd: where is the controller now?

use std::time::Duration;

use super::store::{CONTROLLER, Entry, Store};
use super::{Failure, environment};
use crate::error::RendezvousError;
use crate::locate::host_and_port;

/// Between looks. Thousands of members may look at once, for as long as a lease takes to end.
const PAUSE: Duration = Duration::from_millis(500);

/// An attempt to reach a controller takes at most this part of the deadline: then etcd is asked again.
const ATTEMPT_DIVISOR: u32 = 3;

/// The controller of a job, as etcd knows it.
pub(crate) struct Finder {
    store: Store,
}

impl Finder {
    /// Of `job` at the address `url` of etcd.
    pub(crate) fn new(url: &str, job: &str, deadline: Duration) -> Result<Self, RendezvousError> {
        let refused = |reason| Failure::Refused(reason).at(url);
        Store::new(url, job, deadline, &environment).map(|store| Self { store }).map_err(refused)
    }

    /// Between attempts to reach a controller, and for each.
    pub(crate) fn pace(deadline: Duration) -> (Duration, Duration) {
        (PAUSE, deadline / ATTEMPT_DIVISOR)
    }

    /// Where the controller listens.
    ///
    /// # Errors
    ///
    /// [`RendezvousError::Unreachable`] where there is none at present, or no etcd: that may pass.
    pub(crate) async fn find(&self) -> Result<String, RendezvousError> {
        let (url, name) = (self.store.gateway.url(), self.store.name(CONTROLLER));
        let not_now = |reason: String| RendezvousError::Unreachable {
            address: url.to_owned(),
            waited: self.store.gateway.deadline(),
            reason,
        };
        match self.store.look([CONTROLLER]).await {
            Ok([Some(entry)]) => address(&entry, &name).map_err(|failure| failure.at(url)),
            Ok([None]) => Err(not_now(format!("no controller is in charge ({name} is not there)"))),
            Err(Failure::Away(reason)) => Err(not_now(format!("etcd: {reason}"))),
            Err(refused) => Err(refused.at(url)),
        }
    }
}

/// The address that the key holds, which anybody may have written who can write there.
pub(super) fn address(entry: &Entry, name: &str) -> Result<String, Failure> {
    let address = std::str::from_utf8(&entry.value).ok().filter(|text| host_and_port(text).is_some());
    address.map(str::to_owned).ok_or_else(|| {
        Failure::Refused(format!(
            "{name} holds no HOST:PORT; does something else than weightsync write there?"
        ))
    })
}
