//! Runs the engine on a rank's rails, over host memory or any other [`Store`].
//!
//! Everything that a push touches belongs to one [`Driver`], and a driver to one thread: rails, queues, counters, staging
//! slots. Nothing on the way of a WRITE is shared with another thread or allocated. The weights come in by value with a
//! push and go back by value with its outcome, so nobody can change them meanwhile.
//!
//! What a driver adds to a [`Runner`] is the clock, the memory, and threads for what would hold the rails up.
//! [`Sender`] gives a driver a thread of its own.

use std::io;
use std::time::{Duration, Instant};

use efa_core::{Lease, LeaseMut};

use crate::engine::{Attempt, Delivered, Failure, RailUse, Slot};
use crate::program::Program;
use crate::rail::{Armed, Rail, RailIndex};
use crate::runner::{Memory, Runner, TICK, Turn};

mod closing;
mod gather;
mod host;
mod relay;
mod sender;
mod slots;
mod transform;

pub use closing::Closed;
#[cfg(feature = "cuda")]
pub(crate) use closing::Closings;
pub use host::HostMemory;
pub use relay::{RelayMemory, RelayRail};
#[cfg(feature = "ofi")]
pub(crate) use sender::pin;
pub use sender::{Measured, Sender, ThreadConfig};
#[cfg(feature = "cuda")]
pub(crate) use slots::HostSlots;
#[cfg(feature = "cuda")]
pub(crate) use transform::magnitudes;
pub use transform::{ReadRows, Transforms};

/// The longest wait: an abort or a gather that ends meanwhile is seen after it.
const WAIT_MAX: Duration = Duration::from_millis(1);

/// How long to wait for a gather alone.
const GATHER_WAIT: Duration = Duration::from_micros(50);

/// A rail over host memory.
pub type HostRail = Box<dyn Rail<Buffer = Lease> + Send>;

/// Memory that a driver pushes from, and what fills its staging slots and closes its rails meanwhile. Nothing of it blocks.
pub trait Store: Memory {
    /// A region of weights, as a push takes it by value: what its rails read from, or what only its slots are filled from.
    type Region;

    /// How many staging slots there are.
    fn slots(&self) -> u32;

    /// The largest magnitudes of this rank's parts of the blocks that others have parts of too, as
    /// [`Magnitudes::report`](xfer_plan::Magnitudes::report) takes them. Called between pushes, and may take as long as reading
    /// those parts does.
    ///
    /// # Errors
    ///
    /// When `regions` are not those of the plan, or cannot be read.
    fn magnitudes(&mut self, regions: &[Self::Region]) -> Result<Vec<f32>, String>;

    /// Takes the regions of a push, and the merged magnitudes of which this rank is told.
    ///
    /// # Errors
    ///
    /// When these are not as many as the plan says. The push is over then.
    fn begin(&mut self, regions: Vec<Self::Region>, told: &[f32]) -> Result<(), String>;

    /// Gives them back.
    fn end(&mut self) -> Vec<Self::Region>;

    /// A slot that has been filled meanwhile, or not.
    fn staged(&mut self) -> Option<Staged>;

    /// A rail that has closed meanwhile, or has not in time.
    fn closed(&mut self) -> Option<(RailIndex, Closed)>;

    /// Appends the tags of WRITEs that have arrived at this rank meanwhile, for a rank that passes on.
    ///
    /// # Errors
    ///
    /// When that cannot be known any more, which ends the push.
    fn arrived(&mut self, _tags: &mut Vec<u32>) -> Result<(), String> {
        Ok(())
    }

    /// Forgets what has arrived of attempts that are over. Called between pushes.
    fn forget_arrivals(&mut self) {}
}

/// The end of [`Memory::stage`].
#[derive(Debug)]
pub struct Staged {
    /// The slot.
    pub slot: Slot,
    /// How long it took; others may have been filled at the same time.
    pub took: Duration,
    /// Filled, or why not.
    pub result: Result<(), String>,
}

/// What a driver over host memory is made of.
pub struct DriverConfig {
    /// What it pushes.
    pub program: Program,
    /// Its rails, as the program's routes number them.
    pub rails: Vec<HostRail>,
    /// Staging memory; its length is the memory watermark.
    pub staging: LeaseMut,
    /// Bytes of a staging slot: the plan's longest gather; 0 where it has none.
    pub slot_bytes: u64,
    /// See [`EngineConfig::deadline`](crate::EngineConfig::deadline).
    pub deadline: Duration,
    /// See [`EngineConfig::stall`](crate::EngineConfig::stall).
    pub stall: Duration,
}

/// Where the time of a push went.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Timings {
    /// From the start of the push until its last buffer came back.
    pub total: Duration,
    /// Time that it took to fill slots, with all that is gathered, cast and quantised; overlaps with the writes.
    pub gather: Duration,
}

/// The end of a push.
#[derive(Debug)]
pub struct Outcome<B = Lease> {
    /// What was delivered, or why not.
    pub result: Result<Delivered, Failure>,
    /// The weights, as they came in. Where a rail could not be closed, it keeps its handles for ever, so that these
    /// do not thaw.
    pub regions: Vec<B>,
    /// Where the time went.
    pub timings: Timings,
    /// What each rail did, and which were closed.
    pub rails: Vec<RailUse>,
}

/// What a step did.
pub enum Step<B = Lease> {
    /// Something was delivered, refused or gathered.
    Moved,
    /// Nothing.
    Still,
    /// The push is over.
    Over(Outcome<B>),
}

/// The push that runs.
struct Push {
    /// Why it never began.
    refused: Option<String>,
    began: Instant,
    ticked_at: Duration,
    /// See [`Timings::gather`].
    gather: Duration,
}

/// See the module.
pub struct Driver<M: Store = HostMemory> {
    runner: Runner<M>,
    memory: M,
    push: Option<Push>,
    /// Tags that have just arrived.
    tags: Vec<u32>,
}

impl Driver {
    /// A driver over host memory that has not pushed yet. Starts the thread that gathers.
    pub fn new(config: DriverConfig) -> io::Result<Self> {
        let DriverConfig { program, rails, staging, slot_bytes, deadline, stall } = config;
        let memory = HostMemory::new(staging, slot_bytes, deadline, &program)?;
        Ok(Self::over(memory, program, rails, deadline, stall))
    }
}

impl<M: Store> Driver<M> {
    /// A driver over any memory that has not pushed yet. For `deadline` and `stall` see
    /// [`EngineConfig`](crate::EngineConfig).
    pub fn over(
        memory: M,
        program: Program,
        rails: Vec<Box<M::Rail>>,
        deadline: Duration,
        stall: Duration,
    ) -> Self {
        let runner = Runner::new(program, rails, memory.slots(), deadline, stall);
        Self { runner, memory, push: None, tags: Vec::new() }
    }

    /// What this rank reports before a push of a plan that cuts quantised blocks; see [`Store::magnitudes`].
    ///
    /// # Errors
    ///
    /// As [`Store::magnitudes`].
    pub fn magnitudes(&mut self, regions: &[M::Region]) -> Result<Vec<f32>, String> {
        self.memory.magnitudes(regions)
    }

    /// See [`Engine::set_attempt`](crate::Engine::set_attempt).
    pub fn set_attempt(&mut self, attempt: Attempt) {
        self.runner.set_attempt(attempt);
    }

    /// Begins a push of `regions`. Then call [`Driver::step`] until it is over.
    pub fn begin(&mut self, regions: Vec<M::Region>) {
        self.begin_told(regions, &[]);
    }

    /// As [`Driver::begin`] with the merged magnitudes of which this rank is told. They must be those of the same weights.
    pub fn begin_told(&mut self, regions: Vec<M::Region>, told: &[f32]) {
        let (began, ticked_at, gather) = (Instant::now(), Duration::ZERO, Duration::ZERO);
        let refused = self.memory.begin(regions, told).err();
        if refused.is_none() {
            self.runner.start(began.elapsed());
        }
        self.push = Some(Push { refused, began, ticked_at, gather });
    }

    /// See [`Store::forget_arrivals`].
    pub(crate) fn forget_arrivals(&mut self) {
        self.memory.forget_arrivals();
    }

    /// Ends the present push, if there is one.
    pub fn abort(&mut self, reason: String) {
        if let Some(push) = self.push.as_ref().filter(|push| push.refused.is_none()) {
            self.runner.abort(reason, push.began.elapsed());
        }
    }

    /// Bytes that the present push, or the last, has delivered.
    pub fn delivered_bytes(&self) -> u64 {
        self.runner.engine().delivered().bytes
    }

    /// Takes in what the threads have done, posts what is due and polls every rail once. Never blocks.
    pub fn step(&mut self) -> Step<M::Region> {
        let Some(push) = &mut self.push else { return Step::Still };
        if let Some(reason) = push.refused.take() {
            return self.end(Err(Failure::Aborted(reason)));
        }
        let now = push.began.elapsed();
        let mut moved = false;
        while let Some((rail, (unfinished, result))) = self.memory.closed() {
            moved = true;
            self.runner.closed(rail, unfinished, result, now);
        }
        while let Some(Staged { slot, took, result }) = self.memory.staged() {
            moved = true;
            push.gather += took;
            self.runner.staged(slot, result, now);
        }
        if let Err(reason) = self.memory.arrived(&mut self.tags) {
            self.runner.abort(reason, now);
        }
        for tag in self.tags.drain(..) {
            moved = true;
            self.runner.arrived(tag, now);
        }
        if now >= push.ticked_at + TICK {
            push.ticked_at = now;
            self.runner.tick(now);
        }
        match self.runner.step(&mut self.memory, now) {
            Turn::Over(result) => self.end(result),
            Turn::Still if !moved => Step::Still,
            Turn::Still | Turn::Moved => Step::Moved,
        }
    }

    fn end(&mut self, result: Result<Delivered, Failure>) -> Step<M::Region> {
        let push = self.push.take();
        let timings = push.map_or_else(Timings::default, |Push { began, gather, .. }| Timings {
            total: began.elapsed(),
            gather,
        });
        let regions = self.memory.end();
        Step::Over(Outcome { result, regions, timings, rails: self.runner.engine().rails().collect() })
    }

    /// Waits until a rail or a slot may have something, for a moment at most.
    pub fn wait(&mut self) {
        if self.runner.engine().in_flight() == 0 {
            // Only a gather.
            return std::thread::sleep(GATHER_WAIT);
        }
        let armed = self.runner.rails_mut().map(|rail| match rail.arm() {
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

impl<M: Store> Drop for Driver<M> {
    fn drop(&mut self) {
        for rail in self.runner.take_rails() {
            if let Err(error) = rail.close(&mut Vec::new()) {
                tracing::error!(%error, "a rail could not be closed: its buffers are leaked");
            }
        }
    }
}
