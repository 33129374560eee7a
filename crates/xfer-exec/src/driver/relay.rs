//! Host memory of a rank that passes on what arrives there: rails send from where others write, once that has been told.

use std::time::Duration;

use efa_core::Target;
use xfer_plan::Op;

use super::closing::{Closed, Closings};
use super::{Staged, Store};
use crate::arrivals::Arrivals;
use crate::engine::{Post, Slot, Source};
use crate::rail::{Rail, RailIndex};
use crate::runner::Memory;

/// A rail from memory that others write to.
pub type RelayRail = dyn Rail<Buffer = Target> + Send;

/// See the module. It has no staging slots: what a rank passes on is never made into anything else.
pub struct RelayMemory {
    regions: Vec<Target>,
    arrivals: Arrivals,
    closing: Closings,
}

impl RelayMemory {
    /// What arrives comes from `arrivals`. A rail may take `close_max` to close.
    pub fn new(arrivals: Arrivals, close_max: Duration) -> Self {
        Self { regions: Vec::new(), arrivals, closing: Closings::new(close_max) }
    }
}

impl Memory for RelayMemory {
    type Rail = RelayRail;

    fn buffer(&mut self, post: &Post) -> Option<Target> {
        let Source::Region(region, offset) = post.source else { return None };
        let (offset, bytes) =
            (usize::try_from(offset).ok()?, usize::try_from(post.rows.extent_bytes()?).ok()?);
        self.regions.get(region.index())?.slice(offset..offset.checked_add(bytes)?)
    }

    fn stage(&mut self, _slot: Slot, _index: u32, _op: &Op) -> Result<(), String> {
        Err("defect: a rank that passes on stages nothing".into())
    }

    fn close(&mut self, number: RailIndex, rail: Box<Self::Rail>) {
        self.closing.begin(number, rail);
    }
}

impl Store for RelayMemory {
    type Region = Target;

    fn slots(&self) -> u32 {
        0
    }

    fn magnitudes(&mut self, _regions: &[Target]) -> Result<Vec<f32>, String> {
        Ok(Vec::new())
    }

    fn begin(&mut self, regions: Vec<Target>, _told: &[f32]) -> Result<(), String> {
        self.arrivals.forget().map_err(|error| error.to_string())?;
        self.regions = regions;
        Ok(())
    }

    fn end(&mut self) -> Vec<Target> {
        std::mem::take(&mut self.regions)
    }

    fn staged(&mut self) -> Option<Staged> {
        None
    }

    fn closed(&mut self) -> Option<(RailIndex, Closed)> {
        self.closing.over()
    }

    fn arrived(&mut self, tags: &mut Vec<u32>) -> Result<(), String> {
        self.arrivals.poll(tags).map(drop).map_err(|error| error.to_string())
    }

    fn forget_arrivals(&mut self) {
        // What cannot be read then cannot when the next push begins.
        let _ = self.arrivals.forget();
    }
}
