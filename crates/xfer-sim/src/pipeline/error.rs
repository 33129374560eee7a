//! Why a pipeline cannot be simulated, by the name of what is wrong.

use crate::cluster::ClusterError;
use crate::network::NetworkError;

/// A configuration that cannot be.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the messages say it
pub enum PipelineError {
    #[error("the cluster cannot be simulated: {0}")]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(
        "a GPU's NICs are taken as one: give each GPU as many of its own, without host.gpu_nics, not {nics} for {gpus}"
    )]
    UnevenNics { nics: u32, gpus: u32 },
    #[error("tasks_in_flight is 0, so no rank may begin; give at least 1")]
    NothingInFlight,
    #[error("mesh group {group} names trainer {trainer}, but the cluster has {trainers}")]
    NoSuchTrainer { group: usize, trainer: u32, trainers: u32 },
    #[error("mesh group {group} has trainer {trainer} twice; each is in one mesh at most")]
    TrainerTwice { group: usize, trainer: u32 },
    #[error("mesh {mesh} of group {group} has no trainers, or not equally many on each of its hosts")]
    UnevenMesh { group: usize, mesh: usize },
    #[error(
        "round {round} of mesh {mesh} of group {group} has {tasks} tasks for {trainers} trainers; give one each"
    )]
    WrongTasks { group: usize, mesh: usize, round: usize, tasks: usize, trainers: usize },
    #[error("mesh {mesh} of group {group} writes to receiver {receiver}, but the cluster has {receivers}")]
    NoSuchReceiver { group: usize, mesh: usize, receiver: u32, receivers: u32 },
}
