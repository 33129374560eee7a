//! Text as a dump of a host, in hwloc's or NCCL's form; and if it is one, what follows from it.

#![no_main]

use std::collections::BTreeSet;

use topology::{Assignment, Pairing, Snapshot, pair};

libfuzzer_sys::fuzz_target!(|text: &str| {
    let Ok(snapshot) = Snapshot::from_xml(text) else { return };
    snapshot.tree();
    serde_json::to_string(&snapshot).unwrap();
    let gpus = pair(&snapshot).gpus;
    assert_eq!(gpus.len(), snapshot.gpus.len());
    check(&snapshot, &gpus);
    for ranks in [1, 3, 64] {
        let shares = Pairing::host_ranks(&snapshot, ranks);
        assert_eq!(shares.len(), ranks);
        check(&snapshot, &shares);
    }
});

/// Every NIC is one of the host, and where one has NICs all have.
fn check(snapshot: &Snapshot, assignments: &[Assignment]) {
    let rdma = snapshot.rdma_devices.iter().map(|device| &device.name);
    let known: BTreeSet<&String> =
        rdma.chain(snapshot.net_devices.iter().map(|device| &device.name)).collect();
    let has_nics = assignments.iter().any(|of| !of.nics.is_empty());
    for of in assignments {
        assert_eq!(!of.nics.is_empty(), has_nics, "{of:?}");
        assert!(of.nics.iter().all(|nic| known.contains(nic)), "{of:?}");
        assert_eq!(of.rail_cpu, of.cores.first());
    }
}
