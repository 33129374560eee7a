//! Pushes: what a trainer does between the beginning of a version and its end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use efa_core::MemoryRef;
use rendezvous::member::{TrainerMember, TrainerStep};
use rendezvous::status::{RAILS_TOLD_MAX, RailStatus};
use rendezvous::{Bank, PushId, RendezvousError, ToController};
use tokio::sync::oneshot;
use weight_ops::cuda::DeviceRange;
use xfer_exec::Failure;
use xfer_plan::{Rank, ReceiverRank, SourcePiece, TrainerRank};

use super::holder::Holder;
use super::joining::Rails;
use super::{Tensor, TensorId, Trainer, write};
use crate::config::SessionConfig;
use crate::connect::{Connected, fences};
use crate::error::Error;
use crate::gpu::Gpu;
use crate::line::{Line, out_of_turn};
use crate::memory::Weights;
use crate::pusher::{Written, attempt};
use crate::report::{PushReport, RailReport, Stopwatch, gb_per_second};
use crate::verify::Summed;
use crate::watch::Watch;

/// A trainer that is part of a job.
pub struct TrainerSession {
    pub(super) config: SessionConfig,
    pub(super) line: Line,
    pub(super) member: TrainerMember,
    pub(super) rails: Rails,
    weights: Holder,
    pub(super) offloaded: bool,
    pub(super) gpu: Option<Arc<Gpu>>,
    tensors: Vec<Tensor>,
    pub(super) pieces: Vec<SourcePiece>,
    pub(super) memories: Vec<MemoryRef>,
    pub(super) device_memories: Vec<DeviceRange>,
    pub(super) region_bytes: Vec<u64>,
    pub(super) bound_seconds: f64,
    pub(super) committed: u64,
    pub(super) behind: Vec<Rank>,
    /// Of a push that wrote everything, and lost the controller before it heard of the commit.
    pub(super) undecided: Option<PushReport>,
    /// As above, and meanwhile it has heard of it.
    pub(super) decided: Option<PushReport>,
    pub(super) watch: Watch,
    /// A push is under way, or was dropped in the middle.
    pushing: bool,
    /// Pushes that failed over this rank's own rails since they were opened, or since one was committed.
    pub(super) failed_here: u32,
}

/// What a push holds while it runs: dropped in the middle, it gives up.
struct InPush<'a> {
    session: &'a mut TrainerSession,
    ended: bool,
}

impl Drop for InPush<'_> {
    fn drop(&mut self) {
        if self.ended {
            self.session.pushing = false;
            return;
        }
        // Dropped in the middle: the controller is told, and the rails stop posting. A queue that is full means that the
        // controller learns it in another way.
        let _ = self.session.line.send(ToController::Leave { reason: Some(GIVEN_UP.to_owned()) });
        if let Rails::Connected(connected) = &self.session.rails {
            connected.pusher.abort(GIVEN_UP.into());
        }
        self.session.watch.given_up(GIVEN_UP);
    }
}

const NOT_HASHED: &str = "defect: what it sent could not be hashed";

const GIVEN_UP: &str = "its push was given up half way";

const WEIGHTS_LOST: &str = "its weights are lost to a rail that did not close";

const LOST: &str = "this rank lost the controller, or was given up by it";

impl TrainerSession {
    pub(super) fn new(trainer: Trainer) -> Result<Self, Error> {
        let Trainer { config, weights, offloaded, gpu, tensors, pieces } = trainer;
        Ok(Self {
            line: Line::new(&config)?,
            member: TrainerMember::new(),
            rails: Rails::Closed,
            memories: weights.memories(),
            device_memories: weights.device_memories(),
            region_bytes: weights.region_bytes(),
            weights: Holder::Here(weights),
            offloaded,
            gpu,
            tensors,
            pieces,
            bound_seconds: 0.0,
            committed: 0,
            behind: Vec::new(),
            undecided: None,
            decided: None,
            watch: Watch::new(&config.metrics, Rank::Trainer(TrainerRank(config.rank))),
            pushing: false,
            failed_here: 0,
            config,
        })
    }

    /// Which rail leads to each inference rank that this trainer writes to. None while it has to join again, as the next push
    /// does.
    pub fn routes(&self) -> &BTreeMap<ReceiverRank, String> {
        const NONE: &BTreeMap<ReceiverRank, String> = &BTreeMap::new();
        match &self.rails {
            Rails::Connected(connected) => &connected.routes,
            _ => NONE,
        }
    }

    /// The last version that is committed, as far as this rank has heard; 0 before the first.
    pub fn committed(&self) -> u64 {
        self.committed
    }

    /// Inference ranks that have come back, or were lost before they had it, and have not got the committed version: as far as
    /// this rank has heard. The next push brings them up to date; while the weights are still those of the committed version,
    /// that may be a push of the same version again.
    pub fn behind(&self) -> &[Rank] {
        &self.behind
    }

    /// A tensor's bytes in host memory, to change between pushes.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] while a push that was given up half way still reads them; [`Error::Declaration`] where they are on a GPU.
    pub fn tensor_mut(&mut self, id: TensorId) -> Result<&mut [u8], Error> {
        let tensor = self.tensors.get(id.0).cloned();
        let weights = self.weights_here()?;
        let bytes = tensor.and_then(|Tensor { region, offset, len, .. }| {
            weights.bytes_mut(region.index(), offset..offset + len)
        });
        bytes.ok_or_else(|| Error::Declaration {
            name: format!("tensor number {}", id.0),
            reason: "it belongs to another session, or is not in host memory".into(),
        })
    }

    /// Fills a tensor, wherever it is, between pushes.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] as [`TrainerSession::tensor_mut`]; [`Error::Declaration`] for bytes that are not as many as the tensor's.
    pub fn write(&mut self, id: TensorId, bytes: &[u8]) -> Result<(), Error> {
        self.weights_here()?;
        let Holder::Here(weights) = &mut self.weights else { return Err(Error::Busy) };
        write(&self.tensors, weights, self.gpu.as_deref(), id, bytes)
    }

    fn weights_here(&mut self) -> Result<&mut Weights, Error> {
        if let Holder::Lent(weights) = &mut self.weights
            && let Ok(weights) = weights.try_recv()
        {
            self.weights = Holder::of(weights);
        }
        if let Holder::Here(weights) = &mut self.weights { Ok(weights) } else { Err(Error::Busy) }
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
        self.watch.began(version, None, "wait for trainers");
        let mut push = InPush { session: self, ended: false };
        let pushed = push.session.push_to_end(version).await;
        push.ended = true;
        push.session.watch.pushed(&pushed);
        match &pushed {
            Ok(_) => push.session.failed_here = 0,
            Err(Error::Push { .. }) => push.session.failed_here += 1,
            Err(_) => {}
        }
        pushed
    }

    async fn push_to_end(&mut self, version: u64) -> Result<PushReport, Error> {
        let Holder::Here(_) = &self.weights else {
            // The others need not wait for it.
            self.line.leave(Some(WEIGHTS_LOST.to_owned())).await;
            return Err(Error::Broken);
        };
        let whole = std::time::Instant::now();
        let mut stages = Vec::new();
        let mut stage = Stopwatch::start("wait for trainers");
        // Heartbeats tell it until the rails begin to count anew.
        self.line.progress().store(0, Ordering::Relaxed);
        let mut measuring = Duration::ZERO;
        let (push, bank, told) = loop {
            self.ready().await?;
            if let Some(report) = self.decided.take().filter(|report| report.version == version) {
                return Ok(report);
            }
            self.line.say(self.member.begin(version))?;
            const OTHERS: &str = "the other trainers and the inference ranks";
            let mut step = self.next(OTHERS).await?;
            if let Some(TrainerStep::Measure { push, .. }) = step {
                self.watch.named(push);
                measuring = self.measure().await?;
                step = self.next(OTHERS).await?;
            }
            match step {
                Some(TrainerStep::Write { push, bank, told, .. }) => break (push, bank, told),
                Some(TrainerStep::Aborted { reason, .. }) => return Err(Error::Aborted { version, reason }),
                Some(_) => return Err(out_of_turn("the start of the push")),
                // Nothing has been written: the same version again.
                None => {}
            }
        };
        stage.next("write", &mut stages);
        self.watch.named(push);
        self.watch.stage("write");
        let (mut outcome, ended) = self.write_out((push, version), bank, told).await?;
        self.tell_rails(&outcome);
        let fences = fences(self.rails.connected(), &outcome.rails);
        let (sums, verified) = outcome.summed.take().map(|Summed { sums, report }| (sums, report)).unzip();
        let result = match (&ended, &outcome.result) {
            (None, Ok(_)) if self.hashes() && sums.is_none() => Err(NOT_HASHED.into()),
            (None, Ok(delivered)) => Ok((delivered.bytes, delivered.writes)),
            (None, Err(failure)) => Err(failure.to_string()),
            (Some(error), _) => Err(error.to_string()),
        };
        let told = self.line.say(self.member.written(result, fences, sums.unwrap_or_default()));
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
        let step = self.next("the commit").await?;
        stages.push(stage.end());
        let write_seconds = outcome.timings.total.as_secs_f64();
        let report = PushReport {
            version,
            bytes,
            writes,
            bytes_gathered: delivered.bytes_gathered,
            refusals: delivered.refusals,
            seconds: whole.elapsed().as_secs_f64(),
            write_seconds,
            gather_seconds: outcome.timings.gather.as_secs_f64(),
            measure_seconds: measuring.as_secs_f64(),
            gb_per_second: gb_per_second(bytes, write_seconds),
            bound_seconds: self.bound_seconds,
            bound_fraction: if write_seconds > 0.0 { self.bound_seconds / write_seconds } else { 0.0 },
            rails: self
                .rails
                .connected()
                .iter()
                .zip(outcome.rails)
                .map(|(rail, used)| RailReport::new(&rail.name, used))
                .collect(),
            stages,
            verified,
        };
        match step {
            Some(TrainerStep::Committed { unconfirmed, .. }) if unconfirmed.is_empty() => {
                self.committed = version;
                self.behind.clear();
                Ok(report)
            }
            Some(TrainerStep::Committed { unconfirmed, .. }) => {
                self.committed = version;
                self.behind.clone_from(&unconfirmed);
                Err(Error::Unconfirmed { version, members: unconfirmed })
            }
            Some(TrainerStep::Aborted { reason, .. }) => Err(Error::Aborted { version, reason }),
            Some(_) => Err(out_of_turn("the commit")),
            None => self.learn(report).await,
        }
    }

    /// Joins again to hear whether what this rank has written was committed.
    async fn learn(&mut self, report: PushReport) -> Result<PushReport, Error> {
        let version = report.version;
        self.undecided = Some(report);
        self.ready().await?;
        let lost = || Error::Aborted { version, reason: LOST.to_owned() };
        self.decided.take().ok_or_else(lost)
    }

    /// What the controller has this trainer do next. `stage` is what it waits for, for errors. `None`: join again, and then
    /// whatever was to be done.
    pub(super) async fn next(&mut self, stage: &'static str) -> Result<Option<TrainerStep>, Error> {
        next(&mut self.line, &mut self.member, stage).await
    }

    /// Lends the weights to the rails and waits until they are back, whatever the controller says meanwhile: that comes with
    /// the outcome, where it ended the push.
    async fn write_out(
        &mut self,
        (push, version): (PushId, u64),
        bank: Bank,
        told: Vec<f32>,
    ) -> Result<(Written, Option<Error>), Error> {
        let ((reply, mut written), (back, lent)) = (oneshot::channel(), oneshot::channel());
        let Rails::Connected(Connected { pusher, outgoing, .. }) = &self.rails else {
            return Err(Error::Broken);
        };
        let weights = self.weights.lend(lent)?;
        pusher.set_attempt(attempt(push, bank));
        pusher.push((push, told), weights, outgoing.as_ref(), move |weights, written| {
            drop(back.send(weights));
            drop(reply.send(written));
        });
        let mut ended: Option<Error> = None;
        let written = loop {
            tokio::select! {
                written = &mut written => break written,
                step = next(&mut self.line, &mut self.member, "its own writes"), if ended.is_none() => {
                    let error = match step {
                        Ok(Some(TrainerStep::Stop { reason })) => Error::Aborted { version, reason },
                        Ok(None) => Error::Aborted { version, reason: LOST.to_owned() },
                        Ok(Some(_)) => out_of_turn("an abort or nothing"),
                        Err(error) => error,
                    };
                    pusher.abort(error.to_string());
                    ended = Some(error);
                }
            }
        };
        self.weights.take_back().await;
        written.map(|written| (written, ended)).map_err(|_| Error::Broken)
    }

    /// Finds the magnitudes that the plan has this rank report, and says them; how long that took. What the controller says
    /// meanwhile can wait: it is a moment.
    async fn measure(&mut self) -> Result<Duration, Error> {
        let began = std::time::Instant::now();
        let ((reply, measured), (back, lent)) = (oneshot::channel(), oneshot::channel());
        let Rails::Connected(Connected { pusher, .. }) = &self.rails else {
            return Err(Error::Broken);
        };
        pusher.measure(self.weights.lend(lent)?, move |weights, result| {
            drop(back.send(weights));
            drop(reply.send(result));
        });
        let measured = measured.await;
        self.weights.take_back().await;
        self.line.say(self.member.measured(measured.map_err(|_| Error::Broken)?))?;
        Ok(began.elapsed())
    }

    /// For whoever watches: logs, metrics, and observers of the controller.
    fn tell_rails(&mut self, outcome: &Written) {
        let rails = || self.rails.connected().iter().map(|rail| rail.name.as_str()).zip(&outcome.rails);
        let seconds = outcome.timings.total.as_secs_f64();
        let told = rails().take(RAILS_TOLD_MAX);
        let told = told.map(|(name, used)| RailStatus::new(name, used.bytes, seconds, used.closed.is_none()));
        // A queue without room is met again by what has to be said.
        let _ = self.line.send(ToController::Rails { rails: told.collect() });
        self.watch.rails(rails(), outcome.result.as_ref().map_or(0, |delivered| delivered.refusals));
    }

    /// Whether the job verifies what is sent.
    fn hashes(&self) -> bool {
        matches!(&self.rails, Rails::Connected(connected) if connected.outgoing.is_some())
    }

    /// Leaves the job in good order. The inference ranks go on serving what they have; when all trainers have left,
    /// they are told.
    pub async fn leave(mut self) {
        self.line.leave(None).await;
        self.close_rails().await;
    }

    /// Leaves because this trainer cannot go on; the others are told why. What becomes of the job is its policy.
    pub async fn give_up_job(mut self, reason: String) {
        self.line.leave(Some(reason)).await;
    }

    /// Bytes of one push of this rank that have been delivered so far, for a progress bar.
    pub fn progress(&self) -> Arc<AtomicU64> {
        self.line.progress()
    }
}

async fn next(
    line: &mut Line,
    member: &mut TrainerMember,
    stage: &'static str,
) -> Result<Option<TrainerStep>, Error> {
    loop {
        let Some(message) = line.receive(stage).await? else { return Ok(None) };
        match member.handle(message).map_err(RendezvousError::from)? {
            Some(TrainerStep::Refused { reason }) => return Err(RendezvousError::Refused { reason }.into()),
            Some(TrainerStep::Regroup { reason }) => {
                tracing::info!(reason, "joining again");
                return Ok(None);
            }
            Some(step) => return Ok(Some(step)),
            None => {}
        }
    }
}
