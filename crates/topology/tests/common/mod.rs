//! Made-up machines: trees in a temporary folder, with the links that the kernel makes.
#![allow(dead_code, unreachable_pub)] // each test uses a part

pub mod dumps;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use topology::{Roots, Snapshot, TopologyError};

/// A tree below a temporary folder.
pub struct Machine {
    pub dir: tempfile::TempDir,
}

impl Machine {
    pub fn empty() -> Self {
        let machine = Self { dir: tempfile::tempdir().unwrap() };
        fs::create_dir_all(machine.dir.path().join("sys")).unwrap();
        fs::create_dir_all(machine.dir.path().join("proc")).unwrap();
        machine
    }

    pub fn file(&self, path: &str, text: &str) {
        let path = self.dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        // The kernel ends every attribute with a newline.
        fs::write(path, format!("{text}\n")).unwrap();
    }

    /// A relative link, as in sysfs, so that a copied tree still holds together.
    pub fn link(&self, at: &str, to: &str) {
        let at_path = self.dir.path().join(at);
        fs::create_dir_all(at_path.parent().unwrap()).unwrap();
        let up: PathBuf = Path::new(at).parent().unwrap().components().map(|_| "..").collect();
        symlink(up.join(to), at_path).unwrap();
    }

    pub fn host(&self, name: &str, cpus: &str, memory_kib: u64, locked: &str) {
        self.file("proc/sys/kernel/hostname", name);
        self.file("proc/sys/kernel/osrelease", "6.8.0-1021-aws");
        self.file("proc/meminfo", &format!("MemTotal: {memory_kib} kB\nMemAvailable: {} kB", memory_kib / 2));
        self.file("proc/self/status", &format!("Name:\tinfo\nCpus_allowed_list:\t{cpus}"));
        self.file("proc/self/limits", &format!("Limit\nMax locked memory {locked} unlimited bytes"));
        self.file("sys/devices/system/cpu/online", cpus);
    }

    pub fn numa(&self, index: u32, cpus: &str, memory_kib: u64) {
        let dir = format!("sys/devices/system/node/node{index}");
        self.file(&format!("{dir}/cpulist"), cpus);
        self.file(&format!("{dir}/meminfo"), &format!("Node {index} MemTotal: {memory_kib} kB"));
    }

    /// A function below one bridge; gives its directory.
    pub fn pci(&self, address: &str, ids: (&str, &str, &str), numa: &str, driver: Option<&str>) -> String {
        self.pci_below("pci0000:00/0000:00:01.0", address, ids, numa, driver)
    }

    /// A function below the directories that `above` names.
    pub fn pci_below(
        &self,
        above: &str,
        address: &str,
        ids: (&str, &str, &str),
        numa: &str,
        driver: Option<&str>,
    ) -> String {
        let (class, vendor, device) = ids;
        let dir = Path::new("sys/devices").join(above).join(address).display().to_string();
        self.file(&format!("{dir}/class"), class);
        self.file(&format!("{dir}/vendor"), vendor);
        self.file(&format!("{dir}/device"), device);
        self.file(&format!("{dir}/numa_node"), numa);
        if let Some(driver) = driver {
            let driver_dir = format!("sys/bus/pci/drivers/{driver}");
            fs::create_dir_all(self.dir.path().join(&driver_dir)).unwrap();
            self.link(&format!("{dir}/driver"), &driver_dir);
        }
        self.link(&format!("sys/bus/pci/devices/{address}"), &dir);
        dir
    }

    pub fn gpu(&self, address: &str, numa: &str) {
        self.pci(address, ("0x030200", "0x10de", "0x2330"), numa, Some("nvidia"));
        let model = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 150";
        self.file(&format!("proc/driver/nvidia/gpus/{address}/information"), model);
    }

    pub fn nvidia_driver(&self, version: &str) {
        let line =
            format!("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release Build");
        self.file("proc/driver/nvidia/version", &line);
    }

    /// An RDMA device with one port on an existing function.
    pub fn rdma(&self, name: &str, pci_dir: &str, state: &str, rate: &str, link_layer: &str) {
        let dir = format!("{pci_dir}/infiniband/{name}");
        self.file(&format!("{dir}/ports/1/state"), state);
        self.file(&format!("{dir}/ports/1/rate"), rate);
        self.file(&format!("{dir}/ports/1/link_layer"), link_layer);
        self.link(&format!("{dir}/device"), pci_dir);
        self.link(&format!("sys/class/infiniband/{name}"), &dir);
    }

    /// A network device on an existing device directory, or a virtual one.
    pub fn net(&self, name: &str, device_dir: Option<&str>, operstate: &str, speed: Option<&str>, mtu: &str) {
        let dir = format!("{}/net/{name}", device_dir.unwrap_or("sys/devices/virtual"));
        self.file(&format!("{dir}/operstate"), operstate);
        self.file(&format!("{dir}/mtu"), mtu);
        if let Some(speed) = speed {
            self.file(&format!("{dir}/speed"), speed);
        }
        if let Some(device_dir) = device_dir {
            self.link(&format!("{dir}/device"), device_dir);
        }
        self.link(&format!("sys/class/net/{name}"), &dir);
    }

    /// Cores of two CPUs, `i` and `i + cores`, for all `cores`.
    pub fn smt_cores(&self, cores: u32) {
        for cpu in 0..2 * cores {
            let first = cpu % cores;
            let siblings = format!("{first},{}", first + cores);
            self.file(&format!("sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"), &siblings);
        }
    }

    pub fn read(&self) -> Result<Snapshot, TopologyError> {
        Snapshot::read(&Roots::below(self.dir.path()))
    }
}
