//! What goes wrong in a simulated job, and when.

use std::collections::{BTreeMap, BTreeSet};

use rendezvous::controller::Event as ControllerEvent;

use super::protocol::connection;
use super::rail::Piece;
use super::world::{Event, World};
use crate::network::Link;
use crate::random::Random;
use crate::time::Time;

/// Something that goes wrong at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// A rank's process ends. Its connection ends with it, or, where its host does, just falls silent.
    Crash {
        /// Which; trainers first.
        rank: u32,
        /// Whether nobody is told.
        silent: bool,
    },
    /// The controller's process ends.
    CrashController {
        /// Whether nobody is told.
        silent: bool,
    },
    /// A member and the controller hear nothing of each other for so long; what is said meanwhile arrives late.
    Partition {
        /// Which.
        rank: u32,
        /// In nanoseconds.
        nanoseconds: u64,
    },
    /// A rank's NIC moves this part of what it can, both ways; 0 stalls it.
    SlowNic {
        /// Which.
        rank: u32,
        /// Its rail.
        rail: u32,
        /// In hundredths.
        percent: u64,
    },
    /// A rank's GPU memory moves this part of what it can.
    SlowGpu {
        /// Which.
        rank: u32,
        /// In hundredths.
        percent: u64,
    },
    /// A rank's rail takes nothing (EAGAIN), or takes again.
    Refuse {
        /// Which.
        rank: u32,
        /// Its rail.
        rail: u32,
        /// Whether it refuses.
        refuses: bool,
    },
    /// A rank's rail breaks.
    BreakRail {
        /// Which.
        rank: u32,
        /// Its rail.
        rail: u32,
    },
    /// From now on so many of a million WRITEs end with an error; half of those have arrived.
    Errors {
        /// Of a million.
        per_million: u64,
    },
}

/// How a WRITE that has reached its receiver ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Arrives,
    /// It arrives, and its sender is told that it did not.
    ArrivesUntold,
    Fails,
}

/// All that goes wrong.
#[derive(Clone, Debug, Default)]
pub(super) struct Faults {
    pub(super) timed: Vec<(Time, Fault)>,
    /// Before the event of this number. Ascending.
    pub(super) at_events: std::collections::VecDeque<(u64, Fault)>,
    /// Members that join later than at the start.
    pub(super) joins: BTreeMap<u32, Time>,
    /// Ranks whose rails do not close.
    pub(super) stuck: BTreeSet<u32>,
    /// Receivers that cannot close a rail.
    pub(super) unfenced: BTreeSet<u32>,
    /// Whether bytes of a closed rail may still arrive, up to so many nanoseconds later.
    pub(super) linger_nanoseconds: u64,
    pub(super) errors_per_million: u64,
    pub(super) leaked: BTreeMap<u32, Vec<Piece>>,
}

impl Faults {
    pub(super) fn joins_at(&self, rank: u32) -> Time {
        self.joins.get(&rank).copied().unwrap_or(Time::ZERO)
    }

    pub(super) fn timed(&mut self) -> Vec<(Time, Fault)> {
        std::mem::take(&mut self.timed)
    }

    pub(super) fn at_event(&mut self, number: u64) -> Option<Fault> {
        let (at, fault) = *self.at_events.front()?;
        (at <= number).then(|| {
            self.at_events.pop_front();
            fault
        })
    }

    pub(super) fn fate(&self, random: &mut Random) -> Fate {
        match self.errors_per_million {
            0 => Fate::Arrives,
            errors => match random.below(1_000_000) {
                chance if chance < errors / 2 => Fate::ArrivesUntold,
                chance if chance < errors => Fate::Fails,
                _ => Fate::Arrives,
            },
        }
    }

    /// When what is on the wire of a closed rail arrives, if it does.
    pub(super) fn lingers(&self, now: Time, random: &mut Random) -> Option<Time> {
        let lingers = self.linger_nanoseconds > 0 && random.below(4) > 0;
        lingers.then(|| now.plus_nanos(random.below(self.linger_nanoseconds)))
    }

    pub(super) fn close_of(&self, rank: u32) -> Result<(), String> {
        if self.stuck.contains(&rank) { Err("fi_close says that it is busy".into()) } else { Ok(()) }
    }

    pub(super) fn fence_of(&self, rank: u32) -> Result<(), String> {
        if self.unfenced.contains(&rank) { Err("a rail does not close".into()) } else { Ok(()) }
    }

    /// What a rail that did not close keeps.
    pub(super) fn leak(&mut self, rank: u32, pieces: Vec<Piece>) {
        self.leaked.entry(rank).or_default().extend(pieces);
    }

    /// Buffers of a rank that a rail keeps for ever.
    pub(super) fn leaked(&self, rank: u32) -> usize {
        self.leaked.get(&rank).map_or(0, Vec::len)
    }
}

impl World<'_> {
    pub(super) fn fault(&mut self, fault: Fault) {
        let now = self.now;
        self.log.say(now, || format!("fault: {fault:?}"));
        match fault {
            Fault::Crash { rank, silent } => self.crash(rank, silent),
            Fault::CrashController { silent } => {
                self.controller = None;
                if !silent {
                    let at = now.plus_nanos(self.config.cluster.control.latency_nanoseconds);
                    for rank in 0..self.ranks.len() as u32 {
                        self.events.push(at, Event::ControllerGone(rank));
                    }
                }
            }
            Fault::Partition { rank, nanoseconds } => {
                let cut = &mut self.control.cut_until[rank as usize];
                *cut = (*cut).max(now.plus_nanos(nanoseconds));
            }
            Fault::SlowNic { rank, rail, percent } => {
                let Some(&nic) = self.ranks[rank as usize].nics.get(rail as usize) else { return };
                let rate = self.config.cluster.nic.bytes_per_second * percent / 100;
                for link in [Link::NicOut(nic), Link::NicIn(nic)] {
                    self.set_rate(link, rate);
                }
            }
            Fault::SlowGpu { rank, percent } => {
                let rate = self.config.cluster.host.gpu.hbm_bytes_per_second * percent / 100;
                self.set_rate(Link::Hbm(self.ranks[rank as usize].gpu), rate);
            }
            Fault::Refuse { rank, rail, refuses } => {
                if let Some(queue) = self.ranks[rank as usize].rails.get(rail as usize) {
                    queue.borrow_mut().refuses = refuses;
                }
            }
            Fault::BreakRail { rank, rail } => {
                if let Some(queue) = self.ranks[rank as usize].rails.get(rail as usize) {
                    queue.borrow_mut().broken = Some("the device was removed".into());
                }
                if self.ranks[rank as usize].pushing.is_some() {
                    self.wake(rank);
                }
            }
            Fault::Errors { per_million } => self.faults.errors_per_million = per_million,
        }
    }

    fn set_rate(&mut self, link: Link, bytes_per_second: u64) {
        if let Err(error) = self.network.set_rate(self.now, link, bytes_per_second) {
            self.breaks(error.to_string());
        }
    }

    fn crash(&mut self, number: u32, silent: bool) {
        let rank = &mut self.ranks[number as usize];
        if !rank.alive {
            return;
        }
        rank.alive = false;
        let was_in = rank.ended.is_none();
        self.drop_flights_of(number);
        let rank = &mut self.ranks[number as usize];
        (rank.runner, rank.pushing) = (None, None);
        if was_in && !silent {
            self.hangs_up(number);
        }
    }

    /// The controller learns that a member's connection has ended.
    pub(super) fn member_gone(&mut self, number: u32) {
        let reason = "the peer has closed it".to_owned();
        self.controller_handles(ControllerEvent::Disconnected(connection(number), reason));
    }
}
