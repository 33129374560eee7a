//! Host memory as the runner sees it: the regions of the push and the staging slots, and a thread that gathers.
//!
//! A slot is a lease that is either free, away with the gather thread, or read by rails. None is given to the gather thread
//! while a rail still holds a slice of it.

use std::io;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender as ChannelSender};
use efa_core::{Lease, LeaseMut};
use xfer_plan::Op;

use super::closing::{Closed, Closings};
use super::gather::{self, Gathered, Job};
use super::{Staged, Store};
use crate::engine::{Post, Slot, Source};
use crate::rail::{Rail, RailIndex};
use crate::runner::Memory;

/// Staging slots at most: far more than any rail has in flight, so that tiny gathers do not turn a large
/// watermark into millions of slots.
const SLOTS_MAX: usize = 1024;

enum SlotMemory {
    Free(LeaseMut),
    Gathering,
    /// Being written from; the rail holds slices of it.
    Filled(Lease),
}

/// See the module.
pub struct HostMemory {
    /// Of the push that runs.
    regions: Vec<Lease>,
    slots: Vec<SlotMemory>,
    to_gather: ChannelSender<Job>,
    from_gather: Receiver<Gathered>,
    closing: Closings,
}

impl HostMemory {
    /// Cuts `staging` into slots of `slot_bytes`. Starts the thread that gathers.
    pub(super) fn new(mut staging: LeaseMut, slot_bytes: u64, close_max: Duration) -> io::Result<Self> {
        let slot_bytes = usize::try_from(slot_bytes).unwrap_or(usize::MAX);
        let mut slots = Vec::new();
        while slots.len() < SLOTS_MAX
            && let Some(slot) = staging.split_to(slot_bytes).filter(|slot| !slot.is_empty())
        {
            slots.push(SlotMemory::Free(slot));
        }
        let (to_gather, from_gather) = gather::start("rows", slots.len())?;
        let (regions, closing) = (Vec::new(), Closings::new(close_max));
        Ok(Self { regions, slots, to_gather, from_gather, closing })
    }

    /// The slot's memory, if no rail reads it: it is away afterwards.
    fn take_free(&mut self, slot: Slot) -> Option<LeaseMut> {
        let memory = self.slots.get_mut(slot.0 as usize)?;
        match std::mem::replace(memory, SlotMemory::Gathering) {
            SlotMemory::Free(lease) => Some(lease),
            SlotMemory::Filled(lease) => match lease.thaw() {
                Ok(lease) => Some(lease),
                Err(lease) => {
                    *memory = SlotMemory::Filled(lease);
                    None
                }
            },
            SlotMemory::Gathering => None,
        }
    }
}

impl Store for HostMemory {
    fn slots(&self) -> u32 {
        self.slots.len() as u32
    }

    fn begin(&mut self, regions: Vec<Lease>) {
        self.regions = regions;
    }

    fn end(&mut self) -> Vec<Lease> {
        std::mem::take(&mut self.regions)
    }

    fn staged(&mut self) -> Option<Staged> {
        let Gathered { slot, lease, took, ok } = self.from_gather.try_recv().ok()?;
        if let Some(memory) = self.slots.get_mut(slot.0 as usize) {
            *memory = SlotMemory::Filled(lease.freeze());
        }
        let result = if ok { Ok(()) } else { Err("the plan gathers outside this rank's memory".into()) };
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
                self.regions.get(region.index())?.slice(offset..offset.checked_add(bytes)?)
            }
            Source::Slot(slot, offset) => match self.slots.get(slot.0 as usize)? {
                SlotMemory::Filled(lease) => {
                    let offset = usize::try_from(offset).ok()?;
                    lease.slice(offset..offset.checked_add(bytes)?)
                }
                SlotMemory::Free(_) | SlotMemory::Gathering => None,
            },
        }
    }

    fn stage(&mut self, slot: Slot, _index: u32, op: &Op) -> Result<(), String> {
        let source = usize::try_from(op.source.offset).ok().and_then(|from| {
            let region = self.regions.get(op.source.region.index())?;
            region.slice(from..region.len())
        });
        let job = source.and_then(|source| Some(Job { slot, op: *op, source, into: self.take_free(slot)? }));
        // The queue has room for every slot.
        let sent = job.is_some_and(|job| self.to_gather.try_send(job).is_ok());
        if sent { Ok(()) } else { Err("defect: a gather without memory".into()) }
    }

    fn close(&mut self, number: RailIndex, rail: Box<Self::Rail>) {
        self.closing.begin(number, rail);
    }
}
