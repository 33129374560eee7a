//! The maps of a job, made for one rank of its receivers.
//!
//! Names, shards and repetitions become plain tensors, slices and concatenations. All that is made is counted against
//! a budget first, so that a short file cannot ask for endless maps.

use std::collections::BTreeMap;

use super::error::ModelError;
use super::infer::priority;
use super::job::{Each, MapJob, ParamJob, wrong};
use super::machine::{Arena, PIECES_MAX, REGION};
use super::names::{Values, fill};
use crate::error::{LayoutError, shorten};
use crate::limits::MAP_DEPTH_MAX;
use crate::manifest::DestinationParam;
use crate::param_map::ParamMap;
use crate::tensor_box::{TensorBox, volume};

/// A rank's place along one factor of its layout.
pub(crate) struct Axis<'a> {
    pub(crate) name: &'a str,
    pub(crate) size: u64,
    pub(crate) index: u64,
}

/// Makes the maps of one rank.
pub(crate) struct Maker<'a> {
    /// The last factor first.
    pub(crate) place: Vec<Axis<'a>>,
    /// Of all source tensors.
    pub(crate) shapes: &'a BTreeMap<&'a str, &'a [u64]>,
    /// Nodes of maps that may still be made.
    pub(crate) budget: usize,
}

impl ParamJob {
    pub(crate) fn param<'j>(
        &'j self,
        mut values: Values<'j>,
        maker: &mut Maker<'_>,
        arena: &mut Arena,
        layers: u32,
        at: &dyn Fn() -> String,
    ) -> Result<DestinationParam, ModelError> {
        let name = fill(&self.name, &values).map_err(|detail| wrong(at(), detail))?;
        let layer = values.iter().find(|(name, _)| *name == "layer").map(|&(_, layer)| layer);
        let map = maker.map(&self.map, &mut values, 1, at)?;
        let shape = maker.shape(&map, at)?;
        let bytes = volume(shape.iter().copied()).and_then(|n| n.checked_mul(self.dtype.bytes()));
        let offset = bytes.and_then(|bytes| arena.place(bytes));
        let offset = offset.ok_or_else(|| wrong(at(), "it has more bytes than 64 bits can count"))?;
        let priority = priority(self.end.depth(layer), layers);
        Ok(DestinationParam {
            name,
            dtype: self.dtype,
            shape,
            region: REGION,
            offset,
            map: map.into(),
            priority,
        })
    }
}

impl Maker<'_> {
    fn shape(&self, map: &ParamMap, at: &dyn Fn() -> String) -> Result<Vec<u64>, ModelError> {
        map.shape(|name| self.shapes.get(name).map(|shape| shape.to_vec()))
            .map_err(|source| ModelError::Layout { name: at(), source })
    }

    fn axis(&self, name: &str, at: &dyn Fn() -> String) -> Result<&Axis<'_>, ModelError> {
        self.place.iter().find(|axis| axis.name == name).ok_or_else(|| {
            let known: Vec<&str> = self.place.iter().rev().map(|axis| axis.name).collect();
            let (name, known) = (shorten(name), known.join(", "));
            wrong(at(), format!("`{name}` is no factor of the layout, which has {known}"))
        })
    }

    fn map<'j>(
        &mut self,
        job: &'j MapJob,
        values: &mut Values<'j>,
        depth: usize,
        at: &dyn Fn() -> String,
    ) -> Result<ParamMap, ModelError> {
        let layout = |source| ModelError::Layout { name: at(), source };
        if depth > MAP_DEPTH_MAX {
            return Err(layout(LayoutError::MapTooDeep { max: MAP_DEPTH_MAX }));
        }
        let Some(budget) = self.budget.checked_sub(1) else {
            return Err(ModelError::TooManyPieces { what: "nodes of maps", max: PIECES_MAX });
        };
        self.budget = budget;
        let mut inner = |of: &'j MapJob| self.map(of, values, depth + 1, at);
        Ok(match job {
            MapJob::Tensor(name) => {
                let name = fill(name, values).map_err(|detail| wrong(at(), detail))?;
                let Some(shape) = self.shapes.get(name.as_str()) else {
                    return Err(layout(LayoutError::UnknownTensor { tensor: shorten(&name) }));
                };
                ParamMap::tensor(name).shaped(shape)
            }
            MapJob::Slice { of, start, len } => {
                let bounds = TensorBox::new(start, len).map_err(layout)?;
                inner(of)?.slice(bounds)
            }
            MapJob::Shard { of, dim, by } => {
                let of = inner(of)?;
                let &Axis { size, index, .. } = self.axis(by, at)?;
                let shape = self.shape(&of, at)?;
                of.shard(&shape, *dim, size, index).map_err(layout)?
            }
            MapJob::Concat { parts, .. } if parts.is_empty() => return Err(layout(LayoutError::EmptyConcat)),
            MapJob::Concat { dim, parts, each: None } => {
                ParamMap::concat(*dim, parts.iter().map(inner).collect::<Result<Vec<_>, _>>()?)
            }
            MapJob::Concat { dim, parts, each: Some(each) } => {
                let mut maps = Vec::new();
                for value in self.values(each, at)? {
                    values.push((each.variable.as_str(), value));
                    for part in parts {
                        maps.push(self.map(part, values, depth + 1, at)?);
                    }
                    values.pop();
                }
                ParamMap::concat(*dim, maps)
            }
            MapJob::Pad { of, dim, len } => inner(of)?.pad(*dim, *len),
            MapJob::View { of, shape } => inner(of)?.view(shape),
            MapJob::Cast { of, to } => inner(of)?.cast(*to),
            MapJob::Quantize { of, quant } => inner(of)?.quantize(*quant),
            MapJob::Scales { of, quant } => inner(of)?.scales(*quant),
        })
    }

    /// The values that a variable takes on this rank.
    fn values(&self, each: &Each, at: &dyn Fn() -> String) -> Result<std::ops::Range<u32>, ModelError> {
        let [from, to] = each.range;
        let Some(by) = &each.by else { return Ok(from..to) };
        let &Axis { size, index, .. } = self.axis(by, at)?;
        // Both are at most RANKS_MAX.
        let (size, index) = (u32::try_from(size).unwrap_or(u32::MAX), u32::try_from(index).unwrap_or(0));
        let count = to.saturating_sub(from);
        if !count.is_multiple_of(size) {
            let (variable, by) = (shorten(&each.variable), shorten(by));
            let detail = format!("{count} values of `{variable}` cannot be divided evenly by {by}={size}");
            return Err(wrong(at(), detail));
        }
        let own = count / size;
        Ok(from + own * index..from + own * (index + 1))
    }
}
