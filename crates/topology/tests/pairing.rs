//! Which NICs and cores serve which GPU, on made-up hosts: one line for each GPU or rank, kept beside the test.

mod common;

use std::collections::BTreeSet;
use std::fmt::Write as _;

use common::Machine;
use common::dumps::{hwloc_p5, nccl_p4d};
use expect_test::{Expect, expect};
use proptest::prelude::*;
use topology::{Assignment, CpuSet, NumaIndex, Pairing, Place, Snapshot, pair};

const GPU: (&str, &str, &str) = ("0x030200", "0x10de", "0x2330");
const EFA: (&str, &str, &str) = ("0x020000", "0x1d0f", "0xefa2");
const CX7: (&str, &str, &str) = ("0x020700", "0x15b3", "0x1021");

fn lines(assignments: &[Assignment]) -> String {
    let mut text = String::new();
    for of in assignments {
        let gpu = of.gpu.map_or_else(|| "rank".to_owned(), |gpu| gpu.to_string());
        let node = of.numa_node.map_or_else(|| "-".to_owned(), |node| node.to_string());
        let (nics, cores, reason) = (of.nics.join(" "), &of.cores, of.reason);
        writeln!(text, "{gpu}: {nics}; node {node}, cores {cores}; {reason}").unwrap();
    }
    text
}

#[track_caller]
fn check(snapshot: &Snapshot, expected: Expect) {
    let pairing = pair(snapshot);
    let mut text = lines(&pairing.gpus);
    for note in &pairing.notes {
        writeln!(text, "{note}").unwrap();
    }
    expected.assert_eq(&text);
}

/// Two sockets of 48 cores with two threads each, and a switch for each GPU with four EFA devices: a p5.
fn p5() -> Machine {
    let machine = Machine::empty();
    machine.host("p5", "0-191", 1_000_000, "unlimited");
    machine.numa(0, "0-47,96-143", 500_000);
    machine.numa(1, "48-95,144-191", 500_000);
    machine.smt_cores(96);
    for gpu in 0..8u32 {
        let (bus, numa) = (0x40 + gpu * 0x10, (gpu / 4).to_string());
        let above = |port: u32| {
            let upstream = format!("pci0000:{bus:02x}/0000:{bus:02x}:00.0/0000:{:02x}:00.0", bus + 1);
            format!("{upstream}/0000:{:02x}:01.{port}", bus + 2)
        };
        for nic in 0..4 {
            let address = format!("0000:{:02x}:00.0", bus + 3 + nic);
            let dir = machine.pci_below(&above(nic), &address, EFA, &numa, Some("efa"));
            machine.rdma(
                &format!("rdmap{}s0", bus + 3 + nic),
                &dir,
                "4: ACTIVE",
                "100 Gb/sec (4X EDR)",
                "Unknown",
            );
        }
        machine.pci_below(&above(4), &format!("0000:{:02x}:00.0", bus + 7), GPU, &numa, Some("nvidia"));
    }
    machine
}

#[test]
fn p5_has_four_nics_a_gpu() {
    check(
        &p5().read().unwrap(),
        expect![[r#"
        0000:47:00.0: rdmap67s0 rdmap68s0 rdmap69s0 rdmap70s0; node 0, cores 1-11; same PCI switch
        0000:57:00.0: rdmap83s0 rdmap84s0 rdmap85s0 rdmap86s0; node 0, cores 12-23; same PCI switch
        0000:67:00.0: rdmap99s0 rdmap100s0 rdmap101s0 rdmap102s0; node 0, cores 24-35; same PCI switch
        0000:77:00.0: rdmap115s0 rdmap116s0 rdmap117s0 rdmap118s0; node 0, cores 36-47; same PCI switch
        0000:87:00.0: rdmap131s0 rdmap132s0 rdmap133s0 rdmap134s0; node 1, cores 49-59; same PCI switch
        0000:97:00.0: rdmap147s0 rdmap148s0 rdmap149s0 rdmap150s0; node 1, cores 60-71; same PCI switch
        0000:a7:00.0: rdmap163s0 rdmap164s0 rdmap165s0 rdmap166s0; node 1, cores 72-83; same PCI switch
        0000:b7:00.0: rdmap179s0 rdmap180s0 rdmap181s0 rdmap182s0; node 1, cores 84-95; same PCI switch
    "#]],
    );
}

#[test]
fn p4d_has_a_nic_for_two_gpus() {
    check(
        &Snapshot::from_xml(&nccl_p4d()).unwrap(),
        expect![[r#"
        0000:10:1c.0: 0000:10:1b.0; node 0, cores 1-3; same PCI switch
        0000:10:1d.0: 0000:10:1b.0; node 0, cores 4-7; same PCI switch
        0000:20:1c.0: 0000:20:1b.0; node 0, cores 8-11; same PCI switch
        0000:20:1d.0: 0000:20:1b.0; node 0, cores 12-15; same PCI switch
        0000:30:1c.0: 0000:30:1b.0; node 1, cores 17-19; same PCI switch
        0000:30:1d.0: 0000:30:1b.0; node 1, cores 20-23; same PCI switch
        0000:40:1c.0: 0000:40:1b.0; node 1, cores 24-27; same PCI switch
        0000:40:1d.0: 0000:40:1b.0; node 1, cores 28-31; same PCI switch
        SMT siblings are unknown: each CPU is taken for a core of its own, so two threads may share a core
    "#]],
    );
}

/// One port of many is down; a slow card for management is on the same node as two of the GPUs; two fast NICs are on the
/// switch of one GPU and none on the other's.
#[test]
fn uneven_host() {
    let machine = Machine::empty();
    machine.numa(0, "0-7", 1);
    machine.smt_cores(4);
    let nic = |above: &str, address: &str, name: &str, state: &str, rate: &str| {
        let dir = machine.pci_below(above, address, CX7, "0", Some("mlx5_core"));
        machine.rdma(name, &dir, state, rate, "InfiniBand");
    };
    let (a, b) = ("pci0000:10/0000:10:01.0", "pci0000:20/0000:20:01.0");
    machine.pci_below(a, "0000:11:00.0", GPU, "0", None);
    nic(a, "0000:12:00.0", "mlx5_0", "4: ACTIVE", "400 Gb/sec (4X NDR)");
    nic(a, "0000:13:00.0", "mlx5_1", "4: ACTIVE", "400 Gb/sec (4X NDR)");
    nic(a, "0000:14:00.0", "mlx5_2", "1: DOWN", "400 Gb/sec (4X NDR)");
    machine.pci_below(b, "0000:21:00.0", GPU, "0", None);
    nic("pci0000:20", "0000:20:02.0", "mlx5_10", "4: ACTIVE", "100 Gb/sec (4X EDR)");
    check(
        &machine.read().unwrap(),
        expect![[r#"
        0000:11:00.0: mlx5_0 mlx5_1; node 0, cores 1; same PCI switch
        0000:21:00.0: mlx5_0; node 0, cores 2-3; same NUMA node
        mlx5_2 is left out: none of its ports is active
        mlx5_10 is left out: it runs at 100 Gb/s, and the others at 400 Gb/s
    "#]],
    );
}

/// A GPU and a wired and a wireless device on the only host bridge, and the kernel names no node for them.
#[test]
fn laptop() {
    let machine = Machine::empty();
    machine.host("laptop", "0-3", 16_000_000, "8388608");
    machine.numa(0, "0-3", 16_000_000);
    machine.smt_cores(2);
    machine.pci_below("pci0000:00/0000:00:01.0", "0000:01:00.0", GPU, "-1", None);
    for (port, address, name, state) in
        [("1c.0", "0000:2b:00.0", "enp43s0", "down"), ("1c.6", "0000:2c:00.0", "wlp44s0", "up")]
    {
        let above = format!("pci0000:00/0000:00:{port}");
        let dir = machine.pci_below(&above, address, ("0x020000", "0x8086", "0x15f3"), "-1", None);
        machine.net(name, Some(&dir), state, None, "1500");
    }
    machine.net("lo", None, "unknown", None, "65536");
    check(
        &machine.read().unwrap(),
        expect![[r#"
        0000:01:00.0: wlp44s0; node -, cores 1; by order: the PCI tree says nothing
        enp43s0 is left out: none of its ports is active
    "#]],
    );
}

/// A virtual machine: everything on one host bridge, each device below a root port of its own, no node known.
#[test]
fn virtual_machine_without_numa() {
    let machine = Machine::empty();
    machine.host("vm", "0-15", 1_000_000, "8388608");
    machine.numa(0, "0-15", 1_000_000);
    machine.smt_cores(8);
    let above = |slot: u32| format!("pci0000:00/0000:00:02.{slot}");
    for gpu in 0..4 {
        machine.pci_below(&above(gpu), &format!("0000:{:02x}:00.0", gpu + 1), GPU, "-1", None);
    }
    for nic in 0..6 {
        let address = format!("0000:{:02x}:00.0", nic + 0x11);
        let dir = machine.pci_below(&above(nic).replace("02.", "03."), &address, CX7, "-1", None);
        machine.rdma(&format!("mlx5_{nic}"), &dir, "4: ACTIVE", "200 Gb/sec (4X HDR)", "InfiniBand");
    }
    check(
        &machine.read().unwrap(),
        expect![[r#"
        0000:01:00.0: mlx5_0 mlx5_1; node -, cores 1; by order: the PCI tree says nothing
        0000:02:00.0: mlx5_2 mlx5_3; node -, cores 2-3; by order: the PCI tree says nothing
        0000:03:00.0: mlx5_4; node -, cores 4-5; by order: the PCI tree says nothing
        0000:04:00.0: mlx5_5; node -, cores 6-7; by order: the PCI tree says nothing
    "#]],
    );
}

/// A copy of /sys without the directories above the devices: only nodes are known, and of one GPU not even that.
#[test]
fn missing_parents() {
    let machine = Machine::empty();
    machine.numa(0, "0-3", 1);
    machine.numa(1, "4-7", 1);
    for (gpu, numa) in [("0000:11:00.0", "0"), ("0000:21:00.0", "1"), ("0000:31:00.0", "-1")] {
        machine.pci_below("", gpu, GPU, numa, None);
    }
    for (index, numa) in ["0", "1", "1"].into_iter().enumerate() {
        let dir = machine.pci_below("", &format!("0000:4{index}:00.0"), CX7, numa, None);
        machine.rdma(&format!("mlx5_{index}"), &dir, "4: ACTIVE", "200 Gb/sec (4X HDR)", "InfiniBand");
    }
    check(
        &machine.read().unwrap(),
        expect![[r#"
        0000:11:00.0: mlx5_0; node 0, cores 1; same NUMA node
        0000:21:00.0: mlx5_1 mlx5_2; node 1, cores 5-7; same NUMA node
        0000:31:00.0: mlx5_0; node 0, cores 2-3; by order: the PCI tree says nothing
        SMT siblings are unknown: each CPU is taken for a core of its own, so two threads may share a core
    "#]],
    );
}

/// The kernel names the node of one function below a host bridge and not of the other.
#[test]
fn a_host_bridge_has_one_node() {
    let machine = Machine::empty();
    machine.numa(0, "0-3", 1);
    machine.numa(1, "4-7", 1);
    machine.smt_cores(4);
    for (bridge, gpu_node, nic_node) in [("10", "-1", "1"), ("20", "0", "-1")] {
        machine.pci_below(&format!("pci0000:{bridge}"), &format!("0000:{bridge}:01.0"), GPU, gpu_node, None);
        let address = format!("0000:{bridge}:02.0");
        let dir = machine.pci_below(&format!("pci0000:{bridge}"), &address, CX7, nic_node, None);
        machine.rdma(&format!("mlx5_{bridge}"), &dir, "4: ACTIVE", "200 Gb/sec (4X HDR)", "InfiniBand");
    }
    let snapshot = machine.read().unwrap();
    check(
        &snapshot,
        expect![[r#"
        0000:10:01.0: mlx5_10; node 1, cores 2-3; same host bridge
        0000:20:01.0: mlx5_20; node 0, cores 1; same host bridge
    "#]],
    );
    assert_eq!(snapshot.gpus[0].pci.numa_node, None, "the snapshot itself keeps to what was said");
    let places: Vec<_> = snapshot.tree().branches.iter().map(|branch| branch.place).collect();
    assert_eq!(places, [0, 1].map(|node| Some(Place::NumaNode(NumaIndex(node)))));
}

#[test]
fn gpus_without_nics_still_have_cores() {
    let machine = Machine::empty();
    machine.host("dev", "0-3", 1, "unlimited");
    machine.pci("0000:11:00.0", GPU, "-1", None);
    check(
        &machine.read().unwrap(),
        expect![[r#"
        0000:11:00.0: ; node -, cores 1-3; no usable NIC
        SMT siblings are unknown: each CPU is taken for a core of its own, so two threads may share a core
    "#]],
    );
}

#[test]
fn host_ranks_share_nics_and_cores() {
    let snapshot = Snapshot::from_xml(&hwloc_p5(1)).unwrap();
    let ranks = |ranks| lines(&Pairing::host_ranks(&snapshot, ranks));
    expect![[r#"
        rank: rdmap19s0 rdmap20s0 rdmap21s0 rdmap22s0 rdmap35s0 rdmap36s0 rdmap37s0 rdmap38s0; node -, cores 1-7; an even share of the host's NICs
    "#]].assert_eq(&ranks(1));
    expect![[r#"
        rank: rdmap19s0 rdmap20s0; node 0, cores 1-3; an even share of the host's NICs
        rank: rdmap21s0 rdmap22s0; node 0, cores 4-7; an even share of the host's NICs
        rank: rdmap35s0 rdmap36s0; node 1, cores 9-11; an even share of the host's NICs
        rank: rdmap37s0 rdmap38s0; node 1, cores 12-15; an even share of the host's NICs
    "#]]
    .assert_eq(&ranks(4));
    assert_eq!(ranks(0), "");
    // Only cores, on a host without NICs.
    let machine = Machine::empty();
    machine.host("dev", "0-3", 1, "unlimited");
    machine.smt_cores(2);
    expect![[r#"
        rank: ; node -, cores 0; no usable NIC
        rank: ; node -, cores 0; no usable NIC
        rank: ; node -, cores 1; no usable NIC
    "#]]
    .assert_eq(&lines(&Pairing::host_ranks(&machine.read().unwrap(), 3)));
}

/// What this process may run on bounds the cores.
#[test]
fn cores_that_are_not_allowed_are_not_given() {
    let machine = p5();
    machine.file("proc/self/status", "Cpus_allowed_list:\t96-101,150");
    let snapshot = machine.read().unwrap();
    let cores: Vec<String> = pair(&snapshot).gpus.iter().map(|of| of.cores.to_string()).collect();
    assert_eq!(cores, ["97", "98", "99", "100-101", "150", "150", "150", "150"]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Shares are even, of one node, apart while there are enough cores, and one thread of a core each.
    #[test]
    fn ranks_are_served_evenly(switches in 0..3u32, ranks in 1..40usize) {
        let snapshot = Snapshot::from_xml(&hwloc_p5(switches)).unwrap();
        let assignments = Pairing::host_ranks(&snapshot, ranks);
        prop_assert_eq!(assignments.len(), ranks);
        let spread = |counts: Vec<usize>| counts.iter().max().unwrap() - counts.iter().min().unwrap();
        prop_assert!(spread(assignments.iter().map(|of| of.nics.len()).collect()) <= 1);
        let used: BTreeSet<&String> = assignments.iter().flat_map(|of| &of.nics).collect();
        prop_assert_eq!(used.len(), snapshot.rdma_devices.len());
        for node in &snapshot.numa_nodes {
            let cpus = node.cpus.as_ref().unwrap();
            let on_node: Vec<&CpuSet> = assignments
                .iter()
                .map(|of| &of.cores)
                .filter(|cores| cores.iter().all(|cpu| cpus.contains(cpu)))
                .collect();
            if on_node.is_empty() {
                continue;
            }
            prop_assert!(spread(on_node.iter().map(|cores| cores.count()).collect()) <= 1);
            let taken: Vec<u32> = on_node.iter().flat_map(|cores| cores.iter()).collect();
            let apart: BTreeSet<u32> = taken.iter().copied().collect();
            prop_assert!(apart.len() == taken.len() || on_node.len() > 8, "a core twice");
            let of_a_core = |core: &topology::Core| core.cpus.iter().filter(|cpu| apart.contains(cpu)).count();
            prop_assert!(snapshot.cores.iter().all(|core| of_a_core(core) <= 1));
            prop_assert_eq!(apart.contains(&cpus.first().unwrap()), on_node.len() >= 8);
        }
        for of in &assignments {
            prop_assert!(!of.cores.is_empty());
            let on = |node: &&topology::NumaNode| Some(node.index) == of.numa_node;
            let node = snapshot.numa_nodes.iter().find(on);
            prop_assert!(node.is_none_or(|node| of.cores.iter().all(|cpu| node.cpus.as_ref().unwrap().contains(cpu))));
        }
    }
}
