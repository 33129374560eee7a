//! Host memory as the runner sees it: the regions of the push and the staging slots, and a thread that fills them.
//!
//! A slot is given to the gather thread only when no rail holds a slice of it.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender as ChannelSender};
use efa_core::{Lease, LeaseMut};
use xfer_plan::Op;

use super::closing::{Closed, Closings};
use super::gather::{self, Gathered, Job, Weights};
use super::slots::HostSlots;
use super::transform::{self, Transforms};
use super::{Staged, Store};
use crate::engine::{Post, Slot, Source};
use crate::program::Program;
use crate::quant::Quantization;
use crate::rail::{Rail, RailIndex};
use crate::runner::Memory;

const OUTSIDE: &str = "the plan gathers or transforms what is not in this rank's memory";

/// See the module.
pub struct HostMemory {
    /// Of the push that runs.
    weights: Option<Arc<Weights>>,
    quantization: Arc<Quantization>,
    slots: HostSlots,
    to_gather: ChannelSender<Job>,
    from_gather: Receiver<Gathered>,
    closing: Closings,
}

impl HostMemory {
    /// Cuts `staging` into slots of `slot_bytes`. Starts the thread that fills them.
    pub(super) fn new(
        staging: LeaseMut,
        slot_bytes: u64,
        close_max: Duration,
        program: &Program,
    ) -> io::Result<Self> {
        let slots = HostSlots::new(staging, slot_bytes);
        let (to_gather, from_gather) = gather::start("rows", slots.len() as usize)?;
        let (quantization, closing) = (Arc::clone(program.quantization()), Closings::new(close_max));
        Ok(Self { weights: None, quantization, slots, to_gather, from_gather, closing })
    }
}

impl Store for HostMemory {
    type Region = Lease;

    fn slots(&self) -> u32 {
        self.slots.len()
    }

    fn magnitudes(&mut self, regions: &[Lease]) -> Result<Vec<f32>, String> {
        transform::magnitudes(&self.quantization, regions).ok_or_else(|| OUTSIDE.to_owned())
    }

    fn begin(&mut self, regions: Vec<Lease>, told: &[f32]) -> Result<(), String> {
        let transforms = Transforms::new(&self.quantization, told);
        let result = match &transforms {
            Some(_) => Ok(()),
            None => Err(self.quantization.told_wrongly(told)),
        };
        let transforms = Mutex::new(transforms.unwrap_or_default());
        self.weights = Some(Arc::new(Weights { regions, transforms }));
        result
    }

    fn end(&mut self) -> Vec<Lease> {
        let Some(weights) = self.weights.take() else { return Vec::new() };
        // A fill that was given up still reads them: it keeps handles of its own.
        let shared = |weights: Arc<Weights>| {
            weights.regions.iter().filter_map(|region| region.slice(0..region.len())).collect()
        };
        Arc::try_unwrap(weights).map_or_else(shared, |weights| weights.regions)
    }

    fn staged(&mut self) -> Option<Staged> {
        let Gathered { slot, lease, took, ok } = self.from_gather.try_recv().ok()?;
        self.slots.give_back(slot, lease);
        let result = if ok { Ok(()) } else { Err(OUTSIDE.to_owned()) };
        Some(Staged { slot, took, result })
    }

    fn closed(&mut self) -> Option<(RailIndex, Closed)> {
        self.closing.over()
    }
}

impl Memory for HostMemory {
    type Rail = dyn Rail<Buffer = Lease> + Send;

    fn buffer(&mut self, post: &Post) -> Option<Lease> {
        let bytes = usize::try_from(post.rows.extent_bytes()?).ok()?;
        match post.source {
            Source::Region(region, offset) => {
                let offset = usize::try_from(offset).ok()?;
                self.weights.as_ref()?.regions.get(region.index())?.slice(offset..offset.checked_add(bytes)?)
            }
            Source::Slot(slot, offset) => self.slots.slice(slot, offset, bytes),
        }
    }

    fn stage(&mut self, slot: Slot, _index: u32, op: &Op) -> Result<(), String> {
        let weights = self.weights.clone();
        let job =
            weights.and_then(|weights| Some(Job { slot, op: *op, weights, into: self.slots.take(slot)? }));
        // The queue has room for every slot.
        let sent = job.is_some_and(|job| self.to_gather.try_send(job).is_ok());
        if sent { Ok(()) } else { Err("defect: a slot is filled without memory".into()) }
    }

    fn close(&mut self, number: RailIndex, rail: Box<Self::Rail>) {
        self.closing.begin(number, rail);
    }
}
