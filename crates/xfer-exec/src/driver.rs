//! Runs the engine on a rank's rails, over host memory.
//!
//! Everything that a push touches belongs to one [`Driver`], and a driver to one thread: rails, queues, counters, staging
//! slots. Nothing on the way of a WRITE is shared with another thread or allocated. The weights come in by value with a
//! push and go back by value with its outcome, so nobody can change them meanwhile.
//!
//! [`Sender`] gives a driver a thread of its own.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender as ChannelSender, TryRecvError, bounded};
use efa_core::{Lease, LeaseMut};

use crate::engine::{Action, Delivered, Engine, EngineConfig, Event, Failure, Post, RailUse, Slot, Source};
use crate::program::{Program, WriteId};
use crate::rail::{Armed, Done, Rail, RailIndex, RailWrite};

mod gather;
mod sender;

use gather::{Gathered, Job};
#[cfg(feature = "ofi")]
pub(crate) use sender::pin;
pub use sender::{Sender, ThreadConfig};

/// The longest wait: an abort or a gather that ends meanwhile is seen after it.
const WAIT_MAX: Duration = Duration::from_millis(1);

/// How long to wait for a gather alone.
const GATHER_WAIT: Duration = Duration::from_micros(50);

/// How often the engine is told the time. Its deadlines are of seconds.
const TICK: Duration = Duration::from_millis(5);

/// Staging slots at most: far more than any rail has in flight, so that tiny gathers do not turn a large
/// watermark into millions of slots.
const SLOTS_MAX: usize = 1024;

/// A rail over host memory.
pub type HostRail = Box<dyn Rail<Buffer = Lease>>;

/// What a driver is made of.
pub struct DriverConfig {
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
    /// See [`EngineConfig::stall`].
    pub stall: Duration,
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
    /// What each rail did, and which were closed.
    pub rails: Vec<RailUse>,
}

/// What a step did.
pub enum Step {
    /// Something was delivered, refused or gathered.
    Moved,
    /// Nothing.
    Still,
    /// The push is over.
    Over(Outcome),
}

enum SlotMemory {
    Free(LeaseMut),
    Gathering,
    /// Being written from; the rail holds slices of it.
    Filled(Lease),
}

/// A rail and what is on its way to it.
struct RailState {
    /// `None` once it has been closed.
    rail: Option<HostRail>,
    outbox: VecDeque<RailWrite<Lease>>,
    refused: bool,
}

/// A rail that is being closed.
struct Closing {
    number: RailIndex,
    since: Duration,
    /// What it had in flight, and whether it closed.
    result: Receiver<(Vec<WriteId>, Result<(), String>)>,
}

/// The push that runs.
struct Push {
    regions: Vec<Lease>,
    began: Instant,
    ticked_at: Duration,
    timings: Timings,
}

/// See the module.
pub struct Driver {
    engine: Engine,
    rails: Vec<RailState>,
    slots: Vec<SlotMemory>,
    to_gather: ChannelSender<Job>,
    from_gather: Receiver<Gathered>,
    push: Option<Push>,
    closing: Vec<Closing>,
    /// How long a rail may take to close.
    close_max: Duration,
    done: Vec<Done<Lease>>,
    actions: VecDeque<Action>,
}

impl Driver {
    /// A driver that has not pushed yet. Starts the thread that gathers.
    pub fn new(config: DriverConfig) -> io::Result<Self> {
        let DriverConfig { program, rails, mut staging, slot_bytes, deadline, stall } = config;
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
            stall,
            // What was posted either completes about as fast as before the failure, or not at all.
            drain: (deadline / 10).max(TICK),
        };
        let depth: usize = engine_config.rails.iter().map(|limits| limits.depth as usize).sum();
        let (to_gather, from_gather) = gather::start("rows", slots.len())?;
        let state = |rail: HostRail| {
            let outbox = VecDeque::with_capacity(rail.limits().depth as usize);
            RailState { rail: Some(rail), outbox, refused: false }
        };
        Ok(Self {
            engine: Engine::new(program, engine_config),
            rails: rails.into_iter().map(state).collect(),
            slots,
            to_gather,
            from_gather,
            push: None,
            closing: Vec::new(),
            close_max: deadline,
            done: Vec::with_capacity(depth),
            actions: VecDeque::with_capacity(depth),
        })
    }

    /// Begins a push of `regions`. Then call [`Driver::step`] until it is over.
    pub fn begin(&mut self, regions: Vec<Lease>) {
        let timings = Timings::default();
        self.push = Some(Push { regions, began: Instant::now(), ticked_at: Duration::ZERO, timings });
        self.engine.handle(Event::Start, Duration::ZERO, &mut self.actions);
    }

    /// Ends the present push, if there is one.
    pub fn abort(&mut self, reason: String) {
        if let Some(push) = &self.push {
            self.engine.handle(Event::Abort(reason), push.began.elapsed(), &mut self.actions);
        }
    }

    /// Bytes that the present push, or the last, has delivered.
    pub fn delivered_bytes(&self) -> u64 {
        self.engine.delivered().bytes
    }

    /// Posts what is due, polls every rail once and carries out what follows. Never blocks.
    pub fn step(&mut self) -> Step {
        let Some(mut push) = self.push.take() else { return Step::Still };
        let now = push.began.elapsed();
        if let Some(result) = self.carry_out(&push.regions, now) {
            let Push { regions, began, mut timings, .. } = push;
            timings.total = began.elapsed();
            return Step::Over(Outcome { result, regions, timings, rails: self.engine.rails().collect() });
        }
        let mut moved = false;
        for rail in 0..self.rails.len() {
            moved |= self.turn(rail, now);
        }
        self.closed(now);
        while let Ok(gathered) = self.from_gather.try_recv() {
            push.timings.gather += gathered.took;
            moved = true;
            self.gathered(gathered, now);
        }
        if now >= push.ticked_at + TICK {
            push.ticked_at = now;
            self.engine.handle(Event::Tick, now, &mut self.actions);
        }
        self.push = Some(push);
        if moved || !self.actions.is_empty() { Step::Moved } else { Step::Still }
    }

    /// Carries out what the engine asked for; the push's result once it is over.
    fn carry_out(&mut self, regions: &[Lease], now: Duration) -> Option<Result<Delivered, Failure>> {
        while let Some(action) = self.actions.pop_front() {
            match action {
                Action::Post(post) => self.post(&post, regions, now),
                Action::Gather { slot, op } => self.gather(slot, op, regions, now),
                Action::CloseRail(rail) => self.close(rail, now),
                Action::Finish(result) => return Some(result),
            }
        }
        None
    }

    fn post(&mut self, post: &Post, regions: &[Lease], now: Duration) {
        let from = self.buffer(post, regions);
        let state = self.rails.get_mut(post.rail.index());
        match from.zip(state.filter(|state| state.rail.is_some())) {
            Some((from, state)) => state.outbox.push_back(RailWrite {
                id: post.id,
                from,
                rows: post.rows,
                to: post.to,
                region: post.region,
                offset: post.offset,
            }),
            None => {
                let reason = "the plan reads outside this rank's memory".into();
                self.engine.handle(Event::Failed(post.rail, post.id, reason), now, &mut self.actions);
            }
        }
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
                let _ = self.to_gather.send(Job { slot, op, source, into });
            }
            _ => {
                let reason = "defect: a gather without memory".into();
                self.engine.handle(Event::Abort(reason), now, &mut self.actions);
                self.engine.handle(Event::Gathered(slot), now, &mut self.actions);
            }
        }
    }

    fn gathered(&mut self, gathered: Gathered, now: Duration) {
        let Gathered { slot, lease, ok, .. } = gathered;
        if let Some(memory) = self.slots.get_mut(slot.0 as usize) {
            *memory = SlotMemory::Filled(lease.freeze());
        }
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
        let Some(RailState { rail: Some(rail), outbox, refused }) = self.rails.get_mut(index) else {
            return false;
        };
        let number = RailIndex(index as u16);
        if !outbox.is_empty() {
            let posted = rail.post(outbox);
            if let Err(error) = posted
                && let Some(write) = outbox.pop_front()
            {
                self.engine.handle(Event::Failed(number, write.id, error.reason), now, &mut self.actions);
            }
            *refused = !outbox.is_empty();
            // Each goes to the front of the engine's queue: the last first, so that their order stays.
            while let Some(RailWrite { id, .. }) = outbox.pop_back() {
                let event = match outbox.is_empty() {
                    true => Event::Refused(number, id),
                    false => Event::Unoffered(number, id),
                };
                self.engine.handle(event, now, &mut self.actions);
            }
        }
        let polled = rail.poll(&mut self.done);
        let moved = !self.done.is_empty();
        for Done { id, from, result } in self.done.drain(..) {
            // Before the engine can give its slot out again.
            drop(from);
            let event = match result {
                Ok(()) => Event::Delivered(number, id),
                Err(reason) => Event::Failed(number, id, reason),
            };
            self.engine.handle(event, now, &mut self.actions);
        }
        if let Err(error) = polled {
            self.engine.handle(Event::RailFailed(number, error.reason), now, &mut self.actions);
        } else if std::mem::take(refused) {
            self.engine.handle(Event::Polled(number), now, &mut self.actions);
        }
        moved
    }

    /// Begins to close a rail, on a thread of its own: closing an endpoint of EFA waits for what is in flight, and the other
    /// rails must not wait with it.
    fn close(&mut self, number: RailIndex, now: Duration) {
        let Some(state) = self.rails.get_mut(number.index()) else { return };
        let (unposted, rail) = (std::mem::take(&mut state.outbox), state.rail.take());
        for RailWrite { id, .. } in unposted {
            self.engine.handle(Event::Returned(number, id), now, &mut self.actions);
        }
        let Some(rail) = rail else {
            return self.engine.handle(Event::RailClosed(number, Ok(())), now, &mut self.actions);
        };
        tracing::warn!(rail = rail.name(), "closing after a failure");
        let (closed, result) = bounded(1);
        let close = move || {
            let mut unfinished = Vec::new();
            let result = rail.close(&mut unfinished).map_err(|error| error.to_string());
            let _ = closed.send((unfinished, result));
        };
        match std::thread::Builder::new().name("close rail".into()).spawn(close) {
            Ok(_) => self.closing.push(Closing { number, since: now, result }),
            // The rail went with the closure, so it has been dropped and with it closed; what it held is not known.
            Err(error) => {
                let result = Err(format!("no thread to close it: {error}"));
                self.engine.handle(Event::RailClosed(number, result), now, &mut self.actions);
            }
        }
    }

    /// Tells the engine of rails that have closed meanwhile, or have not in time.
    fn closed(&mut self, now: Duration) {
        for at in (0..self.closing.len()).rev() {
            let Closing { number, since, result } = &self.closing[at];
            let number = *number;
            let (unfinished, result) = match result.try_recv() {
                Ok(closed) => closed,
                Err(TryRecvError::Empty) if now < *since + self.close_max => continue,
                // Its thread keeps what it holds for as long as that takes.
                Err(_) => (Vec::new(), Err(format!("it did not close within {:?}", self.close_max))),
            };
            self.closing.swap_remove(at);
            for id in unfinished {
                self.engine.handle(Event::Returned(number, id), now, &mut self.actions);
            }
            self.engine.handle(Event::RailClosed(number, result), now, &mut self.actions);
        }
    }

    /// Waits until a rail or the gather thread may have something, for a moment at most.
    pub fn wait(&mut self) {
        if self.engine.in_flight() == 0 {
            // Only a gather.
            return std::thread::sleep(GATHER_WAIT);
        }
        let armed =
            self.rails.iter_mut().filter_map(|state| state.rail.as_mut()).map(|rail| match rail.arm() {
                Armed::Ready => efa_core::Armed::Ready,
                Armed::On(queue) => efa_core::Armed::On(queue),
                Armed::Blind => efa_core::Armed::Blind,
            });
        if let Err(error) = efa_core::wait_any(armed, None, WAIT_MAX) {
            // Polling finds what there is; only the sleep is lost.
            tracing::debug!(%error, "wait");
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        for rail in self.rails.iter_mut().filter_map(|state| state.rail.take()) {
            if let Err(error) = rail.close(&mut Vec::new()) {
                tracing::error!(%error, "a rail could not be closed: its buffers are leaked");
            }
        }
    }
}
