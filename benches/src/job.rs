//! A job of real processes: a controller and ranks of the `weightsync` command on loopback, with a secret and a small
//! checkpoint of their own. Dropping it kills them.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use weightsync::{Secret, World};
use weightsync_cli::synthetic::{Shape, ensure};

/// How often processes are looked at that should end.
const POLL: Duration = Duration::from_millis(20);

/// What is done with each line of a process's standard output.
pub(crate) type Hear = Box<dyn FnMut(&str) + Send>;

/// What its processes have in common.
#[derive(Clone)]
pub(crate) struct Setting {
    /// The weightsync command.
    pub(crate) weightsync: PathBuf,
    pub(crate) world: World,
    /// The longest that a rank waits without progress.
    pub(crate) deadline_seconds: u32,
}

/// See the module.
pub(crate) struct Job {
    setting: Setting,
    processes: Vec<(String, Child)>,
    /// Where its controller listens.
    pub(crate) address: SocketAddr,
    pub(crate) secret: String,
    readers: Vec<JoinHandle<()>>,
    log: Arc<Mutex<Vec<String>>>,
    /// The checkpoint; removed with the job.
    folder: tempfile::TempDir,
}

impl Job {
    /// Starts the controller with these options beside its own.
    pub(crate) fn start(setting: &Setting, options: &[&str], hear: Hear) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        ensure(folder.path(), &Shape::tiny(), 1, &mut |_, _| {})?;
        let mut job = Self {
            setting: setting.clone(),
            processes: Vec::new(),
            address: ([127, 0, 0, 1], 0).into(),
            secret: Secret::random_text()?,
            readers: Vec::new(),
            log: Arc::default(),
            folder,
        };
        let mut controller = job.command("controller");
        controller.args(["--listen", "127.0.0.1:0"]).args(options).stdin(Stdio::null());
        let mut lines = job.spawn("controller", controller.stdout(Stdio::piped()))?;
        let mut first = String::new();
        lines.read_line(&mut first)?;
        let first: serde_json::Value = serde_json::from_str(&first)
            .with_context(|| format!("the controller ended at once: {:?}", job.log_since(0)))?;
        let address = first["address"].as_str().context("the controller does not say where it listens")?;
        job.address = address.parse()?;
        job.each_line(lines, hear);
        Ok(job)
    }

    /// Starts trainer `rank`.
    pub(crate) fn trainer(&mut self, rank: u32, options: &[&str]) -> anyhow::Result<()> {
        let command = self.rank("push", rank, options);
        self.add(format!("trainer {rank}"), command, None)
    }

    /// Starts inference rank `rank`.
    pub(crate) fn inference(
        &mut self,
        rank: u32,
        options: &[&str],
        hear: Option<Hear>,
    ) -> anyhow::Result<()> {
        let command = self.rank("serve", rank, options);
        self.add(format!("inference {rank}"), command, hear)
    }

    /// Names and process ids, in the order in which they were started.
    pub(crate) fn processes(&self) -> impl Iterator<Item = (&str, u32)> {
        self.processes.iter().map(|(name, child)| (name.as_str(), child.id()))
    }

    /// Lines of standard error, without the first so many.
    pub(crate) fn log_since(&self, lines: usize) -> Vec<String> {
        locked(&self.log).iter().skip(lines).cloned().collect()
    }

    /// Fails if a process has ended.
    pub(crate) fn check_alive(&mut self) -> anyhow::Result<()> {
        for (name, child) in &mut self.processes {
            if let Some(status) = child.try_wait()? {
                bail!("{name} ended with {status}: {:?}", locked(&self.log).last());
            }
        }
        Ok(())
    }

    /// Waits until every process has ended by itself, and fails if one does not within `at_most`, or not in good order. Gives the
    /// lines of standard error.
    pub(crate) fn end(mut self, at_most: Duration) -> anyhow::Result<Vec<String>> {
        let until = Instant::now() + at_most;
        let mut failed = Vec::new();
        for (name, child) in &mut self.processes {
            let status = loop {
                match child.try_wait()? {
                    Some(status) => break status,
                    None if Instant::now() > until => bail!("{name} does not end within {at_most:?}"),
                    None => std::thread::sleep(POLL),
                }
            };
            if !status.success() {
                failed.push(format!("{name} ended with {status}"));
            }
        }
        // Their output has ended with them: nothing that they said is missed.
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        let log = self.log_since(0);
        if failed.is_empty() {
            return Ok(log);
        }
        bail!("{}: {log:?}", failed.join(", "))
    }

    fn rank(&self, role: &str, rank: u32, options: &[&str]) -> Command {
        let mut command = self.command(role);
        command.args(["--rank", &rank.to_string(), "--controller", &self.address.to_string()]);
        command.args(options).arg("--until-stdin-closes").arg("--checkpoint").arg(self.folder.path());
        command.stdin(Stdio::piped());
        command
    }

    fn command(&self, role: &str) -> Command {
        let Setting { weightsync, world, deadline_seconds } = &self.setting;
        let mut command = Command::new(weightsync);
        command.args([role, "--trainers", &world.trainers.to_string()]);
        command.args(["--inference", &world.inference.to_string()]);
        command.args(["--deadline", &deadline_seconds.to_string(), "--json"]);
        command.env("WEIGHTSYNC_SECRET", &self.secret);
        // Nothing of the caller's environment makes it another job.
        for variable in ["RUST_LOG", "WEIGHTSYNC_LOG", "LOCAL_RANK"] {
            command.env_remove(variable);
        }
        for of_tls in ["CA", "CERT", "KEY", "NAME"] {
            command.env_remove(format!("WEIGHTSYNC_TLS_{of_tls}"));
        }
        command
    }

    /// Starts a process of the job.
    pub(crate) fn add(
        &mut self,
        name: String,
        mut command: Command,
        hear: Option<Hear>,
    ) -> anyhow::Result<()> {
        let Some(hear) = hear else {
            return self.spawn(&name, command.stdout(Stdio::null())).map(drop);
        };
        let lines = self.spawn(&name, command.stdout(Stdio::piped()))?;
        self.each_line(lines, hear);
        Ok(())
    }

    /// Starts it and keeps every line of its standard error; gives its standard output, which is empty if it has no pipe.
    fn spawn(&mut self, name: &str, command: &mut Command) -> anyhow::Result<Box<dyn BufRead + Send>> {
        let program: &Path = &self.setting.weightsync;
        let mut child = command
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        self.processes.push((name.to_owned(), child));
        let log = self.log.clone();
        if let Some(stderr) = stderr {
            let keep = move |line: &str| locked(&log).push(line.to_owned());
            self.each_line(BufReader::new(stderr), Box::new(keep));
        }
        Ok(match stdout {
            Some(stdout) => Box::new(BufReader::new(stdout)),
            None => Box::new(std::io::empty()),
        })
    }

    /// Calls this with each line, on a thread of its own; it is dropped after the last.
    fn each_line(&mut self, lines: impl BufRead + Send + 'static, mut hear: Hear) {
        let read = move || lines.lines().map_while(Result::ok).for_each(|line| hear(&line));
        self.readers.push(std::thread::spawn(read));
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        for (_, child) in &mut self.processes {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What it guards, also after a thread that held it has panicked.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
