//! The schedule: who sends what, cut into operations, in which order.
//!
//! Everything is decided in the order of the manifest, with ties going to the lower rank. Nothing depends on
//! a hash, on an address or on chance: two machines with the same manifest make the same plan.

use std::collections::BTreeMap;

use crate::bound::LowerBound;
use crate::cut::operations;
use crate::digest::Digest;
use crate::error::{LayoutError, PlanError, shorten};
use crate::ids::{ParamId, ReceiverRank, TrainerRank};
use crate::limits::OPS_MAX;
use crate::manifest::{DestinationParam, Manifest};
use crate::param_map::Leaf;
use crate::plan::{Arrival, Op, Plan, RankPlan, ReceiverPart};
use crate::sender::{Senders, Target};
use crate::source_index::{SourceIndex, TensorId};

/// Replicated rectangles are dealt out in blocks of at most this many chunks, so that the replicas share
/// large ones. Larger blocks balance worse, smaller ones break up long runs.
const REPLICA_BLOCK_CHUNKS: u64 = 16;

/// Plans a transfer.
///
/// # Errors
/// When the manifest is invalid, when the two sides do not fit together, or when a [limit](crate::limits) is
/// exceeded.
pub fn plan(manifest: &Manifest) -> Result<Plan, PlanError> {
    manifest.validate()?;
    let manifest_digest = Digest::of(manifest).map_err(encode)?;
    let index = SourceIndex::new(manifest)?;
    let mut names = Names::default();
    let mut senders = Senders::new(manifest);

    // What only one trainer has is settled first; the replicas then fill up around it.
    let mut replicated = Vec::new();
    for (receiver, declared) in (0..).map(ReceiverRank).zip(&manifest.receivers) {
        for param in &declared.params {
            let name = names.intern(&param.name);
            for leaf in resolve(&index, receiver, param)? {
                let target = Target { receiver, param, name, leaf };
                if target.send_unique(&index, &mut senders)? {
                    replicated.push(target);
                }
            }
        }
    }
    let block_bytes_max = manifest.options.chunk_bytes_max.saturating_mul(REPLICA_BLOCK_CHUNKS);
    for target in &replicated {
        target.send_replicated(&index, &mut senders, block_bytes_max)?;
    }
    drop((replicated, index));

    let mut receivers = vec![ReceiverPart::default(); manifest.receivers.len()];
    let mut trainers = Vec::with_capacity(manifest.trainers.len());
    let mut ops_left = OPS_MAX;
    for (trainer, segments) in (0..).map(TrainerRank).zip(senders.segments) {
        let ops = operations(segments, &manifest.options, &mut ops_left)?;
        let first = trainer.0 as usize * manifest.receivers.len() / manifest.trainers.len();
        trainers.push(interleave(trainer, ops, ReceiverRank(first as u32), &mut receivers));
    }
    let bound = LowerBound::new(manifest, &trainers, &receivers);
    let digest = Digest(Default::default());
    let mut plan = Plan { names: names.list, trainers, receivers, bound, manifest_digest, digest };
    plan.digest = plan.compute_digest().map_err(encode)?;
    Ok(plan)
}

pub(crate) fn encode(error: postcard::Error) -> PlanError {
    PlanError::Encode { detail: error.to_string() }
}

/// Parameter names, each once, numbered in the order of the manifest.
#[derive(Default)]
struct Names<'m> {
    ids: BTreeMap<&'m str, ParamId>,
    list: Vec<String>,
}

impl<'m> Names<'m> {
    fn intern(&mut self, name: &'m str) -> ParamId {
        *self.ids.entry(name).or_insert_with(|| {
            self.list.push(name.to_owned());
            ParamId(self.list.len() as u32 - 1) // no memory holds a manifest with 2^32 names
        })
    }
}

/// The rectangles that a parameter is made of, after checking that the two sides fit.
pub(crate) fn resolve(
    index: &SourceIndex<'_>,
    receiver: ReceiverRank,
    param: &DestinationParam,
) -> Result<Vec<Leaf<TensorId>>, PlanError> {
    let named = || shorten(&param.name);
    let mut converts = None;
    let resolved = param.map.resolve(&mut |name| {
        let (id, tensor) = index.find(name)?;
        if tensor.dtype != param.dtype {
            converts.get_or_insert((id, tensor.dtype));
        }
        Some((id, tensor.shape))
    });
    if let Some((tensor, from)) = converts {
        let (tensor, to) = (shorten(index.name(tensor)), param.dtype);
        return Err(PlanError::NoConversion { receiver, param: named(), tensor, from, to });
    }
    match resolved {
        Ok(resolved) if resolved.shape == param.shape => Ok(resolved.leaves),
        Ok(resolved) => Err(PlanError::ShapesDiffer {
            receiver,
            param: named(),
            declared: param.shape.clone(),
            made: resolved.shape,
        }),
        Err(LayoutError::UnknownTensor { tensor }) => {
            Err(PlanError::MissingTensor { receiver, param: named(), tensor })
        }
        Err(source) => Err(PlanError::Map { receiver, param: named(), source }),
    }
}

/// Puts one trainer's operations in order: a queue per receiver, long operations before short ones, and then
/// one from each queue in turn. Trainers start at different receivers, so that at any moment they feed
/// different ones.
fn interleave(
    trainer: TrainerRank,
    mut ops: Vec<Op>,
    start: ReceiverRank,
    receivers: &mut [ReceiverPart],
) -> RankPlan {
    // Stable, and the input is sorted by address: equals stay in the order of their addresses.
    ops.sort_by_key(|op| (op.to, std::cmp::Reverse(op.bytes())));
    let mut queues: Vec<&[Op]> = ops.chunk_by(|a, b| a.to == b.to).collect();
    let mut part = RankPlan { ops: Vec::with_capacity(ops.len()), bytes: 0, writes: 0 };
    for queue in &queues {
        let bytes = queue.iter().map(Op::bytes).sum();
        let writes = queue.iter().map(Op::writes).sum();
        part.bytes += bytes;
        part.writes += writes;
        if let Some(receiver) = queue.first().and_then(|op| receivers.get_mut(op.to.index())) {
            receiver.bytes += bytes;
            receiver.writes += writes;
            receiver.arrivals.push(Arrival { from: trainer, bytes, writes });
        }
    }
    let first = queues.partition_point(|queue| queue.first().is_some_and(|op| op.to < start));
    queues.rotate_left(first);
    while !queues.is_empty() {
        queues.retain_mut(|queue| {
            if let Some((op, rest)) = queue.split_first() {
                part.ops.push(*op);
                *queue = rest;
            }
            !queue.is_empty()
        });
    }
    part
}
