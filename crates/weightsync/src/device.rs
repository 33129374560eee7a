//! Where a rank's weights are, in PyTorch's words.

use std::fmt;
use std::str::FromStr;

use gpu_mem::Cuda;

use crate::error::Error;

/// See the module.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Device {
    /// Host memory.
    #[default]
    Cpu,
    /// Memory of the GPU that CUDA shows this process under this number.
    Cuda(u32),
}

impl Device {
    /// How many GPUs CUDA shows this process.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`] without a driver, or with one that is too old or does not start.
    pub fn cuda_count() -> Result<u32, Error> {
        Ok(Cuda::open()?.device_count()?)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let index = |index: &str| index.parse().map(Self::Cuda).ok();
        let found = match name {
            "cpu" => Some(Self::Cpu),
            "cuda" => Some(Self::Cuda(0)),
            _ => name.strip_prefix("cuda:").and_then(index),
        };
        found.ok_or_else(|| format!("unknown device '{name}'; choose cpu, cuda or cuda:N"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_pytorch() {
        for (name, device) in [("cpu", Device::Cpu), ("cuda:0", Device::Cuda(0)), ("cuda:7", Device::Cuda(7))]
        {
            assert_eq!((name.parse(), device.to_string().as_str()), (Ok(device), name));
        }
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        for wrong in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU"] {
            assert!(wrong.parse::<Device>().unwrap_err().contains("cuda:N"), "{wrong}");
        }
    }
}
