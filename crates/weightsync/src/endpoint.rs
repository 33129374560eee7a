//! How a rank describes itself to its peers: where it is, its rail, and its regions with their keys.
//!
//! Travels as opaque bytes through the controller. What comes from a peer is bounded by the control plane and checked
//! here before it is used.

use efa_core::{RailAddress, RemoteRegion};
use serde::{Deserialize, Serialize};
use xfer_exec::local::{DoormanAddress, KEY_BYTES};

use crate::fabric::{FabricError, OpenRail};

/// Regions of one rank. A rank of ours has one; 4096 leave room for arenas per allocator segment.
const REGIONS_MAX: usize = 4096;

/// Rails of one rank: a p5 host has 32 NICs, and one rank may take them all.
pub(crate) const RAILS_MAX: usize = 64;

/// See the module.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Endpoint {
    /// [`crate::fabric::host_identity`].
    pub(crate) host: String,
    /// Its libfabric rails.
    pub(crate) rails: Vec<RailEndpoint>,
    /// Its shared memory.
    pub(crate) local: Option<LocalEndpoint>,
    /// Its regions are two arenas, the one that it does not serve first: versions are written to them in turns.
    pub(crate) stages: bool,
}

#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct RailEndpoint {
    /// libfabric's provider; both ends must have the same.
    pub(crate) provider: String,
    /// The endpoint's address.
    pub(crate) address: RailAddress,
    /// What may be written to, by region index. Empty for a trainer.
    pub(crate) regions: Vec<RemoteRegion>,
    /// Where warm-ups go.
    pub(crate) scratch: Option<RemoteRegion>,
}

#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct LocalEndpoint {
    name: String,
    key: [u8; KEY_BYTES],
    pub(crate) memory: LocalMemory,
    /// Bytes of each region.
    pub(crate) region_bytes: Vec<u64>,
}

/// Where regions are that peers of the same host can open.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum LocalMemory {
    Host,
    Device,
}

impl RailEndpoint {
    /// Of a rank that exposes nothing.
    pub(crate) fn of_trainer(opened: &OpenRail) -> Self {
        Self {
            provider: opened.provider.to_string(),
            address: opened.rail.address().clone(),
            regions: Vec::new(),
            scratch: None,
        }
    }
}

impl LocalEndpoint {
    pub(crate) fn new(address: &DoormanAddress, memory: LocalMemory, region_bytes: Vec<u64>) -> Self {
        Self { name: address.name.clone(), key: address.key, memory, region_bytes }
    }

    pub(crate) fn doorman(&self) -> DoormanAddress {
        DoormanAddress { name: self.name.clone(), key: self.key }
    }
}

impl Endpoint {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, FabricError> {
        let failed = |error: postcard::Error| FabricError::Rail(format!("this rank's endpoint: {error}"));
        postcard::to_extend(self, Vec::new()).map_err(failed)
    }

    /// Decodes what `peer` sent.
    pub(crate) fn decode(peer: &str, bytes: &[u8]) -> Result<Self, FabricError> {
        let malformed = |reason: String| FabricError::Endpoint { peer: peer.to_owned(), reason };
        let endpoint: Self = postcard::from_bytes(bytes).map_err(|error| malformed(error.to_string()))?;
        if endpoint.rails.len() > RAILS_MAX {
            return Err(malformed(format!("{} rails, more than {RAILS_MAX}", endpoint.rails.len())));
        }
        let regions = endpoint.rails.iter().map(|rail| rail.regions.len()).max().unwrap_or(0);
        let files = endpoint.local.as_ref().map_or(0, |local| local.region_bytes.len());
        if regions.max(files) > REGIONS_MAX {
            return Err(malformed(format!("{} regions, more than {REGIONS_MAX}", regions.max(files))));
        }
        Ok(endpoint)
    }

    /// What it offers, for a message.
    pub(crate) fn offers(&self) -> String {
        let rail = self.rails.first().map(|rail| rail.provider.clone());
        let local = self.local.as_ref().map(|local| match local.memory {
            LocalMemory::Host => "shared memory".to_owned(),
            LocalMemory::Device => "GPU memory".to_owned(),
        });
        let offers: Vec<String> = rail.into_iter().chain(local).collect();
        if offers.is_empty() { "nothing".into() } else { offers.join(" and ") }
    }
}
