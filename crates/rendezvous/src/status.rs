//! What an observer is told: a picture of the job at one moment, as the controller knows it.
//!
//! An observer proves itself as a member does, asks with [`crate::ToController::Status`] as its first message, and is answered
//! with a [`Status`]. It is no member: it is not waited for, hears nothing else, and cannot change anything. There is no clock
//! in here: moments are told as times since then.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use xfer_plan::{Digest, Rank};

use crate::controller::Stage;
use crate::member::Served;
use crate::protocol::{PushId, World};
use crate::verify::Verify;

/// Rails that one rank may report on.
pub const RAILS_TOLD_MAX: usize = 64;

/// Bytes of a rail's name in a report: an address of 90 and a device of 30. 64 of them fit the frame of a member.
const NAME_BYTES_MAX: usize = 160;

/// The job at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The job's name.
    pub job: String,
    /// How many ranks it has.
    pub world: World,
    /// Since the controller began.
    pub up: Duration,
    /// The longest that any stage waits without progress.
    pub deadline: Duration,
    /// Which parameters are compared before a version is committed.
    pub verify: Verify,
    /// What the job does.
    pub phase: PhaseStatus,
    /// For how long it has.
    pub since: Duration,
    /// Who is waited for, in rank order.
    pub waiting: Vec<Rank>,
    /// The last committed version; 0 is what was loaded at the start.
    pub committed: u64,
    /// The plan, once all have joined.
    pub plan: Option<PlanStatus>,
    /// The attempt under way.
    pub push: Option<PushStatus>,
    /// Who has joined, in rank order.
    pub ranks: Vec<RankStatus>,
    /// The last attempts that ended, the newest first.
    pub attempts: Vec<AttemptStatus>,
}

/// What the job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PhaseStatus {
    /// Ranks join.
    Joining,
    /// There is a plan, and ranks open and connect their rails.
    Connecting,
    /// Between versions.
    Idle,
    /// A version is pushed.
    Pushing(Stage),
    /// Nothing more will happen.
    Ended,
}

impl PhaseStatus {
    /// What those who are waited for have not done; nothing where nobody is.
    pub fn missing(self) -> Option<&'static str> {
        match self {
            Self::Joining => Some("to join"),
            Self::Connecting => Some("to connect its rails"),
            Self::Pushing(stage) => Some(stage.missing()),
            Self::Idle | Self::Ended => None,
        }
    }
}

impl fmt::Display for PhaseStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Joining => f.write_str("joining"),
            Self::Connecting => f.write_str("connecting"),
            Self::Idle => f.write_str("idle"),
            Self::Pushing(stage) => stage.fmt(f),
            Self::Ended => f.write_str("ended"),
        }
    }
}

/// The plan in figures.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PlanStatus {
    /// Its digest.
    pub digest: Digest,
    /// Bytes per push.
    pub bytes: u64,
    /// WRITEs per push.
    pub writes: u64,
    /// Lower bound of a push in seconds.
    pub bound_seconds: f64,
}

/// The attempt under way.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PushStatus {
    /// Its version.
    pub version: u64,
    /// Its name.
    pub push: PushId,
    /// Since all trainers had begun; zero until they have.
    pub elapsed: Duration,
}

/// A member, as the controller knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankStatus {
    /// Who.
    pub rank: Rank,
    /// Where its control connection comes from; empty where the driver did not say.
    pub address: String,
    /// Since it was last heard.
    pub heard: Duration,
    /// It has left in good order.
    pub left: bool,
    /// Of an inference rank, which version its bytes are; `None` until it has been in a push.
    pub served: Option<Served>,
    /// Bytes that it has written in the attempt under way, or hashed while the bytes are compared.
    pub bytes: u64,
    /// Bytes that the plan has it write; `None` where that is nothing.
    pub planned: Option<u64>,
    /// Bytes per second between its last two signs of life.
    pub bytes_per_second: f64,
    /// What its rails did in the last attempt that it finished writing.
    pub rails: Vec<RailStatus>,
}

/// What a rail did in one attempt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RailStatus {
    /// The rail in words: fabric, address, device.
    pub name: String,
    /// Bytes that it delivered.
    pub bytes: u64,
    /// Seconds that the rank wrote for.
    pub seconds: f64,
    /// Whether it is still used.
    pub up: bool,
}

impl RailStatus {
    /// A rail's report, with the name cut to what may travel.
    pub fn new(name: &str, bytes: u64, seconds: f64, up: bool) -> Self {
        let name = name.get(..name.floor_char_boundary(NAME_BYTES_MAX)).unwrap_or_default().to_owned();
        Self { name, bytes, seconds, up }
    }

    /// Bytes per second; 0 where no time has passed.
    pub fn bytes_per_second(&self) -> f64 {
        if self.seconds > 0.0 { self.bytes as f64 / self.seconds } else { 0.0 }
    }

    /// What a peer said, made harmless.
    pub(crate) fn bounded(self) -> Self {
        let seconds = if self.seconds.is_finite() { self.seconds.max(0.0) } else { 0.0 };
        Self { seconds, ..Self::new(&self.name, self.bytes, 0.0, self.up) }
    }
}

/// An attempt that ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AttemptStatus {
    /// Its version.
    pub version: u64,
    /// Its name.
    pub push: PushId,
    /// Since it ended.
    pub ended: Duration,
    /// From the moment that all trainers had begun, or where they had not, from the first.
    pub took: Duration,
    /// Why it was aborted; `None` where the version is committed.
    pub aborted: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{MEMBER_FRAME_BYTES_MAX, ToController};

    #[test]
    fn a_ranks_longest_report_fits_its_frame() {
        let rail = RailStatus::new(&"n".repeat(1000), u64::MAX, f64::MAX, true);
        let message = ToController::Rails { rails: vec![rail; RAILS_TOLD_MAX] };
        assert!(message.encoded_bytes() <= u64::from(MEMBER_FRAME_BYTES_MAX), "{}", message.encoded_bytes());
    }

    #[test]
    fn a_peers_figures_are_made_harmless() {
        for seconds in [f64::NAN, f64::INFINITY, -1.0] {
            let rail = RailStatus { name: "é".repeat(1000), bytes: 1, seconds, up: true }.bounded();
            assert_eq!((rail.name.len(), rail.bytes_per_second()), (NAME_BYTES_MAX, 0.0));
        }
    }
}
