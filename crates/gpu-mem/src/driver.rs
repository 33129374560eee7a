//! Opening CUDA's driver, and what it shows.
//!
//! [`Cuda`] is the proof that the driver was opened and has started. A program without a driver gets an error that says
//! so, and goes on; this module must never end the process.

use std::ffi::c_int;
use std::fmt;

use cudarc::driver::sys;

use crate::call::{Failure, cu, opened_driver};
use crate::device::Device;
use crate::error::Error;

/// A CUDA version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// The part before the point.
    pub major: u32,
    /// The part behind the point.
    pub minor: u32,
}

impl Version {
    /// The oldest driver that serves: its memory can be exported as dma-bufs (11.7), and its symbols are those of the
    /// CUDA 12 bindings.
    pub const OLDEST: Self = Self { major: 12, minor: 0 };

    /// Unpacks CUDA's form: 1000 times the major part and 10 times the minor.
    pub(crate) fn from_packed(packed: c_int) -> Self {
        let packed = u32::try_from(packed).unwrap_or(0);
        Self { major: packed / 1000, minor: packed % 1000 / 10 }
    }

    fn check(self) -> Result<Self, Error> {
        if self < Self::OLDEST {
            return Err(Error::DriverTooOld { found: self, needed: Self::OLDEST });
        }
        Ok(self)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// CUDA's driver, opened and started. It is one for the process; the handle is free to copy.
#[derive(Debug, Clone, Copy)]
pub struct Cuda {
    version: Version,
}

impl Cuda {
    /// Opens the driver.
    ///
    /// # Errors
    ///
    /// [`Error::NoDriver`], [`Error::DriverTooOld`], or what the driver says when it starts: most often that there is no
    /// device.
    pub fn open() -> Result<Self, Error> {
        if let Err(tried) = opened_driver() {
            return Err(Error::NoDriver { tried: tried.clone() });
        }
        let version = driver_version()?.check()?;
        // SAFETY: may be called any number of times, from any thread.
        unsafe { cu!(cuInit(0)) }.map_err(|failure| Error::new(failure, "the driver"))?;
        Ok(Self { version })
    }

    /// The newest CUDA version that the driver serves.
    pub fn driver_version(&self) -> Version {
        self.version
    }

    /// How many devices the driver shows to this process.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when the driver does not answer.
    pub fn device_count(&self) -> Result<u32, Error> {
        let mut count = 0;
        // SAFETY: the driver has started; it writes one integer.
        unsafe { cu!(cuDeviceGetCount(&raw mut count)) }
            .map_err(|failure| Error::new(failure, "the driver"))?;
        Ok(u32::try_from(count).unwrap_or(0))
    }

    /// Opens a device by its number, from 0.
    ///
    /// # Errors
    ///
    /// [`Error::NoDevice`] for a number that the driver does not show; [`Error::Call`] when its context cannot be made.
    pub fn device(&self, index: u32) -> Result<Device, Error> {
        let count = self.device_count()?;
        match c_int::try_from(index) {
            Ok(ordinal) if index < count => Device::open(ordinal),
            _ => Err(Error::NoDevice { index, count }),
        }
    }

    /// Opens every device.
    ///
    /// # Errors
    ///
    /// As [`Cuda::device`].
    pub fn devices(&self) -> Result<Vec<Device>, Error> {
        (0..self.device_count()?).map(|index| self.device(index)).collect()
    }
}

/// The newest CUDA version that the driver serves.
pub(crate) fn driver_version() -> Result<Version, Error> {
    let mut packed = 0;
    // SAFETY: the one call that may come before `cuInit`; it writes one integer.
    unsafe { cu!(cuDriverGetVersion(&raw mut packed)) }
        .map_err(|failure| Error::new(failure, "the driver"))?;
    Ok(Version::from_packed(packed))
}

/// What a failed clean-up says, for the log.
pub(crate) fn told(failure: Failure) -> String {
    Error::new(failure, "the driver").to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn versions_compare_as_their_packed_forms(a in 0..99_999_i32, b in 0..99_999_i32) {
            let (x, y) = (Version::from_packed(a), Version::from_packed(b));
            prop_assert_eq!(x.cmp(&y), (a / 10).cmp(&(b / 10)));
            prop_assert_eq!(x.check().is_ok(), a >= 12_000);
        }
    }

    #[test]
    fn an_old_driver_is_named_with_what_is_needed() {
        let error = Version::from_packed(11_040).check().unwrap_err().to_string();
        assert!(error.contains("11.4") && error.contains("12.0") && error.contains("update"), "{error}");
    }
}
