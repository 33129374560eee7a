//! The memory that holds an inference rank's weights.

use efa_core::{LeaseMut, Target};
use xfer_exec::local::SharedFile;

use crate::error::Error;

/// Handles on one memory. All of it present: a file that peers on this host may map, or where none will, memory of this process alone.
#[derive(Clone)]
pub(crate) struct Arena {
    pub(crate) target: Target,
    pub(crate) file: Option<SharedFile>,
}

impl Arena {
    /// `bytes` zero bytes. Blocks: the kernel takes its time to find and clear so much memory.
    pub(crate) fn new(bytes: u64, shared: bool) -> Result<Self, Error> {
        let no_memory = |reason: String| Error::Memory { what: "the weights", reason };
        if shared {
            let made = SharedFile::create(bytes).map_err(|error| no_memory(error.to_string()))?;
            return Ok(Self { target: made.0, file: Some(made.1) });
        }
        let too_long = |_| no_memory(format!("{bytes} bytes do not fit this machine's addresses"));
        let len = usize::try_from(bytes).map_err(too_long)?;
        let lease = LeaseMut::committed(len).map_err(|error| no_memory(error.to_string()))?;
        Ok(Self { target: lease.expose(), file: None })
    }

    /// Puts memory where it is that nobody else has mapped: a process that was stopped in the middle of a copy would go on with
    /// it when it wakes. What is there is lost.
    pub(crate) fn renew(&mut self) -> Result<(), Error> {
        let no_memory = |reason: String| Error::Memory { what: "the weights", reason };
        match &mut self.file {
            Some(file) => file.renew(&self.target).map_err(|error| no_memory(error.to_string())),
            None => Ok(()),
        }
    }
}
