//! The inference side: declare the parameters that this rank serves and how each is made of source tensors, connect,
//! then take version after version.
//!
//! The weights are written in place by the trainers, so they are of no version between a push's beginning and its
//! commit. A session says so ([`Served::Torn`]) and gives out no bytes meanwhile.

use std::fmt;
use std::time::Duration;

use efa_core::{LeaseMut, Target};
use rendezvous::{Client, Join, MemberManifest, PlannedPart, PushId, ToController, ToMember};
use xfer_exec::local::{Doorman, LocalError, SharedFile};
use xfer_exec::ofi::OfiTarget;
use xfer_plan::{DType, DestinationParam, ParamMap, Rank, ReceiverManifest, ReceiverRank, RegionIndex};

use crate::config::SessionConfig;
use crate::connect::decode_peers;
use crate::endpoint::{Endpoint, LocalEndpoint, RailEndpoint};
use crate::error::Error;
use crate::fabric::{self, FabricError};
use crate::report::{Stopwatch, VersionReport, gb_per_second};
use crate::trainer::unexpected;

/// Bytes that anybody may overwrite, for warm-ups.
const SCRATCH_BYTES: usize = 4096;

/// Which version the bytes of a rank are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// This version, whole. 0 is what was there at the start: zeros.
    Version(u64),
    /// None: a push of this version began and has not been committed.
    Torn(u64),
}

impl fmt::Display for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version(version) => version.fmt(f),
            Self::Torn(version) => write!(f, "none (torn by the push of version {version})"),
        }
    }
}

/// A declared parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParamId(usize);

/// An inference rank that has not joined yet.
pub struct Inference {
    config: SessionConfig,
    params: Vec<DestinationParam>,
    bytes: u64,
}

impl Inference {
    /// An inference rank that serves nothing yet.
    pub fn new(config: SessionConfig) -> Self {
        Self { config, params: Vec::new(), bytes: 0 }
    }

    /// Declares a parameter of this rank: its local shape, and the source tensors that it is made of. Parameters lie
    /// one after another in one arena, each on a multiple of 256 bytes.
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

    /// Joins the job: makes the arena, exposes it, exchanges manifests and returns when every rank is ready.
    ///
    /// # Errors
    ///
    /// Whatever keeps this rank, or any other, from being ready within the deadline, by name.
    pub async fn connect(self) -> Result<InferenceSession, Error> {
        let Self { config, params, bytes } = self;
        let rank = ReceiverRank(config.rank);
        // Before anybody waits for this rank: the kernel takes its time to find and clear so much memory.
        let made = tokio::task::spawn_blocking(move || arena(bytes, config.fabric.allows_local())).await;
        let (arena, file) = made
            .map_err(|error| std::io::Error::other(error.to_string()))?
            .map_err(|reason| Error::Memory { what: "the weights", reason })?;
        let mut client = Client::connect(config.client()).await?;
        let source = config.bind.unwrap_or(client.local_addr().ip());
        let mut opened = fabric::open(&config, source)?;

        let local_error =
            |error: LocalError| FabricError::Local { peer: rank.to_string(), reason: error.to_string() };
        let doorman = file.map(|file| Doorman::open(vec![file])).transpose().map_err(local_error)?;
        let host = fabric::host_identity();
        let declared = fabric::declare(&config, &opened);
        let rails = opened.iter_mut().map(|opened| expose(opened, &arena)).collect::<Result<_, _>>()?;
        let endpoint = Endpoint {
            host: host.clone(),
            rails,
            local: doorman.as_ref().map(|doorman| LocalEndpoint::new(doorman.address(), vec![bytes])),
        };
        let rails: Vec<_> = opened.into_iter().map(|opened| opened.rail).collect();
        let target = match rails.is_empty() {
            true => None,
            false => Some(OfiTarget::start(rails, config.cpus.clone())?),
        };

        let manifest = ReceiverManifest {
            host: host.clone(),
            regions: vec![bytes],
            rails: declared,
            params: params.clone(),
        };
        client.send(ToController::Join(Box::new(Join {
            job: config.job.clone(),
            member: Rank::Receiver(rank),
            world: config.world,
            deadline: config.deadline,
            manifest: MemberManifest::Inference(manifest),
            endpoint: endpoint.encode()?,
        })))?;
        let planned = match client.receive("every rank to join").await? {
            ToMember::Planned(planned) => *planned,
            other => return Err(unexpected("the plan", &other)),
        };
        let busy_poll = fabric::a_core_each(&host, &decode_peers(&planned.peers)?);
        let bytes_per_push = match planned.part {
            PlannedPart::Inference(part) => part.bytes,
            PlannedPart::Trainer { .. } => 0,
        };
        client.send(ToController::Ready { digest: planned.digest })?;
        match client.receive("every rank to connect").await? {
            ToMember::Start => {}
            other => return Err(unexpected("the start", &other)),
        }
        Ok(InferenceSession {
            client,
            target,
            busy_poll,
            _doorman: doorman,
            arena,
            params,
            served: Served::Version(0),
            committed: 0,
            push: None,
            last: None,
            bytes_per_push,
        })
    }
}

/// Memory for the weights, all of it present: a file that peers on this host may map, or where none will, memory of this
/// process alone.
fn arena(bytes: u64, shared: bool) -> Result<(Target, Option<SharedFile>), String> {
    if shared {
        let (target, file) = SharedFile::create(bytes).map_err(|error| error.to_string())?;
        return Ok((target, Some(file)));
    }
    let len =
        usize::try_from(bytes).map_err(|_| format!("{bytes} bytes do not fit this machine's addresses"))?;
    let lease = LeaseMut::committed(len).map_err(|error| error.to_string())?;
    Ok((lease.expose(), None))
}

/// Exposes the arena and a scratch page on the rail, and describes them.
fn expose(opened: &mut fabric::OpenRail, arena: &Target) -> Result<RailEndpoint, Error> {
    let rail_error = |error: efa_core::RegionError| FabricError::Rail(error.to_string());
    let scratch = LeaseMut::zeroed(SCRATCH_BYTES)
        .map_err(|error| Error::Memory { what: "the scratch page", reason: error.to_string() })?
        .expose();
    let (_, scratch) = opened.rail.expose(&scratch).map_err(rail_error)?;
    // A rank that needs nothing has nothing to expose.
    let regions = match arena.is_empty() {
        true => Vec::new(),
        false => vec![opened.rail.expose(arena).map_err(rail_error)?.1],
    };
    Ok(RailEndpoint {
        provider: opened.provider.to_string(),
        address: opened.rail.address().clone(),
        regions,
        scratch: Some(scratch),
    })
}

struct Push {
    id: PushId,
    version: u64,
    whole: std::time::Instant,
    stage: Stopwatch,
}

/// An inference rank that is part of a running job.
///
/// Dropping it closes the rail before the arena is freed.
pub struct InferenceSession {
    client: Client,
    // Field order is teardown order: nobody can write to the arena any more when it goes.
    target: Option<OfiTarget>,
    _doorman: Option<Doorman>,
    arena: Target,
    params: Vec<DestinationParam>,
    served: Served,
    committed: u64,
    push: Option<Push>,
    last: Option<VersionReport>,
    bytes_per_push: u64,
    /// The rail's thread polls while a version is in flight.
    busy_poll: bool,
}

impl InferenceSession {
    /// Which version the bytes are.
    pub fn served(&self) -> Served {
        self.served
    }

    /// The parameters in the order of their ids: names, shapes, and offsets in the arena.
    pub fn params(&self) -> &[DestinationParam] {
        &self.params
    }

    /// Waits until `version` or a newer one is committed, taking part in the pushes that lead there. The weights are
    /// of no version while a push runs, so stop reading them before this call.
    ///
    /// `None` waits for as long as the trainers take between versions; pushes themselves have the job's deadline.
    ///
    /// # Errors
    ///
    /// [`Error::Aborted`] after a push that failed: call again to wait for the next one. [`Error::Finished`] when all
    /// trainers have left. [`Error::NotYet`] when `at_most` has passed between pushes.
    pub async fn wait_version(
        &mut self,
        version: u64,
        at_most: Option<Duration>,
    ) -> Result<VersionReport, Error> {
        if let Some(last) = self.last.as_ref().filter(|last| last.version >= version && self.push.is_none()) {
            return Ok(last.clone());
        }
        let until = at_most.and_then(|at_most| tokio::time::Instant::now().checked_add(at_most));
        loop {
            let pushing = self.push.is_some();
            let message = match at_most.zip(until) {
                Some((at_most, until)) if !pushing => {
                    match tokio::time::timeout_at(until, self.client.receive("a version")).await {
                        Ok(message) => message,
                        Err(_) => {
                            let served = self.served.to_string();
                            return Err(Error::NotYet { wanted: version, waited: at_most, served });
                        }
                    }
                }
                _ => self.client.receive("a version").await,
            };
            let message = message.inspect_err(|_| self.receive_bytes(false))?;
            match message {
                ToMember::Prepare { push, version, fence } => {
                    self.close_rails(push, &fence)?;
                    self.receive_bytes(true);
                    // From here on a byte may change at any time.
                    self.served = Served::Torn(version);
                    let stage = Stopwatch::start("write");
                    self.push = Some(Push { id: push, version, whole: std::time::Instant::now(), stage });
                    self.client.send(ToController::Prepared { push })?;
                }
                ToMember::Fence { push, rails } => {
                    self.close_rails(push, &rails)?;
                    self.client.send(ToController::Fenced { push })?;
                }
                ToMember::Commit { push, version: committed } => {
                    let Some(ended) = self.push.take_if(|current| current.id == push) else {
                        continue;
                    };
                    self.receive_bytes(false);
                    self.served = Served::Version(committed);
                    self.committed = committed;
                    self.client.send(ToController::Committed { push })?;
                    let report = self.report(ended);
                    self.last = Some(report.clone());
                    if committed >= version {
                        return Ok(report);
                    }
                }
                ToMember::Abort { version, reason } => {
                    self.receive_bytes(false);
                    self.push = None;
                    return Err(Error::Aborted { version, reason });
                }
                ToMember::Finished => {
                    return Err(Error::Finished { committed: self.committed });
                }
                other => return Err(unexpected("a version", &other)),
            }
        }
    }

    /// Closes rails over which bytes may still come that nobody waits for.
    fn close_rails(&self, push: PushId, rails: &[u16]) -> Result<(), Error> {
        let Some(target) = &self.target else { return Ok(()) };
        for rail in rails {
            if let Err(reason) = target.close_rail(usize::from(*rail)) {
                let reason = format!("rail {rail}, which a trainer gave up on: {reason}");
                self.client.send(ToController::Failed { push, reason: reason.clone() })?;
                return Err(FabricError::Rail(reason).into());
            }
        }
        Ok(())
    }

    /// Between the beginning of a push and its end the rail's thread has something to do.
    fn receive_bytes(&self, on: bool) {
        if let Some(target) = self.target.as_ref().filter(|_| self.busy_poll) {
            target.busy_poll(on);
        }
    }

    fn report(&self, push: Push) -> VersionReport {
        let seconds = push.whole.elapsed().as_secs_f64();
        let bytes = self.bytes_per_push;
        VersionReport {
            version: push.version,
            bytes,
            seconds,
            gb_per_second: gb_per_second(bytes, seconds),
            stages: vec![push.stage.end()],
        }
    }

    /// Copies bytes of a parameter, from `offset` of it on.
    ///
    /// # Errors
    ///
    /// [`Error::Torn`] when the bytes are of no version, [`Error::Range`] outside the parameter.
    pub fn read(&self, id: ParamId, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        if let Served::Torn(version) = self.served {
            return Err(Error::Torn { version });
        }
        let Some(param) = self.params.get(id.0) else {
            let (name, reason) =
                (format!("parameter number {}", id.0), "it belongs to another session".into());
            return Err(Error::Declaration { name, reason });
        };
        let (bytes, len) = (into.len() as u64, param.bytes().unwrap_or(0));
        let outside = || Error::Range { name: param.name.clone(), offset, bytes, len };
        if offset.checked_add(bytes).is_none_or(|end| end > len) {
            return Err(outside());
        }
        let at = usize::try_from(param.offset + offset).map_err(|_| outside())?;
        self.arena.read(at, into).map_err(|_| outside())
    }

    /// The arena's base address, for an engine that reads the weights where they are: parameter `i` is at
    /// `params()[i].offset` from it. It stays the same until the session is dropped.
    pub fn arena_ptr(&self) -> *mut u8 {
        self.arena.as_ptr()
    }

    /// Leaves the job. While trainers are in it, this ends it for all.
    pub async fn leave(self) {
        let Self { client, .. } = self;
        client.leave(None).await;
    }

    /// Leaves because this rank cannot go on, which ends the job; the others are told why.
    pub async fn give_up_job(self, reason: String) {
        self.client.leave(Some(reason)).await;
    }
}
