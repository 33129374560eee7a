//! The job that pushes, and what is read of its processes meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use weightsync::{Fabric, World};

use super::Options;
use super::flat::Sample;
use crate::job::{Hear, Job, Setting};
use crate::progress::Progress;
use crate::usage::Usage;

/// Two of each: every trainer writes to every inference rank, and each waits for others.
pub(super) const WORLD: World = World { trainers: 2, inference: 2 };

/// The longest that a rank waits without progress.
const DEADLINE_SECONDS: u32 = 30;

/// Longer than the job itself waits for anything.
const SILENCE_MAX: Duration = Duration::from_secs(3 * DEADLINE_SECONDS as u64);

/// Samples of a run, if it has no more than a thousand times as many pushes.
const SAMPLES: u64 = 500;

/// Pushes between two samples, at most: so that the progress line moves.
const INTERVAL_MAX: u64 = 1000;

/// Before a sample counts: this part of the pushes, in which buffers and heaps fill.
const WARM_UP_PART: f64 = 0.1;

/// And this time, because the ranks' runtime ends a thread that has done nothing since they connected after 10 s.
const WARM_UP_MIN: Duration = Duration::from_secs(15);

/// Before the end no sample counts for so many pushes: ranks that leave let go of what they have, and a commit is heard of
/// later than it happens, by up to 400 pushes: what a pipe of 64 KiB and a buffer hold of the controller's lines.
const END_PUSHES: u64 = 1000;

/// One process of the job.
pub(super) struct Series {
    pub(super) name: String,
    pub(super) pid: u32,
    /// After the warm-up.
    pub(super) samples: Vec<Sample>,
}

/// What was seen of a job.
pub(super) struct Watched {
    pub(super) processes: Vec<Series>,
    /// When the samples were taken.
    times: Vec<(u64, Duration)>,
    /// Versions of which every served byte was compared, of all inference ranks together.
    pub(super) checked: u64,
    /// What the processes logged: warnings, if anything.
    pub(super) log: Vec<String>,
}

impl Watched {
    /// The pace after the warm-up; `None` if there were not two samples.
    pub(super) fn pushes_per_second(&self) -> Option<f64> {
        let (first, last) = (self.times.first()?, self.times.last()?);
        (last.0 > first.0).then(|| (last.0 - first.0) as f64 / (last.1 - first.1).as_secs_f64())
    }
}

/// Runs a job over this fabric to its end, and fails if it does not end well.
pub(super) fn watch(options: &Options, fabric: Fabric) -> anyhow::Result<Watched> {
    let (commits, checked) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let interval = (options.pushes / SAMPLES).clamp(1, INTERVAL_MAX);
    let (tick, ticks) = mpsc::channel();
    let hear = counting("committed", commits.clone(), move |count| {
        if count.is_multiple_of(interval) {
            // Nobody listens if the soak has failed.
            let _ = tick.send(());
        }
    });
    let setting =
        Setting { weightsync: options.weightsync.clone(), world: WORLD, deadline_seconds: DEADLINE_SECONDS };
    let (relay, replicas) = if options.relay { ("per-host", "2") } else { ("never", "1") };
    let mut job = Job::start(&setting, &["--verify", "full", "--relay", relay], hear)?;
    let (name, steps) = (fabric.to_string(), options.pushes.to_string());
    for rank in 0..WORLD.trainers {
        job.trainer(rank, &["--fabric", &name, "--steps", &steps])?;
    }
    let check_every = options.check_every.to_string();
    for rank in 0..WORLD.inference {
        let checks = ["--fabric", &name, "--replicas", replicas, "--verify", "--verify-every", &check_every];
        job.inference(rank, &checks, Some(counting("verified", checked.clone(), |_| {})))?;
    }

    let series = |(name, pid): (&str, u32)| Series { name: name.to_owned(), pid, samples: Vec::new() };
    let mut processes: Vec<Series> = job.processes().map(series).collect();
    let mut times = Vec::new();
    let mut progress = Progress::new();
    loop {
        match ticks.recv_timeout(SILENCE_MAX) {
            Ok(()) => {}
            // The controller has closed its output: it has ended, or is about to.
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                job.check_alive()?;
                bail!("nothing was committed for {SILENCE_MAX:?}: {:?}", job.log_since(0));
            }
        }
        let (pushes, elapsed) = (commits.load(Ordering::Relaxed), progress.elapsed());
        progress.show(|elapsed| {
            let (all, seconds) = (options.pushes, elapsed.as_secs_f64());
            let left = all.saturating_sub(pushes) as f64 * seconds / pushes.max(1) as f64;
            format!("{name}: {pushes} of {all} pushes in {seconds:.0} s, {left:.0} s left")
        });
        let warm = pushes as f64 >= WARM_UP_PART * options.pushes as f64 && elapsed >= WARM_UP_MIN;
        if !warm || pushes + END_PUSHES > options.pushes {
            continue;
        }
        times.push((pushes, elapsed));
        for Series { name, pid, samples } in &mut processes {
            let usage = match Usage::of(*pid) {
                Ok(usage) => usage,
                Err(error) => {
                    // Says how it ended, if it has.
                    job.check_alive()?;
                    return Err(error).with_context(|| format!("cannot read what {name} uses"));
                }
            };
            samples.push(Sample { pushes, usage });
        }
    }
    progress.end();
    let log = job.end(SILENCE_MAX)?;
    Ok(Watched { processes, times, checked: checked.load(Ordering::Relaxed), log })
}

/// Counts events of this name, and calls `then` with their number so far.
fn counting(event: &str, count: Arc<AtomicU64>, then: impl Fn(u64) + Send + 'static) -> Hear {
    let event = format!(r#""event":"{event}""#);
    Box::new(move |line| {
        if line.contains(&event) {
            then(count.fetch_add(1, Ordering::Relaxed) + 1);
        }
    })
}
