//! A network that is simple and slow: at every event all rates are computed from nothing, lane by lane.
//!
//! It knows no numbers of links and no slabs: a link is its name, a line is a vector.

use std::collections::BTreeMap;

use xfer_sim::{Cluster, Link, NicId, Way};

/// A transfer, as the naive network sees it.
#[derive(Clone, Debug)]
pub(crate) struct Naive {
    pub(crate) tag: u64,
    pub(crate) way: Way,
    /// Bytes on the wire that are not served.
    left: f64,
    /// When it was served.
    served: Option<f64>,
    /// When it was over, and whether it was delivered.
    pub(crate) over: Option<(f64, bool)>,
    pub(crate) cancelled: bool,
}

/// Time is in nanoseconds, and not whole.
pub(crate) struct NaiveNetwork {
    pub(crate) cluster: Cluster,
    pub(crate) capacities: BTreeMap<String, f64>,
    pub(crate) transfers: Vec<Naive>,
    pub(crate) now: f64,
    /// When a transfer was served or delivered.
    pub(crate) moments: Vec<f64>,
}

/// Links of a way between NICs.
pub(crate) fn links(cluster: &Cluster, way: Way) -> Vec<Link> {
    let Way::Nic { from, to } = way else { panic!("the naive network has NICs only") };
    let rack = |nic: NicId| cluster.racks.map(|racks| nic.0 / cluster.host.nics / racks.hosts);
    match (rack(from), rack(to)) {
        (Some(up), Some(down)) if up != down => {
            vec![Link::NicOut(from), Link::RackUp(up), Link::RackDown(down), Link::NicIn(to)]
        }
        _ => vec![Link::NicOut(from), Link::NicIn(to)],
    }
}

fn name(link: Link) -> String {
    format!("{link:?}")
}

impl NaiveNetwork {
    pub(crate) fn new(cluster: &Cluster) -> NaiveNetwork {
        let mut capacities = BTreeMap::new();
        for nic in (0..cluster.nics()).map(NicId) {
            for link in [Link::NicOut(nic), Link::NicIn(nic)] {
                capacities.insert(name(link), cluster.nic.bytes_per_second as f64);
            }
        }
        for rack in 0..cluster.rack_count() {
            for link in [Link::RackUp(rack), Link::RackDown(rack)] {
                capacities.insert(name(link), cluster.racks.unwrap().uplink_bytes_per_second as f64);
            }
        }
        NaiveNetwork { cluster: cluster.clone(), capacities, transfers: vec![], now: 0.0, moments: vec![] }
    }

    pub(crate) fn start(&mut self, way: Way, bytes: u64, tag: u64) {
        let left = self.cluster.nic.wire_bytes(bytes) as f64;
        self.transfers.push(Naive { tag, way, left, served: None, over: None, cancelled: false });
    }

    pub(crate) fn cancel(&mut self, tag: u64) -> bool {
        let found = self.transfers.iter_mut().find(|transfer| transfer.tag == tag).unwrap();
        let still = found.over.is_none() && !found.cancelled;
        found.cancelled |= still;
        still
    }

    pub(crate) fn set_rate(&mut self, link: Link, rate: u64) {
        self.capacities.insert(name(link), rate as f64);
    }

    pub(crate) fn fail(&mut self, nic: NicId) {
        self.set_rate(Link::NicOut(nic), 0);
        self.set_rate(Link::NicIn(nic), 0);
        for transfer in
            self.transfers.iter_mut().filter(|transfer| transfer.over.is_none() && !transfer.cancelled)
        {
            let Way::Nic { from, to } = transfer.way else { continue };
            if to == nic || (from == nic && transfer.served.is_none()) {
                transfer.over.get_or_insert((self.now, false));
            }
        }
    }

    /// The transfers that are being served: the first of each way, in the order in which they were started.
    fn first_in_line(&self) -> Vec<usize> {
        let mut first = BTreeMap::new();
        for (index, transfer) in self.transfers.iter().enumerate() {
            if transfer.served.is_none() && transfer.over.is_none() && !transfer.cancelled {
                first.entry(transfer.way).or_insert(index);
            }
        }
        first.into_values().collect()
    }

    /// Progressive filling of all that are served, in bytes a second.
    fn rates(&self) -> BTreeMap<usize, f64> {
        let mut room = self.capacities.clone();
        let mut open = self.first_in_line();
        let mut rates = BTreeMap::new();
        while !open.is_empty() {
            let mut users: BTreeMap<String, Vec<usize>> = BTreeMap::new();
            for &index in &open {
                for link in links(&self.cluster, self.transfers[index].way) {
                    users.entry(name(link)).or_default().push(index);
                }
            }
            let shares = users.iter().map(|(link, users)| (room[link].max(0.0) / users.len() as f64, link));
            let (share, link) = shares.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
            for &index in &users[link] {
                rates.insert(index, share);
                for link in links(&self.cluster, self.transfers[index].way) {
                    *room.get_mut(&name(link)).unwrap() -= share;
                }
            }
            open.retain(|index| !users[link].contains(index));
        }
        rates
    }

    /// Time passes until `to`.
    pub(crate) fn run_to(&mut self, to: f64) {
        let latency = self.cluster.nic.latency_nanoseconds as f64;
        loop {
            let rates = self.rates();
            let ends = |(index, rate): (&usize, &f64)| self.transfers[*index].left / rate * 1e9;
            let soonest = rates.iter().filter(|(_, rate)| **rate > 0.0).map(ends).fold(f64::MAX, f64::min);
            let step = soonest.min(to - self.now);
            for (&index, rate) in &rates {
                let transfer = &mut self.transfers[index];
                transfer.left -= rate * step / 1e9;
                if *rate > 0.0 && transfer.left <= rate * 1e-12 {
                    transfer.served = Some(self.now + step);
                    self.moments.push(self.now + step);
                }
            }
            self.now += step;
            if soonest > step || self.now >= to {
                break;
            }
        }
        for transfer in
            self.transfers.iter_mut().filter(|transfer| transfer.over.is_none() && !transfer.cancelled)
        {
            if let Some(arrives) = transfer.served.map(|served| served + latency).filter(|time| *time <= to) {
                transfer.over = Some((arrives, true));
                self.moments.push(arrives);
            }
        }
        self.now = to;
    }
}
