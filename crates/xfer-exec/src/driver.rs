//! The thread that owns one rank's rails and runs the engine on them.
//!
//! Everything that a push touches belongs to this thread: rails, queues, counters, staging slots. The weights come in
//! by value with a push and go back by value with its outcome, so nobody can change them meanwhile. While a push runs
//! the thread polls; where cores are short, it waits on a rail's wait object when nothing has moved for `SPIN_MAX`; between pushes it sleeps
//! on its command queue.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender as ChannelSender, bounded};
use efa_core::{Lease, LeaseMut};
use xfer_plan::Op;

use crate::engine::{Action, Delivered, Engine, EngineConfig, Event, Failure, Post, Slot, Source};
use crate::program::Program;
use crate::rail::{Done, Rail, RailIndex, RailWrite};

/// How long the thread polls without a result before it waits. On a host with fewer cores than busy threads a longer
/// spin takes the core from the peer that it waits for.
const SPIN_MAX: Duration = Duration::from_micros(100);

/// The longest wait: an abort or a gather that ends meanwhile is seen after it.
const WAIT_MAX: Duration = Duration::from_millis(1);

/// How often the engine is told the time. Its deadlines are of seconds.
const TICK: Duration = Duration::from_millis(5);

/// Commands that may wait: a session pushes one version at a time, and aborts it once.
const COMMANDS_MAX: usize = 4;

/// Staging slots at most: far more than any rail has in flight, so that tiny gathers do not turn a large
/// watermark into millions of slots.
const SLOTS_MAX: usize = 1024;

/// A rail over host memory.
pub type HostRail = Box<dyn Rail<Buffer = Lease>>;

/// What a sender is made of.
pub struct SenderConfig {
    /// For thread names and logs.
    pub name: String,
    /// What it pushes.
    pub program: Program,
    /// Its rails, as the program's routes number them.
    pub rails: Vec<HostRail>,
    /// Staging memory; its length is the memory watermark.
    pub staging: LeaseMut,
    /// Bytes of a staging slot: the plan's longest gather; 0 where it has none.
    pub slot_bytes: u64,
    /// See [`EngineConfig::deadline`].
    pub deadline: Duration,
    /// Poll without ever sleeping while a push runs: for hosts with a core for every rank.
    pub busy_poll: bool,
    /// Bytes delivered in the present push, for whoever watches.
    pub progress: Arc<AtomicU64>,
}

/// Where the time of a push went.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Timings {
    /// From the start of the push until its last buffer came back.
    pub total: Duration,
    /// Time that the gather thread spent copying; overlaps with the writes.
    pub gather: Duration,
}

/// The end of a push.
#[derive(Debug)]
pub struct Outcome {
    /// What was delivered, or why not.
    pub result: Result<Delivered, Failure>,
    /// The weights, as they came in. Where a rail could not be closed, it keeps its handles for ever, so that these
    /// do not thaw.
    pub regions: Vec<Lease>,
    /// Where the time went.
    pub timings: Timings,
    /// Whether the rails are still open: without them there is no further push.
    pub usable: bool,
}

type Reply = Box<dyn FnOnce(Outcome) + Send>;

enum Command {
    Push(Vec<Lease>, Reply),
    Abort(String),
}

/// A handle on the thread. Dropping it ends the thread after the present push, without waiting for it.
pub struct Sender {
    commands: ChannelSender<Command>,
    thread: Option<JoinHandle<()>>,
}

impl Sender {
    /// Starts the thread.
    pub fn start(config: SenderConfig) -> io::Result<Self> {
        let (commands, inbox) = bounded(COMMANDS_MAX);
        let name = format!("rails {}", config.name);
        let mut thread = Thread::new(config)?;
        let thread = std::thread::Builder::new().name(name).spawn(move || thread.serve(&inbox))?;
        Ok(Self { commands, thread: Some(thread) })
    }

    /// Begins a push of `regions`, which are this rank's regions in the order of its manifest. `reply` is called from
    /// the thread when it is over; if the thread is gone, it is dropped.
    pub fn push(&self, regions: Vec<Lease>, reply: impl FnOnce(Outcome) + Send + 'static) {
        let _ = self.commands.try_send(Command::Push(regions, Box::new(reply)));
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

struct GatherJob {
    slot: Slot,
    op: Op,
    source: Lease,
    into: LeaseMut,
}

struct Gathered {
    slot: Slot,
    lease: LeaseMut,
    took: Duration,
    ok: bool,
}

/// Copies the rows of `op` from the start of `source` on, one after another. `None` if they do not fit.
fn gather(op: &Op, source: &[u8], into: &mut [u8]) -> Option<()> {
    let row_bytes = op.row_bytes as usize;
    let into = into.get_mut(..usize::try_from(op.bytes()).ok()?)?;
    let mut at = 0_usize;
    for row in into.chunks_exact_mut(row_bytes) {
        row.copy_from_slice(source.get(at..at.checked_add(row_bytes)?)?);
        at = at.checked_add(usize::try_from(op.source.stride).ok()?)?;
    }
    Some(())
}

enum SlotMemory {
    Free(LeaseMut),
    Gathering,
    /// Being written from; the rail holds slices of it.
    Filled(Lease),
}

struct Thread {
    engine: Engine,
    rails: Vec<HostRail>,
    outboxes: Vec<VecDeque<RailWrite<Lease>>>,
    refused: Vec<bool>,
    slots: Vec<SlotMemory>,
    to_gather: ChannelSender<GatherJob>,
    from_gather: Receiver<Gathered>,
    busy_poll: bool,
    progress: Arc<AtomicU64>,
    done: Vec<Done<Lease>>,
    actions: VecDeque<Action>,
}

impl Thread {
    fn new(config: SenderConfig) -> io::Result<Self> {
        let SenderConfig { program, rails, mut staging, slot_bytes, deadline, busy_poll, progress, name } =
            config;
        let slot_bytes = usize::try_from(slot_bytes).unwrap_or(usize::MAX);
        let mut slots = Vec::new();
        while slots.len() < SLOTS_MAX
            && let Some(slot) = staging.split_to(slot_bytes).filter(|slot| !slot.is_empty())
        {
            slots.push(SlotMemory::Free(slot));
        }
        let engine_config = EngineConfig {
            rails: rails.iter().map(|rail| rail.limits()).collect(),
            slots: slots.len() as u32,
            deadline,
            // What was posted either completes about as fast as before the failure, or not at all.
            drain: (deadline / 10).max(TICK),
        };
        let (to_gather, jobs) = bounded::<GatherJob>(slots.len().max(1));
        let (results, from_gather) = bounded(slots.len().max(1));
        std::thread::Builder::new().name(format!("gather {name}")).spawn(move || {
            for GatherJob { slot, op, source, mut into } in jobs {
                let began = Instant::now();
                let ok = gather(&op, source.bytes(), into.bytes_mut()).is_some();
                drop(source);
                if results.send(Gathered { slot, lease: into, took: began.elapsed(), ok }).is_err() {
                    return;
                }
            }
        })?;
        let outboxes =
            rails.iter().map(|rail| VecDeque::with_capacity(rail.limits().depth as usize)).collect();
        Ok(Self {
            engine: Engine::new(program, engine_config),
            refused: vec![false; rails.len()],
            rails,
            outboxes,
            slots,
            to_gather,
            from_gather,
            busy_poll,
            progress,
            done: Vec::new(),
            actions: VecDeque::new(),
        })
    }

    fn serve(&mut self, inbox: &Receiver<Command>) {
        while let Ok(command) = inbox.recv() {
            if let Command::Push(regions, reply) = command {
                reply(self.push(regions, inbox));
            }
        }
        self.close_rails();
    }

    fn push(&mut self, regions: Vec<Lease>, inbox: &Receiver<Command>) -> Outcome {
        let began = Instant::now();
        let mut timings = Timings::default();
        let (mut moved_at, mut ticked_at) = (Duration::ZERO, Duration::ZERO);
        self.progress.store(0, Ordering::Relaxed);
        self.engine.handle(Event::Start, Duration::ZERO, &mut self.actions);
        let result = loop {
            let now = began.elapsed();
            let mut moved = false;
            if let Some(result) = self.carry_out(&regions, now) {
                break result;
            }
            for rail in 0..self.rails.len() {
                moved |= self.turn(rail, now);
            }
            while let Ok(gathered) = self.from_gather.try_recv() {
                timings.gather += gathered.took;
                moved = true;
                self.gathered(gathered, now);
            }
            if now >= ticked_at + TICK {
                ticked_at = now;
                self.progress.store(self.engine.delivered().bytes, Ordering::Relaxed);
                self.engine.handle(Event::Tick, now, &mut self.actions);
                while let Ok(command) = inbox.try_recv() {
                    match command {
                        Command::Abort(reason) => {
                            self.engine.handle(Event::Abort(reason), now, &mut self.actions)
                        }
                        // A session pushes one version at a time; dropping the reply tells a second caller.
                        Command::Push(..) => {}
                    }
                }
            }
            if moved {
                moved_at = now;
            } else if !self.busy_poll && now > moved_at + SPIN_MAX {
                self.wait();
            }
        };
        timings.total = began.elapsed();
        self.progress.store(self.engine.delivered().bytes, Ordering::Relaxed);
        Outcome { result, regions, timings, usable: !self.rails.is_empty() }
    }

    /// Carries out what the engine asked for; the push's result once it is over.
    fn carry_out(&mut self, regions: &[Lease], now: Duration) -> Option<Result<Delivered, Failure>> {
        while let Some(action) = self.actions.pop_front() {
            match action {
                Action::Post(post) => match self.buffer(&post, regions) {
                    Some(from) => self.outboxes[post.rail.index()].push_back(RailWrite {
                        id: post.id,
                        from,
                        rows: post.rows,
                        to: post.to,
                        region: post.region,
                        offset: post.offset,
                    }),
                    None => {
                        let reason = "the plan reads outside this rank's memory".into();
                        self.engine.handle(Event::Failed(post.id, reason), now, &mut self.actions);
                    }
                },
                Action::Gather { slot, op } => self.gather(slot, op, regions, now),
                Action::CloseRails => {
                    self.close_rails();
                    self.engine.handle(Event::RailsClosed, now, &mut self.actions);
                }
                Action::Finish(result) => return Some(result),
            }
        }
        None
    }

    fn buffer(&self, post: &Post, regions: &[Lease]) -> Option<Lease> {
        let bytes = usize::try_from(post.rows.extent_bytes()?).ok()?;
        match post.source {
            Source::Region(region, offset) => {
                let offset = usize::try_from(offset).ok()?;
                regions.get(region.index())?.slice(offset..offset.checked_add(bytes)?)
            }
            Source::Slot(slot) => match self.slots.get(slot.0 as usize)? {
                SlotMemory::Filled(lease) => lease.slice(0..bytes),
                SlotMemory::Free(_) | SlotMemory::Gathering => None,
            },
        }
    }

    fn gather(&mut self, slot: Slot, op: u32, regions: &[Lease], now: Duration) {
        let index = slot.0 as usize;
        let job = self.engine.program().ops().get(op as usize).and_then(|op| {
            let from = usize::try_from(op.source.offset).ok()?;
            let region = regions.get(op.source.region.index())?;
            Some((*op, region.slice(from..region.len())?))
        });
        self.make_free(index);
        let memory = self.slots.get_mut(index).map(|memory| std::mem::replace(memory, SlotMemory::Gathering));
        match (job, memory) {
            (Some((op, source)), Some(SlotMemory::Free(into))) => {
                // The queue has room for every slot.
                let _ = self.to_gather.send(GatherJob { slot, op, source, into });
            }
            _ => {
                self.engine.handle(
                    Event::Abort("defect: a gather without memory".into()),
                    now,
                    &mut self.actions,
                );
                self.engine.handle(Event::Gathered(slot), now, &mut self.actions);
            }
        }
    }

    fn gathered(&mut self, gathered: Gathered, now: Duration) {
        let Gathered { slot, lease, ok, .. } = gathered;
        self.slots[slot.0 as usize] = SlotMemory::Filled(lease.freeze());
        if !ok {
            let reason = "the plan gathers outside this rank's memory".into();
            self.engine.handle(Event::Abort(reason), now, &mut self.actions);
        }
        self.engine.handle(Event::Gathered(slot), now, &mut self.actions);
    }

    /// A slot that the engine gives out again is read by nobody.
    fn make_free(&mut self, index: usize) {
        if let Some(memory) = self.slots.get_mut(index)
            && let SlotMemory::Filled(_) = memory
            && let SlotMemory::Filled(lease) = std::mem::replace(memory, SlotMemory::Gathering)
        {
            *memory = match lease.thaw() {
                Ok(lease) => SlotMemory::Free(lease),
                Err(lease) => SlotMemory::Filled(lease),
            };
        }
    }

    /// Posts to a rail and polls it; whether anything moved.
    fn turn(&mut self, index: usize, now: Duration) -> bool {
        let (Some(rail), Some(outbox)) = (self.rails.get_mut(index), self.outboxes.get_mut(index)) else {
            return false;
        };
        let rail_index = RailIndex(index as u16);
        let offered = outbox.len();
        if offered > 0 {
            let posted = rail.post(outbox);
            let accepted = offered - outbox.len();
            if let Err(error) = posted
                && let Some(write) = outbox.pop_front()
            {
                self.engine.handle(Event::Failed(write.id, error.reason), now, &mut self.actions);
            }
            // Each goes to the front of the engine's queue: the last first, so that their order stays.
            while let Some(write) = outbox.pop_back() {
                self.refused[index] = true;
                let id = write.id;
                let event = if outbox.is_empty() { Event::Refused(id) } else { Event::Unoffered(id) };
                self.engine.handle(event, now, &mut self.actions);
            }
            if accepted == offered {
                self.refused[index] = false;
            }
        }
        let polled = rail.poll(&mut self.done);
        let moved = !self.done.is_empty();
        for Done { id, from, result } in self.done.drain(..) {
            // Before the engine can give its slot out again.
            drop(from);
            let event = match result {
                Ok(()) => Event::Delivered(id),
                Err(reason) => Event::Failed(id, reason),
            };
            self.engine.handle(event, now, &mut self.actions);
        }
        if let Err(error) = polled {
            self.engine.handle(Event::RailFailed(rail_index, error.reason), now, &mut self.actions);
        } else if std::mem::take(&mut self.refused[index]) {
            self.engine.handle(Event::Polled(rail_index), now, &mut self.actions);
        }
        moved
    }

    fn wait(&mut self) {
        match self.rails.as_mut_slice() {
            [rail] if self.engine.in_flight() > 0 => rail.wait(WAIT_MAX),
            // Several rails, or only a gather: the wait objects cannot be waited for together.
            _ => std::thread::sleep(Duration::from_micros(50)),
        }
    }

    fn close_rails(&mut self) {
        for rail in self.rails.drain(..) {
            if let Err(error) = rail.close() {
                tracing::error!(%error, "a rail could not be closed: its buffers are leaked");
            }
        }
    }
}
