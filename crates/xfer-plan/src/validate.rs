//! Validation: what can be checked about a manifest one rank at a time.
//!
//! After it, the arithmetic of the other modules cannot overflow: every box lies in its tensor, every tensor
//! in its region, every region in a rank whose memory is bounded.

use std::collections::BTreeSet;

use crate::error::{LayoutError, ManifestError, shorten};
use crate::ids::{Rank, ReceiverRank, RegionIndex, TrainerRank};
use crate::limits::{
    CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, CHUNK_BYTES_STEP, DIMS_MAX, NAME_BYTES_MAX, RAILS_MAX, RANK_BYTES_MAX,
    RANKS_MAX, REGIONS_MAX, TENSORS_MAX,
};
use crate::manifest::{
    DestinationParam, Manifest, PlanOptions, RailDecl, ReceiverManifest, SourcePiece, TrainerManifest,
};
use crate::tensor_box::volume;

impl Manifest {
    /// Checks everything that one rank's declaration must keep by itself. [`plan`](crate::plan()) calls it.
    ///
    /// # Errors
    /// Names the first rank, in order, that breaks a rule or a [limit](crate::limits).
    pub fn validate(&self) -> Result<(), ManifestError> {
        trainers(&self.trainers, &self.options)?;
        receivers(&self.receivers)?;
        for (rank, receiver) in (0..).map(ReceiverRank).zip(&self.receivers) {
            receiver.params.iter().try_for_each(|param| map(rank, param))?;
        }
        Ok(())
    }
}

/// Checks the options and what each trainer declares.
pub(crate) fn trainers(trainers: &[TrainerManifest], options: &PlanOptions) -> Result<(), ManifestError> {
    options.validate()?;
    ranks("training", trainers.len())?;
    let trainers = (0..).map(|rank| Rank::Trainer(TrainerRank(rank))).zip(trainers);
    trainers.into_iter().try_for_each(|(rank, trainer)| validate_trainer(rank, trainer))
}

/// Checks what each receiver declares, its parameters' maps left out: many receivers have the same ones.
pub(crate) fn receivers(receivers: &[ReceiverManifest]) -> Result<(), ManifestError> {
    ranks("inference", receivers.len())?;
    let receivers = (0..).map(|rank| Rank::Receiver(ReceiverRank(rank))).zip(receivers);
    receivers.into_iter().try_for_each(|(rank, receiver)| validate_receiver(rank, receiver))
}

/// Checks a parameter's map by itself.
pub(crate) fn map(receiver: ReceiverRank, param: &DestinationParam) -> Result<(), ManifestError> {
    let rank = Rank::Receiver(receiver);
    let tensors = param.map.tensors().map_err(|source| ManifestError::Layout {
        rank,
        name: shorten(&param.name),
        source,
    })?;
    tensors.into_iter().try_for_each(|tensor| name(rank, "tensor", tensor))
}

fn ranks(side: &'static str, found: usize) -> Result<(), ManifestError> {
    if found > RANKS_MAX { Err(ManifestError::TooManyRanks { side, found, max: RANKS_MAX }) } else { Ok(()) }
}

impl PlanOptions {
    /// Checks the options by themselves.
    pub(crate) fn validate(&self) -> Result<(), ManifestError> {
        for (option, value) in [
            ("chunk_bytes_max", self.chunk_bytes_max),
            ("gather_chunk_bytes_max", self.gather_chunk_bytes_max),
        ] {
            let (step, min, max) = (CHUNK_BYTES_STEP, CHUNK_BYTES_MIN, CHUNK_BYTES_MAX);
            if !(min..=max).contains(&value) || !value.is_multiple_of(step) {
                return Err(ManifestError::BadChunk { option, value, step, min, max });
            }
        }
        if self.watermark_bytes < self.gather_chunk_bytes_max.min(self.chunk_bytes_max) {
            let (watermark, chunk) = (self.watermark_bytes, self.gather_chunk_bytes_max);
            return Err(ManifestError::WatermarkTooLow { watermark, chunk });
        }
        Ok(())
    }
}

fn validate_trainer(rank: Rank, trainer: &TrainerManifest) -> Result<(), ManifestError> {
    validate_resources(rank, &trainer.host, &trainer.regions, &trainer.rails)?;
    count(rank, "tensor pieces", trainer.pieces.len(), TENSORS_MAX)?;
    trainer.pieces.iter().try_for_each(|piece| validate_piece(rank, &trainer.regions, piece))
}

fn validate_piece(rank: Rank, regions: &[u64], piece: &SourcePiece) -> Result<(), ManifestError> {
    name(rank, "tensor", &piece.tensor)?;
    shape(rank, &piece.tensor, &piece.shape)?;
    // The global tensor must be countable too: boxes of it are multiplied out elsewhere.
    let whole = volume(piece.shape.iter().copied()).and_then(|n| n.checked_mul(piece.dtype.bytes()));
    let (Some(_), Some(bytes)) = (whole, piece.bytes()) else {
        let (name, shape) = (shorten(&piece.tensor), piece.shape.clone());
        return Err(ManifestError::TooLarge { rank, name, dtype: piece.dtype, shape });
    };
    if !piece.bounds.fits(&piece.shape) {
        let (name, shape) = (shorten(&piece.tensor), piece.shape.clone());
        let bounds = Box::new(piece.bounds.clone());
        return Err(ManifestError::BoxOutside { rank, name, bounds, shape });
    }
    in_region(rank, &piece.tensor, regions, piece.region, piece.offset, bytes)
}

fn validate_receiver(rank: Rank, receiver: &ReceiverManifest) -> Result<(), ManifestError> {
    validate_resources(rank, &receiver.host, &receiver.regions, &receiver.rails)?;
    count(rank, "parameters", receiver.params.len(), TENSORS_MAX)?;
    let mut names = BTreeSet::new();
    let mut spans = Vec::with_capacity(receiver.params.len());
    for param in &receiver.params {
        let bytes = validate_param(rank, &receiver.regions, param)?;
        if !names.insert(param.name.as_str()) {
            return Err(ManifestError::DuplicateParam { rank, name: shorten(&param.name) });
        }
        if bytes > 0 {
            spans.push((param.region, param.offset, bytes, param.name.as_str()));
        }
    }
    spans.sort_unstable();
    for pair in spans.windows(2) {
        if let [(region, offset, bytes, first), (next_region, next_offset, _, second)] = *pair
            && region == next_region
            && next_offset < offset + bytes
        {
            let (first, second) = (shorten(first), shorten(second));
            return Err(ManifestError::OverlappingParams { rank, first, second, region });
        }
    }
    Ok(())
}

fn validate_param(rank: Rank, regions: &[u64], param: &DestinationParam) -> Result<u64, ManifestError> {
    name(rank, "parameter", &param.name)?;
    shape(rank, &param.name, &param.shape)?;
    let Some(bytes) = param.bytes() else {
        let (name, shape) = (shorten(&param.name), param.shape.clone());
        return Err(ManifestError::TooLarge { rank, name, dtype: param.dtype, shape });
    };
    in_region(rank, &param.name, regions, param.region, param.offset, bytes)?;
    Ok(bytes)
}

fn validate_resources(
    rank: Rank,
    host: &str,
    regions: &[u64],
    rails: &[RailDecl],
) -> Result<(), ManifestError> {
    name(rank, "host", host)?;
    count(rank, "regions", regions.len(), REGIONS_MAX)?;
    count(rank, "rails", rails.len(), RAILS_MAX)?;
    let memory = regions.iter().try_fold(0u64, |sum, &bytes| sum.checked_add(bytes));
    if memory.is_none_or(|bytes| bytes > RANK_BYTES_MAX) {
        return Err(ManifestError::TooMuchMemory { rank, max: RANK_BYTES_MAX });
    }
    if rails.is_empty() {
        return Err(ManifestError::NoRail { rank });
    }
    let mut sum = 0u64;
    for (rail, &RailDecl { bytes_per_second }) in rails.iter().enumerate() {
        sum = match sum.checked_add(bytes_per_second) {
            Some(sum) if bytes_per_second > 0 => sum,
            _ => {
                return Err(ManifestError::BadBandwidth { rank, rail, bytes_per_second });
            }
        };
    }
    Ok(())
}

fn name(rank: Rank, what: &'static str, name: &str) -> Result<(), ManifestError> {
    if (1..=NAME_BYTES_MAX).contains(&name.len()) {
        return Ok(());
    }
    Err(ManifestError::BadName { rank, what, name: shorten(name), bytes: name.len(), max: NAME_BYTES_MAX })
}

fn shape(rank: Rank, name: &str, shape: &[u64]) -> Result<(), ManifestError> {
    if shape.len() <= DIMS_MAX {
        return Ok(());
    }
    let source = LayoutError::TooManyDims { max: DIMS_MAX };
    Err(ManifestError::Layout { rank, name: shorten(name), source })
}

fn count(rank: Rank, what: &'static str, found: usize, max: usize) -> Result<(), ManifestError> {
    if found <= max { Ok(()) } else { Err(ManifestError::TooMany { rank, what, found, max }) }
}

fn in_region(
    rank: Rank,
    name: &str,
    regions: &[u64],
    region: RegionIndex,
    offset: u64,
    bytes: u64,
) -> Result<(), ManifestError> {
    let name = || shorten(name);
    let Some(&region_bytes) = regions.get(region.index()) else {
        return Err(ManifestError::NoSuchRegion { rank, name: name(), region, regions: regions.len() });
    };
    match offset.checked_add(bytes) {
        Some(end) if end <= region_bytes => Ok(()),
        _ => Err(ManifestError::RegionTooShort { rank, name: name(), region, offset, bytes, region_bytes }),
    }
}
