//! Control connections: two queues, and two ends that find out in their own time that the other has gone.

use std::collections::VecDeque;

use rendezvous::{ToController, ToMember};
use xfer_plan::Rank;

pub(crate) struct Link {
    pub(crate) rank: Rank,
    pub(crate) said: VecDeque<ToController>,
    pub(crate) told: VecDeque<ToMember>,
    /// Whether what the member says goes anywhere.
    pub(crate) from_member: bool,
    /// Whether what the controller says goes anywhere.
    pub(crate) from_controller: bool,
    /// The controller still reads it.
    pub(crate) heard: bool,
    /// The member still reads it.
    pub(crate) read: bool,
    /// The controller has heard a join on it.
    pub(crate) joined: bool,
}

impl Link {
    pub(crate) fn new(rank: Rank) -> Self {
        let (said, told) = (VecDeque::new(), VecDeque::new());
        Self {
            rank,
            said,
            told,
            from_member: true,
            from_controller: true,
            heard: true,
            read: true,
            joined: false,
        }
    }

    pub(crate) fn say(&mut self, message: ToController) {
        if self.from_member && self.heard {
            self.said.push_back(message);
        }
    }

    pub(crate) fn tell(&mut self, message: ToMember) {
        if self.from_controller && self.read {
            self.told.push_back(message);
        }
    }

    /// The network loses it, with what is on its way or behind that.
    pub(crate) fn cut(&mut self, delivered: bool) {
        (self.from_member, self.from_controller) = (false, false);
        if !delivered {
            self.said.clear();
            self.told.clear();
        }
    }

    /// The member's process is gone.
    pub(crate) fn die(&mut self, delivered: bool) {
        (self.from_member, self.read) = (false, false);
        self.told.clear();
        if !delivered {
            self.said.clear();
        }
    }

    /// The controller closes it, once what it said before has left.
    pub(crate) fn close(&mut self) {
        (self.from_controller, self.heard) = (false, false);
        self.said.clear();
    }

    /// Whether the controller has something to read, if only that nothing will come.
    pub(crate) fn is_to_hear(&self) -> bool {
        self.heard && (!self.said.is_empty() || !self.from_member)
    }

    /// As [`Link::is_to_hear`], for the member.
    pub(crate) fn is_to_read(&self) -> bool {
        self.read && (!self.told.is_empty() || !self.from_controller)
    }
}
