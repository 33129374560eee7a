//! The header of one safetensors file.
//!
//! A file may be cut short, damaged or written by something broken: everything that the header says is checked against
//! the dtype's width, against its neighbours and against the file's length before anything is read by it, and every
//! error names the file and the tensor. It must never allocate by a number that the file gives without a bound.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};
use xfer_plan::DType;

use super::CheckpointError;

/// Longest header, as in the format's own library: 70 000 tensors need about 10 MB.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// Bytes before the header: its length.
const LENGTH_BYTES: u64 = 8;

/// One tensor of a file, checked.
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: DType,
    pub(super) shape: Vec<u64>,
    /// From the start of the file.
    pub(super) offset: u64,
}

/// Reads and checks the header of the safetensors file at `path`.
pub(super) fn read(file: &File, path: &Path) -> Result<Vec<Entry>, CheckpointError> {
    let io = |source| CheckpointError::Io { path: path.into(), source };
    let file_bytes = file.metadata().map_err(io)?.len();
    let too_short = || CheckpointError::NoHeader { path: path.into(), file_bytes };
    if file_bytes < LENGTH_BYTES {
        return Err(too_short());
    }
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact_at(&mut length, 0).map_err(io)?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > HEADER_BYTES_MAX {
        return Err(CheckpointError::HeaderTooLong {
            path: path.into(),
            header_bytes,
            max: HEADER_BYTES_MAX,
        });
    }
    let data_offset = LENGTH_BYTES + header_bytes;
    if data_offset > file_bytes {
        return Err(too_short());
    }
    let mut json = vec![0; header_bytes as usize];
    file.read_exact_at(&mut json, LENGTH_BYTES).map_err(io)?;
    let header: Header = serde_json::from_slice(&json)
        .map_err(|source| CheckpointError::Header { path: path.into(), source })?;
    entries(header, path, data_offset, file_bytes)
}

/// Checks that the tensors tile the data part of the file: no overlap, no hole, no missing end.
fn entries(
    header: Header,
    path: &Path,
    data_offset: u64,
    file_bytes: u64,
) -> Result<Vec<Entry>, CheckpointError> {
    let mut claims: Vec<(String, Claim)> = header.0.into_iter().collect();
    claims.sort_by_key(|(_, claim)| claim.data_offsets);

    let mut entries = Vec::with_capacity(claims.len());
    let mut end = 0u64;
    let mut previous = String::new();
    for (tensor, claim) in claims {
        let path = || path.to_path_buf();
        let Some(dtype) = supported(claim.dtype) else {
            return Err(CheckpointError::UnsupportedDtype { path: path(), tensor, dtype: claim.dtype });
        };
        let (first, last) = claim.data_offsets;
        let needs = claim.shape.iter().try_fold(dtype.bytes(), |bytes, &size| bytes.checked_mul(size));
        if needs.is_none() || last.checked_sub(first) != needs {
            let shape = claim.shape;
            return Err(CheckpointError::WrongSize { path: path(), tensor, dtype, shape, first, last });
        }
        if first < end {
            return Err(CheckpointError::Overlap { path: path(), tensor, previous });
        }
        if first > end {
            return Err(CheckpointError::Hole { path: path(), tensor, hole_bytes: first - end });
        }
        let file_end = data_offset.saturating_add(last);
        if file_end > file_bytes {
            return Err(CheckpointError::Truncated { path: path(), tensor, needs: file_end, file_bytes });
        }
        end = last;
        previous.clone_from(&tensor);
        entries.push(Entry { name: tensor, dtype, shape: claim.shape, offset: data_offset + first });
    }
    match file_bytes - data_offset - end {
        0 => Ok(entries),
        extra_bytes => Err(CheckpointError::Trailing { path: path.into(), extra_bytes }),
    }
}

fn supported(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::BOOL => DType::Bool,
        Dtype::U8 => DType::U8,
        Dtype::I8 => DType::I8,
        Dtype::F8_E4M3 => DType::F8E4M3,
        Dtype::F8_E5M2 => DType::F8E5M2,
        Dtype::I16 => DType::I16,
        Dtype::U16 => DType::U16,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::I32 => DType::I32,
        Dtype::U32 => DType::U32,
        Dtype::F32 => DType::F32,
        Dtype::I64 => DType::I64,
        Dtype::U64 => DType::U64,
        Dtype::F64 => DType::F64,
        _ => return None,
    })
}

/// What the header says of one tensor, unchecked. The format's own type for this has `usize` and keeps no names in its
/// errors; its dtypes are the ones that we read by.
#[derive(Deserialize)]
struct Claim {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header's tensors. Reads entry by entry, so that an error names the tensor, and a name that comes twice is one.
struct Header(BTreeMap<String, Claim>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Header, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with an entry for each tensor")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut tensors = BTreeMap::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let claim = map
                .next_value::<Claim>()
                .map_err(|error| A::Error::custom(format_args!("tensor `{name}`: {error}")))?;
            if tensors.contains_key(&name) {
                return Err(A::Error::custom(format_args!("tensor `{name}` comes twice")));
            }
            tensors.insert(name, claim);
        }
        Ok(Header(tensors))
    }
}
