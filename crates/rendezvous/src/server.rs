//! The controller's sockets: accepts connections, lets them prove themselves, and feeds the state machine.
//!
//! A connection costs little until it has proved itself: their number, the bytes that they may send and the time that
//! they may take are bounded. After that its messages go through one queue into the one task that owns the
//! [`Controller`].

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use xfer_plan::PlanOptions;

use crate::controller::{Action, ConnectionId, Controller, ControllerConfig, Event, Report};
use crate::door::{Door, Place};
use crate::error::RendezvousError;
use crate::frame;
use crate::handshake::{self, Secret, random_seed};
use crate::protocol::{
    Commit, DEADLINE_DEFAULT, FRAME_BYTES_MAX, JOB_DEFAULT, MEMBER_FRAME_BYTES_MAX, OnLoss, ToController,
    ToMember, World,
};
use crate::record::RecordFile;
use crate::refusal::Refusal;
use crate::transport::{self, Transport};
use crate::verify::Verify;

mod log;
mod watching;

/// A connection proves itself within this time, or goes; sooner where [`Door`] needs its place.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// Messages to one member that may wait for its socket. The protocol has one outstanding at a time, plus heartbeats.
const OUTGOING_MAX: usize = 64;

/// Events that may wait for the state machine; senders wait when it is full.
const EVENTS_MAX: usize = 4096;

/// How long a closed connection may take to read our last message.
const LINGER_MAX: Duration = Duration::from_secs(2);

/// Where and for whom to run a controller.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// `host:port`; port 0 takes a free one.
    pub listen: String,
    /// What members must know.
    pub secret: Secret,
    /// How bytes travel; as the members say.
    pub transport: Transport,
    /// Allow to have neither a secret nor TLS on an address that other hosts can reach.
    pub insecure: bool,
    /// The job.
    pub controller: ControllerConfig,
    /// Where to record commits, so that they outlive this process: what is there already is where the job goes on. `None`
    /// records nothing; a controller that comes back then knows what its members know.
    pub record: Option<PathBuf>,
}

impl ServerConfig {
    /// A job of `world` ranks on a free port of the loopback interface: no secret, default name, deadline and plan
    /// options. The start of other configurations.
    ///
    /// # Errors
    ///
    /// When the kernel gives no random bytes for the push ids.
    pub fn loopback(world: World) -> Result<Self, RendezvousError> {
        let controller = ControllerConfig {
            job: JOB_DEFAULT.to_owned(),
            world,
            deadline: DEADLINE_DEFAULT,
            options: PlanOptions::default(),
            relays: false,
            verify: Verify::Off,
            on_loss: OnLoss::default(),
            resume: None,
            seed: random_seed()?,
        };
        Ok(Self {
            listen: "127.0.0.1:0".to_owned(),
            secret: Secret::none(),
            transport: Transport::tcp(),
            insecure: false,
            controller,
            record: None,
        })
    }
}

/// A controller that listens.
pub struct Server {
    listener: TcpListener,
    local: SocketAddr,
    secret: Secret,
    transport: Transport,
    controller: Controller,
    record: Option<RecordFile>,
}

/// A controller that runs in the background of this process; dropping it ends the job.
pub struct ServerHandle {
    local: SocketAddr,
    task: tokio::task::JoinHandle<Option<String>>,
}

impl ServerHandle {
    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Waits for the job's end: `None` in good order, otherwise the reason.
    pub async fn ended(mut self) -> Option<String> {
        match (&mut self.task).await {
            Ok(reason) => reason,
            Err(error) => Some(format!("the controller's task failed: {error}")),
        }
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    /// Listens. Nothing is accepted before [`Server::run`].
    pub async fn bind(mut config: ServerConfig) -> Result<Self, RendezvousError> {
        let mut record = None;
        if let Some(path) = config.record {
            let (file, last) = RecordFile::open(path, &config.controller.job)?;
            (record, config.controller.resume) = (Some(file), last.or(config.controller.resume));
        }
        let bind = |source| RendezvousError::Bind { address: config.listen.clone(), source };
        let listener = TcpListener::bind(&config.listen).await.map_err(bind)?;
        let local = listener.local_addr().map_err(bind)?;
        let open = config.secret.is_none() && !config.transport.authenticates();
        if open && !config.insecure && !local.ip().is_loopback() {
            return Err(RendezvousError::NeedsSecret { address: local });
        }
        let controller =
            Controller::new(config.controller).map_err(|reason| RendezvousError::Refused { reason })?;
        Ok(Self { listener, local, secret: config.secret, transport: config.transport, controller, record })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Runs in the background of the present tokio runtime.
    pub fn spawn(self, observe: impl FnMut(Report) + Send + 'static) -> ServerHandle {
        ServerHandle { local: self.local, task: tokio::spawn(self.run(observe)) }
    }

    /// Serves the job until its end: `None` in good order, otherwise the reason.
    pub async fn run(self, mut observe: impl FnMut(Report)) -> Option<String> {
        let Self { listener, secret, transport, mut controller, record: records, .. } = self;
        let start = Instant::now();
        let join_max = controller.deadline();
        // A member that joins again says again what it has.
        let frame_bytes_max = match controller.verify().is_on() || controller.on_loss() != OnLoss::Fail {
            true => FRAME_BYTES_MAX,
            false => MEMBER_FRAME_BYTES_MAX,
        };
        let mut ticks = interval(controller.tick_interval());
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (events_in, mut events) = mpsc::channel(EVENTS_MAX);
        let door = Door::default();
        let mut outgoing: HashMap<ConnectionId, mpsc::Sender<ToMember>> = HashMap::new();
        let mut tasks = JoinSet::new();
        let observers = Arc::new(Semaphore::new(watching::OBSERVERS_MAX));
        let mut connections = 0;
        let mut actions = Vec::new();
        let mut ended = None;
        while !controller.has_ended() {
            let event = tokio::select! {
                accepted = accept(&listener, &door) => {
                    let (stream, peer, place) = accepted;
                    connections += 1;
                    let (id, events) = (ConnectionId(connections), events_in.clone());
                    let observers = observers.clone();
                    let connection = Connection { id, peer, events, observers, join_max, frame_bytes_max };
                    let (secret, transport, door) = (secret.clone(), transport.clone(), door.clone());
                    tasks.spawn(async move {
                        let entrance = Entrance { secret: &secret, transport: &transport, door: &door };
                        connection.serve(stream, entrance, place).await;
                    });
                    continue;
                }
                Some(input) = events.recv() => match input {
                    Input::Opened(connection, peer, sender) => {
                        outgoing.insert(connection, sender);
                        Event::Connected(connection, peer.to_string())
                    }
                    // The door has logged it.
                    Input::Refused(refused) => {
                        observe(refused);
                        continue;
                    }
                    // What a connection says after it was closed counts for nothing.
                    Input::Event(Event::Received(connection, _)) if !outgoing.contains_key(&connection) => continue,
                    Input::Event(event) => event,
                },
                _ = ticks.tick() => Event::Tick,
                Some(_) = tasks.join_next(), if !tasks.is_empty() => continue,
            };
            if let Event::Disconnected(connection, _) = &event {
                outgoing.remove(connection);
            }
            controller.handle(event, start.elapsed(), &mut actions);
            // Carrying out an action can find a connection gone, which is an event in turn.
            let mut next = std::mem::take(&mut actions);
            while !next.is_empty() {
                for action in next.drain(..) {
                    match action {
                        Action::Send(connection, message) => {
                            let sent = outgoing.get(&connection).map(|sender| sender.try_send(message));
                            if let Some(Err(mpsc::error::TrySendError::Full(_))) = sent {
                                outgoing.remove(&connection);
                                let event =
                                    Event::Disconnected(connection, "it does not read its messages".into());
                                controller.handle(event, start.elapsed(), &mut actions);
                            }
                        }
                        Action::Close(connection) => drop(outgoing.remove(&connection)),
                        Action::Record(commit) => {
                            let recorded = record(&records, commit).await;
                            controller.handle(Event::Recorded(recorded), start.elapsed(), &mut actions);
                        }
                        Action::Report(report) => {
                            log::tell(&report);
                            if let Report::Ended { reason } = &report {
                                ended.clone_from(reason);
                            }
                            observe(report);
                        }
                    }
                }
                std::mem::swap(&mut next, &mut actions);
            }
        }
        // Let the last messages leave.
        drop((outgoing, events, listener));
        let _ = timeout(LINGER_MAX, async { while tasks.join_next().await.is_some() {} }).await;
        ended
    }
}

/// Puts a decision on disk, off the threads that serve sockets. Without a file there is nothing to be done.
async fn record(file: &Option<RecordFile>, commit: Commit) -> Result<(), String> {
    let Some(file) = file.clone() else { return Ok(()) };
    let stored = tokio::task::spawn_blocking(move || file.store(commit));
    stored.await.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
}

/// The next connection, once there is room for one that has not proved itself.
async fn accept(listener: &TcpListener, door: &Door) -> (TcpStream, SocketAddr, Place) {
    loop {
        door.room().await;
        match listener.accept().await {
            Ok((stream, peer)) => return (stream, peer, door.admit(peer.ip())),
            Err(error) => {
                // Out of file descriptors, or a connection that ended in the backlog: neither ends the job.
                tracing::warn!(%error, "accept");
                door.make_way().await;
            }
        }
    }
}

enum Input {
    Opened(ConnectionId, SocketAddr, mpsc::Sender<ToMember>),
    Refused(Report),
    Event(Event),
}

/// What stands between a connection and the job.
struct Entrance<'a> {
    secret: &'a Secret,
    transport: &'a Transport,
    door: &'a Door,
}

struct Connection {
    id: ConnectionId,
    peer: SocketAddr,
    events: mpsc::Sender<Input>,
    /// Room for connections that only watch.
    observers: Arc<Semaphore>,
    /// From its proof to its join.
    join_max: Duration,
    /// Once it has joined.
    frame_bytes_max: u32,
}

impl Connection {
    async fn serve(self, stream: TcpStream, entrance: Entrance<'_>, mut place: Place) {
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
        let read = async {
            loop {
                match frame::read(&mut read_half, self.peer, self.frame_bytes_max).await {
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
    async fn refused(&self, door: &Door, refusal: Refusal, reason: String) {
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
