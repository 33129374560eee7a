//! The timeline: when which parameters have arrived, if everybody sends low priorities first.
//!
//! By the same fluid model as the prediction: a step is over when no rank has anything of it, or of an earlier one, left
//! to move.

use std::collections::BTreeMap;

use serde::Serialize;

use super::busiest::uses;
use crate::cost::Resource;
use crate::cut::{Cut, Way};
use crate::error::shorten;
use crate::ids::{Rank, TrainerRank};
use crate::manifest::Manifest;
use crate::plan::{Placed, Plan, PlannedParam};
use crate::route::{Link, ReceiverLoad, TrainerLoad};
use crate::totals::reads;

/// Parameters of one priority; of several that follow each other where there are more than 256.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// The lowest priority.
    pub first_priority: u32,
    /// The highest.
    pub last_priority: u32,
    /// What the names of its parameters begin with.
    pub names: String,
    /// How many parameter names.
    pub params: u64,
    /// What it puts into receivers' memory, every copy counted, in bytes.
    pub bytes: u64,
    /// The predicted time from the start of the push until it and all before it have arrived, in nanoseconds.
    pub nanoseconds: u64,
    /// Who is last, and on what it spends its time.
    pub limited_by: Option<(Rank, Resource)>,
}

pub(super) fn timeline(plan: &Plan, manifest: &Manifest) -> Vec<Step> {
    let copies: Vec<u64> = plan.groups.iter().map(|group| group.copies() as u64).collect();
    let steps = Steps::new(plan);
    let mut names: Vec<(Option<&str>, u64)> = vec![(None, 0); steps.len()];
    for PlannedParam { name, priority } in &plan.params {
        if let Some((common, params)) = names.get_mut(steps.of(*priority)) {
            *common = Some(common.map_or(name, |common| in_common(common, name)));
            *params += 1;
        }
    }
    let mut sent = vec![vec![TrainerLoad::default(); manifest.trainers.len()]; steps.len()];
    let mut ways: Vec<BTreeMap<Way, u64>> = vec![BTreeMap::new(); steps.len()];
    let step_of: Vec<usize> = plan.params.iter().map(|param| steps.of(param.priority)).collect();
    for Placed { to, param, lane, transfer, .. } in plan.transfers() {
        let Some(&step) = step_of.get(param.index()) else { continue };
        let (Some(ways), Some(sent)) = (ways.get_mut(step), sent.get_mut(step)) else { continue };
        let bytes = transfer.bytes();
        let on_way = ways.entry((to, lane)).or_default();
        *on_way = on_way.saturating_add(bytes);
        if let Some(load) = sent.get_mut(transfer.trainer.index()) {
            let copies = copies.get(to.index()).copied().unwrap_or(0);
            let writes = Cut::new(transfer, &manifest.options).writes(transfer);
            let (transform_bytes, source_bytes) = reads(transfer);
            let (nic_out_bytes, writes) = (bytes.saturating_mul(copies), writes.saturating_mul(copies));
            let more = TrainerLoad { nic_out_bytes, writes, transform_bytes, source_bytes, ops: 0 };
            add_load(load, &more);
        }
    }
    let mut trainers = vec![TrainerLoad::default(); manifest.trainers.len()];
    let mut receivers = vec![ReceiverLoad::default(); manifest.receivers.len()];
    // What comes after the busiest resource comes after it in every step.
    let after = plan.predicted.nanoseconds.saturating_sub(plan.predicted.busiest_nanoseconds);
    let mut timeline = Vec::with_capacity(steps.len());
    for (((priorities, (common, params)), ways), sent) in steps.priorities().zip(names).zip(ways).zip(sent) {
        for (load, more) in trainers.iter_mut().zip(sent) {
            add_load(load, &more);
        }
        let bytes = add(plan, &ways, &mut receivers);
        let last = uses(manifest, &trainers, &receivers)
            .reduce(|last, other| if other.longest.2 > last.longest.2 { other } else { last });
        timeline.push(Step {
            first_priority: priorities.first().copied().unwrap_or(0),
            last_priority: priorities.last().copied().unwrap_or(0),
            names: shorten(common.unwrap_or("")),
            params,
            bytes,
            nanoseconds: last.map_or(0, |last| last.longest.2.saturating_add(after)),
            limited_by: last.map(|last| (last.rank, last.longest.0)),
        });
    }
    timeline
}

fn add_load(load: &mut TrainerLoad, more: &TrainerLoad) {
    load.nic_out_bytes = load.nic_out_bytes.saturating_add(more.nic_out_bytes);
    load.writes = load.writes.saturating_add(more.writes);
    load.transform_bytes = load.transform_bytes.saturating_add(more.transform_bytes);
    load.source_bytes = load.source_bytes.saturating_add(more.source_bytes);
}

/// Adds what goes these ways to the receivers' loads. Returns the bytes that it puts into their memory.
fn add(plan: &Plan, ways: &BTreeMap<Way, u64>, loads: &mut [ReceiverLoad]) -> u64 {
    let mut arrived = 0u64;
    for (&(group, lane), &bytes) in ways {
        for leg in plan.group(group).into_iter().flat_map(|group| group.legs(TrainerRank(0), lane)) {
            let add = |sum: &mut u64| *sum = sum.saturating_add(bytes);
            add(&mut arrived);
            if let Some(to) = loads.get_mut(leg.to.index()) {
                add(if leg.link == Link::Nic { &mut to.nic_in_bytes } else { &mut to.nvlink_in_bytes });
            }
            let Rank::Receiver(from) = leg.from else { continue };
            if let Some(from) = loads.get_mut(from.index()) {
                add(if leg.link == Link::Nic { &mut from.nic_out_bytes } else { &mut from.nvlink_out_bytes });
            }
        }
    }
    arrived
}

/// The timeline's steps: each distinct priority, or, where there are very many, neighbouring ones together.
struct Steps {
    /// Ascending.
    priorities: Vec<u32>,
    /// Priorities of one step.
    per_step: usize,
}

/// Steps of a timeline. Models have fewer than 200 layers.
const STEPS_MAX: usize = 256;

impl Steps {
    fn new(plan: &Plan) -> Steps {
        let mut priorities: Vec<u32> = plan.params.iter().map(|param| param.priority).collect();
        priorities.sort_unstable();
        priorities.dedup();
        let per_step = priorities.len().div_ceil(STEPS_MAX).max(1);
        Steps { priorities, per_step }
    }

    /// Number of steps.
    fn len(&self) -> usize {
        self.priorities.len().div_ceil(self.per_step)
    }

    /// The step of a priority.
    fn of(&self, priority: u32) -> usize {
        self.priorities.partition_point(|&known| known < priority) / self.per_step
    }

    /// The priorities of each step.
    fn priorities(&self) -> impl Iterator<Item = &[u32]> {
        self.priorities.chunks(self.per_step)
    }
}

/// What two names begin with, in whole words between dots.
fn in_common<'n>(a: &'n str, b: &str) -> &'n str {
    if b.strip_prefix(a).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')) {
        return a;
    }
    let equal = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    let whole = a.as_bytes().get(..equal).and_then(|equal| equal.iter().rposition(|&byte| byte == b'.'));
    whole.and_then(|dot| a.get(..dot)).unwrap_or("")
}
