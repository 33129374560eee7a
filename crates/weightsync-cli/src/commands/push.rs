//! `weightsync push`: one trainer, with its rows of a checkpoint.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, anyhow};
use weightsync::{
    DeviceMesh, Error, Placement, PushReport, TensorId, TensorSpec, Trainer, TrainerSession, shard_box,
};
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
    let mut trainer = if args.staging.offload { Trainer::offloaded(config)? } else { Trainer::new(config) };
    let ids = trainer.allocate(shards.clone())?;
    let mut offloaded = Vec::new();
    for (shard, id) in shards.iter().zip(&ids) {
        match trainer.tensor_mut(*id) {
            Some(into) => checkpoint.read_box(&shard.name, &shard.bounds, into)?,
            None => {
                let mut bytes = vec![0; usize::try_from(shard.bytes()?)?];
                checkpoint.read_box(&shard.name, &shard.bounds, &mut bytes)?;
                trainer.write(*id, &bytes)?;
                offloaded.push(bytes);
            }
        }
    }
    let weight_bytes = shards.iter().map(TensorSpec::bytes).sum::<Result<u64, _>>()?;
    Event::Loaded { weight_bytes, seconds: began.elapsed().as_secs_f64() }.print(json);

    let began = Instant::now();
    let mut session = trainer.connect().await.with_context(|| format!("trainer {}", args.rank.rank))?;
    let routes: BTreeMap<String, String> =
        session.routes().iter().map(|(to, rail)| (to.to_string(), rail.clone())).collect();
    Event::Connected { routes, seconds: began.elapsed().as_secs_f64() }.print(json);

    let mut losses = Losses::default();
    // A rank that comes back goes on where the others are.
    let mut trained = 0;
    for step in session.committed() + 1..=args.steps {
        if trained > 0 {
            tokio::time::sleep(args.pause).await;
        }
        train(&mut session, &shards, &ids, &mut offloaded, (trained, step))?;
        trained = step;
        let report = match push(&mut session, step, args.retries).await {
            Ok(Some(report)) => report,
            Ok(None) => continue,
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

/// Pushes a version, again where that may help. `None`: it is committed, but some were lost before they confirmed it, or this
/// rank only heard of it.
async fn push(
    session: &mut TrainerSession,
    version: u64,
    mut retries: u32,
) -> Result<Option<PushReport>, Error> {
    loop {
        let error = match session.push(version).await {
            Ok(report) => return Ok(Some(report)),
            Err(error @ Error::Unconfirmed { .. }) if retries > 0 => {
                tracing::warn!(%error, "going on");
                return Ok(None);
            }
            Err(error) => error,
        };
        if session.committed() >= version {
            return Ok(None);
        }
        if retries == 0 || !error.may_be_tried_again() {
            return Err(error);
        }
        retries -= 1;
        tracing::warn!(version, retries, %error, "trying again");
    }
}

/// The stand-in for optimiser steps: brings every weight from one step to another. Weights on a GPU are changed in host memory, where
/// they are `offloaded`, and copied over.
fn train(
    session: &mut TrainerSession,
    shards: &[TensorSpec],
    ids: &[TensorId],
    offloaded: &mut [Vec<u8>],
    steps: (u64, u64),
) -> anyhow::Result<()> {
    let mut offloaded = offloaded.iter_mut();
    for (TensorSpec { name, dtype, shape, bounds }, id) in shards.iter().zip(ids) {
        let mut host = offloaded.next();
        let bytes = match &mut host {
            Some(bytes) => bytes.as_mut_slice(),
            None => session.tensor_mut(*id)?,
        };
        if !training::advance_box(*dtype, name, shape, bounds, steps, bytes) {
            return Err(anyhow!("{name}: the shard does not fit its box"));
        }
        if let Some(bytes) = host {
            session.write(*id, bytes)?;
        }
    }
    Ok(())
}
