//! Device meshes and placements: how PyTorch's DTensor says which rank owns which part of a tensor.

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::error::LayoutError;
use crate::limits::{DIMS_MAX, RANKS_MAX};
use crate::tensor_box::{Dims, TensorBox, volume};

/// An n-d grid of ranks, numbered row-major: the last dimension varies fastest.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<u64>", into = "Vec<u64>")]
pub struct DeviceMesh {
    shape: Vec<u64>,
}

impl DeviceMesh {
    /// A mesh of the given shape, for example `[2, 4]` for two replicas of four shards.
    ///
    /// # Errors
    /// When a dimension is zero, or there are more than [`DIMS_MAX`] of them or more than [`RANKS_MAX`]
    /// ranks.
    pub fn new(shape: &[u64]) -> Result<DeviceMesh, LayoutError> {
        if shape.len() > DIMS_MAX {
            return Err(LayoutError::TooManyDims { max: DIMS_MAX });
        }
        match volume(shape.iter().copied()) {
            Some(ranks) if (1..=RANKS_MAX as u64).contains(&ranks) => {
                Ok(DeviceMesh { shape: shape.to_vec() })
            }
            _ => Err(LayoutError::BadMesh { shape: shape.to_vec() }),
        }
    }

    /// Ranks per dimension.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// Number of ranks.
    pub fn ranks(&self) -> u64 {
        self.shape.iter().product() // at most RANKS_MAX, checked by `new`
    }

    /// The place of a rank in the grid; `None` when the mesh has no such rank.
    pub fn coordinates(&self, rank_in_mesh: u64) -> Option<Dims> {
        if rank_in_mesh >= self.ranks() {
            return None;
        }
        let mut rest = rank_in_mesh;
        let mut coordinates: Dims = SmallVec::from_elem(0, self.shape.len());
        for (coordinate, &ranks) in coordinates.iter_mut().zip(&self.shape).rev() {
            *coordinate = rest % ranks;
            rest /= ranks;
        }
        Some(coordinates)
    }
}

impl TryFrom<Vec<u64>> for DeviceMesh {
    type Error = LayoutError;

    fn try_from(shape: Vec<u64>) -> Result<DeviceMesh, LayoutError> {
        DeviceMesh::new(&shape)
    }
}

impl From<DeviceMesh> for Vec<u64> {
    fn from(mesh: DeviceMesh) -> Vec<u64> {
        mesh.shape
    }
}

/// What one mesh dimension does to a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Placement {
    /// Cuts this tensor dimension into one shard per rank along the mesh dimension.
    Shard(usize),
    /// As `Shard(dim)`, but after the later mesh dimensions have cut the same tensor dimension into `split` shards: what
    /// FSDP does to a tensor that tensor parallelism has cut already. DTensor's `_StridedShard`.
    StridedShard {
        /// The tensor dimension.
        dim: usize,
        /// DTensor's `split_factor`: how many shards the later mesh dimensions make of `dim`.
        split: u64,
    },
    /// Every rank along the mesh dimension holds the same.
    Replicate,
}

impl Placement {
    /// The tensor dimension that it cuts.
    fn dim(self) -> Option<usize> {
        match self {
            Placement::Shard(dim) | Placement::StridedShard { dim, .. } => Some(dim),
            Placement::Replicate => None,
        }
    }
}

/// The part of a tensor of `shape` that `rank_in_mesh` owns, as DTensor lays it out.
///
/// `placements` has one entry per mesh dimension, applied in order: two that shard the same tensor dimension
/// cut it twice, the second one within the shard of the first. Strided shards come after all others, the last one
/// first. Shards have `torch.chunk`'s sizes: `ceil(len / ranks)`, the last ones shorter or empty.
///
/// ```
/// use xfer_plan::{DeviceMesh, Placement, shard_box};
/// let mesh = DeviceMesh::new(&[2, 4])?;
/// let owned = shard_box(&[10, 16], &mesh, &[Placement::Replicate, Placement::Shard(0)], 7)?;
/// assert_eq!(owned.to_string(), "[9..10, 0..16]");
/// # Ok::<(), xfer_plan::LayoutError>(())
/// ```
///
/// # Errors
/// When the rank is not in the mesh, the number of placements differs from the mesh's dimensions, a
/// placement names a dimension that the tensor lacks, or a strided shard's `split` is not what the later mesh
/// dimensions make (a rank would then hold rows that lie apart).
pub fn shard_box(
    shape: &[u64],
    mesh: &DeviceMesh,
    placements: &[Placement],
    rank_in_mesh: u64,
) -> Result<TensorBox, LayoutError> {
    if placements.len() != mesh.shape().len() {
        return Err(LayoutError::RankMismatch { expected: mesh.shape().len(), found: placements.len() });
    }
    let coordinates =
        mesh.coordinates(rank_in_mesh).ok_or(LayoutError::NotInMesh { rank_in_mesh, ranks: mesh.ranks() })?;
    let mut owned = TensorBox::whole(shape)?;
    let mut cut = |dim: usize, mesh_dim: usize| {
        let rank = owned.rank();
        let (start, len) = owned.extent(dim).ok_or(LayoutError::NoSuchDim { dim, rank })?;
        let (offset, len) = chunk(len, mesh.shape()[mesh_dim], coordinates[mesh_dim]);
        owned = owned.with_dim(dim, start + offset, len)?;
        Ok(())
    };
    for (mesh_dim, placement) in placements.iter().enumerate() {
        if let Placement::Shard(dim) = *placement {
            cut(dim, mesh_dim)?;
        }
    }
    for (mesh_dim, placement) in placements.iter().enumerate().rev() {
        if let Placement::StridedShard { dim, split } = *placement {
            let later = placements.iter().zip(mesh.shape()).skip(mesh_dim + 1);
            let made: u64 =
                later.filter(|(other, _)| other.dim() == Some(dim)).map(|(_, &ranks)| ranks).product();
            if split != made {
                return Err(LayoutError::BadSplit { dim, split, made });
            }
            cut(dim, mesh_dim)?;
        }
    }
    Ok(owned)
}

/// Offset and length of chunk `index` of `chunks`, sized as `torch.chunk` sizes them. `chunks` is at least 1.
pub(crate) fn chunk(len: u64, chunks: u64, index: u64) -> (u64, u64) {
    let full = len.div_ceil(chunks);
    let start = full.saturating_mul(index).min(len);
    let end = start.saturating_add(full).min(len);
    (start, end - start)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boxes(shape: &[u64], mesh: &[u64], placements: &[Placement]) -> Vec<String> {
        let mesh = DeviceMesh::new(mesh).unwrap();
        (0..mesh.ranks()).map(|rank| shard_box(shape, &mesh, placements, rank).unwrap().to_string()).collect()
    }

    #[test]
    fn chunks_are_torch_chunks() {
        // torch.chunk(torch.arange(5), 4) has sizes 2, 2, 1; DTensor gives rank 3 an empty shard.
        assert_eq!(boxes(&[5], &[4], &[Placement::Shard(0)]), ["[0..2]", "[2..4]", "[4..5]", "[5..5]"]);
    }

    #[test]
    fn mesh_dimensions_apply_in_order() {
        use Placement::{Replicate, Shard};
        assert_eq!(boxes(&[8], &[2, 2], &[Shard(0), Shard(0)]), ["[0..2]", "[2..4]", "[4..6]", "[6..8]"]);
        assert_eq!(
            boxes(&[4, 6], &[2, 2], &[Shard(1), Shard(0)]),
            ["[0..2, 0..3]", "[2..4, 0..3]", "[0..2, 3..6]", "[2..4, 3..6]"]
        );
        assert_eq!(boxes(&[4], &[2, 2], &[Replicate, Shard(0)]), ["[0..2]", "[2..4]", "[0..2]", "[2..4]"]);
        assert_eq!(boxes(&[], &[2], &[Replicate]), ["[]", "[]"]);
        assert_eq!(boxes(&[0, 3], &[2], &[Shard(0)]), ["[0..0, 0..3]", "[0..0, 0..3]"]);
    }

    #[test]
    fn fsdp_cuts_what_tensor_parallelism_has_cut() {
        use Placement::{Shard, StridedShard};
        let strided = [StridedShard { dim: 0, split: 2 }, Shard(0)];
        // Mesh [fsdp 2, tp 2]: tp halves 0..4 and 4..8 first, then fsdp halves each.
        assert_eq!(boxes(&[8], &[2, 2], &strided), ["[0..2]", "[4..6]", "[2..4]", "[6..8]"]);
        // Uneven: tp makes 3 and 2 rows of 5, fsdp 2 + 1 and 1 + 1 of those.
        assert_eq!(boxes(&[5], &[2, 2], &strided), ["[0..2]", "[3..4]", "[2..3]", "[4..5]"]);
        let mesh = DeviceMesh::new(&[2, 2]).unwrap();
        let wrong = [StridedShard { dim: 0, split: 4 }, Shard(0)];
        assert!(shard_box(&[8], &mesh, &wrong, 0).unwrap_err().to_string().contains("split"));
    }

    #[test]
    fn mistakes_are_named() {
        let mesh = DeviceMesh::new(&[2]).unwrap();
        let error = |shape: &[u64], placements: &[Placement], rank| {
            shard_box(shape, &mesh, placements, rank).unwrap_err().to_string()
        };
        assert!(error(&[4], &[Placement::Shard(1)], 0).contains("dimension 1"));
        assert!(error(&[4], &[], 0).contains("1 dimension"));
        assert!(error(&[4], &[Placement::Replicate], 2).contains("rank 2"));
        assert!(DeviceMesh::new(&[2, 0]).is_err());
        assert!(DeviceMesh::new(&[1 << 40, 1 << 40]).is_err());
        assert!(DeviceMesh::new(&[1; 9]).is_err());
        assert!(serde_json::from_str::<DeviceMesh>("[3, 0]").is_err());
    }
}
