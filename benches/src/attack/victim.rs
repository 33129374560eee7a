//! The job that is attacked: a controller, two trainers and an inference rank that push over shared memory without an end.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::bail;
use weightsync::World;

use crate::job::{Job, Setting, locked};

/// Between pushes, as if there were a training step: so that the pace depends on how fast the control plane answers, and
/// not on how many cores the attacker leaves.
const PAUSE_SECONDS: &str = "0.02";

/// More than can be pushed meanwhile.
const STEPS: &str = "1000000000";

/// The longest that a rank waits without progress.
const DEADLINE_SECONDS: u32 = 20;

/// How long the job may take to start.
const START_MAX: Duration = Duration::from_secs(30);

/// See the module.
pub(crate) struct Victim {
    pub(crate) job: Job,
    commits: Arc<Mutex<Vec<Instant>>>,
}

impl Victim {
    /// Starts it, and waits for its first pushes.
    pub(crate) fn start(weightsync: &Path) -> anyhow::Result<Self> {
        let setting = Setting {
            weightsync: weightsync.to_owned(),
            world: World { trainers: 2, inference: 1 },
            deadline_seconds: DEADLINE_SECONDS,
        };
        let commits = Arc::<Mutex<Vec<Instant>>>::default();
        let counted = commits.clone();
        let hear = move |line: &str| {
            if line.contains(r#""event":"committed""#) {
                locked(&counted).push(Instant::now());
            }
        };
        let mut job = Job::start(&setting, &[], Box::new(hear))?;
        for rank in 0..setting.world.trainers {
            job.trainer(rank, &["--fabric", "local", "--steps", STEPS, "--pause", PAUSE_SECONDS])?;
        }
        job.inference(0, &["--fabric", "local"], None)?;
        let until = Instant::now() + START_MAX;
        while locked(&commits).len() < 20 {
            job.check_alive()?;
            if Instant::now() > until {
                bail!("the job did not push within {START_MAX:?}: {:?}", job.log_since(0));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Self { job, commits })
    }

    /// Commits a second: the median of windows.
    pub(crate) fn pace(&self, from: Instant, to: Instant, window: Duration) -> f64 {
        let commits = locked(&self.commits);
        let mut counts = Vec::new();
        let mut start = from;
        while start + window <= to {
            counts.push(commits.iter().filter(|at| (start..start + window).contains(at)).count());
            start += window;
        }
        counts.sort_unstable();
        counts.get(counts.len() / 2).map_or(0.0, |count| *count as f64 / window.as_secs_f64())
    }
}
