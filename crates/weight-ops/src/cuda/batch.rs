//! Copies that are gathered as they come and leave together, without waiting and with tables that are kept.
//!
//! [`Kernels::copy_spans`] brings its list to the device once, for copies that are repeated. Where every list is new, that
//! would allocate and wait each time, and freeing memory waits for all work of a device. A [`CopyBatch`] keeps its tables, and
//! they travel on a stream of their own while an earlier batch is copied.

use std::sync::Arc;

use bytemuck::must_cast_slice;
use gpu_mem::{DeviceMemory, Pending, PinnedBuffer, Stream};

use crate::cuda::Kernels;
use crate::cuda::boxes::{self, BoxCopy};
use crate::cuda::copy::{self, Span, THREADS, address_of, persistent_blocks};
use crate::cuda::error::Error;
use crate::cuda::memory::DeviceRange;
use crate::cuda::operation::{Argument, Operation};

/// Tables for fewer bytes are not worth their allocation.
const TABLE_BYTES_MIN: usize = 64 << 10;

/// Spans and boxes to be copied at once. What is written must not overlap with what another copy of it reads or writes.
pub struct CopyBatch {
    kernels: Kernels,
    spans: Vec<copy::Piece>,
    boxes: Vec<boxes::Descriptor>,
    box_pieces: Vec<boxes::Piece>,
    holds: Vec<DeviceRange>,
    tables: Option<Tables>,
}

/// Where the lists are on the host and on the device: equally many bytes.
type Tables = (PinnedBuffer, DeviceRange);

/// A batch that a stream works on. Dropping it frees nothing before that has ended.
#[must_use = "wait for it to have the batch back"]
pub struct PendingBatch {
    upload: Option<Pending<Tables>>,
    launches: Vec<Pending<Operation>>,
    batch: CopyBatch,
}

impl Kernels {
    /// An empty batch.
    pub fn batch(&self) -> CopyBatch {
        let (spans, boxes, box_pieces, holds) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        CopyBatch { kernels: self.clone(), spans, boxes, box_pieces, holds, tables: None }
    }
}

impl CopyBatch {
    /// Makes room for lists of `bytes` now, so that none of up to this length allocates. A list takes 24 bytes for each 8 KiB
    /// that are copied and each span that does not begin with such a piece, at most twice as many for rows, and 80 for each box.
    ///
    /// # Errors
    /// When page-locked or device memory for them cannot be had.
    pub fn with_room(mut self, bytes: u64) -> Result<Self, Error> {
        self.tables = Some(self.kernels.tables(self.tables.take(), bytes)?);
        Ok(self)
    }

    /// Adds contiguous bytes. Places name `regions`, which may be memory of peers.
    ///
    /// # Errors
    /// When the span names no region or does not lie in its own, or the list would be too long; the batch is as it was.
    pub fn span(&mut self, regions: &[DeviceRange], span: &Span) -> Result<(), Error> {
        let source = address_of(regions, span.source, span.bytes, "span", 0)?;
        let destination = address_of(regions, span.destination, span.bytes, "span", 0)?;
        copy::cut(source, destination, span.bytes, &mut self.spans)?;
        self.hold(regions);
        Ok(())
    }

    /// Adds rows of equal length.
    ///
    /// # Errors
    /// As [`Kernels::copy_boxes`], where it is about one box; the batch is as it was.
    pub fn rows(&mut self, regions: &[DeviceRange], copy: &BoxCopy) -> Result<(), Error> {
        let rows = copy.rows()?;
        if rows == 0 || copy.row_bytes == 0 {
            return Ok(());
        }
        let count = self.boxes.len() as u64;
        let number = u32::try_from(count).map_err(|_| Error::TooMany { count })?;
        let descriptor = copy.describe(regions, 0)?;
        boxes::cut(number, rows, copy.row_bytes, &mut self.box_pieces)?;
        self.boxes.push(descriptor);
        self.hold(regions);
        Ok(())
    }

    /// Keeps regions. Neighbours mostly are of the same memory: held once, that makes short spans a quarter cheaper to add.
    fn hold(&mut self, regions: &[DeviceRange]) {
        for region in regions {
            if !self.holds.iter().rev().take(2).any(|held| held.is_of_memory(region)) {
                self.holds.push(region.memory());
            }
        }
    }

    /// Forgets what was added.
    pub fn clear(&mut self) {
        self.spans.clear();
        self.boxes.clear();
        self.box_pieces.clear();
        self.holds.clear();
    }

    /// Puts the copies behind what `copies` has to do already, and their lists on `uploads`, which must be another stream for
    /// them to travel early. At most `multiprocessors` are kept busy. Never waits, but where page-locked or device memory
    /// for longer lists than ever before has to be allocated.
    ///
    /// # Errors
    /// When memory for the lists cannot be had, or CUDA refuses. Some of the copies may take place nevertheless; what they touch
    /// is held until then.
    pub fn enqueue(
        mut self,
        uploads: &Stream,
        copies: &Stream,
        multiprocessors: u32,
    ) -> Result<PendingBatch, Error> {
        let parts: [&[u8]; 3] =
            [must_cast_slice(&self.spans), must_cast_slice(&self.boxes), must_cast_slice(&self.box_pieces)];
        let lens = parts.map(|part| part.len() as u64);
        let len = lens.iter().sum::<u64>();
        if len == 0 {
            return Ok(PendingBatch { upload: None, launches: Vec::new(), batch: self });
        }
        let (mut host, device) = self.kernels.tables(self.tables.take(), len)?;
        let mut free = host.bytes_mut();
        for part in parts {
            if let Some((to, rest)) = std::mem::take(&mut free).split_at_mut_checked(part.len()) {
                to.copy_from_slice(part);
                free = rest;
            }
        }
        let upload = uploads.copy_to_device(host, device.clone(), &[gpu_mem::Span::first(len)])?;
        copies.wait_for(upload.event())?;

        self.holds.push(device.clone());
        let holds: Arc<[DeviceRange]> = self.holds.drain(..).collect();
        let [spans, boxes, pieces] =
            [0, lens[0], lens[0] + lens[1]].map(|offset| Argument::U64(device.address() + offset));
        let count = self.spans.len() as u64;
        let of_spans = (&self.kernels.copy_spans, count, vec![spans, Argument::U64(count)]);
        let count = self.box_pieces.len() as u64;
        let of_boxes = (&self.kernels.copy_boxes, count, vec![boxes, pieces, Argument::U64(count)]);
        let mut launches = Vec::with_capacity(2);
        for (function, count, arguments) in [of_spans, of_boxes] {
            if count > 0 {
                let (function, blocks) = (function.clone(), persistent_blocks(count, multiprocessors)?);
                let operation =
                    self.kernels.operation(function, blocks, THREADS, arguments, holds.clone())?;
                launches.push(operation.enqueue(copies)?);
            }
        }
        Ok(PendingBatch { upload: Some(upload), launches, batch: self })
    }
}

impl PendingBatch {
    /// Waits until the copies are done, and gives back the batch, empty.
    ///
    /// # Errors
    /// When the device is lost. What the batch held is leaked then.
    pub fn wait(mut self) -> Result<CopyBatch, Error> {
        for launch in self.launches {
            launch.wait()?;
        }
        if let Some(upload) = self.upload {
            self.batch.tables = Some(upload.wait()?);
        }
        self.batch.clear();
        Ok(self.batch)
    }
}

impl Kernels {
    /// Tables for `len` bytes: those that there are, or longer ones.
    fn tables(&self, kept: Option<Tables>, len: u64) -> Result<Tables, Error> {
        if let Some(tables) = kept.filter(|(host, _)| host.bytes().len() as u64 >= len) {
            return Ok(tables);
        }
        let bytes = usize::try_from(len).ok().and_then(usize::checked_next_power_of_two);
        let bytes = bytes.ok_or(Error::TooMany { count: len })?.max(TABLE_BYTES_MIN);
        let device = DeviceRange::whole(&Arc::new(self.device().alloc(bytes as u64)?));
        Ok((self.device().pinned(bytes)?, device))
    }
}

impl std::fmt::Debug for CopyBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CopyBatch({} pieces of spans, {} boxes)", self.spans.len(), self.boxes.len())
    }
}

impl std::fmt::Debug for PendingBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PendingBatch({:?}, {} launches)", self.batch, self.launches.len())
    }
}
