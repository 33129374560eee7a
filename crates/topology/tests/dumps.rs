//! Dumps of made-up hosts in the forms of hwloc and NCCL, dumps that are no such thing, and where they are present two
//! real ones.

mod common;

use std::path::{Path, PathBuf};

use common::dumps::{hwloc_p5, nccl_p4d};
use proptest::prelude::*;
use topology::{NumaIndex, PortState, RdmaKind, Reason, Snapshot, TopologyError, XML_BYTES_MAX, pair};

#[test]
fn hwloc_says_everything() {
    let snapshot = Snapshot::from_xml(&hwloc_p5(1)).unwrap();
    assert_eq!(snapshot.host.name.as_deref(), Some("p5"));
    assert_eq!(snapshot.host.cpus_online, "0-31".parse().ok());
    let nodes: Vec<_> = snapshot.numa_nodes.iter().map(|node| (node.index, node.cpus.clone())).collect();
    let cpus = |text: &str| text.parse().ok();
    assert_eq!(nodes, [(NumaIndex(0), cpus("0-7,16-23")), (NumaIndex(1), cpus("8-15,24-31"))]);
    assert_eq!(snapshot.numa_nodes[0].memory_bytes, Some(1 << 30));
    assert_eq!(snapshot.cores.len(), 16);
    assert_eq!(snapshot.cores[9].cpus.to_string(), "9,25");
    assert_eq!((snapshot.gpus.len(), snapshot.rdma_devices.len(), snapshot.net_devices.len()), (2, 8, 2));
    let gpu = &snapshot.gpus[0];
    assert_eq!(gpu.model.as_deref(), Some("NVIDIA H100"));
    assert_eq!((gpu.pci.address.to_string(), gpu.pci.numa_node), ("0000:17:00.0".into(), Some(NumaIndex(0))));
    assert_eq!(gpu.pci.host_bridge.unwrap().to_string(), "pci0000:10");
    let bridges: Vec<String> = gpu.pci.bridges.iter().map(ToString::to_string).collect();
    assert_eq!(bridges, ["0000:10:00.0", "0000:11:00.0", "0000:12:01.4"]);
    let nic = &snapshot.rdma_devices[0];
    assert_eq!((nic.name.as_str(), nic.kind), ("rdmap19s0", RdmaKind::Efa));
    assert_eq!(nic.ports[0].state, Some(PortState::Active));
}

#[test]
fn nccl_names_what_it_measured() {
    let text = r#"<system version="1">
      <cpu host_hash="0xa1" numaid="-1" affinity="0000000f" arch="x86_64">
        <pci busid="0000:17:00.0" class="0x060400" link_width="16">
          <pci busid="0000:19:00.0" class="0x030200" link_width="16"><gpu dev="0" sm="90" rank="0"><nvlink target="0000:1a:00.0" count="18"/></gpu></pci>
          <pci busid="0000:1b:00.0" class="0x020700" link_width="16">
            <nic><net name="mlx5_10" dev="1" speed="400000" port="1" guid="0x1f2" gdr="1"/><net name="mlx5_10" dev="2" speed="400000" port="2" guid="0x1f2"/></nic>
          </pci>
        </pci>
        <nic><net name="eth0" dev="0" speed="10000" port="0" guid="0x0"/></nic>
      </cpu>
    </system>"#;
    let snapshot = Snapshot::from_xml(text).unwrap();
    assert_eq!(snapshot.numa_nodes, [], "-1 is unknown, not a node");
    assert_eq!(snapshot.host.cpus_online, "0-3".parse().ok());
    assert_eq!(snapshot.gpus[0].pci.numa_node, None);
    assert_eq!(snapshot.rdma_devices.len(), 1);
    assert_eq!(snapshot.rdma_devices[0].ports[0].gigabits_per_second, Some(400.0));
    let net = &snapshot.net_devices[0];
    assert_eq!((net.name.as_str(), net.megabits_per_second, net.pci.is_none()), ("eth0", Some(10_000), true));
    let pairing = pair(&snapshot);
    assert_eq!(pairing.gpus[0].nics, ["mlx5_10"]);
    assert_eq!(pairing.gpus[0].reason, Reason::SameSwitch);
}

/// hwloc's first format has no memory objects, and may lack bridges.
#[test]
fn old_hwloc_without_bridges() {
    let text = r#"<topology>
      <object type="Machine" cpuset="0x0000000f" nodeset="0x00000003">
        <object type="NUMANode" os_index="0" cpuset="0x00000003" nodeset="0x00000001" local_memory="4096">
          <object type="PCIDev" pci_busid="0000:02:00.0" pci_type="0302 [10de:1eb8] [0000:0000] a1"/>
        </object>
        <object type="NUMANode" os_index="1" cpuset="0x0000000c" nodeset="0x00000002">
          <object type="PCIDev" pci_busid="0000:82:00.0" pci_type="0207 [15b3:101b] [0000:0000] 00"/>
        </object>
      </object></topology>"#;
    let snapshot = Snapshot::from_xml(text).unwrap();
    assert_eq!(snapshot.rdma_devices[0].name, "0000:82:00.0");
    let pairing = pair(&snapshot);
    assert_eq!(pairing.gpus[0].nics, ["0000:82:00.0"]);
    assert_eq!(pairing.gpus[0].reason, Reason::OtherNumaNode);
    assert_eq!(pairing.gpus[0].numa_node, Some(NumaIndex(1)), "the thread is near the NIC");
}

#[test]
fn what_is_no_dump_is_told_where_and_why() {
    let nested: String = (0..70).map(|bus| format!("<pci busid=\"0000:{bus:02x}:00.0\">")).collect();
    let attributes: String = (0..600).map(|i| format!(" a{i}=\"\"")).collect();
    for (text, place, what) in [
        ("", "line 1, column 1", "not XML"),
        ("nothing of the kind", "line 1", "not XML"),
        ("<topology version=\"2.0\">\n<object></topology>", "line 2", "not XML"),
        ("<svg/>", "line 1, column 1", "<svg>: not the dump of a host; expected <topology>"),
        ("<graphs version=\"1\"/>", "line 1", "NCCL_TOPO_DUMP_FILE"),
        ("<topology version=\"3.0\"/>", "line 1", "--export-xml-flags v2"),
        ("<topology version=\"2.0\">\n <object/></topology>", "line 2, column 2", "no type"),
        ("<topology>\n<object type=\"PCIDev\"/></topology>", "line 2", "no pci_busid"),
        (
            "<topology><object type=\"Bridge\" bridge_pci=\"0000:[zz-00]\"/></topology>",
            "line 1, column 11",
            "bridge_pci=\"0000:[zz-00]\": expected a domain and buses",
        ),
        (
            "<topology><object type=\"PCIDev\" pci_busid=\"0000:00:01.0\" pci_type=\"GPU\"/></topology>",
            "line 1",
            "expected a class and ids",
        ),
        ("<topology><object type=\"Machine\" cpuset=\"0xf...f\"/></topology>", "line 1", "not a mask"),
        ("<system><cpu numaid=\"zero\"/></system>", "line 1, column 9", "expected a node or -1"),
        ("<system><cpu affinity=\"1\"/></system>", "line 1", "no numaid"),
        ("<system><cpu numaid=\"0\"/>\n<cpu numaid=\"0\"/></system>", "line 2", "a second time"),
        ("<system><pci busid=\"10\"/></system>", "line 1", "busid=\"10\": not a PCI address"),
        ("<system><pci busid=\"0000:00:01.0\" class=\"3\"/></system>", "line 1", "hexadecimal"),
        ("<system><nic>\n<net/></nic></system>", "line 2", "no name"),
        ("<system><nic><net name=\"a\" speed=\"fast\"/></nic></system>", "line 1", "speed=\"fast\""),
        (&format!("<system>{nested}"), "line 1", "not XML"),
        (&format!("<system>{nested}{}</system>", "</pci>".repeat(70)), "line 1", "inside each other"),
        ("<!DOCTYPE a [<!ENTITY b \"bb\">]><system/>", "line 1", "entities"),
        (&format!("<system{attributes}/>"), "line 1", "attributes"),
        (&" ".repeat(XML_BYTES_MAX + 1), "line 1", "longer than"),
        (&format!("<system>{}</system>", "<a/>".repeat(600_000)), "line 1", "not XML (nodes limit"),
    ] {
        let shown: String = text.chars().take(90).collect();
        let error = Snapshot::from_xml(text).expect_err(&shown).to_string();
        assert!(error.starts_with(place) && error.contains(what), "{shown}\n{error}");
    }
}

#[test]
fn files_and_folders_are_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dump.xml");
    std::fs::write(&path, hwloc_p5(1)).unwrap();
    assert_eq!(Snapshot::load(&path).unwrap(), Snapshot::from_xml(&hwloc_p5(1)).unwrap());
    std::fs::create_dir(dir.path().join("sys")).unwrap();
    assert_eq!(Snapshot::load(dir.path()).unwrap(), Snapshot::default());
    for (name, bytes) in [("cut.xml", &hwloc_p5(1).as_bytes()[..500]), ("binary", &[0xff, 0xfe, 0])] {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    let fails = |name: &str| Snapshot::load(&dir.path().join(name)).unwrap_err();
    assert!(matches!(fails("cut.xml"), TopologyError::Dump { .. }));
    for name in ["binary", "nowhere"] {
        let error = fails(name);
        assert!(matches!(error, TopologyError::File { .. }));
        assert!(error.to_string().contains(name) && error.to_string().contains("lstopo"), "{error}");
    }
}

/// A cut or an edit anywhere may make another host, or an error with a place in the text; nothing else.
fn survives(text: &str) {
    match Snapshot::from_xml(text) {
        Ok(snapshot) => assert_eq!(pair(&snapshot).gpus.len(), snapshot.gpus.len()),
        Err(error) => assert!(error.line as usize <= text.lines().count().max(1) + 1, "{error}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn damaged_dumps_never_panic(
        which: bool,
        edits in prop::collection::vec((any::<prop::sample::Index>(), "[ -~]{0,3}", 0..12usize), 0..4),
    ) {
        let mut text = if which { hwloc_p5(1) } else { nccl_p4d() };
        for (at, put, cut) in edits {
            let at = at.index(text.len());
            text.replace_range(at..(at + cut).min(text.len()), &put);
        }
        survives(&text);
    }

    #[test]
    fn odd_values_never_panic(values in prop::collection::vec("(0000:)?[0-9a-fx:.,-]{0,20}|[ -;=?-~]{0,12}", 9)) {
        let v: Vec<String> = values.iter().map(|value| value.replace(['"', '&'], "")).collect();
        survives(&format!(
            "<topology><object type=\"Machine\" cpuset=\"{}\" nodeset=\"{}\"><object type=\"NUMANode\" os_index=\"{}\" \
             local_memory=\"{}\"/><object type=\"Bridge\" bridge_pci=\"{}\"><object type=\"PCIDev\" pci_busid=\"0000:00:01.0\" \
             pci_type=\"{}\"/></object></object></topology>",
            v[0], v[1], v[2], v[3], v[4], v[5]
        ));
        survives(&format!(
            "<system><cpu numaid=\"0\" affinity=\"{}\"><pci busid=\"0000:00:01.0\" class=\"{}\"><nic><net name=\"a\" \
             guid=\"{}\"/></nic></pci></cpu></system>",
            v[6], v[7], v[8]
        ));
    }
}

/// Dumps of real hosts, which are not part of the project.
fn real(name: &str) -> Option<Snapshot> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/topologies");
    let folder = std::env::var_os("WEIGHTSYNC_TOPOLOGIES").map_or_else(beside, PathBuf::from);
    let path = folder.join(name);
    if !path.exists() {
        println!("skipped: no {}; WEIGHTSYNC_TOPOLOGIES names the folder", path.display());
        return None;
    }
    Some(Snapshot::load(&path).unwrap())
}

#[test]
fn a_real_p5() {
    let Some(snapshot) = real("p5.48xlarge.hwloc.xml") else { return };
    assert_eq!((snapshot.gpus.len(), snapshot.rdma_devices.len(), snapshot.net_devices.len()), (8, 32, 32));
    let pairing = pair(&snapshot);
    for (index, of) in pairing.gpus.iter().enumerate() {
        assert_eq!((of.nics.len(), of.reason), (4, Reason::SameSwitch));
        assert_eq!(of.numa_node, Some(NumaIndex(index as u32 / 4)));
    }
    assert_eq!(pairing.gpus[0].nics, ["rdmap79s0", "rdmap80s0", "rdmap81s0", "rdmap82s0"]);
}

#[test]
fn a_real_p4d() {
    let Some(snapshot) = real("p4d.24xlarge.nccl.xml") else { return };
    assert_eq!((snapshot.gpus.len(), snapshot.rdma_devices.len()), (8, 4));
    let pairing = pair(&snapshot);
    let nics: Vec<&str> = pairing.gpus.iter().flat_map(|of| &of.nics).map(String::as_str).collect();
    let (a, b, c, d) = ("0000:10:1b.0", "0000:20:1b.0", "0000:90:1b.0", "0000:a0:1b.0");
    assert_eq!(nics, [a, a, b, b, c, c, d, d]);
    assert!(pairing.gpus.iter().all(|of| of.reason == Reason::SameSwitch));
}
