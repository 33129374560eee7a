//! Which NICs rails can run over. A NIC that is left out is always named, with the reason.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::pci::PciDevice;
use crate::rdma::{PortState, RdmaDevice};
use crate::{NetDevice, Snapshot};

/// Something about a pairing that a person should know.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Note {
    /// The NIC is not used: it has no link.
    NoLink {
        /// Its name.
        nic: String,
    },
    /// The NIC is not used: chunks are spread evenly over the NICs of a GPU, so that a slow one would hold up the others.
    Slower {
        /// Its name.
        nic: String,
        /// Its rate, in gigabits (10^9) a second.
        gigabits_per_second: f64,
        /// The rate of the NICs that are used.
        used_gigabits_per_second: f64,
    },
    /// Nothing says which CPUs share a core: each is taken for a core of its own.
    SiblingsUnknown,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoLink { nic } => write!(f, "{nic} is left out: none of its ports is active"),
            Self::Slower { nic, gigabits_per_second: slow, used_gigabits_per_second: used } => {
                write!(f, "{nic} is left out: it runs at {slow} Gb/s, and the others at {used} Gb/s")
            }
            Self::SiblingsUnknown => f.write_str(
                "SMT siblings are unknown: each CPU is taken for a core of its own, so two threads may share a core",
            ),
        }
    }
}

impl Serialize for Note {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A NIC that rails can run over.
pub(crate) struct Nic<'a> {
    pub(crate) name: &'a str,
    pub(crate) pci: &'a PciDevice,
    has_link: Option<bool>,
    gigabits_per_second: Option<f64>,
}

/// RDMA devices with hardware behind them; plain network devices only on a host that has no such device at all. Of
/// those the ones with a link, and of those the fastest; what is unknown about a NIC does not count against it.
pub(crate) fn usable(snapshot: &Snapshot) -> (Vec<Nic<'_>>, Vec<Note>) {
    let mut nics: Vec<Nic<'_>> = snapshot.rdma_devices.iter().filter_map(rdma).collect();
    if nics.is_empty() {
        nics = snapshot.net_devices.iter().filter_map(net).collect();
    }
    let mut notes = Vec::new();
    nics.retain(|nic| {
        let no_link = nic.has_link == Some(false);
        if no_link {
            notes.push(Note::NoLink { nic: nic.name.to_owned() });
        }
        !no_link
    });
    let fastest = nics.iter().filter_map(|nic| nic.gigabits_per_second).fold(0.0, f64::max);
    nics.retain(|nic| match nic.gigabits_per_second {
        Some(rate) if rate < fastest => {
            notes.push(Note::Slower {
                nic: nic.name.to_owned(),
                gigabits_per_second: rate,
                used_gigabits_per_second: fastest,
            });
            false
        }
        _ => true,
    });
    (nics, notes)
}

fn rdma(device: &RdmaDevice) -> Option<Nic<'_>> {
    let active = |state: PortState| state == PortState::Active;
    let states: Vec<bool> = device.ports.iter().filter_map(|port| port.state).map(active).collect();
    let rates = device.ports.iter().filter_map(|port| port.gigabits_per_second);
    Some(Nic {
        name: &device.name,
        pci: device.pci.as_ref()?,
        has_link: (!states.is_empty() && states.len() == device.ports.len()).then(|| states.contains(&true)),
        gigabits_per_second: rates.reduce(f64::max),
    })
}

fn net(device: &NetDevice) -> Option<Nic<'_>> {
    Some(Nic {
        name: &device.name,
        pci: device.pci.as_ref()?,
        has_link: device.operstate.as_ref().map(|_| device.is_up()),
        gigabits_per_second: device.megabits_per_second.map(|rate| rate as f64 / 1000.0),
    })
}
