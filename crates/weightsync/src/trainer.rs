//! The training side: declare what this rank owns, connect, then push version after version.
//!
//! What a trainer declares is here; [`session`] pushes, [`joining`] gets it to where it can, at the start and after every loss.

use efa_core::LeaseMut;
use xfer_plan::{DType, RegionIndex, SourcePiece, TensorBox};

use crate::config::SessionConfig;
use crate::error::Error;

mod joining;
mod session;

pub use session::TrainerSession;

/// A tensor, or a rank's box of it, as it is declared.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpec {
    /// The tensor's name, the same on every rank.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its global shape.
    pub shape: Vec<u64>,
    /// The box of it that this rank owns, stored row-major and without gaps.
    pub bounds: TensorBox,
}

impl TensorSpec {
    /// A tensor that this rank owns whole.
    ///
    /// # Errors
    ///
    /// [`Error::Declaration`] for a shape of more dimensions than a plan takes.
    pub fn whole(name: impl Into<String>, dtype: DType, shape: &[u64]) -> Result<Self, Error> {
        let name = name.into();
        match TensorBox::whole(shape) {
            Ok(bounds) => Ok(Self { name, dtype, shape: shape.to_vec(), bounds }),
            Err(error) => Err(Error::Declaration { name, reason: error.to_string() }),
        }
    }

    /// This rank's bytes of it.
    pub fn bytes(&self) -> Result<u64, Error> {
        let bytes = self.bounds.volume().and_then(|volume| volume.checked_mul(self.dtype.bytes()));
        bytes.ok_or_else(|| Error::Declaration {
            name: self.name.clone(),
            reason: format!("the box {} of {} has more bytes than 2^64", self.bounds, self.dtype),
        })
    }
}

/// A declared tensor of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorId(usize);

#[derive(Debug, Clone)]
struct Tensor {
    name: String,
    region: RegionIndex,
    offset: usize,
    len: usize,
}

/// A trainer that has not joined yet.
pub struct Trainer {
    config: SessionConfig,
    regions: Vec<LeaseMut>,
    tensors: Vec<Tensor>,
    pieces: Vec<SourcePiece>,
}

impl Trainer {
    /// A trainer that owns nothing yet.
    pub fn new(config: SessionConfig) -> Self {
        Self { config, regions: Vec::new(), tensors: Vec::new(), pieces: Vec::new() }
    }

    /// Takes over memory that tensors are in: one registration, however many tensors.
    pub fn add_memory(&mut self, memory: LeaseMut) -> RegionIndex {
        self.regions.push(memory);
        RegionIndex((self.regions.len() - 1) as u32)
    }

    /// Declares a tensor at `offset_bytes` of a region of [`Trainer::add_memory`].
    pub fn register_at(
        &mut self,
        spec: TensorSpec,
        region: RegionIndex,
        offset_bytes: u64,
    ) -> Result<TensorId, Error> {
        let bytes = spec.bytes()?;
        let len = self.regions.get(region.index()).map_or(0, LeaseMut::len) as u64;
        if offset_bytes.checked_add(bytes).is_none_or(|end| end > len) {
            let reason = format!("{bytes} bytes at {offset_bytes} do not fit in {region} of {len} bytes");
            return Err(Error::Declaration { name: spec.name, reason });
        }
        let TensorSpec { name, dtype, shape, bounds } = spec;
        self.tensors.push(Tensor {
            name: name.clone(),
            region,
            offset: offset_bytes as usize,
            len: bytes as usize,
        });
        self.pieces.push(SourcePiece { tensor: name, dtype, shape, bounds, region, offset: offset_bytes });
        Ok(TensorId(self.tensors.len() - 1))
    }

    /// Declares a tensor with memory of its own, which it must fill.
    pub fn register(&mut self, spec: TensorSpec, memory: LeaseMut) -> Result<TensorId, Error> {
        let bytes = spec.bytes()?;
        if memory.len() as u64 != bytes {
            let reason = format!("its box has {bytes} bytes, but the memory has {}", memory.len());
            return Err(Error::Declaration { name: spec.name, reason });
        }
        let region = self.add_memory(memory);
        self.register_at(spec, region, 0)
    }

    /// Declares many tensors in one fresh, zeroed region; the ids are in the order of `specs`.
    pub fn allocate(&mut self, specs: Vec<TensorSpec>) -> Result<Vec<TensorId>, Error> {
        let mut offsets = Vec::with_capacity(specs.len());
        let mut end = 0_u64;
        for spec in &specs {
            let too_long =
                || Error::Declaration { name: spec.name.clone(), reason: "the arena exceeds 2^64".into() };
            let start = end.checked_next_multiple_of(crate::ALIGN_BYTES).ok_or_else(too_long)?;
            end = start.checked_add(spec.bytes()?).ok_or_else(too_long)?;
            offsets.push(start);
        }
        let memory = |reason: String| Error::Memory { what: "weights", reason };
        let bytes = usize::try_from(end).map_err(|error| memory(error.to_string()))?;
        let region = self.add_memory(LeaseMut::zeroed(bytes).map_err(|error| memory(error.to_string()))?);
        specs.into_iter().zip(offsets).map(|(spec, offset)| self.register_at(spec, region, offset)).collect()
    }

    /// A tensor's bytes, to fill before connecting.
    pub fn tensor_mut(&mut self, id: TensorId) -> Option<&mut [u8]> {
        let tensor = self.tensors.get(id.0)?;
        self.regions
            .get_mut(tensor.region.index())?
            .bytes_mut()
            .get_mut(tensor.offset..tensor.offset + tensor.len)
    }

    /// Joins the job: exchanges manifests, takes this rank's part of the plan, connects and warms the rails, and
    /// returns when every rank has done so.
    ///
    /// # Errors
    ///
    /// Whatever keeps this rank, or any other, from being ready within the deadline, by name.
    pub async fn connect(self) -> Result<TrainerSession, Error> {
        let mut session = TrainerSession::new(self)?;
        session.ready().await?;
        Ok(session)
    }
}
