//! Plain network devices, from `class/net`: what sockets and the `tcp` provider run over.

use serde::Serialize;

use crate::TopologyError;
use crate::pci::PciDevice;
use crate::tree::{Malformed, Parsed, Tree, number};

/// One network device of this network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct NetDevice {
    /// Its name, `eth0`.
    pub name: String,
    /// RFC 2863's state as the kernel writes it: `up`, `down`, `unknown`, `lowerlayerdown`, `dormant`, ...
    pub operstate: Option<String>,
    /// Its link speed in megabits (10^6) a second; `None` where the driver does not say, as most virtual ones.
    pub megabits_per_second: Option<u64>,
    /// The largest packet that it sends.
    pub mtu_bytes: Option<u64>,
    /// Its place on PCI; `None` for `lo`, bridges, veth and the like.
    pub pci: Option<PciDevice>,
}

impl NetDevice {
    /// Whether packets can pass. Drivers without a link state of their own say `unknown`, which counts as up.
    pub fn is_up(&self) -> bool {
        matches!(self.operstate.as_deref(), Some("up" | "unknown"))
    }
}

pub(crate) fn read(tree: &mut Tree) -> Result<Vec<NetDevice>, TopologyError> {
    let class = tree.sys("class/net");
    let mut devices = Vec::new();
    for name in tree.names(&class)? {
        let dir = class.join(&name);
        // `bonding_masters` is a plain file beside the devices; a link to nowhere is a device that has just left.
        if !dir.is_dir() {
            continue;
        }
        devices.push(NetDevice {
            operstate: tree.text(&dir.join("operstate")),
            megabits_per_second: tree.read(&dir.join("speed"), speed),
            mtu_bytes: tree.read(&dir.join("mtu"), number),
            pci: PciDevice::of(tree, &dir.join("device")),
            name,
        });
    }
    Ok(devices)
}

/// -1, or the same as an unsigned number, is ethtool's "unknown"; some virtual drivers write 0 for it.
fn speed(text: &str) -> Parsed<u64> {
    match text.parse::<i64>() {
        Ok(-1 | 0) => Ok(None),
        Ok(speed) if speed == i64::from(u32::MAX) => Ok(None),
        Ok(speed) => u64::try_from(speed).map(Some).map_err(|_| Malformed("a speed in Mb/s or -1")),
        Err(_) => Err(Malformed("a speed in Mb/s or -1")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_speed_is_not_zero() {
        assert_eq!(speed("100000"), Ok(Some(100_000)));
        assert_eq!(speed("-1"), Ok(None));
        assert_eq!(speed("0"), Ok(None));
        assert_eq!(speed("4294967295"), Ok(None));
        assert!(speed("-2").is_err());
        assert!(speed("fast").is_err());
    }
}
