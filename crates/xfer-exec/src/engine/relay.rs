//! What a rank passes on: operations that wait until what they read has arrived.
//!
//! The engine is told of each WRITE that arrives, by its tag, and counts. Nothing is passed on before all that it waits for is
//! there, and a count that cannot be right ends the push. Above its [`TAG_BITS`] a tag carries a mark of the attempt, so that one
//! which was given up does not count for the next.

use core::time::Duration;

use xfer_plan::{NO_TAG, TAG_BITS};

use super::{Actions, Engine, Failure, Phase};
use crate::program::Program;

/// What has arrived in the present push.
pub(super) struct Arrivals {
    /// WRITEs by tag.
    writes: Vec<u32>,
    /// Tags of which some have not arrived.
    awaited: usize,
}

impl Arrivals {
    pub(super) fn new(program: &Program) -> Self {
        Self { writes: vec![0; program.tags()], awaited: 0 }
    }

    /// Begins a push.
    pub(super) fn start(&mut self, program: &Program) {
        self.writes.fill(0);
        self.awaited = program.tags();
    }
}

/// What one attempt at a push must not be mistaken for another in. All ranks of a push have the same mark, and are told the same bank.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attempt {
    /// It writes to the second bank of regions at receivers that have two, or where these have turned, to the first.
    pub second_bank: bool,
    mark: u32,
}

/// Marks that there are: the last number is left to [`NO_TAG`].
const MARKS: u32 = (1 << (u32::BITS - TAG_BITS)) - 1;

impl Attempt {
    /// With a mark that follows from any number, best a random one: one attempt in a thousand has the mark of the one before.
    pub fn new(second_bank: bool, number: u32) -> Self {
        Self { second_bank, mark: (number % MARKS) << TAG_BITS }
    }

    /// A tag as it is sent.
    pub(super) fn marked(self, tag: u32) -> u32 {
        if tag == NO_TAG { NO_TAG } else { tag | self.mark }
    }

    /// A tag that was sent in this attempt, as the plan has it; `None` for those of others.
    fn own(self, tag: u32) -> Option<u32> {
        let own = tag ^ self.mark;
        (own >> TAG_BITS == 0).then_some(own)
    }
}

impl Engine {
    pub(super) fn arrived(&mut self, tag: u32, now: Duration, actions: &mut Actions) {
        let Phase::Writing = self.phase else { return };
        // Also not what says nothing.
        let Some(tag) = self.attempt.own(tag) else { return };
        let release = self.program.release(tag);
        let Some((release, writes)) = release.zip(self.arrivals.writes.get_mut(tag as usize)) else {
            let reason = format!("a write arrived with tag {tag}, which nothing here waits for");
            return self.fail(Failure::Protocol(reason), now);
        };
        *writes += 1;
        self.moved_at = now;
        if *writes > release.awaited {
            let reason = format!("more than {} writes arrived with tag {tag}", release.awaited);
            return self.fail(Failure::Protocol(reason), now);
        }
        if *writes < release.awaited {
            return;
        }
        self.arrivals.awaited -= 1;
        for index in release.ops {
            let Some(op) = self.program.ops().get(index as usize) else { continue };
            // As many as its rows, which are 32 bits.
            let (to, writes) = (op.to.0, op.writes() as u32);
            self.peers[to as usize].backlog.make_ready(index, None, writes);
            self.offer_to_all(to, self.home(index), now, actions);
        }
    }

    /// Whether this rank can do nothing until more has arrived. How long that may take is for others to say.
    pub(super) fn waits_for_arrivals(&self) -> bool {
        let is_ready = self.peers.iter().any(|peer| peer.backlog.has_ready() || peer.backlog.has_unstaged());
        self.arrivals.awaited > 0 && !is_ready && self.staging.filling == 0 && self.closing == 0
    }
}
