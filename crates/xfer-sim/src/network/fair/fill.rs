//! Progressive filling: the rates of all free flows rise together; a flow stops where a link of its path has no more to
//! give, and the rest go on. The flows that are not free stand still.

use core::cmp::Ordering;
use std::collections::BinaryHeap;

use super::{FairShare, LinkState};

/// A link at which filling stops next.
pub(super) struct Stop {
    level: f64,
    link: u32,
}

impl LinkState {
    /// What so many flows may have together while others that have `standing` stay as they are. Who comes to a full link gets
    /// what the others have, as long as that is tolerated.
    pub(super) fn room(&self, flows: u32, standing: f64, tolerance: f64) -> f64 {
        let idle = self.capacity - standing;
        if flows as usize == self.flows.len() {
            return self.capacity;
        }
        idle.max((f64::from(flows) * self.top).min(idle + self.capacity * tolerance))
    }

    /// What each of so many flows may have of this room, if all may have the same. Where others have their bottleneck, nobody
    /// may outrun them.
    pub(super) fn level(&self, room: f64, flows: u32) -> f64 {
        let share = room.max(0.0) / f64::from(flows);
        if self.anchored > 0 { share.min(self.top) } else { share }
    }
}

impl FairShare {
    /// Gives every free flow its rate, and notes which hop stopped it and which links were touched.
    pub(super) fn fill(&mut self) {
        self.make_room();
        // Put in all at once, which is cheaper than one by one; often one stop ends it.
        let mut stops = core::mem::take(&mut self.stops).into_vec();
        stops.clear();
        stops.extend(self.touched.iter().map(|&link| {
            let state = &self.links[link as usize];
            Stop { level: state.level(state.room, state.unfilled), link }
        }));
        self.stops = BinaryHeap::from(stops);
        let mut left = self.free.len();
        while left > 0
            && let Some(stop) = self.stops.pop()
        {
            let link = &self.links[stop.link as usize];
            if link.unfilled == 0 {
                continue;
            }
            // What was taken from it since has raised the level for the rest.
            let level = link.level(link.room, link.unfilled);
            if level > stop.level {
                self.stops.push(Stop { level, link: stop.link });
                continue;
            }
            left -= self.stop_at(stop.link, level);
        }
        self.add_up();
    }

    /// How much of each touched link is there for its free flows.
    fn make_room(&mut self) {
        self.touched.clear();
        for &flow in &self.free {
            let flow = &mut self.flows[flow as usize];
            flow.filled = false;
            for &number in flow.path.links() {
                let link = &mut self.links[number as usize];
                if link.unfilled == 0 {
                    self.touched.push(number);
                    link.room = 0.0;
                }
                link.unfilled += 1;
                link.room += flow.rate;
            }
        }
        for &link in &self.touched {
            let link = &mut self.links[link as usize];
            link.room = link.room(link.unfilled, link.load - link.room, self.tolerance);
        }
    }

    /// All unfilled flows of a link have their rate; how many those are. They are looked for where there are fewer: among all
    /// that are free, or all of the link.
    fn stop_at(&mut self, number: u32, level: f64) -> usize {
        let few_are_free = self.free.len() < self.links[number as usize].flows.len();
        let list = if few_are_free { &mut self.free } else { &mut self.links[number as usize].flows };
        let candidates = core::mem::take(list);
        let mut filled = 0;
        for &candidate in &candidates {
            let flow = &mut self.flows[candidate as usize];
            let hop = flow.path.links().iter().position(|link| *link == number);
            let Some(hop) = hop.filter(|_| flow.free && !flow.filled) else { continue };
            (flow.filled, flow.bottleneck, flow.rate_next) = (true, hop as u8, level);
            filled += 1;
            for &link in flow.path.links() {
                let link = &mut self.links[link as usize];
                link.room -= level;
                link.unfilled -= 1;
            }
        }
        *(if few_are_free { &mut self.free } else { &mut self.links[number as usize].flows }) = candidates;
        filled
    }

    /// The new rates become the rates.
    fn add_up(&mut self) {
        for &flow in &self.free {
            let flow = &self.flows[flow as usize];
            for &link in flow.path.links() {
                let link = &mut self.links[link as usize];
                link.unfilled += 1;
                link.load -= flow.rate;
            }
        }
        for &link in &self.touched {
            let link = &mut self.links[link as usize];
            link.load = link.load.max(0.0);
            if link.unfilled as usize == link.flows.len() {
                // A sum from scratch: rounding does not pile up.
                (link.load, link.top) = (0.0, 0.0);
            }
            link.unfilled = 0;
        }
        for &flow in &self.free {
            let flow = &mut self.flows[flow as usize];
            flow.rate = flow.rate_next;
            for &link in flow.path.links() {
                let link = &mut self.links[link as usize];
                link.load += flow.rate;
                link.top = link.top.max(flow.rate);
            }
        }
    }
}

impl Ord for Stop {
    /// The heap gives the greatest first: that is the lowest level, and of equal levels the lowest number.
    fn cmp(&self, other: &Stop) -> Ordering {
        other.level.total_cmp(&self.level).then(other.link.cmp(&self.link))
    }
}

impl PartialOrd for Stop {
    fn partial_cmp(&self, other: &Stop) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Stop {
    fn eq(&self, other: &Stop) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Stop {}
