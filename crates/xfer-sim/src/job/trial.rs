//! Trials: small jobs from a seed, in which things go wrong, and everything that must hold is checked at every event.
//!
//! A seed decides the cluster, the tensors, the plan's options and the faults. What must hold: a receiver's bytes are those of
//! the version that it serves, each written once; none of a served version changes; a version is committed everywhere or
//! nowhere; no buffer is in use after it was given back, no slot filled twice at a time or beyond the watermark; the job ends,
//! with its last version committed or with a reason. And where nothing went wrong that a job has to bear, every version is
//! committed.

use core::fmt;
use core::time::Duration;

use rendezvous::member::Served;
use xfer_plan::{
    BlockQuant, DType, DestinationParam, Manifest, ParamMap, PlanOptions, RailDecl, ReceiverManifest,
    RegionIndex, Relay, ScaleFormat, SourcePiece, TensorBox, TrainerManifest, plan,
};

use super::bytes::Bytes;
use super::faults::{Fault, Faults};
use super::log::Trace;
use super::rank::Half;
use super::world::{Extras, World};
use super::{JobConfig, JobError, Sabotage};
use crate::cluster::{Cluster, Control, Gpu, Host, Nic, Semantics};
use crate::random::Random;
use crate::time::Time;

/// Events of a trial at most: a job of this size that takes so many does not end.
const EVENTS_MAX: u64 = 2_000_000;

/// No trial that ends takes longer: a job gives up after a few deadlines.
const DEADLINE: Duration = Duration::from_millis(400);

/// How a trial ended that held all that it must.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrialEnd {
    /// Versions that were committed.
    pub committed: u64,
    /// Versions that were to be.
    pub versions: u64,
    /// Why the job ended before; none where it did not.
    pub reason: Option<String>,
    /// Attempts that were aborted.
    pub aborts: u64,
    /// Rails that receivers closed because a peer had given up on them.
    pub fenced: u64,
    /// Flights that arrived when nobody waited for them any more.
    pub late_arrivals: u64,
    /// Bytes that receivers passed on.
    pub relayed_bytes: u64,
    /// Slots that were filled.
    pub stages: u64,
    /// WRITEs that a rail had no room for.
    pub refusals: u64,
    /// Events that it took.
    pub events: u64,
}

impl fmt::Display for TrialEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} versions committed, {} events", self.committed, self.versions, self.events)?;
        match &self.reason {
            Some(reason) => write!(f, "; it ended: {reason}"),
            None => Ok(()),
        }
    }
}

/// See the module.
pub struct Trial {
    config: JobConfig,
    faults: Faults,
    /// Whether everything that goes wrong is what a job has to bear.
    bears: bool,
}

impl Trial {
    /// The trial of a seed.
    pub fn new(seed: u64) -> Trial {
        Maker { random: Random::new(seed) }.trial(seed)
    }

    /// Runs it, perhaps with a defect, and tells of every event if asked.
    ///
    /// # Errors
    ///
    /// What does not hold.
    pub fn run<'t>(
        &'t self,
        sabotage: Option<Sabotage>,
        trace: Option<&'t mut Trace<'t>>,
    ) -> Result<TrialEnd, JobError> {
        match trace {
            Some(trace) => self.run_once(sabotage, Some(trace), true),
            // Once more, to tell what came before.
            None => self.run_once(sabotage, None, false).or_else(|_| self.run_once(sabotage, None, true)),
        }
    }

    fn run_once<'t>(
        &'t self,
        sabotage: Option<Sabotage>,
        trace: Option<&'t mut Trace<'t>>,
        describes: bool,
    ) -> Result<TrialEnd, JobError> {
        let Trial { config, faults, bears } = self;
        let faults = faults.clone();
        let ended = |reason: String| JobError::Ended { at: Time::ZERO, reason };
        let planned = plan(&config.manifest).map_err(|error| ended(format!("no plan: {error}")))?;
        let mut bytes = Bytes::new(&planned, &config.manifest);
        bytes.fills_wrong_slot = sabotage == Some(Sabotage::WrongSlot);
        let extras = Extras { bytes: Some(bytes), faults, sabotage, trace, is_fine: true, describes };
        let mut world = World::new(config, extras)?;
        world.run(&mut |_| {})?;
        let end = TrialEnd {
            committed: world.committed,
            versions: config.versions.into(),
            reason: match &world.job_ended {
                Some(reason) => reason.clone(),
                None => Some("the controller is gone".into()),
            },
            events: world.log.events,
            ..world.tally.seen.clone()
        };
        let broken = |what: String| JobError::Invariant { at: world.now, what, last: world.log.last() };
        if end.committed < end.versions && (*bears || end.reason.is_none()) {
            return Err(broken(format!(
                "not everything was committed, though nothing went wrong that forbids it: {end}"
            )));
        }
        if let Err(what) = world.all_serve_alike() {
            return Err(broken(what));
        }
        Ok(end)
    }
}

/// What it is, in a line.
impl fmt::Display for Trial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let JobConfig { cluster, manifest, versions, .. } = &self.config;
        write!(
            f,
            "{} trainers to {} receivers, {} GPUs and {} NICs a host, {:?}, relay {:?}, chunks of {} bytes, {versions} versions; \
             {} faults{}",
            manifest.trainers.len(),
            manifest.receivers.len(),
            cluster.host.gpus,
            cluster.host.nics,
            cluster.nic.semantics,
            manifest.options.relay,
            manifest.options.chunk_bytes_max,
            self.faults.timed.len() + self.faults.at_events.len(),
            if self.bears { ", all to be borne" } else { "" },
        )
    }
}

/// Makes a trial of random numbers.
struct Maker {
    random: Random,
}

impl Maker {
    /// From `least` to `most`, both included.
    fn within(&mut self, least: u64, most: u64) -> u64 {
        least + self.random.below(most - least + 1)
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.random.below(100) < percent
    }

    fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.random.below(of.len() as u64) as usize]
    }

    fn trial(mut self, seed: u64) -> Trial {
        let (trainers, receivers) = (self.within(1, 4) as u32, self.within(1, 4) as u32);
        let cluster = self.cluster(trainers, receivers);
        let manifest = self.manifest(&cluster);
        let versions = self.within(1, 4) as u32;
        let (faults, bears) = self.faults(&cluster, trainers + receivers);
        let config = JobConfig {
            versions,
            skew: Duration::from_micros(self.within(0, 2000)),
            deadline: DEADLINE,
            bundle_bytes: 0,
            tolerance: 0.0,
            seed,
            events_max: EVENTS_MAX,
            ..JobConfig::new(cluster, manifest)
        };
        Trial { config, faults, bears }
    }

    /// Slow NICs, so that pushes of kilobytes take milliseconds, and messages that overtake each other by far.
    fn cluster(&mut self, trainers: u32, receivers: u32) -> Cluster {
        let gpus = self.one_of(&[1, 2, 4]);
        let hosts = trainers.div_ceil(gpus) + receivers.div_ceil(gpus);
        let rails = self.one_of(&[1, 2, 2, 3]);
        let semantics = self.one_of(&[Semantics::Srd, Semantics::Srd, Semantics::Rc, Semantics::Tcp]);
        Cluster {
            hosts,
            trainers,
            receivers,
            host: Host {
                gpus,
                nics: gpus * rails,
                gpu_nics: None,
                gpu: Gpu {
                    nvlink_bytes_per_second: 20_000_000,
                    copy_engine_bytes_per_second: 10_000_000,
                    hbm_bytes_per_second: self.one_of(&[3_000_000, 300_000_000]),
                    launch_nanoseconds: self.within(0, 50_000),
                },
            },
            nic: Nic {
                semantics,
                bytes_per_second: 1_000_000,
                post_nanoseconds: self.within(0, 5_000),
                message_nanoseconds: 1_000,
                queue_depth: self.one_of(&[1, 2, 4, 64]),
                packet_payload_bytes: 64,
                packet_header_bytes: 4,
                latency_nanoseconds: self.within(1_000, 200_000),
                jitter_nanoseconds: self.one_of(&[0, 100_000, 3_000_000]),
                completion_nanoseconds: self.within(1_000, 200_000),
            },
            racks: None,
            control: Control {
                latency_nanoseconds: self.within(1_000, 500_000),
                bytes_per_second: 1_000_000_000,
            },
        }
    }

    fn manifest(&mut self, cluster: &Cluster) -> Manifest {
        let gpus = cluster.host.gpus;
        let rails = (cluster.host.nics / gpus) as usize;
        let rails = vec![RailDecl { bytes_per_second: cluster.nic.payload_bytes_per_second() }; rails];
        let mut trainers: Vec<TrainerManifest> = (0..cluster.trainers)
            .map(|rank| TrainerManifest {
                host: format!("train{}", rank / gpus),
                regions: vec![0],
                rails: rails.clone(),
                pieces: Vec::new(),
            })
            .collect();
        let mut receivers: Vec<ReceiverManifest> = (0..cluster.receivers)
            .map(|rank| ReceiverManifest {
                host: format!("infer{}", rank / gpus),
                regions: vec![0],
                rails: rails.clone(),
                params: Vec::new(),
            })
            .collect();
        for tensor in 0..self.within(1, 3) {
            let name = format!("t{tensor}");
            let shape = [self.within(1, 24), self.within(1, 24)];
            self.own(&mut trainers, &name, shape);
            self.want(&mut receivers, &name, shape);
        }
        let chunk_bytes_max = self.one_of(&[64, 128, 200, 1024]);
        let options = PlanOptions {
            chunk_bytes_max,
            gather_chunk_bytes_max: chunk_bytes_max,
            gather_row_bytes_max: self.one_of(&[0, 16, 4096]),
            watermark_bytes: chunk_bytes_max * self.one_of(&[1, 2, 8]),
            relay: self.one_of(&[Relay::Never, Relay::PerHost, Relay::Chain, Relay::Auto]),
            ..PlanOptions::default()
        };
        Manifest { trainers, receivers, options }
    }

    /// Trainers hold rows or columns of a tensor, or all of it.
    fn own(&mut self, trainers: &mut [TrainerManifest], name: &str, shape: [u64; 2]) {
        let shards = self.within(1, trainers.len() as u64);
        let dim = self.within(0, 1) as usize;
        for (rank, trainer) in (0..).zip(trainers) {
            let at = rank % shards;
            let (mut start, mut len) = ([0, 0], shape);
            let border = |at: u64| shape[dim] * at / shards;
            (start[dim], len[dim]) = (border(at), border(at + 1) - border(at));
            let Ok(bounds) = TensorBox::new(&start, &len) else { continue };
            let Some(offset) = trainer.regions.first().copied() else { continue };
            let bytes = len[0] * len[1] * 2;
            trainer.regions = vec![offset + bytes.next_multiple_of(4)];
            trainer.pieces.push(SourcePiece {
                tensor: name.to_owned(),
                dtype: DType::BF16,
                shape: shape.to_vec(),
                bounds,
                region: RegionIndex(0),
                offset,
            });
        }
    }

    /// Receivers want all of a tensor, the same part or a part each; as it is or as FP8 with its scales.
    fn want(&mut self, receivers: &mut [ReceiverManifest], name: &str, shape: [u64; 2]) {
        let shards = self.within(1, receivers.len() as u64);
        let dim = self.within(0, 1) as usize;
        let quant = BlockQuant { block: [4, 8], scales: ScaleFormat::F32 };
        let quantised = self.chance(30);
        for (rank, receiver) in (0..).zip(receivers) {
            let at = rank % shards;
            let (mut start, mut len) = ([0, 0], shape);
            // Whole blocks, where there are blocks.
            let unit = if quantised { u64::from(quant.block[dim]) } else { 1 };
            let border = |at: u64| (shape[dim].div_ceil(unit) * at / shards * unit).min(shape[dim]);
            (start[dim], len[dim]) = (border(at), border(at + 1) - border(at));
            if len[dim] == 0 {
                continue;
            }
            let Ok(bounds) = TensorBox::new(&start, &len) else { continue };
            let whole = ParamMap::tensor(name);
            if !quantised {
                add(receiver, name, DType::BF16, &len, whole.slice(bounds));
                continue;
            }
            add(receiver, name, DType::F8E4M3, &len, whole.clone().quantize(quant).slice(bounds));
            let blocks =
                |from: u64, len: u64, block: u32| (from / u64::from(block), len.div_ceil(block.into()));
            let [rows, columns] = [0, 1].map(|dim: usize| blocks(start[dim], len[dim], quant.block[dim]));
            if let Ok(bounds) = TensorBox::new(&[rows.0, columns.0], &[rows.1, columns.1]) {
                let scales = whole.scales(quant).slice(bounds);
                add(receiver, &format!("{name}.scales"), DType::F32, &[rows.1, columns.1], scales);
            }
        }
    }

    // --- faults --------------------------------------------------------------------------------------------------

    /// What goes wrong, and whether a job has to bear it.
    fn faults(&mut self, cluster: &Cluster, ranks: u32) -> (Faults, bool) {
        let mut faults =
            Faults { linger_nanoseconds: self.one_of(&[0, 10_000_000, 60_000_000]), ..Faults::default() };
        let rails = cluster.host.nics / cluster.host.gpus;
        for _ in 0..self.within(0, 4) {
            self.nuisance(&mut faults, ranks, rails);
        }
        let bears = self.chance(40);
        if !bears {
            for _ in 0..self.within(1, 2) {
                self.disaster(&mut faults, cluster.trainers, ranks, rails);
            }
        }
        faults.timed.sort_by_key(|(at, _)| *at);
        (faults, bears)
    }

    /// When: while ranks join, or in one of the first pushes.
    fn moment(&mut self) -> Time {
        Time::from_nanos(self.within(0, 60_000_000))
    }

    /// Something that delays a job, and nothing more.
    fn nuisance(&mut self, faults: &mut Faults, ranks: u32, rails: u32) {
        let (at, rank, rail) =
            (self.moment(), self.random.below(ranks.into()) as u32, self.random.below(rails.into()) as u32);
        let until = at.plus_nanos(self.within(100_000, 20_000_000));
        match self.random.below(5) {
            0 => {
                faults.timed.push((at, Fault::Refuse { rank, rail, refuses: true }));
                faults.timed.push((until, Fault::Refuse { rank, rail, refuses: false }));
            }
            1 => faults.timed.push((at, Fault::SlowNic { rank, rail, percent: self.within(20, 90) })),
            2 => faults.timed.push((at, Fault::SlowGpu { rank, percent: self.within(5, 90) })),
            3 => faults.timed.push((at, Fault::Partition { rank, nanoseconds: self.within(1, 30_000_000) })),
            _ => faults.joins.extend([(rank, at)]),
        }
    }

    /// Something that may end a push, or the job.
    fn disaster(&mut self, faults: &mut Faults, trainers: u32, ranks: u32, rails: u32) {
        let (at, rank, rail) =
            (self.moment(), self.random.below(ranks.into()) as u32, self.random.below(rails.into()) as u32);
        let silent = self.chance(50);
        match self.random.below(12) {
            // At any event.
            0 | 1 => {
                let event = self.within(1, 3_000);
                faults.at_events.push_back((event, Fault::Crash { rank, silent }));
            }
            2 => {
                let event = self.within(1, 3_000);
                faults.at_events.push_back((event, Fault::CrashController { silent }));
            }
            3 | 4 => {
                faults
                    .timed
                    .push((at, Fault::Errors { per_million: self.one_of(&[2_000, 20_000, 300_000]) }));
                if self.chance(50) {
                    faults
                        .timed
                        .push((at.plus_nanos(self.within(1, 30_000_000)), Fault::Errors { per_million: 0 }));
                }
            }
            5 | 6 => {
                faults.timed.push((at, Fault::SlowNic { rank, rail, percent: 0 }));
                if self.chance(50) {
                    let until = at.plus_nanos(self.within(1, 300_000_000));
                    faults.timed.push((until, Fault::SlowNic { rank, rail, percent: 100 }));
                }
            }
            7 | 10 | 11 => {
                // Of a trainer, and in the middle of a push, most likely.
                let rank = if self.chance(80) { self.random.below(trainers.into()) as u32 } else { rank };
                let event = self.within(50, 1_000);
                faults.at_events.push_back((event, Fault::BreakRail { rank, rail }));
                if self.chance(50) {
                    let event = self.within(50, 1_000);
                    let rail = self.random.below(rails.into()) as u32;
                    faults.at_events.push_back((event, Fault::BreakRail { rank, rail }));
                }
            }
            8 => {
                let trainer = self.random.below(trainers.into()) as u32;
                faults.timed.push((at, Fault::BreakRail { rank: trainer, rail }));
                faults.stuck.extend([trainer]);
            }
            _ => match self.chance(50) {
                true => {
                    let nanoseconds = self.within(100_000_000, 2_000_000_000);
                    faults.timed.push((at, Fault::Partition { rank, nanoseconds }));
                }
                false => faults.joins.extend([(rank, Time::from_nanos(self.within(0, 1_500_000_000)))]),
            },
        }
        faults.at_events.make_contiguous().sort_by_key(|(event, _)| *event);
    }
}

/// Declares a parameter behind those that are there.
fn add(receiver: &mut ReceiverManifest, name: &str, dtype: DType, shape: &[u64], map: ParamMap) {
    let Some(end) = receiver.regions.first().copied() else { return };
    let offset = end.next_multiple_of(8);
    let bytes = shape.iter().product::<u64>() * dtype.bytes();
    receiver.regions = vec![offset + bytes];
    receiver.params.push(DestinationParam {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
        region: RegionIndex(0),
        offset,
        map: map.into(),
        priority: 0,
    });
}

impl World<'_> {
    /// At the end of a job that ended in good order, every receiver that is there serves the last version that was committed;
    /// however it ended, none serves one that was not.
    fn all_serve_alike(&self) -> Result<(), String> {
        let in_order = matches!(self.job_ended, Some(None));
        for rank in self.ranks.iter().filter(|rank| rank.alive) {
            let Half::Receiver(member) = &rank.half else { continue };
            let good = match member.served() {
                Served::Version(version) if in_order => version == self.committed,
                Served::Version(version) => version <= self.committed,
                Served::Torn(_) | Served::Behind(_) => !in_order,
            };
            if !good {
                let (who, served, committed) = (rank.rank, member.served(), self.committed);
                return Err(format!(
                    "{who} serves {served} at the end, and version {committed} is committed"
                ));
            }
        }
        Ok(())
    }
}
