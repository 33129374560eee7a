//! Made-up dumps, in the form that hwloc and NCCL write.

use std::fmt::Write as _;

/// hwloc: two nodes of 8 cores with two CPUs each, and per node `switches` PCI switches, each with four EFA devices, a
/// GPU and an ENA device. What AWS calls a p5 has four switches a node.
pub fn hwloc_p5(switches: u32) -> String {
    let mut text = String::from(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<!DOCTYPE topology SYSTEM \"hwloc2.dtd\">\n",
    );
    text += "<topology version=\"2.0\">\n<object type=\"Machine\" os_index=\"0\" cpuset=\"0xffffffff\" \
             allowed_cpuset=\"0xffffffff\" nodeset=\"0x00000003\">\n<info name=\"HostName\" value=\"p5\"/>\n";
    for node in 0..2u32 {
        let cpus = format!("0x{:08x}", 0x00ff_00ff_u32 << (8 * node));
        let nodes = format!("0x{:08x}", 1 << node);
        writeln!(text, "<object type=\"Package\" os_index=\"{node}\" cpuset=\"{cpus}\" nodeset=\"{nodes}\">")
            .unwrap();
        writeln!(
            text,
            "<object type=\"NUMANode\" os_index=\"{node}\" cpuset=\"{cpus}\" nodeset=\"{nodes}\" local_memory=\"1073741824\"/>"
        )
        .unwrap();
        for core in 8 * node..8 * node + 8 {
            let siblings = (1u64 << core) | (1 << (core + 16));
            writeln!(text, "<object type=\"Core\" os_index=\"{core}\" cpuset=\"0x{siblings:08x}\">").unwrap();
            for cpu in [core, core + 16] {
                writeln!(text, "<object type=\"PU\" os_index=\"{cpu}\" cpuset=\"0x{:08x}\"/>", 1u64 << cpu)
                    .unwrap();
            }
            text += "</object>\n";
        }
        for switch in 0..switches {
            switch_of_p5(&mut text, 0x10 + 0x10 * (node * switches + switch));
        }
        text += "</object>\n";
    }
    text + "</object>\n</topology>\n"
}

fn switch_of_p5(text: &mut String, bus: u32) {
    let bridge = |text: &mut String, address: &str, first: u32, last: u32| {
        writeln!(
            text,
            "<object type=\"Bridge\" bridge_type=\"1-1\" bridge_pci=\"0000:[{first:02x}-{last:02x}]\" \
             pci_busid=\"{address}\" pci_type=\"0604 [1d0f:0200] [1d0f:0200] 00\">"
        )
        .unwrap();
    };
    let last = bus + 8;
    writeln!(text, "<object type=\"Bridge\" bridge_type=\"0-1\" bridge_pci=\"0000:[{bus:02x}-{last:02x}]\">")
        .unwrap();
    bridge(text, &format!("0000:{bus:02x}:00.0"), bus + 1, last);
    bridge(text, &format!("0000:{:02x}:00.0", bus + 1), bus + 2, last);
    for port in 0..6 {
        let at = bus + 3 + port;
        bridge(text, &format!("0000:{:02x}:01.{port}", bus + 2), at, at);
        let (ids, device) = match port {
            0..4 => (
                "0200 [1d0f:efa1] [1d0f:efa1] 00",
                format!(
                    "<object type=\"OSDev\" name=\"rdmap{at}s0\" osdev_type=\"3\"><info name=\"Port1State\" value=\"4\"/></object>"
                ),
            ),
            4 => (
                "0302 [10de:2330] [10de:16c1] a1",
                "<object type=\"OSDev\" name=\"opencl0d0\" subtype=\"OpenCL\" osdev_type=\"5\"><info name=\"GPUModel\" \
                 value=\"NVIDIA H100\"/></object>"
                    .to_owned(),
            ),
            _ => (
                "0200 [1d0f:ec20] [1d0f:ec20] 00",
                format!("<object type=\"OSDev\" name=\"enp{at}s0\" osdev_type=\"2\"/>"),
            ),
        };
        writeln!(
            text,
            "<object type=\"PCIDev\" pci_busid=\"0000:{at:02x}:00.0\" pci_type=\"{ids}\">{device}</object></object>"
        )
        .unwrap();
    }
    text.push_str("</object></object></object>\n");
}

/// NCCL: two nodes with two switches each, below each a NIC and two GPUs, none of them named; what AWS calls a p4d.
pub fn nccl_p4d() -> String {
    let mut text = String::from("<system version=\"1\">\n");
    for (node, affinity) in [(0, "0000ffff"), (1, "ffff0000")] {
        writeln!(text, "<cpu numaid=\"{node}\" affinity=\"{affinity}\" arch=\"x86_64\">").unwrap();
        for switch in 2 * node..2 * node + 2 {
            let bus = 0x10 * (switch + 1);
            writeln!(
                text,
                "<pci busid=\"ffff:ff:{switch:02x}.0\" class=\"0x060400\" vendor=\"0xffff\" device=\"0xffff\">"
            )
            .unwrap();
            for (device, class, ids) in [
                ("1c", "0x030200", "vendor=\"0x10de\" device=\"0x20b0\""),
                ("1d", "0x030200", "vendor=\"0x10de\" device=\"0x20b0\""),
                ("1b", "0x020000", "vendor=\"0x1d0f\" device=\"0xefa0\""),
            ] {
                writeln!(text, "<pci busid=\"0000:{bus:02x}:{device}.0\" class=\"{class}\" {ids}/>").unwrap();
            }
            text += "</pci>\n";
        }
        text += "</cpu>\n";
    }
    text + "</system>\n"
}
