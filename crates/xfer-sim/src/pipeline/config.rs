//! What is simulated: which ranks gather what together, and who writes it to whom. Checked before anything runs.
//!
//! It must never hold a time that follows from the cluster: bytes and counts only, and what no cluster states.

use serde::{Deserialize, Serialize};

use super::error::PipelineError;
use super::mesh::Members;
use crate::cluster::{Cluster, Host, Nic};

/// A run of the pipeline. [`PipelineConfig::published`] is the one that is known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PipelineConfig {
    /// Where it runs.
    pub cluster: Cluster,
    /// One after another: a group begins when all ranks have made their last gather of the one before.
    pub groups: Vec<MeshGroup>,
    /// Tasks that a rank may hold at a time, at least 1: from the beginning of the copy until the last WRITE is complete.
    pub tasks_in_flight: u32,
    /// What submitting one WRITE costs the rank's thread, in nanoseconds.
    pub submit_nanoseconds: u64,
    /// See [`Network::new`](crate::Network::new).
    pub tolerance: f64,
    /// Of all chance.
    pub seed: u64,
}

/// Meshes that work at the same time, with no trainer in two of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeshGroup {
    /// The meshes.
    pub meshes: Vec<Mesh>,
}

/// Trainers that share tensors: each holds an equal part of every one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mesh {
    /// The trainers, equally many on each host that has any.
    pub trainers: Vec<u32>,
    /// What they do, in order.
    pub rounds: Vec<Round>,
}

/// Tensors that are gathered back to back, and a task for each trainer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Round {
    /// Tensors, each of which is gathered by a collective of its own.
    pub collectives: u32,
    /// All tensors together, in bytes.
    pub bytes: u64,
    /// What each trainer sends of them, in the order of [`Mesh::trainers`].
    pub tasks: Vec<Task>,
}

/// What one trainer does with what was gathered. Everything at zero is nothing to do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Task {
    /// Memory that joining tensors reads and writes, in bytes.
    pub fuse_bytes: u64,
    /// Memory that quantising reads and writes, in bytes.
    pub quantise_bytes: u64,
    /// Written to each receiver, in bytes.
    pub write_bytes: u64,
    /// The receivers: a WRITE to each.
    pub receivers: Vec<u32>,
}

impl PipelineConfig {
    /// Whether it can be simulated, but for the tolerance, which the network checks.
    ///
    /// # Errors
    /// The first thing that is wrong, by name.
    pub(super) fn check(&self) -> Result<(), PipelineError> {
        self.cluster.check()?;
        self.striped_cluster()?;
        if self.tasks_in_flight == 0 {
            return Err(PipelineError::NothingInFlight);
        }
        for (group, MeshGroup { meshes }) in self.groups.iter().enumerate() {
            let mut seen = vec![false; self.cluster.trainers as usize];
            for (mesh, Mesh { trainers, rounds }) in meshes.iter().enumerate() {
                for &trainer in trainers {
                    let all = self.cluster.trainers;
                    let slot = seen.get_mut(trainer as usize);
                    let slot = slot.ok_or(PipelineError::NoSuchTrainer { group, trainer, trainers: all })?;
                    if core::mem::replace(slot, true) {
                        return Err(PipelineError::TrainerTwice { group, trainer });
                    }
                }
                if Members::of(trainers, self.cluster.host.gpus).is_none() {
                    return Err(PipelineError::UnevenMesh { group, mesh });
                }
                for (round, Round { tasks, .. }) in rounds.iter().enumerate() {
                    if tasks.len() != trainers.len() {
                        let (tasks, trainers) = (tasks.len(), trainers.len());
                        return Err(PipelineError::WrongTasks { group, mesh, round, tasks, trainers });
                    }
                    let receivers = self.cluster.receivers;
                    let mut named = tasks.iter().flat_map(|task| &task.receivers);
                    if let Some(&receiver) = named.find(|receiver| **receiver >= receivers) {
                        return Err(PipelineError::NoSuchReceiver { group, mesh, receiver, receivers });
                    }
                }
            }
        }
        Ok(())
    }

    /// The same cluster with one NIC a GPU, as fast as all that it has.
    pub(super) fn striped_cluster(&self) -> Result<Cluster, PipelineError> {
        let Host { gpus, nics, .. } = self.cluster.host;
        if self.cluster.host.gpu_nics.is_some() || !nics.is_multiple_of(gpus) {
            return Err(PipelineError::UnevenNics { nics, gpus });
        }
        let each = u64::from(nics / gpus);
        let nic = &self.cluster.nic;
        Ok(Cluster {
            host: Host { nics: gpus, ..self.cluster.host.clone() },
            nic: Nic {
                bytes_per_second: nic.bytes_per_second.saturating_mul(each),
                message_nanoseconds: nic.message_nanoseconds / each,
                ..*nic
            },
            ..self.cluster.clone()
        })
    }
}
