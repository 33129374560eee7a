//! The line to the controller: what both kinds of session say over it, and that it is made anew where the job goes on.
//!
//! A job that ends with a loss ends with a lost connection too. In any other job a session closes its rails, reaches the
//! controller again, be it the old one or one that took its place, and joins again. What is said when is not decided here:
//! that is `rendezvous::member`.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use rendezvous::{Client, ClientConfig, OnLoss, RendezvousError, SessionId, ToController, ToMember};
use tokio::task::JoinHandle;
use xfer_plan::Rank;

use crate::config::SessionConfig;
use crate::error::Error;
use crate::fabric;

/// Pushes that may fail over a rank's own rails before it takes these for dead. The next push tries again what failed once.
pub(crate) const FAILED_MAX: u32 = 2;

/// See the module.
pub(crate) struct Line {
    config: ClientConfig,
    session: SessionId,
    client: Option<Client>,
    /// Under way; a call that is dropped in the middle leaves it to the next.
    connecting: Option<JoinHandle<Result<Client, RendezvousError>>>,
    /// What the controller takes for progress.
    progress: Arc<AtomicU64>,
    /// As the last plan said; before the first nobody counts on this rank.
    pub(crate) on_loss: OnLoss,
    /// The job has ended, or this rank's part in it.
    is_over: bool,
}

impl Line {
    /// Not connected yet.
    ///
    /// # Errors
    ///
    /// When the kernel gives no random bytes.
    pub(crate) fn new(config: &SessionConfig) -> Result<Self, Error> {
        let (config, session, progress) = (config.client(), SessionId::random()?, Arc::default());
        let (client, connecting, on_loss) = (None, None, OnLoss::Fail);
        Ok(Self { config, session, client, connecting, progress, on_loss, is_over: false })
    }

    /// The same over every connection.
    pub(crate) fn session(&self) -> SessionId {
        self.session
    }

    pub(crate) fn progress(&self) -> Arc<AtomicU64> {
        self.progress.clone()
    }

    pub(crate) fn is_open(&self) -> bool {
        self.client.is_some()
    }

    pub(crate) fn is_over(&self) -> bool {
        self.is_over
    }

    /// Reaches the controller, if the line is not open. Returns the address of this end.
    ///
    /// # Errors
    ///
    /// [`Error::Broken`] when the job is over for this rank.
    pub(crate) async fn open(&mut self) -> Result<IpAddr, Error> {
        if self.is_over {
            return Err(Error::Broken);
        }
        if let Some(client) = &self.client {
            return Ok(client.local_addr().ip());
        }
        // What failed while nobody waited may succeed now.
        if let Some(connecting) = self.connecting.take_if(|connecting| connecting.is_finished())
            && let Ok(Ok(client)) = connecting.await
        {
            return Ok(self.client.insert(client).local_addr().ip());
        }
        let connecting = self.connecting.get_or_insert_with(|| {
            tokio::spawn(Client::connect_counting(self.config.clone(), self.progress.clone()))
        });
        let connected = connecting.await;
        self.connecting = None;
        let client = connected.map_err(|error| std::io::Error::other(error.to_string()))??;
        Ok(self.client.insert(client).local_addr().ip())
    }

    /// A connection may be dead for good though its link is back, and a rail that was given up is not used again. So in a job
    /// that survives it a rank hangs up between pushes, of which `failed` in a row failed over its own rails, to join again with
    /// fresh ones; but not before these can be had.
    pub(crate) async fn give_up_dead_rails(
        &mut self,
        (config, rank): (&SessionConfig, Rank),
        failed: u32,
    ) -> Result<(), Error> {
        if failed < FAILED_MAX || self.on_loss == OnLoss::Fail || !self.is_open() {
            return Ok(());
        }
        let local = self.open().await?;
        if fabric::open(config, config.bind.unwrap_or(local)).is_ok() {
            tracing::warn!(%rank, failed, "pushes fail over its own rails: joining again with fresh ones");
            self.hang_up();
        }
        Ok(())
    }

    /// Hangs up without a word. The controller takes it for a loss.
    pub(crate) fn hang_up(&mut self) {
        self.client = None;
    }

    /// Says something. What is said over a line that is lost counts for nothing.
    pub(crate) fn send(&self, message: ToController) -> Result<(), Error> {
        match &self.client {
            Some(client) => Ok(client.send(message)?),
            None => Ok(()),
        }
    }

    /// Says what the protocol has this rank say.
    ///
    /// # Errors
    ///
    /// [`Error::Broken`] where it has nothing to say: an earlier call ended in the middle.
    pub(crate) fn say(&self, message: Option<ToController>) -> Result<(), Error> {
        self.send(message.ok_or(Error::Broken)?)
    }

    /// What the controller says next. `None`: the line is lost, and the job waits for this rank to join again. `stage` is what
    /// it waits for, for errors.
    pub(crate) async fn receive(&mut self, stage: &'static str) -> Result<Option<ToMember>, Error> {
        let Some(client) = &mut self.client else { return Ok(None) };
        match client.receive(stage).await {
            Ok(message) => Ok(Some(message)),
            Err(error) => {
                // Whatever it is, nothing more comes.
                self.client = None;
                if self.on_loss == OnLoss::Fail || matches!(error, RendezvousError::Refused { .. }) {
                    self.is_over = true;
                    return Err(error.into());
                }
                tracing::warn!(%error, "joining again");
                Ok(None)
            }
        }
    }

    /// Says goodbye, for good; with a reason, why this rank's part in the job is over.
    pub(crate) async fn leave(&mut self, reason: Option<String>) {
        self.is_over = true;
        if let Some(client) = self.client.take() {
            client.leave(reason).await;
        }
    }

    /// Says why this rank cannot go on, and hangs up.
    pub(crate) async fn give_up(&mut self, reason: String) {
        self.is_over = self.on_loss == OnLoss::Fail;
        if let Some(client) = self.client.take() {
            client.leave(Some(reason)).await;
        }
    }
}

/// The controller has this rank do something else than what it waited for.
pub(crate) fn out_of_turn(expected: &'static str) -> Error {
    let found = "a message out of turn".to_owned();
    Error::Rendezvous(RendezvousError::Unexpected { expected, found })
}
