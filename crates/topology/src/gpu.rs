//! NVIDIA GPUs as PCI knows them, whether or not a driver is loaded. No CUDA here: memory sizes and NVLink are not ours.

use serde::Serialize;

use crate::TopologyError;
use crate::pci::{PciDevice, prefixed_hex};
use crate::tree::{Malformed, Parsed, Tree};

/// NVIDIA's PCI vendor id.
pub(crate) const VENDOR_NVIDIA: u32 = 0x10de;
/// The upper byte of the class: display controllers, 3D controllers among them. NVSwitches are bridges and do not match.
pub(crate) const CLASS_DISPLAY: u32 = 0x03;

/// One NVIDIA GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Gpu {
    /// Its place on PCI.
    pub pci: PciDevice,
    /// Its name, for instance `NVIDIA H200`; known only while NVIDIA's driver is loaded.
    pub model: Option<String>,
}

pub(crate) fn read(tree: &mut Tree) -> Result<Vec<Gpu>, TopologyError> {
    let bus = tree.sys("bus/pci/devices");
    let mut gpus = Vec::new();
    for name in tree.names(&bus)? {
        let dir = bus.join(&name);
        if tree.read(&dir.join("vendor"), id) != Some(VENDOR_NVIDIA)
            || tree.read(&dir.join("class"), id).map(|class| class >> 16) != Some(CLASS_DISPLAY)
        {
            continue;
        }
        let Some(pci) = PciDevice::of(tree, &dir) else {
            continue;
        };
        let information = tree.proc(&format!("driver/nvidia/gpus/{}/information", pci.address));
        let model = tree.read(&information, |text| Ok(value_of(text, "Model:")));
        gpus.push(Gpu { pci, model });
    }
    gpus.sort_by_key(|gpu| gpu.pci.address);
    Ok(gpus)
}

pub(crate) fn driver_version(tree: &mut Tree) -> Option<String> {
    let path = tree.proc("driver/nvidia/version");
    tree.read(&path, version)
}

/// The rest of the line that starts with `key`.
fn value_of(text: &str, key: &str) -> Option<String> {
    let value = text.lines().find_map(|line| line.strip_prefix(key))?.trim();
    (!value.is_empty()).then(|| value.to_owned())
}

/// The first word of the `NVRM version:` line that is digits and dots: what stands around it differs between the open
/// and the closed driver.
fn version(text: &str) -> Parsed<String> {
    let expected = Malformed("a line \"NVRM version: ... 580.65.06 ...\"");
    let line = value_of(text, "NVRM version:").ok_or(expected)?;
    let is_version =
        |word: &&str| word.contains('.') && word.bytes().all(|c| c.is_ascii_digit() || c == b'.');
    line.split_whitespace().find(is_version).map(|word| Some(word.to_owned())).ok_or(expected)
}

fn id(text: &str) -> Parsed<u32> {
    prefixed_hex(text).map(Some).ok_or(Malformed("a hexadecimal id such as 0x10de"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_drivers_state_their_version() {
        let closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC version: 12.2.0";
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)";
        assert_eq!(version(closed), Ok(Some("535.183.01".to_owned())));
        assert_eq!(version(open), Ok(Some("580.65.06".to_owned())));
        assert!(version("GCC version: 12.2.0").is_err());
        assert!(version("NVRM version: none").is_err());
    }
}
