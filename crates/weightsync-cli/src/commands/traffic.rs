//! `weightsync traffic`: what the ranks of a training job send each other, and what a push adds to it. Arithmetic only:
//! nothing is measured, and no model is loaded.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail};
use serde::{Serialize, Serializer};
use xfer_plan::model::ModelSpec;
use xfer_plan::traffic::{Collectives, Groups, Scheme, Traffic, Training};

use crate::args::TrafficArgs;
use crate::say::say;
use crate::table::{Table, bytes_text};

/// Length of a `config.json`: real ones have a few kB.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Elements are BF16.
const BYTES_PER_ELEMENT: u64 = 2;

#[derive(Serialize)]
struct Facts {
    model: String,
    parameters: u64,
    layers: u64,
    hidden: u64,
    bytes_per_element: u64,
    tokens: u64,
    samples: u64,
    batch: u64,
    /// How many the epoch has.
    mini_batches: u64,
    /// Each scheme alone, on the ranks of its group.
    schemes: Vec<SchemeFacts>,
    three_d: ThreeD,
    push: Push,
}

#[derive(Serialize)]
struct SchemeFacts {
    scheme: Scheme,
    ranks: u32,
    #[serde(serialize_with = "text")]
    backward_bytes: u128,
    #[serde(serialize_with = "text")]
    forward_bytes: u128,
    #[serde(serialize_with = "text")]
    syncs: u128,
    #[serde(serialize_with = "text")]
    passes: u128,
}

#[derive(Serialize)]
struct ThreeD {
    tp: u32,
    pp: u32,
    dp: u32,
    ranks: u32,
    #[serde(serialize_with = "text")]
    backward_bytes: u128,
    #[serde(serialize_with = "text")]
    forward_bytes: u128,
}

#[derive(Serialize)]
struct Push {
    #[serde(serialize_with = "text")]
    bytes: u128,
    /// Of what the job sends for one mini-batch; none where it sends nothing.
    fraction_of_mini_batch: Option<f64>,
}

/// Figures pass 2^53, from which on many readers of JSON round: they are strings of digits.
fn text<S: Serializer>(figure: &u128, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(figure)
}

pub(crate) fn run(args: &TrafficArgs) -> anyhow::Result<()> {
    let facts = facts(args)?;
    if args.json {
        say!("{}", serde_json::to_string_pretty(&facts)?);
    } else {
        print(&facts);
    }
    Ok(())
}

fn facts(args: &TrafficArgs) -> anyhow::Result<Facts> {
    let model = model(args)?;
    let training = Training {
        parameters: model.parameters(),
        layers: model.layers().into(),
        hidden: model.hidden(),
        tokens: args.tokens,
        batches: args.samples.div_ceil(args.batch),
        bytes_per_element: BYTES_PER_ELEMENT,
    };
    let TrafficArgs { tp, pp, dp, .. } = *args;
    let groups = Groups { tp, pp, dp };
    let job = training.traffic_3d(groups)?;
    let schemes = Scheme::ALL.map(|scheme| {
        let ranks = match scheme {
            Scheme::DataParallel | Scheme::Fsdp => dp,
            Scheme::TensorParallel => tp,
            Scheme::PipelineParallel => pp,
        };
        let Traffic { backward_bytes, forward_bytes } = training.traffic(scheme, ranks)?;
        let Collectives { syncs, passes } = training.collectives(scheme, ranks)?;
        Ok(SchemeFacts { scheme, ranks, backward_bytes, forward_bytes, syncs, passes })
    });
    let push_bytes = args.push_bytes.map_or_else(|| training.weight_bytes(), u128::from);
    let push = Push { bytes: push_bytes, fraction_of_mini_batch: training.push_fraction(push_bytes, job) };
    Ok(Facts {
        model: model.name().to_owned(),
        parameters: training.parameters,
        layers: training.layers,
        hidden: training.hidden,
        bytes_per_element: BYTES_PER_ELEMENT,
        tokens: args.tokens,
        samples: args.samples,
        batch: args.batch,
        mini_batches: training.batches,
        schemes: schemes.into_iter().collect::<anyhow::Result<_>>()?,
        three_d: ThreeD {
            tp,
            pp,
            dp,
            ranks: groups.ranks()?,
            backward_bytes: job.backward_bytes,
            forward_bytes: job.forward_bytes,
        },
        push,
    })
}

fn model(args: &TrafficArgs) -> anyhow::Result<ModelSpec> {
    match (&args.model, &args.config) {
        (Some(name), _) => Ok(ModelSpec::preset(name)?),
        (None, Some(path)) => read_config(path).with_context(|| format!("cannot use {}", path.display())),
        (None, None) => bail!("give --model or --config"),
    }
}

fn read_config(path: &Path) -> anyhow::Result<ModelSpec> {
    let mut text = String::new();
    File::open(path)?.take(CONFIG_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > CONFIG_BYTES_MAX {
        bail!("it is longer than {}: is it a config.json?", bytes_text(CONFIG_BYTES_MAX));
    }
    Ok(ModelSpec::from_config(&text)?)
}

fn print(facts: &Facts) {
    let Facts { model, layers, hidden, parameters, tokens, mini_batches, batch, .. } = facts;
    say!(
        "{model}: {:.1} B parameters in BF16, {layers} layers, hidden size {hidden}",
        *parameters as f64 / 1e9
    );
    say!("an epoch: {:.3e} tokens in {mini_batches} mini-batches of {batch}", *tokens as f64);
    say!("");
    let mut table = Table::new(&["scheme", "ranks", "backward", "forward", "syncs", "passes"]);
    for of in &facts.schemes {
        table.row(vec![
            of.scheme.name().to_owned(),
            of.ranks.to_string(),
            bytes_text(of.backward_bytes),
            bytes_text(of.forward_bytes),
            of.syncs.to_string(),
            of.passes.to_string(),
        ]);
    }
    let job = &facts.three_d;
    table.row(vec![
        format!("3-D, tp {} x pp {} x dp {}", job.tp, job.pp, job.dp),
        job.ranks.to_string(),
        bytes_text(job.backward_bytes),
        bytes_text(job.forward_bytes),
        "-".into(),
        "-".into(),
    ]);
    say!("{}", table.render());
    say!("");
    say!("together {} an epoch", bytes_text(job.backward_bytes + job.forward_bytes));
    let push = bytes_text(facts.push.bytes);
    match facts.push.fraction_of_mini_batch {
        Some(fraction) => say!(
            "a push of {push} after every mini-batch adds {:.3} % to what the 3-D job sends",
            fraction * 100.0
        ),
        None => say!("a push is {push}; the job itself sends nothing"),
    }
}
