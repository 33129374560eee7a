//! What an inference rank does beside receiving, where the plan has it pass on what arrives: from the plan to rails, and in each
//! push from its beginning to a word to the controller.
//!
//! Every step leaves its result with the session, as in `joining`.

use std::sync::{Arc, Mutex, PoisonError};

use rendezvous::status::{RAILS_TOLD_MAX, RailStatus};
use rendezvous::{Bank, OnLoss, PushId, ToController, ToMember};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use xfer_exec::Failure;

use super::InferenceSession;
use crate::connect::PassingOn;
use crate::error::Error;
use crate::line::FAILED_MAX;
use crate::pusher::Written;
use crate::relay::Relay;
use crate::report::{RailReport, RelayReport};
use crate::verify::Summed;

const NOT_HASHED: &str = "defect: what it passed on could not be hashed";

const THREAD_ENDED: &str = "defect: the thread that passes on has ended";

const CLOSED: &str = "this rank closes its rails";

/// How far the rails are over which this rank passes on.
pub(super) enum Onward {
    /// It passes nothing on.
    Nothing,
    Connecting(JoinHandle<Result<Relay, Error>>),
    /// Somebody cannot be reached, and the controller may find that out too: until when that is waited for.
    Stuck(Error, Instant),
    Connected(Relay),
    Closing(JoinHandle<()>),
}

/// A push of which this rank passes a part on: what became of it, once the bell has rung. It rings also where that is never said.
#[derive(Default)]
pub(super) struct PushOnward {
    written: Mutex<Option<Written>>,
    bell: Notify,
}

/// On the thread that passes on, for as long as it may still say something.
struct Bell(Arc<PushOnward>);

impl Drop for Bell {
    fn drop(&mut self) {
        self.0.bell.notify_one();
    }
}

impl PushOnward {
    /// Waits until it is over; for ever where there is none.
    pub(super) async fn over(this: Option<Arc<Self>>) {
        match this {
            Some(this) => this.bell.notified().await,
            None => std::future::pending().await,
        }
    }
}

impl InferenceSession {
    /// Begins to connect to those that this rank passes on to.
    pub(super) fn connect_onward(&mut self, passing: PassingOn) {
        self.onward = Onward::Connecting(tokio::task::spawn_blocking(move || passing.connect()));
    }

    /// Says that this rank is ready once it is connected. Whether anything has changed.
    pub(super) async fn connected_onward(&mut self) -> Result<bool, Error> {
        let Onward::Connecting(connecting) = &mut self.onward else { return Ok(false) };
        let connected = connecting.await;
        self.onward = Onward::Nothing;
        match connected.map_err(|error| std::io::Error::other(error.to_string()))? {
            Ok(relay) => {
                self.onward = Onward::Connected(relay);
                self.line.say(self.member.ready())?;
            }
            // A peer that is lost cannot be connected to. Where the job goes on, the controller finds that too and says so.
            Err(error) if self.line.on_loss != OnLoss::Fail => {
                tracing::warn!(rank = %self.rank(), %error, "not connected");
                self.onward = Onward::Stuck(error, Instant::now() + self.config.deadline / 2);
            }
            Err(error) => {
                self.line.give_up(error.to_string()).await;
                return Err(error);
            }
        }
        Ok(true)
    }

    /// What the controller says next.
    pub(super) async fn receive(&mut self, stage: &'static str) -> Result<Option<ToMember>, Error> {
        let Onward::Stuck(_, until) = &self.onward else { return self.line.receive(stage).await };
        if let Ok(message) = tokio::time::timeout_at(*until, self.line.receive(stage)).await {
            return message;
        }
        let Onward::Stuck(error, _) = std::mem::replace(&mut self.onward, Onward::Nothing) else {
            return Ok(None);
        };
        self.line.give_up(error.to_string()).await;
        Err(error)
    }

    /// Begins to pass on what arrives in a push, if the plan has this rank do so.
    pub(super) fn pass_on(&mut self, push: PushId, bank: Bank) -> Result<(), String> {
        let Onward::Connected(relay) = &self.onward else { return Ok(()) };
        // What an attempt that was given up has told by now, and what waits to be read of it, counts for nothing.
        self.exposed.settle()?;
        let onward = Arc::new(PushOnward::default());
        let bell = Bell(Arc::clone(&onward));
        let began = relay.start(push, bank, self.arenas.written(), move |written| {
            *bell.0.written.lock().unwrap_or_else(PoisonError::into_inner) = Some(written);
        });
        if !began {
            self.failed_onward = FAILED_MAX;
            return Err(THREAD_ENDED.into());
        }
        self.push_onward = Some(onward);
        Ok(())
    }

    /// Stops passing on, if it does. How that ends is told as any end is.
    pub(super) fn stop_passing_on(&self, reason: &str) {
        if let (Onward::Connected(relay), Some(_)) = (&self.onward, &self.push_onward) {
            relay.abort(reason.to_owned());
        }
    }

    /// What this rank has passed on is over: tells it.
    pub(super) fn passed_on(&mut self) -> Result<(), Error> {
        let Some(onward) = self.push_onward.take() else { return Ok(()) };
        let written = onward.written.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Onward::Connected(relay) = &self.onward else { return Ok(()) };
        let Some(Written { result, timings, rails, summed }) = written else {
            self.failed_onward = FAILED_MAX;
            let message = self.member.relayed(Err(THREAD_ENDED.into()), Vec::new(), Vec::new());
            return message.map_or(Ok(()), |message| self.line.send(message));
        };
        match &result {
            Ok(_) => self.failed_onward = 0,
            // Not by what this rank did.
            Err(Failure::Aborted(_)) => {}
            Err(_) => self.failed_onward += 1,
        }
        let (sums, verified) = summed.map(|Summed { sums, report }| (sums, report)).unzip();
        let seconds = timings.total.as_secs_f64();
        let used = relay.rails(&rails);
        self.watch.rails(used.clone(), result.as_ref().map_or(0, |delivered| delivered.refusals));
        let told = used.clone().take(RAILS_TOLD_MAX);
        let told = told.map(|(name, used)| RailStatus::new(name, used.bytes, seconds, used.closed.is_none()));
        // A queue without room is met again by what has to be said.
        let _ = self.line.send(ToController::Rails { rails: told.collect() });
        let fences = relay.fences(&rails);
        let result = match result {
            Ok(_) if relay.hashes() && sums.is_none() => Err(NOT_HASHED.into()),
            Ok(delivered) => Ok((delivered.bytes, delivered.writes)),
            Err(failure) => Err(failure.to_string()),
        };
        if let (Some(push), Ok((bytes, writes))) = (&mut self.push, &result) {
            let rails = used.map(|(name, used)| RailReport::new(name, used.clone())).collect();
            push.passed_on = Some(RelayReport { bytes: *bytes, writes: *writes, seconds, rails, verified });
        }
        let message = self.member.relayed(result, fences, sums.unwrap_or_default());
        message.map_or(Ok(()), |message| self.line.send(message))
    }

    /// Once this returns, nothing of this rank is on its way to others.
    pub(super) async fn close_onward(&mut self) {
        self.push_onward = None;
        loop {
            match std::mem::replace(&mut self.onward, Onward::Nothing) {
                Onward::Nothing | Onward::Stuck(..) => return,
                Onward::Connected(relay) => {
                    relay.abort(CLOSED.into());
                    self.onward = Onward::Closing(tokio::task::spawn_blocking(move || relay.close()));
                }
                Onward::Connecting(connecting) => {
                    // It ends within the deadline, and with it what it has connected.
                    let closing = async move {
                        if let Ok(Ok(relay)) = connecting.await {
                            let _ = tokio::task::spawn_blocking(move || relay.close()).await;
                        }
                    };
                    self.onward = Onward::Closing(tokio::spawn(closing));
                }
                closing @ Onward::Closing(_) => {
                    self.onward = closing;
                    if let Onward::Closing(closing) = &mut self.onward {
                        let _ = closing.await;
                    }
                    self.onward = Onward::Nothing;
                }
            }
        }
    }
}
