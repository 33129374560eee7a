//! Who has a trainer's weights: they are lent to the rails by value, and nobody else reaches them meanwhile.

use tokio::sync::oneshot;

use crate::error::Error;
use crate::memory::Weights;

/// Who has the weights.
pub(super) enum Holder {
    /// The session.
    Here(Weights),
    /// The rails, until these come back; without them, where a rail did not close.
    Lent(oneshot::Receiver<Option<Weights>>),
    /// Lost to a rail that did not close.
    Lost,
}

impl Holder {
    pub(super) fn of(weights: Option<Weights>) -> Self {
        weights.map_or(Self::Lost, Self::Here)
    }

    /// Gives the weights away until they come back over `lent`.
    pub(super) fn lend(&mut self, lent: oneshot::Receiver<Option<Weights>>) -> Result<Weights, Error> {
        match std::mem::replace(self, Self::Lent(lent)) {
            Self::Here(weights) => Ok(weights),
            other => {
                *self = other;
                Err(Error::Broken)
            }
        }
    }

    /// Waits until they are back.
    pub(super) async fn take_back(&mut self) {
        if let Self::Lent(weights) = self {
            *self = Self::of(weights.await.ok().flatten());
        }
    }
}
