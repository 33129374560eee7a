//! Groups and routes: which receivers want the same bytes, and by which legs these reach them.
//!
//! A route is a tree: the trainer at its root, every member of the group in it once. It follows from the group and a
//! transfer's lane alone, so it is written down nowhere.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::{Rank, ReceiverRank, TrainerRank};
use crate::manifest::ReceiverManifest;

/// Receivers that want the same bytes at the same place, and how they get them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Group {
    /// The members, ascending within a host; hosts in the order of their first member.
    pub hosts: Vec<Vec<ReceiverRank>>,
    /// How transfers reach them.
    pub route: Route,
}

/// How a transfer reaches the members of its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Route {
    /// The trainer writes to each.
    Direct,
    /// The trainer writes to one on each host, the entry, which passes it on to the others there.
    PerHost,
    /// The trainer writes to the entry of the first host, and each entry also to that of the next host.
    Chain,
}

/// One hop of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leg {
    /// Who has the bytes.
    pub from: Rank,
    /// Who gets them.
    pub to: ReceiverRank,
    /// Over what.
    pub link: Link,
}

/// What a leg goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Link {
    /// A NIC of both ends.
    Nic,
    /// NVLink (or whatever joins the GPUs of one host).
    Nvlink,
}

impl Group {
    pub(crate) fn new(members: &[ReceiverRank], receivers: &[ReceiverManifest], route: Route) -> Group {
        let mut hosts: Vec<(&str, Vec<ReceiverRank>)> = Vec::new();
        let mut places: BTreeMap<&str, usize> = BTreeMap::new();
        for &member in members {
            let host = receivers.get(member.index()).map_or("", |receiver| receiver.host.as_str());
            let place = *places.entry(host).or_insert_with(|| {
                hosts.push((host, Vec::new()));
                hosts.len() - 1
            });
            if let Some((_, on_host)) = hosts.get_mut(place) {
                on_host.push(member);
            }
        }
        Group { hosts: hosts.into_iter().map(|(_, members)| members).collect(), route }
    }

    /// All members, host by host.
    pub fn members(&self) -> impl Iterator<Item = ReceiverRank> + '_ {
        self.hosts.iter().flatten().copied()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.hosts.iter().map(Vec::len).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many different routes there are. Transfers are dealt to them evenly, so that all members share the work of passing on.
    pub fn lanes(&self) -> u16 {
        let widest = self.hosts.iter().map(Vec::len).max().unwrap_or(0);
        let lanes = match self.route {
            Route::Direct => 1,
            Route::PerHost => widest,
            Route::Chain => widest * self.hosts.len(),
        };
        u16::try_from(lanes).unwrap_or(u16::MAX)
    }

    /// To whom the trainer itself writes. Each of them is the root of what it passes on.
    pub fn entries(&self, lane: u16) -> impl Iterator<Item = ReceiverRank> + '_ {
        self.legs(TrainerRank(0), lane).filter(|leg| matches!(leg.from, Rank::Trainer(_))).map(|leg| leg.to)
    }

    /// WRITEs of the trainer per chunk.
    pub fn copies(&self) -> usize {
        match self.route {
            Route::Direct => self.len(),
            Route::PerHost => self.hosts.len(),
            Route::Chain => usize::from(!self.hosts.is_empty()),
        }
    }

    /// The legs of a transfer from `trainer` in `lane`, in an order in which every leg starts where an earlier one ended.
    pub fn legs(&self, trainer: TrainerRank, lane: u16) -> impl Iterator<Item = Leg> + '_ {
        let (root, lane, hosts) = (Rank::Trainer(trainer), usize::from(lane), self.hosts.len());
        let first = match self.route {
            // Lanes run through the members of a host first, then through the hosts that a chain can start at.
            Route::Chain => lane / self.hosts.iter().map(Vec::len).max().unwrap_or(1).max(1),
            _ => 0,
        };
        let mut before = root;
        (0..hosts).flat_map(move |step| {
            let members = self.hosts.get((first + step) % hosts).map_or(&[][..], Vec::as_slice);
            let direct = self.route == Route::Direct;
            let entry = members.get(lane % members.len().max(1)).copied();
            let from = if self.route == Route::Chain { before } else { root };
            if let Some(entry) = entry {
                before = Rank::Receiver(entry);
            }
            let to_entry = entry.filter(|_| !direct).map(|to| Leg { from, to, link: Link::Nic });
            let others = members.iter().copied().filter(move |to| direct || Some(*to) != entry);
            let onward = others.filter_map(move |to| match entry {
                _ if direct => Some(Leg { from: root, to, link: Link::Nic }),
                Some(entry) => Some(Leg { from: Rank::Receiver(entry), to, link: Link::Nvlink }),
                None => None,
            });
            to_entry.into_iter().chain(onward)
        })
    }
}

/// What one trainer moves in a push.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainerLoad {
    /// Over its NICs.
    pub nic_out_bytes: u64,
    /// Operations that its transfers are cut into.
    pub ops: u64,
    /// WRITEs that it posts.
    pub writes: u64,
    /// What it reads to cast or quantise it.
    pub transform_bytes: u64,
    /// What it sends, as it lies in its memory, each byte once however many copies leave.
    pub source_bytes: u64,
}

/// What one receiver moves in a push.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiverLoad {
    /// Into it over its NICs.
    pub nic_in_bytes: u64,
    /// Out of it over its NICs, to other hosts.
    pub nic_out_bytes: u64,
    /// Into it from GPUs of its host.
    pub nvlink_in_bytes: u64,
    /// Out of it to GPUs of its host.
    pub nvlink_out_bytes: u64,
}

/// What everybody moves in a push.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Loads {
    /// By trainer.
    pub trainers: Vec<TrainerLoad>,
    /// By receiver.
    pub receivers: Vec<ReceiverLoad>,
    /// NICs that the longest route passes one after another.
    pub nic_hops_max: u64,
}
