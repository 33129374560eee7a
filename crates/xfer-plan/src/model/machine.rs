//! The machines that ranks run on, and the memory that a rank registers.

use serde::{Deserialize, Serialize};

use crate::ids::RegionIndex;
use crate::limits::RAILS_MAX;
use crate::manifest::RailDecl;

use super::error::ModelError;

/// Where pieces and parameters start: GPUs copy fastest from and to multiples of this, in bytes.
const ALIGNMENT: u64 = 256;

/// Pieces of all trainers, or parts of parameters of all receivers: 2 GiB of manifest. A Kimi-K2 on 256 GPUs has 1.2
/// million pieces.
pub(crate) const PIECES_MAX: usize = 1 << 23;

/// The one region of a rank.
pub(crate) const REGION: RegionIndex = RegionIndex(0);

/// One side's machines. The default is an AWS p5: 8 GPUs, each with 4 NICs of 100 Gb/s.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Machine {
    /// Ranks of one host, at least 1.
    pub gpus_per_host: u32,
    /// NICs of one rank, at least 1.
    pub rails_per_gpu: u32,
    /// What one NIC moves each way, in bytes a second.
    pub bytes_per_second: u64,
}

impl Default for Machine {
    fn default() -> Machine {
        Machine { gpus_per_host: 8, rails_per_gpu: 4, bytes_per_second: 12_500_000_000 }
    }
}

impl Machine {
    /// The host of a rank: `train0`, `train1`, ...
    pub(crate) fn host(&self, side: &str, rank: u64) -> Result<String, ModelError> {
        match rank.checked_div(self.gpus_per_host.into()) {
            Some(host) => Ok(format!("{side}{host}")),
            None => Err(wrong("gpus_per_host is 0: a host has at least one")),
        }
    }

    pub(crate) fn rails(&self) -> Result<Vec<RailDecl>, ModelError> {
        match usize::try_from(self.rails_per_gpu) {
            Ok(rails @ 1..=RAILS_MAX) => {
                Ok(vec![RailDecl { bytes_per_second: self.bytes_per_second }; rails])
            }
            _ => Err(wrong(&format!("rails_per_gpu must be from 1 to {RAILS_MAX}"))),
        }
    }
}

fn wrong(detail: &str) -> ModelError {
    ModelError::Job { at: "machine".to_owned(), detail: detail.to_owned() }
}

/// Lays things one after another into a region.
#[derive(Default)]
pub(crate) struct Arena {
    end: u64,
}

impl Arena {
    /// Where the next `bytes` go; `None` when the region would overflow 64 bits.
    pub(crate) fn place(&mut self, bytes: u64) -> Option<u64> {
        let offset = self.end.checked_next_multiple_of(ALIGNMENT)?;
        self.end = offset.checked_add(bytes)?;
        Some(offset)
    }

    /// The lengths of the rank's regions.
    pub(crate) fn regions(&self) -> Vec<u64> {
        vec![self.end]
    }
}
