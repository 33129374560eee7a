//! Every bound of the planner, once, with its reason.
//!
//! A manifest is assembled from what peers sent. These limits stand far above what any real job declares and
//! far below what could exhaust memory, so that a broken or hostile peer gets an error with a name in it.

/// Dimensions of a tensor or of a device mesh. Weights have 1 to 4, meshes 1 to 5.
pub const DIMS_MAX: usize = 8;

/// Ranks on one side. The largest public training clusters have about 30 000 GPUs.
pub const RANKS_MAX: usize = 65_536;

/// Registered regions of one rank. One allocation per tensor is the worst that frameworks do.
pub const REGIONS_MAX: usize = 65_536;

/// Rails of one rank. A p5 node has 32 for all of its GPUs together.
pub const RAILS_MAX: usize = 64;

/// Source pieces, or destination parameters, of one rank. A whole Kimi-K2 has about 70 000 tensors.
pub const TENSORS_MAX: usize = 1 << 20;

/// Bytes of a tensor's, a parameter's or a host's name. Real ones stay under 200.
pub const NAME_BYTES_MAX: usize = 1_024;

/// Nesting of a parameter map: it bounds every recursion over one. Fused, sharded, padded parameters need
/// about 5.
pub const MAP_DEPTH_MAX: usize = 16;

/// Nodes of a parameter map. 384 experts, gate and up, each sliced and fused, are 1 537.
pub const MAP_NODES_MAX: usize = 65_536;

/// Upper bound for the chunk options, in bytes: the largest message that the common providers take is 1 GiB.
pub const CHUNK_BYTES_MAX: u64 = 1 << 30;

/// Lower bound for the chunk options, in bytes. Smaller chunks only multiply operations; the widest element
/// has 8.
pub const CHUNK_BYTES_MIN: u64 = 64;

/// Entries of the source index (cells and the pieces that hold them), all tensors together: 1 GiB.
/// Overlapping boxes that do not line up could otherwise cut each other into ever more cells.
pub const INDEX_ENTRIES_MAX: usize = 1 << 26;

/// Operations of one trainer's part. At 1 MiB each they move 4 TiB in one push.
pub const OPS_MAX: usize = 1 << 22;

/// Transfers of a plan: 1 GiB. Kimi-K2 from 256 to 128 GPUs has 1.3 million.
pub const TRANSFERS_MAX: usize = 1 << 24;

/// Bytes of registered memory of one rank: 16 TiB. With [`RANKS_MAX`] ranks no sum of bytes overflows 64
/// bits.
pub const RANK_BYTES_MAX: u64 = 1 << 44;

/// A chunk option is a multiple of this many bytes, so that no cut divides an element.
pub const CHUNK_BYTES_STEP: u64 = 8;
