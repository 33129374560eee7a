//! What is around an engine: the program, rails that misbehave as told, staging slots and a clock, and what must hold at every
//! step.

use std::collections::{BTreeMap, BTreeSet};

use xfer_plan::{DType, NO_TAG, Op, ParamId, RankPlan, RegionIndex, Strided, Transform};

use crate::engine::*;
use crate::program::{RankLimits, Route, WriteId};
use crate::rail::RailIndex;

pub(super) const ROW_BYTES: u32 = 8;
const SLOT_BYTES: u64 = 64;
pub(super) const RECEIVERS: u32 = 5;
pub(super) const RAILS_MAX: usize = 6;

#[derive(Debug, Clone)]
pub(super) struct Case {
    /// Per operation: receiver, rows, and what becomes of them.
    pub(super) ops: Vec<(u32, u32, Kind)>,
    pub(super) rails: Vec<RailLimits>,
    /// Per receiver, the rails that lead to it, as bits; a receiver without any takes the first.
    pub(super) routes: Vec<u8>,
    pub(super) slots: u32,
    /// Decides everything that the world does.
    pub(super) seed: u64,
    pub(super) fault: Fault,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Kind {
    /// One WRITE a row.
    Plain,
    Gather,
    /// One WRITE.
    Transform,
    /// One WRITE a row.
    TransformRows,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Fault {
    None,
    FailWrite(u8),
    Abort(u8),
    /// A receiver never completes anything.
    Silent(u32),
    /// A rail never completes anything.
    SilentRail(u16),
    /// A rail takes nothing for a receiver.
    Refuses(u16, u32),
    /// The first rail breaks, at this step.
    BrokenRail(u8),
    /// As above, and it does not close.
    Leak(u8),
}

impl Case {
    pub(super) fn ways(&self, to: u32) -> Vec<RailIndex> {
        let bits = self.routes[to as usize];
        let mut ways: Vec<_> =
            (0..self.rails.len() as u16).filter(|rail| bits >> rail & 1 == 1).map(RailIndex).collect();
        if ways.is_empty() {
            ways.push(RailIndex(0));
        }
        ways
    }

    pub(super) fn stages(&self, to: u32) -> bool {
        self.ways(to).iter().any(|rail| !self.rails[rail.index()].takes_rows)
    }

    pub(super) fn is_staged(&self, op: u32) -> bool {
        match self.ops[op as usize] {
            _ if self.stages_all() => true,
            (_, _, Kind::Plain) => false,
            (to, rows, Kind::Gather) => rows > 1 && self.stages(to),
            (_, _, Kind::Transform | Kind::TransformRows) => true,
        }
    }

    /// Whether the rails cannot read where the weights are, in a quarter of the cases.
    fn stages_all(&self) -> bool {
        self.seed % 4 == 2
    }

    /// What an operation's WRITEs tell its receiver: in a quarter of the cases about half of them tell something.
    pub(super) fn tag(&self, op: u32) -> u32 {
        let is_tagged = self.seed % 4 == 3 && self.seed >> (2 + op % 62) & 1 == 1;
        if is_tagged { op } else { NO_TAG }
    }

    /// Whether a receiver with operations is reached by nothing but this rail.
    pub(super) fn depends(&self, to: u32, rail: u16) -> bool {
        self.ops.iter().any(|(other, ..)| *other == to) && self.ways(to) == [RailIndex(rail)]
    }

    /// Whether some receiver is.
    pub(super) fn needs(&self, rail: u16) -> bool {
        (0..self.routes.len() as u32).any(|to| self.depends(to, rail))
    }
}

pub(super) fn program(case: &Case) -> Program {
    let mut at = 0;
    let ops = case.ops.iter().map(|&(to, rows, kind)| {
        let bytes = u64::from(rows * ROW_BYTES);
        let region = RegionIndex(0);
        let apart = 2 * u64::from(ROW_BYTES);
        let stride = if kind == Kind::TransformRows && rows > 1 { apart } else { u64::from(ROW_BYTES) };
        let op = Op {
            to: ReceiverRank(to),
            param: ParamId(0),
            row_bytes: ROW_BYTES,
            rows,
            source: Strided { region, offset: at * 2, stride: apart },
            destination: Strided { region, offset: at * 2, stride },
            gather: kind == Kind::Gather && rows > 1,
            transform: match kind {
                Kind::Plain | Kind::Gather => Transform::Copy,
                Kind::Transform | Kind::TransformRows => {
                    Transform::Cast { from: DType::F32, to: DType::BF16 }
                }
            },
            rail: (at / 8 % 5) as u8,
            wave: 0,
        };
        at += bytes;
        op
    });
    let ops: Vec<Op> = ops.collect();
    let bytes = ops.iter().map(Op::bytes).sum();
    let tags = (0..ops.len() as u32).map(|op| case.tag(op)).collect();
    let plan = RankPlan { bytes, writes: ops.iter().map(Op::writes).sum(), ops, tags };
    let route = |to| (ReceiverRank(to), Route { rails: case.ways(to), region_bytes: vec![at * 2] });
    let routes: BTreeMap<_, _> = (0..case.routes.len() as u32).map(route).collect();
    let limits = RankLimits { region_bytes: vec![at * 2], slot_bytes: SLOT_BYTES, transforms: true };
    let bind = if case.stages_all() { Program::staged } else { Program::new };
    bind(plan, BTreeMap::new(), &limits, routes).unwrap()
}

pub(super) fn slots_of(posts: &[Post]) -> impl Iterator<Item = Slot> {
    posts.iter().filter_map(|post| match post.source {
        Source::Slot(slot, _) => Some(slot),
        Source::Region(..) => None,
    })
}

/// The world around the engine.
pub(super) struct World {
    pub(super) engine: Engine,
    pub(super) case: Case,
    pub(super) now: Duration,
    pub(super) actions: VecDeque<Action>,
    pub(super) in_flight: Vec<Post>,
    /// Slots that are being filled, and for which operation.
    pub(super) filling: Vec<(Slot, u32)>,
    /// The operation whose rows are in a slot.
    pub(super) filled: BTreeMap<Slot, u32>,
    pub(super) delivered: BTreeSet<WriteId>,
    /// Rows at the receivers, by their offsets.
    pub(super) landed: BTreeSet<(ReceiverRank, u64)>,
    pub(super) closing: Vec<RailIndex>,
    pub(super) closed: BTreeSet<RailIndex>,
    /// Rails that refused something and have not been polled since.
    pub(super) full: BTreeSet<RailIndex>,
    /// Slots of which a rail that did not close holds a part.
    pub(super) leaked: BTreeSet<Slot>,
    /// WRITEs that ended without being delivered.
    pub(super) lost: BTreeSet<WriteId>,
    pub(super) finished: Option<Result<Delivered, Failure>>,
}

impl World {
    pub(super) fn new(case: Case) -> Self {
        let config = EngineConfig {
            rails: case.rails.clone(),
            slots: case.slots,
            deadline: Duration::from_millis(400),
            stall: Duration::from_millis(150),
            drain: Duration::from_millis(50),
        };
        let engine = Engine::new(program(&case), config);
        Self {
            engine,
            case,
            now: Duration::ZERO,
            actions: VecDeque::new(),
            in_flight: Vec::new(),
            filling: Vec::new(),
            filled: BTreeMap::new(),
            delivered: BTreeSet::new(),
            landed: BTreeSet::new(),
            closing: Vec::new(),
            closed: BTreeSet::new(),
            full: BTreeSet::new(),
            leaked: BTreeSet::new(),
            lost: BTreeSet::new(),
            finished: None,
        }
    }

    pub(super) fn handle(&mut self, event: Event) {
        self.engine.handle(event, self.now, &mut self.actions);
    }

    /// Carries actions out as a driver does: what is posted to a rail goes in one batch, which ends at the first WRITE that
    /// is refused. `refuse` is asked for every WRITE that is offered.
    pub(super) fn carry_out(&mut self, mut refuse: impl FnMut(&Post) -> bool) {
        while !self.actions.is_empty() {
            let mut outboxes: Vec<VecDeque<Post>> = vec![VecDeque::new(); self.case.rails.len()];
            while let Some(action) = self.actions.pop_front() {
                assert!(self.finished.is_none(), "an action after the end: {action:?}");
                match action {
                    Action::Stage { slot, op } => self.stage(slot, op),
                    Action::Post(post) => {
                        self.post(post);
                        outboxes[post.rail.index()].push_back(post);
                    }
                    Action::CloseRail(rail) => self.closing.push(rail),
                    Action::Finish(result) => {
                        let result_is_final = self.filling.is_empty() && self.in_flight.is_empty();
                        assert!(result_is_final, "ended with buffers in use");
                        self.finished = Some(result);
                    }
                }
                assert!(self.slots_in_use().len() <= self.case.slots as usize, "watermark exceeded");
            }
            for mut outbox in outboxes {
                let taken = outbox.iter().position(&mut refuse).unwrap_or(outbox.len());
                while outbox.len() > taken {
                    let Some(Post { id, rail, .. }) = outbox.pop_back() else { break };
                    self.in_flight.retain(|post| post.id != id);
                    self.full.insert(rail);
                    self.handle(match outbox.len() == taken {
                        true => Event::Refused(rail, id),
                        false => Event::Unoffered(rail, id),
                    });
                }
            }
        }
    }

    /// Nothing is written into a slot while a WRITE of it may be posted or read.
    pub(super) fn stage(&mut self, slot: Slot, op: u32) {
        assert!(!self.slots_in_use().contains(&slot), "slot given out twice");
        assert!(self.case.is_staged(op));
        if let Some(before) = self.filled.remove(&slot) {
            let writes = self.delivered.iter().filter(|id| id.op == before).count() as u64;
            assert_eq!(
                writes,
                self.engine.program().ops()[before as usize].writes(),
                "slot taken back too soon"
            );
        }
        self.filling.push((slot, op));
    }

    pub(super) fn staged(&mut self, (slot, op): (Slot, u32)) {
        assert_eq!(self.filled.insert(slot, op), None);
        self.handle(Event::Staged(slot));
    }

    /// What the plan says of the rows of a WRITE.
    pub(super) fn check_rows(&self, post: &Post) {
        let op = &self.engine.program().ops()[post.id.op as usize];
        let apart = post.offset - op.destination.offset;
        let row = if op.writes() == 1 { 0 } else { apart / op.destination.stride };
        assert_eq!(apart, row * op.destination.stride);
        assert_eq!(post.rows.total_bytes(), op.bytes() / op.writes());
        assert_eq!(post.tag, self.case.tag(post.id.op));
        match post.source {
            Source::Slot(slot, offset) => {
                assert_eq!(self.filled.get(&slot), Some(&post.id.op), "a slot without the rows");
                assert_eq!((offset, post.rows.count), (row * u64::from(ROW_BYTES), 1));
            }
            Source::Region(_, offset) => {
                assert!(!self.case.is_staged(post.id.op));
                assert_eq!(offset, op.source.offset + row * op.source.stride);
            }
        }
    }

    pub(super) fn delivered(&mut self, post: Post) {
        assert!(self.delivered.insert(post.id), "delivered twice");
        for row in 0..post.rows.total_bytes() / u64::from(ROW_BYTES) {
            assert!(self.landed.insert((post.to, post.offset + row * u64::from(ROW_BYTES))), "landed twice");
        }
        self.handle(Event::Delivered(post.rail, post.id));
    }

    /// Where the plan's rows must land.
    pub(super) fn planned_rows(&self) -> BTreeSet<(ReceiverRank, u64)> {
        let ops = self.engine.program().ops().iter();
        ops.flat_map(|op| {
            (0..u64::from(op.rows)).map(|row| (op.to, op.destination.offset + row * op.destination.stride))
        })
        .collect()
    }

    pub(super) fn post(&mut self, post: Post) {
        self.check_rows(&post);
        assert!(
            post.tag == NO_TAG || !self.lost.contains(&post.id),
            "what its receiver counts is written again"
        );
        assert!(!self.in_flight.iter().any(|other| other.id == post.id), "posted twice");
        assert!(!self.delivered.contains(&post.id), "posted again after delivery");
        assert!(post.rows.count == 1 || self.case.rails[post.rail.index()].takes_rows);
        assert!(self.case.ways(post.to.0).contains(&post.rail), "posted where no way leads");
        assert!(!self.closed.contains(&post.rail), "posted to a closed rail");
        assert!(!self.closing.contains(&post.rail), "posted to a rail that closes");
        self.in_flight.push(post);
        let rail = self.in_flight.iter().filter(|other| other.rail == post.rail);
        let bytes: u64 = rail.clone().map(|other| other.rows.total_bytes()).sum();
        let limits = self.case.rails[post.rail.index()];
        assert!(rail.clone().count() <= limits.depth as usize, "rail over its depth");
        assert!(rail.count() == 1 || bytes <= limits.in_flight_bytes_max, "rail over its bytes");
    }

    pub(super) fn slots_in_use(&self) -> BTreeSet<Slot> {
        let filling = self.filling.iter().map(|(slot, _)| *slot);
        filling.chain(slots_of(&self.in_flight)).chain(self.leaked.iter().copied()).collect()
    }

    pub(super) fn is_silent(&self, post: &Post) -> bool {
        match self.case.fault {
            Fault::Silent(rank) => post.to == ReceiverRank(rank),
            Fault::SilentRail(rail) => post.rail == RailIndex(rail),
            _ => false,
        }
    }

    /// Closes a rail, as a driver does.
    pub(super) fn close(&mut self, rail: RailIndex) {
        let (of_it, others): (Vec<Post>, _) =
            std::mem::take(&mut self.in_flight).into_iter().partition(|post| post.rail == rail);
        self.in_flight = others;
        self.closed.insert(rail);
        self.full.remove(&rail);
        if let Fault::Leak(_) = self.case.fault {
            self.leaked.extend(slots_of(&of_it));
            return self.handle(Event::RailClosed(rail, Err("it does not close".into())));
        }
        for post in of_it {
            self.lost.insert(post.id);
            self.handle(Event::Returned(rail, post.id));
        }
        self.handle(Event::RailClosed(rail, Ok(())));
    }

    pub(super) fn run(&mut self) {
        let mut state = self.case.seed;
        // splitmix64, its middle byte.
        let mut choice = move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            ((mixed ^ (mixed >> 27)) >> 32) as u8
        };
        self.full.clear();
        self.filled.clear();
        self.handle(Event::Start);
        for step in 0..20_000u32 {
            // Refusals come in bursts but not for ever.
            let refuse_from = if step % 7 < 3 { 64 } else { 127 };
            let mut refusals = (choice() % 5) as u32;
            let fault = self.case.fault;
            self.carry_out(|post| {
                let for_ever = fault == Fault::Refuses(post.rail.0, post.to.0);
                let refuse = refusals > 0 && choice() > refuse_from;
                refusals -= u32::from(refuse);
                refuse || for_ever
            });
            if self.finished.is_some() {
                return;
            }
            self.now += Duration::from_millis(1);
            if choice() == 0 && choice() < 64 {
                // This process is stopped for a while.
                self.now += Duration::from_secs(10);
                self.handle(Event::Tick);
            }
            match self.case.fault {
                Fault::Abort(at) if step == u32::from(at) => self.handle(Event::Abort("stop".into())),
                Fault::BrokenRail(at) | Fault::Leak(at) if step == u32::from(at) => {
                    self.handle(Event::RailFailed(RailIndex(0), "broken".into()));
                }
                _ => {}
            }
            if choice() % 2 == 0
                && let Some(rail) = self.closing.pop()
            {
                self.close(rail);
                continue;
            }
            if !self.filling.is_empty() && choice() % 2 == 0 {
                let index = choice() as usize % self.filling.len();
                let filled = self.filling.swap_remove(index);
                self.staged(filled);
            }
            let live: Vec<usize> =
                (0..self.in_flight.len()).filter(|at| !self.is_silent(&self.in_flight[*at])).collect();
            // In any order, but nothing waits for ever.
            let at = if step % 4 == 0 { 0 } else { choice() as usize };
            if !live.is_empty() && (step % 4 == 0 || choice() % 4 != 0) {
                let post = self.in_flight.remove(live[at % live.len()]);
                if matches!(self.case.fault, Fault::FailWrite(at) if self.delivered.len() >= usize::from(at))
                {
                    self.lost.insert(post.id);
                    self.handle(Event::Failed(post.rail, post.id, "no".into()));
                } else {
                    self.delivered(post);
                }
            }
            for rail in std::mem::take(&mut self.full) {
                self.handle(Event::Polled(rail));
            }
            self.handle(Event::Tick);
        }
        panic!("no end");
    }
}
