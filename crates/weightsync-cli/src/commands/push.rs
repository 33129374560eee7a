//! `weightsync push`: one trainer, with its rows of a checkpoint.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, anyhow};
use weightsync::{DeviceMesh, Placement, TensorId, TensorSpec, Trainer, TrainerSession, shard_box};
use weightsync_cli::checkpoint::{Checkpoint, TensorInfo};
use weightsync_cli::training;

use crate::args::PushArgs;
use crate::events::{Event, end_with_stdin, peak_rss_bytes};
use crate::losses::Losses;
use crate::say::say;

pub(crate) async fn run(args: PushArgs) -> anyhow::Result<()> {
    end_with_stdin(args.rank.until_stdin_closes)?;
    args.rank.check("trainer", args.rank.job.trainers)?;
    let json = args.rank.json;
    let began = Instant::now();
    let checkpoint = Checkpoint::open(&args.rank.checkpoint)?;
    let shards = shards(&checkpoint, args.rank.job.trainers, args.rank.rank)?;
    let mut config = args.rank.config()?;
    config.watermark_bytes = args.staging.watermark << 20;
    let _page = args.rank.metrics.serve(&config.metrics).await?;
    let mut trainer = Trainer::new(config);
    let ids = trainer.allocate(shards.clone())?;
    for (shard, id) in shards.iter().zip(&ids) {
        let into = trainer.tensor_mut(*id).ok_or_else(|| anyhow!("no memory for {}", shard.name))?;
        checkpoint.read_box(&shard.name, &shard.bounds, into)?;
    }
    let weight_bytes = shards.iter().map(TensorSpec::bytes).sum::<Result<u64, _>>()?;
    Event::Loaded { weight_bytes, seconds: began.elapsed().as_secs_f64() }.print(json);

    let began = Instant::now();
    let mut session = trainer.connect().await.with_context(|| format!("trainer {}", args.rank.rank))?;
    let routes: BTreeMap<String, String> =
        session.routes().iter().map(|(to, rail)| (to.to_string(), rail.clone())).collect();
    Event::Connected { routes, seconds: began.elapsed().as_secs_f64() }.print(json);

    let mut losses = Losses::default();
    for step in 1..=args.steps {
        if step > 1 {
            tokio::time::sleep(args.pause).await;
        }
        train(&mut session, &shards, &ids, step)?;
        let report = match session.push(step).await {
            Ok(report) => report,
            Err(error) => {
                session.give_up_job(error.to_string()).await;
                return Err(error).with_context(|| format!("trainer {}", args.rank.rank));
            }
        };
        for loss in losses.add(report.version, &report.rails) {
            // With `--json` every report has them.
            if !json {
                say!("rail given up: {loss}");
            }
        }
        Event::Pushed(report).print(json);
    }
    session.leave().await;
    Event::Ended { peak_rss_bytes: peak_rss_bytes() }.print(json);
    Ok(())
}

/// This rank's rows of every tensor, as FSDP2 shards them. A scalar has no rows: every rank has it.
fn shards(checkpoint: &Checkpoint, trainers: u32, rank: u32) -> anyhow::Result<Vec<TensorSpec>> {
    let mesh = DeviceMesh::new(&[u64::from(trainers)])?;
    let shard = |tensor: &TensorInfo| {
        let placement = if tensor.shape.is_empty() { Placement::Replicate } else { Placement::Shard(0) };
        let bounds = shard_box(&tensor.shape, &mesh, &[placement], u64::from(rank))
            .with_context(|| format!("{} over {trainers} trainers", tensor.name))?;
        Ok(TensorSpec { name: tensor.name.clone(), dtype: tensor.dtype, shape: tensor.shape.clone(), bounds })
    };
    checkpoint.tensors().iter().map(shard).collect()
}

/// The stand-in for an optimiser step: brings every weight from the step before to `step`.
fn train(
    session: &mut TrainerSession,
    shards: &[TensorSpec],
    ids: &[TensorId],
    step: u64,
) -> anyhow::Result<()> {
    for (TensorSpec { name, dtype, shape, bounds }, id) in shards.iter().zip(ids) {
        let bytes = session.tensor_mut(*id)?;
        if !training::advance_box(*dtype, name, shape, bounds, (step - 1, step), bytes) {
            return Err(anyhow!("{name}: the shard does not fit its box"));
        }
    }
    Ok(())
}
