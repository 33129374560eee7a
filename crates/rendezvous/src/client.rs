//! A member's connection to the controller.
//!
//! It lives on a thread of its own, so that heartbeats go out while the process computes, holds an interpreter lock or
//! blocks its async runtime: silence then means what it should mean. The thread ends when the [`Client`] is dropped.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout, timeout_at};

use crate::controller::heartbeat_interval;
use crate::error::RendezvousError;
use crate::frame;
use crate::handshake::{self, Secret};
use crate::locate::Locator;
use crate::protocol::{DEADLINE_RANGE, FRAME_BYTES_MAX, ToController, ToMember};
use crate::transport::{self, Stream, Transport};

/// Messages that may wait on either side; the protocol has one outstanding at a time.
const QUEUE_MAX: usize = 64;

/// For who always hangs up.
const CHECK: &str = "check the address and port, and that both sides or neither have TLS";

/// How long a goodbye may take.
const LINGER_MAX: Duration = Duration::from_secs(2);

/// Where the controller is and how long to wait for it.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// `host:port`; or, with the feature `etcd`, where in etcd the controller says it: `etcd://host:2379/prefix`. Then every
    /// attempt to reach it looks there first, with the user, password and certificates that [`crate::Record::Etcd`] tells of.
    pub controller: String,
    /// The job's name, by which etcd knows it.
    pub job: String,
    /// The job's secret.
    pub secret: Secret,
    /// How bytes travel; as the controller says.
    pub transport: Transport,
    /// How long to try to reach it, and the longest silence of it.
    pub deadline: Duration,
}

/// An authenticated connection to the controller.
pub struct Client {
    incoming: mpsc::Receiver<Result<ToMember, RendezvousError>>,
    outgoing: mpsc::Sender<ToController>,
    peer: SocketAddr,
    local: SocketAddr,
}

impl Client {
    /// Reaches the controller, retrying until the deadline, and proves itself.
    pub async fn connect(config: ClientConfig) -> Result<Self, RendezvousError> {
        Self::connect_counting(config, Arc::default()).await
    }

    /// As [`Client::connect`], with the counter that heartbeats report as this rank's progress in bytes.
    pub async fn connect_counting(
        config: ClientConfig,
        progress: Arc<AtomicU64>,
    ) -> Result<Self, RendezvousError> {
        if !DEADLINE_RANGE.contains(&config.deadline) {
            let reason = format!("a deadline of {:?} is not within {DEADLINE_RANGE:?}", config.deadline);
            return Err(RendezvousError::Refused { reason });
        }
        let (opened_in, opened) = oneshot::channel();
        let (incoming_in, incoming) = mpsc::channel(QUEUE_MAX);
        let (outgoing, outgoing_out) = mpsc::channel(QUEUE_MAX);
        let lost = |reason: String| RendezvousError::Unreachable {
            address: config.controller.clone(),
            waited: Duration::ZERO,
            reason,
        };
        let link = Link { incoming: incoming_in, outgoing: outgoing_out, progress, config: config.clone() };
        let spawned = std::thread::Builder::new().name("rendezvous".into()).spawn(move || {
            match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime.block_on(link.run(opened_in)),
                Err(error) => tracing::error!(%error, "no runtime for the control connection"),
            }
        });
        spawned.map_err(|error| lost(error.to_string()))?;
        let (peer, local) = opened.await.map_err(|_| lost("its thread ended".into()))??;
        Ok(Self { incoming, outgoing, peer, local })
    }

    /// The address of this end: the interface that reaches the controller.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Queues a message to be sent. Never waits. That the connection has ended is told by [`Client::receive`], after
    /// what the controller said last: the reason is worth more than the fact.
    pub fn send(&self, message: ToController) -> Result<(), RendezvousError> {
        match self.outgoing.try_send(message.bounded()) {
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => Err(RendezvousError::Lost {
                peer: self.peer,
                stage: "room for a message",
                reason: "it does not read its messages".into(),
            }),
        }
    }

    /// The next message, heartbeats left out. It never waits for longer than the controller's own deadlines: a
    /// controller that falls silent is an error. `stage` is what the caller waits for, for that error.
    pub async fn receive(&mut self, stage: &'static str) -> Result<ToMember, RendezvousError> {
        match self.incoming.recv().await {
            Some(Ok(ToMember::Refused { reason })) => Err(RendezvousError::Refused { reason }),
            Some(Ok(message)) => Ok(message),
            Some(Err(RendezvousError::Lost { peer, reason, .. })) => {
                Err(RendezvousError::Lost { peer, stage, reason })
            }
            Some(Err(RendezvousError::Deadline { peer, waited, .. })) => {
                Err(RendezvousError::Deadline { peer, stage, waited })
            }
            Some(Err(error)) => Err(error),
            None => Err(RendezvousError::Lost {
                peer: self.peer,
                stage,
                reason: "the connection has ended".into(),
            }),
        }
    }

    /// Says goodbye and waits until it has been sent or the deadline has passed.
    pub async fn leave(mut self, reason: Option<String>) {
        let _ = self.send(ToController::Leave { reason });
        let Self { outgoing, incoming, .. } = &mut self;
        *outgoing = mpsc::channel(1).0;
        // The thread drops its end when the socket is done.
        let _ = timeout(LINGER_MAX, async { while incoming.recv().await.is_some() {} }).await;
    }
}

/// The thread's side.
struct Link {
    incoming: mpsc::Sender<Result<ToMember, RendezvousError>>,
    outgoing: mpsc::Receiver<ToController>,
    progress: Arc<AtomicU64>,
    config: ClientConfig,
}

type Opened = Result<(SocketAddr, SocketAddr), RendezvousError>;

impl Link {
    async fn run(self, opened: oneshot::Sender<Opened>) {
        let (stream, peer) = match self.open().await {
            Ok((stream, peer, local)) => {
                if opened.send(Ok((peer, local))).is_err() {
                    return;
                }
                (stream, peer)
            }
            Err(error) => {
                let _ = opened.send(Err(error));
                return;
            }
        };
        let Self { incoming, outgoing, progress, config } = self;
        let (reader, writer) = tokio::io::split(stream);
        let joined = AtomicBool::new(false);
        let mut reading = std::pin::pin!(read_all(reader, peer, config.deadline, &joined, &incoming));
        tokio::select! {
            () = &mut reading => {}
            written = write_all(writer, peer, config.deadline, outgoing, &joined, &progress) => {
                // Closing a socket with unread bytes resets it, and a reset can overtake our goodbye. And where it was
                // the controller that hung up, its last message says why.
                let _ = timeout(LINGER_MAX, reading).await;
                if let Err(error) = written {
                    let _ = incoming.send(Err(lost(peer, &error.to_string()))).await;
                }
            }
        }
    }

    /// Tries until it is in, is refused, or has no time left. A controller that is not up yet is tried again, and so is one
    /// that hung up in the middle: it does so when more come at once than it can hear.
    async fn open(&self) -> Result<(Stream, SocketAddr, SocketAddr), RendezvousError> {
        let ClientConfig { controller, job, deadline, .. } = &self.config;
        let until = Instant::now() + *deadline;
        let locator = Locator::new(controller, (job, *deadline))?;
        let (pause, attempt_max) = locator.pace(*deadline);
        let mut reached = false;
        loop {
            let attempt_until = until.min(Instant::now() + attempt_max);
            let reason = match timeout_at(attempt_until, self.attempt(&locator, &mut reached)).await {
                Ok(Err(RendezvousError::Unreachable { reason, .. })) => reason,
                Ok(Err(RendezvousError::Io { source, .. })) if handshake::is_hang_up(&source) => {
                    format!("it hung up during the handshake ({source}); its log may say why; {CHECK}")
                }
                Ok(done) => return done,
                Err(_) if reached => {
                    format!("it took the connection and did not answer; is it stopped? {CHECK}")
                }
                Err(_) => "no answer".into(),
            };
            if Instant::now() + pause > until {
                return Err(self.unreachable(reason));
            }
            sleep(pause).await;
        }
    }

    /// Finds the controller, connects and proves itself, once. `reached` where somebody took the connection.
    async fn attempt(
        &self,
        locator: &Locator,
        reached: &mut bool,
    ) -> Result<(Stream, SocketAddr, SocketAddr), RendezvousError> {
        let ClientConfig { controller, secret, transport, .. } = &self.config;
        *reached = false;
        let address = &locator.find().await?;
        let unreachable = |error: io::Error| match address == controller {
            true => self.unreachable(error.to_string()),
            false => self.unreachable(format!("it is at {address}, and there: {error}")),
        };
        let stream = TcpStream::connect(address).await.map_err(unreachable)?;
        let peer = stream.peer_addr().map_err(unreachable)?;
        let local = stream.local_addr().map_err(unreachable)?;
        *reached = true;
        let mut stream = transport.connect(stream, peer, address).await?;
        handshake::prove(&mut stream, peer, secret).await.map_err(transport::explained)?;
        Ok((stream, peer, local))
    }

    fn unreachable(&self, reason: String) -> RendezvousError {
        let ClientConfig { controller, deadline, .. } = &self.config;
        RendezvousError::Unreachable { address: controller.clone(), waited: *deadline, reason }
    }
}

fn lost(peer: SocketAddr, reason: &str) -> RendezvousError {
    RendezvousError::Lost { peer, stage: "a message", reason: reason.into() }
}

/// Forwards what comes, until the connection ends or falls silent.
async fn read_all(
    mut from: impl tokio::io::AsyncRead + Unpin,
    peer: SocketAddr,
    silence_max: Duration,
    joined: &AtomicBool,
    incoming: &mpsc::Sender<Result<ToMember, RendezvousError>>,
) {
    loop {
        let received = timeout(silence_max, frame::read(&mut from, peer, FRAME_BYTES_MAX)).await;
        let (message, last) = match received {
            Ok(Ok(Some(ToMember::Heartbeat))) => continue,
            Ok(Ok(Some(message))) => (Ok(message), false),
            Ok(Ok(None)) => (Err(lost(peer, "it closed the connection; its log says why")), true),
            Ok(Err(error)) => (Err(lost(peer, &error.to_string())), true),
            // The controller says nothing to those who have not joined.
            Err(_) if !joined.load(Ordering::Relaxed) => continue,
            Err(_) => {
                (Err(RendezvousError::Deadline { peer, stage: "a sign of life", waited: silence_max }), true)
            }
        };
        if incoming.send(message).await.is_err() || last {
            return;
        }
    }
}

/// Sends what is asked for, and heartbeats, until the client is dropped.
async fn write_all(
    mut to: impl tokio::io::AsyncWrite + Unpin,
    peer: SocketAddr,
    deadline: Duration,
    mut outgoing: mpsc::Receiver<ToController>,
    joined: &AtomicBool,
    progress: &AtomicU64,
) -> Result<(), RendezvousError> {
    let mut beats = interval(heartbeat_interval(deadline));
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let message = tokio::select! {
            message = outgoing.recv() => match message {
                Some(message) => message,
                None => break,
            },
            // The controller hears a join before anything else.
            _ = beats.tick(), if joined.load(Ordering::Relaxed) => {
                ToController::Heartbeat { progress: progress.load(Ordering::Relaxed) }
            }
        };
        frame::write(&mut to, &message, peer, FRAME_BYTES_MAX).await?;
        joined.store(true, Ordering::Relaxed);
    }
    to.shutdown().await.map_err(|source| RendezvousError::Io { peer, source })
}
