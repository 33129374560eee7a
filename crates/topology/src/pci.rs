//! PCI addresses, and the facts of one PCI function that every kind of device shares.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use crate::numa::{self, NumaIndex};
use crate::tree::{Malformed, Parsed, Tree};

/// Where a function sits on PCI, printed as the kernel prints it: `0000:4f:00.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Domain (segment). Usually 16 bits; some host bridges use more.
    pub domain: u32,
    /// Bus number.
    pub bus: u8,
    /// Device number, 0 to 31.
    pub device: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

/// The text is not of the form `0000:4f:00.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a PCI address of the form 0000:4f:00.0")]
pub struct NotAPciAddress;

impl FromStr for PciAddress {
    type Err = NotAPciAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (domain, rest) = text.split_once(':')?;
            let (bus, rest) = rest.split_once(':')?;
            let (device, function) = rest.split_once('.')?;
            let lengths_fit =
                (4..=8).contains(&domain.len()) && bus.len() == 2 && device.len() == 2 && function.len() == 1;
            let address = Self {
                domain: hex(domain)?,
                bus: u8::try_from(hex(bus)?).ok()?,
                device: u8::try_from(hex(device)?).ok()?,
                function: u8::try_from(hex(function)?).ok()?,
            };
            (lengths_fit && address.device < 32 && address.function < 8).then_some(address)
        };
        parse().ok_or(NotAPciAddress)
    }
}

impl Serialize for PciAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A PCI host bridge, by the domain and the first bus behind it, printed as sysfs names it: `pci0000:44`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostBridge {
    /// Domain (segment).
    pub domain: u32,
    /// The first bus behind it.
    pub bus: u8,
}

impl fmt::Display for HostBridge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pci{:04x}:{:02x}", self.domain, self.bus)
    }
}

impl FromStr for HostBridge {
    type Err = NotAPciAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (domain, bus) = text.strip_prefix("pci")?.split_once(':')?;
            let lengths_fit = (4..=8).contains(&domain.len()) && bus.len() == 2;
            let found = Self { domain: hex(domain)?, bus: u8::try_from(hex(bus)?).ok()? };
            lengths_fit.then_some(found)
        };
        parse().ok_or(NotAPciAddress)
    }
}

impl Serialize for HostBridge {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A PCI vendor or device id, printed as sysfs writes it: `0x10de`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PciId(pub u16);

impl fmt::Display for PciId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#06x}", self.0)
    }
}

impl Serialize for PciId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What any device that sits on PCI has. Virtual devices have none of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PciDevice {
    /// Its address.
    pub address: PciAddress,
    /// The host bridge that it hangs from; `None` where the directories or the dump do not say.
    pub host_bridge: Option<HostBridge>,
    /// The bridges between the host bridge and it, the nearest to the host first. A PCI switch is one bridge towards
    /// the host and one for each of its ports.
    pub bridges: Vec<PciAddress>,
    /// The NUMA node that it is attached to; `None` where the kernel says -1, as in most virtual machines.
    pub numa_node: Option<NumaIndex>,
    /// PCI vendor, for instance 0x10de for NVIDIA.
    pub vendor_id: Option<PciId>,
    /// PCI device, in the vendor's own numbering.
    pub device_id: Option<PciId>,
    /// The kernel driver that is bound to it, for instance `efa`.
    pub driver: Option<String>,
}

impl PciDevice {
    /// The function that `device`, a device directory or a link to one, belongs to: itself, or the nearest directory
    /// above it that is a PCI function (a virtio NIC sits one below).
    pub(crate) fn of(tree: &mut Tree, device: &Path) -> Option<Self> {
        let real = device.canonicalize().ok()?;
        let (dir, address) =
            real.ancestors().find_map(|dir| Some((dir, dir.file_name()?.to_str()?.parse().ok()?)))?;
        let driver = dir.join("driver").canonicalize().ok();
        let (host_bridge, bridges) = above(dir);
        Some(Self {
            address,
            host_bridge,
            bridges,
            numa_node: tree.read(&dir.join("numa_node"), numa::index_or_none),
            vendor_id: tree.read(&dir.join("vendor"), id),
            device_id: tree.read(&dir.join("device"), id),
            driver: driver.and_then(|driver| Some(driver.file_name()?.to_str()?.to_owned())),
        })
    }
}

/// What the directories above a function's say: `pci0000:44/0000:44:00.0/0000:45:00.0/<the function>`.
fn above(function: &Path) -> (Option<HostBridge>, Vec<PciAddress>) {
    let names: Vec<&str> = function
        .ancestors()
        .skip(1)
        .map_while(|dir| dir.file_name().and_then(|name| name.to_str()))
        .collect();
    let mut bridges: Vec<PciAddress> = names.iter().map_while(|name| name.parse().ok()).collect();
    let host_bridge = names.get(bridges.len()).and_then(|name| name.parse().ok());
    bridges.reverse();
    (host_bridge, bridges)
}

fn hex(text: &str) -> Option<u32> {
    // `from_str_radix` alone would take a sign.
    text.bytes().all(|byte| byte.is_ascii_hexdigit()).then(|| u32::from_str_radix(text, 16).ok())?
}

/// `0x` and hexadecimal digits, as sysfs writes ids and classes.
pub(crate) fn prefixed_hex(text: &str) -> Option<u32> {
    hex(text.strip_prefix("0x")?)
}

fn id(text: &str) -> Parsed<PciId> {
    prefixed_hex(text)
        .and_then(|id| u16::try_from(id).ok())
        .map(|id| Some(PciId(id)))
        .ok_or(Malformed("a PCI id such as 0x10de"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn odd_addresses_are_refused() {
        for text in [
            "",
            "4f:00.0",
            "0000:4f:00",
            "0000:4f:20.0",
            "0000:4f:00.8",
            "0000:+f:00.0",
            "000:4f:00.0",
            "0000:4f:00.0 ",
            "0000:4g:00.0",
            "000000000:4f:00.0",
        ] {
            assert_eq!(text.parse::<PciAddress>(), Err(NotAPciAddress), "{text:?}");
        }
    }

    #[test]
    fn directories_above_a_function() {
        let above = |path: &str| {
            let (host_bridge, bridges) = above(Path::new(path));
            let bridges: Vec<String> = bridges.iter().map(PciAddress::to_string).collect();
            (host_bridge.map_or_else(String::new, |it| it.to_string()), bridges.join(" "))
        };
        let said = |host_bridge: &str, bridges: &str| (host_bridge.to_owned(), bridges.to_owned());
        let switch = "/sys/devices/pci0000:44/0000:44:00.0/0000:45:00.0/0000:53:00.0";
        assert_eq!(above(switch), said("pci0000:44", "0000:44:00.0 0000:45:00.0"));
        assert_eq!(above("/sys/devices/pci0000:00/0000:00:03.0"), said("pci0000:00", ""));
        // Behind Intel's VMD there is a second host bridge below a function.
        let vmd = "/sys/devices/pci0000:64/0000:64:00.5/pci10000:00/10000:00:02.0/10000:01:00.0";
        assert_eq!(above(vmd), said("pci10000:00", "10000:00:02.0"));
        assert_eq!(above("/sys/devices/0000:45:00.0/0000:53:00.0"), said("", "0000:45:00.0"));
        assert_eq!(above("0000:53:00.0"), said("", ""));
    }

    proptest! {
        #[test]
        fn addresses_round_trip(domain: u32, bus: u8, device in 0..32u8, function in 0..8u8) {
            let address = PciAddress { domain, bus, device, function };
            prop_assert_eq!(address.to_string().parse(), Ok(address));
            let host_bridge = HostBridge { domain, bus };
            prop_assert_eq!(host_bridge.to_string().parse(), Ok(host_bridge));
        }
    }
}
