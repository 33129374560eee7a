//! Staging: the memory that a trainer needs beside its weights, and how often it fills it.

use serde::Serialize;

use super::sums::Sums;
use crate::error::PlanError;
use crate::ids::TrainerRank;
use crate::manifest::Manifest;
use crate::plan::{Op, Plan};

/// The trainer that gathers and transforms most. The others need no more memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Staging {
    /// No trainer stages more than this at a time, in bytes.
    pub watermark_bytes: u64,
    /// Who stages most in a push; of equals the lowest rank. `None` when nobody stages anything.
    pub trainer: Option<TrainerRank>,
    /// All that it stages in a push, in bytes.
    pub push_bytes: u64,
    /// In so many waves.
    pub waves: u32,
    /// What the largest wave stages, in bytes.
    pub largest_wave_bytes: u64,
}

impl Staging {
    pub(super) fn new(plan: &Plan, manifest: &Manifest, sums: &Sums) -> Result<Staging, PlanError> {
        let mut staging = Staging { watermark_bytes: manifest.options.watermark_bytes, ..Staging::default() };
        for (trainer, &bytes) in (0..).map(TrainerRank).zip(&sums.staged_bytes) {
            if bytes > staging.push_bytes {
                (staging.trainer, staging.push_bytes) = (Some(trainer), bytes);
            }
        }
        let Some(trainer) = staging.trainer else { return Ok(staging) };
        // Waves depend on the order of operations, so this one trainer's are listed.
        let ops = plan.part(trainer, manifest)?.ops;
        for wave in ops.chunk_by(|a, b| a.wave == b.wave) {
            staging.waves += 1;
            let bytes = wave.iter().map(Op::staged_bytes).fold(0, u64::saturating_add);
            staging.largest_wave_bytes = staging.largest_wave_bytes.max(bytes);
        }
        Ok(staging)
    }
}
