//! Versions: what an inference rank does between the beginning of a push and its end.

use std::sync::Arc;
use std::time::Duration;

use rendezvous::member::{InferenceMember, InferenceStep, Served};
use rendezvous::{Bank, PushId};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use xfer_plan::{DestinationParam, Rank, ReceiverRank};

use super::ParamId;
use super::joining::Exposed;
use super::onward::{Onward, PushOnward};
use crate::arena::Arenas;
use crate::config::SessionConfig;
use crate::error::Error;
use crate::hooks::Hooks;
use crate::line::{Line, out_of_turn};
use crate::report::{RelayReport, Span, Stopwatch, VerifyReport, VersionReport, gb_per_second};
use crate::verify::{Compared, Incoming};
use crate::watch::Watch;

const NOT_COMPARED: &str = "defect: what arrived could not be hashed";

pub(super) const LOST: &str = "this rank lost the controller, or was given up by it";

/// A push under way, for its report.
pub(super) struct Push {
    pub(super) version: u64,
    whole: std::time::Instant,
    stage: Stopwatch,
    stages: Vec<Span>,
    verified: Option<VerifyReport>,
    pub(super) passed_on: Option<RelayReport>,
}

/// See [`InferenceSession::showing`].
pub(super) struct Showing {
    version: u64,
    /// The controller waits for a word of it.
    confirm: bool,
    copying: Option<JoinHandle<Result<Arenas, Error>>>,
    began: std::time::Instant,
}

/// An inference rank that is part of a job.
///
/// Dropping it closes the rails before the arena is freed.
pub struct InferenceSession {
    pub(super) config: SessionConfig,
    pub(super) line: Line,
    pub(super) member: InferenceMember,
    // Field order is teardown order: nobody can write to the arena any more when it goes.
    pub(super) exposed: Exposed,
    /// Passes on what arrives.
    pub(super) onward: Onward,
    /// Under way; a call that is dropped in the middle leaves it to the next.
    pub(super) push_onward: Option<Arc<PushOnward>>,
    /// Pushes in a row that failed over the rails by which it passes on.
    pub(super) failed_onward: u32,
    /// It is written to over libfabric, or was before it closed its rails.
    pub(super) has_rails: bool,
    pub(super) arenas: Arenas,
    /// Memory is put in the place of what trainers may still write to; a call that is dropped in the middle leaves it to the next.
    pub(super) renewing: Option<JoinHandle<Result<Arenas, Error>>>,
    pub(super) hooks: Hooks,
    pub(super) params: Vec<DestinationParam>,
    pub(super) push: Option<Push>,
    /// It did not know when it joined whether its bytes are a committed version.
    pub(super) was_undecided: bool,
    /// A push ended without a commit that this rank had lost sight of.
    pub(super) lost_sight_of: Option<Error>,
    /// A version that is committed, and not yet what is served; a call that is dropped in the middle leaves it to the next.
    pub(super) showing: Option<Showing>,
    /// What to hash, where the job verifies.
    pub(super) incoming: Option<Incoming>,
    /// Under way; a call that is dropped in the middle leaves it to the next.
    pub(super) verifying: Option<oneshot::Receiver<Compared>>,
    last: Option<VersionReport>,
    pub(super) watch: Watch,
    pub(super) bytes_per_push: u64,
    /// The rail's thread polls while a version is in flight.
    pub(super) busy_poll: bool,
}

impl InferenceSession {
    pub(super) fn new(
        config: SessionConfig,
        params: Vec<DestinationParam>,
        arenas: Arenas,
        hooks: Hooks,
    ) -> Result<Self, Error> {
        Ok(Self {
            line: Line::new(&config)?,
            member: InferenceMember::new(arenas.mode().stages()),
            exposed: Exposed::default(),
            onward: Onward::Nothing,
            push_onward: None,
            failed_onward: 0,
            has_rails: false,
            arenas,
            renewing: None,
            hooks,
            params,
            push: None,
            was_undecided: false,
            lost_sight_of: None,
            showing: None,
            incoming: None,
            verifying: None,
            last: None,
            watch: Watch::new(&config.metrics, Rank::Receiver(ReceiverRank(config.rank))),
            bytes_per_push: 0,
            busy_poll: false,
            config,
        })
    }

    /// Which version the bytes are.
    pub fn served(&self) -> Served {
        match &self.showing {
            Some(showing) => Served::Torn(showing.version),
            None => self.member.served(),
        }
    }

    /// The parameters in the order of their ids: names, shapes, and offsets in the arena.
    pub fn params(&self) -> &[DestinationParam] {
        &self.params
    }

    /// Waits until `version` or a newer one is served, taking part in the pushes that lead there. In place the weights are of no
    /// version while a push runs, so stop reading them before this call, or in [`Hooks::before_change`].
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
        let is_there = |last: &&VersionReport| last.version >= version && self.push.is_none();
        if let Some(last) = self.last.as_ref().filter(is_there)
            && self.served() == Served::Version(last.version)
        {
            return Ok(last.clone());
        }
        let until = at_most.and_then(|at_most| tokio::time::Instant::now().checked_add(at_most));
        loop {
            // Not before what it passes on is over: until then the next push waits for this rank.
            if self.push_onward.is_none() && self.lost_sight_of.is_some() {
                let rank = self.rank();
                self.line.give_up_dead_rails((&self.config, rank), self.failed_onward).await?;
                if let Some(error) = self.lost_sight_of.take() {
                    return Err(error);
                }
            }
            match self.shown().await? {
                Some(report) if report.version >= version => return Ok(report),
                _ => {}
            }
            if let Some(verifying) = &mut self.verifying {
                let compared = verifying.await.unwrap_or_else(|_| Err(NOT_COMPARED.into()));
                self.verifying = None;
                self.compared(compared)?;
            }
            let pushing = self.push.is_some() || self.push_onward.is_some();
            let onward = PushOnward::over(self.push_onward.clone());
            let step = async {
                tokio::select! {
                    step = self.step("a version") => Some(step),
                    () = onward => None,
                }
            };
            let step = match at_most.zip(until) {
                Some((at_most, until)) if !pushing => match tokio::time::timeout_at(until, step).await {
                    Ok(step) => step,
                    Err(_) => {
                        let served = self.served().to_string();
                        return Err(Error::NotYet { wanted: version, waited: at_most, served });
                    }
                },
                _ => step.await,
            };
            let Some(step) = step else {
                self.passed_on()?;
                continue;
            };
            let step = step.inspect_err(|error| {
                self.receive_bytes(false);
                self.watch.failed(error);
            })?;
            let Some(step) = step else { continue };
            match step {
                InferenceStep::Started => {}
                InferenceStep::Prepare { push, version, close, bank, own } => {
                    let prepared = self.prepare((push, version), &close, bank, own);
                    // From here on a byte of what is written may change at any time.
                    // Where it cannot be prepared, the push is aborted, which this rank hears with the others.
                    self.line.say(self.member.prepared(prepared))?;
                }
                InferenceStep::Fence { close, .. } => {
                    let closed = self.close_rails_given_up(&close);
                    self.line.say(self.member.fenced(closed))?;
                }
                InferenceStep::Verify { push, version, sums } => {
                    self.receive_bytes(false);
                    if let Some(Push { stage, stages, .. }) = &mut self.push {
                        stage.next("verify", stages);
                        self.watch.stage("verify");
                    }
                    match (&self.incoming, self.flush()) {
                        (Some(incoming), Ok(())) => {
                            self.verifying =
                                Some(incoming.start((push, version), sums, self.arenas.written()));
                        }
                        (_, Err(error)) => self.compared(Err(error.to_string()))?,
                        (None, _) => self.compared(Err(NOT_COMPARED.into()))?,
                    }
                }
                InferenceStep::Commit { version, .. } => {
                    self.receive_bytes(false);
                    self.show(version, true).await?;
                }
                InferenceStep::Aborted { version, reason } => {
                    self.receive_bytes(false);
                    self.push = None;
                    self.stop_passing_on(&reason);
                    self.hooks.aborted(version, &reason);
                    let error = Error::Aborted { version, reason };
                    self.watch.failed(&error);
                    self.lost_sight_of = Some(error);
                }
                InferenceStep::Finished => {
                    return Err(Error::Finished { committed: self.member.committed_version() });
                }
                _ => return Err(out_of_turn("a version")),
            }
        }
    }

    /// Gets ready for bytes of a push; and to pass them on, where it does that.
    fn prepare(
        &mut self,
        (push, version): (PushId, u64),
        close: &[u16],
        bank: Bank,
        own: Bank,
    ) -> Result<(), String> {
        self.close_rails_given_up(close)?;
        let in_place = !self.arenas.mode().stages();
        if in_place {
            self.hooks.stop(version)?;
        }
        // From here on it is told of the end, also where it does not get ready.
        let (stage, whole) = (Stopwatch::start("write"), std::time::Instant::now());
        let (stages, verified, passed_on) = (Vec::new(), None, None);
        self.push = Some(Push { version, whole, stage, stages, verified, passed_on });
        let unwritten = self.arenas.clone();
        self.arenas.begin(own.index());
        if let Err(reason) = self.pass_on(push, bank) {
            // Nobody writes to it then: what is served stays what it is.
            self.arenas = unwritten;
            return Err(reason);
        }
        self.receive_bytes(true);
        self.watch.prepared(version, push, in_place);
        Ok(())
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
        self.line.say(self.member.verified(result))
    }

    fn close_rails_given_up(&self, rails: &[u16]) -> Result<(), String> {
        let failed = |reason| format!("{reason} (a trainer gave up on it)");
        rails.iter().try_for_each(|rail| self.exposed.close_rail(usize::from(*rail)).map_err(failed))
    }

    /// Between the beginning of a push and its end the rail's thread has something to do.
    fn receive_bytes(&self, on: bool) {
        if self.busy_poll {
            self.exposed.busy_poll(on);
        }
    }

    /// Begins to make a committed version what is served, and to `confirm` that when it is.
    pub(super) async fn show(&mut self, version: u64, confirm: bool) -> Result<(), Error> {
        let began = std::time::Instant::now();
        // In place it has been stopped since the push began; and it may go on while something is copied beside what it serves.
        let stops = self.arenas.mode().stages() && !self.arenas.copies_beside();
        let stopped = if stops { self.hooks.stop(version) } else { Ok(()) };
        let flushed = self.flush();
        let showing = self.showing.insert(Showing { version, confirm, copying: None, began });
        if let Err(reason) = stopped {
            return Err(self.hook_failed(version, reason).await);
        }
        if let Err(error) = flushed {
            return Err(self.cannot_show(error).await);
        }
        let arenas = self.arenas.clone();
        if arenas.copies() {
            showing.copying = Some(tokio::task::spawn_blocking(move || arenas.commit()));
        } else {
            self.arenas = arenas.commit()?;
        }
        Ok(())
    }

    /// Waits until what is to be served is.
    async fn shown(&mut self) -> Result<Option<VersionReport>, Error> {
        let Some(Showing { version, confirm, copying, began }) = &mut self.showing else { return Ok(None) };
        let (version, confirm, mut began) = (*version, *confirm, *began);
        // The engine would not stop for it: what is served is still what it was, and this rank has left.
        if self.line.is_over() {
            return Err(Error::Broken);
        }
        if let Some(copying) = copying {
            let copied = copying.await.map_err(|error| std::io::Error::other(error.to_string()).into());
            let arenas = match copied.flatten() {
                Ok(arenas) => arenas,
                Err(error) => return Err(self.cannot_show(error).await),
            };
            if arenas.copies_beside() {
                began = std::time::Instant::now();
                if let Err(reason) = self.hooks.stop(version) {
                    return Err(self.hook_failed(version, reason).await);
                }
            }
            self.arenas = arenas;
        }
        self.showing = None;
        let confirms = if confirm { self.member.committed() } else { None };
        if let Err(reason) = self.hooks.go_on(version, self.arena_ptr()) {
            return Err(self.hook_failed(version, reason).await);
        }
        if confirm {
            self.line.say(confirms)?;
        }
        Ok(self.push.take().map(|push| self.commits(push, began)))
    }

    /// Makes what NICs have written to this rank visible, where there are any.
    fn flush(&self) -> Result<(), Error> {
        if self.has_rails { self.arenas.written().flush() } else { Ok(()) }
    }

    /// The decision was taken, and its bytes are not what is served: this rank is lost to the job.
    async fn cannot_show(&mut self, error: Error) -> Error {
        self.line.leave(Some(error.to_string())).await;
        error
    }

    /// The decision was taken, and the engine cannot follow it: this rank is lost to the job.
    async fn hook_failed(&mut self, version: u64, reason: String) -> Error {
        let error = Error::Hook { version, reason };
        self.line.leave(Some(error.to_string())).await;
        error
    }

    /// The bytes are those of this push, and what was served before is not since `shown_from` at least.
    fn commits(&mut self, push: Push, shown_from: std::time::Instant) -> VersionReport {
        let report = self.report(push, shown_from);
        self.watch.served(&report);
        self.last = Some(report.clone());
        report
    }

    fn report(&self, push: Push, shown_from: std::time::Instant) -> VersionReport {
        let seconds = push.whole.elapsed().as_secs_f64();
        let stages = self.arenas.mode().stages();
        let pause_seconds = if stages { shown_from.elapsed().as_secs_f64() } else { seconds };
        let bytes = self.bytes_per_push;
        VersionReport {
            version: push.version,
            bytes,
            seconds,
            pause_seconds,
            gb_per_second: gb_per_second(bytes, seconds),
            stages: push.stages.into_iter().chain([push.stage.end()]).collect(),
            verified: push.verified,
            passed_on: push.passed_on,
        }
    }

    /// Copies bytes of a parameter, from `offset` of it on.
    ///
    /// # Errors
    ///
    /// [`Error::Torn`] when the bytes are of no version, [`Error::Range`] outside the parameter.
    pub fn read(&self, id: ParamId, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        match self.served() {
            Served::Version(_) => {}
            Served::Torn(version) => return Err(Error::Torn { version }),
            Served::Behind(version) => return Err(Error::Behind { version }),
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
        self.arenas.served().read(param.offset + offset, into)
    }

    /// The base address of what is served, for an engine that reads the weights where they are: parameter `i` is at
    /// `params()[i].offset` from it. On a GPU it is an address of that GPU. Under [`CommitMode::Staged`](crate::CommitMode::Staged)
    /// every commit changes it; otherwise it stays the same until the session is dropped.
    pub fn arena_ptr(&self) -> *mut u8 {
        self.arenas.served().as_ptr()
    }

    /// Leaves the job. While trainers are in it, they have lost this rank: what becomes of the job is its policy.
    pub async fn leave(mut self) {
        self.line.leave(None).await;
    }

    /// Leaves because this rank cannot go on; the others are told why. What becomes of the job is its policy.
    pub async fn give_up_job(mut self, reason: String) {
        self.line.leave(Some(reason)).await;
    }
}
