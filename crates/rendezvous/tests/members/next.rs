//! What can happen next.

use xfer_plan::Rank;

use crate::cluster::Cluster;
use crate::job::{TARGET, is_trainer};
use crate::link::Link;
use crate::network::Flight;
use crate::process::{Process, Protocol};

/// Something that can happen next.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Next {
    /// The controller reads what came over this connection, or that nothing will.
    Hear(u64),
    /// This member reads what the controller said, or that nothing more comes.
    Tell(Rank),
    /// This member joins, over its connection or a new one.
    Join(Rank),
    /// This write lands.
    Land(usize),
    /// This trainer begins a version.
    Begin(Rank),
    /// This rank says how its writes ended.
    Report(Rank),
    /// This trainer has measured.
    Measured(Rank),
    /// The decision to commit is on disk.
    Store,
    /// The controller learns that it is.
    Recorded,
    /// Time passes.
    Tick,
    /// This rank is started again.
    Return(Rank),
    /// This rank is not stopped any more, or not busy.
    Wake(Rank),
    /// There is a controller again.
    Start,
    /// This write lands, which its sender has given up on.
    LandLate(usize),
    /// This rank takes another rail for what has not landed yet.
    ChangeRail(Rank),
    /// This rank's writes fail.
    Fail(Rank),
    /// This trainer cannot measure.
    NotMeasured(Rank),
    /// The next rails that this rank has to close do not close.
    Stick(Rank),
    /// A byte of this rank's memory becomes another.
    Flip(Rank),
    /// This rank's connection is lost; whether what was on its way arrives.
    Cut(Rank, bool),
    /// This rank's process dies; whether what it said last arrives.
    Die(Rank, bool),
    /// This rank cannot go on, says so, and ends.
    GiveUp(Rank),
    /// This rank is stopped.
    Silence(Rank),
    /// This rank does not get to what it is told, and says that it is alive.
    Busy(Rank),
    /// As much time passes as any stage has.
    Pass,
    /// The controller dies; whether what it said last arrives.
    Crash(bool),
    /// The decision cannot be recorded; whether it is on disk nevertheless.
    RecordFails(bool),
}

impl Next {
    pub(crate) fn is_fault(self) -> bool {
        matches!(
            self,
            Self::LandLate(_)
                | Self::ChangeRail(_)
                | Self::Fail(_)
                | Self::NotMeasured(_)
                | Self::Stick(_)
                | Self::Flip(_)
                | Self::Busy(_)
                | Self::Pass
        ) || self.is_loss()
    }

    pub(crate) fn is_loss(self) -> bool {
        matches!(
            self,
            Self::Cut(..)
                | Self::Die(..)
                | Self::GiveUp(_)
                | Self::Silence(_)
                | Self::Crash(_)
                | Self::RecordFails(_)
        )
    }

    pub(crate) fn is_recovery(self) -> bool {
        matches!(self, Self::Return(_) | Self::Wake(_))
    }
}

impl Cluster {
    /// What can happen next, in a fixed order. Versions are begun up to the last.
    pub(crate) fn possible(&self) -> Vec<Next> {
        let land = |(place, flight): (usize, &Flight)| match flight.given_up {
            true => Next::LandLate(place),
            false => Next::Land(place),
        };
        let mut next: Vec<Next> = self.network.flights.iter().enumerate().map(land).collect();
        let up = self.controller.is_some();
        let hear = self.links.iter().filter(|(_, link)| up && link.is_to_hear());
        next.extend(hear.map(|(id, _)| Next::Hear(*id)));
        for (&rank, member) in &self.members {
            match &member.process {
                None if self.returns(rank) => next.push(Next::Return(rank)),
                None => {}
                Some(_) if member.silent => next.extend(self.returns(rank).then_some(Next::Wake(rank))),
                Some(process) if process.refused => {}
                Some(process) => {
                    if member.busy {
                        next.push(Next::Wake(rank));
                    } else {
                        self.possible_for(rank, process, &mut next);
                    }
                    self.possible_to(rank, process, &mut next);
                }
            }
        }
        let (stored, asked) = match self.recording {
            Some((_, stored)) => (stored, !stored),
            None => (false, false),
        };
        let regroups = self.regroups();
        let all = [
            (asked, Next::Store),
            (stored, Next::Recorded),
            (asked && regroups, Next::RecordFails(true)),
            (asked && regroups, Next::RecordFails(false)),
            (up && regroups, Next::Crash(true)),
            (up && regroups, Next::Crash(false)),
            (!up && regroups, Next::Start),
            (true, Next::Tick),
            (regroups, Next::Pass),
        ];
        next.extend(all.into_iter().filter(|(possible, _)| *possible).map(|(_, next)| next));
        next
    }

    fn possible_for(&self, rank: Rank, process: &Process, next: &mut Vec<Next>) {
        let link = process.link.map(|id| &self.links[&id]);
        let joins = match link {
            None => self.controller.is_some(),
            Some(_) => process.protocol.is_out(),
        };
        let idle = matches!(&process.protocol, Protocol::Trainer(trainer) if trainer.is_idle());
        let all = [
            (!process.stopping && link.is_some_and(Link::is_to_read), Next::Tell(rank)),
            (!process.stopping && joins, Next::Join(rank)),
            (idle && (process.known < TARGET || process.behind), Next::Begin(rank)),
            (process.measuring.is_some(), Next::Measured(rank)),
            (process.has_written(), Next::Report(rank)),
        ];
        next.extend(all.into_iter().filter(|(possible, _)| *possible).map(|(_, next)| next));
    }

    /// Faults.
    fn possible_to(&self, rank: Rank, process: &Process, next: &mut Vec<Next>) {
        let (linked, writing, regroups) = (process.link.is_some(), process.is_writing(), self.regroups());
        let all = [
            (writing && !process.is_counted(), Next::ChangeRail(rank)),
            (writing, Next::Fail(rank)),
            (process.measuring.is_some(), Next::NotMeasured(rank)),
            (!is_trainer(rank) && !process.sticks, Next::Stick(rank)),
            (process.flip_would_be_found(), Next::Flip(rank)),
            (regroups && linked, Next::Cut(rank, true)),
            (regroups && linked, Next::Cut(rank, false)),
            (true, Next::Die(rank, true)),
            (true, Next::Die(rank, false)),
            (regroups && linked, Next::GiveUp(rank)),
            (true, Next::Silence(rank)),
            (regroups, Next::Busy(rank)),
        ];
        next.extend(all.into_iter().filter(|(possible, _)| *possible).map(|(_, next)| next));
    }
}
