//! What trainers have to know and to tell each other so that each can quantise its own part of a tensor.
//!
//! Three steps, none of which moves an element: every trainer finds out the largest magnitudes of its parts of the blocks that
//! shard borders cut and reports them, [`Magnitudes`] takes the largest of each block, and everybody who holds a part of it is
//! told. Both lists are plain numbers in an order that follows from the plan, so nothing else has to be said.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::error::PlanError;
use crate::ids::{RegionIndex, TrainerRank};
use crate::manifest::Manifest;
use crate::plan::Plan;
use crate::tensor_box::TensorBox;
use crate::transform::BlockQuant;

/// What one trainer has to know to quantise its part: beside its operations, all that it needs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuantPart {
    /// The quantised tensors of which it holds something, ascending by table.
    pub tables: Vec<HeldTable>,
}

/// A quantised tensor as one trainer holds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldTable {
    /// Its place in [`Plan::tables`].
    pub table: u32,
    /// The type of its elements.
    pub dtype: DType,
    /// Its global shape.
    pub shape: Vec<u64>,
    /// How it is quantised.
    pub quant: BlockQuant,
    /// What is here of it; nothing is empty.
    pub pieces: Vec<HeldPiece>,
    /// Blocks of whose parts here it reports the largest magnitudes: box after box, row-major within one.
    pub reports: Vec<TensorBox>,
    /// Blocks of whose largest magnitudes it is told, in the same order.
    pub told: Vec<TensorBox>,
}

/// Part of a tensor in a trainer's memory: `bounds`, row-major and contiguous.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldPiece {
    /// In global indices.
    pub bounds: TensorBox,
    /// The region that holds it.
    pub region: RegionIndex,
    /// Its first byte, in the region.
    pub offset: u64,
}

impl QuantPart {
    /// Whether the trainer has to report magnitudes or to be told of some before it can quantise.
    pub fn is_exchanged(&self) -> bool {
        self.tables.iter().any(|table| !table.reports.is_empty() || !table.told.is_empty())
    }
}

impl Plan {
    /// What `trainer` has to know to quantise its part.
    ///
    /// # Errors
    /// When the manifest is not the one that was planned: the trainer has no such rank there.
    pub fn quant_part(&self, trainer: TrainerRank, manifest: &Manifest) -> Result<QuantPart, PlanError> {
        if self.tables.is_empty() {
            return Ok(QuantPart::default());
        }
        let declared = manifest.trainers.get(trainer.index());
        let declared =
            declared.ok_or(PlanError::Defect { detail: "a part of a trainer that there is not" })?;
        let mut by_name: Vec<_> = declared.pieces.iter().filter(|piece| !piece.bounds.is_empty()).collect();
        // Stable: the pieces of one tensor stay in the manifest's order.
        by_name.sort_by(|a, b| a.tensor.cmp(&b.tensor));
        let mut tables = Vec::new();
        for (number, table) in (0..).zip(&self.tables) {
            let first = by_name.partition_point(|piece| piece.tensor < table.tensor);
            let rest = by_name.get(first..).unwrap_or_default();
            let own =
                rest.get(..rest.partition_point(|piece| piece.tensor == table.tensor)).unwrap_or_default();
            let Some(one) = own.first() else { continue };
            let held = |ranks: &dyn Fn(&crate::quant::Exchange) -> bool| {
                table.exchanges.iter().filter(|it| ranks(it)).map(|it| it.blocks.clone()).collect()
            };
            tables.push(HeldTable {
                table: number,
                dtype: one.dtype,
                shape: table.shape.clone(),
                quant: table.quant,
                pieces: own
                    .iter()
                    .map(|piece| HeldPiece {
                        bounds: piece.bounds.clone(),
                        region: piece.region,
                        offset: piece.offset,
                    })
                    .collect(),
                reports: held(&|exchange| exchange.reporters.contains(&trainer)),
                told: held(&|exchange| exchange.holders.contains(&trainer)),
            });
        }
        Ok(QuantPart { tables })
    }

    /// What merges the magnitudes that trainers report; see [`Magnitudes`].
    pub fn magnitudes(&self) -> Magnitudes {
        let mut magnitudes =
            Magnitudes { trainers: vec![Told::default(); self.trainers.len()], merged: Vec::new() };
        let mut blocks = 0_usize;
        for exchange in self.tables.iter().flat_map(|table| &table.exchanges) {
            // A table has less than 16 TiB, as the planner has checked.
            let range = blocks..blocks + exchange.blocks.volume().unwrap_or(0) as usize;
            blocks = range.end;
            for rank in &exchange.reporters {
                if let Some(told) = magnitudes.trainers.get_mut(rank.index()) {
                    told.reports.push(range.clone());
                }
            }
            for rank in &exchange.holders {
                if let Some(told) = magnitudes.trainers.get_mut(rank.index()) {
                    told.told.push(range.clone());
                }
            }
        }
        magnitudes.merged = vec![0.0; blocks];
        magnitudes
    }
}

/// Takes the largest of what trainers report, block by block, for one push after the other. Whoever hears all of them has one:
/// it neither waits nor talks itself.
///
/// ```
/// # use xfer_plan::{Manifest, TrainerRank, plan};
/// # let plan = plan(&Manifest::default())?;
/// let mut magnitudes = plan.magnitudes();
/// for trainer in (0..plan.trainers.len() as u32).map(TrainerRank) {
///     let reported = vec![0.0; magnitudes.reports(trainer)]; // what the trainer has found
///     magnitudes.report(trainer, &reported)?;
/// }
/// assert!(magnitudes.is_complete());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Magnitudes {
    trainers: Vec<Told>,
    /// By block of all exchanges.
    merged: Vec<f32>,
}

/// What one trainer says and is told, as places in the merged list.
#[derive(Clone, Debug, Default)]
struct Told {
    reports: Vec<Range<usize>>,
    told: Vec<Range<usize>>,
    has_reported: bool,
}

/// A report that cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MagnitudeError {
    /// From nobody.
    #[error("there is no {0} to report magnitudes")]
    NoTrainer(TrainerRank),
    /// A second one for the same push.
    #[error("{0} reports its magnitudes a second time in one push")]
    Twice(TrainerRank),
    /// Too long or too short.
    #[error("{trainer} reports {found} magnitudes where the plan has {expected}; do both run the same plan?")]
    Count {
        /// Who.
        trainer: TrainerRank,
        /// How many it should be.
        expected: usize,
        /// How many it is.
        found: usize,
    },
    /// No largest finite magnitude of anything.
    #[error("{trainer} reports {value} as magnitude {index}, which is none: it is finite and not negative")]
    Value {
        /// Who.
        trainer: TrainerRank,
        /// Which of its magnitudes.
        index: usize,
        /// What it is.
        value: f32,
    },
}

impl Magnitudes {
    /// How many magnitudes `trainer` reports, 0 for most.
    pub fn reports(&self, trainer: TrainerRank) -> usize {
        self.trainers.get(trainer.index()).map_or(0, |told| told.reports.iter().map(Range::len).sum())
    }

    /// Of how many magnitudes `trainer` is told.
    pub fn told(&self, trainer: TrainerRank) -> usize {
        self.trainers.get(trainer.index()).map_or(0, |told| told.told.iter().map(Range::len).sum())
    }

    /// Takes what a trainer has found.
    ///
    /// # Errors
    /// [`MagnitudeError`]; nothing of the report was taken then.
    pub fn report(&mut self, trainer: TrainerRank, reported: &[f32]) -> Result<(), MagnitudeError> {
        let (expected, found) = (self.reports(trainer), reported.len());
        let told = self.trainers.get_mut(trainer.index()).ok_or(MagnitudeError::NoTrainer(trainer))?;
        if told.has_reported {
            return Err(MagnitudeError::Twice(trainer));
        }
        if found != expected {
            return Err(MagnitudeError::Count { trainer, expected, found });
        }
        let is_none = |value: &f32| !value.is_finite() || *value < 0.0;
        if let Some(index) = reported.iter().position(is_none) {
            let value = reported.get(index).copied().unwrap_or(f32::NAN);
            return Err(MagnitudeError::Value { trainer, index, value });
        }
        told.has_reported = true;
        let mut reported = reported.iter();
        for range in &told.reports {
            for (merged, reported) in
                self.merged.get_mut(range.clone()).into_iter().flatten().zip(&mut reported)
            {
                *merged = merged.max(*reported);
            }
        }
        Ok(())
    }

    /// Whether everybody who has something to report has done so.
    pub fn is_complete(&self) -> bool {
        self.missing().next().is_none()
    }

    /// Who has not reported yet.
    pub fn missing(&self) -> impl Iterator<Item = TrainerRank> {
        let trainers = (0..).map(TrainerRank).zip(&self.trainers);
        trainers.filter(|(_, told)| !told.has_reported && !told.reports.is_empty()).map(|(rank, _)| rank)
    }

    /// What `trainer` is to be told; `None` until all have reported.
    pub fn merged(&self, trainer: TrainerRank) -> Option<Vec<f32>> {
        let told = self.trainers.get(trainer.index()).filter(|_| self.is_complete())?;
        Some(told.told.iter().filter_map(|range| self.merged.get(range.clone())).flatten().copied().collect())
    }

    /// Forgets what was reported: the next push begins.
    pub fn clear(&mut self) {
        self.merged.fill(0.0);
        self.trainers.iter_mut().for_each(|told| told.has_reported = false);
    }
}
