//! What a push did, in figures.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use xfer_exec::RailUse;

/// What happened between two moments, for a timeline.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Span {
    /// Which stage.
    pub name: Cow<'static, str>,
    /// Microseconds since the Unix epoch.
    pub start_us: u64,
    /// Microseconds.
    pub duration_us: u64,
}

/// A stage that runs: ends as a [`Span`].
pub(crate) struct Stopwatch {
    name: &'static str,
    wall: SystemTime,
    began: std::time::Instant,
}

impl Stopwatch {
    pub(crate) fn start(name: &'static str) -> Self {
        Self { name, wall: SystemTime::now(), began: std::time::Instant::now() }
    }

    /// Ends the stage and begins the next at the same moment.
    pub(crate) fn next(&mut self, name: &'static str, spans: &mut Vec<Span>) {
        let ended = std::mem::replace(self, Self::start(name));
        spans.push(ended.end());
    }

    pub(crate) fn end(self) -> Span {
        let start = self.wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Span { name: self.name.into(), start_us: micros(start), duration_us: micros(self.began.elapsed()) }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// A committed push, as one trainer saw it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PushReport {
    /// The version that is now committed.
    pub version: u64,
    /// Bytes that this trainer wrote.
    pub bytes: u64,
    /// WRITEs that carried them.
    pub writes: u64,
    /// Of the bytes, those that were staged on this side: cast or quantised, or copied because their rows are too short for a
    /// WRITE each.
    pub bytes_gathered: u64,
    /// How often the rail had no room for a WRITE.
    pub refusals: u64,
    /// Seconds from the call to the commit confirmed by every inference rank.
    pub seconds: f64,
    /// Seconds of this trainer's writes alone.
    pub write_seconds: f64,
    /// Seconds that the threads were busy which fill the staging memory; within the writes.
    pub gather_seconds: f64,
    /// Seconds that it took to measure the quantised blocks that this rank shares with others; before the writes.
    #[serde(default)]
    pub measure_seconds: f64,
    /// `bytes` over `write_seconds`, in 10^9 bytes per second.
    pub gb_per_second: f64,
    /// Lower bound of the whole push: the busiest NIC's bytes over its bandwidth.
    pub bound_seconds: f64,
    /// `bound_seconds` over `write_seconds`: 1 is as fast as the NICs allow.
    pub bound_fraction: f64,
    /// What each rail did, those that were given up included.
    pub rails: Vec<RailReport>,
    /// The stages, one after another.
    pub stages: Vec<Span>,
    /// What was hashed, where the job verifies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<VerifyReport>,
}

/// A rail's share of a push.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RailReport {
    /// The rail in words: fabric, address, device.
    pub name: String,
    /// Bytes that it delivered.
    pub bytes: u64,
    /// WRITEs that carried them.
    pub writes: u64,
    /// Why it was given up, in this push or an earlier one. Other rails carry what was meant for it.
    pub closed: Option<String>,
    /// Inference ranks that it does not lead to any more, because a WRITE failed in this push or an earlier one, and why.
    pub lost: BTreeMap<String, String>,
}

impl RailReport {
    pub(crate) fn new(name: &str, used: RailUse) -> Self {
        let RailUse { bytes, writes, closed, lost, .. } = used;
        let lost = lost.into_iter().map(|(to, reason)| (to.to_string(), reason)).collect();
        Self { name: name.to_owned(), bytes, writes, closed, lost }
    }
}

/// A committed version, as one inference rank saw it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VersionReport {
    /// The version that is now served.
    pub version: u64,
    /// Bytes that arrived.
    pub bytes: u64,
    /// Seconds from the beginning of the push, as this rank saw it, until the version was served.
    pub seconds: f64,
    /// Of them, how long no version was served: in place all of them.
    pub pause_seconds: f64,
    /// `bytes` over `seconds`, in 10^9 bytes per second.
    pub gb_per_second: f64,
    /// The stages, one after another.
    pub stages: Vec<Span>,
    /// What was hashed, where the job verifies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<VerifyReport>,
    /// What this rank passed on to others, where the plan has it do so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passed_on: Option<RelayReport>,
}

/// What an inference rank passed on, while it arrived.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RelayReport {
    /// Bytes that it wrote to others.
    pub bytes: u64,
    /// WRITEs that carried them.
    pub writes: u64,
    /// Seconds from the moment that it listened until the last was delivered.
    pub seconds: f64,
    /// What each of the rails did that it passes on over, those that were given up included.
    pub rails: Vec<RailReport>,
    /// What was hashed of it, where the job verifies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<VerifyReport>,
}

/// What one rank hashed so that a version was committed only where all bytes arrived as they were sent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VerifyReport {
    /// Parameters; on a trainer those of each inference rank count apart.
    pub params: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Seconds from the first byte hashed to the last.
    pub seconds: f64,
    /// Of them, seconds that the push waited for: all of them on an inference rank, on a trainer those after its last
    /// write was delivered.
    pub exposed_seconds: f64,
}

impl VerifyReport {
    pub(crate) fn new(params: usize, bytes: u64, took: Duration) -> Self {
        Self { params: params as u64, bytes, seconds: took.as_secs_f64(), exposed_seconds: 0.0 }
    }
}

/// 10^9 bytes per second; 0 where no time has passed.
pub(crate) fn gb_per_second(bytes: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { bytes as f64 / seconds / 1e9 } else { 0.0 }
}
