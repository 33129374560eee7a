//! What a rail asks libfabric for.
//!
//! Every rail needs the same: reliable datagrams, messages and one-sided access. What differs by provider is written
//! down here once. What the provider then demands is read from the info it returns, never assumed.

use std::ffi::{CString, c_char, c_void};
use std::net::IpAddr;
use std::ptr::NonNull;

use libfabric_sys as sys;

use crate::error::InfoError;
use crate::info::{Facts, Provider};

/// The fabric of EFA that has delivery-complete and fallbacks; `efa-direct` has neither and must be asked for by name.
const EFA_FABRIC: &str = "efa";

/// What to look for. [`Hints::default`] is TCP over loopback, which every machine has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hints {
    /// The provider, and no other.
    pub provider: Provider,
    /// The address to bind to. For `tcp`, `tcp;ofi_rxm` and `verbs`; `None` takes every interface.
    pub source: Option<IpAddr>,
    /// The domain's name, for example `rdmap0s6-rdm` or `eth0`; `None` takes every domain.
    pub domain: Option<String>,
    /// The fabric's name; `None` takes every fabric, save that for EFA it takes `efa`.
    pub fabric: Option<String>,
    /// Whether device memory will be registered (`FI_HMEM`). The provider then looks for GPUs.
    pub device_memory: bool,
}

impl Default for Hints {
    fn default() -> Self {
        Self::new(Provider::Tcp).source(IpAddr::from([127, 0, 0, 1]))
    }
}

impl Hints {
    /// Everything that this provider has.
    pub fn new(provider: Provider) -> Self {
        Self { provider, source: None, domain: None, fabric: None, device_memory: false }
    }

    /// Binds to this address.
    pub fn source(mut self, address: IpAddr) -> Self {
        self.source = Some(address);
        self
    }

    /// Takes only the domain of this name.
    pub fn domain(mut self, name: impl Into<String>) -> Self {
        self.domain = Some(name.into());
        self
    }

    /// Takes only the fabric of this name.
    pub fn fabric(mut self, name: impl Into<String>) -> Self {
        self.fabric = Some(name.into());
        self
    }

    /// Asks for registration of device memory.
    pub fn device_memory(mut self, wanted: bool) -> Self {
        self.device_memory = wanted;
        self
    }

    /// Whether an info is what was asked for. libfabric takes a provider's name as a prefix of a stack of providers, so
    /// `tcp` may also bring `tcp;ofi_rxm`.
    pub(crate) fn accepts(&self, facts: &Facts) -> bool {
        let fabric_fits = match (&self.fabric, self.provider) {
            (Some(fabric), _) => facts.fabric == *fabric,
            (None, Provider::Efa) => facts.fabric == EFA_FABRIC,
            (None, _) => true,
        };
        let domain_fits = self.domain.as_ref().is_none_or(|domain| facts.domain == *domain);
        facts.provider == self.provider.name() && fabric_fits && domain_fits
    }

    /// The wishes beside the provider, in words that follow "that fits".
    pub(crate) fn wish(&self) -> String {
        let mut wishes = Vec::new();
        wishes.extend(self.source.map(|address| format!("source {address}")));
        wishes.extend(self.domain.as_ref().map(|name| format!("domain '{name}'")));
        wishes.extend(self.fabric.as_ref().map(|name| format!("fabric '{name}'")));
        wishes.extend(self.device_memory.then(|| "device memory".to_owned()));
        if wishes.is_empty() { " reliable datagrams".to_owned() } else { format!(" {}", wishes.join(", ")) }
    }

    /// The memory-registration modes that rails can serve. The provider keeps those that it needs.
    fn mr_mode(&self) -> i32 {
        let host = sys::FI_MR_LOCAL | sys::FI_MR_VIRT_ADDR | sys::FI_MR_ALLOCATED | sys::FI_MR_PROV_KEY;
        if self.device_memory { host | sys::FI_MR_HMEM } else { host }
    }

    fn caps(&self) -> u64 {
        let mut caps = sys::FI_MSG | sys::FI_RMA;
        if self.provider == Provider::Efa {
            // Peers may be on this host as well as elsewhere.
            caps |= sys::FI_LOCAL_COMM | sys::FI_REMOTE_COMM;
        }
        if self.device_memory {
            caps |= sys::FI_HMEM;
        }
        caps
    }

    /// The hints as libfabric takes them.
    pub(crate) fn to_raw(&self, library: &sys::Library) -> Result<RawInfo, InfoError> {
        if self.source.is_some() && !self.provider.has_ip_addresses() {
            return Err(InfoError::Unusable { provider: self.provider, hint: "a source address" });
        }
        let domain_name = self.domain.as_deref().map(|name| c_string("domain", name)).transpose()?;
        let fabric_name = self.fabric.as_deref().map(|name| c_string("fabric", name)).transpose()?;
        let provider_name = c_string("provider", self.provider.name())?;

        // SAFETY: null asks for an empty info, with every part allocated in the library's own size.
        let info = unsafe { library.fi_dupinfo(std::ptr::null()) };
        let info =
            RawInfo { raw: NonNull::new(info).ok_or(InfoError::OutOfMemory)?, library: library.clone() };
        // SAFETY: a fresh info that nobody else has; `info` keeps it until the end of the borrow.
        let top = unsafe { &mut *info.as_ptr() };
        top.caps = self.caps();
        // Contexts are 64 bytes at stable addresses (`in_flight`), which serves both modes.
        top.mode = sys::FI_CONTEXT | sys::FI_CONTEXT2;
        // SAFETY: an empty info has its endpoint attributes allocated.
        let ep = unsafe { top.ep_attr.as_mut() }.ok_or(InfoError::OutOfMemory)?;
        ep.type_ = sys::FI_EP_RDM;
        // SAFETY: as above. Fields behind those of 1.17 are not even bound.
        let domain = unsafe { top.domain_attr.as_mut() }.ok_or(InfoError::OutOfMemory)?;
        domain.mr_mode = self.mr_mode();
        domain.threading = sys::FI_THREAD_DOMAIN;
        // SAFETY: as above.
        let fabric = unsafe { top.fabric_attr.as_mut() }.ok_or(InfoError::OutOfMemory)?;
        fabric.prov_name = c_duplicate(&provider_name)?;
        if let Some(name) = domain_name {
            domain.name = c_duplicate(&name)?;
        }
        if let Some(name) = fabric_name {
            fabric.name = c_duplicate(&name)?;
        }
        match self.source {
            Some(IpAddr::V4(address)) => {
                top.addr_format = sys::FI_SOCKADDR_IN;
                (top.src_addr, top.src_addrlen) = c_allocate(libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: 0,
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.octets()) },
                    sin_zero: [0; 8],
                })?;
            }
            Some(IpAddr::V6(address)) => {
                top.addr_format = sys::FI_SOCKADDR_IN6;
                (top.src_addr, top.src_addrlen) = c_allocate(libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: 0,
                    sin6_flowinfo: 0,
                    sin6_addr: libc::in6_addr { s6_addr: address.octets() },
                    sin6_scope_id: 0,
                })?;
            }
            None => {}
        }
        Ok(info)
    }
}

fn c_string(what: &'static str, name: &str) -> Result<CString, InfoError> {
    CString::new(name).map_err(|_| InfoError::Name { what, name: name.to_owned() })
}

/// Copies a text into memory that libfabric frees with `free`.
fn c_duplicate(text: &CString) -> Result<*mut c_char, InfoError> {
    // SAFETY: a terminated text; the copy belongs to the info that it is stored in.
    let copy = unsafe { libc::strdup(text.as_ptr()) };
    if copy.is_null() { Err(InfoError::OutOfMemory) } else { Ok(copy) }
}

/// Copies a socket address into memory that libfabric frees with `free`.
fn c_allocate<T: Copy>(value: T) -> Result<(*mut c_void, usize), InfoError> {
    // SAFETY: plain allocation.
    let room = NonNull::new(unsafe { libc::malloc(size_of::<T>()) }).ok_or(InfoError::OutOfMemory)?;
    // SAFETY: fresh room of the size of `T`, and malloc aligns for any type.
    unsafe { room.cast::<T>().write(value) };
    Ok((room.as_ptr(), size_of::<T>()))
}

/// An info of libfabric's that is ours to free.
pub(crate) struct RawInfo {
    raw: NonNull<sys::fi_info>,
    library: sys::Library,
}

impl RawInfo {
    /// Copies one info.
    ///
    /// # Safety
    ///
    /// `info` must be an info of this library.
    pub(crate) unsafe fn copy_of(library: &sys::Library, info: *const sys::fi_info) -> Option<Self> {
        // SAFETY: the caller vouches for it.
        let copy = unsafe { library.fi_dupinfo(info) };
        Some(Self { raw: NonNull::new(copy)?, library: library.clone() })
    }

    pub(crate) fn as_ptr(&self) -> *mut sys::fi_info {
        self.raw.as_ptr()
    }
}

impl Drop for RawInfo {
    fn drop(&mut self) {
        // SAFETY: made by fi_dupinfo of this library, and the only handle on it.
        unsafe { self.library.fi_freeinfo(self.raw.as_ptr()) };
    }
}
