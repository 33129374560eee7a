//! Counts what a job does, for its report.

use xfer_plan::Rank;

use super::config::JobConfig;
use super::rank::SimRank;
use super::report::{Bin, JobReport, NicUse, PushTimes, RankTimes, Stage, StageTime};
use super::trial::TrialEnd;
use crate::cluster::{Cluster, NicId};
use crate::network::Way;
use crate::time::Time;

/// Entries of a timeline at most; when there are more, two become one.
const BINS_MAX: usize = 240;

/// Nanoseconds of an entry at first.
const BIN_NANOSECONDS: u64 = 100_000;

/// Payload over time, by link.
#[derive(Default)]
struct Timeline {
    links: usize,
    /// Nanoseconds of an entry.
    width: u64,
    /// By entry, by link.
    bins: Vec<Vec<f32>>,
}

impl Timeline {
    fn new(links: usize) -> Timeline {
        Timeline { links, width: BIN_NANOSECONDS, bins: Vec::new() }
    }

    /// Books bytes evenly over the time that they took.
    fn spread(&mut self, [from, to]: [u64; 2], link: usize, bytes: u64) {
        while (to / self.width) as usize >= BINS_MAX {
            self.bins = self.bins.chunks(2).map(add_up).collect();
            self.width *= 2;
        }
        let (first, last) = ((from.min(to) / self.width) as usize, (to / self.width) as usize);
        while self.bins.len() <= last {
            self.bins.push(vec![0.0; self.links]);
        }
        let share = bytes as f32 / (last - first + 1) as f32;
        for bin in self.bins.get_mut(first..=last).into_iter().flatten() {
            if let Some(sum) = bin.get_mut(link) {
                *sum += share;
            }
        }
    }
}

fn add_up(pair: &[Vec<f32>]) -> Vec<f32> {
    match pair {
        [a, b] => a.iter().zip(b).map(|(a, b)| a + b).collect(),
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
            timeline: Timeline::new(2 * nics + 1),
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
                self.timeline = Timeline::new(2 * self.nics + 1);
            }
        }
    }

    /// Payload has arrived that was under way since `since`.
    pub(super) fn moved(&mut self, since: Time, now: Time, way: Way, bytes: u64) {
        let Some(push) = &self.push else { return };
        let span = [since, now].map(|time| time.nanos_since(push.first_begin));
        match way {
            Way::Nic { from: NicId(from), to: NicId(to) } => {
                let (from, to) = (from as usize, to as usize);
                self.nic_bytes[from][0] += bytes;
                self.nic_bytes[to][1] += bytes;
                self.timeline.spread(span, from, bytes);
                self.timeline.spread(span, self.nics + to, bytes);
            }
            _ => self.timeline.spread(span, 2 * self.nics, bytes),
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
        let full = cluster.nic.payload_bytes_per_second() as f64 * self.timeline.width as f64 / 1e9;
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
            let part = |at: usize| used.get(at).map_or(0.0, |bytes| (f64::from(*bytes) / full) as f32);
            [part(0), part(used.len() / 2), part(used.len().saturating_sub(1))]
        };
        let bins = self.timeline.bins.iter().map(|bin| Bin {
            trainers_out: spread(bin, &out),
            receivers_in: spread(bin, &into),
            nvlink_bytes_per_second: bin
                .last()
                .map_or(0.0, |bytes| (f64::from(*bytes) * 1e9 / self.timeline.width as f64) as f32),
        });
        bins.collect()
    }
}
