//! Snapshots of made-up machines, which the crate reads as it reads `/sys`. One line per device, kept beside the test that
//! makes it.

mod common;

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use common::Machine;
use expect_test::{Expect, expect};
use topology::{ENTRIES_MAX, PciDevice, RdmaKind, Roots, Snapshot, TopologyError};

#[track_caller]
fn check(machine: &Machine, expected: Expect) -> Snapshot {
    let snapshot = machine.read().unwrap();
    let root = machine.dir.path().display().to_string();
    expected.assert_eq(&summary(&snapshot).replace(&root, ""));
    snapshot
}

fn summary(snapshot: &Snapshot) -> String {
    fn show<T: std::fmt::Display>(value: &Option<T>) -> String {
        value.as_ref().map_or_else(|| "-".to_owned(), T::to_string)
    }
    fn pci(device: &PciDevice) -> String {
        let (vendor, id) = (show(&device.vendor_id), show(&device.device_id));
        format!("{} numa {} {vendor}:{id} {}", device.address, show(&device.numa_node), show(&device.driver))
    }
    let mut text = String::new();
    let host = &snapshot.host;
    writeln!(
        text,
        "host {} kernel {} cpus {} allowed {} memory {} locked {:?}",
        show(&host.name),
        show(&host.kernel_release),
        show(&host.cpus_online),
        show(&host.cpus_allowed),
        show(&host.memory_bytes),
        host.locked_memory_max,
    )
    .unwrap();
    for pool in &host.huge_pages {
        let (free, total) = (show(&pool.pages_free), show(&pool.pages_total));
        writeln!(text, "huge pages {} free {free} of {total}", pool.page_bytes).unwrap();
    }
    for node in &snapshot.numa_nodes {
        let (cpus, memory) = (show(&node.cpus), show(&node.memory_bytes));
        writeln!(text, "numa {} cpus {cpus} memory {memory}", node.index).unwrap();
    }
    for device in &snapshot.rdma_devices {
        let place = device.pci.as_ref().map_or_else(|| "-".to_owned(), pci);
        write!(text, "rdma {} {:?} {place} net {:?}", device.name, device.kind, device.net_devices).unwrap();
        for port in &device.ports {
            let (number, state, link) = (port.number, port.state, show(&port.link_layer));
            write!(text, " port {number} {state:?} {} Gb/s {link}", show(&port.gigabits_per_second)).unwrap();
        }
        writeln!(text, " driver {}", show(&device.driver_version)).unwrap();
    }
    for device in &snapshot.net_devices {
        let place = device.pci.as_ref().map_or_else(|| "-".to_owned(), pci);
        let (state, speed, mtu) =
            (show(&device.operstate), show(&device.megabits_per_second), show(&device.mtu_bytes));
        let up = if device.is_up() { "up" } else { "not up" };
        writeln!(text, "net {} {state} ({up}) {speed} Mb/s mtu {mtu} {place}", device.name).unwrap();
    }
    for gpu in &snapshot.gpus {
        writeln!(text, "gpu {} {}", pci(&gpu.pci), show(&gpu.model)).unwrap();
    }
    if let Some(version) = &snapshot.nvidia_driver_version {
        writeln!(text, "nvidia driver {version}").unwrap();
    }
    for unread in &snapshot.unread {
        writeln!(text, "unread {}: {}", unread.path.display(), unread.reason).unwrap();
    }
    text
}

/// Two sockets, 8 GPUs, 32 EFA devices: the shape of an AWS p5. EFA has neither a network device nor a PCI name of ours.
#[test]
fn p5_like() {
    let machine = Machine::empty();
    machine.host("p5", "0-191", 2_097_152_000, "unlimited");
    for (node, cpus) in [(0, "0-47,96-143"), (1, "48-95,144-191")] {
        machine.numa(node, cpus, 1_048_576_000);
    }
    machine.file("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "5128");
    machine.file("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "5128");
    machine.file("sys/bus/pci/drivers/efa/module/version", "2.13.0g");
    machine.nvidia_driver("580.65.06");
    for gpu in 0..8u32 {
        let (bus, numa) = (0x43 + gpu * 0x10, (gpu / 4).to_string());
        for nic in 0..4 {
            let address = format!("0000:{:02x}:00.0", bus + nic);
            let dir = machine.pci(&address, ("0x020000", "0x1d0f", "0xefa2"), &numa, Some("efa"));
            machine.rdma(
                &format!("rdmap{}s0", bus + nic),
                &dir,
                "4: ACTIVE",
                "100 Gb/sec (4X EDR)",
                "Unknown",
            );
        }
        machine.gpu(&format!("0000:{:02x}:00.0", bus + 4), &numa);
        machine.pci(
            &format!("0000:{:02x}:00.0", bus + 5),
            ("0x068000", "0x10de", "0x22a3"),
            &numa,
            Some("nvidia"),
        );
    }
    let ena = machine.pci("0000:28:00.0", ("0x020000", "0x1d0f", "0xec20"), "0", Some("ena"));
    machine.net("ens32", Some(&ena), "up", None, "9001");
    machine.net("lo", None, "unknown", None, "65536");

    let snapshot = machine.read().unwrap();
    assert_eq!(snapshot.rdma_devices.len(), 32);
    assert!(snapshot.rdma_devices.iter().all(|device| device.kind == RdmaKind::Efa));
    assert_eq!(snapshot.gpus.len(), 8, "an NVSwitch is not a GPU");
    for node in &snapshot.numa_nodes {
        let near = |pci: &Option<PciDevice>| pci.as_ref().and_then(|pci| pci.numa_node) == Some(node.index);
        assert_eq!(snapshot.rdma_devices.iter().filter(|device| near(&device.pci)).count(), 16);
        assert_eq!(snapshot.gpus.iter().filter(|gpu| near(&Some(gpu.pci.clone()))).count(), 4);
    }
    // The first NIC, the first GPU, and all that there is one of.
    let lines: Vec<String> = summary(&snapshot).lines().map(str::to_owned).collect();
    let first = |start: &str| lines.iter().position(|line| line.starts_with(start)).unwrap();
    let shown: Vec<&str> = lines
        .iter()
        .enumerate()
        .filter(|(i, line)| {
            !line.starts_with("rdma") && !line.starts_with("gpu") || [first("rdma"), first("gpu")].contains(i)
        })
        .map(|(_, line)| line.as_str())
        .collect();
    expect![[r#"
        host p5 kernel 6.8.0-1021-aws cpus 0-191 allowed 0-191 memory 2147483648000 locked Some(Unlimited)
        huge pages 2097152 free 5128 of 5128
        numa 0 cpus 0-47,96-143 memory 1073741824000
        numa 1 cpus 48-95,144-191 memory 1073741824000
        rdma rdmap67s0 Efa 0000:43:00.0 numa 0 0x1d0f:0xefa2 efa net [] port 1 Some(Active) 100 Gb/s Unknown driver 2.13.0g
        net ens32 up (up) - Mb/s mtu 9001 0000:28:00.0 numa 0 0x1d0f:0xec20 ena
        net lo unknown (up) - Mb/s mtu 65536 -
        gpu 0000:47:00.0 numa 0 0x10de:0x2330 nvidia NVIDIA H100 80GB HBM3
        nvidia driver 580.65.06"#]].assert_eq(&shown.join("\n"));
}

/// Three InfiniBand cards, one of them without a link, and a node of memory alone.
#[test]
fn infiniband_host() {
    let machine = Machine::empty();
    machine.host("ib", "0-127", 1_000_000, "65536");
    machine.numa(0, "0-63", 500_000);
    machine.numa(1, "64-127", 500_000);
    // Memory that no CPU is near, as CXL and some GPUs add it.
    machine.numa(2, "", 1_000);
    for index in [0, 2, 10] {
        let state = if index == 2 { "1: DOWN" } else { "4: ACTIVE" };
        let address = format!("0000:{:02x}:00.0", 0x18 + index);
        let dir = machine.pci(&address, ("0x020700", "0x15b3", "0x1021"), "1", Some("mlx5_core"));
        machine.rdma(&format!("mlx5_{index}"), &dir, state, "400 Gb/sec (4X NDR)", "InfiniBand");
        machine.net(
            &format!("ib{index}"),
            Some(&dir),
            if index == 2 { "down" } else { "up" },
            Some("400000"),
            "4092",
        );
    }
    machine.gpu("0000:86:00.0", "0");
    check(
        &machine,
        expect![[r#"
        host ib kernel 6.8.0-1021-aws cpus 0-127 allowed 0-127 memory 1024000000 locked Some(Bytes(65536))
        numa 0 cpus 0-63 memory 512000000
        numa 1 cpus 64-127 memory 512000000
        numa 2 cpus  memory 1024000
        rdma mlx5_0 Mellanox 0000:18:00.0 numa 1 0x15b3:0x1021 mlx5_core net ["ib0"] port 1 Some(Active) 400 Gb/s InfiniBand driver -
        rdma mlx5_2 Mellanox 0000:1a:00.0 numa 1 0x15b3:0x1021 mlx5_core net ["ib2"] port 1 Some(Down) 400 Gb/s InfiniBand driver -
        rdma mlx5_10 Mellanox 0000:22:00.0 numa 1 0x15b3:0x1021 mlx5_core net ["ib10"] port 1 Some(Active) 400 Gb/s InfiniBand driver -
        net ib0 up (up) 400000 Mb/s mtu 4092 0000:18:00.0 numa 1 0x15b3:0x1021 mlx5_core
        net ib2 down (not up) 400000 Mb/s mtu 4092 0000:1a:00.0 numa 1 0x15b3:0x1021 mlx5_core
        net ib10 up (up) 400000 Mb/s mtu 4092 0000:22:00.0 numa 1 0x15b3:0x1021 mlx5_core
        gpu 0000:86:00.0 numa 0 0x10de:0x2330 nvidia NVIDIA H100 80GB HBM3
    "#]],
    );
}

/// 4 NICs without a driver bound and without the RDMA class: still GPUs and network devices, and no invented RDMA.
#[test]
fn p4d_like_without_efa_driver() {
    let machine = Machine::empty();
    machine.host("p4d", "0-95", 1_000_000, "8388608");
    machine.pci("0000:10:1b.0", ("0x020000", "0x1d0f", "0xefa0"), "0", None);
    for address in ["0000:20:1d.0", "0000:10:1c.0", "0000:10:1d.0"] {
        machine.pci(address, ("0x030200", "0x10de", "0x20b0"), "0", None);
    }
    check(
        &machine,
        expect![[r#"
        host p4d kernel 6.8.0-1021-aws cpus 0-95 allowed 0-95 memory 1024000000 locked Some(Bytes(8388608))
        gpu 0000:10:1c.0 numa 0 0x10de:0x20b0 - -
        gpu 0000:10:1d.0 numa 0 0x10de:0x20b0 - -
        gpu 0000:20:1d.0 numa 0 0x10de:0x20b0 - -
    "#]],
    );
}

/// A laptop: a link that is down, a wireless device, a software RDMA device, another vendor's display.
#[test]
fn laptop() {
    let machine = Machine::empty();
    machine.host("laptop", "0-7", 16_000_000, "8388608");
    machine.numa(0, "0-7", 16_000_000);
    machine.pci("0000:00:02.0", ("0x030000", "0x8086", "0x9a49"), "-1", Some("i915"));
    let wired = machine.pci("0000:2b:00.0", ("0x020000", "0x8086", "0x15f3"), "-1", Some("igc"));
    machine.net("enp43s0", Some(&wired), "down", Some("-1"), "1500");
    let wireless = machine.pci("0000:2c:00.0", ("0x028000", "0x8086", "0x2725"), "-1", Some("iwlwifi"));
    machine.net("wlp44s0", Some(&wireless), "up", None, "1500");
    machine.net("lo", None, "unknown", None, "65536");
    // A plain file beside the devices.
    machine.file("sys/class/net/bonding_masters", "");
    let soft = "sys/devices/virtual/infiniband/rxe0";
    machine.file(&format!("{soft}/parent"), "enp43s0");
    machine.file(&format!("{soft}/ports/1/state"), "4: ACTIVE");
    machine.file(&format!("{soft}/ports/1/rate"), "2.5 Gb/sec (1X SDR)");
    machine.file(&format!("{soft}/ports/1/link_layer"), "Ethernet");
    machine.link("sys/class/infiniband/rxe0", soft);
    check(
        &machine,
        expect![[r#"
        host laptop kernel 6.8.0-1021-aws cpus 0-7 allowed 0-7 memory 16384000000 locked Some(Bytes(8388608))
        numa 0 cpus 0-7 memory 16384000000
        rdma rxe0 Other - net ["enp43s0"] port 1 Some(Active) 2.5 Gb/s Ethernet driver -
        net enp43s0 down (not up) - Mb/s mtu 1500 0000:2b:00.0 numa - 0x8086:0x15f3 igc
        net lo unknown (up) - Mb/s mtu 65536 -
        net wlp44s0 up (up) - Mb/s mtu 1500 0000:2c:00.0 numa - 0x8086:0x2725 iwlwifi
    "#]],
    );
}

/// A virtual machine: numa_node is -1 everywhere, and the NIC sits one level below its PCI function.
#[test]
fn virtual_machine() {
    let machine = Machine::empty();
    machine.host("vm", "0-1", 24_684_092, "8388608");
    machine.numa(0, "0-1", 24_684_092);
    let function = machine.pci("0000:00:03.0", ("0x020000", "0x1af4", "0x1041"), "-1", Some("virtio-pci"));
    machine.net("eth0", Some(&format!("{function}/virtio2")), "up", Some("4294967295"), "1400");
    machine.gpu("0000:00:04.0", "-1");
    let snapshot = check(
        &machine,
        expect![[r#"
        host vm kernel 6.8.0-1021-aws cpus 0-1 allowed 0-1 memory 25276510208 locked Some(Bytes(8388608))
        numa 0 cpus 0-1 memory 25276510208
        net eth0 up (up) - Mb/s mtu 1400 0000:00:03.0 numa - 0x1af4:0x1041 virtio-pci
        gpu 0000:00:04.0 numa - 0x10de:0x2330 nvidia NVIDIA H100 80GB HBM3
    "#]],
    );
    assert_eq!(snapshot.gpus[0].pci.numa_node, None, "-1 is unknown, not node 0");
}

#[test]
fn empty_tree_says_nothing() {
    let snapshot = check(
        &Machine::empty(),
        expect![[r#"
        host - kernel - cpus - allowed - memory - locked None
    "#]],
    );
    let json = serde_json::to_value(&snapshot).unwrap();
    assert_eq!(json["host"]["memory_bytes"], serde_json::Value::Null);
}

/// What is there but odd is `None` and noted, and does not hide the rest.
#[test]
fn odd_files_are_noted() {
    let machine = Machine::empty();
    machine.file("sys/devices/system/cpu/online", "all of them");
    machine.file("proc/meminfo", "MemTotal: much");
    machine.file("proc/self/limits", "");
    machine.file("proc/driver/nvidia/version", "?");
    let dir = machine.pci("0000:18:00.0", ("0x020700", "Mellanox", "0x1021"), "near", Some("mlx5_core"));
    machine.rdma("mlx5_0", &dir, "ACTIVE", "fast", "InfiniBand");
    // A link to nowhere: the device has just left.
    symlink("../../devices/gone", machine.dir.path().join("sys/class/infiniband/mlx5_1")).unwrap();
    check(
        &machine,
        expect![[r#"
        host - kernel - cpus - allowed - memory - locked None
        rdma mlx5_0 Mellanox 0000:18:00.0 numa - -:0x1021 mlx5_core net [] port 1 None - Gb/s InfiniBand driver -
        unread /sys/devices/system/cpu/online: expected a list of CPUs such as 0-47,96-143, found "all of them"
        unread /proc/meminfo: expected lines such as "MemTotal: 24063852 kB", found "MemTotal: much"
        unread /proc/self/limits: expected a line "Max locked memory  8388608  8388608  bytes", found ""
        unread /sys/devices/pci0000:00/0000:00:01.0/0000:18:00.0/numa_node: expected a NUMA node or -1, found "near"
        unread /sys/devices/pci0000:00/0000:00:01.0/0000:18:00.0/vendor: expected a PCI id such as 0x10de, found "Mellanox"
        unread /sys/class/infiniband/mlx5_0/ports/1/state: expected a port state such as "4: ACTIVE", found "ACTIVE"
        unread /sys/class/infiniband/mlx5_0/ports/1/rate: expected a rate such as "100 Gb/sec (4X EDR)", found "fast"
        unread /sys/bus/pci/devices/0000:18:00.0/vendor: expected a hexadecimal id such as 0x10de, found "Mellanox"
        unread /proc/driver/nvidia/version: expected a line "NVRM version: ... 580.65.06 ...", found "?"
    "#]],
    );
}

#[test]
fn a_missing_root_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let error = Snapshot::read(&Roots::below(dir.path())).unwrap_err();
    let root = dir.path().join("sys");
    assert!(matches!(&error, TopologyError::Root { path, .. } if *path == root), "{error:?}");
    assert!(error.to_string().contains(root.to_str().unwrap()), "{error}");
}

#[test]
fn listing_is_bounded() {
    let machine = Machine::empty();
    let class = machine.dir.path().join("sys/class/net");
    fs::create_dir_all(&class).unwrap();
    for index in 0..=ENTRIES_MAX {
        // Links are the cheapest entries to make, and what the kernel puts there.
        symlink("/nowhere", class.join(index.to_string())).unwrap();
    }
    let error = machine.read().unwrap_err();
    assert!(matches!(&error, TopologyError::TooManyEntries { path, .. } if *path == class), "{error:?}");
}

/// The machine that runs the test has a host name, memory and at least one CPU, whatever else it lacks.
#[test]
fn this_machine() {
    if !Path::new("/sys/class").is_dir() {
        println!("skipped: no /sys here");
        return;
    }
    let snapshot = Snapshot::read(&Roots::default()).unwrap();
    assert!(snapshot.host.name.is_some());
    assert!(snapshot.host.memory_bytes.is_some_and(|bytes| bytes > 0));
    let online = snapshot.host.cpus_online.unwrap();
    let allowed = snapshot.host.cpus_allowed.unwrap();
    assert!(allowed.iter().any(|cpu| online.contains(cpu)));
}
