//! Transfers in virtual time: started, shared out, delivered.
//!
//! Transfers of one [`Way`] are served one after another; ways share links fairly (max-min). So the size of the problem is
//! the number of ways in use, not of transfers. What is served takes its latency and is then delivered.
//!
//! It holds the time that it has reached and nothing that is not a consequence of the calls made: it must never look at a
//! clock, and never depend on the order of a hash table.

mod error;
mod fair;
mod links;
mod transfers;

use crate::cluster::{Cluster, NicId};
use crate::queue::{EventId, EventQueue};
use crate::random::Random;
use crate::time::Time;

pub use error::NetworkError;
use fair::FairShare;
use links::Links;
pub use links::{Link, Way};
pub use transfers::TransferId;
use transfers::{Lane, LaneIndex, Stage, Transfers};

/// A transfer that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Which.
    pub transfer: TransferId,
    /// What it was started with.
    pub tag: u64,
    /// When.
    pub at: Time,
    /// Whether its bytes are there.
    pub outcome: Outcome,
}

/// How a transfer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All bytes are in the receiver's memory.
    Delivered {
        /// When the sender is told so.
        completed: Time,
    },
    /// A NIC failed. How much of it is there is unknown.
    Failed,
}

/// What happens next within the network.
enum Event {
    /// A lane has served its first transfer.
    Served(LaneIndex),
    /// A transfer arrives.
    Delivered(u32),
}

/// See the module.
pub struct Network {
    cluster: Cluster,
    links: Links,
    fair: FairShare,
    transfers: Transfers,
    events: EventQueue<Event>,
    tolerance: f64,
    random: Random,
    now: Time,
    /// Over, and not yet told.
    done: Vec<Done>,
}

impl Network {
    /// An idle network at time zero.
    ///
    /// `tolerance` is what rates may be off by to be computed faster, from 0 (exact) to 0.5. With a tolerance of e a
    /// transfer always has a link on its way that is used to at least 1 - e of its capacity, and on which no transfer is
    /// faster than it by more than a factor of 1 / (1 - e); no link is ever used above 1 + e of its capacity. 0.1 is a good
    /// choice from some hundred NICs on. `seed` decides all jitter.
    ///
    /// # Errors
    ///
    /// A cluster that [`Cluster::check`] refuses, or a tolerance out of range.
    pub fn new(cluster: &Cluster, tolerance: f64, seed: u64) -> Result<Network, NetworkError> {
        cluster.check()?;
        if !(0.0..=0.5).contains(&tolerance) {
            return Err(NetworkError::Tolerance { tolerance });
        }
        let links = Links::of(cluster);
        Ok(Network {
            fair: FairShare::new(links.capacities(cluster), tolerance),
            links,
            cluster: cluster.clone(),
            transfers: Transfers::default(),
            events: EventQueue::new(),
            tolerance,
            random: Random::new(seed),
            now: Time::ZERO,
            done: Vec::new(),
        })
    }

    /// The time that it has reached.
    pub fn now(&self) -> Time {
        self.now
    }

    /// Starts a transfer of `bytes` of payload. A time before [`Network::now`] counts as now.
    ///
    /// # Errors
    ///
    /// The cluster has no such way.
    pub fn start(&mut self, now: Time, way: Way, bytes: u64, tag: u64) -> Result<TransferId, NetworkError> {
        let work = match way {
            Way::Nic { .. } => self.cluster.nic.wire_bytes(bytes),
            _ => bytes,
        };
        self.start_sized(now, way, work, tag)
    }

    /// As [`Network::start`], for whoever knows what it takes of the wire: several short messages behind each other, say, that
    /// are reported together.
    ///
    /// # Errors
    ///
    /// The cluster has no such way.
    pub fn start_sized(
        &mut self,
        now: Time,
        way: Way,
        work: u64,
        tag: u64,
    ) -> Result<TransferId, NetworkError> {
        let path = self.links.path(way, &self.cluster).ok_or(NetworkError::NoSuchWay { way })?;
        self.run_to(now);
        let (transfer, lane) = self.transfers.push(way, work, tag);
        if self.transfers.lane(lane).waiting == 1 {
            let lane_state = self.transfers.lane_mut(lane);
            (lane_state.remaining, lane_state.rate, lane_state.settled) = (work as f64, 0.0, self.now);
            self.fair.join(lane.0, path);
        }
        Ok(transfer)
    }

    /// Takes a transfer back: it will not be reported. Bytes of it that were served are spent. Whether it was still under way.
    pub fn cancel(&mut self, now: Time, transfer: TransferId) -> bool {
        self.run_to(now);
        let still = self.transfers.is_under_way(transfer);
        if still {
            self.remove(transfer.slot());
        }
        still
    }

    /// A link moves so many bytes a second from now on; 0 stalls what uses it until the rate is set again.
    ///
    /// # Errors
    ///
    /// The cluster has no such link.
    pub fn set_rate(&mut self, now: Time, link: Link, bytes_per_second: u64) -> Result<(), NetworkError> {
        let number = self.links.number(link).ok_or(NetworkError::NoSuchLink { link })?;
        self.run_to(now);
        self.fair.set_capacity(number, bytes_per_second as f64);
        Ok(())
    }

    /// A NIC dies: what it sends fails, and so does what is on its way to it. What it had sent arrives. Later transfers from
    /// it or to it stall for ever: a sender learns by its own deadline.
    ///
    /// # Errors
    ///
    /// The cluster has no such NIC.
    pub fn fail_nic(&mut self, now: Time, nic: NicId) -> Result<(), NetworkError> {
        self.set_rate(now, Link::NicOut(nic), 0)?;
        self.set_rate(now, Link::NicIn(nic), 0)?;
        for (slot, transfer, tag) in self.transfers.lost_with(nic) {
            self.remove(slot);
            self.done.push(Done { transfer, tag, at: self.now, outcome: Outcome::Failed });
        }
        Ok(())
    }

    /// When to call [`Network::advance`] next; `None` if nothing is under way, or all of it is stalled. It may have nothing
    /// to report then. Rates are computed here: start all transfers of one moment first.
    pub fn next_time(&mut self) -> Option<Time> {
        if !self.done.is_empty() {
            return Some(self.now);
        }
        self.share();
        self.events.next_time()
    }

    /// Lets time pass, and appends what is over by `to`, in the order in which it ended.
    pub fn advance(&mut self, to: Time, done: &mut Vec<Done>) {
        self.run_to(to);
        done.append(&mut self.done);
    }

    /// What a link moves at this moment, in bytes a second: on the wire, headers included.
    ///
    /// # Errors
    ///
    /// The cluster has no such link.
    pub fn used(&mut self, link: Link) -> Result<f64, NetworkError> {
        let number = self.links.number(link).ok_or(NetworkError::NoSuchLink { link })?;
        self.share();
        Ok(self.fair.load(number))
    }

    /// What a link can move at this moment, in bytes a second.
    ///
    /// # Errors
    ///
    /// The cluster has no such link.
    pub fn capacity(&self, link: Link) -> Result<f64, NetworkError> {
        let number = self.links.number(link).ok_or(NetworkError::NoSuchLink { link })?;
        Ok(self.fair.capacity(number))
    }

    /// What a way is given at this moment, in bytes a second on the wire; 0 if nothing is served on it.
    pub fn rate(&mut self, way: Way) -> f64 {
        self.share();
        let lane = self.transfers.find(way).filter(|lane| self.transfers.lane(*lane).waiting > 0);
        lane.map_or(0.0, |lane| self.fair.rate(lane.0))
    }

    /// Handles what happens until `to`, and stands there.
    fn run_to(&mut self, to: Time) {
        let to = to.max(self.now);
        loop {
            // All of one moment is handled before rates are computed, once.
            if self.events.next_time().is_none_or(|time| time > self.now) && to > self.now {
                self.share();
            }
            let Some(time) = self.events.next_time().filter(|time| *time <= to) else { break };
            self.now = time;
            match self.events.pop() {
                Some((_, Event::Served(lane))) => self.served(lane),
                Some((_, Event::Delivered(slot))) => self.delivered(slot),
                None => break,
            }
        }
        self.now = to;
    }

    /// Brings rates up to date with who is there.
    fn share(&mut self) {
        if !self.fair.is_stale() {
            return;
        }
        let Network { fair, transfers, events, now, tolerance, .. } = self;
        fair.update(|lane, rate| {
            let lane_index = LaneIndex(lane);
            let lane = transfers.lane_mut(lane_index);
            lane.settle(*now);
            lane.rate = rate;
            schedule(events, lane, lane_index, *tolerance);
        });
    }

    /// The first transfer of a lane has left; the next one takes its place.
    fn served(&mut self, index: LaneIndex) {
        let lane = self.transfers.lane_mut(index);
        lane.settle(self.now);
        lane.event = None;
        if self.tolerance > 0.0 && lane.ends().is_some_and(|ends| ends > self.now) {
            // Its rate has fallen meanwhile.
            return schedule(&mut self.events, lane, index, 0.0);
        }
        let Some(slot) = self.transfers.pop(index) else { return };
        self.serve_next(index);
        let arrives = self.arrival(index);
        let event = self.events.push(arrives, Event::Delivered(slot));
        self.transfers.set_arriving(slot, event);
    }

    /// What was served in excess of the transfer before, less than a nanosecond's worth, counts for the next one.
    fn serve_next(&mut self, index: LaneIndex) {
        let work = self.transfers.first_work(index);
        let lane = self.transfers.lane_mut(index);
        match work {
            Some(work) => {
                lane.remaining += work as f64;
                schedule(&mut self.events, lane, index, 0.0);
            }
            None => self.fair.leave(index.0),
        }
    }

    /// When the transfer that has just been served is delivered.
    fn arrival(&mut self, index: LaneIndex) -> Time {
        let lane = self.transfers.lane_mut(index);
        let (nic, gpu) = (&self.cluster.nic, &self.cluster.host.gpu);
        let (latency, jitter, ordered) = match lane.way {
            Way::Nic { .. } => (nic.latency_nanoseconds, nic.jitter_nanoseconds, nic.semantics.ordered()),
            _ => (gpu.launch_nanoseconds, 0, true),
        };
        // Jitter is up to its bound, which is included.
        let jitter = if jitter == 0 { 0 } else { self.random.below(jitter.saturating_add(1)) };
        let arrives = self.now.plus_nanos(latency).plus_nanos(jitter);
        lane.last_arrival = if ordered { arrives.max(lane.last_arrival) } else { arrives };
        lane.last_arrival
    }

    fn delivered(&mut self, slot: u32) {
        let completion = match self.transfers.way(slot) {
            Way::Nic { .. } => self.cluster.nic.completion_nanoseconds,
            _ => 0,
        };
        let (transfer, tag) = self.transfers.remove(slot);
        let outcome = Outcome::Delivered { completed: self.now.plus_nanos(completion) };
        self.done.push(Done { transfer, tag, at: self.now, outcome });
    }

    /// Takes a transfer out, wherever it is.
    fn remove(&mut self, slot: u32) {
        match self.transfers.stage(slot) {
            Stage::Arriving(event) => {
                self.events.cancel(event);
                self.transfers.remove(slot);
            }
            Stage::Waiting => {
                let index = self.transfers.lane_of(slot);
                let first = self.transfers.unlink(slot);
                if first {
                    let lane = self.transfers.lane_mut(index);
                    lane.settle(self.now);
                    lane.remaining = 0.0;
                    if let Some((event, _)) = lane.event.take() {
                        self.events.cancel(event);
                    }
                    self.serve_next(index);
                }
                self.transfers.remove(slot);
            }
        }
    }
}

/// Puts the end of a lane's first transfer where its rate says; nowhere, if that is never.
///
/// With a tolerance, an end that is near enough stays where it is: one that is too early is found out when it comes, and one
/// that is late by a small part of the time that is left errs to the side that rates err to.
fn schedule(events: &mut EventQueue<Event>, lane: &mut Lane, index: LaneIndex, tolerance: f64) {
    match (lane.ends(), lane.event) {
        (Some(time), Some((event, at))) => {
            let left = time.nanos_since(lane.settled) as f64;
            let late = at.nanos_since(time) as f64;
            let is_near = tolerance > 0.0 && late > 0.0 && late <= left * tolerance / 4.0;
            if !is_near {
                events.move_to(event, time);
                lane.event = Some((event, time));
            }
        }
        (Some(time), None) => lane.event = Some((events.push(time, Event::Served(index)), time)),
        (None, Some((event, _))) => {
            events.cancel(event);
            lane.event = None;
        }
        (None, None) => {}
    }
}
