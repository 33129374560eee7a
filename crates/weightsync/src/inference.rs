//! The inference side: declare the parameters that this rank serves and how each is made of source tensors, connect,
//! then take version after version.
//!
//! What a version does to the weights that are served is chosen ([`CommitMode`]). Written in place they are of no version between
//! a push's beginning and its commit; a session says so ([`Served::Torn`]) and gives out no bytes meanwhile.

pub use rendezvous::member::Served;
use xfer_plan::{BlockQuant, DType, DestinationParam, ParamMap, Quantized, RegionIndex, TensorPart};

use crate::arena::{Arenas, CommitMode};
use crate::config::SessionConfig;
use crate::error::Error;
use crate::gpu::Gpu;
use crate::hooks::Hooks;

mod joining;
mod onward;
mod session;

pub use session::InferenceSession;

/// A declared parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParamId(usize);

/// An inference rank that has not joined yet.
pub struct Inference {
    config: SessionConfig,
    params: Vec<DestinationParam>,
    bytes: u64,
    mode: CommitMode,
    hooks: Hooks,
}

impl Inference {
    /// An inference rank that serves nothing yet.
    pub fn new(config: SessionConfig) -> Self {
        let (mode, hooks) = (CommitMode::default(), Hooks::default());
        Self { config, params: Vec::new(), bytes: 0, mode, hooks }
    }

    /// Chooses what a version does to the weights that are served meanwhile.
    pub fn commit_mode(&mut self, mode: CommitMode) -> &mut Self {
        self.mode = mode;
        self
    }

    /// What the engine does around versions.
    pub fn hooks(&mut self, hooks: Hooks) -> &mut Self {
        self.hooks = hooks;
        self
    }

    /// Declares a parameter of this rank: its local shape, and the source tensors that it is made of. Parameters lie
    /// one after another in one arena, each on a multiple of 256 bytes. Where trainers hold another type than `dtype`, the map says
    /// so ([`ParamMap::cast`]), and they convert it on its way.
    pub fn register(
        &mut self,
        name: impl Into<String>,
        dtype: DType,
        shape: &[u64],
        map: ParamMap,
    ) -> Result<ParamId, Error> {
        let (region, shape) = (RegionIndex(0), shape.to_vec());
        let mut param = DestinationParam {
            name: name.into(),
            dtype,
            shape,
            region,
            offset: 0,
            map: map.into(),
            priority: 0,
        };
        let place = || {
            let offset = self.bytes.checked_next_multiple_of(crate::ALIGN_BYTES)?;
            Some((offset, offset.checked_add(param.bytes()?)?))
        };
        let Some((offset, end)) = place() else {
            let reason = format!("a shape of {:?} has more bytes than 2^64", param.shape);
            return Err(Error::Declaration { name: param.name, reason });
        };
        (param.offset, self.bytes) = (offset, end);
        self.params.push(param);
        Ok(ParamId(self.params.len() - 1))
    }

    /// Declares a parameter in FP8: these parts of source tensors, one above the other, quantised in blocks on their way. Behind
    /// it, as `{name}_scale_inv`, come the scales of its blocks. The bytes are those of quantising the whole tensors, however
    /// trainers shard them.
    ///
    /// ```
    /// # use weightsync::{BlockQuant, Inference, SessionConfig, TensorBox, TensorPart, World};
    /// # let mut inference = Inference::new(SessionConfig::new("host:1", World { trainers: 1, inference: 2 }, 0));
    /// // The upper half of a projection, in blocks of 128 x 128 with f32 scales.
    /// let part = TensorPart {
    ///     tensor: "up_proj.weight".into(),
    ///     shape: vec![512, 1000],
    ///     bounds: TensorBox::new(&[0, 0], &[256, 1000])?,
    /// };
    /// let [codes, scales] = inference.register_quantized("up_proj.weight", &[part], BlockQuant::default())?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Declaration`] where a part does not begin and end at borders of blocks, or is of no matrix.
    pub fn register_quantized(
        &mut self,
        name: impl Into<String>,
        parts: &[TensorPart],
        quant: BlockQuant,
    ) -> Result<[ParamId; 2], Error> {
        let name = name.into();
        let Quantized { codes, shape, scales, scales_shape } = Quantized::stack(parts, quant)
            .map_err(|error| Error::Declaration { name: name.clone(), reason: error.to_string() })?;
        let scales_name = format!("{name}_scale_inv");
        let codes = self.register(name, DType::F8E4M3, &shape, codes)?;
        Ok([codes, self.register(scales_name, quant.scales.dtype(), &scales_shape, scales)?])
    }

    /// Joins the job: makes the arena, exposes it, exchanges manifests and returns when every rank is ready.
    ///
    /// # Errors
    ///
    /// Whatever keeps this rank, or any other, from being ready within the deadline, by name.
    pub async fn connect(self) -> Result<InferenceSession, Error> {
        let Self { config, params, bytes, mode, hooks } = self;
        let (fabric, device) = (config.fabric, config.device);
        // Before anybody waits for this rank.
        let arenas = tokio::task::spawn_blocking(move || match Gpu::of(device)? {
            Some(gpu) if !fabric.reaches_gpus() => Arenas::mirrored(mode, bytes, &gpu),
            gpu => Arenas::new(mode, bytes, fabric.allows_local(), gpu.as_ref()),
        });
        let arenas = arenas.await;
        let arenas = arenas.map_err(|error| std::io::Error::other(error.to_string()))??;
        let mut session = InferenceSession::new(config, params, arenas, hooks)?;
        session.ready().await?;
        Ok(session)
    }
}
