//! The ranks of the tortured job, as processes: sessions as a trainer and an engine have them, which go on after whatever may be
//! tried again. What must not be ends the process with [`WRONG`].

use std::io::BufRead as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustix::process::{Signal, getpid, kill_process};
use serde::{Deserialize, Serialize};
use weightsync::{
    CommitMode, DType, Error, Inference, InferenceSession, ParamId, RendezvousError, Secret, Served,
    SessionConfig, Trainer, TrainerSession,
};

use super::eye::{Eye, Place, Seen, Told, was_committed};
use super::weights::{self, Expected, WORLD, tensors};

/// Exit status of a rank that saw what must not be.
pub(super) const WRONG: i32 = 3;

/// Between pushes: a time in which a version is served.
const TRAINING: Duration = Duration::from_millis(8);

/// Has a trainer stop itself (SIGSTOP) once it has begun to write. Others stop it if it has not done so after this time.
pub(super) const STOP_IN_A_WRITE: &str = "stop in a write";
pub(super) const NEXT_WRITE_MAX: Duration = Duration::from_millis(400);

/// Then it goes on for a moment first, of about a millisecond at most.
const SPINS_MAX: u32 = 10_000;

/// Where the job's secret is.
pub(super) const SECRET: &str = "WEIGHTSYNC_SECRET";

/// What a rank is told.
#[derive(Serialize, Deserialize)]
pub(super) struct Part {
    pub(super) controller: String,
    pub(super) rank: u32,
    pub(super) deadline: Duration,
    pub(super) fabric: String,
    /// What a version does to the weights that an inference rank serves meanwhile.
    pub(super) mode: String,
    /// Empty for the one that reaches the controller.
    pub(super) nics: Vec<String>,
    /// Where the controller records commits.
    pub(super) record: PathBuf,
    /// How long an inference rank waits for a version before it looks after other things; `None`: for as long as it takes.
    pub(super) patience: Option<Duration>,
}

/// What a rank says, a line each.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(super) enum Said {
    Connected,
    /// A trainer's push is committed.
    Pushed {
        version: u64,
    },
    /// It is not, as far as the trainer knows.
    Failed {
        version: u64,
        reason: String,
    },
    /// An inference rank serves it. Beside it what was compared in this process so far.
    Served {
        version: u64,
        bytes: u64,
        looks: u64,
    },
    /// What must not be.
    Wrong {
        what: String,
    },
    /// The process ends because its session cannot go on, or never came to be.
    GaveUp {
        connected: bool,
        reason: String,
    },
    /// The process ends in good order.
    Ended {
        bytes: u64,
        looks: u64,
    },
}

fn say(what: &Said) {
    if let Ok(line) = serde_json::to_string(what) {
        println!("{line}");
    }
}

fn wrong(what: String) -> ! {
    say(&Said::Wrong { what });
    std::process::exit(WRONG)
}

fn gave_up(connected: bool, error: &Error) -> ! {
    say(&Said::GaveUp { connected, reason: error.to_string() });
    std::process::exit(1)
}

impl Part {
    fn session(&self) -> anyhow::Result<SessionConfig> {
        let mut config = SessionConfig::new(self.controller.clone(), WORLD, self.rank);
        config.secret = Secret::new(std::env::var(SECRET).context(SECRET)?);
        config.deadline = self.deadline;
        config.fabric = self.fabric.parse()?;
        config.nics.clone_from(&self.nics);
        Ok(config)
    }
}

/// As the product's own commands: a few threads are enough for a session, and what it logs goes to standard error.
fn start(part: &str) -> anyhow::Result<(Part, tokio::runtime::Runtime)> {
    tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stderr).init();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    Ok((serde_json::from_str(part)?, runtime))
}

/// Pushes version after version, up to the one that standard input names.
pub(crate) fn trainer(part: &str) -> anyhow::Result<()> {
    let (part, runtime) = start(part)?;
    let last = Arc::new(AtomicU64::new(u64::MAX));
    runtime.block_on(async {
        let mut trainer = Trainer::new(part.session()?);
        let owned = weights::owned(part.rank);
        let ids = trainer.allocate(owned.into_iter().map(weights::spec).collect::<Result<_, _>>()?)?;
        let mut session = trainer.connect().await.unwrap_or_else(|error| gave_up(false, &error));
        say(&Said::Connected);
        let asked = last.clone();
        std::thread::spawn(move || obey(&asked));
        let mut filled = 0;
        while session.committed() < last.load(Ordering::Relaxed) {
            let version = session.committed() + 1;
            tokio::time::sleep(TRAINING).await;
            if filled != version {
                for (tensor, id) in owned.into_iter().zip(&ids) {
                    weights::fill(version, tensor, session.tensor_mut(*id)?);
                }
                filled = version;
            }
            push(&mut session, version).await;
        }
        session.leave().await;
        say(&Said::Ended { bytes: 0, looks: 0 });
        Ok(())
    })
}

/// Does what standard input says, line by line.
fn obey(last: &AtomicU64) {
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        if line == STOP_IN_A_WRITE {
            let until = Instant::now() + NEXT_WRITE_MAX / 2;
            let rails = rails();
            let wait_while = |busy| while runs(rails.as_deref()) == busy && Instant::now() < until {};
            wait_while(true);
            wait_while(false);
            // The nanoseconds of the clock are as good as any number.
            let spins = until.saturating_duration_since(Instant::now()).subsec_nanos() % SPINS_MAX;
            (0..spins).for_each(|_| std::hint::spin_loop());
            // Later it is stopped by others, and nobody would wake it again.
            if Instant::now() < until {
                let _ = kill_process(getpid(), Signal::STOP);
            }
        } else if let Ok(version) = line.parse() {
            last.store(version, Ordering::Relaxed);
        }
    }
}

/// The thread of the rails, which sleeps between pushes. No more than an aim depends on its name.
fn rails() -> Option<PathBuf> {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let is_rails = |task: &PathBuf| {
        std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("rails"))
    };
    tasks.map(|task| task.path()).find(is_rails)
}

fn runs(task: Option<&std::path::Path>) -> bool {
    let stat = task.and_then(|task| std::fs::read_to_string(task.join("stat")).ok());
    stat.is_some_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with('R')))
}

async fn push(session: &mut TrainerSession, version: u64) {
    match session.push(version).await {
        Ok(report) => say(&Said::Pushed { version: report.version }),
        Err(Error::Unconfirmed { .. }) => say(&Said::Pushed { version }),
        Err(error) if error.may_be_tried_again() => say(&Said::Failed { version, reason: error.to_string() }),
        Err(error) => gave_up(true, &error),
    }
}

/// Serves version after version until all trainers have left, and compares them.
pub(crate) fn inference(part: &str) -> anyhow::Result<()> {
    let (part, runtime) = start(part)?;
    runtime.block_on(async {
        let config = part.session()?;
        let (mode, told, seen) =
            (part.mode.parse().map_err(anyhow::Error::msg)?, Told::default(), Arc::<Seen>::default());
        let mut inference = Inference::new(config);
        inference.commit_mode(mode).hooks(told.hooks());
        let mut ids = Vec::new();
        for tensor in tensors() {
            let (shape, map) = weights::param(tensor, part.rank)?;
            ids.push(inference.register(weights::name(tensor), DType::U8, &shape, map)?);
        }
        let mut session = inference.connect().await.unwrap_or_else(|error| gave_up(false, &error));
        say(&Said::Connected);
        let place = |param: &xfer_plan::DestinationParam| Place {
            offset: param.offset,
            bytes: param.bytes().unwrap_or(0) as usize,
        };
        let places = session.params().iter().map(place).collect();
        let eye =
            Eye::open(part.rank, places, told, part.record.clone(), Arc::clone(&seen), |what| wrong(what));
        let seen = || (seen.bytes.load(Ordering::Relaxed), seen.looks.load(Ordering::Relaxed));

        let mut expected = Expected::new(0, part.rank);
        loop {
            let waited = session.wait_version(expected.version() + 1, part.patience).await;
            if let Err(error) = compare(&session, &ids, &mut expected, (&part, mode)) {
                wrong(format!("{error:#}"));
            }
            match waited {
                Ok(report) => {
                    if report.version < expected.version() {
                        wrong(format!("version {} after {}", report.version, expected.version()));
                    }
                    let (bytes, looks) = seen();
                    say(&Said::Served { version: report.version, bytes, looks });
                }
                Err(Error::Finished { .. }) => break,
                Err(Error::NotYet { .. } | Error::Aborted { .. }) => {}
                Err(Error::Rendezvous(RendezvousError::Unreachable { .. })) => {}
                Err(error) => gave_up(true, &error),
            }
        }
        eye.close();
        session.leave().await;
        let (bytes, looks) = seen();
        say(&Said::Ended { bytes, looks });
        Ok(())
    })
}

/// Compares every byte that the session gives out, between two calls of it.
fn compare(
    session: &InferenceSession,
    ids: &[ParamId],
    expected: &mut Expected,
    (part, mode): (&Part, CommitMode),
) -> anyhow::Result<()> {
    let served = session.served();
    let Served::Version(version) = served else {
        if mode != CommitMode::InPlace && expected.version() > 0 {
            bail!("commit mode {mode}, and yet no version is served but {served}");
        }
        let read = session.read(*ids.first().context("no parameter")?, 0, &mut [0]);
        return if read.is_err() {
            Ok(())
        } else {
            bail!("bytes are given out though it serves version {served}")
        };
    };
    if version == 0 {
        return Ok(());
    }
    if version < expected.version() {
        bail!("version {version} is served after {}", expected.version());
    }
    was_committed(version, &part.record)?;
    *expected = Expected::new(version, part.rank);
    for (tensor, id) in tensors().zip(ids) {
        let bytes =
            session.params().get(tensor as usize).and_then(|param| param.bytes()).context("no parameter")?;
        let mut found = vec![0; bytes as usize];
        session.read(*id, 0, &mut found)?;
        expected.compare(tensor, &found).map_err(anyhow::Error::msg).context("what the session gives out")?;
    }
    Ok(())
}
