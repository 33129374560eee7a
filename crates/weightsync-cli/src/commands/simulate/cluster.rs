//! `--cluster`: a preset by name, or a description in a file.

use std::path::Path;
use std::str::FromStr;

use xfer_plan::CostModel;
use xfer_plan::model::Machine;
use xfer_sim::{Cluster, GpuId, Preset};

use crate::commands::transfer::read_text;

/// A cluster and what it is called.
#[derive(Clone)]
pub(crate) struct NamedCluster {
    /// The preset's name, or the file's.
    pub(crate) name: String,
    cluster: Cluster,
    /// Whether its hosts and ranks follow from the job. Presets have no size of their own; a file means what it says, unless
    /// the size is what is tried.
    pub(crate) follows_job: bool,
}

impl NamedCluster {
    /// Reads what stands on the command line.
    ///
    /// # Errors
    ///
    /// In words: no such preset, no such file, a line that is wrong, or a cluster that cannot be.
    pub(crate) fn read(text: &str) -> Result<NamedCluster, String> {
        let path = Path::new(text);
        let in_words = |error: anyhow::Error| format!("{error:#}");
        let cluster: Cluster = match path.extension().and_then(|extension| extension.to_str()) {
            Some("toml") => {
                toml::from_str(&read_text(path).map_err(in_words)?).map_err(|error| error.to_string())?
            }
            Some("json") => serde_json::from_str(&read_text(path).map_err(in_words)?)
                .map_err(|error| error.to_string())?,
            _ => {
                let preset = Preset::from_str(text)
                    .map_err(|error| format!("{error}; or give a file that ends in .toml or .json"))?;
                return Ok(NamedCluster {
                    name: text.to_owned(),
                    cluster: preset.cluster(0, 0),
                    follows_job: true,
                });
            }
        };
        cluster.check().map_err(|error| error.to_string())?;
        Ok(NamedCluster { name: text.to_owned(), cluster, follows_job: false })
    }

    /// The cluster on which so many ranks run; one from a file may be for another number.
    pub(crate) fn for_ranks(&self, trainers: u32, receivers: u32) -> Cluster {
        let mut cluster = self.cluster.clone();
        if self.follows_job {
            let gpus = cluster.host.gpus.max(1);
            cluster.hosts = trainers.div_ceil(gpus).saturating_add(receivers.div_ceil(gpus)).max(1);
            (cluster.trainers, cluster.receivers) = (trainers, receivers);
        }
        cluster
    }

    /// What the planner is told of each rank's host and NICs.
    pub(crate) fn machine(&self) -> Machine {
        Machine {
            gpus_per_host: self.cluster.host.gpus,
            rails_per_gpu: u32::try_from(self.cluster.nics_of(GpuId(0)).len()).unwrap_or(u32::MAX),
            bytes_per_second: self.cluster.nic.payload_bytes_per_second(),
        }
    }

    /// The planner's cost model with what the cluster knows better.
    pub(crate) fn cost(&self, cost: CostModel) -> CostModel {
        let (gpu, nic) = (&self.cluster.host.gpu, &self.cluster.nic);
        CostModel {
            post_nanoseconds: nic.post_nanoseconds,
            nvlink_bytes_per_second: gpu.nvlink_bytes_per_second,
            hbm_bytes_per_second: gpu.hbm_bytes_per_second,
            copy_engine_bytes_per_second: gpu.copy_engine_bytes_per_second,
            latency_nanoseconds: nic.latency_nanoseconds.saturating_add(nic.completion_nanoseconds),
            ..cost
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_come_back_from_the_files_that_they_are_printed_to() {
        let folder = tempfile::tempdir().unwrap();
        for preset in Preset::ALL {
            let named = NamedCluster::read(preset.name()).unwrap();
            let cluster = named.for_ranks(17, 8);
            assert_eq!(cluster, preset.cluster(17, 8));
            let [toml, json] = ["c.toml", "c.json"].map(|name| folder.path().join(name));
            std::fs::write(&toml, toml::to_string(&cluster).unwrap()).unwrap();
            std::fs::write(&json, serde_json::to_string(&cluster).unwrap()).unwrap();
            for path in [toml, json] {
                let read = NamedCluster::read(path.to_str().unwrap()).unwrap();
                // A file means what it says.
                assert_eq!(read.for_ranks(1, 1), cluster);
                assert_eq!(read.machine(), named.machine());
            }
        }
    }
}
