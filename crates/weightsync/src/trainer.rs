//! The training side: declare what this rank owns, connect, then push version after version.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use efa_core::{Lease, LeaseMut, MemoryRef};
use rendezvous::member::{TrainerMember, TrainerStep};
use rendezvous::status::{RAILS_TOLD_MAX, RailStatus};
use rendezvous::{Client, Fence, GiveUp, Join, MemberManifest, PushId, RendezvousError, ToController};
use tokio::sync::oneshot;
use xfer_exec::driver::{Outcome, Sender};
use xfer_exec::{Failure, RailUse};
use xfer_plan::{
    DType, Rank, ReceiverRank, RegionIndex, SourcePiece, TensorBox, TrainerManifest, TrainerRank,
};

use crate::config::SessionConfig;
use crate::connect::{Connected, ConnectedRail, Connecting};
use crate::control::{out_of_turn, say};
use crate::endpoint::{Endpoint, RailEndpoint};
use crate::error::Error;
use crate::fabric;
use crate::report::{PushReport, RailReport, Stopwatch, gb_per_second};
use crate::verify::{Outgoing, Summed};
use crate::watch::Watch;

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
        let Self { config, regions, tensors, pieces } = self;
        let rank = TrainerRank(config.rank);
        let mut client = Client::connect(config.client()).await?;
        let source = config.bind.unwrap_or(client.local_addr().ip());
        let opened = fabric::open(&config, source)?;
        let manifest = TrainerManifest {
            host: fabric::host_identity(),
            regions: regions.iter().map(|region| region.len() as u64).collect(),
            rails: fabric::declare(&config, &opened),
            pieces,
        };
        let endpoint = Endpoint {
            host: manifest.host.clone(),
            rails: opened.iter().map(RailEndpoint::of_trainer).collect(),
            local: None,
        };
        let (mut member, join) = TrainerMember::join(Join {
            job: config.job.clone(),
            member: Rank::Trainer(rank),
            world: config.world,
            deadline: config.deadline,
            manifest: MemberManifest::Trainer(manifest),
            endpoint: endpoint.encode()?,
        });
        client.send(join)?;
        let planned = match next(&mut client, &mut member, "every rank to join").await? {
            TrainerStep::Connect(planned) => *planned,
            _ => return Err(out_of_turn("the plan")),
        };
        let (bound_seconds, progress) = (planned.bound_seconds, client.progress());
        let memories: Vec<MemoryRef> = regions.iter().map(|region| region.memory().clone()).collect();
        let region_bytes: Vec<u64> = regions.iter().map(|region| region.len() as u64).collect();
        let connecting =
            Connecting { config: config.clone(), endpoint, opened, memories, region_bytes, progress };
        let connected = tokio::task::spawn_blocking(move || connecting.connect(rank, planned)).await;
        let Connected { sender, rails, routes, outgoing } =
            match connected.map_err(|error| std::io::Error::other(error.to_string()))? {
                Ok(connected) => connected,
                Err(error) => {
                    client.leave(Some(error.to_string())).await;
                    return Err(error);
                }
            };
        say(&client, member.ready())?;
        let TrainerStep::Started = next(&mut client, &mut member, "every rank to connect").await? else {
            return Err(out_of_turn("the start"));
        };
        let watch = Watch::new(&config.metrics, Rank::Trainer(rank));
        watch.connected(rails.iter().map(|rail| rail.name.as_str()));
        Ok(TrainerSession {
            client,
            member,
            sender,
            weights: Weights::Here(regions),
            tensors,
            rails,
            routes,
            outgoing,
            bound_seconds,
            watch,
            pushing: false,
        })
    }
}

/// What the controller has this trainer do next. `stage` is what it waits for, for errors.
async fn next(
    client: &mut Client,
    member: &mut TrainerMember,
    stage: &'static str,
) -> Result<TrainerStep, Error> {
    loop {
        match member.handle(client.receive(stage).await?).map_err(RendezvousError::from)? {
            Some(TrainerStep::Refused { reason }) => return Err(RendezvousError::Refused { reason }.into()),
            Some(step) => return Ok(step),
            None => {}
        }
    }
}

/// Where the weights are.
enum Weights {
    /// With the session.
    Here(Vec<LeaseMut>),
    /// With the rails, until this answers.
    Pushed(oneshot::Receiver<Written>),
    /// Lost to a rail that did not close.
    Lost,
}

/// How the rails' part of a push ended.
struct Written {
    outcome: Outcome,
    /// What was hashed; `None` where nothing was delivered whole, or nothing is verified.
    summed: Option<Summed>,
}

/// A trainer that is part of a running job.
pub struct TrainerSession {
    client: Client,
    member: TrainerMember,
    sender: Sender,
    weights: Weights,
    tensors: Vec<Tensor>,
    rails: Vec<ConnectedRail>,
    routes: BTreeMap<ReceiverRank, String>,
    outgoing: Option<Outgoing>,
    bound_seconds: f64,
    watch: Watch,
    /// A push is under way, or was dropped in the middle.
    pushing: bool,
}

/// What a push holds while it runs: dropped in the middle, it gives up.
struct InPush<'a> {
    session: &'a mut TrainerSession,
    guard: Option<GiveUp>,
}

impl Drop for InPush<'_> {
    fn drop(&mut self) {
        match self.guard.take() {
            // Dropped in the middle: the guard tells the controller, and the rails stop posting.
            Some(_guard) => {
                self.session.sender.abort(GIVEN_UP.into());
                self.session.watch.given_up(GIVEN_UP);
            }
            None => self.session.pushing = false,
        }
    }
}

const NOT_HASHED: &str = "defect: what it sent could not be hashed";

const GIVEN_UP: &str = "its push was given up half way";

impl TrainerSession {
    /// Which rail leads to each inference rank that this trainer writes to.
    pub fn routes(&self) -> &BTreeMap<ReceiverRank, String> {
        &self.routes
    }

    /// A tensor's bytes, to change between pushes.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] while a push that was given up half way still reads them.
    pub fn tensor_mut(&mut self, id: TensorId) -> Result<&mut [u8], Error> {
        if let Weights::Pushed(outcome) = &mut self.weights
            && let Ok(written) = outcome.try_recv()
        {
            self.weights = thaw(written.outcome.regions);
        }
        let Weights::Here(regions) = &mut self.weights else {
            return Err(Error::Busy);
        };
        let bytes = self.tensors.get(id.0).and_then(|tensor| {
            let region = regions.get_mut(tensor.region.index())?;
            region.bytes_mut().get_mut(tensor.offset..tensor.offset + tensor.len)
        });
        bytes.ok_or_else(|| Error::Declaration {
            name: format!("tensor number {}", id.0),
            reason: "it belongs to another session".into(),
        })
    }

    /// A tensor's name.
    pub fn name(&self, id: TensorId) -> Option<&str> {
        self.tensors.get(id.0).map(|tensor| tensor.name.as_str())
    }

    /// Pushes the weights as they are now as `version`, which must be newer than the last committed one. Every trainer
    /// of the job must push it. Returns when every inference rank serves it.
    ///
    /// If the future is dropped in the middle, this trainer gives up: the job ends, every other rank is told so, and the
    /// weights come back once the rails have let go of them.
    ///
    /// # Errors
    ///
    /// After [`Error::Aborted`] and [`Error::Push`] the version is not committed and may be pushed again, unless a rank
    /// was lost. After [`Error::Unconfirmed`] it is committed.
    pub async fn push(&mut self, version: u64) -> Result<PushReport, Error> {
        if self.pushing {
            return Err(Error::Broken);
        }
        self.pushing = true;
        let guard = self.client.give_up_on_drop(GIVEN_UP);
        self.watch.began(version, None, "wait for trainers");
        let mut push = InPush { session: self, guard: Some(guard) };
        let pushed = push.session.push_to_end(version).await;
        if let Some(guard) = push.guard.take() {
            guard.never_mind();
        }
        push.session.watch.pushed(&pushed);
        pushed
    }

    async fn push_to_end(&mut self, version: u64) -> Result<PushReport, Error> {
        let Weights::Here(_) = &self.weights else {
            return Err(Error::Broken);
        };
        let whole = std::time::Instant::now();
        let mut stages = Vec::new();
        let mut stage = Stopwatch::start("wait for trainers");
        // Heartbeats tell it until the rails begin to count anew.
        self.client.progress().store(0, Ordering::Relaxed);
        say(&self.client, self.member.begin(version))?;
        let push = match self.next("the other trainers and the inference ranks").await? {
            TrainerStep::Write { push, .. } => push,
            TrainerStep::Aborted { reason, .. } => return Err(Error::Aborted { version, reason }),
            _ => return Err(out_of_turn("the start of the push")),
        };
        stage.next("write", &mut stages);
        self.watch.named(push);
        self.watch.stage("write");
        let (Written { outcome, summed }, ended) = self.write(push, version).await?;
        self.tell_rails(&outcome);
        let fences = self.fences(&outcome.rails);
        let (sums, verified) = summed.map(|Summed { sums, report }| (sums, report)).unzip();
        let result = match (&ended, &outcome.result) {
            (None, Ok(_)) if self.outgoing.is_some() && sums.is_none() => Err(NOT_HASHED.into()),
            (None, Ok(delivered)) => Ok((delivered.bytes, delivered.writes)),
            (None, Err(failure)) => Err(failure.to_string()),
            (Some(error), _) => Err(error.to_string()),
        };
        let told = say(&self.client, self.member.written(result, fences, sums.unwrap_or_default()));
        let delivered = match (ended.or(told.err()), outcome.result) {
            (None, Ok(delivered)) => delivered,
            (None, Err(failure)) => {
                // Until it has told everybody. Where that fails it knows more: it says which rank was lost.
                self.next("the end of the failed push").await?;
                return Err(Error::Push { version, failure });
            }
            // What failed here first says more than the abort that followed.
            (Some(Error::Aborted { .. }), Err(failure)) if !matches!(failure, Failure::Aborted(_)) => {
                return Err(Error::Push { version, failure });
            }
            (Some(error), _) => return Err(error),
        };
        stage.next("commit", &mut stages);
        self.watch.stage("commit");
        let (bytes, writes) = (delivered.bytes, delivered.writes);
        match self.next("the commit").await? {
            TrainerStep::Committed { unconfirmed, .. } if unconfirmed.is_empty() => {}
            TrainerStep::Committed { unconfirmed, .. } => {
                return Err(Error::Unconfirmed { version, members: unconfirmed });
            }
            TrainerStep::Aborted { reason, .. } => return Err(Error::Aborted { version, reason }),
            _ => return Err(out_of_turn("the commit")),
        }
        stages.push(stage.end());
        let write_seconds = outcome.timings.total.as_secs_f64();
        Ok(PushReport {
            version,
            bytes,
            writes,
            bytes_gathered: delivered.bytes_gathered,
            refusals: delivered.refusals,
            seconds: whole.elapsed().as_secs_f64(),
            write_seconds,
            gather_seconds: outcome.timings.gather.as_secs_f64(),
            gb_per_second: gb_per_second(bytes, write_seconds),
            bound_seconds: self.bound_seconds,
            bound_fraction: if write_seconds > 0.0 { self.bound_seconds / write_seconds } else { 0.0 },
            rails: self
                .rails
                .iter()
                .zip(outcome.rails)
                .map(|(rail, used)| RailReport::new(&rail.name, used))
                .collect(),
            stages,
            verified,
        })
    }

    async fn next(&mut self, stage: &'static str) -> Result<TrainerStep, Error> {
        next(&mut self.client, &mut self.member, stage).await
    }

    /// Lends the weights to the rails and waits until they are back, whatever the controller says meanwhile: that comes with
    /// the outcome, where it ended the push.
    async fn write(&mut self, push: PushId, version: u64) -> Result<(Written, Option<Error>), Error> {
        let (reply, outcome) = oneshot::channel();
        let Weights::Here(regions) = std::mem::replace(&mut self.weights, Weights::Pushed(outcome)) else {
            return Err(Error::Broken);
        };
        let regions: Vec<Lease> = regions.into_iter().map(LeaseMut::freeze).collect();
        let summing = self.outgoing.as_ref().map(|outgoing| outgoing.start(push, regions.clone()));
        self.sender.push(regions, move |outcome| {
            // On the thread of the rails, which have nothing left to do.
            let summed = summing.and_then(|summing| summing.end(outcome.result.is_ok()));
            drop(reply.send(Written { outcome, summed }));
        });
        let mut ended: Option<Error> = None;
        let outcome = loop {
            let Weights::Pushed(outcome) = &mut self.weights else {
                return Err(Error::Broken);
            };
            tokio::select! {
                outcome = outcome => break outcome,
                step = next(&mut self.client, &mut self.member, "its own writes"), if ended.is_none() => {
                    let error = match step {
                        Ok(TrainerStep::Stop { reason }) => Error::Aborted { version, reason },
                        Ok(_) => out_of_turn("an abort or nothing"),
                        Err(error) => error,
                    };
                    self.sender.abort(error.to_string());
                    ended = Some(error);
                }
            }
        };
        let Ok(mut written) = outcome else {
            self.weights = Weights::Lost;
            return Err(Error::Broken);
        };
        self.weights = thaw(std::mem::take(&mut written.outcome.regions));
        Ok((written, ended))
    }

    /// For whoever watches: logs, metrics, and observers of the controller.
    fn tell_rails(&mut self, outcome: &Outcome) {
        let rails = || self.rails.iter().map(|rail| rail.name.as_str()).zip(&outcome.rails);
        let seconds = outcome.timings.total.as_secs_f64();
        let told = rails().take(RAILS_TOLD_MAX);
        let told = told.map(|(name, used)| RailStatus::new(name, used.bytes, seconds, used.closed.is_none()));
        // A queue without room is met again by what has to be said.
        let _ = self.client.send(ToController::Rails { rails: told.collect() });
        self.watch.rails(rails(), outcome.result.as_ref().map_or(0, |delivered| delivered.refusals));
    }

    /// Which rails inference ranks have to close: those over which bytes may still come that were given up on. A kernel goes
    /// on sending what a TCP socket has taken, and a network may hold what a NIC has sent.
    fn fences(&self, used: &[RailUse]) -> Vec<Fence> {
        let pairs = self.rails.iter().zip(used);
        let fences = pairs.flat_map(|(rail, used)| {
            used.unfinished.iter().filter_map(|at| Some(Fence { at: *at, rail: *rail.theirs.get(at)? }))
        });
        fences.collect()
    }

    /// Leaves the job in good order. The inference ranks go on serving what they have; when all trainers have left,
    /// they are told.
    pub async fn leave(self) {
        self.client.leave(None).await;
        let sender = self.sender;
        let _ = tokio::task::spawn_blocking(move || sender.close()).await;
    }

    /// Leaves because this trainer cannot go on, which ends the job; the others are told why.
    pub async fn give_up_job(self, reason: String) {
        self.client.leave(Some(reason)).await;
    }

    /// Bytes of one push of this rank that have been delivered so far, for a progress bar.
    pub fn progress(&self) -> Arc<AtomicU64> {
        self.client.progress()
    }
}

fn thaw(regions: Vec<Lease>) -> Weights {
    match regions.into_iter().map(Lease::thaw).collect::<Result<_, _>>() {
        Ok(regions) => Weights::Here(regions),
        // A rail that did not close still holds them.
        Err(_) => Weights::Lost,
    }
}
