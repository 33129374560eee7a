//! What came out of a simulated job. All of it is simulated.

use serde::Serialize;
use xfer_plan::Rank;

/// A simulated job. Times in seconds of virtual time.
#[derive(Clone, Debug, Serialize)]
pub struct JobReport {
    /// The pushes, in order.
    pub pushes: Vec<PushTimes>,
    /// Bytes per push that are written, by trainers and by receivers that pass on.
    pub bytes: u64,
    /// In so many WRITEs.
    pub writes: u64,
    /// Bytes per push that receivers pass on.
    pub relayed_bytes: u64,
    /// The plan's lower bound.
    pub bound_seconds: f64,
    /// Whose NICs limit it, as `inference rank 3`; none where nothing moves.
    pub bound_by: Option<Rank>,
    /// Of the last push: what each NIC moved.
    pub nics: Vec<NicUse>,
    /// Of the last push: how busy NICs were over time.
    pub timeline: Vec<Bin>,
    /// Seconds of one entry of `timeline`.
    pub bin_seconds: f64,
    /// Of the last push: how each rank that writes spent its time.
    pub ranks: Vec<RankTimes>,
    /// Events of the simulation.
    pub events: u64,
}

/// One push.
#[derive(Clone, Debug, Serialize)]
pub struct PushTimes {
    /// Its version.
    pub version: u64,
    /// From the moment that the first trainer's weights are final until every receiver serves them.
    pub seconds: f64,
    /// The stages of the rank that was last to have written, one after another; they add up to `seconds`.
    pub critical_path: Vec<StageTime>,
    /// That rank.
    pub last: Rank,
}

/// A stage of a push and how long it took.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct StageTime {
    /// Which.
    pub stage: Stage,
    /// How long.
    pub seconds: f64,
}

/// What a rank waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// For other trainers to have their weights ready.
    Stragglers,
    /// For receivers to stop serving, and for the messages of that.
    Prepare,
    /// For bytes to arrive that it passes on; nothing of its own is under way.
    Arrivals,
    /// For a kernel that gathers, casts or quantises, while no WRITE is under way.
    Transform,
    /// For WRITEs under way over NICs.
    Transfer,
    /// For copies over NVLink, while no WRITE is under way over NICs.
    Nvlink,
    /// For its own thread to post, while nothing is under way.
    Post,
    /// For the commit, and for the messages of that.
    Commit,
}

impl Stage {
    /// Every stage, in the order of a push.
    pub const ALL: [Stage; 8] = [
        Stage::Stragglers,
        Stage::Prepare,
        Stage::Arrivals,
        Stage::Transform,
        Stage::Transfer,
        Stage::Nvlink,
        Stage::Post,
        Stage::Commit,
    ];

    /// In words.
    pub const fn text(self) -> &'static str {
        match self {
            Stage::Stragglers => "waiting for trainers",
            Stage::Prepare => "prepare",
            Stage::Arrivals => "waiting for arrivals",
            Stage::Transform => "exposed transform",
            Stage::Transfer => "transfer",
            Stage::Nvlink => "exposed NVLink",
            Stage::Post => "exposed posting",
            Stage::Commit => "commit",
        }
    }
}

/// How a rank that writes spent a push. Starts are seconds from the beginning of the push.
#[derive(Clone, Debug, Serialize)]
pub struct RankTimes {
    /// Which.
    pub rank: Rank,
    /// When it was told to write, or, where it passes on, when it was prepared.
    pub writes_at: f64,
    /// When its last WRITE was delivered.
    pub written_at: f64,
    /// What it waited for meanwhile.
    pub stages: Vec<StageTime>,
    /// Payload that it wrote, over NICs and NVLink, in bytes.
    pub bytes: u64,
}

/// What one NIC did in a push.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct NicUse {
    /// Its host.
    pub host: u32,
    /// Its number within the host.
    pub nic: u32,
    /// Payload that it sent, in bytes.
    pub out_bytes: u64,
    /// Payload that it received, in bytes.
    pub in_bytes: u64,
}

/// A stretch of time. Utilisation is payload over what the NIC could move, between 0 and about 1, of the NICs of the ranks of that
/// side.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Bin {
    /// Trainers' NICs, sending: the least, the median and the most used.
    pub trainers_out: [f32; 3],
    /// Receivers' NICs, receiving.
    pub receivers_in: [f32; 3],
    /// Receivers' GPUs, getting bytes over NVLink, in bytes a second, all together.
    pub nvlink_bytes_per_second: f32,
}
