//! What one GPU sends: a program of equal WRITEs, its driver, and pushes of it by one thread or by one each.

use std::collections::BTreeMap;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use efa_core::{Lease, LeaseMut};
use xfer_exec::driver::{Driver, DriverConfig, HostRail, Step};
use xfer_exec::program::Route;
use xfer_exec::{Program, RailIndex, RankLimits};
use xfer_plan::{Op, ParamId, RankPlan, ReceiverRank, RegionIndex, Strided, Transform};

use super::Rung;
use super::handicap::{BATCH, Handicapped, Shared};

const DEADLINE: Duration = Duration::from_secs(60);

/// One GPU: its driver, and its weights while they are not being pushed.
pub(super) struct Gpu {
    driver: Driver,
    weights: Vec<Lease>,
}

impl Gpu {
    /// Sends `weights` in WRITEs of `chunk_bytes` to all of `receivers` in turn, `passes` times over, each to where it is in
    /// the source.
    pub(super) fn new(
        weights: Lease,
        chunk_bytes: u32,
        passes: u64,
        receivers: u32,
        rails: Vec<HostRail>,
    ) -> anyhow::Result<Self> {
        let region_bytes = weights.len() as u64;
        let chunks = region_bytes / u64::from(chunk_bytes);
        let op = |number: u64| {
            let offset = number % chunks * u64::from(chunk_bytes);
            let place = Strided { region: RegionIndex(0), offset, stride: u64::from(chunk_bytes) };
            Op {
                to: ReceiverRank((number % u64::from(receivers)) as u32),
                param: ParamId(0),
                row_bytes: chunk_bytes,
                rows: 1,
                source: place,
                destination: place,
                gather: false,
                transform: Transform::Copy,
                rail: (number / u64::from(receivers) % rails.len() as u64) as u8,
                wave: 0,
            }
        };
        let writes = chunks * passes;
        let plan = RankPlan {
            bytes: writes * u64::from(chunk_bytes),
            writes,
            ops: (0..writes).map(op).collect(),
            tags: Vec::new(),
        };
        let all = (0..rails.len() as u16).map(RailIndex).collect();
        let route = Route { rails: all, region_bytes: vec![region_bytes] };
        let routes = (0..receivers).map(|to| (ReceiverRank(to), route.clone())).collect();
        let limits = RankLimits { region_bytes: vec![region_bytes], ..RankLimits::default() };
        let program = Program::new(plan, BTreeMap::new(), &limits, routes)?;
        let staging = LeaseMut::zeroed(0)?;
        let config =
            DriverConfig { program, rails, staging, slot_bytes: 0, deadline: DEADLINE, stall: DEADLINE / 5 };
        Ok(Self { driver: Driver::new(config)?, weights: vec![weights] })
    }

    fn begin(&mut self) {
        self.driver.begin(std::mem::take(&mut self.weights));
    }

    /// One step; the WRITEs of the push once it is over.
    fn step(&mut self) -> anyhow::Result<Option<u64>> {
        match self.driver.step() {
            Step::Over(outcome) => {
                self.weights = outcome.regions;
                Ok(Some(outcome.result?.writes))
            }
            Step::Moved | Step::Still => Ok(None),
        }
    }
}

/// A rail with what a rung has.
pub(super) fn on(rung: &Rung, rail: HostRail, shared: &Arc<Shared>) -> HostRail {
    let posts_per_poll = if rung.lazy {
        usize::MAX
    } else if rung.batches {
        BATCH
    } else {
        1
    };
    if rung.sharded && rung.lazy {
        return rail;
    }
    let shared = (!rung.sharded).then(|| Arc::clone(shared));
    Box::new(Handicapped::new(rail, posts_per_poll, shared))
}

/// Pushes once on all GPUs; WRITEs and seconds.
pub(super) fn push(gpus: &mut [Gpu], rung: &Rung) -> anyhow::Result<(u64, f64)> {
    if !rung.threads {
        let began = Instant::now();
        gpus.iter_mut().for_each(Gpu::begin);
        let mut left: Vec<&mut Gpu> = gpus.iter_mut().collect();
        let mut writes = 0;
        while !left.is_empty() {
            let mut failed = None;
            left.retain_mut(|gpu| match gpu.step() {
                Ok(None) => true,
                Ok(Some(more)) => {
                    writes += more;
                    false
                }
                Err(error) => {
                    failed = Some(error);
                    false
                }
            });
            if let Some(error) = failed {
                return Err(error);
            }
        }
        return Ok((writes, began.elapsed().as_secs_f64()));
    }
    let start = Barrier::new(gpus.len());
    let cpus = allowed_cpus();
    let each = std::thread::scope(|scope| {
        let start = &start;
        let threads: Vec<_> = gpus
            .iter_mut()
            .enumerate()
            .map(|(number, gpu)| {
                let cpu = rung.pinned.then(|| cpus.get(number % cpus.len().max(1)).copied()).flatten();
                scope.spawn(move || -> anyhow::Result<(u64, Instant, Instant)> {
                    if let Some(cpu) = cpu {
                        let mut set = rustix::thread::CpuSet::new();
                        set.set(cpu);
                        rustix::thread::sched_setaffinity(None, &set).context("cannot pin a thread")?;
                    }
                    start.wait();
                    let began = Instant::now();
                    gpu.begin();
                    loop {
                        if let Some(writes) = gpu.step()? {
                            return Ok((writes, began, Instant::now()));
                        }
                    }
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join()).collect::<Vec<_>>()
    });
    let mut all = Vec::new();
    for one in each {
        match one {
            Ok(result) => all.push(result?),
            Err(_) => bail!("a thread of the benchmark panicked"),
        }
    }
    let began = all.iter().map(|(_, began, _)| *began).min().context("no GPU")?;
    let ended = all.iter().map(|(_, _, ended)| *ended).max().context("no GPU")?;
    Ok((all.iter().map(|(writes, ..)| writes).sum(), (ended - began).as_secs_f64()))
}

fn allowed_cpus() -> Vec<usize> {
    let set = rustix::thread::sched_getaffinity(None).ok();
    let is_set = |cpu: &usize| set.as_ref().is_some_and(|set| set.is_set(*cpu));
    (0..rustix::thread::CpuSet::MAX_CPU).filter(is_set).collect()
}
