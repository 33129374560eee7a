//! Flights: WRITEs from the moment that a rank's thread takes them to the moment that it is told how they ended.

use xfer_exec::engine::RailUse;
use xfer_exec::{Done, RailIndex, RailWrite, Rows, Source, WriteId};
use xfer_plan::{NO_TAG, Rank, ReceiverRank, RegionIndex};

use super::bytes::Stamp;
use super::faults::Fate;
use super::rail::Piece;
use super::rank::Hop;
use super::sabotage::Sabotage;
use super::world::{Closed, Event, Tag, World};
use crate::network::{Outcome, TransferId, Way};
use crate::time::Time;

/// WRITEs that a NIC is told of at once: those at the front do not wait for the others to be posted.
const DOORBELL: u64 = 16;

/// How long it takes to close a rail, in nanoseconds: assumed.
const CLOSE_NANOSECONDS: u64 = 1_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Its sender's thread has yet to post it.
    Posting,
    Moving(TransferId),
    /// Its sender will be told.
    Landed,
    /// Nobody waits for it any more; what of it is on the wire may still arrive.
    Ghost,
}

/// A WRITE of a flight.
pub(super) struct Carried {
    pub(super) id: WriteId,
    pub(super) source: Source,
    piece: Option<Piece>,
    pub(super) rows: Rows,
    pub(super) region: RegionIndex,
    pub(super) offset: u64,
    tag: u32,
    /// What it carries, once nobody may read the sender's memory for it any more.
    frozen: Option<Vec<Stamp>>,
}

/// WRITEs of one rail to one receiver that leave together: a long one, or several short ones behind each other.
pub(super) struct Flight {
    pub(super) from: u32,
    pub(super) to: u32,
    rail: RailIndex,
    hop: Hop,
    stage: Stage,
    /// Whether it counts among what arrives.
    counts: bool,
    result: Result<(), String>,
    writes: Vec<Carried>,
    bytes: u64,
}

/// All flights, by number.
#[derive(Default)]
pub(super) struct Flights {
    slots: Vec<Option<Flight>>,
    vacant: Vec<u32>,
    spare: Vec<Vec<Carried>>,
}

impl Carried {
    fn of(write: RailWrite<Piece>) -> Carried {
        let RailWrite { id, from: piece, rows, region, offset, tag, .. } = write;
        Carried { id, source: piece.source, piece: Some(piece), rows, region, offset, tag, frozen: None }
    }
}

impl Flights {
    fn push(&mut self, flight: Flight) -> u32 {
        match self.vacant.pop() {
            Some(number) => {
                self.slots[number as usize] = Some(flight);
                number
            }
            None => {
                self.slots.push(Some(flight));
                self.slots.len() as u32 - 1
            }
        }
    }

    fn get_mut(&mut self, number: u32) -> Option<&mut Flight> {
        self.slots.get_mut(number as usize)?.as_mut()
    }

    fn remove(&mut self, number: u32) {
        if let Some(mut flight) = self.slots.get_mut(number as usize).and_then(Option::take) {
            self.vacant.push(number);
            flight.writes.clear();
            self.spare.push(flight.writes);
        }
    }

    /// Whom a flight goes to.
    fn to(&self, number: u32) -> usize {
        self.slots.get(number as usize).and_then(Option::as_ref).map_or(0, |flight| flight.to as usize)
    }

    /// Room for the WRITEs of a flight.
    fn spare(&mut self) -> Vec<Carried> {
        // Most have one.
        self.spare.pop().unwrap_or_else(|| Vec::with_capacity(1))
    }

    /// Those that a condition holds for, by number.
    fn find(&self, mut wanted: impl FnMut(&Flight) -> bool) -> Vec<u32> {
        let numbered = (0..).zip(&self.slots);
        let found = numbered.filter(|(_, flight)| flight.as_ref().is_some_and(&mut wanted));
        found.map(|(number, _)| number).collect()
    }
}

impl World<'_> {
    /// Makes flights of what a rank's thread has posted: to a NIC each WRITE takes its time, and a doorbell's worth leaves
    /// together.
    pub(super) fn take_posted(&mut self, number: u32) {
        let post_nanoseconds = self.config.cluster.nic.post_nanoseconds;
        let base = self.ranks[number as usize].busy_until;
        let mut posted = 0;
        for rail in 0..self.ranks[number as usize].rails.len() {
            let rail = RailIndex(rail as u16);
            let rank = &self.ranks[number as usize];
            let is_nic = rail.index() < rank.nics.len();
            let mut writes = std::mem::take(&mut rank.rails[rail.index()].borrow_mut().posted);
            let mut rest = writes.drain(..).peekable();
            while let Some(first) = rest.next() {
                let (to, mut bytes) = (first.to, first.rows.total_bytes());
                let mut carried = self.flights.spare();
                carried.push(Carried::of(first));
                while let Some(next) = rest
                    .next_if(|next| next.to == to && bytes + next.rows.total_bytes() <= self.burst_bytes_max)
                {
                    bytes += next.rows.total_bytes();
                    carried.push(Carried::of(next));
                }
                let doorbell = if is_nic { posted / DOORBELL } else { 0 };
                let rank = &self.ranks[number as usize];
                let posts = |write: &Carried| rank.cost(write.id.op).map_or(1, |cost| u64::from(cost.writes));
                posted += if is_nic { carried.iter().map(posts).sum() } else { 0 };
                let Some(flight) = self.flight(number, rail, to, carried) else { continue };
                if doorbell == 0 {
                    self.launch(flight);
                    continue;
                }
                let due = base.plus_nanos(doorbell * DOORBELL * post_nanoseconds);
                let rank = &mut self.ranks[number as usize];
                if rank.launches.back().is_none_or(|(last, _)| *last != due) {
                    self.events.push(due, Event::Launch(number));
                }
                rank.launches.push_back((due, flight));
            }
            drop(rest);
            // Its room is kept.
            self.ranks[number as usize].rails[rail.index()].borrow_mut().posted = writes;
        }
        self.ranks[number as usize].busy_until = base.plus_nanos(posted * post_nanoseconds);
    }

    fn flight(
        &mut self,
        number: u32,
        rail: RailIndex,
        to: ReceiverRank,
        mut writes: Vec<Carried>,
    ) -> Option<u32> {
        let receiver = self.number(Rank::Receiver(to));
        let rank = &mut self.ranks[number as usize];
        rank.times.change(self.now, |under_way| under_way.launches += 1);
        let rank = &self.ranks[number as usize];
        let Some(hop) = self.ranks.get(receiver as usize).and_then(|to| rank.hop(rail, to)) else {
            self.breaks(format!("{} posts to {to}, to which it has no way", rank.rank));
            return None;
        };
        if let Some(sabotage) = self.sabotage {
            writes.iter_mut().for_each(|write| sabotage.damage(write));
        }
        let bytes = writes.iter().map(|write| write.rows.total_bytes()).sum();
        Some(self.flights.push(Flight {
            from: number,
            to: receiver,
            rail,
            hop,
            stage: Stage::Posting,
            counts: false,
            result: Ok(()),
            writes,
            bytes,
        }))
    }

    pub(super) fn launch_due(&mut self, number: u32) {
        let now = self.now;
        let launches = &mut self.ranks[number as usize].launches;
        let due = launches.partition_point(|(due, _)| *due <= now);
        let due: Vec<u32> = launches.drain(..due).map(|(_, flight)| flight).collect();
        due.into_iter().for_each(|flight| self.launch(flight));
    }

    fn launch(&mut self, number: u32) {
        let now = self.now;
        let Some(flight) = self.flights.get_mut(number) else { return };
        let Flight { from, hop: Hop { way, .. }, stage: Stage::Posting, .. } = *flight else { return };
        let (rank, nic) = (&self.ranks[from as usize], &self.config.cluster.nic);
        let wire_bytes = |write: &Carried| match (way, rank.cost(write.id.op)) {
            (Way::Nic { .. }, Some(cost)) => cost.wire_bytes,
            (Way::Nic { .. }, None) => nic.wire_bytes(write.rows.total_bytes()),
            _ => write.rows.total_bytes(),
        };
        let work = flight.writes.iter().map(wire_bytes).sum();
        let started = self.network.start_sized(now, way, work, Tag::Flight(number).pack());
        match started {
            Ok(transfer) => flight.stage = Stage::Moving(transfer),
            Err(error) => return self.breaks(error.to_string()),
        }
        self.ranks[from as usize].times.change(now, |under_way| {
            under_way.launches = under_way.launches.saturating_sub(1);
            match way {
                Way::Nvlink { .. } => under_way.over_nvlink += 1,
                _ => under_way.over_nics += 1,
            }
        });
        let (who, to) = (self.ranks[from as usize].rank, &self.ranks[self.flights.to(number)].rank);
        self.log.say(now, || format!("{who} launches flight {number} to {to}: {work} bytes on the wire"));
        if self.sabotage == Some(Sabotage::EarlyCompletion) {
            self.completes(number, now, Ok(()));
        }
    }

    /// The sender of a flight will be told how it ended.
    fn completes(&mut self, number: u32, at: Time, result: Result<(), String>) {
        let Some(flight) = self.flights.get_mut(number) else { return };
        flight.result = result;
        if at > self.now {
            self.events.push(at, Event::Complete(number));
        } else {
            self.complete(number);
        }
    }

    /// The network has done with a flight.
    pub(super) fn landed(&mut self, number: u32, outcome: Outcome) {
        let now = self.now;
        let Some(flight) = self.flights.get_mut(number) else { return };
        let (to, stage) = (flight.to, flight.stage);
        self.log.say(now, || format!("flight {number} ends as {outcome:?}, {stage:?}"));
        let receiver = &self.ranks[to as usize];
        let is_open = receiver.alive
            && flight
                .hop
                .theirs
                .is_none_or(|rail| !receiver.closed.get(usize::from(rail)).is_some_and(|closed| *closed));
        if stage == Stage::Ghost {
            if is_open && outcome != Outcome::Failed {
                self.tally.seen.late_arrivals += 1;
                self.arrive(number);
            }
            self.flights.remove(number);
            return;
        }
        flight.stage = Stage::Landed;
        if self.sabotage == Some(Sabotage::DuplicateWrite) && number % 7 == 3 && is_open {
            flight.counts = true;
            self.arrive(number);
        }
        let Some(flight) = self.flights.get_mut(number) else { return };
        let nic = &self.config.cluster.nic;
        let later = now.plus_nanos(nic.completion_nanoseconds);
        match outcome {
            Outcome::Failed => self.completes(number, later, Err("the NIC failed".into())),
            Outcome::Delivered { .. } if !is_open => {
                self.completes(number, later, Err("the peer has closed its end, or is gone".into()));
            }
            Outcome::Delivered { completed } => match self.faults.fate(&mut self.random) {
                Fate::Arrives => {
                    flight.counts = true;
                    self.arrive(number);
                    self.completes(number, completed, Ok(()));
                }
                Fate::ArrivesUntold => {
                    self.arrive(number);
                    self.completes(number, completed, Err("a completion with an error".into()));
                }
                Fate::Fails => self.completes(number, completed, Err("a completion with an error".into())),
            },
        }
    }

    /// Its bytes are in the receiver's memory.
    fn arrive(&mut self, number: u32) {
        let now = self.now;
        let Some(flight) = self.flights.get_mut(number) else { return };
        self.tally.moved(flight.hop.way, flight.bytes);
        if let Some(bytes) = &mut self.bytes {
            let sender = self.ranks[flight.from as usize].runner.as_ref();
            let ops = sender.map(|runner| runner.engine().program().ops()).unwrap_or_default();
            for write in &mut flight.writes {
                let arrived = match write.frozen.take() {
                    Some(stamps) => Ok(stamps),
                    None => bytes.read(flight.from, write, ops),
                };
                let to = (flight.to, &self.ranks[flight.to as usize]);
                if let Err(what) = arrived.and_then(|stamps| bytes.write(to, write, &stamps)) {
                    self.broken.get_or_insert(what);
                }
                if flight.counts {
                    bytes.count(flight.to, write, true);
                }
            }
        }
        let receiver = &mut self.ranks[flight.to as usize];
        let (true, Some(_)) = (receiver.is_in(), receiver.pushing) else { return };
        let at = receiver.push_time(now);
        if let Some(runner) = &mut receiver.runner {
            for write in flight.writes.iter().filter(|write| write.tag != NO_TAG) {
                runner.arrived(write.tag, at);
                if self.sabotage == Some(Sabotage::DoubleArrival) {
                    runner.arrived(write.tag, at);
                }
            }
            let to = flight.to;
            self.wake(to);
        }
    }

    /// The sender of a flight is told.
    pub(super) fn complete(&mut self, number: u32) {
        let now = self.now;
        let Some(flight) = self.flights.get_mut(number) else { return };
        if flight.stage == Stage::Ghost {
            self.flights.remove(number);
            return;
        }
        let (from, rail, way, bytes) = (flight.from, flight.rail, flight.hop.way, flight.bytes);
        let result = std::mem::replace(&mut flight.result, Ok(()));
        let rank = &mut self.ranks[from as usize];
        rank.times.change(now, |under_way| match way {
            Way::Nvlink { .. } => under_way.over_nvlink = under_way.over_nvlink.saturating_sub(1),
            _ => under_way.over_nics = under_way.over_nics.saturating_sub(1),
        });
        match &result {
            Ok(()) => {
                rank.times.bytes += bytes;
                self.tally.delivered_bytes += bytes;
                if matches!(rank.rank, Rank::Receiver(_)) {
                    self.tally.seen.relayed_bytes += bytes;
                }
            }
            Err(_) => {
                if let (Some(Sabotage::FreedAtFirstError), Some(bytes)) = (self.sabotage, &mut self.bytes) {
                    bytes.free(from);
                }
            }
        }
        let is_in = rank.is_in();
        let mut queue = rank.rails[rail.index()].borrow_mut();
        for write in flight.writes.iter_mut().filter(|_| is_in) {
            if let Some(piece) = write.piece.take() {
                queue.done.push(Done { id: write.id, from: piece, result: result.clone() });
            }
        }
        drop(queue);
        if self.sabotage == Some(Sabotage::EarlyCompletion) && flight.stage != Stage::Landed {
            // It goes on without its sender.
            flight.stage = Stage::Ghost;
        } else {
            self.flights.remove(number);
        }
        if is_in {
            self.wake(from);
        }
    }

    // --- closing -------------------------------------------------------------------------------------------------

    /// Rails that a rank's runner wants closed.
    pub(super) fn take_closes(&mut self, number: u32) {
        for rail in std::mem::take(&mut self.ranks[number as usize].memory.to_close) {
            let result = self.faults.close_of(number);
            let mut closed = Closed { rank: number, rail, unfinished: Vec::new(), held: Vec::new(), result };
            let queue = &self.ranks[number as usize].rails[rail.index()];
            let done = std::mem::take(&mut queue.borrow_mut().done);
            for Done { id, from, .. } in done {
                closed.unfinished.push(id);
                closed.held.push(from);
            }
            for flight in self.flights.find(|flight| flight.from == number && flight.rail == rail) {
                self.forsake(flight, Some(&mut closed));
            }
            if closed.result.is_err() {
                // What a rail that does not close has in flight stays with it for ever.
                closed.unfinished.clear();
                self.faults.leak(number, std::mem::take(&mut closed.held));
            }
            let at = self.now.plus_nanos(CLOSE_NANOSECONDS);
            self.events.push(at, Event::RailClosed(Box::new(closed)));
        }
    }

    /// Nobody waits for a flight any more. What of it is on the wire may arrive, with the bytes of now.
    pub(super) fn forsake(&mut self, number: u32, mut closed: Option<&mut Closed>) {
        let now = self.now;
        let lingers = self.faults.lingers(now, &mut self.random);
        let Some(flight) = self.flights.get_mut(number) else { return };
        if flight.stage == Stage::Ghost {
            return;
        }
        let was = std::mem::replace(&mut flight.stage, Stage::Ghost);
        self.ranks[flight.from as usize].times.change(now, |under_way| match (was, flight.hop.way) {
            (Stage::Posting, _) => under_way.launches = under_way.launches.saturating_sub(1),
            (_, Way::Nvlink { .. }) => under_way.over_nvlink = under_way.over_nvlink.saturating_sub(1),
            _ => under_way.over_nics = under_way.over_nics.saturating_sub(1),
        });
        if let Some(bytes) = &mut self.bytes {
            let sender = self.ranks[flight.from as usize].runner.as_ref();
            let ops = sender.map(|runner| runner.engine().program().ops()).unwrap_or_default();
            for write in &mut flight.writes {
                write.frozen = bytes.read(flight.from, write, ops).ok();
                if was == Stage::Landed && flight.counts {
                    bytes.count(flight.to, write, false);
                }
            }
        }
        for write in &mut flight.writes {
            let piece = write.piece.take();
            if let Some(closed) = &mut closed {
                closed.unfinished.push(write.id);
                closed.held.extend(piece);
            }
        }
        match was {
            Stage::Posting => self.flights.remove(number),
            Stage::Moving(transfer) => {
                self.network.cancel(now, transfer);
                match lingers {
                    Some(at) => _ = self.events.push(at, Event::Lands(number)),
                    None => self.flights.remove(number),
                }
            }
            // The completion that is due removes it.
            _ => {}
        }
    }

    /// A rank is gone: nobody waits for what it had in flight.
    pub(super) fn drop_flights_of(&mut self, number: u32) {
        self.ranks[number as usize].launches.clear();
        for flight in self.flights.find(|flight| flight.from == number) {
            self.forsake(flight, None);
        }
    }

    pub(super) fn rail_closed(&mut self, closed: Closed) {
        let now = self.now;
        let rank = &mut self.ranks[closed.rank as usize];
        let who = rank.rank;
        self.log.say(now, || format!("{} of {who} closed: {:?}", closed.rail, closed.result));
        drop(closed.held);
        let (true, Some(_)) = (rank.is_in(), rank.pushing) else { return };
        let at = rank.push_time(now);
        if let Some(runner) = &mut rank.runner {
            runner.closed(closed.rail, closed.unfinished, closed.result, at);
        }
        self.wake(closed.rank);
    }

    /// What a receiver does when it is told to close rails: nothing comes in over them any more.
    pub(super) fn fence(&mut self, number: u32, rails: &[u16]) -> Result<(), String> {
        if self.sabotage == Some(Sabotage::NoFence) {
            return Ok(());
        }
        let rank = &mut self.ranks[number as usize];
        for &rail in rails {
            if let Some(closed) = rank.closed.get_mut(usize::from(rail)) {
                self.tally.seen.fenced += u64::from(!*closed);
                *closed = true;
            }
            if let Some(queue) = rank.rails.get(usize::from(rail)) {
                queue.borrow_mut().broken = Some("closed, because a peer gave up on it".into());
            }
        }
        if rank.pushing.is_some() {
            self.wake(number);
        }
        self.faults.fence_of(number)
    }

    /// The rails over which bytes of a rank's last push may still come that nobody waits for, at their receivers.
    pub(super) fn fences_of(&self, number: u32) -> Vec<rendezvous::Fence> {
        let rank = &self.ranks[number as usize];
        let Some(runner) = &rank.runner else { return Vec::new() };
        let used = runner.engine().rails().enumerate().take(rank.nics.len());
        let fences = used.flat_map(|(rail, RailUse { unfinished, .. })| {
            unfinished.into_iter().filter_map(move |at| {
                let theirs = self.ranks.get(self.number(Rank::Receiver(at)) as usize)?.nics.len();
                let rail = rank.theirs(RailIndex(rail as u16), theirs);
                Some(rendezvous::Fence { at, rail })
            })
        });
        fences.collect()
    }
}
