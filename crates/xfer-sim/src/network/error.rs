//! Why a network refuses a call.

use crate::cluster::ClusterError;

use super::links::{Link, Way};

/// A call that makes no sense on this cluster. Nothing has changed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the messages say it
pub enum NetworkError {
    #[error("the cluster cannot be simulated: {0}")]
    Cluster(#[from] ClusterError),
    #[error("a tolerance of {tolerance} is not from 0 (exact) to 0.5")]
    Tolerance { tolerance: f64 },
    #[error("the cluster has no way {way:?}; NICs and GPUs are numbered from 0, and NVLink ends at the host")]
    NoSuchWay { way: Way },
    #[error("the cluster has no {link:?}; NICs, GPUs and racks are numbered from 0")]
    NoSuchLink { link: Link },
}
