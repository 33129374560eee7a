//! The messages of the control plane and their bounds.
//!
//! Every message is one frame of postcard bytes. What a message may hold is bounded here, once; a decoder that meets
//! more refuses the frame, so no peer can make another allocate without limit.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use xfer_plan::{
    Digest, Inbound, ParamId, QuantPart, Rank, RankPlan, ReceiverManifest, ReceiverPart, ReceiverRank,
    RelayPlan, TrainerManifest, TrainerRank,
};

mod commit;

pub use commit::{Bank, Commit, Holds, PushId};

use crate::status::{RailStatus, Status};
use crate::verify::{Checksum, ParamSum, Verify};

/// Raised whenever a message changes its meaning or its bytes. Both sides say theirs before anything else.
pub const PROTOCOL_VERSION: u32 = 9;

/// Bytes of a frame before the peer is authenticated: the handshake's messages are under 100 bytes.
#[cfg(feature = "net")]
pub(crate) const HANDSHAKE_FRAME_BYTES_MAX: u32 = 256;

/// Bytes of a frame from a member that has joined: a reason is the longest. Where a job verifies or its plan cuts quantised
/// blocks, checksums and magnitudes may be longer: as long as any frame.
#[cfg(any(feature = "net", test))]
pub(crate) const MEMBER_FRAME_BYTES_MAX: u32 = 16 << 10;

/// Deadlines outside of this make no sense: heartbeats have to fit in, and sums of times must not overflow.
pub const DEADLINE_RANGE: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(86_400);

/// Bytes of a frame between members: the manifest of a rank with 100 000 tensors of 100 bytes of name, shape and map,
/// with room.
#[cfg(any(feature = "net", test))]
pub(crate) const FRAME_BYTES_MAX: u32 = 64 << 20;

/// Bytes of one rank's opaque endpoint: a rail's address and key is about 300 bytes, times 32 rails and some regions.
pub const ENDPOINT_BYTES_MAX: usize = 64 << 10;

/// Magnitudes in one message at most. One has 4 bytes, so all have 48 MiB, which a frame of 64 MiB holds. In blocks of
/// 128 x 128 they stand for 200 billion elements, of blocks that a border cuts alone.
pub(crate) const MAGNITUDES_MAX: usize = 12 << 20;

/// Bytes of a reason that travels; longer ones are cut.
pub const ABORT_REASON_BYTES_MAX: usize = 4 << 10;

/// The name of a job that was given none.
pub const JOB_DEFAULT: &str = "default";

/// The longest that anybody waits without progress, unless told otherwise.
pub const DEADLINE_DEFAULT: Duration = Duration::from_secs(30);

/// Bytes of a job's name.
pub(crate) const JOB_BYTES_MAX: usize = 128;

/// Ranks on one side of a job; the planner's own limit.
pub(crate) const RANKS_MAX: u32 = 65_536;

/// How many ranks a job has on each side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct World {
    /// Trainer ranks, numbered from 0.
    pub trainers: u32,
    /// Inference ranks, numbered from 0.
    pub inference: u32,
}

impl World {
    /// Whether `member` is one of this world's ranks.
    pub fn contains(self, member: Rank) -> bool {
        match member {
            Rank::Trainer(rank) => rank.0 < self.trainers,
            Rank::Receiver(rank) => rank.0 < self.inference,
        }
    }

    /// All ranks, trainers first.
    pub fn members(self) -> impl Iterator<Item = Rank> {
        let trainers = (0..self.trainers).map(|rank| Rank::Trainer(TrainerRank(rank)));
        trainers.chain((0..self.inference).map(|rank| Rank::Receiver(ReceiverRank(rank))))
    }
}

impl fmt::Display for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} trainers and {} inference ranks", self.trainers, self.inference)
    }
}

/// What a rank has or needs; which of the two says on which side it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum MemberManifest {
    /// The pieces that a trainer owns.
    Trainer(TrainerManifest),
    /// The parameters that an inference rank needs.
    Inference(ReceiverManifest),
}

/// A rank's request to take part.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Join {
    /// Name of the job; must be the controller's.
    pub job: String,
    /// Who asks.
    pub member: Rank,
    /// What it takes the job's size to be; must be the controller's.
    pub world: World,
    /// The longest that it waits without progress; must be the controller's, or one gives up on the other too soon.
    pub deadline: Duration,
    /// What it has or needs.
    pub manifest: MemberManifest,
    /// How peers reach its memory. Opaque here: told, unread, to the members that the plan pairs with this one.
    pub endpoint: Vec<u8>,
    /// What its bytes are, which a rank that comes back knows and the controller may not.
    pub holds: Holds,
    /// It serves the version before while the next one arrives; for observers.
    pub stages: bool,
    /// Which session of this rank: the same over every connection that it makes.
    pub session: SessionId,
}

/// A random name of one session, so that a rank that comes back over a new connection is told from another process that was
/// started as the same rank. Nobody's identity is proved by it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionId(pub [u8; 16]);

#[cfg(feature = "net")]
impl SessionId {
    /// A new one.
    ///
    /// # Errors
    ///
    /// When the kernel gives no random bytes.
    pub fn random() -> Result<Self, crate::RendezvousError> {
        let mut id = [0; 16];
        getrandom::fill(&mut id)?;
        Ok(Self(id))
    }
}

/// What becomes of a job that has lost a rank.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnLoss {
    /// It ends for all, and everyone is told who was lost.
    #[default]
    Fail,
    /// Pushes fail until the rank is back.
    Wait,
    /// It goes on without the rank until that is back: without an inference rank always, without a trainer where others own
    /// the same pieces. Otherwise as `Wait`.
    Continue,
}

impl OnLoss {
    /// Every policy and its name.
    pub const ALL: [(Self, &'static str); 3] =
        [(Self::Fail, "fail"), (Self::Wait, "wait"), (Self::Continue, "continue")];
}

impl fmt::Display for OnLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(policy, _)| policy == self).map_or("?", |(_, name)| name);
        f.write_str(name)
    }
}

impl FromStr for OnLoss {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(_, known)| *known == name).map(|(policy, _)| *policy);
        found.ok_or_else(|| format!("unknown policy '{name}'; choose one of fail, wait, continue"))
    }
}

/// A rail of an inference rank over which a trainer may have bytes on the way that it has given up on: before any version
/// is committed or begun, the inference rank closes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Fence {
    /// The inference rank.
    pub at: ReceiverRank,
    /// Its rail, as its endpoint numbers them.
    pub rail: u16,
}

/// Another member, as the plan pairs it with this one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Peer {
    /// Who it is.
    pub member: Rank,
    /// What it said of how to reach it.
    pub endpoint: Vec<u8>,
    /// It learns with this plan of a commit that it had missed: the arenas of a rank that has two have changed places since
    /// it said where they are.
    pub turned: bool,
}

impl Peer {
    /// Which arena of this peer is written to in an attempt with `bank`.
    pub fn bank(&self, bank: Bank) -> Bank {
        if self.turned { bank.turned() } else { bank }
    }
}

/// One member's part of the agreed plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Planned {
    /// Digest of the whole plan; the same for every member.
    pub digest: Digest,
    /// What this member does or expects.
    pub part: PlannedPart,
    /// The members that it exchanges bytes with.
    pub peers: Vec<Peer>,
    /// Lower bound of the whole push in seconds: the busiest NIC's bytes over its bandwidth.
    pub bound_seconds: f64,
    /// Bytes of the whole push.
    pub bytes_total: u64,
    /// Which parameters are compared before a version is committed.
    pub verify: Verify,
    /// The last committed version; `None` before the first.
    pub committed: Option<Commit>,
    /// Inference ranks whose bytes are not that version: the next push brings them up to it.
    pub behind: Vec<ReceiverRank>,
    /// What becomes of the job when it loses a rank.
    pub on_loss: OnLoss,
}

/// See [`Planned`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum PlannedPart {
    /// A trainer's operations, and the names of the parameters that they mention.
    Trainer {
        /// The operations.
        plan: RankPlan,
        /// Names of the parameters in its operations, by their id.
        names: BTreeMap<ParamId, String>,
        /// The tensors that it quantises; empty where there are none.
        quant: QuantPart,
    },
    /// What must arrive at an inference rank, and what it passes on.
    Inference {
        /// What must arrive.
        part: ReceiverPart,
        /// What it passes on; without operations where that is nothing.
        relay: RelayPlan,
        /// Names of the parameters in the operations of `relay` and in `inbound`, by their id.
        names: BTreeMap<ParamId, String>,
        /// Where it arrives, operation by operation; empty where nothing is verified.
        inbound: Vec<Inbound>,
    },
}

/// From a member to the controller.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ToController {
    /// First message after the handshake.
    Join(Box<Join>),
    /// Its rails are open, connected and warmed for the plan of this digest.
    Ready {
        /// The plan that it is ready for.
        digest: Digest,
    },
    /// A trainer's weights of this version are final.
    Begin {
        /// The version to push.
        version: u64,
    },
    /// A trainer has measured its parts of the quantised blocks that shard borders cut.
    Magnitudes {
        /// The attempt.
        push: PushId,
        /// As many as the plan says, in its order.
        magnitudes: Vec<f32>,
    },
    /// An inference rank has stopped serving and marked itself torn (or turned to its shadow arena).
    Prepared {
        /// The attempt.
        push: PushId,
    },
    /// Every write of a trainer, or of an inference rank that passes bytes on, has been delivered.
    Written {
        /// The attempt.
        push: PushId,
        /// Bytes delivered, compared with the plan.
        bytes: u64,
        /// Writes delivered, compared with the plan.
        writes: u64,
        /// What has to be closed before the commit.
        fences: Vec<Fence>,
        /// Of what it sent, one for each receiver and parameter that is verified.
        sums: Vec<ParamSum>,
    },
    /// An inference rank has closed the rails that it was told to.
    Fenced {
        /// The attempt.
        push: PushId,
    },
    /// An inference rank's bytes are those that were sent.
    Verified {
        /// The attempt.
        push: PushId,
    },
    /// An inference rank has made the version visible.
    Committed {
        /// The attempt.
        push: PushId,
    },
    /// This member cannot go on with the attempt, or has stopped because that is over. It stays in the job.
    Failed {
        /// The attempt.
        push: PushId,
        /// What happened, for a person.
        reason: String,
        /// What has to be closed before the next attempt.
        fences: Vec<Fence>,
    },
    /// Sign of life; `progress` is the count of bytes delivered in this attempt.
    Heartbeat {
        /// Bytes delivered.
        progress: u64,
    },
    /// An orderly goodbye. With a reason, a failure of this member that ends its part.
    Leave {
        /// Why, when it is not that its work is done.
        reason: Option<String>,
    },
    /// What the rails of this rank did in the attempt that it has written; for observers, nothing depends on it.
    Rails {
        /// One for each rail.
        rails: Vec<RailStatus>,
    },
    /// As the first message: this is an observer. What does the job do? Each is answered by a [`ToMember::StatusReport`].
    Status,
}

/// From the controller to a member.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ToMember {
    /// All have joined: this is your part.
    Planned(Box<Planned>),
    /// All are ready.
    Start,
    /// To a trainer with parts of quantised blocks that shard borders cut: how large are their elements?
    Measure {
        /// The attempt.
        push: PushId,
        /// Its version.
        version: u64,
    },
    /// To inference ranks: `push` of `version` begins.
    Prepare {
        /// The attempt.
        push: PushId,
        /// Its version.
        version: u64,
        /// Rails to close first, as [`ToMember::Fence`] says.
        fence: Vec<u16>,
        /// See [`ToMember::Write`].
        bank: Bank,
    },
    /// To an inference rank: close these rails, then say so. A trainer has given up on writes over them, which could
    /// otherwise arrive when the version is served.
    Fence {
        /// The attempt.
        push: PushId,
        /// The rails, as its endpoint numbers them.
        rails: Vec<u16>,
    },
    /// To trainers: all inference ranks are prepared, write.
    Write {
        /// The attempt.
        push: PushId,
        /// Its version.
        version: u64,
        /// Which of the two arenas of an inference rank that has two: see [`Peer::bank`].
        bank: Bank,
        /// The largest magnitudes of the quantised blocks of which it has a part and others the rest, in the plan's order.
        told: Vec<f32>,
    },
    /// To an inference rank: everything has been written. Are these the checksums of your bytes?
    Verify {
        /// The attempt.
        push: PushId,
        /// Of every parameter that is verified, what those who wrote it have sent.
        sums: Vec<(ParamId, Checksum)>,
    },
    /// To inference ranks: every byte has landed everywhere; serve it.
    Commit {
        /// The attempt.
        push: PushId,
        /// Its version.
        version: u64,
    },
    /// To trainers: the version is committed.
    Done {
        /// The attempt.
        push: PushId,
        /// Its version.
        version: u64,
        /// Inference ranks that were lost before they confirmed that they serve it. Empty when all is well.
        unconfirmed: Vec<Rank>,
    },
    /// The attempt is over without a commit.
    Abort {
        /// The version that was not committed.
        version: u64,
        /// Who failed at what, for a person.
        reason: String,
    },
    /// The job has lost a rank, or one has come back: close all rails and join again, with fresh ones. Where the connection
    /// ends behind it, this rank itself was given up, and joins over a new one.
    Regroup {
        /// Who was lost or came back, for a person.
        reason: String,
    },
    /// The job cannot go on: nothing further will be answered.
    Refused {
        /// Why.
        reason: String,
    },
    /// All trainers have left in good order; nothing more will come.
    Finished,
    /// Sign of life.
    Heartbeat,
    /// To an observer: what the job does.
    StatusReport(Box<Status>),
}

impl ToController {
    /// Bytes of this message in a frame, without the frame's own length.
    pub fn encoded_bytes(&self) -> u64 {
        encoded_bytes(self)
    }

    /// Cuts what a person wrote to what may travel.
    #[cfg(feature = "net")]
    pub(crate) fn bounded(mut self) -> Self {
        if let Self::Failed { reason, .. } | Self::Leave { reason: Some(reason) } = &mut self {
            cut(reason);
        }
        self
    }
}

impl ToMember {
    /// Bytes of this message in a frame, without the frame's own length.
    pub fn encoded_bytes(&self) -> u64 {
        encoded_bytes(self)
    }

    /// The message's name, for errors.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Planned(_) => "a plan",
            Self::Start => "a start",
            Self::Measure { .. } => "a request to measure",
            Self::Prepare { .. } => "a prepare",
            Self::Fence { .. } => "a fence",
            Self::Write { .. } => "a write",
            Self::Verify { .. } => "a request to verify",
            Self::Commit { .. } => "a commit",
            Self::Done { .. } => "a done",
            Self::Abort { .. } => "an abort",
            Self::Regroup { .. } => "a call to join again",
            Self::Refused { .. } => "a refusal",
            Self::Finished => "a finish",
            Self::Heartbeat => "a heartbeat",
            Self::StatusReport(_) => "a status report",
        }
    }
}

fn encoded_bytes(message: &impl Serialize) -> u64 {
    // Only a sequence of unknown length has no size, and no message has one.
    postcard::serialize_with_flavor(message, postcard::ser_flavors::Size::default())
        .map_or(0, |bytes| bytes as u64)
}

/// Cuts a text to [`ABORT_REASON_BYTES_MAX`].
pub(crate) fn cut(text: &mut String) {
    if text.len() > ABORT_REASON_BYTES_MAX {
        text.truncate(text.floor_char_boundary(ABORT_REASON_BYTES_MAX));
    }
}
