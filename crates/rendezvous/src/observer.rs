//! Asking a running controller what its job does, without being part of it.
//!
//! An observer's connection is a member's, with the same handshake, but says nothing other than that it asks.

use crate::client::{Client, ClientConfig};
use crate::error::RendezvousError;
use crate::protocol::{ToController, ToMember};
use crate::status::Status;

/// A connection to a controller that watches its job.
pub struct Observer {
    client: Client,
}

impl Observer {
    /// Reaches the controller and proves itself, within the deadline of `config`; no answer takes longer than that either.
    /// Ask at least that often: a connection on which nothing is heard for as long is taken for lost.
    ///
    /// # Errors
    ///
    /// As for [`Client::connect`].
    pub async fn connect(config: ClientConfig) -> Result<Self, RendezvousError> {
        Ok(Self { client: Client::connect(config).await? })
    }

    /// What the job does now; `None` once it is over. The controller takes its time for the next answer: some five in a
    /// second, fewer for a job of thousands of ranks.
    ///
    /// # Errors
    ///
    /// [`RendezvousError::Refused`] where too many watch already, and what else a lost connection says.
    pub async fn status(&mut self) -> Result<Option<Status>, RendezvousError> {
        self.client.send(ToController::Status)?;
        match self.client.receive("the status of the job").await? {
            ToMember::StatusReport(status) => Ok(Some(*status)),
            ToMember::Finished => Ok(None),
            other => Err(RendezvousError::Unexpected {
                expected: "the status of the job",
                found: other.name().to_owned(),
            }),
        }
    }
}
