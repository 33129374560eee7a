//! `weightsync serve`: one inference rank, holding a checkpoint's tensors as an engine of this tensor-parallel size
//! would.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::Context;
use weightsync::{BlockQuant, Error, Inference, InferenceSession, ParamId, RendezvousError};
use weightsync_cli::checkpoint::Checkpoint;
use weightsync_cli::reference::fp8::{fp8_param_names, verify_fp8_param};
use weightsync_cli::reference::{VerifyError, param_names, verify_param};
use weightsync_cli::tensor_parallel::{Layout, LocalParam};

use crate::args::ServeArgs;
use crate::events::{BytesDiffer, Event, end_with_stdin, peak_rss_bytes};

pub(crate) async fn run(args: ServeArgs) -> anyhow::Result<()> {
    end_with_stdin(args.rank.until_stdin_closes)?;
    args.rank.check("inference rank", args.rank.job.inference)?;
    let (json, rank) = (args.rank.json, args.rank.rank);
    let tp = args.held.tensor_parallel(args.rank.job.inference)?;
    let began = Instant::now();
    let checkpoint = Checkpoint::open(&args.rank.checkpoint)?;
    let layout = Layout::new(checkpoint.tensors(), checkpoint.heads(), tp)?;
    let layout = if args.held.fp8 { layout.with_fp8(BlockQuant::default())? } else { layout };
    let params = layout.params(rank % tp)?;
    let config = args.rank.config()?;
    let _page = args.rank.metrics.serve(&config.metrics).await?;
    let mut inference = Inference::new(config);
    inference.commit_mode(args.held.commit);
    let mut ids = Vec::new();
    for LocalParam { name, dtype, shape, map } in params.iter().cloned() {
        ids.push(inference.register(name, dtype, &shape, map)?);
    }
    let weight_bytes = params.iter().map(LocalParam::bytes).sum();
    Event::Loaded { weight_bytes, seconds: began.elapsed().as_secs_f64() }.print(json);

    let began = Instant::now();
    let who = || format!("inference {rank}");
    let mut session = inference.connect().await.with_context(who)?;
    Event::Connected { routes: BTreeMap::new(), seconds: began.elapsed().as_secs_f64() }.print(json);

    let mut version = 0;
    loop {
        match session.wait_version(version + 1, None).await {
            Ok(report) => {
                version = report.version;
                Event::Served(report).print(json);
                if args.verify && version.is_multiple_of(args.verify_every) {
                    match verify(&checkpoint, &session, (&params, &ids), (tp, rank), version, args.held.fp8) {
                        Ok(event) => event.print(json),
                        Err(error) => {
                            session.give_up_job(error.to_string()).await;
                            return Err(error);
                        }
                    }
                }
            }
            Err(Error::Finished { .. }) => break,
            // Told in the log. The trainers may try again; what is wrong with the job itself comes as another error.
            Err(Error::Aborted { .. }) => {}
            // A controller that comes back finds this rank serving.
            Err(error @ Error::Rendezvous(RendezvousError::Unreachable { .. })) => {
                tracing::warn!(%error, "trying again");
            }
            Err(error) => return Err(error).with_context(who),
        }
    }
    session.leave().await;
    Event::Ended { peak_rss_bytes: peak_rss_bytes() }.print(json);
    Ok(())
}

/// Compares every byte of every parameter with the reference, which knows nothing of plans.
fn verify(
    checkpoint: &Checkpoint,
    session: &InferenceSession,
    (params, ids): (&[LocalParam], &[ParamId]),
    (tp, rank): (u32, u32),
    version: u64,
    fp8: bool,
) -> anyhow::Result<Event> {
    let began = Instant::now();
    let expected = if fp8 { fp8_param_names(checkpoint, tp)? } else { param_names(checkpoint) };
    let verify_param = if fp8 { verify_fp8_param } else { verify_param };
    if !params.iter().map(|param| &param.name).eq(&expected) {
        let reason = "the parameters of this rank are not those of the reference".to_owned();
        return Err(BytesDiffer(reason).into());
    }
    let mut bytes = 0;
    for (param, id) in params.iter().zip(ids) {
        let mut failed = None;
        let mut read = |offset, into: &mut [u8]| {
            if let Err(error) = session.read(*id, offset, into) {
                failed.get_or_insert(error);
            }
        };
        let compared = verify_param(checkpoint, &param.name, (tp, rank % tp), version, &mut read);
        if let Some(error) = failed {
            return Err(error.into());
        }
        let compared = compared.map_err(|error| match error {
            VerifyError::Mismatch(mismatch) => {
                anyhow::Error::new(BytesDiffer(format!("inference {rank}, version {version}: {mismatch}")))
            }
            other => other.into(),
        })?;
        if compared != param.bytes() {
            let (name, held) = (&param.name, param.bytes());
            let reason = format!("inference {rank}: {name} has {held} bytes, the reference {compared}");
            return Err(BytesDiffer(reason).into());
        }
        bytes += compared;
    }
    Ok(Event::Verified { version, params: params.len(), bytes, seconds: began.elapsed().as_secs_f64() })
}
