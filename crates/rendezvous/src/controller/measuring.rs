//! What the controller has to do with quantised blocks that shard borders cut: trainers measure their parts of them, and each is
//! told the largest magnitude of every block that it has a part of.
//!
//! It takes the largest of each, and knows nothing else of scales. Nobody writes before all have reported, and what was
//! reported in one attempt counts for no other.

use std::collections::BTreeSet;
use std::time::Duration;

use xfer_plan::{Manifest, Plan, QuantPart, Rank, TrainerRank};

use super::push::Stage;
use super::{Actions, Controller, Phase};
use crate::protocol::{MAGNITUDES_MAX, PushId};

impl Controller {
    /// What each trainer has to know to quantise its part; or why it would have to say too much.
    pub(super) fn plan_measuring(
        &mut self,
        plan: &Plan,
        manifest: &Manifest,
    ) -> Result<Vec<QuantPart>, String> {
        let magnitudes = plan.magnitudes();
        let trainers = || (0..plan.trainers.len() as u32).map(TrainerRank);
        let longest = |rank: &TrainerRank| magnitudes.reports(*rank).max(magnitudes.told(*rank));
        if let Some(rank) = trainers().find(|rank| longest(rank) > MAGNITUDES_MAX) {
            return Err(format!(
                "{rank} shares {} quantised blocks with others, but at most {MAGNITUDES_MAX} can be measured; shard \
                 along borders of blocks",
                longest(&rank)
            ));
        }
        self.magnitudes = (!magnitudes.is_complete()).then_some(magnitudes);
        let parts = trainers().map(|rank| plan.quant_part(rank, manifest)).collect::<Result<_, _>>();
        parts.map_err(|error| format!("no plan: {error}"))
    }

    /// Whether trainers report magnitudes in every attempt.
    pub fn measures(&self) -> bool {
        self.magnitudes.is_some()
    }

    /// An attempt gets to where trainers measure: who does.
    pub(super) fn start_measuring(&mut self) -> BTreeSet<Rank> {
        let Some(magnitudes) = &mut self.magnitudes else { return BTreeSet::new() };
        magnitudes.clear();
        magnitudes.missing().map(Rank::Trainer).collect()
    }

    /// What a trainer has to know of blocks that others have parts of.
    pub(super) fn told(&self, trainer: TrainerRank) -> Vec<f32> {
        self.magnitudes.as_ref().and_then(|magnitudes| magnitudes.merged(trainer)).unwrap_or_default()
    }

    pub(super) fn measured(
        &mut self,
        member: Rank,
        push: PushId,
        reported: &[f32],
        now: Duration,
        actions: &mut Actions,
    ) {
        let Phase::Pushing(current) = &self.phase else { return };
        // An answer to an attempt that has ended meanwhile.
        if current.id != push {
            return;
        }
        let (Rank::Trainer(trainer), Some(magnitudes)) = (member, &mut self.magnitudes) else {
            return self.expel(member, "the plan has nothing for it to measure", now, actions);
        };
        match magnitudes.report(trainer, reported) {
            Ok(()) => self.advance(member, push, Stage::Measuring, now, actions),
            Err(error) => self.expel(member, &error.to_string(), now, actions),
        }
    }
}
