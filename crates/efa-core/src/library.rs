//! The opened libfabric, and what its providers offer.

use std::path::Path;
use std::ptr;

use libfabric_sys as sys;

use crate::error::InfoError;
use crate::hints::Hints;
use crate::info::{Info, Provider};
use crate::object::call_error;

/// The first version whose `tcp` provider has reliable datagrams of its own.
const NATIVE_TCP: sys::Version = sys::Version { major: 1, minor: 18 };

/// libfabric, opened at run time. Clones share it; it stays loaded until the process ends.
#[derive(Debug, Clone)]
pub struct Library {
    sys: sys::Library,
}

impl Library {
    /// Opens `$LIBFABRIC_SO`, or else the system's libfabric, or else the one of the EFA installer.
    ///
    /// # Errors
    ///
    /// [`sys::OpenError`] lists every path that was tried, and why it did not serve.
    pub fn open() -> Result<Self, sys::OpenError> {
        Ok(Self { sys: sys::Library::open()? })
    }

    /// Opens exactly this file.
    ///
    /// # Errors
    ///
    /// [`sys::OpenError`] says why it did not serve.
    pub fn open_path(path: impl AsRef<Path>) -> Result<Self, sys::OpenError> {
        Ok(Self { sys: sys::Library::open_path(path)? })
    }

    /// The version that the library states.
    pub fn version(&self) -> sys::Version {
        self.sys.version()
    }

    /// The path that was opened, as it was given to the dynamic linker.
    pub fn path(&self) -> &Path {
        self.sys.path()
    }

    /// The provider that carries rails over plain TCP in this version: `tcp` itself from 1.18 on, `tcp;ofi_rxm` before.
    /// The two do not talk to each other, so both ends must agree on one.
    pub fn tcp_provider(&self) -> Provider {
        if self.version() >= NATIVE_TCP { Provider::Tcp } else { Provider::TcpRxm }
    }

    /// The API version that is asked for: the newest that both this crate and the library know. From 1.18 on `efa`
    /// uses the device's RDMA; asking for an older API would silently turn it off.
    pub(crate) fn api(&self) -> sys::Version {
        self.version().min(sys::Version::BOUND)
    }

    /// What the provider offers that fits the hints, in libfabric's order of preference. Never empty.
    ///
    /// # Errors
    ///
    /// [`InfoError::NoProvider`] when nothing fits, and what to try then; other variants for unusable hints.
    pub fn infos(&self, hints: &Hints) -> Result<Vec<Info>, InfoError> {
        let raw_hints = hints.to_raw(&self.sys)?;
        let mut list = ptr::null_mut();
        // SAFETY: the hints are an info of this library that `RawInfo` keeps until the end of this function.
        let code = unsafe { self.sys.fi_getinfo(self.api(), raw_hints.as_ptr(), &raw mut list) };
        if code != 0 && code != -sys::FI_ENODATA {
            return Err(call_error(&self.sys, "fi_getinfo", hints.provider.name(), code).into());
        }
        let mut infos = Vec::new();
        let mut next = list;
        while !next.is_null() {
            // SAFETY: a non-null member of the list that fi_getinfo made, which is freed only below.
            match unsafe { Info::copy_of(self, hints.provider, next) } {
                Some(info) if hints.accepts(info.facts()) => infos.push(info),
                Some(_) => {}
                None => {
                    tracing::warn!("libfabric listed an info without all of its parts; it is passed over")
                }
            }
            // SAFETY: as above.
            next = unsafe { (*next).next };
        }
        if !list.is_null() {
            // SAFETY: the list is ours and every member has been copied.
            unsafe { self.sys.fi_freeinfo(list) };
        }
        if infos.is_empty() {
            return Err(InfoError::NoProvider {
                provider: hints.provider,
                version: self.version(),
                path: self.path().display().to_string(),
                wish: hints.wish(),
                advice: self.advice(hints.provider),
            });
        }
        Ok(infos)
    }

    fn advice(&self, provider: Provider) -> &'static str {
        match provider {
            Provider::Tcp if self.version() < NATIVE_TCP => {
                "before 1.18 plain TCP needs 'tcp;ofi_rxm' at both ends: ask Library::tcp_provider"
            }
            Provider::Tcp | Provider::TcpRxm | Provider::Shm => {
                "check the address and the interface name, and that this libfabric was built with the provider"
            }
            Provider::Efa => {
                "check that this host has an EFA device and that this libfabric was built with it (AWS installs one \
                 under /opt/amazon/efa)"
            }
            Provider::Verbs => {
                "check that this host has an active InfiniBand or RoCE port with an IP address, and that this libfabric \
                 was built with verbs"
            }
        }
    }

    pub(crate) fn sys(&self) -> &sys::Library {
        &self.sys
    }
}
