//! The thread that a rank's rails live on.
//!
//! While a push runs it polls; where cores are short, it waits on the rails' wait objects when nothing has moved for
//! `SPIN_MAX`. Between pushes it sleeps on its command queue; one that passes on looks up at times and forgets what it was told.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender as ChannelSender, TryRecvError, bounded};
use efa_core::Lease;

use super::{Driver, DriverConfig, Outcome, Step, Store};
use crate::engine::Attempt;

/// How long the thread polls without a result before it waits. On a host with fewer cores than busy threads a longer
/// spin takes the core from the peer that it waits for.
const SPIN_MAX: Duration = Duration::from_micros(100);

/// How often the thread looks at its commands and tells its progress while a push runs.
const LOOK: Duration = Duration::from_millis(5);

/// How often a thread that passes on reads, between pushes, what it is told.
const IDLE: Duration = Duration::from_millis(10);

/// Commands that may wait: a session pushes one version at a time, and aborts it once.
const COMMANDS_MAX: usize = 4;

/// How the thread runs.
#[derive(Debug, Clone, Default)]
pub struct ThreadConfig {
    /// For its name and logs.
    pub name: String,
    /// Poll without ever sleeping while a push runs: for hosts with a core for every rank.
    pub busy_poll: bool,
    /// The CPUs that it may run on, by the system's numbers; empty for all that the process may.
    pub cpus: Vec<usize>,
    /// Bytes delivered in the present push, for whoever watches.
    pub progress: Arc<AtomicU64>,
}

const LEFT: &str = "nobody waits for it any more";

type Reply<B> = Box<dyn FnOnce(Outcome<B>) + Send>;

/// What [`Sender::magnitudes`] has found.
#[derive(Debug)]
pub struct Measured<B = Lease> {
    /// As [`Magnitudes::report`](xfer_plan::Magnitudes::report) takes them, or why they could not be found.
    pub result: Result<Vec<f32>, String>,
    /// The weights, as they came in.
    pub regions: Vec<B>,
}

type ReplyMeasured<B> = Box<dyn FnOnce(Measured<B>) + Send>;

enum Command<B> {
    Magnitudes(Vec<B>, ReplyMeasured<B>),
    Attempt(Attempt),
    Push(Vec<B>, Vec<f32>, Reply<B>),
    /// And say when it has begun.
    PassOn(Vec<B>, ChannelSender<()>, Reply<B>),
    Abort(String),
}

/// A handle on the thread. Dropping it ends the thread after the present push, without waiting for it; one that passes on is
/// aborted.
pub struct Sender<B = Lease> {
    commands: ChannelSender<Command<B>>,
    thread: Option<JoinHandle<()>>,
}

impl Sender {
    /// Starts the thread of a driver over host memory.
    pub fn start(driver: DriverConfig, thread: ThreadConfig) -> io::Result<Self> {
        Self::drive(Driver::new(driver)?, thread)
    }
}

impl<B: Send + 'static> Sender<B> {
    /// Starts the thread of any driver.
    pub fn drive<M>(mut driver: Driver<M>, thread: ThreadConfig) -> io::Result<Self>
    where
        M: Store<Region = B> + Send + 'static,
        Driver<M>: Send,
    {
        let (commands, inbox) = bounded(COMMANDS_MAX);
        let handle = std::thread::Builder::new().name(format!("rails {}", thread.name)).spawn(move || {
            pin(&thread.name, &thread.cpus);
            serve(&mut driver, &thread, &inbox);
        })?;
        Ok(Self { commands, thread: Some(handle) })
    }

    /// Which attempt the next push is. Between pushes.
    pub fn set_attempt(&self, attempt: Attempt) {
        let _ = self.commands.try_send(Command::Attempt(attempt));
    }

    /// Begins a push of `regions`, which are this rank's regions in the order of its manifest. `reply` is called from
    /// the thread when it is over; if the thread is gone, it is dropped.
    pub fn push(&self, regions: Vec<B>, reply: impl FnOnce(Outcome<B>) + Send + 'static) {
        self.push_told(regions, Vec::new(), reply);
    }

    /// As [`Sender::push`], with the merged magnitudes of the same weights of which this rank is told
    /// ([`Magnitudes::merged`](xfer_plan::Magnitudes::merged)).
    pub fn push_told(
        &self,
        regions: Vec<B>,
        told: Vec<f32>,
        reply: impl FnOnce(Outcome<B>) + Send + 'static,
    ) {
        let _ = self.commands.try_send(Command::Push(regions, told, Box::new(reply)));
    }

    /// Begins to pass on what arrives in `regions`, for a program of [`Program::relay`](crate::Program::relay), and returns
    /// once all counts that arrives from then on: nobody may write before. `false` where the thread is gone. `reply` as for
    /// [`Sender::push`].
    pub fn pass_on(&self, regions: Vec<B>, reply: impl FnOnce(Outcome<B>) + Send + 'static) -> bool {
        let (say, begun) = bounded(1);
        let _ = self.commands.try_send(Command::PassOn(regions, say, Box::new(reply)));
        begun.recv().is_ok()
    }

    /// Finds the magnitudes that this rank reports before it pushes these weights, where the plan cuts quantised blocks. Not
    /// while a push runs.
    pub fn magnitudes(&self, regions: Vec<B>, reply: impl FnOnce(Measured<B>) + Send + 'static) {
        let _ = self.commands.try_send(Command::Magnitudes(regions, Box::new(reply)));
    }

    /// Ends the present push, if there is one.
    pub fn abort(&self, reason: String) {
        let _ = self.commands.try_send(Command::Abort(reason));
    }

    /// Ends the thread and waits until its rails are closed.
    pub fn close(mut self) {
        self.commands = bounded(0).0;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Keeps the calling thread on these CPUs, if there are any. A thread that cannot be pinned still works, only slower.
pub(crate) fn pin(name: &str, cpus: &[usize]) {
    if cpus.is_empty() {
        return;
    }
    let mut set = rustix::thread::CpuSet::new();
    for &cpu in cpus.iter().filter(|cpu| **cpu < rustix::thread::CpuSet::MAX_CPU) {
        set.set(cpu);
    }
    match rustix::thread::sched_setaffinity(None, &set) {
        Ok(()) => tracing::debug!(name, ?cpus, "pinned"),
        Err(error) => tracing::warn!(name, ?cpus, %error, "the thread of the rails could not be pinned"),
    }
}

fn serve<M: Store>(driver: &mut Driver<M>, thread: &ThreadConfig, inbox: &Receiver<Command<M::Region>>) {
    let mut passes_on = false;
    loop {
        // What an attempt that is over is still told would fill the sockets of those who tell it, and hold up their ends of it.
        let command = match passes_on {
            true => inbox.recv_timeout(IDLE),
            false => inbox.recv().map_err(RecvTimeoutError::from),
        };
        match command {
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => driver.forget_arrivals(),
            Ok(Command::Push(regions, told, reply)) => {
                thread.progress.store(0, Ordering::Relaxed);
                driver.begin_told(regions, &told);
                reply(push(driver, thread, inbox, false));
            }
            Ok(Command::PassOn(regions, begun, reply)) => {
                passes_on = true;
                thread.progress.store(0, Ordering::Relaxed);
                driver.begin(regions);
                let _ = begun.send(());
                reply(push(driver, thread, inbox, true));
            }
            Ok(Command::Magnitudes(regions, reply)) => {
                let result = driver.magnitudes(&regions);
                reply(Measured { result, regions });
            }
            Ok(Command::Attempt(attempt)) => driver.set_attempt(attempt),
            Ok(Command::Abort(_)) => {}
        }
    }
}

/// Carries a push out. One that `passes_on` may wait for ever for what does not come.
fn push<M: Store>(
    driver: &mut Driver<M>,
    thread: &ThreadConfig,
    inbox: &Receiver<Command<M::Region>>,
    passes_on: bool,
) -> Outcome<M::Region> {
    let (mut moved_at, mut looked_at) = (Instant::now(), Instant::now());
    loop {
        let step = driver.step();
        let now = Instant::now();
        if now >= looked_at + LOOK {
            looked_at = now;
            thread.progress.store(driver.delivered_bytes(), Ordering::Relaxed);
            match inbox.try_recv() {
                Ok(Command::Abort(reason)) => driver.abort(reason),
                // A session pushes one version at a time; dropping the reply tells a second caller.
                Ok(_) | Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) if passes_on => driver.abort(LEFT.into()),
                Err(TryRecvError::Disconnected) => {}
            }
        }
        match step {
            Step::Over(outcome) => {
                thread.progress.store(driver.delivered_bytes(), Ordering::Relaxed);
                return outcome;
            }
            Step::Moved => moved_at = now,
            Step::Still if !thread.busy_poll && now > moved_at + SPIN_MAX => driver.wait(),
            Step::Still => {}
        }
    }
}
