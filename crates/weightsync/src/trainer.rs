//! The training side: declare what this rank owns, connect, then push version after version.
//!
//! What a trainer declares is here; [`session`] pushes, [`joining`] gets it to where it can, at the start and after every loss.

use std::sync::Arc;

use efa_core::LeaseMut;
use weight_ops::cuda::DeviceRange;
use xfer_plan::{DType, Rank, RegionIndex, SourcePiece, TensorBox, TrainerRank};

use crate::config::SessionConfig;
use crate::device::Device;
use crate::error::Error;
use crate::gpu::Gpu;
use crate::memory::Weights;

mod holder;
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
    weights: Weights,
    /// Whether they are in page-locked host memory, and leave by way of the GPU.
    offloaded: bool,
    /// Opened when the first memory is allocated on it, or at last to connect.
    gpu: Option<Arc<Gpu>>,
    tensors: Vec<Tensor>,
    pieces: Vec<SourcePiece>,
}

impl Trainer {
    /// A trainer that owns nothing yet.
    pub fn new(config: SessionConfig) -> Self {
        let weights = Weights::on(config.device);
        Self { config, weights, offloaded: false, gpu: None, tensors: Vec::new(), pieces: Vec::new() }
    }

    /// A trainer whose weights are offloaded: they are in page-locked host memory, which [`Trainer::allocate`] takes, and a push
    /// brings them to the GPU ([`SessionConfig::device`]) by and by, casts and quantises them there, and writes them from there. It
    /// takes as much of the GPU's memory as the watermark, and where it quantises two more places of at most 128 MiB.
    ///
    /// # Errors
    ///
    /// [`Error::Declaration`] where there is no GPU to go by: the device is the CPU, or the fabric reads host memory anyhow.
    pub fn offloaded(config: SessionConfig) -> Result<Self, Error> {
        let reason = match (config.device, config.fabric) {
            (Device::Cpu, _) => {
                "its device is the CPU: choose the GPU that the weights are to go by".to_owned()
            }
            (_, fabric) if !fabric.reaches_gpus() => {
                format!(
                    "{fabric} writes from host memory: choose the device cpu, and it reads the weights where they are"
                )
            }
            _ => return Ok(Self { weights: Weights::in_host(), offloaded: true, ..Self::new(config) }),
        };
        let name = format!("{} with offloaded weights", Rank::Trainer(TrainerRank(config.rank)));
        Err(Error::Declaration { name, reason })
    }

    /// Takes over host memory that tensors are in: one registration, however many tensors.
    ///
    /// # Errors
    ///
    /// [`Error::Declaration`] where this rank's weights are on a GPU ([`SessionConfig::device`]), and for memory that is not
    /// page-locked where they are offloaded; [`Error::Gpu`].
    pub fn add_memory(&mut self, memory: LeaseMut) -> Result<RegionIndex, Error> {
        if self.offloaded
            && let Some(gpu) = self.gpu()?
            && !gpu.device().is_page_locked(&memory)?
        {
            return Err(self.elsewhere("host memory that is not page-locked"));
        }
        match &mut self.weights {
            Weights::Host(regions) => Ok(added(regions, memory)),
            Weights::Device(_) => Err(self.elsewhere("host memory")),
        }
    }

    /// The same of memory of this rank's GPU. What a push sends is what stands there when it begins: wait for the streams that
    /// change it before [`TrainerSession::push`], and change nothing until that returns. A framework's own memory comes from
    /// `gpu_mem::Foreign`, which can tell before each push whether it is still allocated.
    ///
    /// # Errors
    ///
    /// [`Error::Declaration`] where this rank's weights are in host memory.
    pub fn add_device_memory(&mut self, memory: DeviceRange) -> Result<RegionIndex, Error> {
        match &mut self.weights {
            Weights::Device(regions) => Ok(added(regions, memory)),
            Weights::Host(_) => Err(self.elsewhere("GPU memory")),
        }
    }

    fn elsewhere(&self, what: &str) -> Error {
        let (rank, device) = (Rank::Trainer(TrainerRank(self.config.rank)), self.config.device);
        Error::Declaration {
            name: rank.to_string(),
            reason: format!("its device is {device}, and it is given {what}"),
        }
    }

    /// Declares a tensor at `offset_bytes` of a region of [`Trainer::add_memory`].
    pub fn register_at(
        &mut self,
        spec: TensorSpec,
        region: RegionIndex,
        offset_bytes: u64,
    ) -> Result<TensorId, Error> {
        let bytes = spec.bytes()?;
        let len = self.weights.region_len(region.index());
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

    /// Declares a tensor with host memory of its own, which it must fill.
    pub fn register(&mut self, spec: TensorSpec, memory: LeaseMut) -> Result<TensorId, Error> {
        let bytes = spec.bytes()?;
        if memory.len() as u64 != bytes {
            let reason = format!("its box has {bytes} bytes, but the memory has {}", memory.len());
            return Err(Error::Declaration { name: spec.name, reason });
        }
        let region = self.add_memory(memory)?;
        self.register_at(spec, region, 0)
    }

    /// Declares many tensors in one fresh, zeroed region where this rank's weights are ([`SessionConfig::device`], or for
    /// [`Trainer::offloaded`] page-locked host memory); the ids are
    /// in the order of `specs`.
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
        let offloaded = self.offloaded;
        let region = match self.gpu()? {
            Some(gpu) if offloaded => {
                let memory = LeaseMut::new(gpu.pinned(end)?);
                self.add_memory(memory)?
            }
            Some(gpu) => {
                let memory = gpu.zeroed(end)?;
                self.add_device_memory(memory)?
            }
            None => {
                let bytes = usize::try_from(end).map_err(|error| memory(error.to_string()))?;
                self.add_memory(LeaseMut::zeroed(bytes).map_err(|error| memory(error.to_string()))?)?
            }
        };
        specs.into_iter().zip(offsets).map(|(spec, offset)| self.register_at(spec, region, offset)).collect()
    }

    fn gpu(&mut self) -> Result<Option<&Arc<Gpu>>, Error> {
        if self.gpu.is_none() {
            self.gpu = Gpu::of(self.config.device)?;
        }
        Ok(self.gpu.as_ref())
    }

    /// A tensor's bytes in host memory, to fill before connecting.
    pub fn tensor_mut(&mut self, id: TensorId) -> Option<&mut [u8]> {
        let tensor = self.tensors.get(id.0)?;
        self.weights.bytes_mut(tensor.region.index(), tensor.offset..tensor.offset + tensor.len)
    }

    /// Fills a tensor, wherever it is, with bytes as long.
    ///
    /// # Errors
    ///
    /// [`Error::Declaration`] for bytes of another length, or a tensor of another session; [`Error::Gpu`].
    pub fn write(&mut self, id: TensorId, bytes: &[u8]) -> Result<(), Error> {
        let gpu = self.gpu()?.cloned();
        write(&self.tensors, &mut self.weights, gpu.as_deref(), id, bytes)
    }

    /// Joins the job: exchanges manifests, takes this rank's part of the plan, connects and warms the rails, and
    /// returns when every rank has done so.
    ///
    /// # Errors
    ///
    /// Whatever keeps this rank, or any other, from being ready within the deadline, by name.
    pub async fn connect(mut self) -> Result<TrainerSession, Error> {
        self.gpu()?;
        let mut session = TrainerSession::new(self)?;
        session.ready().await?;
        Ok(session)
    }
}

fn added<M>(regions: &mut Vec<M>, memory: M) -> RegionIndex {
    regions.push(memory);
    RegionIndex((regions.len() - 1) as u32)
}

/// Fills a tensor, wherever it is.
fn write(
    tensors: &[Tensor],
    weights: &mut Weights,
    gpu: Option<&Gpu>,
    id: TensorId,
    bytes: &[u8],
) -> Result<(), Error> {
    let Some(tensor) = tensors.get(id.0).filter(|tensor| tensor.len == bytes.len()) else {
        let reason = format!("it has not {} bytes, or belongs to another session", bytes.len());
        return Err(Error::Declaration { name: format!("tensor number {}", id.0), reason });
    };
    weights.write(gpu, tensor.region.index(), tensor.offset, bytes)
}
