//! What a session tells of its pushes as they go: log lines with the attempt's name, and metrics.
//!
//! A session calls these where something happens; nothing here can fail, wait or change what the session does. An attempt that
//! ends without a commit is a warning, with the stage in which it ended; what goes well is told for those who ask. A rail
//! that was given up is told once.

use std::collections::BTreeSet;

use rendezvous::{PushId, RendezvousError};
use xfer_exec::{Failure, RailUse};
use xfer_plan::Rank;

use crate::error::Error;
use crate::metrics::{Ended, Metrics, RankMetrics};
use crate::report::{PushReport, VersionReport};

/// See the module.
pub(crate) struct Watch {
    rank: Rank,
    metrics: RankMetrics,
    attempt: Option<Attempt>,
    /// The version of which an attempt failed last.
    failed: Option<u64>,
    /// Rails, by number, that were told to be given up: all of it, or the way to one inference rank.
    losses: BTreeSet<(usize, Option<Rank>)>,
}

/// An attempt under way.
#[derive(Clone, Copy)]
struct Attempt {
    version: u64,
    /// Its name, from the moment that the controller has given it one.
    push: Option<PushId>,
    stage: &'static str,
}

impl Watch {
    pub(crate) fn new(metrics: &Metrics, rank: Rank) -> Self {
        let metrics = metrics.rank(rank);
        Self { rank, metrics, attempt: None, failed: None, losses: BTreeSet::new() }
    }

    /// Every rank of the job is ready.
    pub(crate) fn connected<'a>(&self, rails: impl Iterator<Item = &'a str>) {
        tracing::info!(rank = %self.rank, "connected");
        for (number, name) in rails.enumerate() {
            self.metrics.rail(number, name, true, 0, 0);
        }
    }

    /// An attempt at this version begins.
    pub(crate) fn began(&mut self, version: u64, push: Option<PushId>, stage: &'static str) {
        if self.failed == Some(version) {
            self.metrics.retries.inc();
        }
        self.attempt = Some(Attempt { version, push, stage });
        self.tell_stage();
    }

    /// The attempt has a name.
    pub(crate) fn named(&mut self, push: PushId) {
        if let Some(attempt) = &mut self.attempt {
            attempt.push = Some(push);
        }
    }

    /// The attempt's next stage begins.
    pub(crate) fn stage(&mut self, stage: &'static str) {
        if let Some(attempt) = &mut self.attempt {
            attempt.stage = stage;
        }
        self.tell_stage();
    }

    fn tell_stage(&self) {
        if let Some(Attempt { version, push, stage }) = self.attempt {
            let push = push.map(tracing::field::display);
            tracing::debug!(rank = %self.rank, version, push, stage, "stage begins");
        }
    }

    /// A version is written to an inference rank. `in_place`: to what it serves.
    pub(crate) fn prepared(&mut self, version: u64, push: PushId, in_place: bool) {
        if in_place {
            self.metrics.is_torn();
        }
        self.began(version, Some(push), "write");
    }

    /// What the rails did in the attempt, however that ended.
    pub(crate) fn rails<'a>(&mut self, rails: impl Iterator<Item = (&'a str, &'a RailUse)>, refusals: u64) {
        self.metrics.refused_writes.inc_by(refusals);
        let (version, push) = self.attempt.map(|attempt| (attempt.version, attempt.push)).unzip();
        let push = push.flatten();
        for (number, (name, used)) in rails.enumerate() {
            self.metrics.rail(number, name, used.closed.is_none(), used.bytes, used.writes);
            let ways = used.lost.iter().map(|(to, reason)| (Some(Rank::Receiver(*to)), reason));
            for (peer, reason) in used.closed.iter().map(|reason| (None, reason)).chain(ways) {
                if self.losses.insert((number, peer)) {
                    let (push, peer) = (push.map(tracing::field::display), peer.map(tracing::field::display));
                    tracing::warn!(
                        rank = %self.rank, version, push, rail = name, peer, reason, "gave up a rail"
                    );
                }
            }
        }
    }

    /// A trainer's push is over.
    pub(crate) fn pushed(&mut self, pushed: &Result<PushReport, Error>) {
        match pushed {
            Ok(report) => {
                self.committed(report.version, report.bytes, report.seconds);
                self.metrics.committed(report.version, report.bytes, report.seconds, &report.stages);
            }
            Err(error) => self.failed(error),
        }
    }

    /// An inference rank serves a version.
    pub(crate) fn served(&mut self, report: &VersionReport) {
        self.committed(report.version, report.bytes, report.seconds);
        self.metrics.committed(report.version, report.bytes, report.seconds, &report.stages);
    }

    fn committed(&mut self, version: u64, bytes: u64, seconds: f64) {
        let push = self.attempt.take().and_then(|attempt| attempt.push).map(tracing::field::display);
        self.failed = None;
        tracing::info!(rank = %self.rank, version, push, bytes, seconds, "committed");
    }

    /// The attempt, if there is one, is over without a commit.
    pub(crate) fn failed(&mut self, error: &Error) {
        if is_deadline(error) {
            self.metrics.deadlines.inc();
        }
        let ended = match error {
            Error::Aborted { .. } => Ended::Aborted,
            // The version is there; who did not confirm it is lost.
            Error::Unconfirmed { version, .. } => {
                self.metrics.knows(*version);
                Ended::Committed
            }
            _ => Ended::Failed,
        };
        self.end(ended, peer(error), &error.to_string());
    }

    /// The attempt was dropped in the middle.
    pub(crate) fn given_up(&mut self, reason: &'static str) {
        self.end(Ended::Failed, None, reason);
    }

    fn end(&mut self, ended: Ended, peer: Option<Rank>, error: &str) {
        let Some(Attempt { version, push, stage }) = self.attempt.take() else { return };
        self.failed = (ended != Ended::Committed).then_some(version);
        self.metrics.ended(ended);
        let (push, peer) = (push.map(tracing::field::display), peer.map(tracing::field::display));
        tracing::warn!(rank = %self.rank, version, push, stage, peer, error, "push failed");
    }
}

/// Whether a deadline of this rank has passed.
fn is_deadline(error: &Error) -> bool {
    matches!(
        error,
        Error::Rendezvous(RendezvousError::Deadline { .. } | RendezvousError::Unreachable { .. })
            | Error::Push { failure: Failure::Deadline { .. } | Failure::Stalled { .. }, .. }
    )
}

/// The inference rank that a trainer's own failure names.
fn peer(error: &Error) -> Option<Rank> {
    let Error::Push { failure, .. } = error else { return None };
    match failure {
        Failure::Write { to, .. }
        | Failure::Uncertain { to, .. }
        | Failure::Deadline { to, .. }
        | Failure::Closed { to } => Some(Rank::Receiver(*to)),
        _ => None,
    }
}
