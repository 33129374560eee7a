//! Copies from GPU to GPU: one large one by CUDA, and lists of spans by kernels of `weight-ops`.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use gpu_mem::{Span, Stream};
use weight_ops::Dtype;
use weight_ops::cuda::{DeviceRange, Operation};

use crate::data::{LenBytes as _, Shuffled, Source};
use crate::gpu::{Gpu, POISON};
use crate::measure::{Figures, Rounds, Target, Work, alone, beside};
use crate::report::Report;

const REFERENCE: &str = "cuMemcpyPeerAsync";

const SPAN_BYTES: [u64; 6] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 8 << 20];

/// Of the spans that all pairs copy at once.
const ALL_PAIRS_SPAN_BYTES: u64 = 64 << 10;

/// Multiprocessors that a copy beside training or serving may keep busy.
const FEW: u32 = 16;

/// What is asked of a copy of spans of so many bytes, by all multiprocessors or by few.
fn target(span_bytes: u64, is_by_few: bool) -> Option<Target> {
    match (span_bytes >> 10, is_by_few) {
        (4, false) => Some(Target::Ratio(0.88)),
        (64, false) => Some(Target::Ratio(0.92)),
        (64, true) => Some(Target::Ratio(0.80)),
        _ => None,
    }
}

/// From the first GPU to the second, then from every GPU to every other at once. Gives the rounds of CUDA's own large copy
/// between two.
pub(crate) fn measure(report: &mut Report, gpus: &[Gpu], bytes: u64) -> anyhow::Result<Rounds> {
    let [first, second, ..] = gpus else { bail!("there is no second GPU") };
    let source = Source::new(first, Dtype::BF16, bytes)?;
    let pair = Pair { first, second, destination: second.memory(bytes)?, source };
    for (one, other) in [(first, second), (second, first)] {
        one.device.enable_access(&other.device)?;
    }
    let copy = pair.reference(report.rounds())?;
    let rounds = copy.rounds.clone();
    report.add(REFERENCE, Ok(copy));
    for (how, by) in [("pushed", first), ("pulled", second)] {
        let all = by.kernels.multiprocessors();
        // A GPU that has no more than few is measured once.
        for multiprocessors in [Some(all), (FEW < all).then_some(FEW)].into_iter().flatten() {
            for span_bytes in SPAN_BYTES {
                let figures = pair.spans(report.rounds(), by, span_bytes, multiprocessors);
                // The one who has the weights pushes them; targets are for that.
                let target = target(span_bytes, multiprocessors < all).filter(|_| how == "pushed");
                let name =
                    format!("spans of {} KiB {how} by {multiprocessors} multiprocessors", span_bytes >> 10);
                report.add(&name, figures.map(|figures| figures.with_target(target)));
            }
        }
    }
    let Pair { source, destination, .. } = pair;
    drop(destination);
    report.part("all pairs", |report| all_pairs(report, gpus, &source));
    Ok(rounds)
}

struct Pair<'a> {
    first: &'a Gpu,
    second: &'a Gpu,
    source: Source,
    destination: DeviceRange,
}

impl Pair<'_> {
    fn copy(&self) -> Work<'_> {
        let copy = self.first.rounds_of_copy(&self.source.device, &self.destination);
        Work::new(self.source.bytes(), copy)
    }

    fn reference(&self, rounds: usize) -> anyhow::Result<Figures> {
        self.second.fill(&self.destination, POISON)?;
        let figures = alone(rounds, self.copy())?;
        self.second.check(&self.destination, self.source.host.bytes())?;
        Ok(figures)
    }

    fn spans(
        &self,
        rounds: usize,
        by: &Gpu,
        span_bytes: u64,
        multiprocessors: u32,
    ) -> anyhow::Result<Figures> {
        let shuffled = Shuffled::new(self.source.bytes(), span_bytes, 0);
        let regions = [self.source.device.clone(), self.destination.clone()];
        let copy = by.kernels.copy_spans(&by.stream, &regions, &shuffled.spans(), multiprocessors)?;
        self.second.fill(&self.destination, POISON)?;
        let copy = copy.enqueue(&by.stream)?.wait()?;
        self.second.check(&self.destination, &shuffled.expected(self.source.host.bytes()))?;
        beside(rounds, Work::new(self.source.bytes(), by.rounds_of(copy)), REFERENCE, self.copy())
    }
}

/// One direction of a pair: its own stream, on the GPU that has the weights.
struct Flow<'a> {
    to: &'a Gpu,
    stream: Stream,
    source: DeviceRange,
    destination: DeviceRange,
    shuffled: Shuffled,
    /// Taken out while it runs.
    copy: Option<Operation>,
}

fn all_pairs(report: &mut Report, gpus: &[Gpu], source: &Source) -> anyhow::Result<()> {
    let mut flows = Vec::new();
    for (number, from) in gpus.iter().enumerate() {
        let weights = if number == 0 { source.device.clone() } else { from.upload(&source.host)? };
        // A GPU's multiprocessors are shared by the pairs that it writes to.
        let multiprocessors = (from.kernels.multiprocessors() / (gpus.len() as u32 - 1)).max(1);
        for (other, to) in gpus.iter().enumerate().filter(|(other, _)| *other != number) {
            from.device.enable_access(&to.device)?;
            let (stream, destination) = (from.device.stream()?, to.memory(source.bytes())?);
            let seed = (number * gpus.len() + other) as u64;
            let shuffled = Shuffled::new(source.bytes(), ALL_PAIRS_SPAN_BYTES, seed);
            let regions = [weights.clone(), destination.clone()];
            let copy = from.kernels.copy_spans(&stream, &regions, &shuffled.spans(), multiprocessors)?;
            let [source, destination] = regions;
            flows.push(Flow { to, stream, source, destination, shuffled, copy: Some(copy) });
        }
    }
    let bytes = flows.len() as u64 * source.bytes();
    let name = format!("spans of {} KiB, all {} pairs at once", ALL_PAIRS_SPAN_BYTES >> 10, flows.len());
    let poison =
        |flows: &[Flow<'_>]| flows.iter().try_for_each(|flow| flow.to.fill(&flow.destination, POISON));
    poison(&flows)?;
    copies_of_all(&flows)?;
    flows.iter().try_for_each(|flow| flow.to.check(&flow.destination, source.host.bytes()))?;
    poison(&flows)?;
    spans_of_all(&mut flows)?;
    for Flow { to, destination, shuffled, .. } in &flows {
        to.check(destination, &shuffled.expected(source.host.bytes()))?;
    }
    // Two kinds of rounds of the same flows, one after the other.
    let flows = std::cell::RefCell::new(flows);
    let spans = Work::new(bytes, || spans_of_all(&mut flows.borrow_mut()));
    let copies = Work::new(bytes, || copies_of_all(&flows.borrow()));
    report.add(&name, beside(report.rounds(), spans, "cuMemcpyPeerAsync of all", copies));
    Ok(())
}

/// By the host's clock: GPUs have none in common.
fn spans_of_all(flows: &mut [Flow<'_>]) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let mut pending = Vec::new();
    for flow in &mut *flows {
        let copy = flow.copy.take().context("the round before failed")?;
        pending.push(copy.enqueue(&flow.stream)?);
    }
    for (flow, pending) in flows.iter_mut().zip(pending) {
        flow.copy = Some(pending.wait()?);
    }
    Ok(began.elapsed())
}

fn copies_of_all(flows: &[Flow<'_>]) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let mut pending = Vec::new();
    for Flow { stream, source, destination, .. } in flows {
        let all = [Span::first(source.len_bytes())];
        pending.push(stream.copy(source.clone(), destination.clone(), &all)?);
    }
    for pending in pending {
        pending.wait()?;
    }
    Ok(began.elapsed())
}
