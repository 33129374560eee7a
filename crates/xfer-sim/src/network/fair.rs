//! Max-min fair rates, kept up to date: who gets how much of the links, when flows come and go and links change.
//!
//! An allocation is max-min fair exactly if every flow has a *bottleneck*: a link that is full and on which no flow is
//! faster (Bertsekas and Gallager, Data Networks, 6.5.2). That can be looked at flow by flow, so a change need not be
//! answered by computing everything anew. The flows whose bottleneck is gone are *free*; they are filled up again among the
//! others, which stand still; whoever loses its bottleneck by that, or stands in a free flow's way, becomes free too, until
//! nobody does. At worst that is everybody whom the change can reach.
//!
//! With a tolerance of e, a link counts as full from 1 - e to 1 + e of its capacity, and a flow as fast as any from 1 - e of
//! the fastest one's rate on. So most changes end after a step or two, whatever the size of the network: who leaves, leaves a
//! little room, and who comes takes a little too much, until either is too much.
//!
//! There is no time here, and no bytes: only rates.

use std::collections::BinaryHeap;

mod fill;
#[cfg(test)]
mod tests;

use self::fill::Stop;
use super::links::{HOPS_MAX, Path};

/// Differences of rates, relative, that are rounding: sums of thousands of 64-bit numbers are good to 1e-12.
const ROUNDING: f64 = 1e-9;

/// No hop.
const NONE: u8 = u8::MAX;

#[derive(Default)]
struct LinkState {
    capacity: f64,
    /// The sum of the rates of its flows.
    load: f64,
    /// No flow on it is faster. It may be that none is as fast any more.
    top: f64,
    /// Flows that are not free and have their bottleneck here.
    anchored: u32,
    flows: Vec<u32>,
    /// While filling: free flows that have no rate yet, and what is left for them.
    unfilled: u32,
    room: f64,
}

#[derive(Default)]
struct Flow {
    path: Path,
    /// Where in the list of each link.
    places: [u32; HOPS_MAX],
    rate: f64,
    /// While filling.
    rate_next: f64,
    /// Before it became free.
    rate_before: f64,
    /// The hop that is its bottleneck; of a free flow, the hop that stopped its filling.
    bottleneck: u8,
    active: bool,
    free: bool,
    filled: bool,
}

/// See the module. Flows are numbered by the caller, from 0 and densely.
pub(super) struct FairShare {
    tolerance: f64,
    links: Vec<LinkState>,
    flows: Vec<Flow>,
    /// New flows and links that lost load or capacity, since rates were last computed.
    joined: Vec<u32>,
    loosened: Vec<u32>,
    /// Flows that are being filled, and the links they take.
    free: Vec<u32>,
    touched: Vec<u32>,
    stops: BinaryHeap<Stop>,
}

impl FairShare {
    pub(super) fn new(capacities: Vec<f64>, tolerance: f64) -> FairShare {
        let link = |capacity| LinkState { capacity, ..LinkState::default() };
        FairShare {
            tolerance,
            links: capacities.into_iter().map(link).collect(),
            flows: Vec::new(),
            joined: Vec::new(),
            loosened: Vec::new(),
            free: Vec::new(),
            touched: Vec::new(),
            stops: BinaryHeap::new(),
        }
    }

    pub(super) fn capacity(&self, link: u32) -> f64 {
        self.links[link as usize].capacity
    }

    /// The rates on a link, summed: bytes a second.
    pub(super) fn load(&self, link: u32) -> f64 {
        self.links[link as usize].load
    }

    /// Bytes a second, as last computed.
    pub(super) fn rate(&self, flow: u32) -> f64 {
        self.flows[flow as usize].rate
    }

    /// Whether something changed since rates were last computed.
    pub(super) fn is_stale(&self) -> bool {
        !self.joined.is_empty() || !self.loosened.is_empty()
    }

    /// A flow that is not there yet begins. It has no rate until rates are computed.
    pub(super) fn join(&mut self, flow: u32, path: Path) {
        if self.flows.len() <= flow as usize {
            self.flows.resize_with(flow as usize + 1, Flow::default);
        }
        let mut places = [0; HOPS_MAX];
        for (place, &link) in places.iter_mut().zip(path.links()) {
            let flows = &mut self.links[link as usize].flows;
            *place = flows.len() as u32;
            flows.push(flow);
        }
        self.flows[flow as usize] = Flow { path, places, bottleneck: NONE, active: true, ..Flow::default() };
        self.joined.push(flow);
    }

    /// A flow ends.
    pub(super) fn leave(&mut self, flow: u32) {
        let Flow { path, places, rate, bottleneck, .. } = core::mem::take(&mut self.flows[flow as usize]);
        for (hop, (&number, place)) in path.links().iter().zip(places).enumerate() {
            let link = &mut self.links[number as usize];
            link.flows.swap_remove(place as usize);
            link.anchored -= u32::from(usize::from(bottleneck) == hop);
            link.load = if link.flows.is_empty() { 0.0 } else { (link.load - rate).max(0.0) };
            self.loosened.push(number);
            if let Some(&moved) = link.flows.get(place as usize) {
                let moved = &mut self.flows[moved as usize];
                if let Some(hop) = moved.path.links().iter().position(|link| *link == number) {
                    moved.places[hop] = place;
                }
            }
        }
    }

    /// A link has another capacity, in bytes a second.
    pub(super) fn set_capacity(&mut self, link: u32, capacity: f64) {
        let state = &mut self.links[link as usize];
        state.capacity = capacity;
        self.loosened.push(link);
        if state.load > capacity {
            self.joined.extend_from_slice(&state.flows);
        }
    }

    /// Computes rates and tells of each that changed.
    pub(super) fn update(&mut self, mut changed: impl FnMut(u32, f64)) {
        let mut joined = core::mem::take(&mut self.joined);
        for flow in joined.drain(..) {
            if !self.flows[flow as usize].active {
                continue;
            }
            match self.place(flow) {
                true => changed(flow, self.flows[flow as usize].rate),
                false => self.set_free(flow),
            }
        }
        self.joined = joined;
        let mut loosened = core::mem::take(&mut self.loosened);
        loosened.iter().for_each(|&link| self.recheck(link));
        loosened.clear();
        self.loosened = loosened;

        let mut filled = 0;
        while filled < self.free.len() {
            filled = self.free.len();
            self.fill();
            for place in 0..self.touched.len() {
                self.recheck(self.touched[place]);
            }
            for place in 0..filled {
                let flow = self.free[place];
                if !self.find_bottleneck(flow) {
                    self.free_rivals(flow);
                }
            }
        }
        for flow in self.free.drain(..) {
            let state = &mut self.flows[flow as usize];
            state.free = false;
            let link = state.path.links()[usize::from(state.bottleneck)];
            self.links[link as usize].anchored += 1;
            if state.rate != state.rate_before {
                changed(flow, state.rate);
            }
        }
    }

    /// Gives a new flow its rate, if that takes nothing from anybody.
    fn place(&mut self, number: u32) -> bool {
        let Flow { path, bottleneck, free, .. } = self.flows[number as usize];
        if free || bottleneck != NONE {
            return false;
        }
        let room = |hop: u8| {
            let link = &self.links[path.links()[usize::from(hop)] as usize];
            link.level(link.room(1, link.load, self.tolerance), 1)
        };
        let hops = (0..path.links().len() as u8).map(|hop| (room(hop), hop));
        let Some((rate, hop)) = hops.min_by(|a, b| a.0.total_cmp(&b.0)) else { return false };
        let link = &self.links[path.links()[usize::from(hop)] as usize];
        let full = link.load + rate >= link.capacity * (1.0 - self.tolerance - ROUNDING);
        let is_bottleneck = full && rate >= link.top * (1.0 - self.tolerance - ROUNDING);
        if is_bottleneck {
            let flow = &mut self.flows[number as usize];
            (flow.rate, flow.bottleneck) = (rate, hop);
            for (at, &link) in (0..).zip(path.links()) {
                let link = &mut self.links[link as usize];
                link.load += rate;
                link.top = link.top.max(rate);
                link.anchored += u32::from(at == hop);
            }
        }
        is_bottleneck
    }

    fn set_free(&mut self, number: u32) {
        let flow = &mut self.flows[number as usize];
        if flow.free {
            return;
        }
        flow.free = true;
        flow.rate_before = flow.rate;
        if let Some(&link) = flow.path.links().get(usize::from(flow.bottleneck)) {
            self.links[link as usize].anchored -= 1;
        }
        flow.bottleneck = NONE;
        self.free.push(number);
    }

    /// If the link is not full any more, those that stand and have it as their bottleneck look for another, or become free.
    fn recheck(&mut self, link: u32) {
        if self.links[link as usize].anchored == 0 || self.is_full(link) {
            return;
        }
        for place in 0..self.links[link as usize].flows.len() {
            let number = self.links[link as usize].flows[place];
            let flow = &self.flows[number as usize];
            let here = flow.path.links().get(usize::from(flow.bottleneck)) == Some(&link);
            if flow.free || !here {
                continue;
            }
            self.links[link as usize].anchored -= 1;
            if self.find_bottleneck(number) {
                let flow = &self.flows[number as usize];
                let other = flow.path.links()[usize::from(flow.bottleneck)];
                self.links[other as usize].anchored += 1;
            } else {
                self.flows[number as usize].bottleneck = NONE;
                self.set_free(number);
            }
        }
    }

    /// Whether a flow has a bottleneck, which is noted. The one that it has is looked at first; one that it has not keeps the
    /// hop that stopped it.
    fn find_bottleneck(&mut self, number: u32) -> bool {
        let Flow { path, rate, bottleneck, .. } = self.flows[number as usize];
        let hops = (0..path.links().len() as u8).filter(|hop| *hop != bottleneck);
        for hop in Some(bottleneck).into_iter().filter(|hop| *hop != NONE).chain(hops) {
            let link = path.links()[usize::from(hop)];
            if self.is_full(link) && self.is_top(link, rate) {
                self.flows[number as usize].bottleneck = hop;
                return true;
            }
        }
        false
    }

    fn is_full(&self, link: u32) -> bool {
        let link = &self.links[link as usize];
        link.load >= link.capacity * (1.0 - self.tolerance - ROUNDING)
    }

    /// Whether no flow of the link is faster than `rate`, as far as is tolerated.
    fn is_top(&mut self, link: u32, rate: f64) -> bool {
        let least = 1.0 - self.tolerance - ROUNDING;
        let link = &mut self.links[link as usize];
        if rate < link.top * least {
            link.top = link.flows.iter().map(|&flow| self.flows[flow as usize].rate).fold(0.0, f64::max);
        }
        rate >= link.top * least
    }

    /// Frees who keeps a free flow from its share where its filling stopped: the faster ones, and those that it must not
    /// outrun. There is always one: had all flows of that link been filled with it, the link were its bottleneck.
    fn free_rivals(&mut self, flow: u32) {
        let Flow { path, rate, bottleneck, .. } = self.flows[flow as usize];
        let link = path.links()[usize::from(bottleneck)];
        let before = self.free.len();
        for all in [false, true] {
            for place in 0..self.links[link as usize].flows.len() {
                let number = self.links[link as usize].flows[place];
                let rival = &self.flows[number as usize];
                let anchored = rival.path.links().get(usize::from(rival.bottleneck)) == Some(&link);
                if !rival.free && (all || anchored || rival.rate > rate) {
                    self.set_free(number);
                }
            }
            if self.free.len() > before {
                return;
            }
        }
    }
}
