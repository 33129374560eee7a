//! The processes of a push in the lab, through the facade as users have it.

use std::io::BufRead;

use weightsync::{
    Controller, DType, Error, Fabric, Inference, ParamMap, ServerConfig, SessionConfig, TensorSpec, Trainer,
    World,
};
use weightsync_lab::{Lab, Side};

/// Columns of a tensor in bytes: the longest WRITE that is measured.
const ROW_BYTES: u64 = 1 << 20;

/// Ranks a side.
pub(super) const RANKS: u32 = 2;

const WORLD: World = World { trainers: RANKS, inference: RANKS };

/// What trainer `from` has for inference rank `to`.
fn tensor(from: u32, to: u32) -> String {
    format!("w.{from}.{to}")
}

/// Of each tensor, when all of them have `bytes`.
fn shape(bytes: u64) -> [u64; 2] {
    [bytes / u64::from(RANKS * RANKS) / ROW_BYTES, ROW_BYTES]
}

/// The NICs of a rank: its share of the links.
fn config(controller: &str, rank: u32, links: u16) -> SessionConfig {
    let mut config = SessionConfig::new(controller, WORLD, rank);
    config.fabric = Fabric::Tcp;
    let each = links / RANKS as u16;
    config.nics = (rank as u16 * each..(rank as u16 + 1) * each).map(Lab::device).collect();
    config
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()
}

/// Says where it listens, and ends with the job.
pub(crate) fn controller(chunk_bytes: u64) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let mut config = ServerConfig::loopback(WORLD)?;
        config.listen = format!("{}:0", Lab::control_address(Side::A));
        // The lab's control link leads nowhere else.
        config.insecure = true;
        config.controller.options.chunk_bytes_max = chunk_bytes;
        let server = Controller::bind(config).await?.spawn(|_| {});
        println!("\"{}\"", server.local_addr());
        match server.ended().await {
            None => Ok(()),
            Some(reason) => Err(anyhow::Error::msg(reason)),
        }
    })
}

/// Pushes once for each line of standard input, and answers with the report.
pub(crate) fn trainer(controller: &str, rank: u32, links: u16, bytes: u64) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let mut trainer = Trainer::new(config(controller, rank, links));
        let spec = |to| TensorSpec::whole(tensor(rank, to), DType::U8, &shape(bytes));
        let ids = trainer.allocate((0..RANKS).map(spec).collect::<Result<_, _>>()?)?;
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
pub(crate) fn inference(controller: &str, rank: u32, links: u16, bytes: u64) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let mut inference = Inference::new(config(controller, rank, links));
        for from in 0..RANKS {
            let name = tensor(from, rank);
            inference.register(name.clone(), DType::U8, &shape(bytes), ParamMap::tensor(name))?;
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
