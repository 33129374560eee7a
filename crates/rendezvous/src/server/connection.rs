//! One connection: it proves itself, says who it is, and is then a member's or an observer's until it ends.
//!
//! Until it has proved itself, nothing of it reaches the task that owns the job.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use super::{Input, LINGER_MAX};
use crate::controller::{ConnectionId, Event, Report};
use crate::door::{Door, Place};
use crate::error::RendezvousError;
use crate::frame;
use crate::handshake::{self, Secret};
use crate::protocol::{FRAME_BYTES_MAX, ToController, ToMember};
use crate::refusal::Refusal;
use crate::transport::{self, Transport};

/// A connection proves itself within this time, or goes; sooner where [`Door`] needs its place.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// Messages to one member that may wait for its socket. The protocol has one outstanding at a time, plus heartbeats.
const OUTGOING_MAX: usize = 64;

/// What stands between a connection and the job.
pub(super) struct Entrance<'a> {
    pub(super) secret: &'a Secret,
    pub(super) transport: &'a Transport,
    pub(super) door: &'a Door,
}

/// A connection, from its first byte to its last.
pub(super) struct Connection {
    pub(super) id: ConnectionId,
    pub(super) peer: SocketAddr,
    pub(super) events: mpsc::Sender<Input>,
    /// Room for connections that only watch.
    pub(super) observers: Arc<Semaphore>,
    /// From its proof to its join.
    pub(super) join_max: Duration,
    /// Once it has joined; the plan may raise it.
    pub(super) frame_bytes_max: Arc<AtomicU32>,
}

impl Connection {
    /// Lets it prove itself, and passes on what it says, or answers it if it only watches.
    pub(super) async fn serve(self, stream: TcpStream, entrance: Entrance<'_>, mut place: Place) {
        let Entrance { secret, transport, door } = entrance;
        let proved = async {
            let mut stream = transport.accept(stream, self.peer).await?;
            handshake::accept(&mut stream, self.peer, secret).await.map_err(transport::explained)?;
            Ok::<_, RendezvousError>(stream)
        };
        let proved = tokio::select! {
            proved = timeout(HANDSHAKE_MAX, proved) => proved,
            () = place.turned_away() => {
                let reason = "it had not proved itself, and others needed its place".to_owned();
                return self.refused(door, Refusal::Bound, reason).await;
            }
        };
        drop(place);
        let mut stream = match proved {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return self.refused(door, Refusal::of(&error), error.to_string()).await,
            Err(_) => {
                let reason = format!("it did not prove itself within {HANDSHAKE_MAX:?}");
                return self.refused(door, Refusal::Timeout, reason).await;
            }
        };
        // A member opens and registers its memory before it joins, which takes time.
        let first =
            timeout(self.join_max, frame::read::<ToController>(&mut stream, self.peer, FRAME_BYTES_MAX));
        let first = match first.await {
            Ok(Ok(Some(message))) => message,
            Ok(Ok(None)) => return tracing::debug!(peer = %self.peer, "closed before it joined"),
            Ok(Err(error)) => return self.refused(door, Refusal::of(&error), error.to_string()).await,
            Err(_) => {
                let reason = format!("it did not join within {:?}", self.join_max);
                return self.refused(door, Refusal::Timeout, reason).await;
            }
        };
        if first == ToController::Status {
            return self.watch(&mut stream, door).await;
        }
        let (sender, outgoing) = mpsc::channel(OUTGOING_MAX);
        let (mut read_half, write_half) = tokio::io::split(stream);
        let _ = self.events.send(Input::Opened(self.id, self.peer, sender)).await;
        let _ = self.events.send(Input::Event(Event::Received(self.id, first))).await;
        let bytes_max = || self.frame_bytes_max.load(Ordering::Relaxed);
        let read = async {
            loop {
                match frame::read_bounded(&mut read_half, self.peer, bytes_max).await {
                    Ok(Some(message)) => {
                        let event = Input::Event(Event::Received(self.id, message));
                        if self.events.send(event).await.is_err() {
                            // The job is over; keep reading so that the last message is not lost to a reset.
                            std::future::pending::<()>().await;
                        }
                    }
                    Ok(None) => break "closed".to_owned(),
                    Err(error) => break error.to_string(),
                }
            }
        };
        let reason = tokio::select! {
            reason = read => reason,
            reason = send_all(write_half, outgoing, self.peer) => reason,
        };
        let _ = self.events.send(Input::Event(Event::Disconnected(self.id, reason))).await;
        // Closing a socket with unread bytes resets it, and a reset can overtake our last message.
        let mut sink = [0; 1024];
        let drain = async { while matches!(read_half.read(&mut sink).await, Ok(1..)) {} };
        let _ = timeout(LINGER_MAX, drain).await;
    }

    /// Tells whoever watches that this connection was not let in.
    pub(super) async fn refused(&self, door: &Door, refusal: Refusal, reason: String) {
        door.tell(self.peer, refusal, &reason);
        let peer = self.peer.to_string();
        let _ = self.events.send(Input::Refused(Report::Refused { peer, refusal, reason })).await;
    }
}

/// Sends what comes until the controller closes the queue or the socket fails.
async fn send_all(
    mut to: impl tokio::io::AsyncWrite + Unpin,
    mut outgoing: mpsc::Receiver<ToMember>,
    peer: SocketAddr,
) -> String {
    while let Some(message) = outgoing.recv().await {
        if let Err(error) = frame::write(&mut to, &message, peer, FRAME_BYTES_MAX).await {
            return error.to_string();
        }
    }
    match to.shutdown().await {
        Ok(()) => "closed by the controller".into(),
        Err(error) => io::Error::to_string(&error),
    }
}
