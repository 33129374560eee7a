//! The thread of a trainer's rails, which has the weights while a push runs: over host memory, or a GPU's.

use std::sync::Arc;

use efa_core::{Lease, LeaseMut};
use rendezvous::{Bank, PushId};
use weight_ops::cuda::DeviceRange;
use xfer_exec::driver::{Measured, Outcome, Sender, Timings};
use xfer_exec::{Attempt, Delivered, Failure, RailUse};

use crate::gpu::Gpu;
use crate::memory::{Lent, Weights};
use crate::verify::{Outgoing, Summed, Summing};

const ELSEWHERE: &str = "defect: weights that are not where the rails read";

/// See the module.
pub(crate) enum Pusher {
    /// Whatever the rails read.
    Host(Sender<Lease>),
    Device(Sender<DeviceRange>, Arc<Gpu>),
}

/// How the rails' part of a push ended.
pub(crate) struct Written {
    pub(crate) result: Result<Delivered, Failure>,
    pub(crate) timings: Timings,
    pub(crate) rails: Vec<RailUse>,
    /// What was hashed; `None` where nothing was delivered whole, or nothing is verified.
    pub(crate) summed: Option<Summed>,
}

impl Pusher {
    /// Begins to push, with the magnitudes that this rank is `told`, and to hash what is `outgoing`. `reply` is called from the thread
    /// when both are over, with the weights, or `None` where a rail that did not close still holds them; if the thread is gone, or
    /// the weights are of other memory, it is dropped.
    pub(crate) fn push(
        &self,
        (push, told): (PushId, Vec<f32>),
        weights: Weights,
        outgoing: Option<&Outgoing>,
        reply: impl FnOnce(Option<Weights>, Written) + Send + 'static,
    ) {
        match (self, weights) {
            (Self::Host(sender), Weights::Host(regions)) => {
                let regions: Vec<Lease> = regions.into_iter().map(LeaseMut::freeze).collect();
                let lent = || Lent::Host(regions.clone());
                let summing = outgoing.map(|outgoing| outgoing.start((push, &told), lent(), Arc::default()));
                sender.push_told(regions, told, move |outcome| {
                    let (regions, written) = written(outcome, summing);
                    reply(thawed(regions), written);
                });
            }
            (Self::Device(sender, gpu), Weights::Device(regions)) => {
                let lent = || Lent::Device(Arc::clone(gpu), regions.clone());
                let summing = outgoing.map(|outgoing| outgoing.start((push, &told), lent(), Arc::default()));
                sender.push_told(regions, told, move |outcome| {
                    let (regions, written) = written(outcome, summing);
                    reply(Some(Weights::Device(regions)), written);
                });
            }
            _ => tracing::error!("{ELSEWHERE}"),
        }
    }

    /// Begins to find the magnitudes that this rank reports of these weights. `reply` as for [`Pusher::push`].
    pub(crate) fn measure(
        &self,
        weights: Weights,
        reply: impl FnOnce(Option<Weights>, Result<Vec<f32>, String>) + Send + 'static,
    ) {
        match (self, weights) {
            (Self::Host(sender), Weights::Host(regions)) => {
                let regions = regions.into_iter().map(LeaseMut::freeze).collect();
                sender.magnitudes(regions, |Measured { result, regions }| reply(thawed(regions), result));
            }
            (Self::Device(sender, _), Weights::Device(regions)) => {
                sender.magnitudes(regions, |Measured { result, regions }| {
                    reply(Some(Weights::Device(regions)), result);
                });
            }
            _ => tracing::error!("{ELSEWHERE}"),
        }
    }

    /// Which attempt the next push is.
    pub(crate) fn set_attempt(&self, attempt: Attempt) {
        match self {
            Self::Host(sender) => sender.set_attempt(attempt),
            Self::Device(sender, _) => sender.set_attempt(attempt),
        }
    }

    /// Ends the present push, if there is one.
    pub(crate) fn abort(&self, reason: String) {
        match self {
            Self::Host(sender) => sender.abort(reason),
            Self::Device(sender, _) => sender.abort(reason),
        }
    }

    /// Ends the thread and waits until its rails are closed.
    pub(crate) fn close(self) {
        match self {
            Self::Host(sender) => sender.close(),
            Self::Device(sender, _) => sender.close(),
        }
    }
}

/// As rails know it.
pub(crate) fn attempt(push: PushId, bank: Bank) -> Attempt {
    let PushId([a, b, c, d, ..]) = push;
    Attempt::new(bank.index() == 1, u32::from_le_bytes([a, b, c, d]))
}

/// On the thread of the rails, which have nothing left to do.
fn written<B>(outcome: Outcome<B>, summing: Option<Summing>) -> (Vec<B>, Written) {
    let Outcome { result, regions, timings, rails } = outcome;
    let summed = summing.and_then(|summing| summing.end(result.is_ok()));
    (regions, Written { result, timings, rails, summed })
}

fn thawed(regions: Vec<Lease>) -> Option<Weights> {
    regions.into_iter().map(Lease::thaw).collect::<Result<_, _>>().ok().map(Weights::Host)
}
