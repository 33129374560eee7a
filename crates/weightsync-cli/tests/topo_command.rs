//! `weightsync topo` as a user runs it: the tree, the same facts as JSON, the drawing, hosts from dumps and from copied
//! trees, and what it says to files that are neither.

mod common;
#[allow(unreachable_pub)] // the library's own tests use it too
#[path = "../../topology/tests/common/dumps.rs"]
mod dumps;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use common::job::Job;
use dumps::{hwloc_p5, nccl_p4d};
use serde_json::Value;
use tempfile::TempDir;

fn folder_with(text: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("dump.xml"), text).unwrap();
    folder
}

/// What `topo` prints about the dump in a folder, or about the tree that it is.
fn topo(from: &Path, more: &str) -> String {
    let job = Job::new();
    let output = job.run(&format!("topo --from {} {more}", from.display())).succeeds();
    job.end();
    output.stdout
}

#[test]
fn the_tree_of_a_p5() {
    let folder = folder_with(&hwloc_p5(1));
    let text = topo(&folder.path().join("dump.xml"), "--host-ranks 4");
    let expected = "\
p5: 32 CPUs on 16 cores, 2 NUMA nodes, 2 GPUs, 8 RDMA devices, 2 network devices
├─ NUMA node 0: CPUs 0-7,16-23, 1.07 GB of memory
│  └─ PCI switch 0000:11:00.0
│     ├─ GPU 0000:17:00.0 NVIDIA H100
│     │      NICs rdmap19s0, rdmap20s0, rdmap21s0, rdmap22s0 (same PCI switch)
│     │      rail thread on CPU 1, its cores are 1-7
│     ├─ EFA: rdmap19s0, rdmap20s0, rdmap21s0, rdmap22s0
│     └─ network: enp24s0
└─ NUMA node 1: CPUs 8-15,24-31, 1.07 GB of memory
   └─ PCI switch 0000:21:00.0
      ├─ GPU 0000:27:00.0 NVIDIA H100
      │      NICs rdmap35s0, rdmap36s0, rdmap37s0, rdmap38s0 (same PCI switch)
      │      rail thread on CPU 9, its cores are 9-15
      ├─ EFA: rdmap35s0, rdmap36s0, rdmap37s0, rdmap38s0
      └─ network: enp40s0

rank 0: NICs rdmap19s0, rdmap20s0 (an even share of the host's NICs)
    rail thread on CPU 1, its cores are 1-3
rank 1: NICs rdmap21s0, rdmap22s0 (an even share of the host's NICs)
    rail thread on CPU 4, its cores are 4-7
rank 2: NICs rdmap35s0, rdmap36s0 (an even share of the host's NICs)
    rail thread on CPU 9, its cores are 9-11
rank 3: NICs rdmap37s0, rdmap38s0 (an even share of the host's NICs)
    rail thread on CPU 12, its cores are 12-15
";
    assert_eq!(text, expected);
}

#[test]
fn lines_fit_the_terminal_and_json_says_the_same() {
    for (dump, gpus, nics_each, nics) in [(hwloc_p5(4), 8, 4, 32), (nccl_p4d(), 8, 1, 4)] {
        let folder = folder_with(&dump);
        let path = folder.path().join("dump.xml");
        let text = topo(&path, "--host-ranks 1");
        for line in text.lines() {
            assert!(line.chars().count() <= 100, "{line}");
        }
        let facts: Value = serde_json::from_str(&topo(&path, "--host-ranks 1 --json")).unwrap();
        assert_eq!(facts["snapshot"]["rdma_devices"].as_array().unwrap().len(), nics);
        let pairs = facts["pairing"]["gpus"].as_array().unwrap();
        assert_eq!(pairs.len(), gpus);
        assert_eq!(facts["host_ranks"][0]["nics"].as_array().unwrap().len(), nics);
        for of in pairs {
            let names: Vec<&str> = of["nics"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
            assert_eq!(names.len(), nics_each);
            assert_eq!(of["reason"], "same PCI switch");
            for said in [
                format!("GPU {}", of["gpu"].as_str().unwrap()),
                format!("{} (same PCI switch", names.join(", ")),
                format!("rail thread on CPU {}", of["rail_cpu"]),
                of["cores"].as_str().unwrap().to_owned(),
            ] {
                assert!(text.contains(&said), "{said}\n{text}");
            }
        }
        for note in facts["pairing"]["notes"].as_array().unwrap() {
            let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(words.contains(note.as_str().unwrap()), "{note}");
        }
    }
}

/// Every box is on the page, no box of a GPU or a NIC covers another, and each pair has its line.
#[test]
fn the_drawing_is_one_sound_file() {
    let folder = folder_with(&hwloc_p5(4));
    let drawing = folder.path().join("host.svg");
    let said = topo(&folder.path().join("dump.xml"), &format!("--svg {}", drawing.display()));
    assert!(said.contains("host.svg"));
    let text = fs::read_to_string(&drawing).unwrap();
    assert!(!text.contains("href") && !text.contains("url(") && text.contains("prefers-color-scheme: dark"));
    let document = roxmltree::Document::parse(&text).unwrap();
    let number =
        |of: roxmltree::Node<'_, '_>, name| of.attribute(name).map_or(0.0, |it| it.parse::<f64>().unwrap());
    let (width, height) =
        (number(document.root_element(), "width"), number(document.root_element(), "height"));
    let with_class = |class: &'static str| {
        document.descendants().filter(move |node| node.attribute("class") == Some(class))
    };
    let boxes: Vec<[f64; 4]> = document
        .descendants()
        .filter(|node| node.has_tag_name("rect"))
        .map(|of| ["x", "y", "width", "height"].map(|name| number(of, name)))
        .collect();
    for [x, y, w, h] in &boxes {
        assert!(*x >= 0.0 && *y >= 0.0 && x + w <= width && y + h <= height);
    }
    let leaves: Vec<[f64; 4]> = with_class("gpu")
        .chain(with_class("nic"))
        .map(|of| ["x", "y", "width", "height"].map(|name| number(of, name)))
        .collect();
    assert_eq!(leaves.len(), 8 + 32);
    for (index, a) in leaves.iter().enumerate() {
        for b in &leaves[..index] {
            let apart =
                a[0] + a[2] <= b[0] || b[0] + b[2] <= a[0] || a[1] + a[3] <= b[1] || b[1] + b[3] <= a[1];
            assert!(apart, "{a:?} {b:?}");
        }
    }
    assert_eq!(with_class("link").count(), 32);
    assert_eq!((with_class("numa").count(), with_class("pci").count()), (2, 8));
}

/// A folder with copies of `sys` and `proc`, of a virtual machine in which nothing says what is near.
fn virtual_machine() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let file = |path: &str, text: &str| {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
    };
    let link = |at: &str, to: &str| {
        let at = folder.path().join(at);
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        symlink(format!("../../../{to}"), at).unwrap();
    };
    file("proc/sys/kernel/hostname", "vm");
    file("sys/devices/system/cpu/online", "0-3");
    for cpu in 0..4 {
        let siblings = if cpu < 2 { "0-1" } else { "2-3" };
        file(&format!("sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"), siblings);
    }
    for (slot, class, vendor) in
        [(4, "0x030200", "0x10de"), (5, "0x030200", "0x10de"), (6, "0x020000", "0x1af4")]
    {
        let dir = format!("devices/pci0000:00/0000:00:0{slot}.0");
        file(&format!("sys/{dir}/class"), class);
        file(&format!("sys/{dir}/vendor"), vendor);
        file(&format!("sys/{dir}/device"), "0x2330");
        file(&format!("sys/{dir}/numa_node"), "-1");
        link(&format!("sys/bus/pci/devices/0000:00:0{slot}.0"), &dir);
    }
    let net = "devices/pci0000:00/0000:00:06.0/net/e<b>th0";
    file(&format!("sys/{net}/operstate"), "up");
    symlink("../..", folder.path().join("sys").join(net).join("device")).unwrap();
    fs::create_dir_all(folder.path().join("sys/class/net")).unwrap();
    symlink(format!("../../{net}"), folder.path().join("sys/class/net/e<b>th0")).unwrap();
    folder
}

#[test]
fn a_copied_tree_in_which_nothing_is_near() {
    let folder = virtual_machine();
    let drawing = folder.path().join("vm.svg");
    let text = topo(folder.path(), &format!("--svg {}", drawing.display()));
    let expected = format!(
        "\
vm: 4 CPUs on 2 cores, 0 NUMA nodes, 2 GPUs, 0 RDMA devices, 1 network device
└─ host bridge pci0000:00
   ├─ GPU 0000:00:04.0
   │      NIC e<b>th0 (by order: the PCI tree says nothing; shared by 2 GPUs)
   │      rail thread on CPU 0
   ├─ GPU 0000:00:05.0
   │      NIC e<b>th0 (by order: the PCI tree says nothing; shared by 2 GPUs)
   │      rail thread on CPU 2
   └─ network: e<b>th0

the drawing is in {}
",
        drawing.display()
    );
    assert_eq!(text, expected);
    let svg = fs::read_to_string(&drawing).unwrap();
    let document = roxmltree::Document::parse(&svg).unwrap();
    assert!(document.descendants().any(|node| node.text() == Some("e<b>th0")), "a name stays text");
}

#[test]
fn this_host_has_a_title() {
    let job = Job::new();
    let text = job.run("topo").succeeds().stdout;
    job.end();
    assert!(text.lines().next().unwrap().contains("NUMA node"), "{text}");
}

#[test]
fn what_it_cannot_read_it_names() {
    let folder = folder_with("<svg/>");
    let at = folder.path().display();
    let job = Job::new();
    for (arguments, said) in [
        (format!("topo --from {at}/nowhere.xml"), "nowhere.xml: No such file"),
        (format!("topo --from {at}/dump.xml"), "dump.xml: line 1, column 1: <svg>: not the dump of a host"),
        (format!("topo --from {at}"), "name the folder that holds it"),
        (format!("topo --svg {at}/no/such.svg"), "cannot write"),
    ] {
        job.run(&arguments).fails(1, &[said]);
    }
    job.run("topo --host-ranks 0").fails(2, &["1..=4096"]);
    job.end();
}
