//! What is measured, in which order, and how big.

use std::collections::BTreeMap;

use weightsync::{RailReport, Rank, World};
use xfer_plan::{ReceiverRank, TrainerRank};

use super::job::{Payload, Pushed, RailOptions};
use super::model::{ModelJob, Source};
use super::options::{Measure, Options};
use super::record::{Launch, Measurement, Record, Settings};
use super::report;
use super::root::{Part, Request, Root};

/// The longest WRITE where message size is not what is measured: what the planner takes by default.
const CHUNK_BYTES: u64 = 1 << 20;

/// The least that goes from one trainer to one receiver.
const PAIR_BYTES_MIN: u64 = 64 << 10;

/// A model takes this part of the memory that is free, dealt evenly to the ranks of a host: weights lie in it once, and
/// staging, page tables and whatever else runs there want theirs.
const MEMORY_SHARE: u64 = 4;

/// One entry of the list.
struct Planned {
    measure: Measure,
    name: String,
    payload: Payload,
    chunk_bytes: u64,
    parts: Vec<Part>,
}

/// Measures, writes the results, and ends the ranks.
pub(crate) async fn run(
    mut root: Root,
    options: &Options,
    trainers: u32,
    launch: Launch,
) -> anyhow::Result<()> {
    let outcome = measure(&mut root, options, trainers, launch).await;
    root.end(outcome.is_err()).await;
    let record = outcome?;
    report::write(&record, &options.out)?;
    match options.json {
        true => println!("{}", serde_json::to_string_pretty(&record)?),
        false => println!("{}", report::markdown(&record)),
    }
    eprintln!("written to {}", options.out.display());
    Ok(())
}

async fn measure(
    root: &mut Root,
    options: &Options,
    trainers: u32,
    launch: Launch,
) -> anyhow::Result<Record> {
    let facts: Vec<_> = root.facts().cloned().collect();
    let world = World { trainers, inference: facts.len() as u32 - trainers };
    let rails = options.rails()?;
    let (list, model) = list(options, world, memory_per_rank(root))?;
    let settings = Settings::new(options, &rails, model);
    let mut record = Record::new(launch, world, &facts, settings)?;
    for Planned { measure, name, payload, chunk_bytes, parts } in list {
        eprintln!("measuring {name}");
        let request = Request { payload, rounds: options.rounds, chunk_bytes, parts: &parts, rails: &rails };
        let pushed = root.run(request).await.map_err(|error| error.context(format!("{name} failed")))?;
        let known = knows_line_rate(&pushed, root, &rails);
        let mut measurement = Measurement::new(measure, name, &parts, pushed, known)?;
        measurement.message_bytes = (measure == Measure::Pair).then_some(chunk_bytes);
        record.add(measurement);
    }
    Ok(record)
}

/// What is asked for, and the model's description.
fn list(
    options: &Options,
    world: World,
    memory_per_rank: u64,
) -> anyhow::Result<(Vec<Planned>, Option<String>)> {
    let World { trainers, inference } = world;
    let trainer = |rank| (rank, Rank::Trainer(TrainerRank(rank)));
    let receiver = |rank| (trainers + rank, Rank::Receiver(ReceiverRank(rank)));
    let everybody = || (0..trainers).map(trainer).chain((0..inference).map(receiver)).collect::<Vec<Part>>();
    let bytes = options.mib << 20;
    let wanted = |measure| options.measure.contains(&measure);
    let mut list = Vec::new();
    let (mut described, measure) = (None, Measure::Pair);
    for chunk_bytes in options.message_kib.iter().map(|kib| kib << 10).filter(|_| wanted(Measure::Pair)) {
        list.push(Planned {
            measure,
            name: format!("1 -> 1, {} messages", report::binary(chunk_bytes)),
            payload: Payload::Pairs { bytes: bytes.max(chunk_bytes) },
            chunk_bytes,
            parts: vec![trainer(0), receiver(0)],
        });
    }
    if wanted(Measure::All) {
        let bytes = (bytes / u64::from(trainers.max(inference))).max(PAIR_BYTES_MIN);
        list.push(Planned {
            measure: Measure::All,
            name: format!("{trainers} -> {inference}, {} each pair", report::binary(bytes)),
            payload: Payload::Pairs { bytes },
            chunk_bytes: CHUNK_BYTES,
            parts: everybody(),
        });
    }
    if wanted(Measure::Model) {
        let model = model(options, world, memory_per_rank)?;
        let name = model.describe()?;
        described = Some(name.clone());
        list.push(Planned {
            measure: Measure::Model,
            name,
            payload: Payload::Model(model),
            chunk_bytes: CHUNK_BYTES,
            parts: everybody(),
        });
    }
    Ok((list, described))
}

fn model(options: &Options, world: World, memory_per_rank: u64) -> anyhow::Result<ModelJob> {
    let source = match &options.config {
        Some(path) => Source::Config(super::read(path)?),
        None => Source::Preset(options.model.clone()),
    };
    let whole = ModelJob::whole(source, options.from.clone(), options.to.clone(), world)?;
    if let Some(layers) = options.layers {
        anyhow::ensure!(
            (1..=whole.layers).contains(&layers),
            "--layers {layers}: the model has {} layers",
            whole.layers
        );
        return Ok(ModelJob { layers, ..whole });
    }
    let bytes = match options.gib {
        Some(gib) => (gib * (1u64 << 30) as f64) as u64,
        None => memory_per_rank,
    };
    whole.within(bytes, world)
}

/// Memory that a model may take on every rank, rounded down to a power of two so that the next run takes as much.
fn memory_per_rank(root: &Root) -> u64 {
    let mut hosts: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for facts in root.facts() {
        let available = facts.memory_available_bytes.unwrap_or(0);
        let (least, ranks) = hosts.entry(&facts.host).or_insert((u64::MAX, 0));
        (*least, *ranks) = ((*least).min(available), *ranks + 1);
    }
    let each = hosts.values().map(|(available, ranks)| available / MEMORY_SHARE / ranks).min().unwrap_or(0);
    each.checked_ilog2().map_or(0, |log| 1 << log)
}

/// Whether the lower bound is that of NICs whose speed is known: said with --line-rate, or told by libfabric for the rails
/// of every trainer. Receivers are taken to have the same kind.
fn knows_line_rate(pushed: &BTreeMap<u32, Pushed>, root: &Root, rails: &RailOptions) -> bool {
    let known = |rank: u32, rail: &RailReport| {
        // `efa://... (rdmap79s0-rdm)`: the domain comes last.
        let domain = rail.name.rsplit_once('(').and_then(|(_, rest)| rest.strip_suffix(')'));
        let facts = root.facts_of(rank);
        facts.zip(domain).is_some_and(|(facts, domain)| {
            facts.kind.rails.iter().any(|offer| offer.domain == domain && offer.bits_per_second.is_some())
        })
    };
    let mut used = pushed.iter().flat_map(|(rank, pushed)| pushed.rails.iter().map(|rail| (*rank, rail)));
    rails.line_bytes_per_second.is_some() || used.all(|(rank, rail)| known(rank, rail))
}
