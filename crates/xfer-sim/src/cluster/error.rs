//! What is wrong with a description, by the name of its field.

/// A cluster that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the messages say it
pub enum ClusterError {
    #[error("{field} is 0; it must be at least 1")]
    Zero { field: &'static str },
    #[error("{field} is {value}; this model takes up to {max}")]
    TooLarge { field: &'static str, value: u64, max: u64 },
    #[error(
        "hosts is {hosts}, but {trainers} trainers and {receivers} receivers need {needed} hosts of {gpus} GPUs"
    )]
    TooFewHosts { hosts: u32, trainers: u32, receivers: u32, needed: u64, gpus: u32 },
    #[error(
        "host.gpu_nics lists {listed} GPUs, but host.gpus is {gpus}; list the NICs of each GPU, or leave it out"
    )]
    WrongGpuCount { listed: usize, gpus: u32 },
    #[error("host.gpu_nics gives GPU {gpu} no NIC; each needs at least one")]
    NoNic { gpu: usize },
    #[error("host.gpu_nics gives GPU {gpu} NIC {nic}, but host.nics is {nics}; they are numbered from 0")]
    NoSuchNic { gpu: usize, nic: u32, nics: u32 },
    #[error("host.gpu_nics gives GPU {gpu} NIC {nic} twice")]
    NicTwice { gpu: usize, nic: u32 },
}
