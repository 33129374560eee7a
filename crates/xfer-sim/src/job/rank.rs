//! A simulated rank: a process with a GPU and NICs, its half of the protocol, and the runner that writes for it.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use core::time::Duration;

use rendezvous::member::{InferenceMember, TrainerMember};
use xfer_exec::program::Route;
use xfer_exec::{RailIndex, RailLimits, Runner};
use xfer_plan::{Rank, ReceiverRank, TrainerRank, paired_rail};

use super::bundle::Cost;
use super::measuring::Measures;
use super::memory::SimMemory;
use super::rail::Queue;
use super::times::Times;
use crate::cluster::{Cluster, GpuId, NicId, Semantics};
use crate::network::Way;
use crate::queue::EventId;
use crate::time::Time;

/// Bytes that a software provider is given at once, as on real rails.
const SOFTWARE_IN_FLIGHT_BYTES_MAX: u64 = xfer_exec::rail::SOFTWARE_IN_FLIGHT_BYTES_MAX;

/// WRITEs that may be under way over NVLink: copies wait in no NIC's queue.
const NVLINK_DEPTH: u32 = 4096;

/// A rank's half of the protocol.
pub(super) enum Half {
    /// Joins later, or is gone.
    Out,
    Trainer(TrainerMember),
    Receiver(InferenceMember),
}

/// What a rank that pushes does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Agenda {
    /// The version that it pushes, or will.
    pub(super) version: u64,
    /// Attempts that were aborted in a row.
    pub(super) failed: u32,
    /// How often it was told to measure.
    pub(super) measured: u32,
}

/// Where a flight goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hop {
    pub(super) way: Way,
    /// The receiver's rail; `None` over NVLink.
    pub(super) theirs: Option<u16>,
}

/// See the module.
pub(super) struct SimRank {
    pub(super) rank: Rank,
    pub(super) gpu: GpuId,
    pub(super) nics: Vec<NicId>,
    pub(super) half: Half,
    pub(super) agenda: Agenda,
    pub(super) measures: Measures,
    pub(super) runner: Option<Runner<SimMemory>>,
    pub(super) memory: SimMemory,
    /// By operation, where they are bundled.
    pub(super) costs: Vec<Cost>,
    pub(super) rails: Vec<Rc<RefCell<Queue>>>,
    /// Rails that it has closed, so that nothing comes in over them any more.
    pub(super) closed: Vec<bool>,
    /// Whether the runner is in a push, and since when.
    pub(super) pushing: Option<Time>,
    /// Its thread posts until then.
    pub(super) busy_until: Time,
    pub(super) step: Option<(Time, EventId)>,
    /// Flights that its thread has yet to post, and when.
    pub(super) launches: VecDeque<(Time, u32)>,
    /// Whether its process is there.
    pub(super) alive: bool,
    /// Why it is over, if it is.
    pub(super) ended: Option<String>,
    /// When the controller was last heard.
    pub(super) heard_at: Time,
    /// The push is over for everybody else, and its runner is to stop.
    pub(super) stopped: bool,
    pub(super) times: Times,
}

impl SimRank {
    pub(super) fn new(rank: Rank, cluster: &Cluster) -> SimRank {
        let gpu = match rank {
            Rank::Trainer(rank) => cluster.trainer_gpu(rank.0),
            Rank::Receiver(rank) => cluster.receiver_gpu(rank.0),
        };
        let gpu = gpu.unwrap_or(GpuId(u32::MAX));
        let nics = cluster.nics_of(gpu);
        SimRank {
            rank,
            gpu,
            closed: vec![false; nics.len()],
            nics,
            half: Half::Out,
            agenda: Agenda { version: 1, failed: 0, measured: 0 },
            measures: Measures::default(),
            runner: None,
            memory: SimMemory::default(),
            costs: Vec::new(),
            rails: Vec::new(),
            pushing: None,
            busy_until: Time::ZERO,
            step: None,
            launches: VecDeque::new(),
            alive: true,
            ended: None,
            heard_at: Time::ZERO,
            stopped: false,
            times: Times::default(),
        }
    }

    /// Its rails: one per NIC, and for a receiver one more over NVLink.
    pub(super) fn make_rails(&mut self, cluster: &Cluster) {
        let in_flight_bytes_max = match cluster.nic.semantics {
            Semantics::Tcp => SOFTWARE_IN_FLIGHT_BYTES_MAX,
            Semantics::Srd | Semantics::Rc => u64::MAX,
        };
        let nic = RailLimits { depth: cluster.nic.queue_depth, in_flight_bytes_max, takes_rows: false };
        let nvlink = RailLimits { depth: NVLINK_DEPTH, in_flight_bytes_max: u64::MAX, takes_rows: false };
        let over_nvlink = matches!(self.rank, Rank::Receiver(_)).then_some((nvlink, "NVLink".to_owned()));
        let over_nics = (0..self.nics.len()).map(|rail| (nic, format!("NIC {rail}")));
        let queue = |(limits, name): (RailLimits, String)| {
            let name = format!("{} of {}", name, self.rank);
            Rc::new(RefCell::new(Queue {
                limits,
                name,
                posted: Vec::new(),
                done: Vec::new(),
                in_flight: 0,
                refuses: false,
                forgets: false,
                broken: None,
            }))
        };
        self.rails = over_nics.chain(over_nvlink).map(queue).collect();
    }

    /// Which rails lead to each of these receivers: NVLink within a host, and else all NICs.
    pub(super) fn routes(
        &self,
        to: impl Iterator<Item = ReceiverRank>,
        cluster: &Cluster,
        regions: impl Fn(ReceiverRank) -> Vec<u64>,
    ) -> BTreeMap<ReceiverRank, Route> {
        let rails = |to: ReceiverRank| match self.is_beside(to, cluster) {
            true => vec![RailIndex(self.nics.len() as u16)],
            false => (0..self.nics.len() as u16).map(RailIndex).collect(),
        };
        to.map(|to| (to, Route { rails: rails(to), region_bytes: regions(to) })).collect()
    }

    /// Whether it passes on to a receiver over NVLink.
    fn is_beside(&self, to: ReceiverRank, cluster: &Cluster) -> bool {
        let host = |gpu: GpuId| gpu.0 / cluster.host.gpus.max(1);
        matches!(self.rank, Rank::Receiver(_))
            && cluster.receiver_gpu(to.0).is_some_and(|gpu| host(gpu) == host(self.gpu))
    }

    /// The way of a WRITE over one of its rails.
    pub(super) fn hop(&self, rail: RailIndex, to: &SimRank) -> Option<Hop> {
        match self.nics.get(rail.index()) {
            Some(&from) => {
                let theirs = self.theirs(rail, to.nics.len());
                let way = Way::Nic { from, to: *to.nics.get(usize::from(theirs))? };
                Some(Hop { way, theirs: Some(theirs) })
            }
            None => Some(Hop { way: Way::Nvlink { from: self.gpu, to: to.gpu }, theirs: None }),
        }
    }

    /// Which rail of a peer that has `count` one of its rails leads to.
    pub(super) fn theirs(&self, rail: RailIndex, count: usize) -> u16 {
        let number = match self.rank {
            Rank::Trainer(rank) => rank,
            Rank::Receiver(rank) => TrainerRank(rank.0),
        };
        paired_rail(number, self.nics.len(), rail.index(), count) as u16
    }

    /// The runner's clock: since its push began.
    pub(super) fn push_time(&self, now: Time) -> Duration {
        self.pushing.map_or(Duration::ZERO, |began| now.since(began))
    }

    /// What an operation costs, where it is a bundle.
    pub(super) fn cost(&self, op: u32) -> Option<Cost> {
        self.costs.get(op as usize).copied()
    }

    /// Whether it takes part.
    pub(super) fn is_in(&self) -> bool {
        self.alive && self.ended.is_none()
    }
}
