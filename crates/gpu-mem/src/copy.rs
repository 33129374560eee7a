//! Copies between hosts and devices, put on a stream.
//!
//! Source and destination go in by value, stay with the [`Pending`] while the device works, and come back from it. What is
//! read by several copies at a time is handed in as an `Arc`. Every span is checked before the first is posted.
//!
//! Page-locked host memory ([`PinnedBuffer`](crate::PinnedBuffer), [`RegisteredHost`](crate::RegisteredHost)) is copied
//! beside the CPU. Other host memory goes through buffers of the driver's: several times slower, and the caller waits.

use std::mem::ManuallyDrop;

use cudarc::driver::sys;

use crate::call::{Failure, cu};
use crate::error::{Error, Failed};
use crate::memory::{DeviceMemory, HostMemory, HostMemoryMut, inside};
use crate::pending::Pending;
use crate::stream::Stream;

/// Work that was put on a stream, or what was handed in for it.
pub type Posted<T> = Result<Pending<T>, Failed<T>>;

/// What to copy where, in bytes from the start of source and destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The first byte in the source.
    pub from: u64,
    /// The first byte in the destination.
    pub to: u64,
    /// How many bytes.
    pub len: u64,
}

impl Span {
    /// The first `len` bytes of the source, to the start of the destination.
    pub fn first(len: u64) -> Self {
        Self { from: 0, to: 0, len }
    }
}

/// Equally long rows at equal distances in a source, which lie one after another in the destination, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// The first byte of the first row in the source.
    pub from: u64,
    /// The first byte in the destination.
    pub to: u64,
    /// How many rows.
    pub count: u64,
    /// Of each.
    pub bytes: u64,
    /// From the start of one to that of the next in the source; not less than `bytes`.
    pub stride: u64,
}

impl Rows {
    /// From the first byte to the last in the source, as one span with what all rows are in the destination. `None` where that is no
    /// length, or rows overlap.
    fn extents(self) -> Option<(u64, u64)> {
        let before_last = self.count.saturating_sub(1).checked_mul(self.stride)?;
        let is_empty = self.count == 0 || self.bytes == 0;
        let apart = self.count < 2 || self.stride >= self.bytes;
        let extent = if is_empty { 0 } else { before_last.checked_add(self.bytes)? };
        apart.then_some((extent, self.count.checked_mul(self.bytes)?))
    }

    fn check(self, from: Extent, to: Extent) -> Result<Vec<Checked>, Error> {
        let outside = Error::Range { offset: self.from, len: u64::MAX, available: from.1 };
        let (extent, total) = self.extents().ok_or(outside)?;
        let first = Checked {
            from: inside(from.0, from.1, self.from, extent)?,
            to: inside(to.0, to.1, self.to, total)?,
            // As in `check`.
            len: usize::try_from(self.bytes).unwrap_or(usize::MAX),
        };
        Ok(if total == 0 { Vec::new() } else { vec![first] })
    }
}

/// The longest distance between rows that every driver takes in one call (`CU_DEVICE_ATTRIBUTE_MAX_PITCH`).
const PITCH_MAX: u64 = i32::MAX as u64;

/// A span that was checked: two addresses and a length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Checked {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) len: usize,
}

/// An address range: its start and its length.
pub(crate) type Extent = (u64, u64);

pub(crate) fn check(spans: &[Span], from: Extent, to: Extent) -> Result<Vec<Checked>, Error> {
    let check = |span: &Span| {
        Ok(Checked {
            from: inside(from.0, from.1, span.from, span.len)?,
            to: inside(to.0, to.1, span.to, span.len)?,
            // It lies inside memory that this process has.
            len: usize::try_from(span.len).unwrap_or(usize::MAX),
        })
    };
    // An empty span needs no copy, and an empty buffer has no address to give for it.
    let checked = spans.iter().map(check).filter(|checked| !matches!(checked, Ok(Checked { len: 0, .. })));
    checked.collect()
}

impl Stream {
    /// Copies from host memory to the stream's device.
    ///
    /// # Errors
    ///
    /// [`Failed`] with both buffers: [`Error::Range`] for a span outside, [`Error::WrongDevice`], or the driver's. When some
    /// spans were posted before it, the call waits for them up to a second; buffers that are still in use then stay with
    /// the stream, and do not come back.
    pub fn copy_to_device<H: HostMemory, D: DeviceMemory>(
        &self,
        from: H,
        to: D,
        spans: &[Span],
    ) -> Posted<(H, D)> {
        let source = (from.bytes().as_ptr().addr() as u64, from.bytes().len() as u64);
        let checked = self.owns(&to).and_then(|()| check(spans, source, extent(&to)));
        let base = from.bytes().as_ptr();
        self.post((from, to), checked, |span| {
            let from = base.with_addr(address(span.from));
            // SAFETY: both ranges lie inside their buffers, which are held until the copy is done; the source is
            // only read meanwhile.
            unsafe { cu!(cuMemcpyHtoDAsync_v2(span.to, from.cast(), span.len, self.raw())) }
        })
    }

    /// Copies rows from host memory to the stream's device, all in one call.
    ///
    /// # Errors
    ///
    /// As [`Stream::copy_to_device`]; [`Error::Range`] also for rows that overlap.
    pub fn copy_rows_to_device<H: HostMemory, D: DeviceMemory>(
        &self,
        from: H,
        to: D,
        rows: Rows,
    ) -> Posted<(H, D)> {
        let base = from.bytes().as_ptr();
        let source = (base.addr() as u64, from.bytes().len() as u64);
        let checked = self.owns(&to).and_then(|()| rows.check(source, extent(&to)));
        // A single row has no next one.
        let stride = if rows.count < 2 { rows.bytes } else { rows.stride };
        if checked.is_ok() && stride > PITCH_MAX {
            let row = |row| {
                let (from, to) = (rows.from + row * stride, rows.to + row * rows.bytes);
                Span { from, to, len: rows.bytes }
            };
            let spans: Vec<Span> = (0..rows.count).map(row).collect();
            return self.copy_to_device(from, to, &spans);
        }
        self.post((from, to), checked, |first| {
            let copy = sys::CUDA_MEMCPY2D {
                srcXInBytes: 0,
                srcY: 0,
                srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
                srcHost: base.with_addr(address(first.from)).cast(),
                srcDevice: 0,
                srcArray: std::ptr::null_mut(),
                srcPitch: address(stride),
                dstXInBytes: 0,
                dstY: 0,
                dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
                dstHost: std::ptr::null_mut(),
                dstDevice: first.to,
                dstArray: std::ptr::null_mut(),
                dstPitch: first.len,
                WidthInBytes: first.len,
                Height: address(rows.count),
            };
            // SAFETY: from the first row to the last, both sides lie inside their buffers, which are held until the copy is done;
            // the source is only read meanwhile. The description is read during the call.
            unsafe { cu!(cuMemcpy2DAsync_v2(&raw const copy, self.raw())) }
        })
    }

    /// Copies from the stream's device to host memory.
    ///
    /// # Errors
    ///
    /// As [`Stream::copy_to_device`].
    pub fn copy_to_host<D: DeviceMemory, H: HostMemoryMut>(
        &self,
        from: D,
        mut to: H,
        spans: &[Span],
    ) -> Posted<(D, H)> {
        let base = to.bytes_mut().as_mut_ptr();
        let destination = (base.addr() as u64, to.bytes().len() as u64);
        let checked = self.owns(&from).and_then(|()| check(spans, extent(&from), destination));
        self.post((from, to), checked, |span| {
            let to = base.with_addr(address(span.to));
            // SAFETY: both ranges lie inside their buffers, which are held until the copy is done; nobody else can
            // reach the destination, which was handed in by value.
            unsafe { cu!(cuMemcpyDtoHAsync_v2(to.cast(), span.from, span.len, self.raw())) }
        })
    }

    /// Copies on the stream's device, or between it and another; directly where access between them is enabled, and
    /// through the host otherwise.
    ///
    /// # Errors
    ///
    /// As [`Stream::copy_to_device`].
    pub fn copy<S: DeviceMemory, D: DeviceMemory>(&self, from: S, to: D, spans: &[Span]) -> Posted<(S, D)> {
        let owned = self.owns(&from).or_else(|_| self.owns(&to));
        let checked = owned.and_then(|()| check(spans, extent(&from), extent(&to)));
        let (source, destination) = (from.device().context(), to.device().context());
        let on_one_device = from.device().same_as(to.device());
        self.post((from, to), checked, |span| {
            let Checked { from, to, len } = *span;
            if on_one_device {
                // SAFETY: both ranges lie inside their buffers, which are held until the copy is done.
                unsafe { cu!(cuMemcpyDtoDAsync_v2(to, from, len, self.raw())) }
            } else {
                // SAFETY: as above; each buffer's device keeps its context.
                unsafe { cu!(cuMemcpyPeerAsync(to, destination, from, source, len, self.raw())) }
            }
        })
    }

    /// Sets every byte to `value`.
    ///
    /// # Errors
    ///
    /// As [`Stream::copy_to_device`].
    pub fn fill<D: DeviceMemory>(&self, to: D, value: u8) -> Posted<D> {
        let all = Span::first(to.len());
        let checked = self.owns(&to).and_then(|()| check(&[all], extent(&to), extent(&to)));
        self.post(to, checked, |span| {
            // SAFETY: the range is the buffer, which is held until it is filled.
            unsafe { cu!(cuMemsetD8Async(span.to, value, span.len, self.raw())) }
        })
    }

    pub(crate) fn owns(&self, memory: &impl DeviceMemory) -> Result<(), Error> {
        if memory.device().same_as(self.device()) {
            return Ok(());
        }
        Err(Error::WrongDevice {
            what: format!("the memory at {:#x}", memory.address()),
            found: memory.device().to_string(),
            expected: self.device().to_string(),
        })
    }

    /// Posts what was checked, and takes the buffers over. What comes back when this fails is not in use.
    pub(crate) fn post<T: Send + 'static>(
        &self,
        buffers: T,
        checked: Result<Vec<Checked>, Error>,
        post: impl Fn(&Checked) -> Result<(), Failure>,
    ) -> Posted<T> {
        let checked = match checked {
            Ok(checked) => checked,
            Err(error) => return Err(Failed::with(error, buffers)),
        };
        // From here on a panic leaks the buffers: they may be in use.
        let buffers = ManuallyDrop::new(buffers);
        let mut tried = 0_usize;
        let posted = self.device().run(|| {
            checked.iter().try_for_each(|span| {
                tried += 1;
                post(span)
            })
        });
        match posted {
            Ok(()) => self.hold_posted(buffers),
            // Nothing was posted: no call was made, or the first was refused.
            Err(error) if tried == 0 || (tried == 1 && !error.is_device_lost()) => {
                Err(Failed::with(error, ManuallyDrop::into_inner(buffers)))
            }
            // Some may have been posted before the one that failed.
            Err(error) => Err(self.settle(error, buffers)),
        }
    }
}

pub(crate) fn extent(memory: &impl DeviceMemory) -> Extent {
    (memory.address(), memory.len())
}

/// An address of this process, which fits.
pub(crate) fn address(address: u64) -> usize {
    usize::try_from(address).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn spans_are_copied_when_every_one_lies_inside(
            parts in proptest::collection::vec((0..20_u64, 0..20_u64, 0..20_u64), 0..6),
            from_len in 0..30_u64,
            to_len in 0..30_u64,
        ) {
            let spans: Vec<Span> = parts.iter().map(|&(from, to, len)| Span { from, to, len }).collect();
            let fits = |span: &Span| span.from + span.len <= from_len && span.to + span.len <= to_len;
            match check(&spans, (1000, from_len), (5000, to_len)) {
                Ok(checked) => {
                    prop_assert!(spans.iter().all(fits));
                    let expected: Vec<_> = spans.iter().filter(|span| span.len > 0)
                        .map(|span| Checked { from: 1000 + span.from, to: 5000 + span.to, len: span.len as usize }).collect();
                    prop_assert_eq!(checked, expected);
                }
                Err(error) => {
                    let is_range = matches!(error, Error::Range { .. });
                    prop_assert!(is_range, "{}", error);
                    prop_assert!(!spans.iter().all(fits));
                }
            }
        }
    }
}
