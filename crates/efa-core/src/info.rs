//! What a provider offers, and what it demands.

use std::ffi::{CStr, c_char};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use libfabric_sys as sys;

use crate::hints::RawInfo;
use crate::library::Library;

/// The providers that rails are used with. Each is taken as asked; none stands in for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Provider {
    /// TCP sockets, with reliable datagrams of the provider's own (libfabric 1.18 and newer).
    Tcp,
    /// TCP sockets under libfabric's message layer: what versions before 1.18 have.
    TcpRxm,
    /// Shared memory of one host. For tests only: a bad key reports success, and a killed peer hangs its writers.
    Shm,
    /// AWS Elastic Fabric Adapter.
    Efa,
    /// InfiniBand and RoCE, under libfabric's message layer.
    Verbs,
}

impl Provider {
    /// Every provider.
    pub const ALL: [Self; 5] = [Self::Tcp, Self::TcpRxm, Self::Shm, Self::Efa, Self::Verbs];

    /// libfabric's name for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::TcpRxm => "tcp;ofi_rxm",
            Self::Shm => "shm",
            Self::Efa => "efa",
            Self::Verbs => "verbs;ofi_rxm",
        }
    }

    /// Whether its endpoints are named by IP addresses.
    pub(crate) const fn has_ip_addresses(self) -> bool {
        matches!(self, Self::Tcp | Self::TcpRxm | Self::Verbs)
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Not the name of a provider.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a provider: use tcp, tcp;ofi_rxm, shm, efa or verbs")]
pub struct ParseProviderError(String);

impl FromStr for Provider {
    type Err = ParseProviderError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|provider| provider.name() == name);
        found.or((name == "verbs").then_some(Self::Verbs)).ok_or_else(|| ParseProviderError(name.to_owned()))
    }
}

/// What an info says, read once.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Facts {
    /// libfabric's name of the provider.
    pub provider: String,
    /// The fabric: what can reach each other.
    pub fabric: String,
    /// The domain: one NIC or interface.
    pub domain: String,
    /// The largest operation, in bytes.
    pub message_bytes_max: usize,
    /// Up to this many bytes a provider may copy at post time.
    pub inject_bytes_max: usize,
    /// Writes, reads and sends that can be in flight.
    pub transmit_depth: usize,
    /// Receives that can be posted.
    pub receive_depth: usize,
    /// The length of an immediate that a write can carry, in bytes.
    pub immediate_bytes: usize,
    /// The length of a region key, in bytes.
    pub key_bytes: usize,
    /// The NIC's speed, in bits per second, where the provider knows it.
    pub link_bits_per_second: Option<u64>,
    /// The NIC's PCI address, for example `0000:00:06.0`, where the provider knows it.
    pub pci_address: Option<String>,
    /// Local buffers must be registered too.
    pub needs_local_registration: bool,
    /// Remote addresses are the owner's virtual addresses, not offsets.
    pub uses_virtual_addresses: bool,
    /// The provider chooses the keys.
    pub chooses_keys: bool,
    /// Device memory can be registered: it was asked for, and the provider can.
    pub reaches_device_memory: bool,
}

/// One thing that a provider offers, to open a [`Rail`](crate::Rail) on. Clones share it.
#[derive(Clone)]
pub struct Info(Arc<Inner>);

struct Inner {
    library: Library,
    provider: Provider,
    raw: RawInfo,
    facts: Facts,
}

// SAFETY: the raw info is plain memory from the C allocator, tied to no thread.
unsafe impl Send for Inner {}
// SAFETY: nothing writes to the raw info after it was made: rails open on copies of their own.
unsafe impl Sync for Inner {}

impl Info {
    /// Copies a member of a list of infos; `None` when it lacks a part that every info has.
    ///
    /// # Safety
    ///
    /// `info` must be an info of this library.
    pub(crate) unsafe fn copy_of(
        library: &Library,
        provider: Provider,
        info: *const sys::fi_info,
    ) -> Option<Self> {
        // SAFETY: the caller vouches for it.
        let raw = unsafe { RawInfo::copy_of(library.sys(), info) }?;
        // SAFETY: a copy that libfabric made just now.
        let facts = unsafe { read_facts(raw.as_ptr()) }?;
        Some(Self(Arc::new(Inner { library: library.clone(), provider, raw, facts })))
    }

    /// The library that offers it.
    pub fn library(&self) -> &Library {
        &self.0.library
    }

    /// The provider that was asked for.
    pub fn provider(&self) -> Provider {
        self.0.provider
    }

    /// What it says.
    pub fn facts(&self) -> &Facts {
        &self.0.facts
    }

    /// A copy of the raw info, for calls that take it writable.
    pub(crate) fn to_raw(&self) -> Option<RawInfo> {
        // SAFETY: our own info of this library.
        unsafe { RawInfo::copy_of(self.0.library.sys(), self.0.raw.as_ptr()) }
    }
}

impl fmt::Debug for Info {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.facts.fmt(f)
    }
}

impl fmt::Display for Info {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let facts = &self.0.facts;
        write!(f, "{} on {} (fabric {}", facts.provider, facts.domain, facts.fabric)?;
        if let Some(speed) = facts.link_bits_per_second {
            write!(f, ", {:.0} Gb/s", speed as f64 / 1e9)?;
        }
        if let Some(address) = &facts.pci_address {
            write!(f, ", PCI {address}")?;
        }
        write!(f, ", depth {}/{}", facts.transmit_depth, facts.receive_depth)?;
        for (demand, name) in [
            (facts.needs_local_registration, "local registration"),
            (facts.uses_virtual_addresses, "virtual addresses"),
            (facts.chooses_keys, "provider keys"),
        ] {
            if demand {
                write!(f, ", {name}")?;
            }
        }
        f.write_str(")")
    }
}

/// Reads an info.
///
/// # Safety
///
/// `info` must be a live info of libfabric's, with live parts or null in their place.
unsafe fn read_facts(info: *const sys::fi_info) -> Option<Facts> {
    // SAFETY: the caller vouches for it.
    let info = unsafe { info.as_ref() }?;
    // SAFETY: a live part of a live info, or null.
    let fabric = unsafe { info.fabric_attr.as_ref() }?;
    // SAFETY: as above; only fields that 1.17 has are bound.
    let domain = unsafe { info.domain_attr.as_ref() }?;
    // SAFETY: as above.
    let ep = unsafe { info.ep_attr.as_ref() }?;
    // SAFETY: as above.
    let tx = unsafe { info.tx_attr.as_ref() }?;
    // SAFETY: as above.
    let rx = unsafe { info.rx_attr.as_ref() }?;
    // SAFETY: as above; not every provider has one.
    let nic = unsafe { info.nic.as_ref() };
    // SAFETY: as above.
    let link = nic.and_then(|nic| unsafe { nic.link_attr.as_ref() });
    // SAFETY: as above.
    let bus = nic.and_then(|nic| unsafe { nic.bus_attr.as_ref() });
    let pci = bus.filter(|bus| bus.bus_type == sys::FI_BUS_PCI).map(|bus| bus.pci);
    Some(Facts {
        // SAFETY: a terminated text of a live info, or null.
        provider: unsafe { text(fabric.prov_name) },
        // SAFETY: as above.
        fabric: unsafe { text(fabric.name) },
        // SAFETY: as above.
        domain: unsafe { text(domain.name) },
        message_bytes_max: ep.max_msg_size,
        inject_bytes_max: tx.inject_size,
        transmit_depth: tx.size,
        receive_depth: rx.size,
        immediate_bytes: domain.cq_data_size,
        key_bytes: domain.mr_key_size,
        link_bits_per_second: link.map(|link| link.speed as u64).filter(|speed| *speed > 0),
        pci_address: pci.map(|pci| {
            format!("{:04x}:{:02x}:{:02x}.{:x}", pci.domain_id, pci.bus_id, pci.device_id, pci.function_id)
        }),
        needs_local_registration: domain.mr_mode & sys::FI_MR_LOCAL != 0,
        uses_virtual_addresses: domain.mr_mode & sys::FI_MR_VIRT_ADDR != 0,
        chooses_keys: domain.mr_mode & sys::FI_MR_PROV_KEY != 0,
        reaches_device_memory: info.caps & sys::FI_HMEM != 0,
    })
}

/// Copies a C text; empty for null.
///
/// # Safety
///
/// `text` must be null or point to a terminated text.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: not null, and the caller vouches for the terminator.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
