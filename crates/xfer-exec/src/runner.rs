//! Runs the engine on a rank's rails, whatever they lead over and wherever the bytes are.
//!
//! Real drivers and simulated ranks are this loop with a [`Memory`] and a clock of their own, so that a simulation says
//! something about the code that runs on real rails. It reads no clock, starts no thread and never blocks, and on the way of a
//! WRITE it allocates nothing.

use core::time::Duration;
use std::collections::VecDeque;

use xfer_plan::Op;

use crate::engine::{Action, Attempt, Delivered, Engine, EngineConfig, Event, Failure, Post, Slot};
use crate::program::{Program, WriteId};
use crate::rail::{Done, Rail, RailIndex, RailWrite};

/// How often [`Runner::tick`] is due while a push runs. Its deadlines are of seconds.
pub const TICK: Duration = Duration::from_millis(5);

/// Entries that there is room for from the start; more is made in the first push, if it needs more. Rails may be thousands deep,
/// and a simulation has thousands of runners.
const ROOM_MAX: usize = 256;

/// Where a rank's bytes are, and who moves them besides rails: host memory and threads, or a simulation.
pub trait Memory {
    /// Its rails.
    type Rail: Rail + ?Sized;

    /// What a WRITE reads from; `None` where that is outside this rank's memory.
    fn buffer(&mut self, post: &Post) -> Option<<Self::Rail as Rail>::Buffer>;

    /// Begins to fill a slot with the rows of an operation, whose place in the program is `index`. Told back with
    /// [`Runner::staged`].
    ///
    /// # Errors
    ///
    /// Where it cannot begin, which is a defect.
    fn stage(&mut self, slot: Slot, index: u32, op: &Op) -> Result<(), String>;

    /// Begins to close a rail. Told back with [`Runner::closed`].
    fn close(&mut self, number: RailIndex, rail: Box<Self::Rail>);
}

/// What a step did.
#[derive(Debug)]
pub enum Turn {
    /// Something was delivered or refused.
    Moved,
    /// Nothing.
    Still,
    /// The push is over.
    Over(Result<Delivered, Failure>),
}

/// A rail and what is on its way to it.
struct RailState<R: Rail + ?Sized> {
    /// `None` once it has been closed.
    rail: Option<Box<R>>,
    outbox: VecDeque<RailWrite<R::Buffer>>,
    refused: bool,
}

/// See the module.
pub struct Runner<M: Memory> {
    engine: Engine,
    rails: Vec<RailState<M::Rail>>,
    done: Vec<Done<<M::Rail as Rail>::Buffer>>,
    actions: VecDeque<Action>,
}

impl<M: Memory> Runner<M> {
    /// A runner that has not pushed yet, over rails as the program's routes number them and so many staging slots. For
    /// `deadline` and `stall` see [`EngineConfig`].
    pub fn new(
        program: Program,
        rails: Vec<Box<M::Rail>>,
        slots: u32,
        deadline: Duration,
        stall: Duration,
    ) -> Self {
        let config = EngineConfig {
            rails: rails.iter().map(|rail| rail.limits()).collect(),
            slots,
            deadline,
            stall,
            // What was posted either completes about as fast as before the failure, or not at all.
            drain: (deadline / 10).max(TICK),
        };
        let depth: usize = config.rails.iter().map(|limits| limits.depth as usize).sum();
        let room = |depth: usize| depth.min(ROOM_MAX);
        let state = |rail: Box<M::Rail>| {
            let outbox = VecDeque::with_capacity(room(rail.limits().depth as usize));
            RailState { rail: Some(rail), outbox, refused: false }
        };
        Self {
            engine: Engine::new(program, config),
            rails: rails.into_iter().map(state).collect(),
            done: Vec::with_capacity(room(depth)),
            actions: VecDeque::with_capacity(room(depth)),
        }
    }

    /// The engine, to look at.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The rails that have not been closed.
    pub fn rails_mut(&mut self) -> impl Iterator<Item = &mut M::Rail> {
        self.rails.iter_mut().filter_map(|state| state.rail.as_deref_mut())
    }

    /// Takes the rails that have not been closed, to close them: there is no further push.
    pub fn take_rails(&mut self) -> impl Iterator<Item = Box<M::Rail>> {
        self.rails.iter_mut().filter_map(|state| state.rail.take())
    }

    /// See [`Engine::set_attempt`].
    pub fn set_attempt(&mut self, attempt: Attempt) {
        self.engine.set_attempt(attempt);
    }

    /// Begins a push. Then call [`Runner::step`] until it is over.
    pub fn start(&mut self, now: Duration) {
        self.engine.handle(Event::Start, now, &mut self.actions);
    }

    /// Ends the present push.
    pub fn abort(&mut self, reason: String, now: Duration) {
        self.engine.handle(Event::Abort(reason), now, &mut self.actions);
    }

    /// A slot has been filled, or why it could not be, which ends the push.
    pub fn staged(&mut self, slot: Slot, result: Result<(), String>, now: Duration) {
        if let Err(reason) = result {
            self.abort(reason, now);
        }
        self.engine.handle(Event::Staged(slot), now, &mut self.actions);
    }

    /// A WRITE with this tag has arrived at this rank: what waited for it may be passed on.
    pub fn arrived(&mut self, tag: u32, now: Duration) {
        self.engine.handle(Event::Arrived(tag), now, &mut self.actions);
    }

    /// A rail has been closed, or why it could not be; which WRITEs it had in flight.
    pub fn closed(
        &mut self,
        rail: RailIndex,
        unfinished: Vec<WriteId>,
        result: Result<(), String>,
        now: Duration,
    ) {
        for id in unfinished {
            self.engine.handle(Event::Returned(rail, id), now, &mut self.actions);
        }
        self.engine.handle(Event::RailClosed(rail, result), now, &mut self.actions);
    }

    /// Time has passed; see [`TICK`].
    pub fn tick(&mut self, now: Duration) {
        self.engine.handle(Event::Tick, now, &mut self.actions);
    }

    /// Carries out what the engine asks for, then posts to every rail and polls it once. Never blocks.
    pub fn step(&mut self, memory: &mut M, now: Duration) -> Turn {
        if let Some(result) = self.carry_out(memory, now) {
            return Turn::Over(result);
        }
        let mut moved = false;
        for rail in 0..self.rails.len() {
            moved |= self.turn(rail, now);
        }
        if moved || !self.actions.is_empty() { Turn::Moved } else { Turn::Still }
    }

    /// Carries out what the engine asked for; the push's result once it is over.
    fn carry_out(&mut self, memory: &mut M, now: Duration) -> Option<Result<Delivered, Failure>> {
        while let Some(action) = self.actions.pop_front() {
            match action {
                Action::Post(post) => self.post(&post, memory, now),
                Action::Stage { slot, op } => self.stage(slot, op, memory, now),
                Action::CloseRail(rail) => self.close(rail, memory, now),
                Action::Finish(result) => return Some(result),
            }
        }
        None
    }

    fn post(&mut self, post: &Post, memory: &mut M, now: Duration) {
        let from = memory.buffer(post);
        let state = self.rails.get_mut(post.rail.index());
        match from.zip(state.filter(|state| state.rail.is_some())) {
            Some((from, state)) => state.outbox.push_back(RailWrite {
                id: post.id,
                from,
                rows: post.rows,
                to: post.to,
                region: post.region,
                offset: post.offset,
                tag: post.tag,
            }),
            None => {
                let reason = "the plan reads outside this rank's memory".into();
                self.engine.handle(Event::Failed(post.rail, post.id, reason), now, &mut self.actions);
            }
        }
    }

    fn stage(&mut self, slot: Slot, index: u32, memory: &mut M, now: Duration) {
        let begun = match self.engine.program().ops().get(index as usize) {
            Some(op) => memory.stage(slot, index, op),
            None => Err(format!("defect: there is no operation {index} to stage")),
        };
        if begun.is_err() {
            self.staged(slot, begun, now);
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

    fn close(&mut self, number: RailIndex, memory: &mut M, now: Duration) {
        let Some(state) = self.rails.get_mut(number.index()) else { return };
        let (unposted, rail) = (std::mem::take(&mut state.outbox), state.rail.take());
        for RailWrite { id, .. } in unposted {
            self.engine.handle(Event::Returned(number, id), now, &mut self.actions);
        }
        match rail {
            Some(rail) => memory.close(number, rail),
            None => self.engine.handle(Event::RailClosed(number, Ok(())), now, &mut self.actions),
        }
    }
}
