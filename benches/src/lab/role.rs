//! The processes of a push in the lab, through the facade as users have it.

use std::io::BufRead;

use weightsync::{Controller, Error, Fabric, Inference, ParamMap, ServerConfig, SessionConfig, Trainer};
use weightsync_lab::{Lab, Side};

use super::job::Job;

/// A rank with its links, on a side that has `ranks`.
fn config(controller: &str, job: &Job, rank: u32, ranks: u32) -> SessionConfig {
    let mut config = SessionConfig::new(controller, job.world(), rank);
    config.fabric = Fabric::Tcp;
    config.nics = job.links_of(rank, ranks).map(Lab::device).collect();
    config.rail_bytes_per_second = Some(job.rail_bytes_per_second);
    config
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()
}

/// Says where it listens, and ends with the job.
pub(crate) fn controller(job: &str) -> anyhow::Result<()> {
    let job: Job = serde_json::from_str(job)?;
    runtime()?.block_on(async {
        let mut config = ServerConfig::loopback(job.world())?;
        config.listen = format!("{}:0", Lab::control_address(Side::A));
        // The lab's control link leads nowhere else.
        config.insecure = true;
        config.controller.options.chunk_bytes_max = job.chunk_bytes;
        let server = Controller::bind(config).await?.spawn(|_| {});
        println!("\"{}\"", server.local_addr());
        match server.ended().await {
            None => Ok(()),
            Some(reason) => Err(anyhow::Error::msg(reason)),
        }
    })
}

/// Pushes once for each line of standard input, and answers with the report.
pub(crate) fn trainer(controller: &str, rank: u32, job: &str) -> anyhow::Result<()> {
    let job: Job = serde_json::from_str(job)?;
    runtime()?.block_on(async {
        let mut trainer = Trainer::new(config(controller, &job, rank, job.trainers));
        let ids = trainer.allocate(job.sources(rank)?)?;
        for id in ids {
            if let Some(bytes) = trainer.tensor_mut(id) {
                bytes.fill(1);
            }
        }
        let mut session = trainer.connect().await?;
        for (line, version) in std::io::stdin().lock().lines().zip(1..) {
            line?;
            println!("{}", serde_json::to_string(&session.push(version).await?)?);
        }
        session.leave().await;
        Ok(())
    })
}

/// Takes versions until the trainers leave.
pub(crate) fn inference(controller: &str, rank: u32, job: &str) -> anyhow::Result<()> {
    let job: Job = serde_json::from_str(job)?;
    runtime()?.block_on(async {
        let mut inference = Inference::new(config(controller, &job, rank, job.inference));
        for tensor in job.wanted(rank)? {
            let map = ParamMap::tensor(tensor.name.clone());
            inference.register(tensor.name, tensor.dtype, &tensor.shape, map)?;
        }
        let mut session = inference.connect().await?;
        loop {
            match session.wait_version(u64::MAX, None).await {
                Err(Error::Finished { .. }) => return Ok(()),
                other => drop(other?),
            }
        }
    })
}
