//! Connections that watch: an observer asks what the job does, now and then, and is answered.
//!
//! An observer has proved itself as a member has, but is none, and must not disturb the job: how many there are, how often
//! each is answered and what it may send are bounded.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::Input;
use super::connection::Connection;
use crate::controller::Event;
use crate::door::Door;
use crate::frame;
use crate::protocol::{FRAME_BYTES_MAX, ToController, ToMember};
use crate::refusal::Refusal;

/// Observers at a time: a person at each of a few terminals.
pub(super) const OBSERVERS_MAX: usize = 8;

/// Between two answers to an observer, and per rank of the job so much more: a picture of 65 536 ranks takes the controller
/// some 30 ms, so that 8 observers take a tenth of its time.
const PAUSE: Duration = Duration::from_millis(200);
const PAUSE_PER_RANK: Duration = Duration::from_micros(40);

/// An observer that says nothing for so long is gone; one that is there sends heartbeats.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// Bytes of a frame from an observer: it has nothing to say but that it asks.
const OBSERVER_FRAME_BYTES_MAX: u32 = 64;

impl Connection {
    /// Answers until the observer goes or the job is over.
    pub(super) async fn watch(&self, stream: &mut (impl AsyncRead + AsyncWrite + Unpin), door: &Door) {
        let Ok(_permit) = Arc::clone(&self.observers).try_acquire_owned() else {
            let reason = format!("{OBSERVERS_MAX} observers watch this job already");
            let refused = ToMember::Refused { reason: reason.clone() };
            let _ = frame::write(stream, &refused, self.peer, FRAME_BYTES_MAX).await;
            return self.refused(door, Refusal::Bound, reason).await;
        };
        tracing::debug!(peer = %self.peer, "an observer");
        let (sender, answers) = mpsc::channel(1);
        let _ = self.events.send(Input::Opened(self.id, self.peer, sender)).await;
        let gone = self.answer(stream, answers).await;
        tracing::debug!(peer = %self.peer, reason = gone, "an observer has gone");
        let _ = self.events.send(Input::Event(Event::Disconnected(self.id, gone))).await;
    }

    /// Why it ended.
    async fn answer(
        &self,
        stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
        mut answers: mpsc::Receiver<ToMember>,
    ) -> String {
        loop {
            let asked = Event::Received(self.id, ToController::Status);
            let told = match self.events.send(Input::Event(asked)).await {
                Ok(()) => answers.recv().await,
                Err(_) => None,
            };
            let over = told.is_none();
            let ranks = match &told {
                Some(ToMember::StatusReport(status)) => status.ranks.len() as u32,
                _ => 0,
            };
            let told = told.unwrap_or(ToMember::Finished);
            if let Err(error) = frame::write(stream, &told, self.peer, FRAME_BYTES_MAX).await {
                return error.to_string();
            }
            if over {
                return "the job is over".into();
            }
            sleep(PAUSE + PAUSE_PER_RANK * ranks).await;
            loop {
                let next = frame::read(stream, self.peer, OBSERVER_FRAME_BYTES_MAX);
                match timeout(SILENCE_MAX, next).await {
                    Ok(Ok(Some(ToController::Status))) => break,
                    Ok(Ok(Some(ToController::Heartbeat { .. }))) => {}
                    Ok(Ok(Some(ToController::Leave { .. }) | None)) => return "it left".into(),
                    Ok(Ok(Some(_))) => return "it said what an observer may not".into(),
                    Ok(Err(error)) => return error.to_string(),
                    Err(_) => return format!("nothing was heard from it for {SILENCE_MAX:?}"),
                }
            }
        }
    }
}
