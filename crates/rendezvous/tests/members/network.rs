//! Writes on their way. Each is held until it is let land; a receiver that closes its end of a rail discards what is on it.

use rendezvous::PushId;
use xfer_plan::Rank;

use crate::memory::Cell;

/// A write on its way.
#[derive(Clone)]
pub(crate) struct Flight {
    pub(crate) from: Rank,
    pub(crate) op: usize,
    pub(crate) to: Rank,
    /// Which rails of the receiver it takes, of all that it ever opened.
    pub(crate) epoch: u64,
    /// Which arena, as the receiver numbers them.
    pub(crate) arena: usize,
    pub(crate) tag: u32,
    pub(crate) rail: u16,
    pub(crate) push: PushId,
    pub(crate) bytes: Vec<(usize, Cell)>,
    /// The sender has given up on it, or is gone.
    pub(crate) given_up: bool,
}

#[derive(Default)]
pub(crate) struct Network {
    pub(crate) flights: Vec<Flight>,
    rails: u16,
}

impl Network {
    pub(crate) fn fresh_rail(&mut self) -> u16 {
        self.rails += 1;
        self.rails
    }

    /// The sender waits no more for what has not landed; what that is.
    pub(crate) fn give_up(&mut self, from: Rank) -> Vec<Flight> {
        let waited_for = self.flights.iter_mut().filter(|flight| flight.from == from && !flight.given_up);
        let mut given_up = Vec::new();
        for flight in waited_for {
            given_up.push(flight.clone());
            flight.given_up = true;
        }
        given_up
    }

    /// A receiver closes some rails.
    pub(crate) fn close(&mut self, to: Rank, rails: &[u16]) {
        self.flights.retain(|flight| flight.to != to || !rails.contains(&flight.rail));
    }

    /// A receiver has no rails but those of `epoch`.
    pub(crate) fn close_all_but(&mut self, to: Rank, epoch: Option<u64>) {
        self.flights.retain(|flight| flight.to != to || Some(flight.epoch) == epoch);
    }
}
