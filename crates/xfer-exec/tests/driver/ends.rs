//! Receivers, and rails that lead to them, from whatever memory.

use std::collections::BTreeMap;

use efa_core::{Hints, LeaseMut, Library, MemoryRef, Rail as OfiEndpoint, RailConfig, Target};
use xfer_exec::arrivals::Arrivals;
use xfer_exec::local::{Doorman, LocalPeer, LocalRail, LocalSource, SharedFile};
use xfer_exec::ofi::{OfiPeer, OfiRail, OfiSource, OfiTarget};
use xfer_exec::program::Route;
use xfer_exec::{Rail, RailIndex};
use xfer_plan::ReceiverRank;

use super::DEADLINE;

/// The rails of a sender, and what they lead to.
pub(crate) type Ends<S> = (Vec<Box<dyn Rail<Buffer = S> + Send>>, Receivers);

/// The receivers' side: their memory, and what keeps it reachable.
#[derive(Default)]
pub(crate) struct Receivers {
    pub(crate) arenas: Vec<Target>,
    pub(crate) arrivals: Vec<Arrivals>,
    doormen: Vec<Doorman>,
    pub(crate) targets: Vec<OfiTarget>,
}

pub(crate) fn read(arena: &Target) -> Vec<u8> {
    let mut found = vec![0; arena.len()];
    arena.read(0, &mut found).unwrap();
    found
}

/// All rails to each receiver.
pub(crate) fn routes(rails: usize, bytes: &[u64]) -> BTreeMap<ReceiverRank, Route> {
    let all: Vec<RailIndex> = (0..rails as u16).map(RailIndex).collect();
    let route = |(rank, bytes): (ReceiverRank, &u64)| {
        (rank, Route { rails: all.clone(), region_bytes: vec![*bytes] })
    };
    (0..).map(ReceiverRank).zip(bytes).map(route).collect()
}

/// Over shared memory.
pub(crate) fn local<S: LocalSource>(bytes: &[u64]) -> Ends<S> {
    let (mut peers, mut receivers) = (BTreeMap::new(), Receivers::default());
    for (rank, bytes) in (0..).map(ReceiverRank).zip(bytes) {
        let (arena, file) = SharedFile::create(*bytes).unwrap();
        let (doorman, arrivals) = Doorman::open(vec![file]).unwrap();
        peers.insert(rank, LocalPeer::open(doorman.address(), &[*bytes], DEADLINE).unwrap());
        receivers.arenas.push(arena);
        receivers.arrivals.push(arrivals);
        receivers.doormen.push(doorman);
    }
    (vec![Box::new(LocalRail::new(peers))], receivers)
}

fn open(library: &Library) -> OfiEndpoint {
    let hints = Hints::new(library.tcp_provider()).source([127, 0, 0, 1].into());
    let info = library.infos(&hints).unwrap().remove(0);
    OfiEndpoint::open(&info, &RailConfig::for_info(&info)).unwrap()
}

/// So many rails, each to a rail of its own at every receiver.
pub(crate) fn ofi<S: OfiSource<Memory = MemoryRef>>(
    library: &Library,
    bytes: &[u64],
    memories: &[MemoryRef],
    rails: usize,
) -> Ends<S> {
    let mut peers = vec![BTreeMap::new(); rails];
    let mut receivers = Receivers::default();
    for (rank, bytes) in (0..).map(ReceiverRank).zip(bytes) {
        let arena = LeaseMut::zeroed(*bytes as usize).unwrap().expose();
        let scratch = LeaseMut::zeroed(64).unwrap().expose();
        let mut opened = Vec::new();
        for peers in &mut peers {
            let mut rail = open(library);
            let (_, region) = rail.expose(&arena).unwrap();
            let (_, scratch) = rail.expose(&scratch).unwrap();
            peers.insert(rank, OfiPeer { address: rail.address().clone(), regions: vec![region], scratch });
            opened.push(rail);
        }
        let target = OfiTarget::start(opened, Vec::new()).unwrap();
        let mut arrivals = Arrivals::default();
        arrivals.hear(target.arrivals());
        receivers.arenas.push(arena);
        receivers.arrivals.push(arrivals);
        receivers.targets.push(target);
    }
    let connect = |peers| -> Box<dyn Rail<Buffer = S> + Send> {
        Box::new(OfiRail::connect(open(library), memories, peers, DEADLINE).unwrap())
    };
    (peers.into_iter().map(connect).collect(), receivers)
}

/// The library, or the reason to skip. Where it was asked for, a missing one fails.
pub(crate) fn libfabric() -> Option<Library> {
    match Library::open() {
        Ok(library) => Some(library),
        Err(error) => {
            let required = std::env::var("WEIGHTSYNC_REQUIRE").is_ok_and(|names| names.contains("libfabric"));
            assert!(!required, "{error}");
            eprintln!("skipped: no libfabric: {error}");
            None
        }
    }
}
