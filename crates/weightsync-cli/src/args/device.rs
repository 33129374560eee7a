//! `--device`: where a rank's weights are.

use std::str::FromStr;

use weightsync::Device;

/// cpu, a GPU by its number, or `cuda`: the GPU that is a rank's by its place on its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeviceArg {
    Cuda,
    Exactly(Device),
}

impl DeviceArg {
    /// Of the rank with this number on its host, counted from 0: where there are more ranks than GPUs, they share them.
    pub(crate) fn of_local_rank(self, number: u32) -> anyhow::Result<Device> {
        match self {
            Self::Exactly(device) => Ok(device),
            Self::Cuda => Ok(Device::Cuda(number % Device::cuda_count()?.max(1))),
        }
    }
}

impl FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "cuda" { Ok(Self::Cuda) } else { text.parse().map(Self::Exactly) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_is_named_or_dealt() {
        assert_eq!("cuda".parse(), Ok(DeviceArg::Cuda));
        assert_eq!("cuda:3".parse(), Ok(DeviceArg::Exactly(Device::Cuda(3))));
        assert_eq!(DeviceArg::Exactly(Device::Cuda(3)).of_local_rank(1).unwrap(), Device::Cuda(3));
        assert_eq!(DeviceArg::Exactly(Device::Cpu).of_local_rank(1).unwrap(), Device::Cpu);
        assert!("gpu".parse::<DeviceArg>().unwrap_err().contains("cuda:N"));
    }
}
