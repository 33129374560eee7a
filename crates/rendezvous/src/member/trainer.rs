//! A trainer's half. See the table of [`crate::member`].

use xfer_plan::Rank;

use super::{Admission, AdmissionStep, Attempt, Unexpected, report};
use crate::protocol::{Bank, Fence, Holds, Join, Planned, PlannedPart, PushId, ToController, ToMember};
use crate::verify::ParamSum;

/// What a trainer does next.
#[derive(Debug)]
pub enum TrainerStep {
    /// Connect and warm the rails, then [`TrainerMember::ready`].
    Connect(Box<Planned>),
    /// Every rank is ready: [`TrainerMember::begin`] when there is a version.
    Started,
    /// Find the magnitudes that the plan has it report, then [`TrainerMember::measured`]. An attempt that ends meanwhile is over
    /// with [`TrainerStep::Aborted`], and owes no answer.
    Measure {
        /// The attempt.
        push: PushId,
        /// Its version.
        version: u64,
    },
    /// Write everything, then [`TrainerMember::written`].
    Write {
        /// The attempt.
        push: PushId,
        /// Its version.
        version: u64,
        /// Which arena of inference ranks that have two.
        bank: Bank,
        /// The magnitudes that it is told.
        told: Vec<f32>,
    },
    /// The attempt is over while this rank still writes: stop, then [`TrainerMember::written`].
    Stop {
        /// Who failed at what.
        reason: String,
    },
    /// The version is committed.
    Committed {
        /// The version.
        version: u64,
        /// Inference ranks that were lost before they confirmed it.
        unconfirmed: Vec<Rank>,
    },
    /// The attempt is over; the version is not committed.
    Aborted {
        /// The version.
        version: u64,
        /// Who failed at what.
        reason: String,
    },
    /// The job has lost a rank, or one has come back: close all rails, then [`TrainerMember::rejoin`]. An attempt that was
    /// under way is over; [`TrainerStep::Aborted`] or [`TrainerStep::Stop`] has said so before.
    Regroup {
        /// Who was lost or came back.
        reason: String,
    },
    /// The controller has ended the job, or refused this rank. Nothing further comes.
    Refused {
        /// Why.
        reason: String,
    },
}

#[derive(Default)]
enum State {
    /// Has to join, or to join again.
    #[default]
    Out,
    Joining(Admission),
    Idle,
    Begun(u64),
    Measuring(Attempt),
    /// `Magnitudes` was said.
    Measured(Attempt),
    Writing(Attempt),
    Stopping(PushId),
    /// As stopping, and then it has to join again.
    Leaving(PushId),
    /// `Written` was said.
    Deciding(Attempt),
    /// `Failed` was said.
    Failed(u64),
}

/// A trainer's half of the protocol.
#[derive(Default)]
pub struct TrainerMember {
    state: State,
    /// The connection was lost before it heard how the attempt to push this version ended.
    undecided: Option<u64>,
    /// That version, where it turned out to be committed.
    missed: Option<u64>,
}

impl TrainerMember {
    /// A trainer that asks to take part, and what it says.
    pub fn join(join: Join) -> (Self, ToController) {
        let mut member = Self::new();
        let message = member.rejoin(join);
        (member, message)
    }

    /// A trainer that has not joined.
    pub fn new() -> Self {
        Self::default()
    }

    /// It joins, or joins again: after [`TrainerStep::Regroup`], or over a new connection where the old one was lost. Every rail of
    /// before is closed.
    pub fn rejoin(&mut self, mut join: Join) -> ToController {
        self.undecide();
        self.state = State::Joining(Admission::Joining);
        join.holds = Holds::Nothing;
        ToController::Join(Box::new(join))
    }

    /// The version whose commit this rank had not heard of when it lost the connection, and has since. Once. Where there is
    /// none and the plan's `committed` is newer than the version that it waited for, that may have been committed or not: it is
    /// outdated.
    pub fn take_missed_commit(&mut self) -> Option<u64> {
        self.missed.take()
    }

    /// Whether it has said that it wrote everything and has not heard whether that was committed.
    pub fn is_undecided(&self) -> bool {
        matches!(self.state, State::Deciding(_)) || self.undecided.is_some()
    }

    /// Whether it has to join before anything else.
    pub fn is_out(&self) -> bool {
        matches!(self.state, State::Out)
    }

    /// Whether it may begin a version.
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle)
    }

    /// Its rails are connected and warm.
    pub fn ready(&mut self) -> Option<ToController> {
        match &mut self.state {
            State::Joining(admission) => admission.ready(),
            _ => None,
        }
    }

    /// Its weights of `version` are final. Between pushes.
    pub fn begin(&mut self, version: u64) -> Option<ToController> {
        let State::Idle = self.state else { return None };
        self.state = State::Begun(version);
        Some(ToController::Begin { version })
    }

    /// What it has measured, or why it could not.
    pub fn measured(&mut self, result: Result<Vec<f32>, String>) -> Option<ToController> {
        let State::Measuring(attempt) = self.state else { return None };
        let push = attempt.push;
        let (next, message) = match result {
            Ok(magnitudes) => (State::Measured(attempt), ToController::Magnitudes { push, magnitudes }),
            Err(reason) => {
                (State::Failed(attempt.version), ToController::Failed { push, reason, fences: Vec::new() })
            }
        };
        self.state = next;
        Some(message)
    }

    /// The end of its writes: bytes and writes delivered, or why not all were. `fences`: where bytes may still be on
    /// their way that it has given up on. `sums`: of what it sent, where the job verifies.
    pub fn written(
        &mut self,
        result: Result<(u64, u64), String>,
        fences: Vec<Fence>,
        sums: Vec<ParamSum>,
    ) -> Option<ToController> {
        let push = match self.state {
            State::Writing(attempt) => {
                self.state = match result {
                    Ok(_) => State::Deciding(attempt),
                    Err(_) => State::Failed(attempt.version),
                };
                attempt.push
            }
            State::Stopping(push) => {
                self.state = State::Idle;
                push
            }
            State::Leaving(push) => {
                self.state = State::Out;
                push
            }
            _ => return None,
        };
        Some(report(push, result, fences, sums))
    }

    /// The plan that it gets when it joins again says how the attempt ended that it waits for.
    fn undecide(&mut self) {
        if let State::Deciding(Attempt { version, .. }) = self.state {
            self.undecided = Some(version);
        }
    }

    /// Takes what the controller says. `None`: nothing to do.
    pub fn handle(&mut self, message: ToMember) -> Result<Option<TrainerStep>, Unexpected> {
        let (next, step) = match (&mut self.state, message) {
            (_, ToMember::Heartbeat) => return Ok(None),
            (_, ToMember::Refused { reason }) => return Ok(Some(TrainerStep::Refused { reason })),
            // It was given up, and has found out only now.
            (State::Writing(Attempt { push, .. }), ToMember::Regroup { reason }) => {
                (State::Leaving(*push), TrainerStep::Stop { reason })
            }
            (State::Stopping(push), ToMember::Regroup { .. }) => {
                self.state = State::Leaving(*push);
                return Ok(None);
            }
            (_, ToMember::Regroup { reason }) => {
                self.undecide();
                (State::Out, TrainerStep::Regroup { reason })
            }
            (State::Joining(_), ToMember::Abort { version, reason }) => {
                (State::Out, TrainerStep::Aborted { version, reason })
            }
            (State::Joining(admission), message) => match admission.handle(message)? {
                AdmissionStep::Planned(planned) if matches!(planned.part, PlannedPart::Trainer { .. }) => {
                    // In whichever attempt: others may have pushed it again without this rank.
                    let committed = planned.committed.map(|commit| commit.version);
                    self.missed = self.undecided.take().filter(|version| committed == Some(*version));
                    return Ok(Some(TrainerStep::Connect(planned)));
                }
                AdmissionStep::Planned(_) => {
                    let (expected, found) = ("a trainer's part of the plan", "an inference rank's");
                    return Err(Unexpected { expected, found });
                }
                AdmissionStep::Started => (State::Idle, TrainerStep::Started),
            },
            (State::Begun(begun), ToMember::Measure { push, version }) if *begun == version => {
                (State::Measuring(Attempt { push, version }), TrainerStep::Measure { push, version })
            }
            (state, ToMember::Write { push, version, bank, told }) if state.may_write(push, version) => {
                (State::Writing(Attempt { push, version }), TrainerStep::Write { push, version, bank, told })
            }
            (
                State::Begun(version)
                | State::Measuring(Attempt { version, .. })
                | State::Measured(Attempt { version, .. })
                | State::Failed(version),
                ToMember::Abort { reason, .. },
            ) => (State::Idle, TrainerStep::Aborted { version: *version, reason }),
            (State::Writing(attempt), ToMember::Abort { reason, .. }) => {
                (State::Stopping(attempt.push), TrainerStep::Stop { reason })
            }
            (State::Deciding(attempt), ToMember::Abort { reason, .. }) => {
                (State::Idle, TrainerStep::Aborted { version: attempt.version, reason })
            }
            (State::Deciding(attempt), ToMember::Done { push, version, unconfirmed })
                if attempt.push == push && attempt.version == version =>
            {
                (State::Idle, TrainerStep::Committed { version, unconfirmed })
            }
            (state, other) => return Err(Unexpected::new(state.expects(), &other)),
        };
        self.state = next;
        Ok(Some(step))
    }
}

impl State {
    /// Whether the attempt is the one that this rank has begun, and measured for if it was asked to.
    fn may_write(&self, push: PushId, version: u64) -> bool {
        match self {
            Self::Begun(begun) => *begun == version,
            Self::Measured(attempt) => attempt.push == push && attempt.version == version,
            _ => false,
        }
    }

    /// What the controller may say now, for errors.
    fn expects(&self) -> &'static str {
        match self {
            Self::Out => "nothing before it joins again",
            Self::Joining(_) => "the job",
            Self::Idle => "its own next version",
            Self::Begun(_) | Self::Measured(_) => "the start of the push",
            Self::Measuring(_) => "its own measuring",
            Self::Writing(_) => "an abort or nothing",
            Self::Stopping(_) | Self::Leaving(_) => "its own writes to stop",
            Self::Deciding(_) => "the commit",
            Self::Failed(_) => "the end of the failed push",
        }
    }
}
