//! Counts what a job does, for its report.

use xfer_plan::Rank;

use super::config::JobConfig;
use super::rank::SimRank;
use super::report::{Bin, JobReport, NicUse, PushTimes, RankTimes, Stage, StageTime};
use super::trial::TrialEnd;
use crate::cluster::{Cluster, GpuId, NicId};
use crate::network::{Link, Network, NetworkError, Way};
use crate::time::Time;

/// Entries of a timeline at most; when there are more, two become one.
const BINS_MAX: usize = 240;

/// Nanoseconds of an entry at first.
const BIN_NANOSECONDS: u64 = 100_000;

/// What links move, looked at once in so often.
struct Timeline {
    /// Nanoseconds of an entry.
    width: u64,
    /// By entry, by link: bytes a second.
    bins: Vec<Vec<f32>>,
}

impl Timeline {
    fn new() -> Timeline {
        Timeline { width: BIN_NANOSECONDS, bins: Vec::new() }
    }

    /// Nanoseconds after the start: the middle of the next entry.
    fn due(&self) -> u64 {
        self.bins.len() as u64 * self.width + self.width / 2
    }

    fn push(&mut self, rates: Vec<f32>) {
        self.bins.push(rates);
        if self.bins.len() == BINS_MAX {
            self.bins = self.bins.chunks(2).map(mean).collect();
            self.width *= 2;
        }
    }
}

fn mean(pair: &[Vec<f32>]) -> Vec<f32> {
    match pair {
        [a, b] => a.iter().zip(b).map(|(a, b)| (a + b) / 2.0).collect(),
        [a, ..] => a.clone(),
        [] => Vec::new(),
    }
}

/// A push that is being counted.
#[derive(Clone, Copy)]
struct Push {
    version: u64,
    first_begin: Time,
    last_begin: Time,
    served: Time,
}

/// See the module.
pub(super) struct Tally {
    /// What a trial has seen happen.
    pub(super) seen: TrialEnd,
    pub(super) delivered_bytes: u64,
    pub(super) total_bytes: u64,
    versions: u64,
    bytes: u64,
    writes: u64,
    bound_seconds: f64,
    bound_by: Option<Rank>,
    push: Option<Push>,
    pushes: Vec<PushTimes>,
    nics: usize,
    nic_bytes: Vec<[u64; 2]>,
    timeline: Timeline,
}

impl Tally {
    pub(super) fn new(config: &JobConfig) -> Tally {
        let nics = config.cluster.nics() as usize;
        Tally {
            seen: TrialEnd::default(),
            delivered_bytes: 0,
            total_bytes: 0,
            versions: config.versions.into(),
            bytes: 0,
            writes: 0,
            bound_seconds: 0.0,
            bound_by: None,
            push: None,
            pushes: Vec::new(),
            nics,
            nic_bytes: vec![[0; 2]; nics],
            timeline: Timeline::new(),
        }
    }

    pub(super) fn planned(&mut self, bytes: u64, writes: u64, bound_seconds: f64, bound_by: Option<Rank>) {
        (self.bytes, self.writes) = (bytes, writes);
        (self.bound_seconds, self.bound_by) = (bound_seconds, bound_by);
        self.total_bytes = bytes.saturating_mul(self.versions);
    }

    /// A trainer's weights are final.
    pub(super) fn begins(&mut self, version: u64, now: Time) {
        match &mut self.push {
            Some(push) if push.version == version => push.last_begin = now,
            _ => {
                self.push = Some(Push { version, first_begin: now, last_begin: now, served: now });
                self.nic_bytes.fill([0; 2]);
                self.timeline = Timeline::new();
            }
        }
    }

    /// When [`Tally::look`] is due; only while a version is pushed.
    pub(super) fn look_due(&self) -> Option<Time> {
        let push = self.push.filter(|push| self.pushes.iter().all(|over| over.version != push.version))?;
        Some(push.first_begin.plus_nanos(self.timeline.due()))
    }

    /// Notes what the links move.
    pub(super) fn look(&mut self, network: &mut Network, cluster: &Cluster) -> Result<(), NetworkError> {
        let payload = cluster.nic.payload_bytes_per_second() as f64 / cluster.nic.bytes_per_second as f64;
        let mut rates = Vec::with_capacity(2 * self.nics + 1);
        for link in [Link::NicOut, Link::NicIn] {
            for nic in 0..self.nics as u32 {
                rates.push((network.used(link(NicId(nic)))? * payload) as f32);
            }
        }
        let mut over_nvlink = 0.0;
        for gpu in 0..cluster.gpus() {
            over_nvlink += network.used(Link::NvlinkOut(GpuId(gpu)))?;
        }
        rates.push(over_nvlink as f32);
        self.timeline.push(rates);
        Ok(())
    }

    /// Payload has arrived.
    pub(super) fn moved(&mut self, way: Way, bytes: u64) {
        if let (Some(_), Way::Nic { from: NicId(from), to: NicId(to) }) = (&self.push, way) {
            self.nic_bytes[from as usize][0] += bytes;
            self.nic_bytes[to as usize][1] += bytes;
        }
    }

    /// A receiver serves a version.
    pub(super) fn serves(&mut self, version: u64, now: Time) {
        if let Some(push) = self.push.as_mut().filter(|push| push.version == version) {
            push.served = push.served.max(now);
        }
    }

    /// The first trainer is told that a version is committed everywhere.
    pub(super) fn done(&mut self, version: u64, ranks: &[SimRank]) {
        let Some(push) = self.push.filter(|push| push.version == version) else { return };
        if self.pushes.iter().any(|known| known.version == version) {
            return;
        }
        let writers = ranks.iter().filter_map(|rank| Some((rank, rank.times.written?)));
        let Some((last, written)) = writers.reduce(|a, b| if b.1 > a.1 { b } else { a }) else { return };
        let seconds = |from: Time, to: Time| to.since(from).as_secs_f64();
        let before = [
            (Stage::Stragglers, seconds(push.first_begin, push.last_begin)),
            (Stage::Prepare, seconds(push.last_begin, last.times.began)),
        ];
        let after = [(Stage::Commit, seconds(written, push.served))];
        let path = before.into_iter().chain(last.times.stages()).chain(after);
        self.pushes.push(PushTimes {
            version,
            seconds: seconds(push.first_begin, push.served),
            critical_path: path.map(|(stage, seconds)| StageTime { stage, seconds }).collect(),
            last: last.rank,
        });
    }

    pub(super) fn report(&self, cluster: &Cluster, ranks: &[SimRank], events: u64) -> JobReport {
        let per_host = cluster.host.nics.max(1);
        let nics = (0..).zip(&self.nic_bytes).map(|(nic, &[out_bytes, in_bytes])| NicUse {
            host: nic / per_host,
            nic: nic % per_host,
            out_bytes,
            in_bytes,
        });
        let began = self.push.map_or(Time::ZERO, |push| push.first_begin);
        let times = ranks.iter().filter_map(|rank| {
            let written = rank.times.written?;
            Some(RankTimes {
                rank: rank.rank,
                writes_at: rank.times.began.since(began).as_secs_f64(),
                written_at: written.since(began).as_secs_f64(),
                stages: rank.times.stages().map(|(stage, seconds)| StageTime { stage, seconds }).collect(),
                bytes: rank.times.bytes,
            })
        });
        let relays = ranks.iter().filter(|rank| matches!(rank.rank, Rank::Receiver(_)));
        JobReport {
            pushes: self.pushes.clone(),
            bytes: self.bytes,
            writes: self.writes,
            relayed_bytes: relays.map(|rank| rank.times.bytes).sum(),
            bound_seconds: self.bound_seconds,
            bound_by: self.bound_by,
            nics: nics.collect(),
            timeline: self.timeline(cluster, ranks),
            bin_seconds: self.timeline.width as f64 / 1e9,
            ranks: times.collect(),
            events,
        }
    }

    fn timeline(&self, cluster: &Cluster, ranks: &[SimRank]) -> Vec<Bin> {
        let full = cluster.nic.payload_bytes_per_second() as f64;
        let nics_of = |trainers: bool, first: usize| -> Vec<usize> {
            let side = ranks.iter().filter(|rank| matches!(rank.rank, Rank::Trainer(_)) == trainers);
            let mut nics: Vec<usize> =
                side.flat_map(|rank| rank.nics.iter().map(|nic| first + nic.0 as usize)).collect();
            nics.sort_unstable();
            nics.dedup();
            nics
        };
        let (out, into) = (nics_of(true, 0), nics_of(false, self.nics));
        let spread = |bin: &[f32], links: &[usize]| -> [f32; 3] {
            let mut used: Vec<f32> = links.iter().filter_map(|link| bin.get(*link).copied()).collect();
            used.sort_unstable_by(f32::total_cmp);
            let part = |at: usize| used.get(at).map_or(0.0, |rate| (f64::from(*rate) / full) as f32);
            [part(0), part(used.len() / 2), part(used.len().saturating_sub(1))]
        };
        let bins = self.timeline.bins.iter().map(|bin| Bin {
            trainers_out: spread(bin, &out),
            receivers_in: spread(bin, &into),
            nvlink_bytes_per_second: bin.last().copied().unwrap_or_default(),
        });
        bins.collect()
    }
}
