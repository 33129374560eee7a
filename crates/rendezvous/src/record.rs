//! Where a job's commits are recorded, so that they outlive the controller: nowhere, in a file, or in etcd.
//!
//! A commit that could not be recorded is never reported as one that was.

use std::net::SocketAddr;
use std::path::PathBuf;
#[cfg(feature = "etcd")]
use std::sync::Arc;

use tokio::sync::oneshot;
use xfer_plan::Rank;

use crate::controller::{ControllerConfig, Report};
use crate::error::RendezvousError;
#[cfg(feature = "etcd")]
use crate::etcd::{Campaign, Candidate, Office};
use crate::protocol::{Commit, Join};

mod file;

pub use file::RecordFile;
#[cfg(feature = "etcd")]
pub(crate) use file::{RECORD_BYTES_MAX, parse, text};

/// Where to record commits. What is there already is where the job goes on.
#[derive(Debug, Clone, Default)]
pub enum Record {
    /// Nowhere: a controller that comes back knows what its members know.
    #[default]
    Nowhere,
    /// In a file that is replaced whole, on a disk that outlives the controller.
    File(PathBuf),
    /// In etcd, and there also where the controller listens: one that finds another in charge stands by, and takes over when
    /// that one is gone. Needs the feature `etcd`.
    ///
    /// User and password are those of `WEIGHTSYNC_ETCD_USER` and `WEIGHTSYNC_ETCD_PASSWORD`; for `etcds://` `WEIGHTSYNC_ETCD_CA` is
    /// a PEM file with the authority of etcd's certificate, and where etcd asks for one of ours, `WEIGHTSYNC_ETCD_CERT` and
    /// `WEIGHTSYNC_ETCD_KEY`.
    Etcd {
        /// `etcd://host:2379/prefix`; several servers as `host:port,host:port`; `etcds://` for TLS.
        url: String,
        /// `host:port` where members reach this controller; port 0 is the one on which it listens. `None` takes the address on
        /// which it listens, if that is one.
        advertise: Option<String>,
    },
}

/// A place for commits that has been looked at.
pub(crate) enum Opened {
    /// Ready, and what was in it.
    Ready(Records, Option<Commit>),
    /// Others may be in charge of it.
    #[cfg(feature = "etcd")]
    Contested(Candidate),
}

/// A place for commits.
#[derive(Clone)]
pub(crate) enum Records {
    Nowhere,
    File(RecordFile),
    #[cfg(feature = "etcd")]
    Etcd(Arc<Office>),
}

/// Why a commit is not on record.
pub(crate) enum NotRecorded {
    /// It could not be written.
    Failed(String),
    /// It is not for this controller to do any more, or may not be: another one knows.
    #[cfg(feature = "etcd")]
    Deposed(String),
}

/// Tells once that this controller is not in charge any more.
pub(crate) struct Deposed(Option<oneshot::Receiver<String>>);

/// Whether there is anything to serve.
pub(crate) enum Charge {
    /// This controller is in charge.
    Taken(Records, Option<Commit>, Deposed),
    /// The job is over: in good order without a reason.
    Over(Option<String>),
}

impl Record {
    /// Opens the record of this job, for a controller that listens at `local`.
    pub(crate) fn open(self, job: &ControllerConfig, local: SocketAddr) -> Result<Opened, RendezvousError> {
        match self {
            Self::Nowhere => Ok(Opened::Ready(Records::Nowhere, None)),
            Self::File(path) => {
                let (file, last) = RecordFile::open(path, &job.job)?;
                Ok(Opened::Ready(Records::File(file), last))
            }
            #[cfg(feature = "etcd")]
            Self::Etcd { url, advertise } => {
                let refused = |reason| RendezvousError::Advertise { reason };
                let address = advertised(advertise.as_deref(), local).map_err(refused)?;
                Candidate::new(&url, &job.job, address, job.deadline).map(Opened::Contested)
            }
            #[cfg(not(feature = "etcd"))]
            Self::Etcd { url, .. } => {
                let _ = local;
                Err(crate::locate::no_etcd(&url))
            }
        }
    }
}

impl Opened {
    /// Waits until this controller is in charge. Reports who is meanwhile, and that it is.
    pub(crate) async fn take_charge(
        self,
        #[cfg_attr(not(feature = "etcd"), allow(unused_variables, unused_mut))] // there is nobody else
        mut report: impl FnMut(Report),
    ) -> Result<Charge, RendezvousError> {
        match self {
            Self::Ready(records, last) => Ok(Charge::Taken(records, last, Deposed(None))),
            #[cfg(feature = "etcd")]
            Self::Contested(candidate) => {
                match candidate.campaign(|holder| report(Report::StandingBy { holder })).await? {
                    Campaign::Over(reason) => Ok(Charge::Over(reason)),
                    Campaign::InCharge { office, last, deposed } => {
                        report(Report::InCharge { version: last.map(|commit| commit.version) });
                        Ok(Charge::Taken(Records::Etcd(office), last, Deposed(Some(deposed))))
                    }
                }
            }
        }
    }
}

impl Records {
    /// Records a decision, off the threads that serve sockets.
    pub(crate) async fn store(&self, commit: Commit) -> Result<(), NotRecorded> {
        match self {
            Self::Nowhere => Ok(()),
            Self::File(file) => {
                let file = file.clone();
                let stored = tokio::task::spawn_blocking(move || file.store(commit)).await;
                stored
                    .map_err(std::io::Error::other)
                    .flatten()
                    .map_err(|error| NotRecorded::Failed(error.to_string()))
            }
            #[cfg(feature = "etcd")]
            Self::Etcd(office) => office.store(commit).await.map_err(NotRecorded::Deposed),
        }
    }

    /// What others may be told of a member that asks to join from `peer`.
    pub(crate) fn entry(&self, join: &Join, peer: SocketAddr) -> Option<(Rank, String)> {
        #[cfg(feature = "etcd")]
        if let Self::Etcd(_) = self {
            let manifest = postcard::to_allocvec(&join.manifest).ok()?;
            return Some((join.member, format!("{peer} {}", blake3::hash(&manifest))));
        }
        let _ = (join, peer);
        None
    }

    /// Who is in the job, as far as a report says; `joining` is the entry of the member whose request led to it.
    pub(crate) fn note(&self, report: &Report, joining: Option<&(Rank, String)>) {
        #[cfg(feature = "etcd")]
        if let Self::Etcd(office) = self {
            match (report, joining) {
                (Report::Joined(rank), Some((member, entry))) if rank == member => {
                    office.member(*rank, Some(entry.clone()));
                }
                (Report::Left(rank) | Report::Lost { rank, .. }, _) => office.member(*rank, None),
                _ => {}
            }
        }
        let _ = (report, joining);
    }

    /// The job is over: nobody need take over.
    pub(crate) async fn finish(&self, reason: Option<&str>) {
        #[cfg(feature = "etcd")]
        if let Self::Etcd(office) = self {
            office.finish(reason).await;
        }
        let _ = reason;
    }
}

impl Deposed {
    /// Why this controller is not in charge any more; never, where nobody else can be.
    pub(crate) async fn told(&mut self) -> String {
        match &mut self.0 {
            None => std::future::pending().await,
            Some(told) => told.await.unwrap_or_else(|_| "the thread that keeps its lease has failed".into()),
        }
    }
}

/// Where members are told to come.
#[cfg(feature = "etcd")]
fn advertised(advertise: Option<&str>, local: SocketAddr) -> Result<String, String> {
    let address = match advertise {
        Some(address) => match address.strip_suffix(":0") {
            Some(host) => format!("{host}:{}", local.port()),
            None => address.to_owned(),
        },
        None => local.to_string(),
    };
    match crate::locate::host_and_port(&address) {
        Some(_) => Ok(address),
        None => Err(format!("members cannot be told to come to '{address}'")),
    }
}

#[cfg(all(test, feature = "etcd"))]
mod tests {
    use super::*;

    #[test]
    fn members_are_told_an_address_or_the_controller_does_not_start() {
        let any: SocketAddr = "0.0.0.0:7070".parse().unwrap();
        let one: SocketAddr = "10.0.0.1:7070".parse().unwrap();
        for (advertise, local, address) in [
            (None, one, Some("10.0.0.1:7070")),
            (None, any, None),
            (None, "[::]:1".parse().unwrap(), None),
            (Some("node7:0"), any, Some("node7:7070")),
            (Some("node7:17070"), any, Some("node7:17070")),
            (Some("[fe80::1]:0"), any, Some("[fe80::1]:7070")),
            (Some("node7"), any, None),
            (Some("0.0.0.0:0"), one, None),
        ] {
            assert_eq!(advertised(advertise, local).ok().as_deref(), address, "{advertise:?} {local}");
        }
    }
}
