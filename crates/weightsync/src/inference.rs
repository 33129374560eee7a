//! The inference side: declare the parameters that this rank serves and how each is made of source tensors, connect,
//! then take version after version.
//!
//! The weights are written in place by the trainers, so they are of no version between a push's beginning and its
//! commit. A session says so ([`Served::Torn`]) and gives out no bytes meanwhile.

use std::time::Duration;

use efa_core::{LeaseMut, Target};
pub use rendezvous::member::Served;
use rendezvous::member::{InferenceMember, InferenceStep};
use rendezvous::{Client, Join, MemberManifest, PlannedPart, RendezvousError};
use tokio::sync::oneshot;
use xfer_exec::local::{Doorman, LocalError, SharedFile};
use xfer_exec::ofi::OfiTarget;
use xfer_plan::{DType, DestinationParam, ParamMap, Rank, ReceiverManifest, ReceiverRank, RegionIndex};

use crate::config::SessionConfig;
use crate::connect::decode_peers;
use crate::control::{out_of_turn, say};
use crate::endpoint::{Endpoint, LocalEndpoint, RailEndpoint};
use crate::error::Error;
use crate::fabric::{self, FabricError};
use crate::report::{Span, Stopwatch, VerifyReport, VersionReport, gb_per_second};
use crate::verify::{Compared, Incoming};
use crate::watch::Watch;

/// Bytes that anybody may overwrite, for warm-ups.
const SCRATCH_BYTES: usize = 4096;

const CANNOT_PASS_ON: &str =
    "the plan has this inference rank pass bytes on, which it cannot do yet: plan with relay `never`";

const NOT_COMPARED: &str = "defect: what arrived could not be hashed";

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
        let (mut member, join) = InferenceMember::join(Join {
            job: config.job.clone(),
            member: Rank::Receiver(rank),
            world: config.world,
            deadline: config.deadline,
            manifest: MemberManifest::Inference(manifest),
            endpoint: endpoint.encode()?,
        });
        client.send(join)?;
        let planned = match next(&mut client, &mut member, "every rank to join").await? {
            InferenceStep::Planned(planned) => *planned,
            _ => return Err(out_of_turn("the plan")),
        };
        let busy_poll = fabric::a_core_each(&host, &decode_peers(&planned.peers)?);
        let PlannedPart::Inference { part, relay, names, inbound } = planned.part else {
            return Err(out_of_turn("an inference rank's part of the plan"));
        };
        if !relay.plan.ops.is_empty() {
            client.leave(Some(CANNOT_PASS_ON.into())).await;
            return Err(FabricError::Rail(CANNOT_PASS_ON.into()).into());
        }
        let sizes = (part.bytes, bytes);
        let incoming = match Incoming::new(planned.verify, inbound, names, sizes, client.progress()) {
            Ok(incoming) => incoming,
            Err(error) => {
                client.leave(Some(error.to_string())).await;
                return Err(error);
            }
        };
        say(&client, member.ready())?;
        let InferenceStep::Started = next(&mut client, &mut member, "every rank to connect").await? else {
            return Err(out_of_turn("the start"));
        };
        let watch = Watch::new(&config.metrics, Rank::Receiver(rank));
        watch.connected(std::iter::empty());
        Ok(InferenceSession {
            client,
            member,
            target,
            busy_poll,
            _doorman: doorman,
            arena,
            params,
            push: None,
            incoming,
            verifying: None,
            last: None,
            watch,
            bytes_per_push: part.bytes,
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

/// What the controller has this rank do next. `stage` is what it waits for, for errors.
async fn next(
    client: &mut Client,
    member: &mut InferenceMember,
    stage: &'static str,
) -> Result<InferenceStep, Error> {
    loop {
        match member.handle(client.receive(stage).await?).map_err(RendezvousError::from)? {
            Some(InferenceStep::Refused { reason }) => return Err(RendezvousError::Refused { reason }.into()),
            Some(step) => return Ok(step),
            None => {}
        }
    }
}

/// A push under way, for its report.
struct Push {
    version: u64,
    whole: std::time::Instant,
    stage: Stopwatch,
    stages: Vec<Span>,
    verified: Option<VerifyReport>,
}

/// An inference rank that is part of a running job.
///
/// Dropping it closes the rail before the arena is freed.
pub struct InferenceSession {
    client: Client,
    member: InferenceMember,
    // Field order is teardown order: nobody can write to the arena any more when it goes.
    target: Option<OfiTarget>,
    _doorman: Option<Doorman>,
    arena: Target,
    params: Vec<DestinationParam>,
    push: Option<Push>,
    /// What to hash, where the job verifies.
    incoming: Option<Incoming>,
    /// Under way; a call that is dropped in the middle leaves it to the next.
    verifying: Option<oneshot::Receiver<Compared>>,
    last: Option<VersionReport>,
    watch: Watch,
    bytes_per_push: u64,
    /// The rail's thread polls while a version is in flight.
    busy_poll: bool,
}

impl InferenceSession {
    /// Which version the bytes are.
    pub fn served(&self) -> Served {
        self.member.served()
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
            if let Some(verifying) = &mut self.verifying {
                let compared = verifying.await.unwrap_or_else(|_| Err(NOT_COMPARED.into()));
                self.verifying = None;
                self.compared(compared)?;
            }
            let pushing = self.push.is_some();
            let next = next(&mut self.client, &mut self.member, "a version");
            let step = match at_most.zip(until) {
                Some((at_most, until)) if !pushing => match tokio::time::timeout_at(until, next).await {
                    Ok(step) => step,
                    Err(_) => {
                        let served = self.served().to_string();
                        return Err(Error::NotYet { wanted: version, waited: at_most, served });
                    }
                },
                _ => next.await,
            };
            let step = step.inspect_err(|error| {
                self.receive_bytes(false);
                self.watch.failed(error);
            })?;
            match step {
                InferenceStep::Prepare { push, version, close } => {
                    let closed = self.close_rails(&close);
                    if closed.is_ok() {
                        self.receive_bytes(true);
                        let (stage, whole) = (Stopwatch::start("write"), std::time::Instant::now());
                        self.push = Some(Push { version, whole, stage, stages: Vec::new(), verified: None });
                        self.watch.torn(version, push);
                    }
                    // From here on a byte may change at any time.
                    say(&self.client, self.member.prepared(closed.clone()))?;
                    closed.map_err(FabricError::Rail)?;
                }
                InferenceStep::Fence { close, .. } => {
                    let closed = self.close_rails(&close);
                    say(&self.client, self.member.fenced(closed.clone()))?;
                    closed.map_err(FabricError::Rail)?;
                }
                InferenceStep::Verify { push, version, sums } => {
                    self.receive_bytes(false);
                    if let Some(Push { stage, stages, .. }) = &mut self.push {
                        stage.next("verify", stages);
                        self.watch.stage("verify");
                    }
                    match &self.incoming {
                        Some(incoming) => {
                            self.verifying = Some(incoming.start((push, version), sums, self.arena.clone()));
                        }
                        None => self.compared(Err(NOT_COMPARED.into()))?,
                    }
                }
                InferenceStep::Commit { version: committed, .. } => {
                    self.receive_bytes(false);
                    say(&self.client, self.member.committed())?;
                    let Some(ended) = self.push.take() else { continue };
                    let report = self.report(ended);
                    self.watch.served(&report);
                    self.last = Some(report.clone());
                    if committed >= version {
                        return Ok(report);
                    }
                }
                InferenceStep::Aborted { version, reason } => {
                    self.receive_bytes(false);
                    self.push = None;
                    let error = Error::Aborted { version, reason };
                    self.watch.failed(&error);
                    return Err(error);
                }
                InferenceStep::Finished => {
                    return Err(Error::Finished { committed: self.member.committed_version() });
                }
                _ => return Err(out_of_turn("a version")),
            }
        }
    }

    /// Says how a comparison ended. Where it found other bytes, the controller ends the push.
    fn compared(&mut self, compared: Compared) -> Result<(), Error> {
        let (report, result) = match compared {
            Ok(report) => (Some(report), Ok(())),
            Err(reason) => (None, Err(reason)),
        };
        if let Some(push) = &mut self.push {
            push.verified = report;
        }
        say(&self.client, self.member.verified(result))
    }

    /// Closes rails over which bytes may still come that nobody waits for.
    fn close_rails(&self, rails: &[u16]) -> Result<(), String> {
        let Some(target) = &self.target else { return Ok(()) };
        rails.iter().try_for_each(|rail| {
            let failed = |reason| format!("rail {rail}, which a trainer gave up on: {reason}");
            target.close_rail(usize::from(*rail)).map_err(failed)
        })
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
            stages: push.stages.into_iter().chain([push.stage.end()]).collect(),
            verified: push.verified,
        }
    }

    /// Copies bytes of a parameter, from `offset` of it on.
    ///
    /// # Errors
    ///
    /// [`Error::Torn`] when the bytes are of no version, [`Error::Range`] outside the parameter.
    pub fn read(&self, id: ParamId, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        if let Served::Torn(version) = self.served() {
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
