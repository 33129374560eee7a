//! What the controller has to do with checksums: who is told what to hash, and what was sent, added up for who is to find it.
//!
//! It compares nothing: only an inference rank has the bytes. What a member reports is bounded by the plan.

use std::collections::BTreeSet;
use std::time::Duration;

use xfer_plan::{Inbound, Parts, Rank, ReceiverRank, TrainerRank};

use super::push::Stage;
use super::{Actions, Controller, Phase};
use crate::protocol::PushId;
use crate::verify::{INBOUND_MAX, ParamSum, SUMS_MAX};

impl Controller {
    /// What each inference rank has to look at where the job verifies, and how many checksums everyone who writes may
    /// report; or whose message would be too long.
    pub(super) fn plan_verification(&mut self, parts: &Parts) -> Result<Vec<Vec<Inbound>>, String> {
        if !self.config.verify.is_on() {
            return Ok(vec![Vec::new(); parts.receivers.len()]);
        }
        let trainers = (0..).map(|rank| Rank::Trainer(TrainerRank(rank))).zip(&parts.trainers);
        let relays = parts.receivers.iter().map(|relay| &relay.plan);
        let relays = (0..).map(|rank| Rank::Receiver(ReceiverRank(rank))).zip(relays);
        for (rank, plan) in trainers.chain(relays) {
            let sums = plan.ops.iter().map(|op| (op.to, op.param)).collect::<BTreeSet<_>>().len();
            if sums > SUMS_MAX {
                return Err(format!(
                    "{rank} writes {sums} parameters, receivers counted apart, but at most {SUMS_MAX} can be verified; \
                     turn `verify` off"
                ));
            }
            self.sums_max.insert(rank, sums);
        }
        let inbound = parts.inbound();
        match (0..).map(ReceiverRank).zip(&inbound).find(|(_, inbound)| inbound.len() > INBOUND_MAX) {
            None => Ok(inbound),
            Some((rank, inbound)) => Err(format!(
                "{} operations write to {}, but at most {INBOUND_MAX} can be verified; plan longer chunks or turn \
                 `verify` off",
                inbound.len(),
                Rank::Receiver(rank)
            )),
        }
    }

    /// Adds what `member` has sent to what its receivers are to find; whether it may have sent so much.
    pub(super) fn summed(
        &mut self,
        member: Rank,
        push: PushId,
        sums: Vec<ParamSum>,
        now: Duration,
        actions: &mut Actions,
    ) -> bool {
        let max = self.sums_max.get(&member).copied().unwrap_or(0);
        if sums.len() > max {
            let reason = format!("it reports {} checksums, the plan has {max}", sums.len());
            self.expel(member, &reason, now, actions);
            return false;
        }
        if let Phase::Pushing(current) = &mut self.phase
            && current.id == push
            && current.stage == Stage::Writing
            && current.waiting.contains(&member)
        {
            for ParamSum { to, param, sum } in sums {
                current.sums.entry(to).or_default().entry(param).or_default().add(sum);
            }
        }
        true
    }
}
