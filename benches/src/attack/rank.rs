//! Ranks that do nothing but push, or serve what is pushed: processes of this program, so that no stand-in for a training step is a
//! rest for the job.

use std::process::Command;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use weightsync::{
    DType, Error, Fabric, Inference, ParamMap, Secret, SessionConfig, TensorSpec, Trainer, World,
};

use crate::victim::{DEADLINE, WORLD};

/// The word with which this program is a rank.
pub(crate) const RANK: &str = "rank";

/// Where a rank finds the job's secret.
pub(crate) const SECRET: &str = "WEIGHTSYNC_SECRET";

/// Columns of a tensor in bytes: WRITEs are as long as the planner cuts them.
const ROW_BYTES: u64 = 1 << 20;

/// What a rank is told.
#[derive(Serialize, Deserialize)]
pub(crate) struct Part {
    pub(crate) controller: String,
    pub(crate) trains: bool,
    pub(crate) rank: u32,
    pub(crate) fabric: String,
    /// Of each trainer, per push.
    pub(crate) mib: u64,
    /// Whether a trainer pushes; otherwise it is only there.
    pub(crate) pushes: bool,
}

impl Part {
    /// A process that plays it until its standard input closes.
    pub(crate) fn command(&self) -> anyhow::Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args([RANK, &serde_json::to_string(self)?]);
        Ok(command)
    }

    fn tensor(&self, trainer: u32) -> Result<TensorSpec, Error> {
        TensorSpec::whole(format!("w.{trainer}"), DType::U8, &[self.mib, ROW_BYTES])
    }

    fn session(&self) -> anyhow::Result<SessionConfig> {
        let mut config = SessionConfig::new(self.controller.clone(), WORLD, self.rank);
        config.secret = Secret::new(std::env::var(SECRET).context(SECRET)?);
        config.deadline = DEADLINE;
        config.fabric = self.fabric.parse::<Fabric>()?;
        Ok(config)
    }
}

/// Plays a part, given as JSON.
pub(crate) fn run(part: &str) -> anyhow::Result<()> {
    let part: Part = serde_json::from_str(part)?;
    // Whoever started it is gone when its standard input closes.
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        std::process::exit(0)
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async { if part.trains { train(&part).await } else { serve(&part).await } })
}

async fn train(part: &Part) -> anyhow::Result<()> {
    let mut trainer = Trainer::new(part.session()?);
    for id in trainer.allocate(vec![part.tensor(part.rank)?])? {
        if let Some(bytes) = trainer.tensor_mut(id) {
            bytes.fill(1);
        }
    }
    let mut session = trainer.connect().await?;
    if !part.pushes {
        // Until its standard input closes.
        std::future::pending::<()>().await;
    }
    for version in 1.. {
        session.push(version).await?;
    }
    Ok(())
}

async fn serve(part: &Part) -> anyhow::Result<()> {
    let mut inference = Inference::new(part.session()?);
    let World { trainers, .. } = WORLD;
    for tensor in (0..trainers).map(|trainer| part.tensor(trainer)) {
        let TensorSpec { name, dtype, shape, .. } = tensor?;
        inference.register(name.clone(), dtype, &shape, ParamMap::tensor(name))?;
    }
    let mut session = inference.connect().await?;
    loop {
        session.wait_version(u64::MAX, None).await?;
    }
}
