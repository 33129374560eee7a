//! The job that is attacked: a controller, two trainers and an inference rank, processes of the `weightsync` command, pushing
//! over shared memory without an end. Dropping it kills them.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use weightsync::Secret;
use weightsync_cli::synthetic::{Shape, ensure};

/// Between pushes, as if there were a training step: so that the pace depends on how fast the control plane answers, and
/// not on how many cores the attacker leaves.
const PAUSE_SECONDS: &str = "0.02";

/// More than can be pushed meanwhile.
const STEPS: &str = "1000000000";

/// The longest that a rank waits without progress.
const DEADLINE_SECONDS: &str = "20";

/// How long the job may take to start.
const START_MAX: Duration = Duration::from_secs(30);

/// See the module.
pub(crate) struct Job {
    processes: Vec<(String, Mutex<Child>)>,
    address: SocketAddr,
    secret: String,
    heard: Arc<Heard>,
    /// The checkpoint; removed with the job.
    _folder: tempfile::TempDir,
}

#[derive(Default)]
struct Heard {
    commits: Mutex<Vec<Instant>>,
    log: Mutex<Vec<String>>,
}

impl Job {
    /// Starts it, and waits for its first pushes.
    pub(crate) fn start(weightsync: &Path) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        ensure(folder.path(), &Shape::tiny(), 1, &mut |_, _| {})?;
        let secret = Secret::random_text()?;
        let heard = Arc::new(Heard::default());
        let command = |words: &str| {
            let mut command = Command::new(weightsync);
            command.args(words.split_whitespace()).args(["--trainers", "2", "--inference", "1", "--json"]);
            command.args(["--deadline", DEADLINE_SECONDS]).env("WEIGHTSYNC_SECRET", &secret);
            // Nothing of the caller's environment makes it another job.
            for variable in ["RUST_LOG", "WEIGHTSYNC_LOG", "LOCAL_RANK"] {
                command.env_remove(variable);
            }
            for of_tls in ["CA", "CERT", "KEY", "NAME"] {
                command.env_remove(format!("WEIGHTSYNC_TLS_{of_tls}"));
            }
            command
        };
        let mut controller = command("controller --listen 127.0.0.1:0");
        let mut controller = controller
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", weightsync.display()))?;
        let (stdout, stderr) = (controller.stdout.take(), controller.stderr.take());
        let mut job = Self {
            processes: vec![("the controller".into(), Mutex::new(controller))],
            address: ([127, 0, 0, 1], 0).into(),
            secret: secret.clone(),
            heard: heard.clone(),
            _folder: folder,
        };
        let mut lines = BufReader::new(stdout.context("no pipe")?).lines();
        let first: serde_json::Value =
            serde_json::from_str(&lines.next().context("the controller ended at once")??)?;
        let address = first["address"].as_str().context("the controller does not say where it listens")?;
        job.address = address.parse()?;
        let hearing = heard.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if line.contains(r#""event":"committed""#) {
                    locked(&hearing.commits).push(Instant::now());
                }
            }
        });
        keep(stderr.context("no pipe")?, heard.clone());
        for words in ["push --rank 0", "push --rank 1", "serve --rank 0"] {
            let mut rank = command(words);
            rank.args(["--fabric", "local", "--until-stdin-closes", "--controller", address, "--checkpoint"]);
            rank.arg(job._folder.path());
            if words.starts_with("push") {
                rank.args(["--steps", STEPS, "--pause", PAUSE_SECONDS]);
            }
            let mut rank = rank.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
            keep(rank.stderr.take().context("no pipe")?, heard.clone());
            job.processes.push((words.into(), Mutex::new(rank)));
        }
        let until = Instant::now() + START_MAX;
        while locked(&job.heard.commits).len() < 20 {
            job.check_alive()?;
            if Instant::now() > until {
                bail!("the job did not push within {START_MAX:?}: {:?}", job.log_since(0));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(job)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn secret(&self) -> &str {
        &self.secret
    }

    /// Commits a second: the median of windows.
    pub(crate) fn pace(&self, from: Instant, to: Instant, window: Duration) -> f64 {
        let commits = locked(&self.heard.commits);
        let mut counts = Vec::new();
        let mut start = from;
        while start + window <= to {
            counts.push(commits.iter().filter(|at| (start..start + window).contains(at)).count());
            start += window;
        }
        counts.sort_unstable();
        counts.get(counts.len() / 2).map_or(0.0, |count| *count as f64 / window.as_secs_f64())
    }

    /// Lines of standard error so far.
    pub(crate) fn log_lines(&self) -> usize {
        locked(&self.heard.log).len()
    }

    /// Those since then.
    pub(crate) fn log_since(&self, lines: usize) -> Vec<String> {
        locked(&self.heard.log).iter().skip(lines).cloned().collect()
    }

    /// Fails if a process has ended.
    pub(crate) fn check_alive(&self) -> anyhow::Result<()> {
        for (name, process) in &self.processes {
            if let Some(status) = locked(process).try_wait()? {
                bail!("{name} ended with {status}: {:?}", self.log_since(0).last());
            }
        }
        Ok(())
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        for (_, process) in &self.processes {
            let mut process = locked(process);
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// Keeps every line of a process's standard error.
fn keep(stderr: impl Read + Send + 'static, heard: Arc<Heard>) {
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            locked(&heard.log).push(line);
        }
    });
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
