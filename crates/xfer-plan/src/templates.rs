//! The templates that a planner knows, by what they fill.
//!
//! They depend on the trainers and not on which receivers there are, so they outlive a plan. A plan must not depend on which of
//! them were there before.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasherDefault, DefaultHasher};

use crate::digest::Digest;
use crate::error::PlanError;
use crate::ids::RegionIndex;
use crate::manifest::DestinationParam;
use crate::quant::{Blocks, ScaleTable};
use crate::schedule::encode;
use crate::source_index::TensorId;
use crate::template::{Declared, Sources, Template};
use crate::transform::BlockQuant;
use crate::validate;

/// A hasher without a random key: nothing is ever listed in the order of a hash, but not even the time that planning takes
/// should depend on chance.
pub(crate) type ByContent<K, V> = HashMap<K, V, BuildHasherDefault<DefaultHasher>>;

/// See the module.
#[derive(Default)]
pub(crate) struct Templates {
    places: ByContent<DestinationParam, usize>,
    pub(crate) list: Vec<(Template, Digest)>,
    table_ids: BTreeMap<(TensorId, BlockQuant), usize>,
    pub(crate) tables: Vec<ScaleTable>,
    /// Ranges that were found and will be asked for, by table.
    ranges: BTreeMap<usize, Blocks>,
    /// Of all templates.
    pub(crate) size: usize,
}

impl Templates {
    /// The place of a declaration's template, which is made if it is new, of at most `room` transfers.
    pub(crate) fn place(
        &mut self,
        sources: Sources<'_>,
        declared: Declared<'_>,
        mut room: usize,
    ) -> Result<usize, PlanError> {
        if let Some(&known) = self.places.get(declared.param) {
            return Ok(known);
        }
        validate::map(declared.receiver, declared.param)?;
        let wanted_by = (declared.receiver, declared.param.name.as_str());
        let Templates { table_ids, tables, ranges, .. } = self;
        let mut blocks_of = |tensor, quant, scales: bool| {
            let known = table_ids.get(&(tensor, quant)).copied();
            let number = known.unwrap_or(tables.len());
            // A tensor's ranges are many, and wanted once as a rule: they are not kept after that, but found again.
            let blocks = match (known, scales) {
                (Some(_), false) => return Ok((RegionIndex(number as u32), None)),
                (Some(_), true) if let Some(kept) = ranges.remove(&number) => kept,
                _ => Blocks::new(sources.index, tensor, quant, wanted_by)?,
            };
            if known.is_none() {
                table_ids.insert((tensor, quant), number);
                tables.push(blocks.table.clone());
            }
            let blocks = if scales { Some(blocks) } else { ranges.insert(number, blocks) };
            Ok((RegionIndex(number as u32), blocks.filter(|_| scales)))
        };
        let template = Template::new(sources, declared, &mut blocks_of, &mut room)?;
        let digest = Digest::of(declared.param).map_err(encode)?;
        self.size += template.size();
        self.places.insert(declared.param.clone(), self.list.len());
        self.list.push((template, digest));
        Ok(self.list.len() - 1)
    }
}
