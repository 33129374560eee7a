//! The memory that holds an inference rank's weights: one arena that versions are written into, or two.
//!
//! With two, what is served is never what is written to. Which is which changes at every commit, or stays, and the bytes are
//! copied over.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use efa_core::{LeaseMut, Target};
use gpu_mem::VmmBuffer;
use weight_ops::cuda::DeviceRange;
use xfer_exec::cuda::{CudaError, DeviceRegion, Mirror};
use xfer_exec::local::SharedFile;

use crate::error::Error;
use crate::gpu::Gpu;
use crate::memory::Exposed;

/// What a version does to the weights that an inference rank serves meanwhile.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CommitMode {
    /// It is written over them: they are of no version from the beginning of a push to its commit, and after a push that
    /// failed. One arena.
    #[default]
    InPlace,
    /// It is written beside them, and takes their place at the commit: the address of the weights changes. Two arenas.
    Staged,
    /// It is written beside them, and copied over them at the commit: their address stays. Two arenas.
    StagedCopy,
}

impl CommitMode {
    /// Every mode and its name.
    pub const ALL: [(Self, &'static str); 3] =
        [(Self::InPlace, "in-place"), (Self::Staged, "staged"), (Self::StagedCopy, "staged-copy")];

    /// Whether what is served stays whole during a push.
    pub(crate) fn stages(self) -> bool {
        self != Self::InPlace
    }
}

impl fmt::Display for CommitMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(mode, _)| mode == self).map_or("?", |(_, name)| name);
        f.write_str(name)
    }
}

impl FromStr for CommitMode {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(_, known)| *known == name).map(|(mode, _)| *mode);
        found.ok_or_else(|| {
            format!("unknown commit mode '{name}'; choose one of in-place, staged, staged-copy")
        })
    }
}

/// Handles on one memory.
#[derive(Clone)]
enum Arena {
    /// All of it present: a file that peers on this host may map, or where none will, memory of this process alone.
    Host { target: Target, file: Option<SharedFile> },
    /// Peers on this host may open it. Handles share the buffer, so that one of them can renew it: that takes all other
    /// references to it to be gone.
    Device { gpu: Arc<Gpu>, buffer: Arc<Mutex<Arc<VmmBuffer>>> },
}

/// How peers on this host reach arenas, by region: in host memory or on a GPU, or where both are empty not at all.
pub(crate) struct Ways {
    pub(crate) files: Vec<SharedFile>,
    pub(crate) device: Vec<DeviceRegion>,
}

impl Arena {
    fn new(bytes: u64, shared: bool, gpu: Option<&Arc<Gpu>>) -> Result<Self, Error> {
        if let Some(gpu) = gpu {
            let buffer = Arc::new(Mutex::new(gpu.zeroed_to_share(bytes)?));
            return Ok(Self::Device { gpu: Arc::clone(gpu), buffer });
        }
        if shared {
            let (target, file) = SharedFile::create(bytes).map_err(|error| no_memory(error.to_string()))?;
            return Ok(Self::Host { target, file: Some(file) });
        }
        let too_long = |_| no_memory(format!("{bytes} bytes do not fit this machine's addresses"));
        let len = usize::try_from(bytes).map_err(too_long)?;
        let lease = LeaseMut::committed(len).map_err(|error| no_memory(error.to_string()))?;
        Ok(Self::Host { target: lease.expose(), file: None })
    }

    fn bytes(&self) -> Exposed {
        match self {
            Self::Host { target, .. } => Exposed::Host(target.clone()),
            Self::Device { gpu, buffer } => {
                Exposed::Device(Arc::clone(gpu), DeviceRange::whole(&locked(buffer)))
            }
        }
    }

    fn file(&self) -> Option<SharedFile> {
        if let Self::Host { file, .. } = self { file.clone() } else { None }
    }

    fn device_region(&self) -> Option<Result<DeviceRegion, CudaError>> {
        if let Self::Device { buffer, .. } = self {
            Some(DeviceRegion::mapped(&locked(buffer)))
        } else {
            None
        }
    }

    /// Whether somebody who had it may still have it, whatever is closed here.
    fn is_out(&self) -> bool {
        matches!(self, Self::Host { file: Some(_), .. } | Self::Device { .. })
    }

    fn renew(&mut self) -> Result<(), Error> {
        match self {
            Self::Host { file: None, .. } => Ok(()),
            Self::Host { target, file: Some(file) } => {
                file.renew(target).map_err(|error| no_memory(error.to_string()))
            }
            Self::Device { buffer, .. } => {
                let until = Instant::now() + LET_GO_MAX;
                let mut buffer = locked(buffer);
                while Arc::strong_count(&buffer) > 1 && Instant::now() < until {
                    std::thread::sleep(Duration::from_millis(1));
                }
                let in_use = || no_memory("they are still read, by a comparison that does not end".into());
                Ok(Arc::get_mut(&mut buffer).ok_or_else(in_use)?.renew()?)
            }
        }
    }
}

fn locked(buffer: &Mutex<Arc<VmmBuffer>>) -> MutexGuard<'_, Arc<VmmBuffer>> {
    buffer.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long a comparison that was given up may take to let go of the memory that it reads.
const LET_GO_MAX: Duration = Duration::from_secs(5);

fn no_memory(reason: String) -> Error {
    Error::Memory { what: "the weights", reason }
}

/// Handles on the arenas of a rank.
#[derive(Clone)]
pub(crate) struct Arenas {
    mode: CommitMode,
    all: Vec<Arena>,
    /// Which is served.
    served: usize,
    /// Which were told to the trainers, and in this order.
    exposed: Vec<usize>,
    /// Which was last written to by a push that has not been committed: who was stopped in the middle of a copy into it may go
    /// on with that.
    soiled: Option<usize>,
    /// Where versions arrive whose way does not lead to the GPU: they are copied to an arena when they are committed.
    mirror: Option<Arc<Mirror>>,
}

/// How long a GPU may take to read a mirror; one that takes longer will not end.
const UPLOAD_MAX: Duration = Duration::from_secs(60);

impl Arenas {
    /// Of `bytes` zero bytes each. Blocks: the kernel takes its time to find and clear so much memory.
    pub(crate) fn new(
        mode: CommitMode,
        bytes: u64,
        shared: bool,
        gpu: Option<&Arc<Gpu>>,
    ) -> Result<Self, Error> {
        let count = if mode.stages() { 2 } else { 1 };
        let all = (0..count).map(|_| Arena::new(bytes, shared, gpu)).collect::<Result<_, _>>()?;
        Ok(Self { mode, all, served: 0, exposed: Vec::new(), soiled: None, mirror: None })
    }

    /// On a GPU that nobody writes to from elsewhere: what comes is copied from host memory when it is committed, to the one arena
    /// or, where the address may change, to the other of two.
    pub(crate) fn mirrored(mode: CommitMode, bytes: u64, gpu: &Arc<Gpu>) -> Result<Self, Error> {
        let count = if mode == CommitMode::Staged { 2 } else { 1 };
        let all = (0..count).map(|_| Arena::new(bytes, false, Some(gpu))).collect::<Result<_, _>>()?;
        let mirror = Mirror::private(gpu.device(), bytes.max(1))?;
        Ok(Self { mode, all, served: 0, exposed: Vec::new(), soiled: None, mirror: Some(Arc::new(mirror)) })
    }

    /// What a version does to what is served.
    pub(crate) fn mode(&self) -> CommitMode {
        self.mode
    }

    /// The GPU that they are on, if they are on one.
    pub(crate) fn gpu(&self) -> Option<&Gpu> {
        if let Some(Arena::Device { gpu, .. }) = self.all.first() { Some(gpu) } else { None }
    }

    /// What is served.
    pub(crate) fn served(&self) -> Exposed {
        self.all[self.served].bytes()
    }

    /// Whether somebody may still write to an arena that has to be told anew.
    pub(crate) fn is_soiled(&self) -> bool {
        self.mirror.is_none() && self.soiled.is_some_and(|at| self.all[at].is_out())
    }

    /// Whether the arenas that are told to trainers are two.
    pub(crate) fn has_banks(&self) -> bool {
        self.mode == CommitMode::Staged && self.mirror.is_none()
    }

    /// Whether a commit copies, which takes a while.
    pub(crate) fn copies(&self) -> bool {
        self.mode == CommitMode::StagedCopy || self.mirror.is_some()
    }

    /// Whether what is served stays as it is while a commit copies.
    pub(crate) fn copies_beside(&self) -> bool {
        self.mode == CommitMode::Staged && self.mirror.is_some()
    }

    /// Puts memory in the place of a soiled arena that nobody else has mapped. What was there is lost. Blocks as
    /// [`Arenas::new`] does.
    pub(crate) fn renew(mut self) -> Result<Self, Error> {
        if let Some(at) = self.soiled.filter(|_| self.mirror.is_none()) {
            self.all[at].renew()?;
        }
        self.soiled = None;
        Ok(self)
    }

    /// Which arenas trainers are told of, from now on; with how peers on this host reach them.
    pub(crate) fn expose(&mut self) -> Result<(Vec<Exposed>, Ways), Error> {
        let other = self.all.len() - 1 - self.served;
        if let Some(mirror) = &self.mirror {
            let ways = Ways { files: Vec::new(), device: Vec::new() };
            return Ok((vec![Exposed::Host(mirror.target().clone())], ways));
        }
        self.exposed = match self.mode {
            CommitMode::InPlace => vec![self.served],
            CommitMode::Staged => vec![other, self.served],
            CommitMode::StagedCopy => vec![other],
        };
        let exposed = || self.exposed.iter().map(|at| &self.all[*at]);
        let files = exposed().filter_map(Arena::file).collect();
        let device = exposed().filter_map(Arena::device_region).collect::<Result<_, _>>()?;
        Ok((exposed().map(Arena::bytes).collect(), Ways { files, device }))
    }

    /// Which trainers were told of.
    pub(crate) fn exposed(&self) -> Vec<Exposed> {
        match &self.mirror {
            Some(mirror) => vec![Exposed::Host(mirror.target().clone())],
            None => self.exposed.iter().map(|at| self.all[*at].bytes()).collect(),
        }
    }

    /// A push to this bank begins. Ranks that expose one arena take no notice of banks.
    pub(crate) fn begin(&mut self, bank: usize) {
        // A mirror's bytes go to whichever is not served, or to the only one.
        let other = self.all.len() - 1 - self.served;
        let mirrored = self.mirror.is_some().then_some(other);
        self.soiled = mirrored.or(self.exposed.get(bank).or(self.exposed.first()).copied());
    }

    /// What the present push is written to.
    pub(crate) fn written(&self) -> Exposed {
        if let Some(mirror) = &self.mirror {
            return Exposed::Host(mirror.target().clone());
        }
        self.all[self.soiled.unwrap_or(self.served)].bytes()
    }

    /// The present push is committed, and what is served is what it wrote. Blocks for a copy, where there is one.
    pub(crate) fn commit(mut self) -> Result<Self, Error> {
        if let Some(written) = self.soiled {
            match (&self.mirror, self.mode) {
                (Some(mirror), _) => {
                    if let Exposed::Device(_, arena) = self.all[written].bytes() {
                        mirror.upload_all(&arena)?.wait(UPLOAD_MAX)?;
                    }
                    self.served = written;
                }
                (None, CommitMode::InPlace | CommitMode::Staged) => self.served = written,
                (None, CommitMode::StagedCopy) => self.written().copy_to(&self.served())?,
            }
        }
        self.soiled = None;
        Ok(self)
    }
}
