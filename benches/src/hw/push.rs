//! Whole pushes from one GPU to the next, and of offloaded weights to their own: the planner's plan of a model, the driver and the
//! rail, as a session runs them.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use efa_core::{Lease, LeaseMut};
use gpu_mem::{PinnedBuffer, Span, Stream};
use rayon::prelude::*;
use weight_ops::cuda::DeviceRange;
use weight_ops::{BlockGrid, Dtype, F8E4M3, MatrixMut, MatrixRef, ScaleFormat};
use xfer_exec::arrivals::Arrivals;
use xfer_exec::cuda::{
    CudaPeer, CudaRail, CudaRailConfig, DeviceRegion, GpuMemory, GpuMemoryConfig, OffloadedMemory, expose,
};
use xfer_exec::driver::{Driver, Step, Store};
use xfer_exec::local::Doorman;
use xfer_exec::program::Route;
use xfer_exec::{Program, RailIndex, RankLimits};
use xfer_plan::model::JobSpec;
use xfer_plan::{
    HeldTable, Manifest, Op, ParamId, Plan, QuantPart, RankPlan, ReceiverRank, RegionIndex, Strided,
    TrainerRank, Transform, plan,
};

use crate::data::{LenBytes as _, Source};
use crate::gpu::{Gpu, POISON};
use crate::link;
use crate::measure::{Figures, Target, Work, beside};
use crate::report::Report;

/// The planner takes from here what the copy engine and the kernels are fast with; longer than over a NIC.
const CHUNK_BYTES: u64 = 64 << 20;
const SLOT_BYTES: u64 = 16 << 20;
const STAGING_BYTES: u64 = 512 << 20;

/// How much longer a push may take for quantising on the way.
const QUANTISED_MAX: f64 = 1.10;

/// Of the bytes per second of one copy from the host.
const OFFLOADED_MIN: f64 = 0.95;

/// Device memory is mapped in multiples of this.
const GRANULARITY: u64 = 2 << 20;

const DEADLINE: Duration = Duration::from_secs(60);
const TO: ReceiverRank = ReceiverRank(0);
const FROM: TrainerRank = TrainerRank(0);

/// From the first GPU to the second, of models of up to eight times `bytes`.
pub(crate) fn measure(report: &mut Report, gpus: &[Gpu], bytes: u64) -> anyhow::Result<()> {
    let [first, second, ..] = gpus else { bail!("there is no second GPU") };
    report.part("push", |report| {
        let model = Model::new(8 * bytes, false)?;
        let figures = model.beside_a_copy(report.rounds(), first, second);
        report.add(&model.name, figures);
        Ok(())
    });
    report.part("quantised push", |report| {
        let model = Model::new(8 * bytes, true)?;
        let figures = model.beside_codes_alone(report.rounds(), first, second);
        report.add(&model.name, figures);
        Ok(())
    });
    Ok(())
}

/// Of weights in page-locked memory by way of a GPU to memory of the same GPU, of models of up to eight times `bytes`.
pub(crate) fn measure_offloaded(report: &mut Report, gpu: &Gpu, bytes: u64) -> anyhow::Result<()> {
    for is_quantised in [false, true] {
        report.part("offloaded push", |report| {
            let model = Model::new(8 * bytes, is_quantised)?;
            let figures = model.offloaded_beside_a_copy(report.rounds(), gpu);
            report.add(&format!("offloaded: {}", model.name), figures);
            Ok(())
        });
    }
    Ok(())
}

/// Qwen3-8B on one trainer and one inference rank, with as many of its layers as there is room for.
struct Model {
    name: String,
    manifest: Manifest,
    plan: Plan,
    part: RankPlan,
    quantised: QuantPart,
}

/// A push that does what it must, with both its ends.
struct Compared {
    push: Push<GpuMemory>,
    // Behind the push: it writes there until it is dropped.
    receiver: Receiver,
    source: Source,
    expected: Vec<u8>,
}

impl Model {
    /// Of at most so many bytes in BF16, but one layer at least. Quantised, it has hardly any embeddings, which stay BF16.
    fn new(bytes_max: u64, is_quantised: bool) -> anyhow::Result<Self> {
        // 23 bytes for each square of the hidden size, in BF16. Narrower where not even one layer fits.
        let layer = |hidden: u64| 23 * hidden * hidden;
        let hidden = [4096, 1024].into_iter().find(|hidden| layer(*hidden) <= bytes_max).unwrap_or(256);
        let vocabulary = if is_quantised { 128 } else { 151_936 * hidden / 4096 };
        let embeddings = 4 * vocabulary * hidden;
        let layers = (bytes_max.saturating_sub(embeddings) / layer(hidden)).clamp(1, 36);
        let heads = (hidden / 128).max(1);
        let fp8 = if is_quantised { r#", "fp8": {"block": [128, 128], "scales": "f32"}"# } else { "" };
        let job = format!(
            r#"{{"model": {{"config": {{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
                "torch_dtype": "bfloat16", "num_hidden_layers": {layers}, "hidden_size": {hidden},
                "vocab_size": {vocabulary}, "num_attention_heads": {heads}, "num_key_value_heads": {},
                "head_dim": 128, "intermediate_size": {}, "tie_word_embeddings": false}}}},
            "trainers": {{"layout": "fsdp=1", "gpus": 1}}, "receivers": {{"layout": "tp=1", "gpus": 1{fp8}}},
            "options": {{"chunk_bytes_max": {CHUNK_BYTES}, "gather_chunk_bytes_max": {SLOT_BYTES},
                "watermark_bytes": {STAGING_BYTES}}}}}"#,
            (heads / 4).max(1),
            3 * hidden,
        );
        let mut manifest = JobSpec::from_json(&job)?.manifest()?;
        for bytes in manifest.receivers.iter_mut().flat_map(|receiver| &mut receiver.regions) {
            *bytes = bytes.next_multiple_of(GRANULARITY);
        }
        let plan = plan(&manifest)?;
        let (part, quantised) = (plan.part(FROM, &manifest)?, plan.quant_part(FROM, &manifest)?);
        let what = if is_quantised { "to FP8 in blocks and sent" } else { "FSDP 1 to TP 1, fused" };
        let name = format!("{layers} layers of Qwen3-8B ({hidden} wide), {what}");
        Ok(Self { name, manifest, plan, part, quantised })
    }

    fn source_bytes(&self) -> anyhow::Result<u64> {
        self.manifest.trainers.first().and_then(|rank| rank.regions.first()).copied().context("no trainer")
    }

    fn arena_bytes(&self) -> anyhow::Result<u64> {
        self.manifest.receivers.first().and_then(|rank| rank.regions.first()).copied().context("no receiver")
    }

    /// Pushes once, and compares every byte.
    fn compared(&self, first: &Gpu, second: &Gpu) -> anyhow::Result<Compared> {
        let source = Source::new(first, Dtype::BF16, self.source_bytes()?)?;
        let receiver = Receiver::new(second, self.arena_bytes()?)?;
        let mut push =
            Push::new(first, &receiver, self.part.clone(), &self.quantised, source.device.clone())?;
        receiver.poison(second)?;
        push.run()?;
        let expected = self.expected(&source.host)?;
        second.check(&receiver.arena, &expected)?;
        Ok(Compared { push, receiver, source, expected })
    }

    /// The push of weights that are in the host, beside one copy of them from there.
    fn offloaded_beside_a_copy(&self, rounds: usize, gpu: &Gpu) -> anyhow::Result<Figures> {
        let Source { host, device, .. } = Source::new(gpu, Dtype::BF16, self.source_bytes()?)?;
        let expected = self.expected(&host)?;
        let host = Arc::into_inner(host).context("somebody else has the weights")?;
        let receiver = Receiver::new(gpu, self.arena_bytes()?)?;
        let weights = LeaseMut::new(host).freeze();
        let mut push = Push::offloaded(gpu, &receiver, self.part.clone(), &self.quantised, weights.clone())?;
        receiver.poison(gpu)?;
        push.run()?;
        gpu.check(&receiver.arena, &expected)?;
        let all = [Span::first(device.len_bytes())];
        let copy = || {
            let copy = |stream: &Stream| Ok(stream.copy_to_device(weights.clone(), device.clone(), &all)?);
            Ok(gpu.timed(copy, |pending| Ok(pending.wait()?))?.1)
        };
        let bytes = device.len_bytes();
        let figures = beside(rounds, Work::new(bytes, || push.run()), link::TO_GPU, Work::new(bytes, copy))?;
        Ok(figures.with_target(Target::Ratio(OFFLOADED_MIN)))
    }

    /// The push, beside one copy of as many bytes.
    fn beside_a_copy(&self, rounds: usize, first: &Gpu, second: &Gpu) -> anyhow::Result<Figures> {
        // Bound by name: what a pattern leaves out would be dropped here, and the push writes to the receiver.
        let Compared { receiver: _receiver, mut push, source, expected: _ } = self.compared(first, second)?;
        let bytes = self.part.bytes;
        let (from, to) = (source.device.part(0..bytes)?, second.memory(bytes)?);
        let copy = Work::new(bytes, first.rounds_of_copy(&from, &to));
        let figures = beside(rounds, Work::new(bytes, || push.run()), "cuMemcpyPeerAsync", copy)?;
        Ok(figures.with_target(Target::Ratio(0.96)))
    }

    /// The push that quantises, beside one of the same WRITEs of bytes that were quantised before.
    fn beside_codes_alone(&self, rounds: usize, first: &Gpu, second: &Gpu) -> anyhow::Result<Figures> {
        let Compared { receiver, mut push, source: _source, expected } = self.compared(first, second)?;
        let mut host = first.device.pinned(expected.len())?;
        host.bytes_mut().copy_from_slice(&expected);
        let ready = first.upload(&Arc::new(host))?;
        let mut alone = Push::new(first, &receiver, as_copies(&self.part), &QuantPart::default(), ready)?;
        receiver.poison(second)?;
        alone.run()?;
        second.check(&receiver.arena, &expected)?;
        let bytes = self.part.bytes;
        let (ours, theirs) = (Work::new(bytes, || push.run()), Work::new(bytes, || alone.run()));
        let figures = beside(rounds, ours, "the same FP8 sent alone", theirs)?;
        Ok(figures.with_target(Target::Ratio(1.0 / QUANTISED_MAX)))
    }

    /// What the receiver must hold then, found out with the CPU's kernels over whole tensors.
    fn expected(&self, source: &PinnedBuffer) -> anyhow::Result<Vec<u8>> {
        let source = source.bytes();
        let mut expected = vec![POISON; usize::try_from(self.arena_bytes()?)?];
        let mut codes = vec![F8E4M3::default(); source.len() / 2];
        let mut scales = BTreeMap::new();
        for table in &self.quantised.tables {
            let quantised = quantise(table, source, &mut codes)?;
            scales.insert(table.table, quantised);
        }
        let codes: Vec<u8> = codes.par_iter().map(|code| code.to_bits()).collect();
        for op in &self.part.ops {
            let of: &[u8] = match op.transform {
                Transform::Copy => source,
                Transform::Quantize { .. } => &codes,
                Transform::Scales { .. } => scales.get(&op.source.region.0).context("no such table")?,
                Transform::Cast { .. } => bail!("{} is cast", self.plan.name(op.param)),
            };
            // A code for every two bytes.
            let width = if matches!(op.transform, Transform::Quantize { .. }) { 2 } else { 1 };
            for row in 0..u64::from(op.rows) {
                let from = usize::try_from((op.source.offset + row * op.source.stride) / width)?;
                let to = usize::try_from(op.destination.offset + row * op.destination.stride)?;
                let len = op.row_bytes as usize;
                let (from, to) = (of.get(from..from + len), expected.get_mut(to..to + len));
                to.context("outside the arena")?.copy_from_slice(from.context("outside the weights")?);
            }
        }
        Ok(expected)
    }
}

/// Quantises the whole tensor of a table, to where its elements are; its scales as bytes.
fn quantise(table: &HeldTable, source: &[u8], codes: &mut [F8E4M3]) -> anyhow::Result<Vec<u8>> {
    let (Some(piece), [rows, columns]) = (table.pieces.first(), table.shape.as_slice()) else {
        bail!("a tensor of {:?} in {} pieces", table.shape, table.pieces.len());
    };
    let shape = [usize::try_from(*rows)?, usize::try_from(*columns)?];
    let grid = BlockGrid::new(shape, table.quant.block)?;
    let (first, elements) = (usize::try_from(piece.offset)?, shape[0] * shape[1]);
    let bytes = source.get(first..first + 2 * elements).context("outside the weights")?;
    let codes = codes.get_mut(first / 2..first / 2 + elements).context("outside the weights")?;
    let mut scales = vec![0.0_f32; grid.table_len()];
    let source = MatrixRef::<half::bf16>::from_bytes(bytes, shape, shape[1])?;
    let destination = MatrixMut::new(codes, shape, shape[1])?;
    weight_ops::quantize(&grid, source, ScaleFormat::F32, destination, &mut scales)?;
    Ok(scales.iter().flat_map(|scale| scale.to_ne_bytes()).collect())
}

/// The same WRITEs, of bytes that lie at the sender as they do at the receiver.
fn as_copies(part: &RankPlan) -> RankPlan {
    let copy = |op: &Op| {
        let source = Strided { region: RegionIndex(0), ..op.destination };
        Op { source, gather: false, transform: Transform::Copy, param: ParamId(0), ..*op }
    };
    let ops: Vec<Op> = part.ops.iter().map(copy).collect();
    RankPlan { writes: ops.iter().map(Op::writes).sum(), ops, ..part.clone() }
}

/// Device memory that is written to.
struct Receiver {
    arena: DeviceRange,
    doorman: Doorman,
    _arrivals: Arrivals,
}

impl Receiver {
    fn new(gpu: &Gpu, bytes: u64) -> anyhow::Result<Self> {
        let buffer = Arc::new(gpu.device.alloc_vmm(bytes, bytes)?);
        let (doorman, arrivals) = expose(vec![DeviceRegion::mapped(&buffer)?])?;
        Ok(Self { arena: DeviceRange::whole(&buffer), doorman, _arrivals: arrivals })
    }

    fn poison(&self, gpu: &Gpu) -> anyhow::Result<()> {
        gpu.fill(&self.arena, POISON)
    }
}

/// A sender: its driver, and its weights while they are not being pushed.
struct Push<M: Store> {
    driver: Driver<M>,
    weights: Vec<M::Region>,
}

/// A rail to a receiver, and what leads there.
fn rail_to(gpu: &Gpu, to: &Receiver) -> anyhow::Result<(CudaRail, BTreeMap<ReceiverRank, Route>)> {
    let region_bytes = vec![to.arena.len_bytes()];
    let peer = CudaPeer::open(&gpu.device, to.doorman.address(), &region_bytes, DEADLINE)?;
    let rail = CudaRail::new(&gpu.kernels, BTreeMap::from([(TO, peer)]), CudaRailConfig::default())?;
    Ok((rail, BTreeMap::from([(TO, Route { rails: vec![RailIndex(0)], region_bytes })])))
}

fn limits(region_bytes: u64, slot_bytes: u64) -> RankLimits {
    RankLimits { region_bytes: vec![region_bytes], slot_bytes, transforms: true }
}

fn memory_config(gpu: &Gpu, slot_bytes: u64) -> GpuMemoryConfig {
    let multiprocessors = NonZeroU32::new(gpu.kernels.multiprocessors()).unwrap_or(NonZeroU32::MIN);
    GpuMemoryConfig { staging_bytes: STAGING_BYTES, slot_bytes, multiprocessors, close_max: DEADLINE }
}

impl Push<GpuMemory> {
    fn new(
        gpu: &Gpu,
        to: &Receiver,
        part: RankPlan,
        quantised: &QuantPart,
        weights: DeviceRange,
    ) -> anyhow::Result<Self> {
        let slot_bytes = part.ops.iter().map(Op::staged_bytes).max().unwrap_or(0);
        let limits = limits(weights.len_bytes(), slot_bytes);
        let (rail, routes) = rail_to(gpu, to)?;
        let program =
            Program::new(part, BTreeMap::new(), &limits, routes)?.with_quantization(quantised, &limits)?;
        let memory = GpuMemory::new(&gpu.kernels, &program, memory_config(gpu, slot_bytes), None)?;
        let driver = Driver::over(memory, program, vec![Box::new(rail)], DEADLINE, DEADLINE / 5);
        Ok(Self { driver, weights: vec![weights] })
    }
}

impl Push<OffloadedMemory> {
    fn offloaded(
        gpu: &Gpu,
        to: &Receiver,
        part: RankPlan,
        quantised: &QuantPart,
        weights: Lease,
    ) -> anyhow::Result<Self> {
        let limits = limits(weights.len() as u64, SLOT_BYTES);
        let (rail, routes) = rail_to(gpu, to)?;
        let program =
            Program::staged(part, BTreeMap::new(), &limits, routes)?.with_quantization(quantised, &limits)?;
        let memory = OffloadedMemory::new(&gpu.kernels, &program, memory_config(gpu, SLOT_BYTES))?;
        let driver = Driver::over(memory, program, vec![Box::new(rail)], DEADLINE, DEADLINE / 5);
        Ok(Self { driver, weights: vec![weights] })
    }
}

impl<M: Store> Push<M> {
    /// One push, by the host's clock.
    fn run(&mut self) -> anyhow::Result<Duration> {
        self.driver.begin(std::mem::take(&mut self.weights));
        loop {
            if let Step::Over(outcome) = self.driver.step() {
                self.weights = outcome.regions;
                outcome.result?;
                return Ok(outcome.timings.total);
            }
        }
    }
}
