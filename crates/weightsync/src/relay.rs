//! What an inference rank passes on: rails with a thread of their own, which send from where the rank is written to, once all has
//! arrived that an operation waits for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use efa_core::Target;
use rendezvous::{Bank, Fence, PushId};
use weight_ops::cuda::DeviceRange;
use xfer_exec::RailUse;
use xfer_exec::driver::{Outcome, Sender};

use crate::connect::{ConnectedRail, fences};
use crate::memory::{Exposed, Lent};
use crate::pusher::{Written, attempt};
use crate::verify::Outgoing;

/// The thread, over host memory or a GPU's.
pub(crate) enum Passer {
    Host(Sender<Target>),
    Device(Sender<DeviceRange>),
}

/// See the module. Dropping it stops what it passes on, without waiting for the end.
pub(crate) struct Relay {
    passer: Passer,
    rails: Vec<ConnectedRail>,
    /// What to hash, where the job verifies.
    outgoing: Option<Arc<Outgoing>>,
    /// The push under way was given up: nobody waits for its hashes either.
    given_up: Arc<AtomicBool>,
}

impl Relay {
    pub(crate) fn new(passer: Passer, rails: Vec<ConnectedRail>, outgoing: Option<Arc<Outgoing>>) -> Self {
        Self { passer, rails, outgoing, given_up: Arc::default() }
    }

    /// Begins to pass on what arrives in `arena`, to this bank of its receivers. All counts that arrives once this has returned:
    /// nobody may write before. `reply` is called from the thread when everything is delivered and, where the job verifies,
    /// hashed. `false` where the thread is gone.
    pub(crate) fn start(
        &self,
        push: PushId,
        bank: Bank,
        arena: Exposed,
        reply: impl FnOnce(Written) + Send + 'static,
    ) -> bool {
        // The push before is over.
        self.given_up.store(false, Ordering::Relaxed);
        let lent = Lent::Arena(arena.clone());
        let hashing = self.outgoing.clone().map(|outgoing| (outgoing, (push, lent), self.given_up.clone()));
        match (&self.passer, arena) {
            (Passer::Host(sender), Exposed::Host(target)) => {
                sender.set_attempt(attempt(push, bank));
                sender.pass_on(vec![target], move |outcome| reply(written(outcome, hashing)))
            }
            (Passer::Device(sender), Exposed::Device(_, range)) => {
                sender.set_attempt(attempt(push, bank));
                sender.pass_on(vec![range], move |outcome| reply(written(outcome, hashing)))
            }
            _ => false,
        }
    }

    /// Stops passing on, if it does.
    pub(crate) fn abort(&self, reason: String) {
        self.given_up.store(true, Ordering::Relaxed);
        match &self.passer {
            Passer::Host(sender) => sender.abort(reason),
            Passer::Device(sender) => sender.abort(reason),
        }
    }

    /// Stops, and waits until its rails are closed.
    pub(crate) fn close(self) {
        match self.passer {
            Passer::Host(sender) => sender.close(),
            Passer::Device(sender) => sender.close(),
        }
    }

    /// Whether the job verifies what is passed on.
    pub(crate) fn hashes(&self) -> bool {
        self.outgoing.is_some()
    }

    /// Its rails, as a push used them.
    pub(crate) fn rails<'a>(
        &'a self,
        used: &'a [RailUse],
    ) -> impl Iterator<Item = (&'a str, &'a RailUse)> + Clone {
        self.rails.iter().map(|rail| rail.name.as_str()).zip(used)
    }

    pub(crate) fn fences(&self, used: &[RailUse]) -> Vec<Fence> {
        fences(&self.rails, used)
    }
}

/// What to hash, of which push, and until when.
type Hashing = (Arc<Outgoing>, (PushId, Lent), Arc<AtomicBool>);

/// On the thread of the rails, which have nothing left to do. Only now is everything there that is to be hashed.
fn written<B>(outcome: Outcome<B>, hashing: Option<Hashing>) -> Written {
    let Outcome { result, regions, timings, rails } = outcome;
    drop(regions);
    let summed = hashing.filter(|_| result.is_ok()).and_then(|(outgoing, (push, arena), given_up)| {
        outgoing.start((push, &[]), arena, given_up).end(true)
    });
    Written { result, timings, rails, summed }
}
