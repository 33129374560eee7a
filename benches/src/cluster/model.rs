//! A model's own plan, scaled down to what the hosts can hold: whole layers are left out, evenly over the depth, so that
//! every pipeline stage keeps its share and every tensor its real shape.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use weightsync::World;
use xfer_plan::model::{InferLayout, Machine, ModelSpec, TrainLayout};
use xfer_plan::{ReceiverManifest, TrainerManifest};

/// What the words before a layer's number are in every known model.
const LAYERS: &str = "layers.";

/// Where a model's shapes come from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Source {
    /// A name that `xfer_plan::model` knows.
    Preset(String),
    /// The text of a `config.json`.
    Config(String),
}

/// A model, its layouts and how much of it is pushed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ModelJob {
    pub(crate) source: Source,
    pub(crate) from: String,
    pub(crate) to: String,
    /// Layers that are kept.
    pub(crate) layers: u32,
}

impl ModelJob {
    /// All layers of the model, with layouts that fit any model unless others are given: FSDP over all trainers, tensor
    /// parallelism over all receivers or, where there are routed experts, expert parallelism.
    pub(crate) fn whole(
        source: Source,
        from: Option<String>,
        to: Option<String>,
        world: World,
    ) -> anyhow::Result<Self> {
        let model = source.spec()?;
        let axis = if model.experts() > 0 { "ep" } else { "tp" };
        Ok(Self {
            from: from.unwrap_or_else(|| format!("fsdp={}", world.trainers)),
            to: to.unwrap_or_else(|| format!("{axis}={}", world.inference)),
            layers: model.layers(),
            source,
        })
    }

    /// The same with as many layers as let no rank hold more than `bytes_max`.
    pub(crate) fn within(mut self, bytes_max: u64, world: World) -> anyhow::Result<Self> {
        let all = self.layers;
        let trainers = self.trainers(world)?.into_iter().map(|trainer| {
            trainer
                .pieces
                .iter()
                .map(|piece| (piece.tensor.clone(), piece.bytes().unwrap_or(u64::MAX)))
                .collect()
        });
        let receivers = self.receivers(world)?.into_iter().map(|receiver| {
            receiver
                .params
                .iter()
                .map(|param| (param.name.clone(), param.bytes().unwrap_or(u64::MAX)))
                .collect()
        });
        let ranks: Vec<Held> =
            trainers.chain(receivers).map(|names: Vec<(String, u64)>| Held::new(&names)).collect();
        let largest = |kept| ranks.iter().map(|rank| rank.bytes(kept, all)).max().unwrap_or(0);
        // With more layers no rank holds less, so the first that fits from above is the most.
        match (1..=all).rev().find(|&kept| largest(kept) <= bytes_max) {
            Some(kept) => self.layers = kept,
            None => bail!(
                "one layer of {} needs {} MiB on a rank, but only {} MiB may be used: give a larger --gib or a smaller model",
                self.name(),
                largest(1) >> 20,
                bytes_max >> 20
            ),
        }
        Ok(self)
    }

    /// For titles: the model, the layers of it and the layouts.
    pub(crate) fn describe(&self) -> anyhow::Result<String> {
        let all = self.source.spec()?.layers();
        let Self { from, to, layers, .. } = self;
        Ok(format!("{}, {layers} of {all} layers, {from} -> {to}", self.name()))
    }

    fn name(&self) -> &str {
        match &self.source {
            Source::Preset(name) => name,
            Source::Config(_) => "config.json",
        }
    }

    /// What trainer `rank` owns of the kept layers.
    pub(crate) fn trainer(&self, rank: u32, world: World) -> anyhow::Result<TrainerManifest> {
        let all = self.source.spec()?.layers();
        let mine = self.trainers(world)?.into_iter().nth(rank as usize);
        let mut mine = mine.with_context(|| format!("the layout {} has no trainer {rank}", self.from))?;
        mine.pieces.retain(|piece| is_kept(&piece.tensor, self.layers, all));
        Ok(mine)
    }

    /// What receiver `rank` wants of them.
    pub(crate) fn receiver(&self, rank: u32, world: World) -> anyhow::Result<ReceiverManifest> {
        let all = self.source.spec()?.layers();
        let mine = self.receivers(world)?.into_iter().nth(rank as usize);
        let mut mine = mine.with_context(|| format!("the layout {} has no receiver {rank}", self.to))?;
        mine.params.retain(|param| is_kept(&param.name, self.layers, all));
        Ok(mine)
    }

    fn trainers(&self, world: World) -> anyhow::Result<Vec<TrainerManifest>> {
        let layout: TrainLayout = self.from.parse()?;
        layout.expect_gpus(world.trainers.into()).context("--from does not fit the trainers")?;
        Ok(layout.trainers(&self.source.spec()?, &Machine::default())?)
    }

    fn receivers(&self, world: World) -> anyhow::Result<Vec<ReceiverManifest>> {
        let layout: InferLayout = self.to.parse()?;
        layout.expect_gpus(world.inference.into()).context("--to does not fit the receivers")?;
        Ok(layout.receivers(&self.source.spec()?, &Machine::default())?)
    }
}

impl Source {
    fn spec(&self) -> anyhow::Result<ModelSpec> {
        Ok(match self {
            Self::Preset(name) => ModelSpec::preset(name)?,
            Self::Config(text) => ModelSpec::from_config(text)?,
        })
    }
}

/// The bytes of one rank, by layer.
struct Held {
    ends: u64,
    layers: BTreeMap<u32, u64>,
}

impl Held {
    fn new(names: &[(String, u64)]) -> Self {
        let mut held = Self { ends: 0, layers: BTreeMap::new() };
        for (name, bytes) in names {
            let sum = match layer_of(name) {
                Some(layer) => held.layers.entry(layer).or_default(),
                None => &mut held.ends,
            };
            *sum = sum.saturating_add(*bytes);
        }
        held
    }

    fn bytes(&self, kept: u32, all: u32) -> u64 {
        let layers = self.layers.iter().filter(|(layer, _)| layer_is_kept(**layer, kept, all));
        layers.map(|(_, bytes)| *bytes).fold(self.ends, u64::saturating_add)
    }
}

fn is_kept(name: &str, kept: u32, all: u32) -> bool {
    layer_of(name).is_none_or(|layer| layer_is_kept(layer, kept, all))
}

/// `model.layers.17.mlp.down_proj.weight` is of layer 17; what has no layer is at an end of the model.
fn layer_of(name: &str) -> Option<u32> {
    let (_, after) = name.split_once(LAYERS)?;
    after.split('.').next()?.parse().ok()
}

/// Exactly `kept` of `all` layers are, evenly spread.
fn layer_is_kept(layer: u32, kept: u32, all: u32) -> bool {
    let until = |layers: u64| layers * u64::from(kept) / u64::from(all.max(1));
    until(u64::from(layer) + 1) > until(layer.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WORLD: World = World { trainers: 4, inference: 2 };

    fn qwen() -> ModelJob {
        ModelJob::whole(Source::Preset("qwen3-0.6b".into()), None, None, WORLD).unwrap()
    }

    proptest! {
        #[test]
        fn as_many_layers_are_kept_as_asked_and_every_stage_its_share(
            (all, kept) in (1..200u32).prop_flat_map(|all| (Just(all), 0..=all)), stages in 1..8u32,
        ) {
            let of = |range: std::ops::Range<u32>| range.filter(|&layer| layer_is_kept(layer, kept, all)).count() as f64;
            prop_assert_eq!(of(0..all), f64::from(kept));
            for stage in 0..stages {
                let (from, to) = (all * stage / stages, all * (stage + 1) / stages);
                let fair = f64::from(kept) * f64::from(to - from) / f64::from(all);
                prop_assert!((of(from..to) - fair).abs() <= 1.0);
            }
        }
    }

    #[test]
    fn both_sides_lose_the_same_layers() {
        let whole = qwen();
        let scaled = ModelJob { layers: 3, ..qwen() };
        let names = |job: &ModelJob| {
            let pieces = (0..4).flat_map(|rank| job.trainer(rank, WORLD).unwrap().pieces);
            pieces.filter_map(|piece| layer_of(&piece.tensor)).collect::<std::collections::BTreeSet<u32>>()
        };
        let wanted: std::collections::BTreeSet<u32> = scaled
            .receiver(1, WORLD)
            .unwrap()
            .params
            .iter()
            .filter_map(|param| layer_of(&param.name))
            .collect();
        assert_eq!((names(&whole).len(), names(&scaled).len()), (28, 3));
        assert_eq!(names(&scaled), wanted);
    }

    #[test]
    fn a_limit_is_kept_and_could_not_be_used_better() {
        let limit = 400 << 20;
        let job = qwen().within(limit, WORLD).unwrap();
        let largest = |job: &ModelJob| {
            let bytes = |rank| {
                job.receiver(rank, WORLD).unwrap().params.iter().map(|p| p.bytes().unwrap()).sum::<u64>()
            };
            (0..2).map(bytes).max().unwrap()
        };
        assert!(job.layers < 28 && largest(&job) <= limit, "{} layers, {} bytes", job.layers, largest(&job));
        assert!(largest(&ModelJob { layers: job.layers + 1, ..job }) > limit);
        let error = qwen().within(1 << 20, WORLD).unwrap_err().to_string();
        assert!(error.contains("--gib"), "{error}");
    }

    #[test]
    fn a_layout_for_another_number_of_ranks_is_refused() {
        let job = ModelJob { from: "fsdp=3".into(), ..qwen() };
        assert!(format!("{:#}", job.trainer(0, WORLD).unwrap_err()).contains("--from"));
    }
}
