//! The job that is attacked: a controller, two trainers and an inference rank that push without an end; and another that only
//! stands there.

use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::bail;
use weightsync::World;

use crate::job::{Job, Setting, locked};
use crate::rank::{Part, SECRET};

pub(crate) const WORLD: World = World { trainers: 2, inference: 1 };

/// The longest that a rank waits without progress.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// Between pushes that are timed by the control plane, as if there were a training step: so that the pace depends on how fast
/// that answers, and not on how many cores the attacker leaves.
const PAUSE_SECONDS: &str = "0.02";

/// More than can be pushed meanwhile.
const STEPS: &str = "1000000000";

/// How long the job may take to start.
const START_MAX: Duration = Duration::from_secs(60);

/// What a job's trainers do.
#[derive(Clone)]
pub(crate) enum Work {
    /// The command of the product: a small model, and a rest between pushes.
    PushAndRest,
    /// One push after the other, of so many MiB a trainer.
    Push { fabric: String, mib: u64 },
    /// Nothing.
    Rest,
}

impl Work {
    /// How often this is seen before a job counts as started, and what of.
    fn first(&self) -> (usize, &'static str) {
        match self {
            Self::PushAndRest => (20, r#""event":"committed""#),
            Self::Push { .. } => (3, r#""event":"committed""#),
            Self::Rest => (1, r#""event":"started""#),
        }
    }
}

/// See the module.
pub(crate) struct Victim {
    pub(crate) job: Job,
    seen: Arc<Mutex<Vec<Instant>>>,
}

impl Victim {
    /// Starts it, and waits for its first pushes.
    pub(crate) fn start(weightsync: &Path, work: &Work) -> anyhow::Result<Self> {
        let setting = Setting {
            weightsync: weightsync.to_owned(),
            world: WORLD,
            deadline_seconds: DEADLINE.as_secs() as u32,
        };
        let (first, of) = work.first();
        let seen = Arc::<Mutex<Vec<Instant>>>::default();
        let counted = seen.clone();
        let hear = move |line: &str| {
            if line.contains(of) {
                locked(&counted).push(Instant::now());
            }
        };
        let mut job = Job::start(&setting, &[], Box::new(hear))?;
        let members = (0..WORLD.trainers).map(|rank| (true, rank));
        for (trains, rank) in members.chain((0..WORLD.inference).map(|rank| (false, rank))) {
            let (fabric, mib, pushes) = match work {
                Work::PushAndRest if trains => {
                    job.trainer(rank, &["--fabric", "local", "--steps", STEPS, "--pause", PAUSE_SECONDS])?;
                    continue;
                }
                Work::PushAndRest => {
                    job.inference(rank, &["--fabric", "local"], None)?;
                    continue;
                }
                Work::Push { fabric, mib } => (fabric.clone(), *mib, true),
                Work::Rest => ("local".into(), 1, false),
            };
            let part = Part { controller: job.address.to_string(), trains, rank, fabric, mib, pushes };
            let mut command = part.command()?;
            command.env(SECRET, &job.secret).stdin(Stdio::piped());
            let role = if trains { "trainer" } else { "inference" };
            job.add(format!("{role} {rank}"), command, None)?;
        }
        let until = Instant::now() + START_MAX;
        while locked(&seen).len() < first {
            job.check_alive()?;
            if Instant::now() > until {
                bail!("the job did not push within {START_MAX:?}: {:?}", job.log_since(0));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Self { job, seen })
    }

    /// Commits a second: the median of windows.
    pub(crate) fn pace(&self, from: Instant, to: Instant, window: Duration) -> f64 {
        let commits = locked(&self.seen);
        let mut counts = Vec::new();
        let mut start = from;
        while start + window <= to {
            counts.push(commits.iter().filter(|at| (start..start + window).contains(at)).count());
            start += window;
        }
        counts.sort_unstable();
        counts.get(counts.len() / 2).map_or(0.0, |count| *count as f64 / window.as_secs_f64())
    }

    /// Commits a second from the first to the last in this time: not a whole number, however few there are. NaN where there are
    /// not two.
    pub(crate) fn rate(&self, from: Instant, to: Instant) -> f64 {
        let commits = locked(&self.seen);
        let within: Vec<Instant> = commits.iter().copied().filter(|at| (from..to).contains(at)).collect();
        match within.as_slice() {
            [first, .., last] => (within.len() - 1) as f64 / (*last - *first).as_secs_f64(),
            _ => f64::NAN,
        }
    }
}
