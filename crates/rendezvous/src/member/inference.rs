//! An inference rank's half. See the table of [`crate::member`].

use xfer_plan::ParamId;

use super::{Admission, AdmissionStep, Attempt, Served, Unexpected, report};
use crate::protocol::{
    Bank, Commit, Fence, Holds, Join, Planned, PlannedPart, PushId, ToController, ToMember,
};
use crate::verify::{Checksum, ParamSum};

/// What an inference rank does next. A step that asks for an answer gets it before the next message is handled.
#[derive(Debug)]
pub enum InferenceStep {
    /// Take this part of the plan and connect to those that it passes bytes on to, then [`InferenceMember::ready`]. Where
    /// [`InferenceMember::take_missed_commit`] has a version, make that visible before.
    Planned(Box<Planned>),
    /// Every rank is ready.
    Started,
    /// Close these rails, then [`InferenceMember::prepared`].
    Prepare {
        /// The attempt.
        push: PushId,
        /// Its version.
        version: u64,
        /// The rails, as its endpoint numbers them.
        close: Vec<u16>,
        /// Which arena of its peers it passes bytes on to: see [`Peer::bank`](crate::Peer::bank).
        bank: Bank,
        /// Which of its own arenas is written to, where it has two.
        own: Bank,
    },
    /// Close these rails, then [`InferenceMember::fenced`].
    Fence {
        /// The attempt.
        push: PushId,
        /// The rails, as its endpoint numbers them.
        close: Vec<u16>,
    },
    /// Compare these checksums with those of the bytes that are here, then [`InferenceMember::verified`]. Other messages may
    /// be left unread meanwhile.
    Verify {
        /// The attempt.
        push: PushId,
        /// Its version.
        version: u64,
        /// Of every parameter that is verified, what was sent of it to this rank.
        sums: Vec<(ParamId, Checksum)>,
    },
    /// Make the version visible, then [`InferenceMember::committed`].
    Commit {
        /// The attempt.
        push: PushId,
        /// Its version.
        version: u64,
    },
    /// The attempt is over without a commit. A rank that passes bytes on stops, then [`InferenceMember::relayed`].
    Aborted {
        /// The version that was not committed.
        version: u64,
        /// Who failed at what.
        reason: String,
    },
    /// The job has lost a rank, or one has come back: close all rails, then [`InferenceMember::rejoin`].
    Regroup {
        /// Who was lost or came back.
        reason: String,
    },
    /// All trainers have left: no version comes any more.
    Finished,
    /// The controller has ended the job, or refused this rank. Nothing further comes.
    Refused {
        /// Why.
        reason: String,
    },
}

enum State {
    /// Has to join again.
    Out,
    Joining(Admission),
    /// For the controller: between pushes, or while one is under way.
    Waiting,
    Preparing(Attempt),
    Fencing(PushId),
    Verifying(PushId),
    Committing(Attempt),
}

/// An inference rank's half of the protocol.
pub struct InferenceMember {
    state: State,
    /// Prepared for, and not over.
    attempt: Option<Attempt>,
    /// Whether the plan has it pass bytes on.
    relays: bool,
    /// The attempt whose bytes it passes on.
    relaying: Option<PushId>,
    /// Whether versions arrive beside the one that is served.
    stages: bool,
    served: Served,
    /// The commit that brought the bytes that are served.
    holds: Option<Commit>,
    /// The version of an attempt whose end this rank had not heard of.
    missed: Option<u64>,
    /// Its arenas have changed places since it joined with them: it had missed a commit.
    turned: bool,
    committed: u64,
}

impl InferenceMember {
    /// An inference rank that asks to take part, and what it says. `stages`: versions arrive beside the one that is served, so
    /// that a push that fails leaves it whole.
    pub fn join(join: Join, stages: bool) -> (Self, ToController) {
        let mut member = Self::new(stages);
        let message = member.rejoin(join);
        (member, message)
    }

    /// An inference rank that has not joined. For `stages` see [`InferenceMember::join`].
    pub fn new(stages: bool) -> Self {
        Self {
            state: State::Out,
            attempt: None,
            relays: false,
            relaying: None,
            stages,
            served: Served::Version(0),
            holds: None,
            missed: None,
            turned: false,
            committed: 0,
        }
    }

    /// Whether it has to join before anything else.
    pub fn is_out(&self) -> bool {
        matches!(self.state, State::Out)
    }

    /// Whether it was prepared for a push and has not heard how that ended.
    pub fn is_undecided(&self) -> bool {
        self.attempt.is_some()
    }

    /// It joins, or joins again: after [`InferenceStep::Regroup`], or over a new connection where the old one was lost. Every rail of
    /// before is closed.
    pub fn rejoin(&mut self, mut join: Join) -> ToController {
        self.state = State::Joining(Admission::Joining);
        self.relaying = None;
        join.stages = self.stages;
        let serves = self.holds.filter(|_| self.served.is_whole());
        join.holds = match (self.attempt, serves) {
            (Some(Attempt { push, version }), serves) => {
                Holds::Undecided { attempt: Commit { version, push }, serves }
            }
            (None, Some(commit)) => Holds::Version(commit),
            (None, None) if matches!(self.served, Served::Torn(_)) => Holds::Torn,
            (None, None) => Holds::Nothing,
        };
        ToController::Join(Box::new(join))
    }

    /// The version whose commit this rank had not heard of when it lost the connection, and has since. Once.
    pub fn take_missed_commit(&mut self) -> Option<u64> {
        self.missed.take()
    }

    /// Which version the bytes are.
    pub fn served(&self) -> Served {
        self.served
    }

    /// The last version that this rank knows to be committed; 0 at the start.
    pub fn committed_version(&self) -> u64 {
        self.committed
    }

    /// It is ready for its part of the plan.
    pub fn ready(&mut self) -> Option<ToController> {
        match &mut self.state {
            State::Joining(admission) => admission.ready(),
            _ => None,
        }
    }

    /// It has closed the rails that it was told to, or why not. Where it has, the bytes are of no version from here on, and
    /// it passes on what arrives, if the plan has it do so: until [`InferenceMember::relayed`].
    pub fn prepared(&mut self, closed: Result<(), String>) -> Option<ToController> {
        let State::Preparing(attempt) = self.state else { return None };
        self.state = State::Waiting;
        let push = attempt.push;
        if let Err(reason) = closed {
            return Some(ToController::Failed { push, reason, fences: Vec::new() });
        }
        if !self.stages {
            self.served = Served::Torn(attempt.version);
        }
        self.attempt = Some(attempt);
        self.relaying = self.relays.then_some(push);
        Some(ToController::Prepared { push })
    }

    /// It has closed the rails that it was told to, or why not.
    pub fn fenced(&mut self, closed: Result<(), String>) -> Option<ToController> {
        let State::Fencing(push) = self.state else { return None };
        self.state = State::Waiting;
        Some(match closed {
            Ok(()) => ToController::Fenced { push },
            Err(reason) => ToController::Failed { push, reason, fences: Vec::new() },
        })
    }

    /// Its bytes are those that were sent, or which are not.
    pub fn verified(&mut self, compared: Result<(), String>) -> Option<ToController> {
        let State::Verifying(push) = self.state else { return None };
        self.state = State::Waiting;
        Some(match compared {
            Ok(()) => ToController::Verified { push },
            Err(reason) => ToController::Failed { push, reason, fences: Vec::new() },
        })
    }

    /// The end of what it passes on: bytes and writes delivered, or why not all were. `fences`: where bytes may still be
    /// on their way that it has given up on. `sums`: of what it passed on, where the job verifies. Owed once for every
    /// attempt that it prepared for, also when that is over.
    pub fn relayed(
        &mut self,
        result: Result<(u64, u64), String>,
        fences: Vec<Fence>,
        sums: Vec<ParamSum>,
    ) -> Option<ToController> {
        let push = self.relaying.take()?;
        Some(report(push, result, fences, sums))
    }

    /// The version is visible.
    pub fn committed(&mut self) -> Option<ToController> {
        let State::Committing(Attempt { push, version }) = self.state else { return None };
        self.state = State::Waiting;
        self.serve(Commit { version, push });
        Some(ToController::Committed { push })
    }

    fn serve(&mut self, commit: Commit) {
        (self.served, self.committed) = (Served::Version(commit.version), commit.version);
        self.holds = Some(commit);
    }

    /// What the controller knows of the commits so far.
    fn catch_up(&mut self, committed: Option<Commit>) {
        let attempt = self.attempt.take().map(|Attempt { push, version }| Commit { version, push });
        self.turned = attempt.is_some() && attempt == committed;
        let Some(commit) = committed else { return };
        self.committed = commit.version;
        if self.turned {
            self.serve(commit);
            self.missed = Some(commit.version);
        } else if self.holds.is_none() && !matches!(self.served, Served::Torn(_)) {
            // It has what was loaded at the start, while the others serve a version.
            self.served = Served::Behind(commit.version);
        }
    }

    /// Takes what the controller says. `None`: nothing to do.
    pub fn handle(&mut self, message: ToMember) -> Result<Option<InferenceStep>, Unexpected> {
        match (&mut self.state, message) {
            (_, ToMember::Heartbeat) => Ok(None),
            (_, ToMember::Refused { reason }) => Ok(Some(InferenceStep::Refused { reason })),
            (State::Out | State::Waiting | State::Joining(_), ToMember::Regroup { reason }) => {
                self.state = State::Out;
                Ok(Some(InferenceStep::Regroup { reason }))
            }
            (State::Out | State::Joining(_), ToMember::Finished) => Ok(Some(InferenceStep::Finished)),
            (State::Joining(admission), message) => match admission.handle(message)? {
                AdmissionStep::Planned(planned) => {
                    let PlannedPart::Inference { relay, .. } = &planned.part else {
                        let (expected, found) = ("an inference rank's part of the plan", "a trainer's");
                        return Err(Unexpected { expected, found });
                    };
                    self.relays = !relay.plan.ops.is_empty();
                    self.catch_up(planned.committed);
                    Ok(Some(InferenceStep::Planned(planned)))
                }
                AdmissionStep::Started => {
                    self.state = State::Waiting;
                    Ok(Some(InferenceStep::Started))
                }
            },
            (State::Waiting, message) => self.told(message),
            (_, other) => Err(Unexpected::new("its own answer", &other)),
        }
    }

    /// Takes what the controller says to a rank that owes it no answer.
    fn told(&mut self, message: ToMember) -> Result<Option<InferenceStep>, Unexpected> {
        let over = self.attempt.is_none() && self.relaying.is_none();
        match message {
            ToMember::Prepare { push, version, fence, bank } if over => {
                self.state = State::Preparing(Attempt { push, version });
                let own = if self.turned { bank.turned() } else { bank };
                Ok(Some(InferenceStep::Prepare { push, version, close: fence, bank, own }))
            }
            ToMember::Fence { push, rails } => {
                self.state = State::Fencing(push);
                Ok(Some(InferenceStep::Fence { push, close: rails }))
            }
            ToMember::Verify { push, sums } => {
                let Some(attempt) = self.attempt.filter(|attempt| attempt.push == push) else {
                    return Ok(None);
                };
                self.state = State::Verifying(push);
                Ok(Some(InferenceStep::Verify { push, version: attempt.version, sums }))
            }
            ToMember::Commit { push, .. } => {
                let Some(attempt) = self.attempt.take_if(|attempt| attempt.push == push) else {
                    return Ok(None);
                };
                self.state = State::Committing(attempt);
                Ok(Some(InferenceStep::Commit { push, version: attempt.version }))
            }
            ToMember::Abort { version, reason } => {
                self.attempt = None;
                Ok(Some(InferenceStep::Aborted { version, reason }))
            }
            ToMember::Finished => Ok(Some(InferenceStep::Finished)),
            other if over => Err(Unexpected::new("a version", &other)),
            other => Err(Unexpected::new("the end of the push", &other)),
        }
    }
}
