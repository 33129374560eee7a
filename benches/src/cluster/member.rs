//! A rank: tells rank 0 what its host has, then takes part in one job after another through the `weightsync` facade.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tokio::net::TcpStream;
use weightsync::{Error, Inference, Rank, Secret, SessionConfig, Trainer};

use super::facts::RankFacts;
use super::job::{FromRank, Job, Push, Pushed, ToRank};
use super::link::{self, Key, Link, Who};

/// What a rank needs to find its job.
pub(crate) struct Member {
    pub(crate) who: Who,
    pub(crate) local_rank: Option<u32>,
    /// Rank 0's `host:port`.
    pub(crate) address: String,
    pub(crate) secret: String,
    pub(crate) deadline: Duration,
}

/// Between attempts to reach rank 0, which may still be starting.
const RETRY: Duration = Duration::from_millis(100);

/// The shortest time between two samples of a push.
const SAMPLE_EVERY: Duration = Duration::from_millis(2);

/// Samples of a push. When there are more, every other one goes and the time between them doubles.
const SAMPLES_MAX: usize = 512;

impl Member {
    /// Serves until rank 0 says that it is over.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let stream = self.connect().await?;
        let root = stream.peer_addr()?;
        let (link, mut incoming) = Link::start(stream, self.deadline)?;
        link.send(&FromRank::Facts(Box::new(RankFacts::read(self.local_rank)?))).await?;
        loop {
            let message = incoming.recv().await.context("the connection to rank 0 is gone")?;
            match message.map_err(|reason| anyhow::anyhow!("rank 0 was lost: {reason}"))? {
                ToRank::End { given_up: false } => break,
                ToRank::End { given_up: true } => bail!("the benchmark was given up; rank 0's side says why"),
                ToRank::Run(job) => {
                    let done = match self.take_part(*job, root).await {
                        Ok(pushed) => FromRank::Done(pushed),
                        Err(error) => FromRank::Failed(format!("{error:#}")),
                    };
                    link.send(&done).await?;
                }
            }
        }
        link.close().await;
        Ok(())
    }

    /// Tries until the deadline: rank 0 may start later than the others.
    async fn connect(&self) -> anyhow::Result<TcpStream> {
        let key = Key::new(&self.secret);
        let until = Instant::now() + self.deadline;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let error = match tokio::time::timeout(left, TcpStream::connect(&self.address)).await {
                Ok(Ok(mut stream)) => {
                    link::introduce(&mut stream, &key, self.who).await?;
                    return Ok(stream);
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => "no answer".into(),
            };
            if Instant::now() + RETRY >= until {
                let (address, waited) = (&self.address, self.deadline);
                bail!(
                    "cannot reach rank 0 at {address} within {waited:?}: {error}; is it running, is the port open?"
                );
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn take_part(&self, job: Job, root: SocketAddr) -> anyhow::Result<Pushed> {
        let controller = SocketAddr::new(root.ip(), job.controller_port);
        let rank = match job.member {
            Rank::Trainer(rank) => rank.0,
            Rank::Receiver(rank) => rank.0,
        };
        let mut config = SessionConfig::new(controller.to_string(), job.world(), rank);
        config.secret = Secret::new(&self.secret);
        config.fabric = job.rails.fabric.parse()?;
        config.deadline = job.rails.deadline;
        config.bind = job.bind;
        config.rail_bytes_per_second = job.rails.line_bytes_per_second;
        let named = &job.rails.nics;
        if let Some(group) = (job.local_rank as usize).checked_rem(named.len()) {
            config.nics.clone_from(&named[group]);
        }
        config.place(job.local_rank, job.ranks_on_host)?;
        match job.member {
            Rank::Trainer(_) => push(config, job).await,
            Rank::Receiver(_) => receive(config, job).await,
        }
    }
}

/// A trainer's part: a round to warm up, the counted ones, and one that is sampled.
async fn push(config: SessionConfig, job: Job) -> anyhow::Result<Pushed> {
    let Rank::Trainer(rank) = job.member else { bail!("{} is no trainer", job.member) };
    let rounds = job.rounds;
    let trainer = tokio::task::spawn_blocking(move || {
        let mut trainer = Trainer::new(config);
        // Touched, so that no round pays for the kernel's clearing of pages.
        for id in trainer.allocate(job.payload.tensors(rank.0, job.world())?)? {
            if let Some(bytes) = trainer.tensor_mut(id) {
                bytes.fill(rank.0 as u8);
            }
        }
        anyhow::Ok(trainer)
    });
    let mut session = trainer.await??.connect().await?;
    let mut pushed = Pushed::default();
    for round in 0..=rounds {
        let report = session.push(u64::from(round) + 1).await?;
        pushed.bound_seconds = report.bound_seconds;
        if round > 0 {
            let (bytes, writes) = (report.bytes, report.writes);
            let (write_seconds, seconds) = (report.write_seconds, report.seconds);
            pushed.rounds.push(Push { bytes, writes, write_seconds, seconds });
            pushed.rails = report.rails;
        }
    }
    let sampler = Sampler::start(session.progress());
    session.push(u64::from(rounds) + 2).await?;
    pushed.samples = sampler.finish();
    session.leave().await;
    Ok(pushed)
}

/// An inference rank's part: takes versions until the trainers leave.
async fn receive(config: SessionConfig, job: Job) -> anyhow::Result<Pushed> {
    let Rank::Receiver(rank) = job.member else { bail!("{} is no inference rank", job.member) };
    let params = tokio::task::spawn_blocking(move || job.payload.params(rank.0, job.world()));
    let mut inference = Inference::new(config);
    for param in params.await?? {
        inference.register(param.name, param.dtype, &param.shape, param.map)?;
    }
    let mut session = inference.connect().await?;
    loop {
        match session.wait_version(u64::MAX, None).await {
            Err(Error::Finished { .. }) => return Ok(Pushed::default()),
            other => drop(other?),
        }
    }
}

/// Reads a push's counter of delivered bytes now and then, on a thread of its own.
struct Sampler {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Vec<(f64, u64)>>,
}

impl Sampler {
    fn start(progress: Arc<AtomicU64>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let (began, mut every, mut samples) = (Instant::now(), SAMPLE_EVERY, Vec::new());
            loop {
                // Read before the counter, so that the last sample has the whole push.
                let last = stopped.load(Ordering::Acquire);
                samples.push((began.elapsed().as_secs_f64(), progress.load(Ordering::Relaxed)));
                if last {
                    return since_reset(samples);
                }
                if samples.len() >= SAMPLES_MAX {
                    samples = samples.into_iter().step_by(2).collect();
                    every *= 2;
                }
                std::thread::sleep(every);
            }
        });
        Self { stop, thread }
    }

    fn finish(self) -> Vec<(f64, u64)> {
        self.stop.store(true, Ordering::Release);
        self.thread.join().unwrap_or_default()
    }
}

/// Before a push sets the counter to 0 it holds the last push's bytes: those samples are not of this one.
fn since_reset(samples: Vec<(f64, u64)>) -> Vec<(f64, u64)> {
    let fell = samples.windows(2).rposition(|pair| matches!(pair, [(_, a), (_, b)] if b < a));
    samples.into_iter().skip(fell.map_or(0, |at| at + 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_last_push_left_in_the_counter_is_not_of_this_one() {
        assert_eq!(since_reset(vec![(0.0, 9), (1.0, 9), (2.0, 0), (3.0, 5)]), [(2.0, 0), (3.0, 5)]);
        assert_eq!(since_reset(vec![(0.0, 0), (1.0, 4)]), [(0.0, 0), (1.0, 4)]);
        assert!(since_reset(Vec::new()).is_empty());
    }

    #[test]
    fn a_sampler_ends_with_the_whole_push() {
        let progress = Arc::new(AtomicU64::new(7));
        let sampler = Sampler::start(progress.clone());
        progress.store(0, Ordering::Relaxed);
        progress.store(9, Ordering::Relaxed);
        assert_eq!(sampler.finish().last().map(|sample| sample.1), Some(9));
    }
}
