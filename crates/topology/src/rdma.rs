//! RDMA devices and their ports, from `class/infiniband`. EFA, InfiniBand, RoCE and software devices are all there.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::TopologyError;
use crate::pci::{PciDevice, PciId};
use crate::tree::{Malformed, Parsed, Tree};

/// Amazon's PCI vendor id.
const VENDOR_AMAZON: PciId = PciId(0x1d0f);
/// EFA's device ids are 0xefa0 and up; ENA has the same vendor.
const DEVICE_EFA_MASK: u16 = 0xfff0;
const DEVICE_EFA: u16 = 0xefa0;
/// Mellanox, now NVIDIA networking.
const VENDOR_MELLANOX: PciId = PciId(0x15b3);

/// Which family of RDMA hardware, as far as it decides what we do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum RdmaKind {
    /// AWS Elastic Fabric Adapter.
    Efa,
    /// NVIDIA (Mellanox) ConnectX or BlueField.
    Mellanox,
    /// Anything else, software devices included.
    Other,
}

/// A port's logical state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum PortState {
    /// No link.
    Down,
    /// Link, not yet configured by a subnet manager.
    Init,
    /// Configured, not yet in use.
    Armed,
    /// In use.
    Active,
    /// Active, and the link is being lost.
    Deferred,
}

/// One RDMA device.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RdmaDevice {
    /// Its name, which libfabric uses as the domain's: `mlx5_0`, `rdmap79s0`.
    pub name: String,
    /// Its family.
    pub kind: RdmaKind,
    /// Its place on PCI; `None` for a software device.
    pub pci: Option<PciDevice>,
    /// Version of its driver's module, where the module states one.
    pub driver_version: Option<String>,
    /// Its ports, by number.
    pub ports: Vec<RdmaPort>,
    /// Network devices of the same hardware, by name; EFA has none.
    pub net_devices: Vec<String>,
}

/// One port of an RDMA device.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RdmaPort {
    /// Its number, from 1.
    pub number: u32,
    /// Its state.
    pub state: Option<PortState>,
    /// What it signals at, in gigabits (10^9) a second; payload gets less. While a port is not active this may be a
    /// placeholder of the driver.
    pub gigabits_per_second: Option<f64>,
    /// `InfiniBand`, `Ethernet`, or `Unknown` for EFA.
    pub link_layer: Option<String>,
}

pub(crate) fn read(tree: &mut Tree) -> Result<Vec<RdmaDevice>, TopologyError> {
    let class = tree.sys("class/infiniband");
    let mut devices = Vec::new();
    for name in tree.names(&class)? {
        let dir = class.join(&name);
        // A link to nowhere is a device that has just left.
        if !dir.is_dir() {
            continue;
        }
        let pci = PciDevice::of(tree, &dir.join("device"));
        let mut net_devices: BTreeSet<String> = tree.names(&dir.join("device/net"))?.into_iter().collect();
        // Software devices name the network device that they run on.
        net_devices.extend(tree.text(&dir.join("parent")));
        let mut ports = Vec::new();
        for number in tree.names(&dir.join("ports"))? {
            let port = dir.join("ports").join(&number);
            let Ok(number) = number.parse() else { continue };
            ports.push(RdmaPort {
                number,
                state: tree.read(&port.join("state"), port_state),
                gigabits_per_second: tree.read(&port.join("rate"), port_rate),
                link_layer: tree.text(&port.join("link_layer")),
            });
        }
        devices.push(RdmaDevice {
            kind: kind(pci.as_ref()),
            driver_version: tree.text(&dir.join("device/driver/module/version")),
            ports,
            net_devices: net_devices.into_iter().collect(),
            name,
            pci,
        });
    }
    Ok(devices)
}

/// A device of a dump, which does not tell more.
pub(crate) fn of_dump(name: String, pci: Option<PciDevice>, ports: Vec<RdmaPort>) -> RdmaDevice {
    RdmaDevice { kind: kind(pci.as_ref()), driver_version: None, net_devices: Vec::new(), name, pci, ports }
}

/// By driver, and by id where no driver is bound or it has another name.
pub(crate) fn kind(pci: Option<&PciDevice>) -> RdmaKind {
    let Some(pci) = pci else { return RdmaKind::Other };
    let efa_id = pci.vendor_id == Some(VENDOR_AMAZON)
        && pci.device_id.is_some_and(|PciId(id)| id & DEVICE_EFA_MASK == DEVICE_EFA);
    match pci.driver.as_deref() {
        Some("efa") => RdmaKind::Efa,
        Some("mlx4_core" | "mlx5_core") => RdmaKind::Mellanox,
        _ if efa_id => RdmaKind::Efa,
        _ if pci.vendor_id == Some(VENDOR_MELLANOX) => RdmaKind::Mellanox,
        _ => RdmaKind::Other,
    }
}

/// `4: ACTIVE`.
fn port_state(text: &str) -> Parsed<PortState> {
    let state = match text.split(':').next() {
        Some("0") => return Ok(None),
        Some("1") => PortState::Down,
        Some("2") => PortState::Init,
        Some("3") => PortState::Armed,
        Some("4") => PortState::Active,
        Some("5") => PortState::Deferred,
        _ => return Err(Malformed("a port state such as \"4: ACTIVE\"")),
    };
    Ok(Some(state))
}

/// `100 Gb/sec (4X EDR)`, `2.5 Gb/sec (1X SDR)`.
fn port_rate(text: &str) -> Parsed<f64> {
    let rate = text.split_once(" Gb/sec").and_then(|(rate, _)| rate.parse::<f64>().ok());
    match rate {
        Some(rate) if rate.is_finite() && rate > 0.0 => Ok(Some(rate)),
        Some(0.0) => Ok(None),
        _ => Err(Malformed("a rate such as \"100 Gb/sec (4X EDR)\"")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_gigabits_and_never_zero() {
        assert_eq!(port_rate("400 Gb/sec (4X NDR)"), Ok(Some(400.0)));
        assert_eq!(port_rate("2.5 Gb/sec (1X SDR)"), Ok(Some(2.5)));
        assert_eq!(port_rate("0 Gb/sec"), Ok(None));
        for text in ["", "fast", "-1 Gb/sec", "NaN Gb/sec", "inf Gb/sec", "100 Mb/sec"] {
            assert!(port_rate(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn states_follow_the_number() {
        assert_eq!(port_state("4: ACTIVE"), Ok(Some(PortState::Active)));
        assert_eq!(port_state("1: DOWN"), Ok(Some(PortState::Down)));
        assert_eq!(port_state("0: NOP"), Ok(None));
        assert!(port_state("ACTIVE").is_err());
        assert!(port_state("").is_err());
    }
}
