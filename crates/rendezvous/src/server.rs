//! The controller's sockets: accepts connections, lets them prove themselves, and feeds the state machine.
//!
//! A connection costs little until it has proved itself: their number, the bytes that they may send and the time that
//! they may take are bounded. After that its messages go through one queue into the one task that owns the
//! [`Controller`].

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use xfer_plan::PlanOptions;

use crate::controller::{Action, ConnectionId, Controller, ControllerConfig, Event, Report};
use crate::door::{Door, Place};
use crate::error::RendezvousError;
use crate::handshake::{Secret, random_seed};
use crate::protocol::{
    DEADLINE_DEFAULT, FRAME_BYTES_MAX, JOB_DEFAULT, MEMBER_FRAME_BYTES_MAX, OnLoss, ToController, ToMember,
    World,
};
use crate::record::{Charge, NotRecorded, Opened, Record};
use crate::transport::Transport;
use crate::verify::Verify;

mod connection;
mod log;
mod watching;

use connection::{Connection, Entrance};

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
    /// Where to record commits, so that they outlive this process.
    pub record: Record,
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
            record: Record::Nowhere,
        })
    }
}

/// A controller that listens.
pub struct Server {
    listener: TcpListener,
    local: SocketAddr,
    secret: Secret,
    transport: Transport,
    controller: ControllerConfig,
    record: Opened,
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
    pub async fn bind(config: ServerConfig) -> Result<Self, RendezvousError> {
        let ServerConfig { listen, secret, transport, insecure, controller, record } = config;
        controller.check().map_err(|reason| RendezvousError::Refused { reason })?;
        let bind = |source| RendezvousError::Bind { address: listen.clone(), source };
        let listener = TcpListener::bind(&listen).await.map_err(bind)?;
        let local = listener.local_addr().map_err(bind)?;
        let open = secret.is_none() && !transport.authenticates();
        if open && !insecure && !local.ip().is_loopback() {
            return Err(RendezvousError::NeedsSecret { address: local });
        }
        let record = record.open(&controller, local)?;
        Ok(Self { listener, local, secret, transport, controller, record })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Runs in the background of the present tokio runtime.
    pub fn spawn(self, observe: impl FnMut(Report) + Send + 'static) -> ServerHandle {
        ServerHandle { local: self.local, task: tokio::spawn(self.run(observe)) }
    }

    /// Serves the job until its end: `None` in good order, otherwise the reason. Where another controller is in charge, it stands
    /// by until that one is gone; members are told where this one is from then on.
    pub async fn run(self, mut observe: impl FnMut(Report)) -> Option<String> {
        let Self { listener, secret, transport, controller: mut config, record, .. } = self;
        let mut tell = |report: Report| {
            log::tell(&report);
            observe(report);
        };
        let charge = record.take_charge(&mut tell).await;
        let (records, last, mut deposed) =
            match charge.unwrap_or_else(|error| Charge::Over(Some(error.to_string()))) {
                Charge::Taken(records, last, deposed) => (records, last, deposed),
                Charge::Over(reason) => {
                    tell(Report::Ended { reason: reason.clone() });
                    return reason;
                }
            };
        config.resume = last.or(config.resume);
        let mut controller = match Controller::new(config) {
            Ok(controller) => controller,
            Err(reason) => return Some(reason),
        };
        let start = Instant::now();
        let join_max = controller.deadline();
        let bound = Arc::new(AtomicU32::new(frame_bytes_max(&controller)));
        let mut ticks = interval(controller.tick_interval());
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (events_in, mut events) = mpsc::channel(EVENTS_MAX);
        let door = Door::default();
        let mut outgoing: HashMap<ConnectionId, (SocketAddr, mpsc::Sender<ToMember>)> = HashMap::new();
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
                    let frame_bytes_max = bound.clone();
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
                        outgoing.insert(connection, (peer, sender));
                        Event::Connected(connection, peer.to_string())
                    }
                    // The door has logged it.
                    Input::Refused(refused) => {
                        observe(refused);
                        continue;
                    }
                    Input::Recorded(Ok(())) => Event::Recorded(Ok(())),
                    Input::Recorded(Err(NotRecorded::Failed(reason))) => Event::Recorded(Err(reason)),
                    #[cfg(feature = "etcd")]
                    Input::Recorded(Err(NotRecorded::Deposed(reason))) => {
                        ended = Some(reason);
                        break;
                    }
                    // What a connection says after it was closed counts for nothing.
                    Input::Event(Event::Received(connection, _)) if !outgoing.contains_key(&connection) => continue,
                    Input::Event(event) => event,
                },
                _ = ticks.tick() => Event::Tick,
                // Members lose this controller as if it had died, and look for the next.
                reason = deposed.told() => {
                    ended = Some(reason);
                    break;
                }
                Some(_) = tasks.join_next(), if !tasks.is_empty() => continue,
            };
            if let Event::Disconnected(connection, _) = &event {
                outgoing.remove(connection);
            }
            let joining = match &event {
                Event::Received(connection, ToController::Join(join)) => {
                    outgoing.get(connection).and_then(|(peer, _)| records.entry(join, *peer))
                }
                _ => None,
            };
            controller.handle(event, start.elapsed(), &mut actions);
            // Before anybody is told of a plan.
            bound.store(frame_bytes_max(&controller), Ordering::Relaxed);
            // Carrying out an action can find a connection gone, which is an event in turn.
            let mut next = std::mem::take(&mut actions);
            while !next.is_empty() {
                for action in next.drain(..) {
                    match action {
                        Action::Send(connection, message) => {
                            let sent = outgoing.get(&connection).map(|(_, sender)| sender.try_send(message));
                            if let Some(Err(mpsc::error::TrySendError::Full(_))) = sent {
                                outgoing.remove(&connection);
                                let event =
                                    Event::Disconnected(connection, "it does not read its messages".into());
                                controller.handle(event, start.elapsed(), &mut actions);
                            }
                        }
                        Action::Close(connection) => drop(outgoing.remove(&connection)),
                        // Heartbeats go on meanwhile.
                        Action::Record(commit) => {
                            let (records, events) = (records.clone(), events_in.clone());
                            tasks.spawn(async move {
                                let recorded = records.store(commit).await;
                                let _ = events.send(Input::Recorded(recorded)).await;
                            });
                        }
                        Action::Report(report) => {
                            records.note(&report, joining.as_ref());
                            if let Report::Ended { reason } = &report {
                                ended.clone_from(reason);
                            }
                            log::tell(&report);
                            observe(report);
                        }
                    }
                }
                std::mem::swap(&mut next, &mut actions);
            }
        }
        if !controller.has_ended() {
            let reason = ended.clone();
            log::tell(&Report::Ended { reason: reason.clone() });
            observe(Report::Ended { reason });
        }
        // Let the last messages leave.
        drop((outgoing, events, listener));
        let _ = timeout(LINGER_MAX, async { while tasks.join_next().await.is_some() {} }).await;
        if controller.has_ended() {
            records.finish(ended.as_deref()).await;
        }
        ended
    }
}

/// The longest frame of a member: one that joins again says again what it has, and checksums and magnitudes are many.
fn frame_bytes_max(controller: &Controller) -> u32 {
    let is_long =
        controller.verify().is_on() || controller.measures() || controller.on_loss() != OnLoss::Fail;
    if is_long { FRAME_BYTES_MAX } else { MEMBER_FRAME_BYTES_MAX }
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
    Recorded(Result<(), NotRecorded>),
    Event(Event),
}
