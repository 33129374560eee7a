//! One launch of one kernel, ready to be repeated. The only place here that makes the device touch memory.

use std::fmt;
use std::sync::Arc;

use gpu_mem::{Arg, DeviceMemory, Failed, Function, Launch, Pending, Stream};

use crate::cuda::Kernels;
use crate::cuda::error::Error;
use crate::cuda::memory::DeviceRange;
use crate::cuda::quantize::TileArgs;

/// Blocks of threads that CUDA launches in one dimension.
const BLOCKS_MAX: u64 = i32::MAX as u64;

/// Work that a stream can do: it was checked, and holds its memory.
pub struct Operation {
    function: Function,
    /// None of it where there is nothing to do.
    blocks: u32,
    threads: u32,
    arguments: Vec<Argument>,
    /// All that the kernel reaches.
    holds: Arc<[DeviceRange]>,
}

/// What a kernel is passed, with the types that it declares.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Argument {
    /// An address or a number.
    U64(u64),
    Tiles(TileArgs),
}

impl Kernels {
    /// Makes an operation. `arguments` reach nothing but `holds`, and within it only what the kernel's caller has checked.
    pub(crate) fn operation(
        &self,
        function: Function,
        blocks: u64,
        threads: u32,
        arguments: Vec<Argument>,
        holds: impl Into<Arc<[DeviceRange]>>,
    ) -> Result<Operation, Error> {
        let holds = holds.into();
        holds.iter().try_for_each(|range| self.reach(range))?;
        let count = u32::try_from(blocks).ok().filter(|&count| u64::from(count) <= BLOCKS_MAX);
        let blocks = count.ok_or(Error::TooMany { count: blocks })?;
        Ok(Operation { function, blocks, threads, arguments, holds })
    }

    /// Lets the kernels touch a range. What was mapped on another device is refused: access to that is given mapping by
    /// mapping, and a kernel without it would end the whole context.
    fn reach(&self, range: &DeviceRange) -> Result<(), Error> {
        let owner = range.device();
        if owner.same_as(self.device()) {
            return Ok(());
        }
        let segments = owner.segments(&[(range.address(), range.len())])?;
        if segments.iter().any(|segment| segment.is_mapped) {
            let (memory, on) = (format!("{range:?}"), self.device().to_string());
            return Err(Error::MappedElsewhere { memory, on });
        }
        Ok(self.device().enable_access(owner)?)
    }
}

impl Operation {
    /// Puts the work behind what the stream has to do already. The operation comes back when it is done, to be used again.
    ///
    /// # Errors
    /// When the stream is of another device than the kernels, or CUDA refuses. The operation comes back then too.
    #[allow(clippy::result_large_err)] // it carries the operation back
    pub fn enqueue(self, stream: &Stream) -> Result<Pending<Self>, Failed<Self>> {
        match self.launch(stream) {
            Ok(()) => stream.hold(self),
            Err(error) => Err(Failed { error, returned: Some(self) }),
        }
    }

    /// As [`enqueue`](Self::enqueue) for several that follow one another, or none: one event says when all are done.
    ///
    /// # Errors
    /// As [`enqueue`](Self::enqueue). Those before the one that was refused take place; what they use is held until then.
    #[allow(clippy::result_large_err)]
    pub fn enqueue_all(
        operations: Vec<Self>,
        stream: &Stream,
    ) -> Result<Pending<Vec<Self>>, Failed<Vec<Self>>> {
        let launched = operations.iter().try_for_each(|operation| operation.launch(stream));
        let pending = stream.hold(operations)?;
        match launched {
            Ok(()) => Ok(pending),
            // Dropped, it stays parked at the stream for as long as something of it is used.
            Err(error) => Err(Failed { error, returned: None }),
        }
    }

    /// Puts the kernel on a stream. Whoever calls this keeps the operation until the stream has passed it.
    fn launch(&self, stream: &Stream) -> Result<(), gpu_mem::Error> {
        if self.blocks > 0 {
            let arguments: Vec<Arg<'_>> = self.arguments.iter().map(Argument::pass).collect();
            let launch = Launch::linear(self.blocks, self.threads);
            // SAFETY: whoever made this operation passed arguments of the kernel's types and checked that they reach
            // nothing but `holds`. Those stay allocated until the stream has passed this point, because both callers hold
            // the whole operation at the stream behind it. What is read is bytes, of which every value will do.
            #[allow(unsafe_code)]
            unsafe {
                self.function.launch(stream, launch, &arguments)?;
            }
        }
        Ok(())
    }
}

impl Argument {
    fn pass(&self) -> Arg<'_> {
        match self {
            Argument::U64(value) => Arg::new(value),
            Argument::Tiles(tiles) => Arg::new(tiles),
        }
    }
}

impl fmt::Debug for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Operation { function, blocks, threads, holds, .. } = self;
        write!(f, "Operation({}, {blocks} x {threads} threads, {holds:?})", function.name())
    }
}
